"""The two windows of delayed feedback. R clicks; all times in whole seconds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shortlist.data.histories import Int
from shortlist.errors import ConfigError

NEVER = int(np.iinfo(np.int64).max)
"""`converted_at` of a click without a conversion."""
HOUR_S = 3_600.0
Bools = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """How long a click waits, and how long a conversion counts for it."""

    observation_s: int
    """A click is first learned from when it is this old; a conversion counts as immediate up to this delay."""
    attribution_s: int
    """Conversions with a delay below this count."""

    def __post_init__(self) -> None:
        if not 0 <= self.observation_s < self.attribution_s:
            raise ConfigError(
                "the observation window must not be negative and must be shorter than the attribution window, got "
                f"{self.observation_s / HOUR_S:g} and {self.attribution_s / HOUR_S:g} hours"
            )

    @classmethod
    def of_hours(cls, observation: float, attribution: float) -> Windows:
        """From hours."""
        return cls(observation_s=round(observation * HOUR_S), attribution_s=round(attribution * HOUR_S))

    def split(self, clicked_at: Int, converted_at: Int, now: int = NEVER) -> tuple[Bools, Bools]:
        """[R] converted within the observation window, and [R] later but within the attribution window; both as known at `now`."""
        known = (converted_at != NEVER) & (converted_at <= now)
        delay = np.where(known, converted_at, clicked_at) - clicked_at
        counts = known & (delay < self.attribution_s)
        quick = counts & (delay <= self.observation_s)
        return quick, counts & ~quick
