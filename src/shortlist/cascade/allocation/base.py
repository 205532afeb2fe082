"""What allocators share: the chains they choose from, what is known of requests, a budget, and a choice.

    chains   = ChainSet(...)                         J chains with their costs, cheapest first
    outcomes = Outcomes(contexts_RF, rewards_RJ)     of past requests, by replay or as logged
    allocator.fit(outcomes)                          learns what a chain is worth to a request
    allocator.aim(Budget(ms=2.0), contexts_RF)       finds its prices on requests like those to come
    allocator.choose(contexts_RF)                    one chain per request; this is all that serving does

R requests, J chains, K stages, C resources (MFLOP and milliseconds), F features of a request.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from shortlist.errors import ConfigError, DataError

Float = NDArray[np.float64]
Int = NDArray[np.int64]
RESOURCES = ("mflop", "ms")
"""What chains cost, C = 2: 1e6 FLOPs as the systems state them, and measured milliseconds of one core."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What a request may cost on average; None = no limit on that resource. One price is found for each resource that has a limit."""

    mflop: float | None = None
    """1e6 FLOPs per request."""
    ms: float | None = None
    """Milliseconds per request."""

    def __post_init__(self) -> None:
        for name in RESOURCES:
            limit = getattr(self, name)
            if limit is not None and not 0 < limit < np.inf:
                raise ConfigError(f"a budget in {name} must be above 0, got {limit}; leave it out for no limit")

    @property
    def limits_C(self) -> Float:
        """[C] by resource, infinite where there is no limit."""
        return np.array([np.inf if getattr(self, name) is None else getattr(self, name) for name in RESOURCES])

    def scaled(self, factor: float) -> Budget:
        """So many times as much."""
        return Budget(**{n: None if (v := getattr(self, n)) is None else v * factor for n in RESOURCES})


@dataclass(frozen=True, kw_only=True)
class ChainSet:
    """Chains to choose from, by rising milliseconds; the first one is what a request gets at least."""

    names: tuple[str, ...]
    """[J] as RunConfig.chain reads them."""
    stages: tuple[str, ...]
    """[K] names of the stages."""
    model_JK: Int
    """Which of the stage's different sets of systems acts, 0 up to its number of sets."""
    count_JK: Int
    """Candidates that the stage scores: what the stage before lets through; of the first stage, which searches, what it finds."""
    costs_JC: Float
    """What a request costs, by resource."""

    def __post_init__(self) -> None:
        size = (len(self.names), len(self.stages))
        if (
            self.model_JK.shape != size
            or self.count_JK.shape != size
            or self.costs_JC.shape != (size[0], len(RESOURCES))
        ):
            raise DataError(
                f"{size[0]} chains of {size[1]} stages need models and counts {size} and costs {(size[0], len(RESOURCES))}, "
                f"got {self.model_JK.shape}, {self.count_JK.shape} and {self.costs_JC.shape}"
            )
        if not size[0]:
            raise DataError("a set of chains needs at least one chain")
        if not (np.isfinite(self.costs_JC).all() and (self.costs_JC >= 0).all()):
            raise DataError("costs of chains must be numbers of 0 or above; calibrate again")

    def __len__(self) -> int:
        return len(self.names)

    def select(self, index: Int) -> ChainSet:
        """The chains at `index` [J'], in that order."""
        return ChainSet(
            names=tuple(self.names[i] for i in index.tolist()),
            stages=self.stages,
            model_JK=self.model_JK[index],
            count_JK=self.count_JK[index],
            costs_JC=self.costs_JC[index],
        )

    def within_J(self, most_C: Float) -> NDArray[np.bool_]:
        """bool [J]: chains that cost no more than `most_C` of any resource; the cheapest one always may."""
        fits_J = np.asarray((self.costs_JC <= most_C).all(1))
        if not fits_J.any():
            fits_J[0] = True
        return fits_J


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """What chains brought to past requests."""

    contexts_RF: NDArray[np.float32]
    """Features that are known before any stage acts."""
    rewards_RJ: Float
    """Worth of the page that each chain makes, 0 or above; NaN where it was not tried."""
    users_R: Int
    """User rows, so that intervals and splits go by user."""
    times_R: Int
    """Seconds since 1970."""
    propensity_RJ: Float | None = None
    """Chance with which a logged request got each chain; None where all chains were replayed."""

    def __len__(self) -> int:
        return len(self.contexts_RF)

    def select(self, index: Int) -> Outcomes:
        """The requests at `index`."""
        return Outcomes(
            contexts_RF=self.contexts_RF[index],
            rewards_RJ=self.rewards_RJ[index],
            users_R=self.users_R[index],
            times_R=self.times_R[index],
            propensity_RJ=None if self.propensity_RJ is None else self.propensity_RJ[index],
        )


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One chain for each of R requests."""

    chain_R: Int
    """Numbers of chains."""
    value_R: Float
    """What the allocator expects of the chosen chain, in the unit of the rewards; NaN where it expects nothing in particular."""
    capped_R: NDArray[np.bool_]
    """Whether a cap kept the request from a chain that it would have got."""
    propensity_R: Float
    """Chance of the chosen chain; 1 where nothing was drawn."""
    prices_C: Float
    """Worth of one unit of each resource at which it was chosen."""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What the requests of one window were and cost, for the near-line update of prices."""

    contexts_RF: NDArray[np.float32]
    chain_R: Int
    """Chains they got."""
    spent_C: Float
    """Sum over the window, as measured, by resource."""
    seconds: float
    """Length of the window."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NoSettings:
    """An allocator without settings."""


class Allocator(ABC):
    """Chooses a chain for every request.

    Args:
        config: an instance of `Config`.
        chains: to choose from.
        num_features: F.
    """

    kind: ClassVar[str] = "allocator"
    Config: ClassVar[type[Any]] = NoSettings

    def __init__(self, config: Any, chains: ChainSet, num_features: int) -> None:
        self.config, self.chains, self.num_features = config, chains, num_features
        self.prices_C: Float = np.zeros(len(RESOURCES))
        self.budget = Budget()

    def fit(self, outcomes: Outcomes) -> None:  # noqa: B027 -- not every one learns
        """Learn what chains are worth; allocators that look at no request have nothing to learn."""

    @abstractmethod
    def aim(self, budget: Budget, contexts_RF: NDArray[np.float32]) -> None:
        """Set prices, or whatever it chooses by, so that requests like these cost at most `budget` on average.

        Where even the cheapest chain costs more, every request gets the cheapest chain.
        """

    @abstractmethod
    def choose(
        self,
        contexts_RF: NDArray[np.float32],
        *,
        most_C: Float | None = None,
        rng: np.random.Generator | None = None,
    ) -> Choice:
        """One chain per request.

        Args:
            contexts_RF: features.
            most_C: no request may cost more than this of any resource: what is left of a request's own budget, or the cap that an
                overloaded server sets. The cheapest chain is always possible.
            rng: for allocators that draw; None = a new unseeded one.
        """

    def observe(self, spent: Spent) -> None:  # noqa: B027 -- not every one learns
        """Learn of a window near-line; the default learns nothing."""

    def state(self) -> Mapping[str, Float]:
        """Arrays that `load_state` restores; saved as safetensors."""
        return {"prices": self.prices_C, "budget": self.budget.limits_C}

    def load_state(self, state: Mapping[str, Float]) -> None:
        """Restore what `state` gave; DataError names what does not fit."""
        for name in ("prices", "budget"):
            if name not in state or state[name].shape != (len(RESOURCES),):
                raise DataError(f"the allocator's state has no {name} for {len(RESOURCES)} resources; calibrate again")
        self.prices_C = np.array(state["prices"], dtype=np.float64)
        limits = {n: None if np.isinf(v) else float(v) for n, v in zip(RESOURCES, state["budget"])}
        self.budget = Budget(**limits)
