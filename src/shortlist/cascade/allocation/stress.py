"""MaxPower: what no request may exceed while a server is under stress, driven by its own latency and failures.

    power = MaxPower(chains, MaxPowerConfig(target_ms=100.0), now=clock())
    choice = allocator.choose(contexts_RF, most_C=tightest(control.most_C(now), power.cap_C))
    power.note(latency_ms, failed)          every answer, from any thread
    power.tick(clock())                     once a period

Prices (`prices.py`) react in minutes, and in an overload what they rest on is wrong. This loop reacts in seconds and needs no model:

    e = (rt - target) / target + theta * max(0, failed - target_failed)
    u = k_p e + k_i sum(e) + k_d (e - e before)
    u > 0    level falls by shrink * u, `most_fall` at most
    u < 0    level rises, from end to end in `recover_seconds` at the fastest

"DCAF: A Dynamic Computation Allocation Framework for Online Serving System", Jiang et al., DLP-KDD 2020, "MaxPower", which leaves the set
point and the update open. Ours: errors against targets, for a latency that is never 0 would wind the sum up until the cap sticks at the
floor; the sum is bounded, and let go where the cap stands at an end; shrinking is fast, recovery slow; the cap is cheapest cost *
(dearest / cheapest) ^ level with level from 0 to 1, so that a step means as much to dear chains as to cheap ones.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

import numpy as np

from shortlist.cascade.allocation.base import RESOURCES, ChainSet, Float
from shortlist.errors import ConfigError, DataError

MS = RESOURCES.index("ms")
MOST_NOTED = 10_000
"""Newest latencies of a period that are looked at."""
FULL = -0.1
"""At this u and below, recovery is as fast as it gets: any clear calm recovers alike, however calm it is."""
NARROW = 1e-3
"""The cap's range goes down to this share of the dearest chain's cost at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MaxPowerConfig:
    """Settings of the stress cap."""

    target_ms: float = 100.0
    """Latency that the server is meant to keep; twice what it has in calm, or more, and well below a request's time limit."""
    target_failed: float = 0.01
    """Share of requests that may fail."""
    quantile: float = 0.9
    """Which latency of a period is meant: 0.5 = the median."""
    theta: float = 5.0
    """Weight of failures against latency."""
    kp: float = 0.5
    """Weight of the error."""
    ki: float = 0.05
    """Weight of the sum of errors."""
    kd: float = 0.1
    """Weight of the error's change."""
    period_seconds: float = 1.0
    """Time between two updates."""
    shrink: float = 1.0
    """How far the level, from 0 to 1, falls per unit of u."""
    most_fall: float = 0.5
    """How far it falls in one period at most: two periods empty it, and a passing queue does not."""
    recover_seconds: float = 40.0
    """How long the level takes from 0 to 1 in calm."""
    most_sum: float = 4.0
    """The sum of errors stays within plus and minus this."""

    def __post_init__(self) -> None:
        for name in ("target_ms", "period_seconds", "shrink", "most_fall", "recover_seconds"):
            if not 0 < getattr(self, name) < np.inf:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("target_failed", "theta", "kp", "ki", "kd", "most_sum"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ConfigError(f"{name} must be 0 or above, got {getattr(self, name)}")
        if not 0 <= self.quantile <= 1:
            raise ConfigError(f"quantile must be from 0 to 1, got {self.quantile}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What one update saw and did."""

    count: int
    """Answers noted in the period."""
    latency_ms: float
    """Their quantile; 0 where there was none."""
    failed: float
    """Share of them."""
    error: float
    """e."""
    drive: float
    """u."""
    cap_ms: float
    """From now on."""


class MaxPower:
    """A cap on what a request may cost in milliseconds; may be shared between threads.

    Args:
        chains: the cap moves between their cheapest and their dearest one.
        config: settings.
        now: the time, on the clock of `tick`; seconds from any start.
    """

    def __init__(self, chains: ChainSet, config: MaxPowerConfig | None = None, *, now: float = 0.0) -> None:
        self.config = config or MaxPowerConfig()
        costs_J = chains.costs_JC[:, MS]
        self.most_ms = float(costs_J.max())
        self.least_ms = max(float(costs_J.min()), NARROW * self.most_ms)
        self.level = 1.0
        """Where the cap stands between the cheapest chain (0) and the dearest (1), on a scale of ratios."""
        self._sum, self._before, self._updated = 0.0, 0.0, now
        self._latencies: deque[float] = deque(maxlen=MOST_NOTED)
        self._count, self._failed = 0, 0
        self._lock = threading.Lock()

    @property
    def cap_ms(self) -> float:
        """Milliseconds that a request may cost."""
        if self.level >= 1:
            return self.most_ms
        return self.least_ms * (self.most_ms / max(self.least_ms, 1e-300)) ** self.level

    @property
    def cap_C(self) -> Float | None:
        """For `Allocator.choose`: the cap in milliseconds, no limit on other resources; None where every chain may be chosen."""
        if self.level >= 1:
            return None
        cap_C = np.full(len(RESOURCES), np.inf)
        cap_C[MS] = self.cap_ms
        return cap_C

    def note(self, latency_ms: float, failed: bool) -> None:
        """One answer, or what came in place of one.

        Args:
            latency_ms: from the arrival of the request, waiting included; of one that ran out of time, its time limit.
            failed: no page in time, an error, or turned away.
        """
        if not 0 <= latency_ms < np.inf:
            raise DataError(f"a latency must be 0 or above, got {latency_ms} ms")
        with self._lock:
            self._latencies.append(latency_ms)
            self._count += 1
            self._failed += failed

    def tick(self, now: float) -> Reading | None:
        """Update the cap where a period has passed; None where it has not. A period without answers counts as calm."""
        with self._lock:
            periods = (now - self._updated) / self.config.period_seconds
            if periods < 1 - 1e-9:
                return None
            latency = float(np.quantile(self._latencies, self.config.quantile)) if self._latencies else 0.0
            count, failed = self._count, self._failed / max(self._count, 1)
            self._latencies.clear()
            self._count, self._failed, self._updated = 0, 0, now
            error = (
                latency / self.config.target_ms - 1 + self.config.theta * max(0.0, failed - self.config.target_failed)
            )
            drive = self._move(error, periods)
        return Reading(count=count, latency_ms=latency, failed=failed, error=error, drive=drive, cap_ms=self.cap_ms)

    def _move(self, error: float, periods: float) -> float:
        """One step of the loop; returns u."""
        c = self.config
        pushes_on = (self.level >= 1 and error < 0) or (self.level <= 0 and error > 0)
        # At an end nothing more can be done: what the sum holds would only delay the way back.
        self._sum = self._sum / 2 if pushes_on else float(np.clip(self._sum + error, -c.most_sum, c.most_sum))
        drive = c.kp * error + c.ki * self._sum + c.kd * (error - self._before)
        self._before = error
        if drive > 0:
            self.level = max(self.level - min(c.shrink * drive, c.most_fall), 0.0)
        else:
            rise = periods * c.period_seconds / c.recover_seconds
            self.level = min(self.level + rise * min(drive / FULL, 1.0), 1.0)
        return drive


def tightest(*caps: Float | None) -> Float | None:
    """The smallest of several caps [C] by resource; None where none caps anything."""
    given = [cap_C for cap_C in caps if cap_C is not None]
    return np.minimum.reduce(given) if given else None
