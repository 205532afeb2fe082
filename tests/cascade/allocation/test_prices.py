"""Price control: the debt by hand, the promise by brute force, and streams whose traffic, mix, scale and costs move."""

import threading

import numpy as np
import pytest

from price_world import DEAREST, MS, Buyer, chains, requests, serve
from shortlist.cascade.allocation.base import Budget, ChainSet
from shortlist.cascade.allocation.forecast import Last, Linear, LinearConfig
from shortlist.cascade.allocation.prices import PriceConfig, PriceControl
from shortlist.errors import ConfigError, DataError

RATE, MEAN_MS = 10.0, 12.0
CAPACITY = Budget(ms=RATE * MEAN_MS)


def controlled(allocator, capacity=CAPACITY, forecaster=None, seed=9, **settings):
    control = PriceControl(allocator, capacity, forecaster or Last(Last.Config()), PriceConfig(**settings))
    control.start(requests(np.random.default_rng(seed), 4000), RATE)
    return control


def stream(rng, rates, **mix):
    return [requests(rng, rng.poisson(rate * 60), **mix) for rate in rates]


def ended(control, share, window):
    """A window in which one request took so many of its budgets."""
    cost_C = np.array([0.0, share * CAPACITY.ms * 60])
    control.note(np.zeros((1, 2), np.float32), np.zeros(1, np.int64), cost_C)
    return control.close(60.0 * window)


class TestFirstPrices:
    def test_spend_the_capacity_at_the_foretold_rate(self):
        allocator = Buyer()
        control = PriceControl(allocator, CAPACITY, Last(Last.Config()))
        budget = control.start(requests(np.random.default_rng(0), 4000), RATE)
        assert budget.ms == pytest.approx(MEAN_MS)
        assert budget.mflop is None
        fresh = requests(np.random.default_rng(1), 4000)
        assert MS[allocator.choose(fresh).chain_R].mean() == pytest.approx(MEAN_MS, rel=0.05)

    def test_a_resource_without_a_limit_has_no_price(self):
        control = controlled(Buyer())
        assert control.allocator.prices_C[0] == 0
        assert control.allocator.prices_C[1] > 0

    def test_one_price_per_resource(self):
        allocator = Buyer()
        controlled(allocator, Budget(ms=RATE * 12.0, mflop=RATE * 185.0))
        assert (allocator.prices_C > 0).all()
        costs_C = chains().costs_JC[allocator.choose(requests(np.random.default_rng(9), 4000)).chain_R].mean(0)
        assert (costs_C <= np.array([185.0, 12.0]) * 1.001).all()


class TestDebt:
    def test_by_hand(self):
        """Half a budget too much, a fifth saved, much left over: the credit is bounded."""
        control = controlled(Buyer())
        assert ended(control, 1.5, 1).debt_C[1] == pytest.approx(0.5)
        window = ended(control, 0.8, 2)
        assert window.debt_C.tolist() == pytest.approx([0.0, 0.3])
        assert ended(control, 0.2, 3).debt_C[1] == pytest.approx(-0.05)

    def test_the_next_budget_is_smaller_by_it(self):
        control = controlled(Buyer(), rho=0)
        window = ended(control, 1.25, 1)
        assert window.next_budget.ms == pytest.approx(CAPACITY.ms * 60 * 0.75 / 1)  # one request is foretold

    def test_a_long_overload_is_forgotten_after_the_horizon(self):
        control = controlled(Buyer())
        for t in range(50):
            window = ended(control, 2.0, t + 1)
        assert window.debt_C[1] == pytest.approx(9)
        for t in range(9):
            window = ended(control, 1.0, t + 51)
        assert window.debt_C[1] == pytest.approx(0)

    @pytest.mark.parametrize("seed", range(5))
    def test_the_promise_holds_for_any_windows_that_stop_where_they_must(self, seed):
        """Brute force over all stretches: spending is anything up to the stop."""
        rng, overs = np.random.default_rng(seed), []
        control = controlled(Buyer(), num_rows=1)
        for t in range(60):
            most = 1 - control.debt_C[1] + control.config.margin
            overs.append(max(rng.choice([rng.uniform(0, 2), most, rng.uniform(0, most)]), 0))
            overs[-1] = min(overs[-1], max(most, 0)) - 1
            ended(control, 1 + overs[-1], t + 1)
        worst = max(sum(overs[i : i + n]) for n in range(1, 11) for i in range(60 - n + 1))
        assert worst <= control.config.credit + control.config.margin + 1e-9


class TestStop:
    def test_an_unforeseen_burst_stops_and_keeps_back_what_the_cheapest_chain_costs(self):
        rng, allocator = np.random.default_rng(0), Buyer()
        control = controlled(allocator)
        served = serve(control, allocator, [requests(rng, 1800)])  # thrice what was foretold
        assert served.spent_W[0] <= served.budget_W[0] * 1.1 + 16 * DEAREST
        assert served.spent_W[0] > 0.95 * served.budget_W[0]

    def test_only_the_resource_that_ran_out_is_closed(self):
        control = controlled(Buyer(), Budget(ms=1e9, mflop=100.0))
        assert control.most_C(30) is None
        control.note(np.zeros((1, 2), np.float32), np.zeros(1, np.int64), np.array([7000.0, 1.0]))
        assert control.most_C(30).tolist() == [0, np.inf]
        assert control.close(60).stopped

    def test_nothing_stops_without_limits(self):
        control = controlled(Buyer(), Budget())
        control.note(np.zeros((1, 2), np.float32), np.zeros(1, np.int64), np.array([1e12, 1e12]))
        assert control.most_C(1) is None
        assert control.close(60).debt_C.tolist() == [0, 0]


class TestStreams:
    RATES = [RATE] * 10 + [3 * RATE] * 15 + [RATE] * 10

    def test_traffic_of_three_times(self):
        """Spending keeps to the budget where yesterday's price overspends by far; the whole budget is used."""
        rng = np.random.default_rng(3)
        windows = stream(rng, self.RATES)
        allocator = Buyer()
        control = controlled(allocator)
        served = serve(control, allocator, windows)
        assert served.overspend() <= 0.02
        assert served.utilisation >= 0.93
        fixed = Buyer()
        controlled(fixed)
        yesterday = serve(None, fixed, windows)
        assert yesterday.spent_W[12:20].sum() > 1.2 * served.budget_W[12:20].sum()
        assert (served.value_W[12:20].sum() / served.spent_W[12:20].sum()) > 1.2 * (
            yesterday.value_W[12:20].sum() / yesterday.spent_W[12:20].sum()
        )

    def test_a_ramp_is_met_by_a_trend_with_fewer_stops(self):
        rng = np.random.default_rng(4)
        windows = stream(rng, RATE * np.concatenate([np.ones(5), np.linspace(1, 3, 15), np.full(5, 3)]))
        debts = {}
        for name, forecaster in (("last", None), ("linear", Linear(LinearConfig()))):
            allocator = Buyer()
            control = controlled(allocator, forecaster=forecaster, margin=10.0)  # no stop: what forecasts alone do
            served = serve(control, allocator, windows)
            debts[name] = np.abs(served.spent_W / served.budget_W - 1)[5:20].mean()
        assert debts["linear"] < debts["last"]

    def test_other_users_and_another_scale_of_values(self):
        """Deeper requests, then a sale that multiplies all values by eight: one window is off at most."""
        rng = np.random.default_rng(5)
        windows = (
            stream(rng, [RATE] * 8)
            + stream(rng, [RATE] * 12, depth=2.5)
            + stream(rng, [RATE] * 12, value=np.log(8), depth=2.5)
        )
        allocator = Buyer()
        control = controlled(allocator, num_rows=600)
        served = serve(control, allocator, windows)
        assert served.overspend() <= 0.02
        assert served.utilisation >= 0.93
        calm_price, sale_price = None, control.allocator.prices_C[1]
        reference = Buyer()
        reference.aim(Budget(ms=MEAN_MS), windows[15])
        calm_price = reference.prices_C[1]
        assert sale_price / calm_price == pytest.approx(8, rel=0.25)

    def test_costs_above_their_calibration_are_learnt(self):
        rng = np.random.default_rng(6)
        allocator = Buyer()
        control = controlled(allocator)
        served = serve(control, allocator, stream(rng, [RATE] * 30), bias=1.6)
        assert control.bias_C.tolist() == pytest.approx([1.0, 1.6], rel=0.01)
        assert served.overspend() <= 0.02
        assert served.utilisation >= 0.93
        assert abs(served.spent_W[10:].mean() / served.budget_W[0] - 1) < 0.02

    def test_overload_gives_the_cheapest_chain_to_all_and_ends(self):
        rng, allocator = np.random.default_rng(7), Buyer()
        control = controlled(allocator)
        served = serve(control, allocator, stream(rng, [RATE] * 3 + [30 * RATE] * 6 + [RATE] * 20))
        assert served.spent_W[7] == pytest.approx(30 * RATE * 60 * MS[0], rel=0.05)
        assert served.spent_W[-8:].sum() == pytest.approx(served.budget_W[-8:].sum(), rel=0.05)


class TestWindows:
    def test_tick_closes_a_window_when_it_is_over(self):
        control = controlled(Buyer())
        assert control.tick(59.9) is None
        window = control.tick(61.0)
        assert window.seconds == 61
        assert window.expected == RATE * 60
        assert window.count == 0
        assert control.tick(61.0) is None

    def test_prices_are_found_on_the_newest_requests(self):
        """The last window's, where it had as many; with parts that come one by one, too."""
        control = controlled(Buyer(), num_rows=50)
        contexts_RF = requests(np.random.default_rng(0), 160)
        for row in contexts_RF[:120]:
            control.note(row[None], np.zeros(1, np.int64), np.ones(2))
        control.note(contexts_RF[120:], np.zeros(40, np.int64), np.ones(2))
        window = control.close(60)
        np.testing.assert_array_equal(control.state()["rows"], contexts_RF[-50:])
        reference = Buyer()
        reference.aim(window.next_budget, contexts_RF[-50:])
        np.testing.assert_array_equal(window.prices_C, reference.prices_C)

    def test_silence_is_survived(self):
        control = controlled(Buyer())
        for t in range(5):
            window = control.close(60.0 * (t + 1))
        assert window.next_budget.ms == pytest.approx(CAPACITY.ms * 60 * 1.05)
        assert np.isfinite(window.prices_C).all()

    def test_state_goes_on(self):
        rng = np.random.default_rng(8)
        windows, one = stream(rng, [RATE, 2 * RATE, RATE]), Buyer()
        control = controlled(one)
        serve(control, one, windows[:2], bias=1.3)
        state = {name: array.copy() for name, array in control.state().items()}
        other = Buyer()
        again = PriceControl(other, CAPACITY, Last(Last.Config()), now=control._opened)
        again.load_state(state)
        np.testing.assert_allclose(other.prices_C, one.prices_C)
        np.testing.assert_array_equal(again.debt_C, control.debt_C)
        np.testing.assert_array_equal(again.bias_C, control.bias_C)
        contexts_RF = windows[2]
        for each in (control, again):
            each.note(contexts_RF, each.allocator.choose(contexts_RF).chain_R, np.array([0.0, 5000.0]))
        assert control.close(200.0).next_budget == again.close(200.0).next_budget

    def test_many_threads_lose_nothing(self):
        control = controlled(Buyer())
        contexts_RF, chain_R = np.zeros((2, 2), np.float32), np.zeros(2, np.int64)

        def work():
            for _ in range(200):
                control.note(contexts_RF, chain_R, np.array([1.0, 0.5]))
                control.most_C(1.0)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        window = control.close(60)
        assert window.count == 1600
        assert window.spent_C.tolist() == [800, 400]


class TestRefusals:
    def test_bad_notes_change_nothing(self):
        control = controlled(Buyer())
        good_RF, chain_R = np.zeros((1, 2), np.float32), np.zeros(1, np.int64)
        for contexts_RF, cost_C in (
            (np.zeros((1, 3), np.float32), np.ones(2)),
            (good_RF, np.ones(1)),
            (good_RF, np.array([1.0, np.nan])),
            (good_RF, np.array([1.0, -1.0])),
        ):
            with pytest.raises(DataError, match=r"features each|numbers of 0 or above"):
                control.note(contexts_RF, chain_R, cost_C)
        assert control.close(60).count == 0
        with pytest.raises(DataError, match="can not end at"):
            control.close(60)

    def test_bad_states_change_nothing(self):
        control = controlled(Buyer())
        before = control.state()
        for name in ("debt", "over", "costs", "rows", "forecaster.rate"):
            with pytest.raises(DataError, match=name.partition(".")[0]):
                control.load_state({n: a for n, a in before.items() if n != name})
        with pytest.raises(DataError, match="features each"):
            control.load_state({**before, "rows": np.zeros((3, 5))})
        for name, value in (("debt", np.nan), ("costs", 0.0)):
            with pytest.raises(DataError, match=name):
                control.load_state({**before, name: np.full_like(before[name], value)})
        for name, array in control.state().items():
            np.testing.assert_array_equal(array, before[name])

    def test_no_requests_no_prices(self):
        control = PriceControl(Buyer(), CAPACITY, Last(Last.Config()))
        with pytest.raises(DataError, match="on no requests"):
            control.start(np.zeros((0, 2), np.float32), 1.0)

    @pytest.mark.parametrize(
        "settings",
        [{"window_seconds": 0}, {"rho": 2}, {"credit": -1}, {"margin": -1}, {"num_windows": 1}, {"num_rows": 0}],
    )
    def test_settings_out_of_range(self, settings):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            PriceConfig(**settings)


def test_a_chain_that_costs_nothing_is_no_trouble():
    free = chains()
    costs_JC = free.costs_JC.copy()
    costs_JC[0] = 0
    made_of = ChainSet(
        names=free.names, stages=free.stages, model_JK=free.model_JK, count_JK=free.count_JK, costs_JC=costs_JC
    )
    control = controlled(Buyer(made_of))
    control.note(np.zeros((5, 2), np.float32), np.zeros(5, np.int64), np.zeros(2))
    assert np.isfinite(control.close(60).next_budget.ms)
