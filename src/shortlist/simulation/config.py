"""Settings of a world. "sd" is one standard deviation over the pairs of users and items that the log makes likely."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from shortlist.errors import ConfigError

_POSITIVE = (
    "position_decay", "fast_mean_s", "slow_median_s", "slow_spread", "value_median", "value_spread", "bid_median", "bid_spread",
    "popularity_period_days",
)  # fmt: skip
_CHANCES = ("attraction", "conversion")


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldConfig:
    """What the world is like. Taste and popularity come from the log; the rest is set here."""

    dim: int = 16
    """Directions of taste, at most as many as the log has users or items."""
    attraction: float = 0.1
    """Mean chance that an item is clicked once it is looked at, for users and items drawn as often as they occur in the log."""
    taste: float = 1.5
    """Logits of attraction per sd of affinity between user and item."""
    popularity: float = 0.5
    """Logits of attraction per sd of the item's log frequency."""
    position_decay: float = 1.0
    """Place p of a page, from 1, is looked at with chance p ** -position_decay."""
    conversion: float = 0.1
    """Mean chance that a click becomes a purchase, over the clicks that `attraction` speaks of."""
    conversion_taste: float = 0.5
    """Logits of conversion per sd of affinity."""
    conversion_value: float = -0.3
    """Logits of conversion per sd of the item's log value: below 0, dear items are bought more rarely."""
    fast_share: float = 0.6
    """Share of purchases that come fast, after an exponential delay; the others take a lognormal one."""
    fast_mean_s: float = 600.0
    """Mean delay of a fast purchase of an average item, in seconds."""
    slow_median_s: float = 86_400.0
    """Median delay of a slow purchase of an average item, in seconds."""
    slow_spread: float = 1.0
    """Standard deviation of the logarithm of a slow delay."""
    delay_taste: float = -0.3
    """What one sd of affinity adds to the logarithm of the delay: below 0, the keen buy sooner."""
    delay_value: float = 0.5
    """What one sd of the item's log value adds to the logarithm of the delay: above 0, dear items take longer."""
    values: Literal["lognormal", "pareto", "observed"] = "lognormal"
    """What purchases of an item are worth: drawn with a heavy tail, or the mean value of the item's events in the log."""
    value_median: float = 20.0
    """Median value of drawn items, in money of the log."""
    value_spread: float = 1.0
    """Standard deviation of the logarithm of a lognormal value."""
    value_tail: float = 1.5
    """Exponent of the tail of Pareto values; the mean is finite above 1, the variance above 2."""
    bids: Literal["lognormal", "pareto", "prices"] = "lognormal"
    """What advertisers offer for a click on an item: drawn with a heavy tail, or from the histogram `bid_prices`."""
    bid_median: float = 1.0
    """Median bid per click, in money of the log."""
    bid_spread: float = 0.7
    """Standard deviation of the logarithm of a lognormal bid."""
    bid_tail: float = 2.0
    """Exponent of the tail of Pareto bids."""
    bid_prices: str = ""
    """File with counts of market prices (see `PriceHistogram.load`) that gives bids their shape, scaled to `bid_median`."""
    taste_turn: float = 0.0
    """By how many radians a day each user's taste turns towards that of somebody else; 0 = tastes stay."""
    popularity_swing: float = 0.0
    """Logits by which an item's attraction swings up and down over time, each item in its own phase; 0 = it stays."""
    popularity_period_days: float = 7.0
    """How long a swing takes."""
    seed: int = 0
    """Of everything that is drawn when the world is made."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, float) and not np.isfinite(value):
                raise ConfigError(f"{f.name} must be a finite number, got {value}")
        if self.dim < 2:
            raise ConfigError(f"dim must be at least 2, so that a taste can turn, got {self.dim}")
        for name in _POSITIVE:
            if getattr(self, name) < 0 or (getattr(self, name) == 0 and name != "position_decay"):
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in _CHANCES:
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name} is a chance between 0 and 1, got {getattr(self, name)}")
        if not 0 <= self.fast_share <= 1:
            raise ConfigError(f"fast_share is a share from 0 to 1, got {self.fast_share}")
        for name in ("value_tail", "bid_tail"):
            if getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be above 1, else the mean is infinite, got {getattr(self, name)}")
        for name, known in (
            ("values", ("lognormal", "pareto", "observed")),
            ("bids", ("lognormal", "pareto", "prices")),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} {getattr(self, name)!r} is unknown; choose from {', '.join(known)}")
        if (self.bids == "prices") != bool(self.bid_prices):
            raise ConfigError("bids = 'prices' and the file bid_prices go together; set both or neither")
