"""The page and the numbers of `shortlist budget`: on a run whose costs are told, and on frontiers made by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest

from allocation_support import OFFERING, offering_run, told_costs
from shortlist.cascade.allocation import calibration as module
from shortlist.cascade.allocation.base import Budget, ChainSet
from shortlist.cascade.config import RunConfig
from shortlist.errors import ConfigError, DataError, UnknownSystem
from shortlist.evaluation.budget import (
    frontier_figure,
    frontier_table,
    judge_budgets,
    render,
    saving_sentence,
    write_budget,
)
from shortlist.evaluation.frontier import STEPS, Frontier, Point
from shortlist.metrics import Interval
from shortlist.metrics.intervals import PairedTest

COSTS = {"a0-b0-c0": 4.0, "a0-b1-c0": 6.0, "a1-b0-c0": 3.0, "a1-b1-c0": 5.0, "a2-b0-c0": 2.0, "a2-b1-c0": 1.0}
"""Milliseconds that stand in for measured ones; FLOPs are ten times as much."""
ARMS = ("fixed", "mixture", "dcaf", "oracle")


@pytest.fixture(scope="module", autouse=True)
def costs_are_told():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "measure_costs", told_costs(COSTS))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    text = f'{OFFERING}\n[allocation]\nsystem = "dcaf"\nbudget_ms = 2.5\nmax_requests = 80'
    made = offering_run(folder=tmp_path_factory.mktemp("runs") / "shop", text=OFFERING)
    return replace(made, config=RunConfig.from_toml(text))


@pytest.fixture(scope="module")
def report(run):
    return judge_budgets(run, arms=ARMS, max_requests=60)


class TestJudged:
    def test_every_arm_at_every_budget_on_test_requests(self, report, run):
        found = report.frontier
        assert found.arms == ARMS
        assert all(len(found.of(arm)) == len(STEPS) for arm in ARMS)
        assert found.num_requests == min(60, len(run.dataset.split.test))
        assert report.window == "test"
        for point in found.points:
            assert 1.0 <= point.costs_C[1] <= 6.0
            assert point.costs_C[0] == pytest.approx(10 * point.costs_C[1])
        # The oracle knows; what only fits a budget can not pass it.
        for oracle, fixed in zip(found.of("oracle"), found.of("fixed")):
            assert oracle.worth.mean >= fixed.worth.mean - 1e-9
            assert oracle.costs_C[1] <= oracle.budget.ms + 0.2  # where values tie, chains are drawn

    def test_the_same_seed_gives_the_same(self, run, report):
        again = judge_budgets(run, arms=ARMS, max_requests=60, calibration=report.calibration)
        assert json.dumps(again.frontier.as_dict()) == json.dumps(report.frontier.as_dict())

    def test_the_validation_window_is_what_the_calibration_judged(self, run, report):
        again = judge_budgets(run, window="valid", arms=("fixed",), calibration=report.calibration)
        assert again.frontier.num_requests == len(report.calibration.judged)
        np.testing.assert_allclose(again.frontier.worth_J, report.calibration.judged.rewards_RJ.mean(0))

    def test_budgets_in_flops(self, run, report):
        found = judge_budgets(run, resource="mflop", arms=("fixed",), calibration=report.calibration, max_requests=60)
        assert all(point.budget.ms is None and point.budget.mflop >= 10 for point in found.frontier.points)
        assert "MFLOP a request" in found.sentence

    def test_an_arm_named_twice_is_judged_once(self, run, report):
        found = judge_budgets(run, arms=("fixed", "fixed"), calibration=report.calibration, max_requests=60)
        assert len(found.frontier.points) == len(STEPS)

    @pytest.mark.parametrize(
        ("settings", "error", "said"),
        [
            ({"resource": "watts"}, ConfigError, "resource must be one of mflop, ms, got 'watts'"),
            ({"arms": ("dcaff",)}, UnknownSystem, "dcaf"),
            ({"arms": ("mmr",)}, ConfigError, "mmr is a reranker and can not be an arm"),
            ({"arms": ()}, ConfigError, "name at least one allocator"),
            ({"max_requests": 0}, ConfigError, "max_requests must be at least 2"),
        ],
    )
    def test_what_can_not_be_judged_is_refused_before_any_work(self, run, settings, error, said):
        told = []
        with pytest.raises(error, match=said):
            judge_budgets(run, tell=lambda *what: told.append(what), **settings)
        assert not told

    def test_a_run_of_one_chain(self, run):
        single = OFFERING.replace("offers", "# offers").partition("[systems.dnn]")[0]
        with pytest.raises(ConfigError, match="one chain, so there is nothing to choose"):
            judge_budgets(offering_run(text=single), arms=ARMS)

    def test_too_few_requests(self, run, report):
        test = run.dataset.split.test
        alone = replace(run.dataset.split, test=test.select(np.array([0])))
        few = replace(run, dataset=replace(run.dataset, split=alone))
        with pytest.raises(DataError, match="at least two people"):
            judge_budgets(few, arms=("fixed",), calibration=report.calibration)


class TestPage:
    def test_it_stands_beside_the_run_with_its_numbers(self, run, report):
        page = write_budget(run, report)
        assert page == run.folder.with_name("shop-report") / "budget.html"
        html = page.read_text()
        assert html.startswith("<!DOCTYPE html>")
        assert html.count("<svg role") == 1
        assert "<script" not in html
        assert f"What a budget buys: {run.folder.name}" in html
        assert "a0-b0-c0 (default)" in html
        assert "again alone not known" in html
        assert "nan" not in html.replace("nano", "")
        for arm in ARMS:
            assert html.count(f'<th scope="row">{arm}</th>') == len(STEPS)
        written = json.loads((page.parent / "budget.json").read_text())
        assert written == json.loads(json.dumps(report.as_dict(), allow_nan=False))
        assert not list(page.parent.glob("*.tmp"))

    def test_the_json_is_whole(self, report):
        made = json.loads(json.dumps(report.as_dict(), allow_nan=False))
        assert made["sentence"] == report.sentence
        assert made["window"] == "test"
        frontier = made["frontier"]
        assert len(frontier["points"]) == len(ARMS) * len(STEPS)
        assert {chain["name"]: chain["ms"] for chain in frontier["chains"]} == COSTS
        assert frontier["default"] == "a0-b0-c0"
        assert set(frontier["savings"]) == {"mflop", "ms"}
        assert all(set(by_arm) == set(ARMS) for by_arm in frontier["savings"].values())
        for point in frontier["points"]:
            assert set(point["gain"]) == {"difference", "low", "high", "p_value"}
            assert point["worth"]["low"] <= point["worth"]["mean"] <= point["worth"]["high"]
        assert made["calibration"]["budget"] == {"mflop": None, "ms": 2.5}

    def test_the_run_s_budget_is_marked(self, report, run):
        found = report.frontier
        marked, plain = (frontier_figure(found, "gain", "f", marked=m) for m in (2.5, None))
        assert len(marked) > len(plain)
        for arm in ("mixture", "dcaf", "oracle"):
            assert f"{arm} {found.of(arm)[0].worth.mean:.4f} at" in plain

    def test_what_the_log_brings_is_escaped(self, run, report):
        strange = replace(report, name="<shop>", frontier=replace(report.frontier, note="<b>simulated</b>"))
        html = render(run, strange)
        assert "<b>simulated" not in html
        assert "&lt;b&gt;simulated" in html
        assert "<shop>" not in html


# -- sentences, on frontiers made by hand -----------------------------------------------------------------------------


def point(arm, ms, worth, gain=0.0):
    return Point(
        arm=arm,
        budget=Budget(ms=ms),
        costs_C=np.array([10 * ms, ms]),
        worth=Interval(worth, worth - 0.01, worth + 0.01),
        rival=worth - gain,
        gain=PairedTest(gain, gain - 0.02, gain + 0.02, 0.5),
        of_oracle=float("nan"),
    )


def by_hand(*points, default=1, worth=(0.1, 0.4), ms=(1.0, 4.0)):
    """Two chains; the default one costs 4 ms and brings 0.4."""
    chains = ChainSet(
        names=("cheap", "dear"),
        stages=("retrieval",),
        model_JK=np.zeros((2, 1), dtype=np.int64),
        count_JK=np.array([[5], [9]]),
        costs_JC=np.stack([10 * np.array(ms), np.array(ms)], 1),
    )
    return Frontier(
        chains=chains, worth_J=np.array(worth), default=default, resource="ms", points=points, num_requests=9
    )


class TestSentence:
    def test_what_is_saved_at_the_same_worth(self):
        # From 0.3 at 2 ms to 0.5 at 3 ms: 0.4 at 2.5 ms, of 4 ms.
        found = by_hand(point("dcaf", 2.0, 0.3), point("dcaf", 3.0, 0.5))
        assert found.saving("dcaf") == pytest.approx(1 - 2.5 / 4)
        assert saving_sentence(found, "dcaf") == (
            "The default chain (dear) costs 4 ms a request; dcaf reaches the same worth for 62% of that."
        )

    def test_beside_the_mixture(self):
        found = by_hand(point("dcaf", 2.0, 0.4), point("mixture", 3.0, 0.4))
        assert saving_sentence(found, "dcaf").endswith(
            "dcaf reaches the same worth for 50% of that; mixing chains at random would save 25%."
        )
        dearer = by_hand(point("dcaf", 2.0, 0.4), point("mixture", 5.0, 0.4))
        assert saving_sentence(dearer, "dcaf").endswith("mixing chains at random would take 25% more.")

    def test_where_the_worth_is_never_reached(self):
        found = by_hand(point("dcaf", 2.0, 0.2), point("dcaf", 3.0, 0.3))
        assert saving_sentence(found, "dcaf").endswith(
            "dcaf does not reach its worth at any budget here, but 75.0% of it for 75% of the cost."
        )

    def test_an_arm_that_was_not_judged_leaves_the_word_to_another(self):
        found = by_hand(point("fixed", 2.0, 0.4), point("greenflow", 1.0, 0.4))
        assert "greenflow reaches" in saving_sentence(found, "dcaf")
        assert "fixed reaches" in saving_sentence(by_hand(point("fixed", 2.0, 0.4)), "dcaf")

    def test_small_costs_keep_their_digits(self):
        found = by_hand(point("dcaf", 0.0005, 0.4), ms=(0.0004, 0.0012))
        assert "costs 0.0012 ms a request" in saving_sentence(found, "dcaf")


def test_the_table_has_a_line_per_point():
    found = by_hand(point("dcaf", 2.0, 0.3, gain=0.05), replace(point("oracle", 2.0, 0.5), of_oracle=1.0))
    rows = frontier_table(found, "gain")
    assert rows[0][0] == "arm"
    assert rows[1] == [
        "dcaf",
        "2.000",
        "20.000",
        "2.000",
        "0.3000 [0.2900, 0.3100]",
        "+0.0500 [+0.0300, +0.0700]",
        "",
    ]
    assert rows[2][-1] == "100%"
