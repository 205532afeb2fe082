"""How much traffic is to come: forecasters see one number per window, and say a rate ahead of time.

    forecaster.observe(count=540, seconds=60)      what the last window was
    forecaster.predict(ahead=30)                   requests per second in the middle of the next window of 60

Windows follow each other without a gap: one without requests is observed with count 0. S slots of a day.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from shortlist.cascade.allocation.base import Float, NoSettings
from shortlist.errors import ConfigError, DataError
from shortlist.registry import system
from shortlist.training.choice import chosen

DAY = 86_400.0
LEAST_SHAPE = 0.02
"""A slot of the day is taken to have at least this share of the mean rate: rates are divided by it."""


class Forecaster(ABC):
    """Foretells the rate of requests from the windows before. `Config` is its settings dataclass."""

    kind: ClassVar[str] = "forecaster"
    Config: ClassVar[type[Any]] = NoSettings

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def observe(self, count: float, seconds: float) -> None:
        """Take note of the window that has just ended.

        Args:
            count: its requests.
            seconds: its length.

        Raises DataError, with nothing changed, where the count is negative or the window has no length.
        """

    @abstractmethod
    def predict(self, ahead: float) -> float:
        """Requests per second, `ahead` seconds after the end of the last window, 0 or above; NaN before the first window."""

    @abstractmethod
    def state(self) -> Mapping[str, Float]:
        """Arrays that `load_state` restores."""

    @abstractmethod
    def load_state(self, state: Mapping[str, Float]) -> None:
        """Go on where `state` was taken; DataError names what is missing or does not fit, and changes nothing."""


def make_forecaster(name: str, settings: Mapping[str, Any] | None = None) -> Forecaster:
    """The forecaster of that name; ConfigError where there is none, or it does not have or refuses one of the settings."""
    return chosen(name, settings or {}, Forecaster, "forecaster")  # type: ignore[type-abstract]


@system("last", stage="allocation", paper="baseline")
class Last(Forecaster):
    """Persistence: the next window is as the last one was."""

    def __init__(self, config: NoSettings) -> None:
        super().__init__(config)
        self._rate = np.nan

    def observe(self, count: float, seconds: float) -> None:
        """See Forecaster."""
        self._rate = _rate(count, seconds)

    def predict(self, ahead: float) -> float:
        """See Forecaster."""
        return self._rate

    def state(self) -> Mapping[str, Float]:
        """See Forecaster."""
        return {"rate": np.array([self._rate])}

    def load_state(self, state: Mapping[str, Float]) -> None:
        """See Forecaster."""
        self._rate = float(_fitting(state, {"rate": (1,)})["rate"][0])


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearConfig:
    """Settings of the linear forecaster."""

    memory_seconds: float = 180.0
    """A window counts 1/e of a new one after so long. Three windows or so: less follows noise, more lags behind a turn."""
    limit: float = 1.25
    """No rate is foretold above so many times the last window's, nor below it divided by this, chance aside: after a jump a line would
    overshoot for as long as its memory holds the jump."""
    slots: int = 0
    """Parts into which the day is cut to learn its shape, such as 48; 0 = no daily profile."""
    profile_share: float = 0.3
    """How much of a new day goes into the shape; the first day is taken as it was."""

    def __post_init__(self) -> None:
        if not 0 < self.memory_seconds < np.inf:
            raise ConfigError(f"memory_seconds must be above 0, got {self.memory_seconds}")
        if not self.limit >= 1:
            raise ConfigError(f"limit must be at least 1, got {self.limit}")
        if self.slots < 0 or self.slots == 1:
            raise ConfigError(f"slots must be 0 for no daily profile, or at least 2, got {self.slots}")
        if not 0 < self.profile_share <= 1:
            raise ConfigError(f"profile_share must be above 0 and at most 1, got {self.profile_share}")


@system("linear", stage="allocation", paper="Brown, 1959")
class Linear(Forecaster):
    """A straight line through the newest windows, which count less with age, times the shape of a day where one is learnt.

    Least squares of rate on time with weights seconds * exp(-age / memory), of which five sums are kept (the discounted least squares of
    "Statistical Forecasting for Inventory Control", Brown, 1959). With a profile, rates are divided by the shape of the day before they
    are fitted and multiplied by it when they are foretold, as in Winters's multiplicative method.
    """

    Config = LinearConfig

    def __init__(self, config: LinearConfig) -> None:
        super().__init__(config)
        self._clock = 0.0
        self._sums = np.zeros(5)
        """Over windows, of weight w, w t, w t t, w y and w t y; t is the middle of a window against now, so below 0, y its rate."""
        self._profile_S = np.ones(config.slots)
        self._today_2S = np.zeros((2, config.slots))
        """Requests and seconds of the day that runs."""
        self._days = 0
        self._last = np.zeros(2)
        """Rate of the last window against the day's shape, and by how much chance may well have moved it: two deviations of its count."""

    def observe(self, count: float, seconds: float) -> None:
        """See Forecaster."""
        rate = _rate(count, seconds)
        middle = self._clock + seconds / 2
        self._shift(seconds)
        shape, t = self._shape(middle), -seconds / 2
        y = rate / shape
        weight = seconds * np.exp(t / self.config.memory_seconds)
        self._sums += weight * np.array([1.0, t, t * t, y, t * y])
        self._last = np.array([y, 2 * np.sqrt(max(count, 1.0)) / seconds / shape])
        self._clock += seconds
        if self.config.slots:
            slot = int(middle % DAY / DAY * self.config.slots)
            self._today_2S[:, slot] += count, seconds
            if int(self._clock // DAY) > self._days:
                self._end_day()

    def predict(self, ahead: float) -> float:
        """See Forecaster."""
        w, wt, wtt, wy, wty = self._sums
        if not w:
            return np.nan
        mean, spread = wy / w, wtt - wt * wt / w
        slope = (wty - wt * mean) / spread if spread > 1e-9 * wtt else 0.0  # one window has no slope
        level = mean + slope * (ahead - wt / w)
        last, chance = self._last
        low, high = max(last / self.config.limit - chance, 0.0), last * self.config.limit + chance
        return float(np.clip(level, low, high) * self._shape(self._clock + ahead))

    def state(self) -> Mapping[str, Float]:
        """See Forecaster."""
        return {
            "clock": np.array([self._clock, float(self._days)]),
            "sums": self._sums.copy(),
            "last": self._last.copy(),
            "profile": self._profile_S.copy(),
            "today": self._today_2S.copy(),
        }

    def load_state(self, state: Mapping[str, Float]) -> None:
        """See Forecaster."""
        slots = self.config.slots
        found = _fitting(state, {"clock": (2,), "sums": (5,), "last": (2,), "profile": (slots,), "today": (2, slots)})
        self._clock, self._days = float(found["clock"][0]), int(found["clock"][1])
        self._sums, self._last = found["sums"], found["last"]
        self._profile_S, self._today_2S = found["profile"], found["today"]

    def _shift(self, seconds: float) -> None:
        """Now becomes so much later: times move away and weights fade."""
        w, wt, wtt, wy, wty = self._sums
        moved = np.array([w, wt - seconds * w, wtt - 2 * seconds * wt + seconds**2 * w, wy, wty - seconds * wy])
        self._sums = moved * np.exp(-seconds / self.config.memory_seconds)

    def _shape(self, at: float) -> float:
        """Rate of that time of day against the day's mean, between the middles of slots on a straight line."""
        if not self.config.slots:
            return 1.0
        middles_S = (np.arange(self.config.slots) + 0.5) * DAY / self.config.slots
        return float(np.interp(at, middles_S, self._profile_S, period=DAY))

    def _end_day(self) -> None:
        """The day's shape goes into the profile; the line is moved so that the forecast for now stays what it was."""
        count_S, seconds_S = self._today_2S
        mean = count_S.sum() / seconds_S.sum()
        before = self._shape(self._clock)
        if mean > 0:
            seen_S = seconds_S > 0
            shape_S = np.where(seen_S, count_S / np.where(seen_S, seconds_S, 1.0) / mean, self._profile_S)
            share = self.config.profile_share if self._days else 1.0
            mixed_S = np.maximum((1 - share) * self._profile_S + share * shape_S, LEAST_SHAPE)
            self._profile_S = mixed_S / mixed_S.mean()
            self._sums[3:] *= before / self._shape(self._clock)
            self._last = self._last * before / self._shape(self._clock)
        self._today_2S = np.zeros_like(self._today_2S)
        self._days = int(self._clock // DAY)


def _rate(count: float, seconds: float) -> float:
    if not (0 <= count < np.inf and 0 < seconds < np.inf):
        raise DataError(
            f"a window has a count of 0 or above and a length above 0, got {count} requests in {seconds} seconds"
        )
    return float(count) / float(seconds)


def _fitting(state: Mapping[str, Float], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Float]:
    """Copies of the arrays of these names and shapes."""
    for name, shape in shapes.items():
        found = state[name].shape if name in state else None
        if found != shape:
            raise DataError(
                f"the forecaster's state has {'no ' + name if found is None else f'{name} of shape {found}'}, it needs {shape}; "
                "start without it, or with the settings it was saved with"
            )
    return {name: np.array(state[name], dtype=np.float64) for name in shapes}
