"""Energy and carbon against numbers reckoned by hand, a run measured from the outside, and a stand-in for the power counters."""

import json
import sys
import time
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from cli_support import refused, shortlist, succeeds
from shortlist.cascade.allocation.base import Allocator, ChainSet, Choice, NoSettings
from shortlist.cascade.allocation.contexts import CONTEXT_NAMES, Contexts
from shortlist.cascade.build import train_cascade
from shortlist.cascade.config import RunConfig
from shortlist.cascade.lessons import make_batch
from shortlist.cascade.meter import Meter, StageReport
from shortlist.cascade.power import EnergyConfig
from shortlist.errors import ConfigError, DataError
from shortlist.evaluation import energy
from shortlist.evaluation.energy import footprint, measure, report_dict, report_text, savings
from shortlist.evaluation.evaluate import held_out
from shortlist.evaluation.runs import evaluate_run
from shortlist.metrics import Interval
from support import shop_dataset

torch.set_num_threads(1)
QUALITY = Interval(0.25, 0.2, 0.3)
SETTINGS = """
[surface]
k = 5
[energy]
watts = 20.0
pue = 1.5
[stages.retrieval]
systems = ["personal-frequency", "item-knn", "popularity"]
keep = 15
offers = [{ systems = ["popularity"], keep = 6 }]
[stages.re-ranking]
systems = ["mmr"]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "shop"
    return train_cascade(shop_dataset(), RunConfig.from_toml(SETTINGS), folder, progress=False)


def summary(num_requests=4, mflop=250.0):
    """A meter that counted requests of one stage."""
    meter = Meter()
    report = StageReport(stage="ranking", systems=("din",), num_received=9, num_kept=3, spent_ms=5.0, spent_mflop=mflop)
    meter.add("a0", [[report]] * num_requests)
    return meter.summary()


def print_of(busy, *, name="a0", mflop=250.0, measured=None, **settings):
    return footprint(
        summary(mflop=mflop),
        name=name,
        busy_seconds=busy,
        metric="ndcg@10",
        quality=QUALITY,
        config=EnergyConfig(**settings),
        measured_kwh=measured,
    )


class TestByHand:
    def test_from_busy_seconds(self):
        """4 requests, 0.02 s busy, 10 W, PUE 1.3, 0.5 kg: 0.2 J * 1.3 / 3.6e6 = 7.2222e-8 kWh."""
        found = print_of(0.02, watts=10.0, pue=1.3, grid=0.5)
        assert found.kwh == pytest.approx(7.2222222e-8)
        assert found.kg == pytest.approx(3.6111111e-8)
        per = found.as_dict()["per_1000_requests"]
        assert per["gflop"] == pytest.approx(250)  # 250 MFLOP a request
        assert per["busy_seconds"] == pytest.approx(5)
        assert per["energy_kwh"] == pytest.approx(5 * 10 * 1.3 / 3.6e6)
        assert per["carbon_kg"] == pytest.approx(5 * 10 * 1.3 / 3.6e6 * 0.5)
        assert per["energy_kwh_of_flops"] is None

    def test_from_flops_alone(self):
        """250 GFLOP per 1,000 requests at 50 GFLOP/s are 5 s."""
        found = print_of(0.02, sustained_gflops=50.0, watts=8.0, pue=1.0)
        assert found.per_thousand(found.kwh_of_flops) == pytest.approx(5 * 8 / 3.6e6)

    def test_a_reading_takes_the_place_of_the_formula(self):
        found = print_of(0.02, measured=2e-6, pue=1.2, grid=0.4)
        assert found.kwh == pytest.approx(2.4e-6)
        assert found.kg == pytest.approx(0.96e-6)
        assert "CodeCarbon" in found.source

    def test_the_headline_of_the_paper_fits(self):
        """5,000 kWh and 3 t a day imply 0.6 kg per kWh."""
        config = EnergyConfig(watts=100.0, pue=1.25, grid=0.6)
        busy = 5_000 / 1.25 * 3.6e6 / 100
        assert config.kwh(busy) == pytest.approx(5_000)
        assert config.kg(config.kwh(busy)) == pytest.approx(3_000)

    def test_savings(self):
        """Half the FLOPs, 0.7 of the seconds: 60 % of the saving shows."""
        by = savings(print_of(0.1), print_of(0.07, mflop=125.0))
        assert by == pytest.approx({"flops": 0.5, "busy_seconds": 0.3, "energy": 0.3, "shown": 0.6})
        assert savings(print_of(0.1), print_of(0.07))["shown"] is None


def test_the_text_has_every_number_and_setting():
    text = report_text(
        [print_of(0.02, sustained_gflops=50.0), print_of(0.014, name="a1", mflop=125.0, sustained_gflops=50.0)]
    )
    for part in (
        "ndcg@10",
        "0.2500 [0.2000, 0.3000]",
        "250",
        "10 W",
        "PUE 1.3",
        "0.5 kg",
        "50 GFLOP/s",
        "measured on 4",
    ):
        assert part in text, part
    assert "a1 against a0: +50.0% FLOPs saved, +30.0% busy seconds; 60% of the one shows" in text
    assert "0.01806" in text  # Wh: 5 s * 10 W * 1.3 / 3600


class TestMeasure:
    def test_every_request_is_answered_and_counted_once(self, run):
        first, other = measure(run, ["a0-b0", "a1-b0"], max_requests=40, batch_size=16)
        requests = held_out(run.dataset, "valid", max_requests=40)
        assert first.num_requests == other.num_requests == len(requests)
        assert (first.config.watts, first.config.pue) == (20.0, 1.5)
        reference = evaluate_run(run, window="valid", max_requests=40)
        assert first.quality == reference.report.metrics["ndcg@5"]
        assert first.mflop / first.num_requests == pytest.approx(
            sum(c["mflop"] for c in reference.cost.values()), rel=1e-6
        )
        assert other.mflop < first.mflop
        assert first.kwh == pytest.approx(20 * first.busy_seconds / 3.6e6 * 1.5)

    def test_busy_seconds_are_processor_time(self, run, monkeypatch):
        """Waiting costs nothing, work does."""
        began = time.process_time()
        (found,) = measure(run, max_requests=40)
        assert 0 < found.busy_seconds <= time.process_time() - began
        answer = type(run.cascade).run

        def waits(self, *given, **more):
            time.sleep(0.05)
            return answer(self, *given, **more)

        monkeypatch.setattr(type(run.cascade), "run", waits)
        (slow,) = measure(run, max_requests=40, batch_size=8)
        assert slow.busy_seconds < 5 * 0.05

    def test_the_default_chain_is_measured_where_none_is_named(self, run):
        assert [f.name for f in measure(run, max_requests=10)] == ["a0-b0"]

    def test_what_can_not_be_measured(self, run):
        with pytest.raises(ConfigError, match="no chain 'a9-b0'"):
            measure(run, ["a9-b0"])
        with pytest.raises(ConfigError, match="batch_size"):
            measure(run, batch_size=0)
        with pytest.raises(DataError, match="counted no request"):
            footprint(Meter().summary(), name="", busy_seconds=1, metric="", quality=QUALITY, config=EnergyConfig())
        with pytest.raises(DataError, match="busy seconds"):
            print_of(-1.0)


class ByTurns(Allocator):
    """Every third request gets the dearer chain, in the order in which they are asked."""

    def aim(self, budget, contexts_RF):
        raise AssertionError("nothing aims here")

    def choose(self, contexts_RF, *, most_C=None, rng=None):
        assert contexts_RF.shape[1] == len(CONTEXT_NAMES)
        chain_R = (np.arange(len(contexts_RF)) % 3 == 0).astype(np.int64)
        nothing_R = np.full(len(chain_R), np.nan)
        return Choice(
            chain_R=chain_R, value_R=nothing_R, capped_R=chain_R > 1, propensity_R=nothing_R, prices_C=self.prices_C
        )


def by_turns(run):
    """An allocation over the run's two chains."""
    chains = ChainSet(
        names=("a1-b0", "a0-b0"),
        stages=("retrieval", "re-ranking"),
        model_JK=np.array([[1, 0], [0, 0]]),
        count_JK=np.array([[6, 6], [15, 15]]),
        costs_JC=np.array([[1.0, 1.0], [2.0, 2.0]]),
    )
    batch = make_batch(run.dataset, run.dataset.split.valid, run.cascade.max_history)
    contexts = Contexts.measured([batch], np.zeros(run.dataset.num_items + 1), has_clock=True)
    allocator = ByTurns(NoSettings(), chains, len(CONTEXT_NAMES))
    return SimpleNamespace(allocator=allocator, chains=chains, contexts=contexts)  # all that is asked of an Allocation


class TestAllocated:
    def test_each_request_gets_the_page_of_its_chain(self, run, monkeypatch):
        """Grouped by chain or not, requests answered alone give the same pages and counts."""
        judged = []
        judge = energy.judge_pages
        monkeypatch.setattr(energy, "judge_pages", lambda rows, *more: judged.append(rows) or judge(rows, *more))
        dear, cheap, mixed = measure(
            run, ["a0-b0", "a1-b0"], allocation=by_turns(run), max_requests=37, batch_size=4, window="test"
        )
        assert mixed.name == "allocated"
        assert mixed.num_requests == dear.num_requests
        count = -(-mixed.num_requests // 32)
        turns = np.concatenate(
            [np.arange(len(p)) % 3 == 0 for p in np.array_split(np.arange(mixed.num_requests), count)]
        )
        np.testing.assert_array_equal(judged[2], np.where(turns[:, None], judged[0], judged[1]))
        assert cheap.mflop < mixed.mflop < dear.mflop

    def test_its_choosing_counts(self, run, monkeypatch):
        """A chooser that works for 10 ms a call shows in the busy seconds."""

        def slow(self, contexts_RF, **more):
            until = time.process_time() + 0.01
            while time.process_time() < until:
                pass
            return choose(self, contexts_RF, **more)

        choose = ByTurns.choose
        monkeypatch.setattr(ByTurns, "choose", slow)
        _, mixed = measure(run, allocation=by_turns(run), max_requests=40, batch_size=4)
        assert mixed.busy_seconds > 0.01


class FakeTracker:
    """Reads one more milliwatt-hour for every start."""

    started = 0

    def __init__(self, **settings):
        assert settings["save_to_file"] is False

    def start(self):
        FakeTracker.started += 1

    def stop(self):
        self.final_emissions_data = SimpleNamespace(energy_consumed=FakeTracker.started * 1e-6)


@pytest.fixture
def codecarbon(monkeypatch):
    """The library as far as it is used, with counters that can be read or not."""
    modules = {name: ModuleType(name) for name in ("codecarbon", "codecarbon.core", "codecarbon.core.cpu")}
    modules["codecarbon"].OfflineEmissionsTracker = FakeTracker
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(energy, "installed", lambda name: name == "codecarbon")
    monkeypatch.setattr(FakeTracker, "started", 0)
    return modules["codecarbon.core.cpu"]


class TestPower:
    def test_counters_that_can_be_read_are_read_by_chain(self, run, codecarbon):
        codecarbon.is_rapl_available = lambda: True
        first, other = measure(run, ["a0-b0", "a1-b0"], max_requests=20)
        assert (first.kwh, other.kwh) == (pytest.approx(1.5e-6), pytest.approx(3e-6))
        assert first.num_requests == other.num_requests == 20

    def test_else_the_formula_holds(self, run, codecarbon):
        codecarbon.is_rapl_available = lambda: False
        assert "20 W" in measure(run, max_requests=5)[0].source
        codecarbon.is_rapl_available = lambda: True
        config = EnergyConfig(power="formula", watts=3.0)
        assert "3 W" in measure(run, max_requests=5, config=config)[0].source
        assert FakeTracker.started == 0


class TestCommand:
    def test_text_and_file(self, run):
        ended = succeeds(
            "energy",
            run.folder,
            "--chain",
            "a0-b0",
            "--chain",
            "a1-b0",
            "--max-requests",
            20,
            "--set",
            "energy.grid=0.1",
        )
        assert "a1-b0 against a0-b0" in ended.out
        assert "0.1 kg CO2e per kWh" in ended.out
        written = json.loads((run.folder.parent / "shop-report" / "energy.json").read_text())
        assert [c["chain"] for c in written["chains"]] == ["a0-b0", "a1-b0"]
        assert written["chains"][0]["settings"]["grid"] == 0.1
        assert written["chains"][0]["settings"]["watts"] == 20.0
        assert set(written["savings"]["a1-b0"]) == {"flops", "busy_seconds", "energy", "shown"}

    def test_json(self, run, tmp_path):
        out = tmp_path / "told" / "energy.json"
        ended = succeeds("energy", run.folder, "--max-requests", 10, "--out", out, "--json")
        assert ended.json == json.loads(out.read_text())
        assert ended.json["savings"] == {}

    def test_refusals(self, run):
        assert "pue must be at least 1" in refused("energy", run.folder, "--set", "energy.pue=0.5")
        assert "did you mean 'watts'" in refused("energy", run.folder, "--set", "energy.wats=5")
        assert "no setting of [energy]" in refused("energy", run.folder, "--set", "ranking.keep=5")
        assert "shortlist calibrate" in refused("energy", run.folder, "--allocated")
        assert "no chain" in refused("energy", run.folder, "--chain", "a7-b0")
        assert shortlist("energy", run.folder, "--batch-size", 0).code == 2


def test_settings_survive_the_file():
    config = RunConfig.from_toml(SETTINGS)
    assert RunConfig.from_toml(config.to_toml()).energy == config.energy == EnergyConfig(watts=20.0, pue=1.5)


@pytest.mark.parametrize("settings", [{"watts": 0}, {"pue": 0.9}, {"grid": -1}, {"sustained_gflops": 0}])
def test_settings_out_of_range(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        EnergyConfig(**settings)


def test_report_dict_is_json():
    assert json.loads(json.dumps(report_dict([print_of(0.02)])))["chains"][0]["num_requests"] == 4
