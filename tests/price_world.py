"""Requests whose worth under every chain is known, and the plainest allocator that buys by prices.

R requests, J chains, C resources; the two features of a request are the log of its value and the log of the milliseconds in which it is
mostly earned.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shortlist.cascade.allocation.base import RESOURCES, Allocator, ChainSet, Choice, NoSettings

MS = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
MFLOP = np.array([30.0, 20.0, 80.0, 90.0, 300.0, 500.0])
DEAREST = MS[-1]


def chains() -> ChainSet:
    """Six chains of one stage; the FLOPs do not follow the milliseconds all the way."""
    steps_J1 = np.arange(len(MS))[:, None]
    return ChainSet(
        names=tuple(f"a{j}" for j in range(len(MS))),
        stages=("ranking",),
        model_JK=np.zeros_like(steps_J1),
        count_JK=10 * 2**steps_J1,
        costs_JC=np.stack([MFLOP, MS], 1),
    )


def requests(rng: np.random.Generator, count: int, value: float = 0.0, depth: float = 1.5) -> np.ndarray:
    """float32 [R, 2]: heavy-tailed values around exp(value), earned in about exp(depth) ms."""
    return np.stack([rng.normal(value, 1.5, count), rng.normal(depth, 0.5, count)], 1).astype(np.float32)


class Buyer(Allocator):
    """Chooses by true worth less price; prices by bisection, one resource after the other until they stand."""

    def __init__(self, made_of: ChainSet | None = None) -> None:
        super().__init__(NoSettings(), chains() if made_of is None else made_of, 2)
        self.windows = []

    def worth_RJ(self, contexts_RF: np.ndarray) -> np.ndarray:
        value_R, depth_R = np.exp(contexts_RF.astype(np.float64)).T
        return value_R[:, None] * (1 - np.exp(-self.chains.costs_JC[:, 1] / depth_R[:, None]))

    def aim(self, budget, contexts_RF):
        self.budget, prices_C = budget, np.zeros(len(RESOURCES))
        worth_RJ, costs_JC = self.worth_RJ(contexts_RF), self.chains.costs_JC
        for _ in range(1 if np.isfinite(budget.limits_C).sum() == 1 else 20):
            for c in np.flatnonzero(np.isfinite(budget.limits_C)):

                def spends(price, c=c):
                    tried_C = np.where(np.arange(len(RESOURCES)) == c, price, prices_C)
                    return costs_JC[(worth_RJ - costs_JC @ tried_C).argmax(1), c].mean()

                low, high = 0.0, 1e9
                for _ in range(80 if spends(0.0) > budget.limits_C[c] else 0):
                    middle = np.sqrt(max(low, 1e-9) * high)
                    low, high = (middle, high) if spends(middle) > budget.limits_C[c] else (low, middle)
                prices_C[c] = 0.0 if spends(0.0) <= budget.limits_C[c] else high
        self.prices_C = prices_C

    def choose(self, contexts_RF, *, most_C=None, rng=None):
        net_RJ = self.worth_RJ(contexts_RF) - self.chains.costs_JC @ self.prices_C
        free_R = net_RJ.argmax(1)
        if most_C is not None:
            net_RJ[:, ~self.chains.within_J(most_C)] = -np.inf
        chain_R = net_RJ.argmax(1)
        rows = np.arange(len(chain_R))
        return Choice(
            chain_R=chain_R,
            value_R=self.worth_RJ(contexts_RF)[rows, chain_R],
            capped_R=chain_R != free_R,
            propensity_R=np.ones(len(chain_R)),
            prices_C=self.prices_C,
        )

    def observe(self, spent):
        self.windows.append(spent)


@dataclass(frozen=True)
class Served:
    """A stream under control, window by window."""

    spent_W: np.ndarray
    """Milliseconds."""
    budget_W: np.ndarray
    value_W: np.ndarray

    def overspend(self, horizon: int = 10) -> float:
        """The largest share by which so many windows in a row spend above their budgets."""
        sums = [np.convolve(x, np.ones(horizon), "valid") for x in (self.spent_W, self.budget_W)]
        return float((sums[0] / sums[1]).max() - 1)

    @property
    def utilisation(self) -> float:
        return float(self.spent_W.sum() / self.budget_W.sum())


def serve(control, allocator, windows, *, batch: int = 16, bias: float = 1.0, seconds: float = 60.0) -> Served:
    """Serve the windows, each given by its contexts, evenly over its time and in batches; `control` None = prices never change.

    `bias`: what chains cost against their calibration.
    """
    spent_W, value_W, now, limit = [], [], 0.0, None
    for contexts_RF in windows:
        spent, value = 0.0, 0.0
        for at in range(0, len(contexts_RF), batch):
            part_RF = contexts_RF[at : at + batch]
            if control is not None:
                limit = control.most_C(now + seconds * at / len(contexts_RF))
            choice = allocator.choose(part_RF, most_C=limit)
            cost_C = allocator.chains.costs_JC[choice.chain_R].sum(0) * bias
            if control is not None:
                control.note(part_RF, choice.chain_R, cost_C)
            spent, value = spent + cost_C[1], value + choice.value_R.sum()
        now += seconds
        if control is not None:
            control.tick(now)
        spent_W.append(spent)
        value_W.append(value)
    ms = np.nan if control is None else control.capacity.ms
    return Served(np.array(spent_W), np.full(len(spent_W), seconds * ms), np.array(value_W))
