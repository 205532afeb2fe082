"""Quality against cost: what each way to choose chains brings at each budget, on requests that nobody learned from.

    learn    outcomes on which allocators learn what chains are worth, and mixtures what chains bring
    aim      later outcomes of other people, on which prices are found
    test     asked once

Every arm is aimed at the same budgets on the same requests. An arm is compared with the best random mixture of fixed chains at the cost
that the arm really had, so that spending less than allowed is no fault and spending more no merit. The oracle knows the true rewards of
the very requests; no arm can pass it, and `of_oracle` says what part of its gain above the mixture an arm has.

R requests, J chains, C resources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from shortlist.cascade.allocation.base import RESOURCES, Allocator, Budget, ChainSet, Float, Int, Outcomes
from shortlist.cascade.allocation.body import Chooser
from shortlist.cascade.allocation.outcomes import prune
from shortlist.cascade.allocation.solver import best_mixture
from shortlist.cascade.settings import build
from shortlist.errors import ConfigError, DataError
from shortlist.metrics import Interval
from shortlist.metrics.intervals import PairedTest, bootstrap_interval, paired_difference
from shortlist.registry import find

ARMS = ("fixed", "mixture", "dcaf", "queue-only", "greenflow", "oracle")
WHOLE = ("dcaf", "queue-only")
"""Arms that choose their own chains from all that there are; others choose from those worth keeping."""
STEPS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Budgets between the cheapest chain (0) and the dearest that is worth keeping (1)."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One arm at one budget."""

    arm: str
    budget: Budget
    costs_C: Float
    """What a request cost on average, by resource."""
    worth: Interval
    """Of a request; interval over users."""
    rival: float
    """Worth of the best random mixture of fixed chains that costs as much."""
    gain: PairedTest
    """Worth of the arm minus that of the mixture, request by request."""
    of_oracle: float
    """The gain as a share of the oracle's at the same budget; NaN where the oracle gains nothing."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "arm": self.arm,
            "budget": asdict(self.budget),
            **dict(zip(RESOURCES, self.costs_C.tolist())),
            "worth": asdict(self.worth),
            "mixture_at_that_cost": self.rival,
            "gain": asdict(self.gain),
            "of_oracle": None if np.isnan(self.of_oracle) else self.of_oracle,
        }


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """All arms at all budgets."""

    chains: ChainSet
    worth_J: Float
    """What each fixed chain brings on the test requests."""
    default: int
    """Number of the default chain."""
    resource: str
    """That budgets are set in."""
    points: tuple[Point, ...]
    num_requests: int
    note: str = ""
    """Caveat that goes with every figure, such as that the log is simulated."""

    def of(self, arm: str) -> list[Point]:
        """The points of an arm, by rising budget."""
        return [point for point in self.points if point.arm == arm]

    @property
    def arms(self) -> tuple[str, ...]:
        """In their order."""
        return tuple(dict.fromkeys(point.arm for point in self.points))

    def saving(self, arm: str, resource: str | None = None) -> float:
        """Share of the default chain's cost that the arm saves at the default chain's worth; NaN where it never reaches that.

        Between its points an arm's worth rises in a straight line with its cost, as mixing two budgets would make it. `resource` is what
        is paid in, None = what budgets are set in.
        """
        number = RESOURCES.index(resource or self.resource)
        points = sorted(self.of(arm), key=lambda point: float(point.costs_C[number]))
        cost, worth = [float(p.costs_C[number]) for p in points], [p.worth.mean for p in points]
        wanted, paid = float(self.worth_J[self.default]), float(self.chains.costs_JC[self.default, number])
        for before in range(len(points)):
            if worth[before] >= wanted:
                if before == 0:
                    return 1 - cost[0] / paid
                share = (wanted - worth[before - 1]) / (worth[before] - worth[before - 1])
                return 1 - (cost[before - 1] + share * (cost[before] - cost[before - 1])) / paid
        return float("nan")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "resource": self.resource,
            "note": self.note,
            "num_requests": self.num_requests,
            "default": self.chains.names[self.default],
            "chains": [
                {"name": name, **dict(zip(RESOURCES, costs.tolist())), "worth": worth}
                for name, costs, worth in zip(self.chains.names, self.chains.costs_JC, self.worth_J.tolist())
            ],
            "points": [point.as_dict() for point in self.points],
            "savings": {
                resource: {arm: None if np.isnan(s := self.saving(arm, resource)) else s for arm in self.arms}
                for resource in RESOURCES
            },
        }


def frontier(
    chains: ChainSet,
    learn: Outcomes,
    aim: Outcomes,
    test: Outcomes,
    *,
    default: int,
    resource: str = "ms",
    budgets: Sequence[float] | None = None,
    arms: Sequence[str] = ARMS,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
    note: str = "",
) -> Frontier:
    """Fit every arm once, aim it at every budget, and judge it on the test requests.

    Args:
        chains: J.
        learn, aim, test: outcomes of all J chains on three sets of requests.
        default: number of the default chain.
        resource: that budgets are set in, "ms" or "mflop".
        budgets: per request; None = `STEPS`.
        arms: names of allocators.
        settings: of an arm, where not its defaults.
        seed: of the bootstrap.

    Raises ConfigError for what `check_wishes` refuses, DataError for fewer than two users in `test`.
    """
    check_wishes(resource, arms)
    if len(np.unique(test.users_R)) < 2:
        raise DataError("intervals need test requests of at least two people; give the test window a larger share")
    number = RESOURCES.index(resource)
    kept_J = prune(chains, learn, resources=[number])
    if budgets is None:
        low, high = chains.costs_JC[kept_J, number].min(), chains.costs_JC[kept_J, number].max()
        budgets = [float(low + step * (high - low)) for step in STEPS]
    judge = _Judge(chains, learn, aim, test, kept_J, number, seed)
    points: list[Point] = []
    for arm in dict.fromkeys(arms):
        allocator, own_J = judge.fitted(arm, (settings or {}).get(arm, {}))
        points += [judge.point(arm, allocator, own_J, Budget(**{resource: limit})) for limit in budgets]
    return Frontier(
        chains=chains,
        worth_J=test.rewards_RJ.mean(0),
        default=default,
        resource=resource,
        points=tuple(_beside_oracle(points)),
        num_requests=len(test),
        note=note,
    )


def check_wishes(resource: str, arms: Sequence[str]) -> None:
    """ConfigError for a resource that there is not, no arm at all, or one that is no allocator; UnknownSystem names what is near."""
    if resource not in RESOURCES:
        raise ConfigError(f"resource must be one of {', '.join(RESOURCES)}, got {resource!r}")
    if not arms:
        raise ConfigError(f"name at least one allocator, such as {', '.join(ARMS)}")
    for arm in arms:
        if not issubclass((entry := find(arm)).cls, Chooser):
            raise ConfigError(f"{arm} is a {entry.kind} and can not be an arm; allocators are {', '.join(ARMS)}")


class _Judge:
    """Fits, aims and judges the arms of one frontier."""

    def __init__(
        self, chains: ChainSet, learn: Outcomes, aim: Outcomes, test: Outcomes, kept_J: Int, number: int, seed: int
    ) -> None:
        self.chains, self.learn, self.aim, self.test = chains, learn, aim, test
        self.kept_J, self.number, self.seed = kept_J, number, seed
        self.learned_J = np.nanmean(learn.rewards_RJ, axis=0)

    def fitted(self, arm: str, settings: Mapping[str, Any]) -> tuple[Chooser, Int]:
        """The allocator of an arm, and the numbers of its chains."""
        entry = find(arm)
        own_J = np.arange(len(self.chains)) if arm in WHOLE else self.kept_J
        made: Allocator = entry.cls(
            build(entry.cls.Config, dict(settings), arm),  # type: ignore[attr-defined]
            self.chains.select(own_J),
            self.learn.contexts_RF.shape[1],
        )
        assert isinstance(made, Chooser)
        if arm != "oracle":
            made.fit(_columns(self.learn, own_J))
        return made, own_J

    def point(self, arm: str, allocator: Chooser, own_J: Int, budget: Budget) -> Point:
        """An arm aimed at a budget, on the test requests."""
        share_RJ = self._shares(arm, allocator, own_J, budget)
        worth_R = (share_RJ * self.test.rewards_RJ[:, own_J]).sum(1)
        costs_C = (share_RJ @ self.chains.costs_JC[own_J]).mean(0)
        rival_R = self.test.rewards_RJ @ self._mixture_J(costs_C)
        users_R = self.test.users_R
        return Point(
            arm=arm,
            budget=budget,
            costs_C=costs_C,
            worth=bootstrap_interval(worth_R, users_R, seed=self.seed),
            rival=float(rival_R.mean()),
            gain=paired_difference(worth_R, rival_R, users_R, seed=self.seed),
            of_oracle=float("nan"),
        )

    def _shares(self, arm: str, allocator: Chooser, own_J: Int, budget: Budget) -> Float:
        """[R, J'] chances of the arm's chains; nothing is drawn, which would only add noise."""
        if arm == "oracle":
            # It knows the very requests, so it is aimed at them, too.
            rewards_RJ, kind_R = self.test.rewards_RJ[:, own_J], np.zeros(len(self.test), dtype=np.int64)
            allocator.aim_at(budget, rewards_RJ, kind_R)
            return allocator.chances_by(rewards_RJ, kind_R)
        allocator.aim(budget, self.aim.contexts_RF)
        return allocator.chances(self.test.contexts_RF)

    def _mixture_J(self, costs_C: Float) -> Float:
        """[J] chances of the best mixture, by what chains brought where was learned, that costs as much of the budget's resource."""
        limits_C = np.full(len(RESOURCES), np.inf)
        limits_C[self.number] = max(costs_C[self.number], self.chains.costs_JC[:, self.number].min())
        return best_mixture(self.learned_J, self.chains.costs_JC, limits_C)


def _columns(outcomes: Outcomes, own_J: Int) -> Outcomes:
    chances = outcomes.propensity_RJ
    return replace(
        outcomes,
        rewards_RJ=outcomes.rewards_RJ[:, own_J],
        propensity_RJ=None if chances is None else chances[:, own_J],
    )


def _beside_oracle(points: Sequence[Point]) -> list[Point]:
    """The points with their share of the oracle's gain."""
    best = {point.budget: point.gain.difference for point in points if point.arm == "oracle"}
    return [
        replace(point, of_oracle=point.gain.difference / best[point.budget])
        if best.get(point.budget, 0.0) > 0
        else point
        for point in points
    ]
