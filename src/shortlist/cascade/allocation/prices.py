"""Near-line price control: what traffic a server can bear, window after window, becomes the budget that an allocator aims at.

    control = PriceControl(allocator, Budget(ms=800.0), Linear(LinearConfig()))         800 ms of work a second
    control.start(contexts_RF, rate=40.0)                                               yesterday's requests: the first prices
    choice = allocator.choose(contexts_RF, most_C=control.most_C(now))
    control.note(contexts_RF, choice.chain_R, spent_C)                                  what was served, and what it cost
    control.tick(now)                                                                   closes a window that is over: the next prices

Prices are found anew for every window, on the newest requests, and never carried over: so they follow the mix of users and the scale
of values (when a sale doubles all values, yesterday's price would let everybody through). Three things pass from window to window:

    rate       a forecaster's; budget per request = allowance of the window / requests to come
    bias_C     what chains cost as measured against what calibration said, a share rho of it new in every window
    debt_C     what was overspent and is not yet saved, in window budgets; the allowance is smaller by it

The debt keeps a promise: H windows in a row spend at most (credit + margin) / H more than their budgets, but for one batch of requests,
and for what the cheapest chain costs where even that is too much. Let `over_t` be what window t spent above its budget B, in units of B.

    D_t = min(max(-credit, D_{t-1} + over_t), G_t)        G_t = max over h = 0 .. H-1 of (over_{t-h+1} + ... + over_t)
    window t + 1 stops at B (1 - D_t + margin)

By induction D_t >= G_t - credit, so that over_{t+1} <= margin - D_t and any h < H windows before it add up to at most credit + margin.
G_t forgets what no H windows can hold any more: after a long overload nobody saves for ever.

This is GreenFlow's near-line loop (Lu et al., IJCAI 2023) as far as it is known, with DCAF's scaling of the budget by traffic (Jiang et
al., 2020); bias, debt and stop are ours. R requests, C resources, F features, H windows.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shortlist.cascade.allocation.base import RESOURCES, Allocator, Budget, Float, Int
from shortlist.cascade.allocation.forecast import Forecaster
from shortlist.errors import ConfigError, DataError

LEAST = 1e-6
"""A budget per request is never below this share of the cheapest chain's cost: it must be above 0."""
PRIOR = 0.1
"""Share of a window for which the forecast speaks when the window's own rate is told: its first requests say little."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PriceConfig:
    """Settings of the price control."""

    window_seconds: float = 60.0
    """How long prices stand. Shorter windows follow traffic faster; some hundred requests should fall into one."""
    rho: float = 0.3
    """Weight of the last window in what chains really cost against their calibration."""
    credit: float = 0.05
    """What windows leave may be spent later, up to so many windows' budgets."""
    margin: float = 0.05
    """A window stops (every request gets the cheapest chain) before it spends so many of its budgets above its allowance."""
    num_windows: int = 10
    """H: so many windows in a row spend at most (credit + margin) / H more than their budgets."""
    num_rows: int = 4096
    """Newest requests on which prices are found; all of the last window, where it had as many."""

    def __post_init__(self) -> None:
        if not 0 < self.window_seconds < np.inf:
            raise ConfigError(f"window_seconds must be above 0, got {self.window_seconds}")
        if not 0 <= self.rho <= 1:
            raise ConfigError(f"rho must be from 0 to 1, got {self.rho}")
        if not (self.credit >= 0 and self.margin >= 0):
            raise ConfigError(f"credit and margin must not be negative, got {self.credit} and {self.margin}")
        if self.num_windows < 2 or self.num_rows < 1:
            raise ConfigError(
                f"num_windows is 2 or more and num_rows 1 or more, got {self.num_windows}, {self.num_rows}"
            )


@dataclass(frozen=True, kw_only=True)
class Window:
    """What became of one window, and with what the next one starts."""

    count: int
    """Requests."""
    seconds: float
    expected: float
    """Requests that were foretold; NaN where nothing was known."""
    spent_C: Float
    """As measured."""
    budget_C: Float
    """Capacity times seconds; infinite where a resource has no limit."""
    stopped: bool
    """Whether it ran out of its allowance for a while, so that requests got the cheapest chain."""
    debt_C: Float
    """What the next window has to save, in window budgets; below 0 what it may spend besides; 0 for a resource without limit."""
    bias_C: Float
    """Measured cost of chains against calibration."""
    next_budget: Budget
    """Per request, in units of the calibration: what the allocator aims at."""
    prices_C: Float
    """At which the next window begins."""


@dataclass(slots=True)
class _Running:
    """The window that runs."""

    rows: list[NDArray[np.float32]] = field(default_factory=list)
    """Contexts of what was answered, oldest first."""
    count: int = 0
    said_C: Float = field(default_factory=lambda: np.zeros(len(RESOURCES)))
    """What its chains cost by calibration."""
    spent_C: Float = field(default_factory=lambda: np.zeros(len(RESOURCES)))
    stopped: bool = False


class PriceControl:
    """Keeps an allocator within a capacity per second; may be shared between threads.

    The allocator is changed by `start`, `tick`, `close` and `load_state` alone, which take their time: call them near-line. A request
    that is decided at the same moment gets the old prices or the new ones. `aim` has the last word on prices, so an allocator's own
    `observe`, which blends them, is not called.

    Args:
        allocator: its `aim` sets prices.
        capacity: what one second of traffic may cost; 800 ms is four fifths of one core.
        forecaster: of requests per second.
        config: settings.
        now: when the first window opens, on the clock of `most_C` and `tick`.
    """

    def __init__(
        self,
        allocator: Allocator,
        capacity: Budget,
        forecaster: Forecaster,
        config: PriceConfig | None = None,
        *,
        now: float = 0.0,
    ) -> None:
        self.allocator, self.capacity, self.forecaster = allocator, capacity, forecaster
        self.config = config or PriceConfig()
        self.debt_C: Float = np.zeros(len(RESOURCES))
        self._limited_C = np.isfinite(capacity.limits_C)
        self._whole_C: Float = np.where(self._limited_C, capacity.limits_C, 1.0) * self.config.window_seconds
        """Budget of one window; anything above 0 where there is no limit."""
        self._over_HC: Float = np.zeros((self.config.num_windows - 1, len(RESOURCES)))
        """Spent above budget by the last windows, newest first, in window budgets."""
        self._costs_2C: Float = np.stack([self._whole_C] * 2)
        """Faded sums of measured and of calibrated costs; as if a window had cost what calibration says."""
        self._rows_RF = np.zeros((0, allocator.num_features), dtype=np.float32)
        self._opened, self._expected, self._running = now, np.nan, _Running()
        self._lock = threading.Lock()
        """Held for what requests report and ask."""
        self._turning = threading.RLock()
        """Held from the end of a window until the next one's prices are found."""

    @property
    def bias_C(self) -> Float:
        """What chains cost as measured, against what calibration said."""
        bias_C: Float = self._costs_2C[0] / self._costs_2C[1]
        return bias_C

    def start(self, contexts_RF: NDArray[np.float32], rate: float) -> Budget:
        """First prices, from requests like those to come, and so many of them per second.

        Returns the budget per request. Raises DataError for no requests, or contexts of another size.
        """
        if not len(contexts_RF):
            raise DataError("prices can not be found on no requests; give those of the day before")
        self._check(contexts_RF, len(contexts_RF))
        with self._turning:
            self.forecaster.observe(rate * self.config.window_seconds, self.config.window_seconds)
            self._rows_RF = contexts_RF[-self.config.num_rows :]
            return self._aim()

    def note(self, contexts_RF: NDArray[np.float32], chain_R: Int, spent_C: Float) -> None:
        """Requests that were answered.

        Args:
            contexts_RF: their features.
            chain_R: the chains they got.
            spent_C: what they cost together, as measured.

        Raises DataError, with nothing changed, where sizes differ or a cost is no number of 0 or above.
        """
        self._check(contexts_RF, len(chain_R))
        if spent_C.shape != (len(RESOURCES),) or not (np.isfinite(spent_C).all() and (spent_C >= 0).all()):
            raise DataError(
                f"costs must be {len(RESOURCES)} numbers of 0 or above ({', '.join(RESOURCES)}), got {spent_C}"
            )
        with self._lock:
            running = self._running
            running.rows.append(contexts_RF)
            if len(running.rows) > self.config.num_rows:  # no more parts than rows are looked at
                running.rows = [np.concatenate(running.rows)[-self.config.num_rows :]]
            running.count += len(chain_R)
            running.said_C = running.said_C + self.allocator.chains.costs_JC[chain_R].sum(0)
            running.spent_C = running.spent_C + spent_C

    def most_C(self, now: float) -> Float | None:
        """For `Allocator.choose`: 0 for a resource whose allowance this window has used up, infinite for others; None where all have some.

        What the cheapest chain would cost for the requests still to come is kept back.
        """
        window = self.config.window_seconds
        with self._lock:
            passed = min(max(now - self._opened, 0.0), window)
            foretold = 0.0 if np.isnan(self._expected) else self._expected / window
            rate = (self._running.count + PRIOR * window * foretold) / (passed + PRIOR * window)
            kept_C = rate * (window - passed) * self.allocator.chains.costs_JC[0] * self.bias_C
            most_C = self._whole_C * (1 - self.debt_C + self.config.margin)
            out_C = self._limited_C & (self._running.spent_C + kept_C >= most_C)
            self._running.stopped |= bool(out_C.any())
        return np.where(out_C, 0.0, np.inf) if out_C.any() else None

    def tick(self, now: float) -> Window | None:
        """Close the window where its time is over; None where it is not."""
        with self._turning:
            return None if now - self._opened < self.config.window_seconds else self.close(now)

    def close(self, now: float) -> Window:
        """End the window: learn from it, and set the prices of the next, which opens now.

        Raises DataError, with nothing changed, where no time has passed since it opened.
        """
        with self._turning:
            seconds, expected = now - self._opened, self._expected
            if not 0 < seconds < np.inf:
                raise DataError(f"a window that opened at {self._opened} can not end at {now}; give a later time")
            with self._lock:  # all that requests wait for
                ended = self._running
                self._owe(ended.spent_C, seconds)
                self._opened, self._running = now, _Running()
            self.forecaster.observe(ended.count, seconds)
            self._learn(ended)
            budget = self._aim()
            return Window(
                count=ended.count,
                seconds=seconds,
                expected=expected,
                spent_C=ended.spent_C,
                budget_C=self.capacity.limits_C * seconds,
                stopped=ended.stopped,
                debt_C=self.debt_C,
                bias_C=self.bias_C,
                next_budget=budget,
                prices_C=self.allocator.prices_C,
            )

    def state(self) -> Mapping[str, Float]:
        """Arrays that `load_state` restores, the forecaster's among them; the window that runs is left out, and so is the allocator."""
        with self._turning:
            own = {"debt": self.debt_C, "over": self._over_HC, "costs": self._costs_2C}
            own["rows"] = self._rows_RF.astype(np.float64)
            return own | {f"forecaster.{name}": array for name, array in self.forecaster.state().items()}

    def load_state(self, state: Mapping[str, Float]) -> None:
        """Go on where `state` was taken, with prices found anew. DataError, with nothing changed, where it does not fit."""
        shapes: dict[str, tuple[int, ...]] = {
            "debt": self.debt_C.shape,
            "over": self._over_HC.shape,
            "costs": self._costs_2C.shape,
        }
        for name, shape in shapes.items():
            if name not in state or state[name].shape != shape or not np.isfinite(state[name]).all():
                raise DataError(
                    f"the state of the prices has no {name!r} of shape {shape} in numbers; start without it"
                )
        if "rows" not in state or state["rows"].ndim != 2:
            raise DataError("the state of the prices has no table 'rows'; start without it")
        if not (state["costs"] > 0).all():
            raise DataError("the state of the prices has costs that are not above 0; start without it")
        self._check(state["rows"], len(state["rows"]))
        head = "forecaster."
        with self._turning:
            self.forecaster.load_state({n.removeprefix(head): a for n, a in state.items() if n.startswith(head)})
            self.debt_C, self._over_HC, self._costs_2C = (np.array(state[name], dtype=np.float64) for name in shapes)
            self._rows_RF = state["rows"].astype(np.float32)[-self.config.num_rows :]
            self._aim()

    def _check(self, contexts_RF: NDArray[np.generic], count: int) -> None:
        if contexts_RF.shape != (count, self.allocator.num_features):
            raise DataError(
                f"{count} requests need contexts of {self.allocator.num_features} features each, got {contexts_RF.shape}"
            )

    def _learn(self, ended: _Running) -> None:
        """What chains cost, and who asks."""
        known_C = self._limited_C & (ended.said_C > 0) & (ended.spent_C > 0)
        mixed_2C = (1 - self.config.rho) * self._costs_2C + self.config.rho * np.stack([ended.spent_C, ended.said_C])
        self._costs_2C = np.where(known_C, mixed_2C, self._costs_2C)
        self._rows_RF = np.concatenate([self._rows_RF, *ended.rows])[-self.config.num_rows :]

    def _owe(self, spent_C: Float, seconds: float) -> None:
        """The debt after a window; see the head of this file."""
        over_C = np.where(self._limited_C, spent_C / self._whole_C - seconds / self.config.window_seconds, 0.0)
        self._over_HC = np.concatenate([over_C[None], self._over_HC])[: len(self._over_HC)]
        most_C = np.maximum(np.cumsum(self._over_HC, axis=0).max(0), 0.0)
        self.debt_C = np.minimum(np.maximum(self.debt_C + over_C, -self.config.credit), most_C)

    def _aim(self) -> Budget:
        """New prices for the window that opens; without a forecast or rows the old ones stay."""
        window = self.config.window_seconds
        self._expected = self.forecaster.predict(window / 2) * window
        if np.isnan(self._expected) or not len(self._rows_RF):
            return self.allocator.budget
        allowed_C = self._whole_C * np.maximum(1 - self.debt_C, 0.0) / max(self._expected, 1.0) / self.bias_C
        least_C = LEAST * np.maximum(self.allocator.chains.costs_JC[0], LEAST)
        limits_C = np.where(self._limited_C, np.maximum(allowed_C, least_C), np.nan)
        budget = Budget(**{n: None if np.isnan(v) else float(v) for n, v in zip(RESOURCES, limits_C)})
        self.allocator.aim(budget, self._rows_RF)
        return budget
