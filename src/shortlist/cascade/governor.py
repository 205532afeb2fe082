"""Decides which chain answers each request, and keeps what all of them cost within what the server may spend.

    choose     the allocator's choice at today's prices, under three caps: the request's own budget, the calibrated budget's dearest
               chain, and what an overloaded server can still afford
    note       what a request really cost and how long it took
    tick       once a second or so: the stress cap moves; once a window: the prices move
    aim        when somebody sets another budget: the prices are found anew

A governor belongs to one snapshot. Without calibrated costs (`shortlist calibrate RUN`) there is none, and every request gets the
default chain. B requests, J chains, C resources.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shortlist.cascade.allocation.base import RESOURCES, Allocator, Budget, Choice, Float
from shortlist.cascade.allocation.calibration import allocation_path, load_allocation
from shortlist.cascade.allocation.forecast import Linear, LinearConfig
from shortlist.cascade.allocation.prices import PriceConfig, PriceControl
from shortlist.cascade.allocation.stress import MaxPower, MaxPowerConfig, tightest
from shortlist.cascade.meter import StageReport
from shortlist.data.batches import Batch
from shortlist.errors import ConfigError, SnapshotError

_MS = RESOURCES.index("ms")
Reason = Literal["default", "named", "price", "own budget", "overload", "fallback"]
Features = Callable[[Batch], NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Allotted:
    """Which chain a request got, and why."""

    reason: Reason
    """default: the run has no allocator; named: the request asked for it; price: the best value at the prices; own budget: the
    request's limit kept it from a dearer one; overload: the server's cap did; fallback: the allocator failed."""
    value: float | None = None
    """Worth that the allocator expects of it, in the unit of the calibration; None where it expects nothing in particular."""
    mflop: float | None = None
    """Calibrated cost."""
    ms: float | None = None
    """Calibrated cost."""
    price_mflop: float | None = None
    """Worth of 1e6 FLOPs at which it was chosen."""
    price_ms: float | None = None
    """Worth of a millisecond at which it was chosen."""
    cap_ms: float | None = None
    """Dearest chain that the server could afford; None = any."""
    propensity: float = 1.0
    """Chance with which it was chosen; below 1 where the allocator explores or mixes."""


class Decision(NamedTuple):
    """For B requests."""

    chains: Sequence[str | None]
    """Names; None = the default chain."""
    told: Sequence[Allotted]
    contexts_BF: NDArray[np.float32] | None = None
    """Features that the allocator looked at; None where it was not asked."""
    chain_B: NDArray[np.int64] | None = None
    """Numbers of the chains."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GovernorConfig:
    """What an engine lets its allocator spend."""

    allocate: bool = True
    """Whether a calibrated allocator chooses chains; False = the default chain for everyone."""
    budget: Budget = field(default_factory=Budget)
    """What a request may cost on average; no limits = as the run was calibrated."""
    capacity: Budget = field(default_factory=Budget)
    """What all requests of a second may cost together: then prices follow the traffic. No limits = prices stay."""
    window_seconds: float = 60.0
    """Time between new prices."""
    target_ms: float | None = None
    """Latency to keep to when overloaded: above it the dearest chains are given up first; None = nothing is."""

    def __post_init__(self) -> None:
        for name in ("window_seconds", "target_ms"):
            value = getattr(self, name)
            if value is not None and not 0 < value < np.inf:
                raise ConfigError(f"{name} must be above 0, got {value}")

    @property
    def moves(self) -> bool:
        """Whether anything changes from second to second."""
        return self.allocate and (self.target_ms is not None or self.capacity != Budget())


class Governor:
    """Chooses chains; safe to use from many threads.

    Args:
        allocator: calibrated and aimed.
        features: float32 [B, F] of a batch, as at calibration.
        prices: moves the allocator's prices window by window; None = they stay as calibrated.
        stress: the cap of an overloaded server; None = none.
        clock: seconds.
        seed: of the draws of allocators that explore.
        rows_RF: features of requests like those to come, on which another budget is aimed; None = it can not be changed.
        calibrated: the budget that holds where nobody sets another.
    """

    def __init__(
        self,
        allocator: Allocator,
        features: Features,
        *,
        prices: PriceControl | None = None,
        stress: MaxPower | None = None,
        clock: Callable[[], float] = time.monotonic,
        seed: int | None = None,
        rows_RF: NDArray[np.float32] | None = None,
        calibrated: Budget | None = None,
    ) -> None:
        self.allocator, self.features, self.prices, self.stress = allocator, features, prices, stress
        self.calibrated = allocator.budget if calibrated is None else calibrated
        self._rows_RF = rows_RF
        self._clock, self._rng = clock, np.random.default_rng(seed)
        self._lock, self._aiming = threading.Lock(), threading.Lock()

    def choose(self, batch: Batch, most_BC: Float | None = None) -> Decision:
        """A chain for each of B requests.

        Args:
            batch: the requests, before any stage acts.
            most_BC: what each may cost at most by a budget of its own, infinite where it has none.
        """
        chains = self.allocator.chains
        contexts_BF = self.features(batch)
        cap_C = self._cap_C()
        with self._lock:  # one generator for all threads
            choice, own_B = self._chosen(contexts_BF, cap_C, most_BC)
        names = [chains.names[number] for number in choice.chain_R.tolist()]
        costs_BC = chains.costs_JC[choice.chain_R]
        cap_ms = None if cap_C is None or np.isinf(cap_C[_MS]) else float(cap_C[_MS])
        told = [
            Allotted(
                reason="own budget" if own else "overload" if capped else "price",
                value=None if np.isnan(value) else value,
                mflop=mflop,
                ms=ms,
                price_mflop=float(choice.prices_C[0]),
                price_ms=float(choice.prices_C[_MS]),
                cap_ms=cap_ms,
                propensity=chance,
            )
            for own, capped, value, (mflop, ms), chance in zip(
                own_B.tolist(),
                choice.capped_R.tolist(),
                choice.value_R.tolist(),
                costs_BC.tolist(),
                choice.propensity_R.tolist(),
            )
        ]
        return Decision(names, told, contexts_BF, choice.chain_R)

    def _cap_C(self) -> Float | None:
        """What the server affords at most for a request now; None = anything."""
        return tightest(
            None if self.stress is None else self.stress.cap_C,
            None if self.prices is None else self.prices.most_C(self._clock()),
        )

    def _chosen(
        self, contexts_BF: NDArray[np.float32], cap_C: Float | None, most_BC: Float | None
    ) -> tuple[Choice, NDArray[np.bool_]]:
        """The allocator's choice, and bool [B] whether a request's own budget kept it from a dearer chain."""
        shared = self.allocator.choose(contexts_BF, most_C=cap_C, rng=self._rng)
        own_B = np.zeros(len(contexts_BF), dtype=bool)
        if most_BC is None:
            return shared, own_B
        chosen_BC = self.allocator.chains.costs_JC[shared.chain_R]
        chain_R, value_R = shared.chain_R.copy(), shared.value_R.copy()
        capped_R, propensity_R = shared.capped_R.copy(), shared.propensity_R.copy()
        for place in np.flatnonzero((chosen_BC > most_BC).any(1)).tolist():  # few requests bring a budget of their own
            most_C = tightest(most_BC[place], cap_C)
            one = self.allocator.choose(contexts_BF[place : place + 1], most_C=most_C, rng=self._rng)
            chain_R[place], value_R[place] = one.chain_R[0], one.value_R[0]
            capped_R[place], propensity_R[place] = one.capped_R[0], one.propensity_R[0]
            own_B[place] = True
        choice = Choice(
            chain_R=chain_R, value_R=value_R, capped_R=capped_R, propensity_R=propensity_R, prices_C=shared.prices_C
        )
        return choice, own_B

    def note(self, decision: Decision, reports: Sequence[Sequence[StageReport]]) -> None:
        """What B requests cost, for the prices.

        Args:
            decision: of `choose`.
            reports: per request, per stage.
        """
        if self.prices is None or decision.chain_B is None or decision.contexts_BF is None:
            return
        spent_C = np.array(
            [sum(getattr(stage, f"spent_{name}") for request in reports for stage in request) for name in RESOURCES]
        )
        self.prices.note(decision.contexts_BF, decision.chain_B, spent_C)

    def answered(self, latency_ms: float, *, failed: bool = False) -> None:
        """A request got its answer, or none, so long after it came in; for the stress cap."""
        if self.stress is not None:
            self.stress.note(latency_ms, failed)

    def tick(self) -> None:
        """Move the stress cap; at the end of a window move the prices too."""
        now = self._clock()
        if self.stress is not None:
            self.stress.tick(now)
        if self.prices is not None:
            self.prices.tick(now)

    def aim(self, budget: Budget) -> None:
        """Let a request cost another budget on average from now on; no limits = the calibrated one again.

        Takes its time, and requests that are decided meanwhile get the old prices or the new ones.

        Raises ConfigError, and changes nothing, where prices follow the traffic or there are no requests to find them on.
        """
        if self.prices is not None:
            raise ConfigError(
                "prices follow the traffic here, within the server's capacity per second; start it without --capacity-ms to set a budget"
            )
        if self._rows_RF is None:
            raise ConfigError(
                "another budget needs the requests of a calibration; run `shortlist calibrate` on this run"
            )
        with self._aiming:
            self.allocator.aim(self.calibrated if budget == Budget() else budget, self._rows_RF)

    @property
    def cap_ms(self) -> float | None:
        """Dearest chain that the server affords now; None = any."""
        cap_C = None if self.stress is None else self.stress.cap_C
        return None if cap_C is None else float(cap_C[_MS])


def open_governor(
    folder: Path | None, version: str, config: GovernorConfig, clock: Callable[[], float] = time.monotonic
) -> tuple[Governor | None, list[str]]:
    """The governor of a run, and what is wrong with its calibration where that can not be used.

    Args:
        folder: of the run; None = it has none, and so no calibration.
        version: of the run.
        clock: seconds.

    Raises ConfigError where the settings want a budget kept but the run is not calibrated.
    """
    if folder is None or not config.allocate:
        return None, []
    path = allocation_path(folder)
    if not path.exists():
        if config != GovernorConfig(window_seconds=config.window_seconds):
            raise ConfigError(
                f"{folder} is not calibrated, so no budget can be kept: run `shortlist calibrate {folder}`"
            )
        return None, []
    try:
        allocation = load_allocation(path, version=version)
    except SnapshotError as error:
        return None, [f"requests get the default chain: {error}"]
    allocator = allocation.allocator
    calibrated = allocation.budget
    if config.budget != Budget():
        allocator.aim(config.budget, allocation.rows_RF)
    prices = None
    if config.capacity != Budget():
        settings = PriceConfig(window_seconds=config.window_seconds)
        prices = PriceControl(
            allocator,
            config.capacity,
            Linear(LinearConfig(memory_seconds=3 * config.window_seconds)),
            settings,
            now=clock(),
        )
    stress = None
    if config.target_ms is not None:
        stress = MaxPower(allocation.chains, MaxPowerConfig(target_ms=config.target_ms), now=clock())
    governor = Governor(
        allocator,
        allocation.contexts,
        prices=prices,
        stress=stress,
        clock=clock,
        rows_RF=allocation.rows_RF,
        calibrated=calibrated,
    )
    return governor, []
