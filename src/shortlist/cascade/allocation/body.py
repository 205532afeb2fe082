"""What all allocators share: from values to a choice, within budget, cap and chains that a request may have.

    values [R, J]  ->  chances [R, J]  ->  one chain each

1. `may_KJ`: chains that are open, by kind of request (K = 2: known users, newcomers). The cap closes chains; for newcomers a floor does.
2. `shares`: the rule. By default argmax(value - price . cost), so one chain has the whole chance.
3. Exploration mixes in an even chance of every open chain, so that what is logged can teach any chain's worth.

Budgets are kept with floor and exploration counted in. Where a budget can not pay for the floor there is none; exploration gets at most
a tenth of what the budget leaves above the cheapest chains.

R requests, F features, J chains, K kinds of request, C resources.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shortlist.cascade.allocation import solver
from shortlist.cascade.allocation.base import (
    RESOURCES,
    Allocator,
    Budget,
    ChainSet,
    Choice,
    Float,
    Int,
    Outcomes,
    Spent,
)
from shortlist.cascade.allocation.contexts import CONTEXT_NAMES
from shortlist.cascade.allocation.rewards import Kind, RewardConfig, RewardModel, mean_rewards
from shortlist.errors import ConfigError, DataError

Bools = NDArray[np.bool_]
EXPLORED = 0.1
"""Most of what a budget leaves above the cheapest chains that exploration may spend."""
HISTORY = CONTEXT_NAMES.index("has history")


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceConfig:
    """Settings of every allocator."""

    explore: float = 0.0
    """Share of requests that get any open chain with the same chance; less where the budget is tight."""

    def __post_init__(self) -> None:
        if not 0 <= self.explore < 1:
            raise ConfigError(f"explore must be from 0 to below 1, got {self.explore}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PricedConfig(ChoiceConfig):
    """Settings of allocators that predict what chains are worth and buy by price."""

    explore: float = 0.02
    """Share of requests that get any open chain with the same chance; less where the budget is tight."""
    floor: float = 0.5
    """Newcomers get at least the chain at this place among the allocator's own, by milliseconds: 0.5 the median one, 0 no floor. They would
    else never get the chance to look valuable."""
    newcomers: int = HISTORY
    """Number of the feature that tells newcomers: below 0 for them, as standardised "has history" is."""
    rho: float = 0.3
    """Weight of a window's own prices when `observe` blends them into the old ones."""
    model: Kind = "recursive"
    """Value model: linear; recursive, GreenFlow's; log, the same with one basis; monotone or plain, networks; additive, by stage."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """How it learns."""

    def __post_init__(self) -> None:
        ChoiceConfig.__post_init__(self)
        for name in ("floor", "rho"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if self.newcomers < 0:
            raise ConfigError(f"newcomers must be the number of a feature, got {self.newcomers}")


class Chooser(Allocator):
    """An allocator whose choice follows from a table of values; the systems beside this file say which chains, or change the rule.

    Values are predicted where its settings are a `PricedConfig`, else the chains' mean rewards, the same for all requests.

    Args:
        config: an instance of `Config`.
        chains: to choose from.
        num_features: F.
    """

    Config = ChoiceConfig

    def __init__(self, config: ChoiceConfig, chains: ChainSet, num_features: int) -> None:
        super().__init__(config, chains, num_features)
        self.model: RewardModel | None = None
        """Predicts values."""
        if isinstance(config, PricedConfig):
            self.model = RewardModel(config.model, config.reward, chains, num_features)
            if config.floor and config.newcomers >= num_features:
                raise ConfigError(
                    f"feature {config.newcomers} is to tell newcomers, but requests have {num_features} features; "
                    "name another as `newcomers` or set `floor` to 0"
                )
        self.mean_J: Float = np.full(len(chains), np.nan)
        """Mean rewards of chains; NaN for one never tried."""
        self.own_J: Bools = np.ones(len(chains), dtype=bool)
        """Chains that this allocator deals in; the first always among them, so that any budget and cap can be kept."""
        self.floor_J: Bools = np.ones(len(chains), dtype=bool)
        """Chains that newcomers may have, set by `aim`."""
        self.explore = config.explore
        """Share that the budget allows, set by `aim`."""
        self.lower_C: Float = np.zeros(len(RESOURCES))
        """Prices a little lower than `prices_C`, at which the budget would be passed."""
        self.mix = 0.0
        """Share of requests that are chosen at the lower prices: what makes the mean cost meet the budget where many requests are alike
        and one price would let all of them through or none."""
        self._rng = np.random.default_rng()

    def fit(self, outcomes: Outcomes) -> None:
        """Learn mean rewards and the value model. DataError for outcomes that do not fit the chains or hold no reward."""
        mean_J = mean_rewards(outcomes, len(self.chains))
        if self.model is not None:
            self.model.fit(outcomes)
        self.mean_J = mean_J

    def values(self, contexts_RF: NDArray[np.float32]) -> Float:
        """[R, J] what every chain is worth to each request. DataError for other features than it was made for."""
        if contexts_RF.ndim != 2 or contexts_RF.shape[1] != self.num_features:
            raise DataError(f"this allocator reads {self.num_features} features per request, got {contexts_RF.shape}")
        if self.model is not None:
            return self.model.predict(contexts_RF)
        return np.broadcast_to(self.mean_J, (len(contexts_RF), len(self.chains)))

    def kinds(self, contexts_RF: NDArray[np.float32]) -> Int:
        """int64 [R]: 1 for requests of newcomers that a floor is kept for, 0 for others."""
        if isinstance(self.config, PricedConfig) and self.config.floor:
            return (contexts_RF[:, self.config.newcomers] < 0).astype(np.int64)
        return np.zeros(len(contexts_RF), dtype=np.int64)

    def shares(self, values_RJ: Float, may_KJ: Bools, kind_R: Int) -> Float:
        """[R, J] chances of chains, 0 outside of `may_KJ`; sums of one. By default all on the most value after its price, but for the
        share `mix` that goes by the lower prices."""
        open_RJ = np.where(may_KJ[kind_R], values_RJ, -np.inf)
        share_RJ = np.zeros(open_RJ.shape)
        request_R = np.arange(len(open_RJ))
        for prices_C, share in ((self.prices_C, 1 - self.mix), (self.lower_C, self.mix)):
            if share:
                share_RJ[request_R, (open_RJ - solver.paid(self.chains.costs_JC, prices_C)).argmax(1)] += share
        return share_RJ

    def settle(self, values_RJ: Float, may_KJ: Bools, kind_R: Int, limits_C: Float) -> None:
        """Set what `shares` goes by, so that these requests cost at most `limits_C` on average. By default prices."""
        open_RJ = np.where(may_KJ[kind_R], values_RJ, -np.inf)
        solution = solver.solve(open_RJ, self.chains.costs_JC, limits_C)
        self.prices_C = solution.prices_C
        if not solution.feasible:
            self.prices_C = solver.priced_out(open_RJ, self.chains.costs_JC, limits_C)
        self.lower_C, self.mix = solver.between(open_RJ, self.chains.costs_JC, limits_C, self.prices_C)

    def aim(self, budget: Budget, contexts_RF: NDArray[np.float32]) -> None:
        """See `Allocator.aim`; DataError for no requests or other features than it was made for."""
        self.aim_at(budget, self.values(contexts_RF), self.kinds(contexts_RF))

    def aim_at(self, budget: Budget, values_RJ: Float, kind_R: Int) -> None:
        """`aim` on requests whose values [R, J] and kinds [R] are known. DataError for no requests."""
        if not len(values_RJ):
            raise DataError("a budget can not be aimed at on no requests; give those of the day before")
        self.explore, self.floor_J, limits_C = self._plan(budget.limits_C, kind_R)
        self.settle(values_RJ, self._may_KJ(None), kind_R, limits_C)
        self.budget = budget

    def choose(
        self,
        contexts_RF: NDArray[np.float32],
        *,
        most_C: Float | None = None,
        rng: np.random.Generator | None = None,
    ) -> Choice:
        """See `Allocator.choose`; DataError for other features than it was made for."""
        return self.choose_by(self.values(contexts_RF), self.kinds(contexts_RF), most_C=most_C, rng=rng)

    def choose_by(
        self, values_RJ: Float, kind_R: Int, *, most_C: Float | None = None, rng: np.random.Generator | None = None
    ) -> Choice:
        """`choose` for requests whose values [R, J] and kinds [R] are known."""
        request_R = np.arange(len(values_RJ))
        draw_R = (rng or self._rng).random(len(values_RJ))
        chance_RJ = self._chances(values_RJ, self._may_KJ(most_C), kind_R)
        chain_R = _drawn(chance_RJ, draw_R)
        capped_R = np.zeros(len(values_RJ), dtype=bool)
        if most_C is not None:  # the same draw without the cap
            free_R = _drawn(self._chances(values_RJ, self._may_KJ(None), kind_R), draw_R)
            capped_R = ~self.chains.within_J(most_C)[free_R]
        return Choice(
            chain_R=chain_R,
            value_R=values_RJ[request_R, chain_R],
            capped_R=capped_R,
            propensity_R=chance_RJ[request_R, chain_R],
            prices_C=self.prices_C.copy(),
        )

    def chances(self, contexts_RF: NDArray[np.float32], *, most_C: Float | None = None) -> Float:
        """[R, J]: the chance with which `choose` gives each chain; sums of one. What off-policy estimates need."""
        return self.chances_by(self.values(contexts_RF), self.kinds(contexts_RF), most_C=most_C)

    def chances_by(self, values_RJ: Float, kind_R: Int, *, most_C: Float | None = None) -> Float:
        """`chances` for requests whose values [R, J] and kinds [R] are known."""
        return self._chances(values_RJ, self._may_KJ(most_C), kind_R)

    def observe(self, spent: Spent) -> None:
        """Move prices a share `rho` towards those of this window's requests, at what chains cost in it; a window of none moves nothing."""
        if not (isinstance(self.config, PricedConfig) and len(spent.chain_R)):
            return
        said_C = self.chains.costs_JC[spent.chain_R].sum(0)
        more_C = np.where((said_C > 0) & (spent.spent_C > 0), spent.spent_C / np.maximum(said_C, 1e-300), 1.0)
        kind_R = self.kinds(spent.contexts_RF)
        self.explore, self.floor_J, limits_C = self._plan(self.budget.limits_C / more_C, kind_R)
        before_2C = np.stack([self.prices_C, self.lower_C])
        self.settle(self.values(spent.contexts_RF), self._may_KJ(None), kind_R, limits_C)
        after_2C = np.stack([self.prices_C, self.lower_C])
        self.prices_C, self.lower_C = (1 - self.config.rho) * before_2C + self.config.rho * after_2C

    def state(self) -> Mapping[str, Float]:
        """Arrays that `load_state` restores."""
        arrays = dict(super().state())
        arrays |= {"mean": self.mean_J, "explore": np.array([self.explore])}
        arrays |= {"lower": self.lower_C, "mix": np.array([self.mix])}
        arrays |= {"own": self.own_J.astype(np.float64), "floor": self.floor_J.astype(np.float64)}
        if self.model is not None:
            arrays |= {f"model.{name}": array for name, array in self.model.state().items()}
        return arrays

    def load_state(self, state: Mapping[str, Float]) -> None:
        """Restore what `state` gave; DataError names what is missing or of another shape, and nothing changes."""
        for name, have in self.state().items():
            found = state[name].shape if name in state else "none"
            if found != have.shape:
                raise DataError(
                    f"the allocator's state needs {name} of shape {have.shape}, found {found}; calibrate again"
                )
        super().load_state(state)
        if self.model is not None:
            self.model.load_state({n.removeprefix("model."): a for n, a in state.items() if n.startswith("model.")})
        self.mean_J, self.explore = np.array(state["mean"]), float(state["explore"][0])
        self.lower_C, self.mix = np.array(state["lower"], dtype=np.float64), float(state["mix"][0])
        self.own_J, self.floor_J = state["own"] > 0, state["floor"] > 0

    def _may_KJ(self, most_C: Float | None) -> Bools:
        """bool [2, J]: chains that known users and newcomers may have.

        The cap comes first: it may leave newcomers only the dearest chain that it allows, and everybody only the first chain.
        """
        own_J = self.own_J
        if most_C is not None:
            own_J = own_J & self.chains.within_J(most_C)
            own_J[0] |= not own_J.any()
        new_J = own_J & self.floor_J
        if not new_J.any():
            new_J[np.flatnonzero(own_J)[-1]] = True
        return np.stack([own_J, new_J])

    def _chances(self, values_RJ: Float, may_KJ: Bools, kind_R: Int) -> Float:
        share_RJ = self.shares(values_RJ, may_KJ, kind_R)
        if not self.explore:
            return share_RJ
        return (1 - self.explore) * share_RJ + self.explore * _even(may_KJ)[kind_R]

    def _plan(self, limits_C: Float, kind_R: Int) -> tuple[float, Bools, Float]:
        """Share of exploration, chains open to newcomers, and the mean cost [C] that is left to a request that does not explore."""
        costs_JC, everything_J = self.chains.costs_JC, np.ones(len(self.chains), dtype=bool)
        weight_K = np.bincount(kind_R, minlength=2) / len(kind_R)
        for floor_J in (self._floored_J(), everything_J):
            may_KJ = np.stack([self.own_J, self.own_J & floor_J])
            least_C = weight_K @ costs_JC[may_KJ.argmax(1)]
            even_C = weight_K @ (_even(may_KJ) @ costs_JC)
            room_C = limits_C - least_C
            if (room_C >= 0).all():
                break
        affordable = float((EXPLORED * room_C / np.maximum(even_C - least_C, 1e-100)).min())
        explore = min(self.config.explore, max(affordable, 0.0))
        return explore, floor_J, (limits_C - explore * even_C) / (1 - explore)

    def _floored_J(self) -> Bools:
        """bool [J]: chains at or above the floor."""
        place_J = np.arange(len(self.chains))
        if not isinstance(self.config, PricedConfig):
            return place_J >= 0
        own = np.flatnonzero(self.own_J)
        return place_J >= own[int(np.ceil(self.config.floor * (len(own) - 1)))]


def _even(may_KJ: Bools) -> Float:
    return may_KJ / may_KJ.sum(1, keepdims=True)


def _drawn(chance_RJ: Float, draw_R: Float) -> Int:
    """int64 [R]: the chain at which the running sum of chances passes the draw, from 0 to below 1; never one of chance 0."""
    sum_RJ = chance_RJ.cumsum(1)
    level_R = np.minimum(draw_R, 1 - 1e-12) * sum_RJ[:, -1]
    return (sum_RJ <= level_R[:, None]).sum(1)
