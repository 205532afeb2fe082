"""Prices of compute: the multiple-choice knapsack behind every budget, solved through its dual.

Each request takes one chain, the mean cost stays within the limits, the summed value is as large as it can be. With a price per unit of
each resource the choice of a request needs nothing but its own row:

    j*(i, prices) = argmax_j ( Q_ij - prices . c_j )

"DCAF: A Dynamic Computation Allocation Framework for Online Serving System", Jiang et al., DLP-KDD 2020, Algorithm 1, corrected: cost falls
as the price rises, so a price at which the budget is kept is an UPPER end of the interval (printed: lower); the first upper end is a price
at which nobody buys (printed: one that prices nobody out); and as cost is a step function of the price, the search stops by the width of
the interval and gives its feasible end. Cost is monotone in the price for any table of values, concave or not.

R requests, J chains, C resources, L of them with a limit. -inf as a value forbids a chain to a request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from shortlist.errors import DataError

Float = NDArray[np.float64]
Int = NDArray[np.int64]
WIDTH = 1e-12
"""Width of the interval, relative to its upper end, at which bisection stops."""
MOST_STEPS = 200
"""Steps of a bisection: enough for any two prices that float64 can hold apart in practice."""
GAP = 1e-9
"""What the dual of several resources may lie above its minimum, relative to it."""
MOST_CUTS = 400
"""Steps towards that minimum per resource, at most."""
FILLS = 64
"""Rounds in which what is left of a budget is handed out."""


@dataclass(frozen=True, kw_only=True)
class Solution:
    """Prices, and what requests choose at them."""

    prices_C: Float
    """Worth of one unit of each resource."""
    chain_R: Int
    """Chains at those prices; after filling, better ones for some."""
    cost_C: Float
    """Mean cost per request."""
    value: float
    """Mean value per request."""
    feasible: bool
    """Whether the limits are kept; False where the cheapest choice of all requests costs more."""


FAR = 1e3
LOWER = (1e-6, 1e-4, 1e-2, 0.1, 0.5, 1.0)
"""Shares by which prices are lowered until the limits are passed."""


def paid(costs: Float, prices_C: Float) -> Float:
    """What chains cost at these prices: [..., C] -> [...].

    Summed resource by resource, so that one request alone and a whole table are rounded alike and nearly equal chains choose alike.
    """
    total: Float = costs[..., 0] * prices_C[0]
    for c in range(1, len(prices_C)):
        total = total + costs[..., c] * prices_C[c]
    return total


def choose(values_RJ: Float, costs: Float, prices_C: Float) -> Int:
    """int64 [R]: the chain with the largest value after its price; of equal ones the first, which is the cheapest in milliseconds.

    Args:
        values_RJ: worth of chains.
        costs: [J, C], or [R, J, C] where they depend on the request.
        prices_C: per unit.
    """
    return (values_RJ - paid(costs, prices_C)).argmax(1)


def solve(values_RJ: Float, costs: Float, limits_C: Float, *, fill: bool = False) -> Solution:
    """Prices at which requests choose chains of the highest summed value within `limits_C`.

    One resource with a limit: bisection. Several: the minimum of the dual (convex, one price per resource) by the ellipsoid method, then up
    a ray from there until every limit is kept. The value lost to whole chains is at most the upgrade of about one request per resource.

    Args:
        values_RJ: worth of chains; -inf where a request may not have one. Every request needs a chain that it may have.
        costs: [J], [J, C], [R, J] or [R, J, C], 0 or above; the forms without C mean one resource.
        limits_C: mean cost per request, infinite where a resource has no limit.
        fill: hand out what is left of the limits afterwards (`filled`). For allocating a known set at once; prices do not show it.

    Raises DataError for shapes that do not fit, NaN, or a request without a chain.
    """
    limits_C = np.atleast_1d(np.asarray(limits_C, dtype=np.float64))
    table = _checked(values_RJ, costs, len(limits_C))
    limited_L = np.flatnonzero(np.isfinite(limits_C))
    prices_C = np.zeros(len(limits_C))
    if len(limited_L):
        prices_C[limited_L] = _prices(_Table(values_RJ, table.costs_xJL[:, :, limited_L]), limits_C[limited_L])
    chain_R = table.chains(prices_C)
    cost_C = table.cost(chain_R)
    feasible = bool((cost_C <= limits_C).all())
    if fill and feasible:
        chain_R = filled(values_RJ, table.costs_xJL, chain_R, limits_C, prices_C)
        cost_C = table.cost(chain_R)
    value = float(values_RJ[np.arange(len(chain_R)), chain_R].mean())
    return Solution(prices_C=prices_C, chain_R=chain_R, cost_C=cost_C, value=value, feasible=feasible)


def _prices(table: _Table, limits_L: Float) -> Float:
    """Prices [L] where every resource of the table has a limit."""
    free_L, direction_L = np.zeros(len(limits_L)), 1.0 / np.maximum(limits_L, 1e-300)
    if (table.cost(table.chains(free_L)) <= limits_L).all():
        return free_L
    if len(limits_L) == 1:
        return _along(table, free_L, direction_L, limits_L)
    start_L, scale_L = _dual_minimum(table, limits_L, direction_L)
    return _along(table, start_L, scale_L, limits_L)


def priced_out(values_RJ: Float, costs_JC: Float, limits_C: Float) -> Float:
    """Prices [C] of the limited resources at which every request takes the cheapest chain that it may have, by each of them alone.

    For limits that not even those keep; `FAR` times what these requests need, so that other requests do so too.

    Args:
        values_RJ: what chains are worth, -inf where a request may not have one.
        costs_JC: of chains.
        limits_C: infinite where there is none.
    """
    prices_C = np.zeros(len(limits_C))
    open_RJ = np.isfinite(values_RJ)
    row_R = np.arange(len(values_RJ))
    for c in np.flatnonzero(np.isfinite(limits_C)):
        cost_RJ = np.where(open_RJ, costs_JC[:, c], np.inf)
        least_R = cost_RJ.argmin(1)
        more_RJ = cost_RJ - cost_RJ[row_R, least_R][:, None]
        dearer_RJ = open_RJ & (more_RJ > 0)
        better_RJ = np.where(dearer_RJ, values_RJ - values_RJ[row_R, least_R][:, None], 0.0)
        price_RJ = np.divide(better_RJ, more_RJ, out=np.zeros_like(better_RJ), where=dearer_RJ)
        prices_C[c] = max(float(price_RJ.max(initial=0.0)), 1e-12) * FAR
    return prices_C


def between(values_RJ: Float, costs_JC: Float, limits_C: Float, prices_C: Float) -> tuple[Float, float]:
    """Prices just below `prices_C` at which the limits are passed, and the share of requests that may be chosen at them.

    One price lets all requests that are alike through or none, and then leaves a part of the budget. Choosing some of them, at random, at a
    lower price spends it: the mean cost of both is within the limits and meets the tightest.

    Args:
        values_RJ: what chains are worth, -inf where a request may not have one.
        costs_JC: of chains.
        limits_C: mean cost, infinite where there is none.
        prices_C: at which the mean cost is within the limits.

    Returns the lower prices [C] and the share; a share of 0 where even chains for nothing stay within the limits.
    """
    spent_C = costs_JC[choose(values_RJ, costs_JC, prices_C)].mean(0)
    limited_C = np.isfinite(limits_C)
    if not (prices_C > 0).any() or (spent_C > limits_C)[limited_C].any():
        return prices_C.copy(), 0.0
    for step in LOWER:
        lower_C = prices_C * (1 - step)
        more_C = costs_JC[choose(values_RJ, costs_JC, lower_C)].mean(0)
        over_C = limited_C & (more_C > limits_C)
        if over_C.any():
            return lower_C, float(((limits_C - spent_C)[over_C] / (more_C - spent_C)[over_C]).min())
    return prices_C.copy(), 0.0


def filled(values_RJ: Float, costs_xJC: Float, chain_R: Int, limits_C: Float, prices_C: Float) -> Int:
    """int64 [R]: `chain_R` with upgrades bought from what it leaves of the limits, the most value per paid unit first.

    Each round takes the best upgrade of every request, sorts them and takes as many as fit, until none fits.

    Args:
        values_RJ: worth of chains.
        costs_xJC: costs of chains, x = 1 or R.
        chain_R: within the limits.
        limits_C: mean cost per request.
        prices_C: weigh resources against each other; where all are 0, the limits do.
    """
    request_R, chain_R = np.arange(len(chain_R)), chain_R.copy()
    costs_RJC = np.broadcast_to(costs_xJC, (*values_RJ.shape, len(limits_C)))
    weight_C = prices_C if prices_C.any() else 1.0 / limits_C
    total_C = limits_C * len(chain_R) * (1 - WIDTH)  # sums are rounded
    for _ in range(FILLS):
        spent_RC = costs_RJC[request_R, chain_R]
        left_C = total_C - spent_RC.sum(0)
        gain_RJ = values_RJ - values_RJ[request_R, chain_R][:, None]
        extra_RJC = costs_RJC - spent_RC[:, None]
        fits_RJ = (gain_RJ > 0) & (extra_RJC <= left_C).all(2)
        if not fits_RJ.any():
            break
        rate_RJ = np.where(fits_RJ, gain_RJ / np.maximum(paid(extra_RJC, weight_C), 1e-200), -np.inf)
        best_R = rate_RJ.argmax(1)
        buyers = np.flatnonzero(fits_RJ.any(1))
        buyers = buyers[np.argsort(-rate_RJ[buyers, best_R[buyers]], kind="stable")]
        running_BC = extra_RJC[buyers, best_R[buyers]].cumsum(0)
        taken = buyers[np.logical_and.accumulate((running_BC <= left_C).all(1))]
        chain_R[taken] = best_R[taken]  # the first one always fits
    return chain_R


def envelope(values_RJ: Float, costs_J: Float) -> NDArray[np.bool_]:
    """bool [R, J]: chains on the rising part of the upper concave envelope of value over cost, the only ones any price can choose.

    Starts from the best of the cheapest chains and takes the steepest rise each time; of equal rises the longest.
    """
    request_R = np.arange(len(values_RJ))
    cheapest_RJ = np.where(costs_J == costs_J.min(), values_RJ, -np.inf)
    here_R = cheapest_RJ.argmax(1)
    on_RJ = np.zeros(values_RJ.shape, dtype=bool)
    on_RJ[request_R, here_R] = True
    dearest_first = np.argsort(-costs_J, kind="stable")
    for _ in range(len(costs_J) - 1):
        gain_RJ = values_RJ - values_RJ[request_R, here_R][:, None]
        extra_RJ = costs_J - costs_J[here_R][:, None]
        rises_RJ = (gain_RJ > 0) & (extra_RJ > 0)
        going_R = rises_RJ.any(1)
        if not going_R.any():
            break
        slope_RJ = np.where(rises_RJ, gain_RJ / np.where(rises_RJ, extra_RJ, 1.0), -np.inf)
        next_R = dearest_first[slope_RJ[:, dearest_first].argmax(1)]
        here_R = np.where(going_R, next_R, here_R)
        on_RJ[request_R, here_R] = True
    return on_RJ


def best_mixture(values_J: Float, costs_JC: Float, limits_C: Float) -> Float:
    """float64 [J]: chances of chains with the largest mean value whose mean cost keeps the limits.

    A linear programme, solved by visiting its corners: at most one chain more than there are limits that bind. With one limit these are
    two neighbours on the upper envelope. Where no mixture keeps the limits, the first chain has chance 1.

    Args:
        values_J: worth of each chain on average; -inf forbids it.
        costs_JC: by rising milliseconds.
        limits_C: infinite where there is no limit.
    """
    kept = np.flatnonzero(_undominated(values_J, costs_JC))
    limited = np.flatnonzero(np.isfinite(limits_C)).tolist()
    best, best_value, shares_J = None, -np.inf, np.zeros(len(values_J))
    for size in range(1, len(limited) + 2):
        if size > len(kept):
            break
        groups_NS = kept[np.array(list(combinations(range(len(kept)), size)))]
        for tight in combinations(limited, size - 1):
            share_NS = _corners(costs_JC[groups_NS], limits_C, tight)
            value_N = (np.nan_to_num(share_NS) * values_J[groups_NS]).sum(1)
            value_N[np.isnan(share_NS).any(1)] = -np.inf
            if len(value_N) and value_N.max() > best_value:
                at = int(value_N.argmax())
                best, best_value = (groups_NS[at], share_NS[at]), float(value_N[at])
    if best is None:
        shares_J[0] = 1.0
    else:
        shares_J[best[0]] = best[1]
    return shares_J


def _undominated(values_J: Float, costs_JC: Float) -> NDArray[np.bool_]:
    """bool [J]: chains that no other one beats: at least as good, nowhere dearer, and better in something or earlier in the list."""
    no_worse = (values_J[None] >= values_J[:, None]) & (costs_JC[None] <= costs_JC[:, None]).all(2)
    better = (values_J[None] > values_J[:, None]) | (costs_JC[None] < costs_JC[:, None]).any(2)
    earlier = np.arange(len(values_J))[None] < np.arange(len(values_J))[:, None]
    return np.isfinite(values_J) & ~(no_worse & (better | earlier)).any(1)


def _corners(costs_NSC: Float, limits_C: Float, tight: Sequence[int]) -> Float:
    """[N, S]: chances of S chains that sum to one and spend exactly the S - 1 tight limits; NaN where there are none that keep all."""
    num, size = costs_NSC.shape[:2]
    system_NSS = np.concatenate([np.ones((num, 1, size)), costs_NSC[:, :, list(tight)].transpose(0, 2, 1)], 1)
    right_S = np.array([1.0, *limits_C[list(tight)]])
    scale_NS1 = np.abs(system_NSS).max(2, keepdims=True)
    system_NSS, right_NS = system_NSS / np.where(scale_NS1 > 0, scale_NS1, 1.0), right_S / scale_NS1[..., 0]
    solvable_N = (np.abs(np.linalg.det(system_NSS)) > 1e-12) & (scale_NS1[..., 0] > 0).all(1)
    share_NS = np.full((num, size), np.nan)
    share_NS[solvable_N] = np.linalg.solve(system_NSS[solvable_N], right_NS[solvable_N, :, None])[..., 0]
    cost_NC = np.einsum("ns,nsc->nc", share_NS, costs_NSC)
    keeps_N = (share_NS >= -1e-12).all(1) & (cost_NC <= limits_C * (1 + 1e-9)).all(1)
    share_NS[~keeps_N] = np.nan
    share_NS = np.maximum(share_NS, 0.0)
    return share_NS / share_NS.sum(1, keepdims=True)


class _Table:
    """Values and costs of requests, checked."""

    def __init__(self, values_RJ: Float, costs_xJL: Float) -> None:
        self.values_RJ = values_RJ
        self.costs_xJL = costs_xJL
        """[1 or R, J, L]."""

    def net(self, prices_L: Float, rows: Int | slice = slice(None)) -> Float:
        """[R, J] values after their price, of all requests or some."""
        costs_xJL = self.costs_xJL if len(self.costs_xJL) == 1 else self.costs_xJL[rows]
        return self.values_RJ[rows] - paid(costs_xJL, prices_L)

    def chains(self, prices_L: Float, rows: Int | slice = slice(None)) -> Int:
        """int64 [R] as `choose` gives them."""
        return self.net(prices_L, rows).argmax(1)

    def cost(self, chain_R: Int) -> Float:
        """Mean cost [L] of chains [R]."""
        if len(self.costs_xJL) == 1:
            return np.bincount(chain_R, minlength=self.values_RJ.shape[1]) @ self.costs_xJL[0] / len(chain_R)
        return self.costs_xJL[np.arange(len(chain_R)), chain_R].mean(0)

    def dual(self, prices_L: Float) -> tuple[float, Float]:
        """Mean over requests of the best value after its price, and mean cost [L]."""
        net_RJ = self.net(prices_L)
        return float(net_RJ.max(1).mean()), self.cost(net_RJ.argmax(1))


def _checked(values_RJ: Float, costs: Float, num_resources: int) -> _Table:
    """The table, from any of the forms of costs that `solve` takes; DataError names what is wrong."""
    costs = np.asarray(costs, dtype=np.float64)
    requests, chains = values_RJ.shape
    if num_resources == 1 and costs.shape in ((chains,), (requests, chains)):
        costs = costs[..., None]
    if costs.shape not in ((chains, num_resources), (requests, chains, num_resources)):
        raise DataError(
            f"{requests} requests and {chains} chains with {num_resources} limits need costs {(chains, num_resources)} or "
            f"{(requests, chains, num_resources)}, got {costs.shape}"
        )
    if not (np.isfinite(costs).all() and (costs >= 0).all()):
        raise DataError("costs of chains must be numbers of 0 or above")
    if np.isnan(values_RJ).any():
        raise DataError("values of chains hold NaN; predict every chain, or use -inf where a chain is forbidden")
    if not np.isfinite(values_RJ.max(1)).all():
        raise DataError(
            "a request has no chain that it may have, or one of infinite value; leave it at least one finite"
        )
    return _Table(values_RJ, costs if costs.ndim == 3 else costs[None])


def _along(table: _Table, start_L: Float, direction_L: Float, limits_L: Float) -> Float:
    """The first prices on the ray start + t direction, t >= 0, at which the limits are kept, found by bisection on t.

    Spending weighed by the direction falls along the ray. Where the limits are not kept even when everybody takes the least of it, the
    prices at which they do.
    """
    low, high = 0.0, _priced_out(table, start_L, direction_L)
    at_low, at_high = table.chains(start_L), table.chains(start_L + high * direction_L)
    if (table.cost(at_low) <= limits_L).all():
        return start_L
    if (table.cost(at_high) > limits_L).any():
        return start_L + high * direction_L
    for _ in range(MOST_STEPS):
        if high - low <= WIDTH * high:
            break
        # Values after their price are linear in t: a request with the same chain at both ends has it everywhere between.
        rows = np.flatnonzero(at_low != at_high)
        middle, at_middle = 0.5 * (low + high), at_high.copy()
        at_middle[rows] = table.chains(start_L + middle * direction_L, rows)
        if (table.cost(at_middle) <= limits_L).all():
            high, at_high = middle, at_middle
        else:
            low, at_low = middle, at_middle
    return start_L + high * direction_L


def _priced_out(table: _Table, start_L: Float, direction_L: Float) -> float:
    """A step along the direction at which every request takes its chain of least spending: above the steepest rise in the table."""
    net_RJ = table.net(start_L)
    open_RJ = np.isfinite(net_RJ)
    spend_RJ = np.where(open_RJ, paid(table.costs_xJL, direction_L), np.inf)
    least_R1 = spend_RJ.min(1, keepdims=True)
    cheapest_R1 = np.where(spend_RJ == least_R1, net_RJ, -np.inf).max(1, keepdims=True)
    extra_RJ = spend_RJ - least_R1
    dearer_RJ = open_RJ & (extra_RJ > 0)
    rise_RJ = np.divide(net_RJ - cheapest_R1, extra_RJ, out=np.zeros_like(net_RJ), where=dearer_RJ)
    largest = float(np.abs(net_RJ[open_RJ]).max())
    smallest = float(extra_RJ[dearer_RJ].min(initial=np.inf))
    apart = (
        largest * 1e-9 / smallest if np.isfinite(smallest) else 0.0
    )  # below it, rounding hides the price of equal values
    return max(float(rise_RJ.max()) * (1 + 1e-6), apart, 1e-12)


def _dual_minimum(table: _Table, limits_L: Float, direction_L: Float) -> tuple[Float, Float]:
    """Prices [L] that minimise  prices . limits + mean of the best value after its price,  and the range [L] they were looked for in.

    At the minimum that is no more than at price 0, the mean of the best values; and no less than what the cheapest chains bring plus what
    they leave of the limits times the prices. So each price has a bound. Ellipsoid method in units of those bounds, which stops when its
    own guarantee is met. Where the cheapest chains leave nothing of a limit: prices 0 and the direction as range.
    """
    size = len(limits_L)
    best, _ = table.dual(np.zeros(size))
    out_L = direction_L * _priced_out(table, np.zeros(size), direction_L)
    least_net, least_cost_L = table.dual(out_L)
    room_L = limits_L - least_cost_L
    gain = best - (least_net + float(out_L @ least_cost_L))
    if (room_L <= 0).any() or gain <= 0:
        return np.zeros(size), direction_L
    scale_L = gain / room_L
    at_L, shape_LL = np.full(size, 0.5), np.eye(size) * size / 4  # a ball around the cube from 0 to 1
    found_L, lowest = at_L, np.inf
    for _ in range(MOST_CUTS * size):
        inside = bool(at_L.min() >= 0)
        if inside:
            net, cost_L = table.dual(at_L * scale_L)
            height, slope_L = net + float(at_L * scale_L @ limits_L), (limits_L - cost_L) * scale_L
            if height < lowest:
                found_L, lowest = at_L, height
        else:
            slope_L = -np.eye(size)[at_L.argmin()]
        toward_L = shape_LL @ slope_L
        width = float(np.sqrt(max(float(slope_L @ toward_L), 0.0)))
        if width == 0 or (inside and width <= GAP * abs(lowest)):
            break
        at_L = at_L - toward_L / width / (size + 1)
        shape_LL = (shape_LL - 2 / (size + 1) * np.outer(toward_L, toward_L) / width**2) * size**2 / (size**2 - 1)
    return found_L * scale_L, scale_L
