"""Who asks when: open-loop Poisson arrivals (nobody waits for an answer before asking again) of a given rate, from a mix of users.

    rate     = Sum(parts=(Diurnal(per_second=20), Spikes(per_second=100, at=(3_600,), decay_s=60)))
    audience = Audience.by_activity(world.events_U, 2, at=(0, 1_800), shares=((0.7, 0.3), (0.2, 0.8)))
    arrivals = arrive(rate, audience, start=0, end=7_200, seed=1)

Rates know their integral and a bound. The number of arrivals of a window is Poisson with the integral as mean; given it, their times are
independent with density rate / integral (Lewis and Shedler, "Simulation of Nonhomogeneous Poisson Processes by Thinning", Naval Research
Logistics 1979), so a wanted number of arrivals can be drawn just as exactly. All times are seconds on one clock; rates are per second.

N arrivals, T knots, S segments, U users.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shortlist.data.histories import Int
from shortlist.errors import ConfigError

Float = NDArray[np.float64]
DAY_S = 86_400.0


class Rate(Protocol):
    """Arrivals per second over time."""

    def rates(self, times: Float) -> Float:
        """[N] arrivals per second at each time."""

    def total(self, start: float, end: float) -> float:
        """Expected arrivals from `start` to `end`: the integral."""

    def most(self, start: float, end: float) -> float:
        """A bound on the rate between `start` and `end`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Constant:
    """The same at all times."""

    per_second: float

    def __post_init__(self) -> None:
        _check_rate(self.per_second)

    def rates(self, times: Float) -> Float:
        """See `Rate`."""
        return np.full(len(times), float(self.per_second))

    def total(self, start: float, end: float) -> float:
        """See `Rate`."""
        return self.per_second * (end - start)

    def most(self, start: float, end: float) -> float:
        """See `Rate`."""
        return self.per_second


@dataclass(frozen=True, kw_only=True, slots=True)
class Diurnal:
    """per_second * (1 + swing cos(2 pi (t - peak_at) / period)): most at one hour of the day, least half a day later."""

    per_second: float
    """The mean over a period."""
    swing: float = 0.6
    """How far it rises above the mean and falls below it, as a share; 0 to 1."""
    peak_at_s: float = 20 * 3_600.0
    """When it is highest: seconds after midnight UTC, or after any whole number of periods."""
    period_s: float = DAY_S

    def __post_init__(self) -> None:
        _check_rate(self.per_second)
        if not 0 <= self.swing <= 1 or self.period_s <= 0:
            raise ConfigError(
                f"swing is a share from 0 to 1 and period_s above 0, got {self.swing} and {self.period_s}"
            )

    def rates(self, times: Float) -> Float:
        """See `Rate`."""
        return self.per_second * (1 + self.swing * np.cos(self._angle(times)))

    def total(self, start: float, end: float) -> float:
        """See `Rate`."""
        waves = np.sin(self._angle(np.array([start, end]))) * self.swing * self.period_s / (2 * np.pi)
        return float(self.per_second * (end - start + waves[1] - waves[0]))

    def most(self, start: float, end: float) -> float:
        """See `Rate`."""
        return self.per_second * (1 + self.swing)

    def _angle(self, times: Float) -> Float:
        return 2 * np.pi * (times - self.peak_at_s) / self.period_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """A rate that jumps: factors=(1, 8, 1) at (0, 60, 120) is 1x, 8x for a minute, 1x again."""

    per_second: float
    """What a factor of 1 means."""
    at: tuple[float, ...]
    """When each factor begins, rising; the first one also holds before."""
    factors: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_rate(self.per_second, *self.factors)
        if not self.at or len(self.at) != len(self.factors) or list(self.at) != sorted(set(self.at)):
            raise ConfigError(
                f"steps want rising times and a factor for each, got at={self.at}, factors={self.factors}"
            )

    def rates(self, times: Float) -> Float:
        """See `Rate`."""
        return self.per_second * np.array(self.factors, dtype=np.float64)[self._step(times)]

    def total(self, start: float, end: float) -> float:
        """See `Rate`."""
        begins = np.clip(np.array([-np.inf, *self.at[1:]]), start, end)
        return float(self.per_second * (np.append(begins[1:], end) - begins) @ np.array(self.factors))

    def most(self, start: float, end: float) -> float:
        """See `Rate`."""
        first, last = self._step(np.array([start, end]))
        return self.per_second * max(self.factors[first : last + 1])

    def _step(self, times: Float) -> Int:
        """[N] which step holds at each time."""
        return np.maximum(np.searchsorted(np.array(self.at), times, side="right") - 1, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Spikes:
    """Sudden crowds: at each moment the rate jumps by `per_second` and falls off exponentially."""

    per_second: float
    """Height of a spike."""
    at: tuple[float, ...]
    """When they begin."""
    decay_s: float = 60.0
    """After so many seconds a spike is down to 37 %."""

    def __post_init__(self) -> None:
        _check_rate(self.per_second)
        if self.decay_s <= 0:
            raise ConfigError(f"decay_s must be above 0, got {self.decay_s}")

    def rates(self, times: Float) -> Float:
        """See `Rate`."""
        since = times[:, None] - np.array(self.at)
        heights: Float = np.where(since >= 0, np.exp(-np.maximum(since, 0) / self.decay_s), 0.0).sum(1)
        return self.per_second * heights

    def total(self, start: float, end: float) -> float:
        """See `Rate`."""
        left, right = (np.exp(-np.maximum(t - np.array(self.at), 0) / self.decay_s) for t in (start, end))
        return float(self.per_second * self.decay_s * (left - right).sum())

    def most(self, start: float, end: float) -> float:
        """See `Rate`: at the beginning of the window or of one of its spikes, between which the rate only falls."""
        inside = [t for t in self.at if start <= t <= end]
        return float(self.rates(np.array([start, *inside])).max())


@dataclass(frozen=True, kw_only=True, slots=True)
class Sum:
    """Several streams at once."""

    parts: tuple[Rate, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ConfigError("a sum of rates wants at least one part")

    def rates(self, times: Float) -> Float:
        """See `Rate`."""
        total: Float = np.sum([part.rates(times) for part in self.parts], axis=0)
        return total

    def total(self, start: float, end: float) -> float:
        """See `Rate`."""
        return sum(part.total(start, end) for part in self.parts)

    def most(self, start: float, end: float) -> float:
        """See `Rate`."""
        return sum(part.most(start, end) for part in self.parts)


@dataclass(frozen=True, kw_only=True, eq=False)
class Audience:
    """Which users ask: a segment by the mix of the moment, then a user of it by weight."""

    segment_U: Int
    """[U + 1] segment of each user row, 0 to S - 1; row 0, the unknown user, has one too."""
    weight_U: Float
    """[U + 1] how often a user asks beside the others of the segment; 0 = never."""
    at: tuple[float, ...] = (0.0,)
    """[T] rising times of the knots of the mix."""
    shares: tuple[tuple[float, ...], ...] = ((1.0,),)
    """[T, S] share of each segment at each knot; in between it moves in a straight line, before and after it stays."""

    def __post_init__(self) -> None:
        shares = np.array(self.shares, dtype=np.float64)
        if shares.ndim != 2 or len(shares) != len(self.at) or list(self.at) != sorted(self.at):
            raise ConfigError(f"a mix wants rising times and a row of shares for each, got at={self.at}")
        if (shares < 0).any() or not np.allclose(shares.sum(1), 1.0):
            raise ConfigError(
                f"shares of segments must not be below 0 and add up to 1 at every time, got {self.shares}"
            )
        if len(self.segment_U) != len(self.weight_U) or (self.weight_U < 0).any():
            raise ConfigError("segments and weights want one entry per user row, weights of 0 or above")
        if not ((self.segment_U >= 0) & (self.segment_U < shares.shape[1])).all():
            raise ConfigError(f"segments run from 0 to {shares.shape[1] - 1} here, as many as there are shares")
        weights = np.bincount(self.segment_U, self.weight_U, minlength=shares.shape[1])
        for segment in np.flatnonzero((weights == 0) & shares.any(0)):
            raise ConfigError(f"segment {segment} has a share but nobody in it who asks")

    @classmethod
    def by_activity(
        cls,
        events_U: Int,
        num_segments: int = 1,
        *,
        at: tuple[float, ...] = (0.0,),
        shares: tuple[tuple[float, ...], ...] | None = None,
    ) -> Audience:
        """Users who ask as often as they occur in a log, in segments of equal numbers of users from the least to the most active.

        Args:
            events_U: [U + 1] events of each user, such as `world.events_U`; those without any never ask.
            shares: None = every segment has the share of its events, at all times.
        """
        active = np.flatnonzero(events_U)
        segment_U = np.zeros(len(events_U), dtype=np.int64)
        order = active[np.argsort(events_U[active], kind="stable")]
        segment_U[order] = np.arange(len(order)) * num_segments // max(len(order), 1)
        if shares is None:
            events = np.bincount(segment_U, events_U, minlength=num_segments)
            shares = tuple([tuple((events / events.sum()).tolist())] * len(at))
        return cls(segment_U=segment_U, weight_U=events_U.astype(np.float64), at=at, shares=shares)

    def mix(self, times: Float) -> Float:
        """[N, S] share of each segment at each time."""
        return np.column_stack(
            [np.interp(times, self.at, share) for share in np.array(self.shares, dtype=np.float64).T]
        )

    def draw(self, times: Float, rng: np.random.Generator) -> Int:
        """[N] user row of whoever asks at each time."""
        reached_NS = np.cumsum(self.mix(times), axis=1)
        segment = (rng.random((len(times), 1)) * reached_NS[:, -1:] >= reached_NS).sum(1)
        asking = np.flatnonzero(self.weight_U)
        order = asking[np.argsort(self.segment_U[asking], kind="stable")]
        reached = np.cumsum(self.weight_U[order])
        ends = np.searchsorted(self.segment_U[order], np.arange(len(self.shares[0])), side="right")
        after = reached[ends - 1] * (ends > 0)
        before = np.concatenate([[0.0], after[:-1]])
        drawn = before[segment] + rng.random(len(times)) * (after - before)[segment]
        users: Int = order[np.minimum(np.searchsorted(reached, drawn, side="right"), ends[segment] - 1)]
        return users


@dataclass(frozen=True, kw_only=True, eq=False)
class Arrivals:
    """Requests in order of time."""

    time: Float
    """[N] seconds, rising."""
    user: Int
    """[N] user rows."""
    start: float
    end: float

    def __len__(self) -> int:
        return len(self.time)


def arrive(
    rate: Rate, audience: Audience, *, start: float, end: float, seed: int, count: int | None = None
) -> Arrivals:
    """Requests from `start` to `end`.

    Args:
        count: so many of them, at times spread by the rate; None = as many as the rate brings.

    Raises ConfigError for an empty window, or one in which the rate is 0 while a number of requests is wanted.
    """
    if not end > start:
        raise ConfigError(f"arrivals want a window that ends after it starts, got {start} to {end}")
    rng = np.random.default_rng(seed)
    total = rate.total(start, end)
    num_arrivals = int(rng.poisson(total)) if count is None else count
    if num_arrivals and not total > 0:
        raise ConfigError(f"{num_arrivals} requests are wanted from {start} to {end}, where the rate is 0")
    time = np.sort(_draw_times(rate, start, end, num_arrivals, rng))
    return Arrivals(time=time, user=audience.draw(time, rng), start=start, end=end)


def _draw_times(rate: Rate, start: float, end: float, count: int, rng: np.random.Generator) -> Float:
    """[count] independent times with density rate / integral, by thinning uniform ones."""
    most = rate.most(start, end)
    kept = [np.zeros(0)]
    missing = count
    while missing > 0:
        # As many as are likely to be enough: the integral's share of the box under the bound is kept.
        tries = int(missing * most * (end - start) / rate.total(start, end) * 1.1) + 16
        times = rng.uniform(start, end, tries)
        times = times[rng.random(tries) * most < rate.rates(times)][:missing]
        kept.append(times)
        missing -= len(times)
    return np.concatenate(kept)


def _check_rate(*values: float) -> None:
    for value in values:
        if not 0 <= value < np.inf:
            raise ConfigError(f"rates and factors are numbers of 0 or above, got {value}")
