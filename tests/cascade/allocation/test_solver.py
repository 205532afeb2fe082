"""The solver against exact answers: HiGHS's integer programme, dynamic programming by hand, and prices read off the envelope."""

import time

import numpy as np
import pytest

from shortlist.cascade.allocation.solver import best_mixture, between, choose, envelope, paid, priced_out, solve
from shortlist.errors import DataError

optimize = pytest.importorskip("scipy.optimize")
NOTHING = np.inf


def table(requests, chains, seed, concave=True):
    """Values with heavy tails, rising with the chain; concave ones rise ever less."""
    rng = np.random.default_rng(seed)
    step = rng.exponential(size=(requests, chains))
    if concave:
        step = -np.sort(-step, axis=1)
    return rng.lognormal(0, 1, (requests, 1)) * step.cumsum(1), np.geomspace(1, 40, chains)


def knapsack(values, costs, budget):
    """The largest sum of values with one chain per request and whole costs of at most `budget` in all, by dynamic programming."""
    best = np.full(budget + 1, -np.inf)
    best[0] = 0.0
    for row in values:
        after = np.full(budget + 1, -np.inf)
        for value, cost in zip(row, costs):
            after[cost:] = np.maximum(after[cost:], best[: budget + 1 - cost] + value)
        best = after
    return best.max()


def milp(values, costs_JC, limits_C):
    """The same for any number of resources, by HiGHS."""
    requests, chains = values.shape
    one = np.kron(np.eye(requests), np.ones(chains))
    rows = [optimize.LinearConstraint(one, 1, 1)]
    rows += [
        optimize.LinearConstraint(np.tile(costs_JC[:, c], requests)[None], -np.inf, limits_C[c] * requests)
        for c in np.flatnonzero(np.isfinite(limits_C))
    ]
    found = optimize.milp(
        -values.ravel(), constraints=rows, integrality=np.ones(values.size), bounds=optimize.Bounds(0, 1)
    )
    return -found.fun / requests


@pytest.mark.parametrize("concave", [True, False])
@pytest.mark.parametrize("share", [0.1, 0.4, 0.8])
def test_value_is_within_a_thousandth_of_the_exact_knapsack(concave, share):
    values, _ = table(1000, 8, seed=int(share * 10), concave=concave)
    costs = np.array([1, 2, 3, 5, 8, 13, 21, 34])
    budget = int(1000 * (1 + share * 20))
    found = solve(values, costs, np.array([budget / 1000]), fill=True)
    exact = knapsack(values, costs, budget)
    assert costs[found.chain_R].sum() <= budget
    assert exact * (1 - 1e-3) <= found.value * 1000 <= exact * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_two_resources_are_near_the_integer_programme(seed):
    values, costs = table(200, 6, seed, concave=False)
    costs_JC = np.stack([costs, np.random.default_rng(seed).permutation(costs) + costs], 1)
    limits_C = np.array([9.0, 24.0])
    found = solve(values, costs_JC, limits_C, fill=True)
    exact = milp(values, costs_JC, limits_C)
    assert found.feasible
    assert (found.cost_C <= limits_C).all()
    assert exact * (1 - 0.01) <= found.value <= exact * (1 + 1e-6)  # 200 requests: an upgrade is up to a hundredth


def test_two_prices_minimise_the_dual():
    """The bound that any prices give is close to what was reached, which proves both."""
    values, costs = table(5000, 8, 3)
    costs_JC = np.stack([costs, costs**0.5], 1)
    limits_C = np.array([8.0, 2.3])
    found = solve(values, costs_JC, limits_C)
    bound = (values - paid(costs_JC, found.prices_C)).max(1).mean() + found.prices_C @ limits_C
    assert (found.cost_C <= limits_C).all()
    assert found.value <= bound <= found.value * 1.001
    without = solve(values, costs_JC, np.array([8.0, NOTHING]))
    assert without.prices_C[1] == 0
    assert without.value >= found.value


def test_price_is_the_slope_at_which_the_budget_runs_out():
    """Exact for concave and other tables: sort all rises of all envelopes, buy until the budget is spent."""
    for concave in (True, False):
        values, costs = table(300, 10, 5, concave)
        on = envelope(values, costs)
        slopes, extra = [], []
        for row, mine in zip(values, on):
            at = np.flatnonzero(mine)
            slopes += list(np.diff(row[at]) / np.diff(costs[at]))
            extra += list(np.diff(costs[at]))
        order = np.argsort(-np.array(slopes))
        spent = 300 * costs[0] + np.cumsum(np.array(extra)[order])
        exact = np.array(slopes)[order][np.searchsorted(spent, 300 * 9.0, side="right")]
        found = solve(values, costs, np.array([9.0])).prices_C[0]
        assert found == pytest.approx(exact, rel=1e-9)


def test_envelope_of_a_table_by_hand():
    costs = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    values = np.array([[0, 3, 4, 7, 6], [5, 5, 5, 5, 5], [0, 1, 2, 3, 4], [0, -1, 0, 1, 9]], dtype=float)
    on = [[1, 1, 0, 1, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 1], [1, 0, 0, 0, 1]]
    assert (envelope(values, costs) == np.array(on, dtype=bool)).all()


def test_cost_falls_as_the_price_rises_whatever_the_table():
    rng = np.random.default_rng(7)
    for _ in range(100):
        values, costs = rng.normal(size=(50, 7)) * rng.lognormal(size=(50, 1)), rng.random(7) * 10
        prices = np.sort(rng.exponential(size=30))
        spent = [costs[choose(values, costs[:, None], np.array([p]))].sum() for p in prices]
        assert (np.diff(spent) <= 1e-9).all()


@pytest.mark.parametrize("seed", range(20))
def test_no_limit_is_ever_passed(seed):
    """Costs by request, forbidden chains, ties, zero rows, any number of resources."""
    rng = np.random.default_rng(seed)
    num_resources = 1 + seed % 3
    values = rng.integers(0, 4, (60, 6)).astype(float) * rng.lognormal(size=(60, 1))
    values[:10] = 0
    costs = np.sort(rng.random((60, 6, num_resources)), axis=1)
    values[rng.random(values.shape) < 0.2] = -np.inf
    values[:, 0] = np.where(np.isinf(values[:, 0]), 0.0, values[:, 0])
    least = costs[:, 0].mean(0)
    limits = least + rng.random(num_resources) * (costs[:, -1].mean(0) - least)
    for fill in (False, True):
        found = solve(values, costs, limits, fill=fill)
        request = np.arange(60)
        assert found.feasible
        assert (costs[request, found.chain_R].mean(0) <= limits).all()
        assert np.isfinite(values[request, found.chain_R]).all()
        if not fill:
            assert (found.chain_R == choose(values, costs, found.prices_C)).all()


def test_what_is_left_is_handed_out():
    """Two requests that no price can tell apart: at one price neither buys, and there is room for one."""
    values = np.array([[0.0, 1.0], [0.0, 1.0]])
    without, full = (solve(values, np.array([1.0, 2.0]), np.array([1.6]), fill=fill) for fill in (False, True))
    assert (without.chain_R == 0).all()
    assert sorted(full.chain_R) == [0, 1]
    assert full.cost_C == pytest.approx([1.5])
    assert full.value == 0.5


@pytest.mark.parametrize("seed", range(5))
def test_filling_never_loses(seed):
    values, costs = table(137, 5, seed, concave=False)
    without, full = (solve(values, costs, np.array([6.0]), fill=fill) for fill in (False, True))
    assert full.value >= without.value
    assert without.cost_C[0] <= full.cost_C[0] <= 6.0
    left = 6.0 * 137 - costs[full.chain_R].sum()
    gain = values - values[np.arange(137), full.chain_R][:, None]
    extra = costs - costs[full.chain_R][:, None]
    assert not ((gain > 0) & (extra <= left * (1 - 1e-9))).any()  # nothing that fits is left to buy


def test_rows_worth_nothing_get_the_cheapest_chain():
    values, costs = table(20, 5, 1)
    values[:7] = 0
    found = solve(values, costs, np.array([10.0]), fill=True)
    assert (found.chain_R[:7] == 0).all()
    assert (solve(values, costs, np.array([1e9])).chain_R[:7] == 0).all()


def test_a_budget_below_the_cheapest_gives_everybody_the_cheapest():
    values, costs = table(30, 5, 1)
    values[3] = 7.0  # equal values need a price that rounding does not hide
    found = solve(values, costs, np.array([0.5]))
    assert not found.feasible
    assert (found.chain_R == 0).all()
    exact = solve(values, costs, np.array([costs[0]]))
    assert exact.feasible
    assert (exact.chain_R == 0).all()
    two = solve(values, np.stack([costs, costs], 1), np.array([0.5, 3.0]))
    assert (two.chain_R == 0).all()


def test_no_limit_needs_no_price():
    values, costs = table(30, 5, 1)
    found = solve(values, np.stack([costs, costs], 1), np.array([np.inf, np.inf]))
    assert (found.prices_C == 0).all()
    assert (found.chain_R == values.argmax(1)).all()


@pytest.mark.parametrize("limits", [(6.0, np.inf), (np.inf, 3.0), (6.0, 3.0), (0.4, 9.0), (100.0, 100.0)])
def test_best_mixture_is_the_linear_programme(limits):
    rng = np.random.default_rng(3)
    costs = np.sort(rng.random((12, 2)) * 10 + 0.5, axis=0)
    costs[:, 1] = rng.permutation(costs[:, 1])
    values = rng.random(12) * costs.sum(1) ** 0.5
    limited = np.isfinite(limits)
    found = best_mixture(values, costs, np.array(limits))
    exact = optimize.linprog(
        -values, costs.T[limited], np.array(limits)[limited], np.ones((1, 12)), [1.0], bounds=(0, None)
    )
    assert found.sum() == pytest.approx(1)
    assert (found >= 0).all()
    if exact.status == 2:
        assert found[0] == 1
        return
    assert values @ found == pytest.approx(-exact.fun, rel=1e-9)
    assert (found @ costs <= np.array(limits) * (1 + 1e-9)).all()


def test_a_mixture_leaves_forbidden_chains_out():
    values = np.array([1.0, -np.inf, 3.0])
    shares = best_mixture(values, np.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]), np.array([np.inf, 2.0]))
    assert shares == pytest.approx([0.5, 0, 0.5])


def test_a_hundred_thousand_requests_take_about_half_a_second():
    """One thread; three tries, and room for a busy machine."""
    values, costs = table(100_000, 10, 0)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        found = solve(values, costs, np.array([8.0]))
        seconds.append(time.perf_counter() - began)
        if seconds[-1] < 1:
            break
    assert found.cost_C[0] == pytest.approx(8.0, rel=1e-4)
    assert min(seconds) < 3, seconds


def test_bad_tables_are_refused():
    values, costs = table(4, 3, 0)
    with pytest.raises(DataError, match="NaN"):
        solve(np.where(values > 1, np.nan, values), costs, np.array([3.0]))
    with pytest.raises(DataError, match="no chain"):
        solve(np.full_like(values, -np.inf), costs, np.array([3.0]))
    with pytest.raises(DataError, match=r"need costs \(3, 1\)"):
        solve(values, costs[:2], np.array([3.0]))
    with pytest.raises(DataError, match="0 or above"):
        solve(values, -costs, np.array([3.0]))


def test_alike_requests_are_mixed_so_that_the_budget_is_met():
    values, costs = np.tile([1.0, 3.0], (10, 1)), np.array([[1.0], [2.0]])
    prices = solve(values, costs, np.array([1.3])).prices_C
    assert (choose(values, costs, prices) == 0).all()  # one price lets all of them through or none
    lower, share = between(values, costs, np.array([1.3]), prices)
    assert (choose(values, costs, lower) == 1).all()
    assert share == pytest.approx(0.3)


def test_nothing_is_mixed_where_the_budget_is_no_limit():
    values, costs = np.tile([1.0, 3.0], (10, 1)), np.array([[1.0], [2.0]])
    for limit in (5.0, np.inf):
        limits = np.array([limit])
        assert between(values, costs, limits, solve(values, costs, limits).prices_C)[1] == 0.0


def test_mixing_keeps_every_limit():
    rng = np.random.default_rng(3)
    for _ in range(20):
        values, costs = rng.gamma(1.0, size=(60, 6)), np.sort(rng.gamma(2.0, size=(6, 2)), axis=0)
        limits = costs.min(0) + rng.random(2) * (costs.mean(0) - costs.min(0))
        prices = solve(values, costs, limits).prices_C
        lower, share = between(values, costs, limits, prices)
        spent = [costs[choose(values, costs, p)].mean(0) for p in (prices, lower)]
        assert ((1 - share) * spent[0] + share * spent[1] <= limits * (1 + 1e-12)).all()


def test_where_nothing_fits_everybody_gets_the_cheapest_however_little_it_is_cheaper():
    rng = np.random.default_rng(4)
    values = rng.gamma(1.0, size=(50, 4))
    values[:10, 0] = -np.inf  # these may not have the cheapest: they get the next
    costs = np.array([[1.0], [1.0001], [2.0], [5.0]])
    limits = np.array([0.5])
    prices = priced_out(values, costs, limits)
    assert choose(values, costs, prices).tolist() == [1] * 10 + [0] * 40
