"""From a run to an allocator on disk and back: with an allocator of the test's own, whose choice can be told in advance, and with ours."""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from allocation_support import OFFERING, offering_run, told_costs
from shortlist.cascade.allocation import calibration as module
from shortlist.cascade.allocation.base import Allocator, Budget, Choice, Outcomes
from shortlist.cascade.allocation.calibration import (
    allocation_path,
    calibrate,
    load_allocation,
    offered_chains,
    save_allocation,
)
from shortlist.cascade.allocation.contexts import CONTEXT_NAMES
from shortlist.cascade.allocation.outcomes import prune
from shortlist.cascade.config import RunConfig
from shortlist.cascade.lessons import make_batch
from shortlist.errors import ConfigError, DataError, SnapshotError
from shortlist.evaluation.chains import account_table, chain_table, chains_figure, markdown, sentence
from shortlist.registry import system

COSTS = {"a0-b0-c0": 4.0, "a0-b1-c0": 6.0, "a1-b0-c0": 3.0, "a1-b1-c0": 5.0, "a2-b0-c0": 2.0, "a2-b1-c0": 1.0}
"""Milliseconds that stand in for measured ones, so that nothing hangs on the machine; FLOPs are ten times as much."""


@dataclass(frozen=True, kw_only=True)
class LevelConfig:
    feature: int = CONTEXT_NAMES.index("log events")


class Level(Allocator):
    """Requests whose feature is above a level get the best chain, others the cheapest; the level keeps the budget."""

    Config = LevelConfig

    def __init__(self, config, chains, num_features):
        super().__init__(config, chains, num_features)
        self.level, self.best = np.inf, 0

    def fit(self, outcomes: Outcomes):
        assert outcomes.rewards_RJ.shape == (len(outcomes), len(self.chains))
        assert np.isfinite(outcomes.rewards_RJ).all()
        self.best = int(outcomes.rewards_RJ.mean(0).argmax())

    def aim(self, budget, contexts_RF):
        self.budget = budget
        low, high = self.chains.costs_JC[[0, self.best], 1]
        share = np.clip(((budget.ms or np.inf) - low) / max(high - low, 1e-9), 0, 1)
        order = np.sort(contexts_RF[:, self.config.feature])[::-1]
        count = int(share * len(order))
        self.level = order[count] if count < len(order) else -np.inf

    def choose(self, contexts_RF, *, most_C=None, rng=None):
        rich_R = contexts_RF[:, self.config.feature] > self.level
        nothing = np.full(len(rich_R), np.nan)
        return Choice(
            chain_R=np.where(rich_R, self.best, 0),
            value_R=nothing,
            capped_R=np.zeros(len(rich_R), dtype=bool),
            propensity_R=np.ones(len(rich_R)),
            prices_C=self.prices_C,
        )

    def state(self):
        return {**super().state(), "own": np.array([self.level, self.best], dtype=np.float64)}

    def load_state(self, state):
        super().load_state(state)
        self.level, self.best = float(state["own"][0]), int(state["own"][1])


@pytest.fixture(autouse=True)
def costs_are_told(monkeypatch):
    system("tiny-level", stage="allocation", paper="baseline")(Level)

    monkeypatch.setattr(module, "measure_costs", told_costs(COSTS))


def run_with(allocation, text=OFFERING):
    run = offering_run(text=text)
    return replace(run, config=RunConfig.from_toml(f"{text}\n[allocation]\n{allocation}"))


@pytest.fixture
def level_run():
    return run_with('system = "tiny-level"\nbudget_ms = 1.6')


def test_chains_are_costed_replayed_pruned_and_chosen(level_run, monkeypatch):
    monkeypatch.setattr(module, "prune", partial(prune, least=1))
    told = []
    found = calibrate(level_run, tell=lambda what, done, of: told.append(what))
    assert set(told) == {"replaying", "learning"}
    assert found.chains.names == tuple(sorted(COSTS, key=COSTS.__getitem__))
    worth_J = found.learned.rewards_RJ.mean(0)
    for j in range(len(found.chains)):
        assert (j in found.kept_J) == (worth_J[j] > worth_J[:j].max(initial=-1.0))
    assert 1 < len(found.kept_J) < 6
    # Other people in the two parts, and none of the log's later windows.
    assert not set(found.learned.users_R) & set(found.judged.users_R)
    assert max(found.judged.times_R) < level_run.dataset.plan.now["test"]
    assert min(found.learned.times_R) >= level_run.dataset.plan.now["valid"]
    # What the account says is what the choice gives.
    allocator = found.allocation.allocator
    chain_R = found.kept_J[allocator.choose(found.judged.contexts_RF).chain_R]
    rows = np.arange(len(found.judged))
    assert found.chosen.worth == pytest.approx(found.judged.rewards_RJ[rows, chain_R].mean())
    assert found.chosen.costs_C[1] == pytest.approx(found.chains.costs_JC[chain_R, 1].mean())
    assert found.chosen.costs_C[1] <= 1.6
    assert found.shares_J.sum() == pytest.approx(1)
    assert found.standard.costs_C.tolist() == [40, 4]
    assert found.fixed.costs_C[1] <= 1.6
    assert found.mixture.costs_C[1] <= 1.6 + 1e-9
    assert found.gain is not None
    assert found.gain.difference == pytest.approx(found.chosen.worth - found.standard.worth)
    assert np.isnan(found.expected)


def test_the_same_seed_gives_the_same(level_run):
    one, again, other = calibrate(level_run), calibrate(level_run), calibrate(level_run, seed=1)
    assert one.as_dict() == again.as_dict()
    assert set(one.learned.users_R) != set(other.learned.users_R)


def test_without_a_budget_the_default_chain_s_time_is_the_budget():
    found = calibrate(run_with('system = "tiny-level"'))
    assert found.allocation.budget == Budget(ms=4.0)
    batched = calibrate(run_with('system = "tiny-level"\nmeasured = "batched"'))
    assert batched.allocation.budget == Budget(ms=2.0)


def test_few_requests_are_enough_and_no_more_are_taken():
    found = calibrate(run_with('system = "tiny-level"\nmax_requests = 12'))
    assert (len(found.learned), len(found.judged)) == (9, 3)


def test_values_of_the_log_are_the_rewards_where_asked():
    run = run_with('system = "tiny-level"\nworth = "value"\nbudget_ms = 2.0')
    found = calibrate(run)
    money = set(np.unique(run.dataset.split.valid.target_value).tolist()) | {0.0}
    assert set(np.unique(found.judged.rewards_RJ).tolist()) <= money
    assert found.judged.rewards_RJ.max() > 1


def test_one_chain_or_far_too_many_are_refused():
    single = OFFERING.replace("offers", "# offers").partition("[systems.dnn]")[0]
    with pytest.raises(ConfigError, match="one chain, so there is nothing to choose"):
        calibrate(run_with('system = "tiny-level"', text=single))
    many = ", ".join(f"{{keep = {n}}}" for n in range(13, 213))
    text = OFFERING.replace("offers = [{keep = 12}", f"offers = [{many}", 1)
    with pytest.raises(ConfigError, match=r"make \d+ chains and at most 400"):
        offered_chains(RunConfig.from_toml(text))


# -- on disk ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(level_run, tmp_path):
    found = calibrate(level_run)
    folder = allocation_path(tmp_path / "shop")
    save_allocation(folder, found)
    return found, folder


def test_it_comes_back_and_chooses_the_same(saved, level_run):
    found, folder = saved
    assert folder.name == "shop.allocation"
    again = load_allocation(folder, version="version-1")
    batch = make_batch(level_run.dataset, level_run.dataset.split.test, level_run.cascade.max_history)
    contexts_RF = found.allocation.contexts(batch)
    np.testing.assert_array_equal(again.contexts(batch), contexts_RF)
    mine, theirs = (one.allocator.choose(contexts_RF).chain_R for one in (found.allocation, again))
    np.testing.assert_array_equal(mine, theirs)
    assert again.chains.names == found.allocation.chains.names
    assert again.budget == Budget(ms=1.6)
    assert not list(folder.rglob("*.pkl"))
    assert sorted(path.name for path in folder.iterdir()) == [
        "allocation.json",
        "allocator",
        "contexts.safetensors",
        "costs.json",
        "manifest.json",
        "summary.json",
    ]


def test_it_belongs_to_one_version_of_the_run(saved):
    _, folder = saved
    with pytest.raises(SnapshotError, match=r"calibrated on another run \(version version-1, this one is version-2\)"):
        load_allocation(folder, version="version-2")


def test_a_damaged_one_is_refused_by_file(saved):
    _, folder = saved
    path = folder / "contexts.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\x01")
    with pytest.raises(SnapshotError, match=r"contexts.safetensors is damaged"):
        load_allocation(folder, version="version-1")
    path.unlink()
    with pytest.raises(SnapshotError, match=r"contexts.safetensors is missing"):
        load_allocation(folder, version="version-1")


def test_features_of_another_version_are_refused(saved, monkeypatch):
    _, folder = saved
    monkeypatch.setattr(module, "CONTEXT_NAMES", ("something", "else"))
    with pytest.raises(SnapshotError, match="features are not those of this version; run `shortlist calibrate`"):
        load_allocation(folder, version="version-1")


def test_an_earlier_one_is_replaced_and_a_failure_changes_nothing(saved, monkeypatch):
    found, folder = saved
    save_allocation(folder, replace(found, version="version-3"))
    assert load_allocation(folder, version="version-3").budget == Budget(ms=1.6)
    monkeypatch.setattr(Level, "state", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_allocation(folder, found)
    assert load_allocation(folder, version="version-3").budget == Budget(ms=1.6)


def test_the_summary_is_plain_json(saved):
    found, folder = saved
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["agreement"] == {"mflop_alone": 1.0, "again_alone": None}
    assert [chain["name"] for chain in summary["chains"]] == list(found.chains.names)
    assert summary["default"]["ms"] == 4.0
    assert summary["expected"] is None
    assert summary["chosen"]["worth"] == found.chosen.worth
    assert json.loads((folder / "costs.json").read_text())["alone"] == list(COSTS.values())


# -- for people -------------------------------------------------------------------------------------------------------


def test_tables_say_what_was_found(saved, level_run):
    found, _ = saved
    rows = chain_table(found, level_run.config)
    assert rows[0] == ["chain", "retrieval", "ranking", "re-ranking", "MFLOP", "ms", "gain", "share"]
    assert len(rows) == 7
    default = next(row for row in rows if row[0] == "a0-b0-c0 (default)")
    assert default[1:6] == ["counts+popularity 18", "counts 18", "mmr 8", "40.000", "4.000"]
    marks = [row[-1] for row in chain_table(replace(found, kept_J=np.array([0, 3])), level_run.config)[1:]]
    assert [j for j, mark in enumerate(marks) if mark == "-"] == [1, 2, 4, 5]
    accounts = account_table(found)
    assert [len(row) for row in accounts] == [5] * 5
    assert accounts[-1][-1] == "+0.0%"
    assert markdown(accounts).splitlines()[1] == "|---|---|---|---|---|"
    assert "At a budget of 1.600 ms a request, tiny-level takes" in sentence(found)


def test_the_figure_marks_dropped_chains_and_the_allocator(saved):
    found, _ = saved
    dropped = replace(found, kept_J=np.array([0, 3]))
    svg = chains_figure(dropped, "c")
    assert svg.startswith("<svg role")
    assert "var(--accent)" in svg
    assert "dropped" in svg
    assert "dotted: budget" in svg
    assert "a2-b1-c0 1.000 ms" in svg
    assert "dotted" not in chains_figure(dropped, "c", resource="mflop")


# -- with the allocators of the registry ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fixed", "mixture", "dcaf", "greenflow", "queue-only"])
def test_every_allocator_can_be_calibrated_saved_and_loaded(name, tmp_path):
    run = run_with(f'system = "{name}"\nbudget_ms = 2.5')
    found = calibrate(run)
    assert found.chosen.costs_C[1] <= 2.5 * 1.1  # what was drawn at random may lie a little above
    save_allocation(tmp_path / "a", found)
    again = load_allocation(tmp_path / "a", version="version-1")
    one, other = (
        part.allocator.choose(found.judged.contexts_RF, rng=np.random.default_rng(3))
        for part in (found.allocation, again)
    )
    np.testing.assert_array_equal(one.chain_R, other.chain_R)
    np.testing.assert_allclose(one.value_R, other.value_R)


def test_the_oracle_can_not_serve():
    with pytest.raises((ConfigError, DataError), match="oracle"):
        calibrate(run_with('system = "oracle"\nbudget_ms = 2.5'))


def test_the_example_offers_chains_to_choose_from():
    config = RunConfig.from_toml(Path(__file__).parents[3] / "examples" / "budget.toml")
    chains = offered_chains(config)
    assert len(chains) == 27
    assert config.allocation.system == "greenflow"
    assert len({chain.actions[2].systems for chain in chains}) == 3
