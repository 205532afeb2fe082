"""Which chain a request gets, and the three caps on it."""

import numpy as np
import pytest

from shortlist.cascade.allocation.base import Allocator, Budget, ChainSet, Choice, NoSettings, Outcomes
from shortlist.cascade.allocation.forecast import Last
from shortlist.cascade.allocation.prices import PriceConfig, PriceControl
from shortlist.cascade.allocation.stress import MaxPower, MaxPowerConfig
from shortlist.cascade.governor import Governor, GovernorConfig, open_governor
from shortlist.cascade.meter import StageReport
from shortlist.errors import ConfigError
from shortlist.registry import find

CHAINS = ChainSet(
    names=("a0-b0", "a0-b1", "a0-b2"),
    stages=("retrieval", "ranking"),
    model_JK=np.zeros((3, 2), dtype=np.int64),
    count_JK=np.array([[10, 10], [10, 20], [10, 40]]),
    costs_JC=np.array([[10.0, 1.0], [20.0, 2.0], [40.0, 4.0]]),
)


class Dearest(Allocator):
    """Gives every request the dearest chain that it may have, and notes what it was asked."""

    def __init__(self):
        super().__init__(None, CHAINS, 2)
        self.caps = []

    def aim(self, budget, contexts_RF):
        self.budget = budget

    def choose(self, contexts_RF, *, most_C=None, rng=None):
        self.caps.append(None if most_C is None else most_C.tolist())
        fits = np.ones(3, dtype=bool) if most_C is None else CHAINS.within_J(most_C)
        best = int(np.flatnonzero(fits).max())
        count = len(contexts_RF)
        return Choice(
            chain_R=np.full(count, best),
            value_R=np.full(count, np.nan),
            capped_R=np.full(count, best < 2),
            propensity_R=np.ones(count),
            prices_C=np.array([0.5, 0.25]),
        )


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def features(batch):
    return np.zeros((batch, 2), dtype=np.float32)  # a "batch" is its size here


def report(ms, mflop):
    return StageReport(stage="s", systems=("x",), num_received=1, num_kept=1, spent_ms=ms, spent_mflop=mflop)


def test_a_choice_says_what_it_costs_and_at_which_prices():
    decision = Governor(Dearest(), features).choose(2)
    assert decision.chains == ["a0-b2", "a0-b2"]
    told = decision.told[0]
    assert (told.reason, told.mflop, told.ms, told.price_mflop, told.price_ms) == ("price", 40.0, 4.0, 0.5, 0.25)
    assert told.value is None
    assert told.cap_ms is None
    assert told.propensity == 1.0


def test_a_request_s_own_budget_caps_that_request_alone():
    most = np.array([[np.inf, np.inf], [np.inf, 2.5], [15.0, np.inf], [np.inf, 0.1]])
    decision = Governor(Dearest(), features).choose(4, most)
    assert decision.chains == ["a0-b2", "a0-b1", "a0-b0", "a0-b0"]  # the cheapest chain is always possible
    assert [told.reason for told in decision.told] == ["price", "own budget", "own budget", "own budget"]


def test_stress_caps_everybody_and_says_so():
    clock = Clock()
    stress = MaxPower(CHAINS, MaxPowerConfig(target_ms=10.0), now=0.0)
    governor = Governor(Dearest(), features, stress=stress, clock=clock)
    for second in range(1, 4):
        for _ in range(20):
            governor.answered(200.0, failed=True)
        clock.now = float(second)
        governor.tick()
    decision = governor.choose(1)
    assert decision.chains == ["a0-b0"]
    assert decision.told[0].reason == "overload"
    assert decision.told[0].cap_ms == governor.cap_ms == pytest.approx(1.0)
    for second in range(4, 100):  # calm: no answers at all
        clock.now = float(second)
        governor.tick()
    assert governor.cap_ms is None
    assert governor.choose(1).told[0].reason == "price"


def test_a_window_that_has_spent_its_allowance_falls_to_the_cheapest_chain_until_it_is_over():
    clock = Clock()
    allocator = Dearest()
    settings = PriceConfig(window_seconds=10.0, margin=0.0)
    prices = PriceControl(allocator, Budget(ms=1.0), Last(NoSettings()), settings, now=0.0)  # 10 ms in a window
    governor = Governor(allocator, features, prices=prices, clock=clock)
    first = governor.choose(3)
    assert first.chains == ["a0-b2"] * 3
    governor.note(first, [[report(2.0, 1.0), report(2.0, 1.0)]] * 3)
    assert governor.choose(1).chains == ["a0-b0"]
    clock.now = 20.0  # an idle while: what was spent beyond the first window's share is forgiven
    governor.tick()
    assert governor.choose(1).chains == ["a0-b2"]


def test_without_a_folder_or_by_wish_there_is_no_governor():
    assert open_governor(None, "1", GovernorConfig()) == (None, [])
    assert open_governor(None, "1", GovernorConfig(allocate=False)) == (None, [])


def test_a_budget_can_not_be_kept_without_calibration(tmp_path):
    assert open_governor(tmp_path / "run", "1", GovernorConfig()) == (None, [])
    for config in (GovernorConfig(budget=Budget(ms=1.0)), GovernorConfig(target_ms=50.0)):
        with pytest.raises(ConfigError, match="shortlist calibrate"):
            open_governor(tmp_path / "run", "1", config)


@pytest.mark.parametrize("setting", [{"window_seconds": 0.0}, {"target_ms": -1.0}])
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        GovernorConfig(**setting)


# -- another budget --------------------------------------------------------------------------------------------------


def mean_ms(governor, num=4):
    return CHAINS.costs_JC[governor.choose(num).chain_B, 1].mean()


def test_another_budget_moves_the_choices_and_none_brings_the_calibrated_one_back():
    """Requests are alike, so a mixture's mean cost is the budget itself."""
    rows = np.zeros((50, 2), dtype=np.float32)
    outcomes = Outcomes(
        contexts_RF=rows,
        rewards_RJ=np.tile([1.0, 3.0, 4.0], (50, 1)),
        users_R=np.arange(50),
        times_R=np.arange(50),
    )
    allocator = find("mixture").cls(find("mixture").config(), CHAINS, 2)
    allocator.fit(outcomes)
    allocator.aim(Budget(ms=4.0), rows)
    governor = Governor(allocator, features, seed=0, rows_RF=rows)
    assert mean_ms(governor) == 4.0
    governor.aim(Budget(ms=1.0))
    assert governor.allocator.budget == Budget(ms=1.0)
    assert mean_ms(governor) == 1.0
    governor.aim(Budget(ms=2.5))
    assert mean_ms(governor, 4_000) == pytest.approx(2.5, abs=0.1)
    governor.aim(Budget())
    assert governor.allocator.budget == governor.calibrated == Budget(ms=4.0)
    assert mean_ms(governor) == 4.0


def test_a_budget_is_refused_where_prices_follow_traffic_or_no_requests_are_known():
    allocator = Dearest()
    prices = PriceControl(allocator, Budget(ms=1.0), Last(NoSettings()), PriceConfig(), now=0.0)
    with pytest.raises(ConfigError, match="prices follow the traffic"):
        Governor(allocator, features, prices=prices, rows_RF=np.zeros((1, 2), np.float32)).aim(Budget(ms=2.0))
    with pytest.raises(ConfigError, match="shortlist calibrate"):
        Governor(allocator, features).aim(Budget(ms=2.0))
