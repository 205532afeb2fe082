"""What is kept of ads, as values: campaigns, their accounts, ads about to be shown, and charges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from shortlist.errors import ConfigError
from shortlist.store.events import MAX_ID_CHARS, MAX_TIMESTAMP

MICROS = 1_000_000
"""In one unit of currency."""
MAX_MONEY = 1e9
"""Largest sum in units of currency, so that micros stay exact in floating point."""
MAX_ITEMS = 10_000
Pacing = Literal["bid", "throttle", "none"]


def to_micros(money: float) -> int:
    """Whole micros nearest to a sum of money."""
    return round(money * MICROS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Campaign:
    """Who advertises what, and for how much. Money is in units of currency, kept to the micro."""

    campaign: str
    """Any name of the advertiser's own."""
    budget: float
    """All that its clicks may cost together."""
    bid: float
    """The most that one click may cost."""
    items: tuple[str, ...]
    """Ids of what may be shown for it, known or not."""
    reserve: float = 0.0
    """Least price of a click for it; the surface's own holds where that is higher."""
    start: float | None = None
    """Seconds since 1970 UTC from when it takes part; None = at once."""
    end: float | None = None
    """Seconds since 1970 UTC from when it no longer does; None = until its money is spent, and then there is nothing to pace by."""
    pacing: Pacing = "bid"
    """How its spend is kept to the plan, see cascade/pacing.py."""
    max_per_day: int | None = None
    """Most ads of it that one user sees within 24 hours; None = any number."""

    def __post_init__(self) -> None:
        check_id("campaign", self.campaign)
        for name in ("budget", "bid", "reserve"):
            if not 0 <= getattr(self, name) <= MAX_MONEY:
                raise ConfigError(f"{name} of a campaign is money from 0 to {MAX_MONEY:g}, got {getattr(self, name)}")
        if to_micros(self.bid) < 1:
            raise ConfigError(f"bid of a campaign must be at least one millionth, got {self.bid}")
        if self.reserve > self.bid:
            raise ConfigError(
                f"the campaign would never be shown: its bid {self.bid:g} is below its reserve {self.reserve:g}"
            )
        for name in ("start", "end"):
            at = getattr(self, name)
            if at is not None and not 0 <= at < MAX_TIMESTAMP:
                raise ConfigError(f"{name} of a campaign must be seconds since 1970, got {at!r}")
        if self.end is not None and self.end <= (self.start or 0.0):
            raise ConfigError(f"a campaign ends after it starts, got start {self.start} and end {self.end}")
        if not 1 <= len(self.items) <= MAX_ITEMS:
            raise ConfigError(f"a campaign has from 1 to {MAX_ITEMS:,} items, got {len(self.items):,}")
        for item in self.items:
            check_id("item", item)
        if self.pacing not in ("bid", "throttle", "none"):
            raise ConfigError(f"pacing {self.pacing!r} is unknown; choose from bid, throttle, none")
        if self.max_per_day is not None and self.max_per_day < 1:
            raise ConfigError(f"max_per_day must be at least 1, got {self.max_per_day}; leave it out for no limit")


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """A campaign and where its money is, in micros; `spent + reserved <= budget` always holds."""

    campaign: Campaign
    spent: int
    """Charged for clicks."""
    reserved: int
    """Set aside for clicks that may still come."""
    expected: int
    """What of that is likely to be charged: price times chance of a click."""

    @property
    def left(self) -> int:
        """What a click may cost now."""
        return to_micros(self.campaign.budget) - self.spent - self.reserved

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, in units of currency."""
        plain = {name: getattr(self.campaign, name) for name in Campaign.__slots__}
        sums = {name: getattr(self, name) / MICROS for name in ("spent", "reserved", "expected", "left")}
        return {**plain, "items": list(self.campaign.items), **sums}


@dataclass(frozen=True, kw_only=True, slots=True)
class Showing:
    """An ad that is about to be shown. Money in micros."""

    slot: int
    """From 1, the best."""
    campaign: str
    item: str
    price: int
    """What a click costs."""
    expected: int
    """Price times the chance of a click."""
    bid: int
    """As it stood in the auction."""
    chance: float
    """Of a click at this place."""
    propensity: float = 1.0
    """Chance with which the campaign took part."""
    registered: bool = True
    """Whether the campaign has an account; one that only a request names has no budget to keep."""
    max_per_day: int | None = None
    """The campaign's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Charge:
    """What became of a click."""

    request_id: str
    slot: int
    campaign: str
    item_id: str
    price: float
    """What the auction said a click costs, in units of currency."""
    charged: float
    """What was charged: the price, or 0 where a late click met a spent budget."""
    repeated: bool
    """It had been told before; nothing was charged again."""
    late: bool
    """It came after its window, when nothing was set aside for it any more."""


class Refused(NamedTuple):
    """Campaigns that can not show what they won; nothing was set aside for anybody."""

    budget: frozenset[str]
    cap: frozenset[str]


def check_id(name: str, given: Any) -> None:
    """ConfigError where an id is no text that every database takes."""
    if not isinstance(given, str) or not 0 < len(given) <= MAX_ID_CHARS:
        raise ConfigError(f"{name} must be 1 to {MAX_ID_CHARS} characters of text, got {given!r:.80}")
    if "\0" in given or any("\ud800" <= char <= "\udfff" for char in given):
        raise ConfigError(f"{name} holds what is no character of text: {given!r:.80}")
