"""Rules as data: what a page may hold and how it is laid out, of a surface ([rules] in the run's settings) and of each request.

    Rules(deny=("c3",), filters=(Filter(field="price", at_most=20),), quotas=(Quota(field="brand", most=2),))

allow, deny, filters, seen and seen_days take items away before the stages, so a full page is still made (ruling.py). pins, quotas,
diversity and mix lay out the page from a longer list after the last stage (arranging.py). The same names stand in Python, in TOML and in
the body of a request.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import ConfigDict

from shortlist.data.vocabulary import Id
from shortlist.errors import ConfigError

Value = str | int | float | bool
MAX_PARTS = 100
"""Most filters, pins or quotas of one set of rules."""
MAX_COUNT = 1_000_000
"""Most items that a quota may speak of."""
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Filter:
    """Which items may be shown by one of their fields. One of equals, any_of, or a range."""

    __pydantic_config__ = _STRICT

    field: str
    """An item field of the run. Of a field with several values per item, one that fits is enough."""
    equals: Value | None = None
    """This value; one that no item of the training log had matches nothing."""
    any_of: tuple[Value, ...] | None = None
    """One of these."""
    at_least: float | None = None
    """A number not below this; a missing number counts as the mean, as systems read it."""
    at_most: float | None = None
    """A number not above this."""
    negate: bool = False
    """Turn it round: only items that do not match."""

    def __post_init__(self) -> None:
        if isinstance(self.any_of, list):
            object.__setattr__(self, "any_of", tuple(self.any_of))
        given = [self.equals is not None, self.any_of is not None, self.is_range]
        if sum(given) != 1:
            raise ConfigError(f"the filter of {self.field!r} needs one of equals, any_of, or at_least and at_most")
        if isinstance(self.any_of, str):
            raise ConfigError(f"the filter of {self.field!r}: any_of must be a list, got the text {self.any_of!r:.80}")
        _check_text(f"the filter of {self.field!r}", (self.field, *self.values))
        for bound in (self.at_least, self.at_most):
            if bound is not None and not math.isfinite(bound):
                raise ConfigError(f"the filter of {self.field!r} has the bound {bound}; give a finite number")

    @property
    def is_range(self) -> bool:
        """Whether it compares numbers."""
        return self.at_least is not None or self.at_most is not None

    @property
    def values(self) -> tuple[Value, ...]:
        """What it looks for, where it is no range."""
        return tuple(self.any_of) if self.equals is None and self.any_of is not None else (self.equals,)  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pin:
    """An item that stands at a place of the page, whoever asks; other rules that forbid it come first, but for `seen`."""

    __pydantic_config__ = _STRICT

    item: Id
    position: int = 1
    """1 = on top; a place beyond the page is no place."""

    def __post_init__(self) -> None:
        _check_text("a pin", [self.item])
        if self.position < 1:
            raise ConfigError(f"position of the pin {self.item!r} must be at least 1, got {self.position}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Quota:
    """How many items of a page share a value."""

    __pydantic_config__ = _STRICT

    field: str
    """An item field with categories or sets of them."""
    value: Value | None = None
    """The value that is counted; None = each value by itself (and `most` alone has a meaning)."""
    most: int | None = None
    """So many at most; the page is shorter where nothing else is left."""
    least: int | None = None
    """So many at least, as far as there are any; those that the ranking did not bring stand last."""

    def __post_init__(self) -> None:
        _check_text("a quota", [self.field, self.value])
        if self.most is None and self.least is None:
            raise ConfigError(f"the quota of {self.field!r} needs most or least")
        if self.least is not None and self.value is None:
            raise ConfigError(f"the quota of {self.field!r} says least and needs the value that is meant")
        if not all(0 <= count <= MAX_COUNT for count in (self.most, self.least) if count is not None):
            raise ConfigError(f"the quota of {self.field!r} must be from 0 to {MAX_COUNT:,}")
        if self.most is not None and self.least is not None and self.most < self.least:
            raise ConfigError(f"the quota of {self.field!r} wants at least {self.least} and at most {self.most}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Diversity:
    """Maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998) on the final page."""

    __pydantic_config__ = _STRICT

    relevance: float = 0.7
    """Weight of the score against likeness to what already stands above; 1 = the order as it is."""
    fields: tuple[str, ...] = ()
    """Item fields that make items alike; empty = all categories, sets and vectors."""

    def __post_init__(self) -> None:
        if not 0 <= self.relevance <= 1:
            raise ConfigError(f"diversity.relevance must be from 0 to 1, got {self.relevance}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Mix:
    """Calibrated mix (Steck, RecSys 2018): values on the page in the shares that they have in the user's own past."""

    __pydantic_config__ = _STRICT

    field: str
    """An item field with categories or sets of them, such as genres."""
    weight: float = 0.5
    """Of the divergence between past and page, against the score; 0 = the order as it is, 1 = the shares alone."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ConfigError(f"mix.weight must be from 0 to 1, got {self.weight}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """What a request may see and how its page is laid out. Ids and values that match nothing are passed over and counted."""

    __pydantic_config__ = _STRICT

    allow: Sequence[Id] | None = None
    """Only these items; None = all. An empty list allows nothing: the page is empty."""
    deny: Sequence[Id] = ()
    """None of these, even where `allow` names them."""
    filters: tuple[Filter, ...] = ()
    """Only items that pass all of them."""
    seen: Literal["keep", "drop"] | None = None
    """Whether items of the user's history may be shown; None = as the surface says."""
    seen_days: float | None = None
    """Drop items of the history that are not older than so many days, in place of all; None = as `seen` says."""
    pins: tuple[Pin, ...] | None = None
    """Items at places of the page; None = as the surface says."""
    quotas: tuple[Quota, ...] | None = None
    """How many items share a value; None = as the surface says."""
    diversity: Diversity | None = None
    """Unlike items beside each other; None = as the surface says."""
    mix: Mix | None = None
    """Shares of values as in the user's past; None = as the surface says."""
    with_surface: bool = True
    """Whether the surface's own rules hold beneath these; False = these alone."""

    def __post_init__(self) -> None:
        for name, ids in (("allow", self.allow), ("deny", self.deny)):
            if isinstance(ids, str | bytes):
                raise ConfigError(f"{name} must be a list of item ids, got the text {ids!r:.80}")
            _check_text(name, ids or ())
        if self.seen not in (None, "keep", "drop"):
            raise ConfigError(f"seen must be 'keep' or 'drop', got {self.seen!r}")
        if self.seen_days is not None and not 0 < self.seen_days < math.inf:
            raise ConfigError(f"seen_days must be above 0, got {self.seen_days}")
        if self.seen_days is not None and self.seen is not None:
            raise ConfigError("give either seen or seen_days, not both")
        for name in ("filters", "pins", "quotas"):
            if len(getattr(self, name) or ()) > MAX_PARTS:
                raise ConfigError(f"{name} has {len(getattr(self, name)):,} entries; at most {MAX_PARTS} are taken")
        pins = self.pins or ()
        for what, named in (("position", [pin.position for pin in pins]), ("item", [str(pin.item) for pin in pins])):
            if len(set(named)) < len(named):
                raise ConfigError(f"two pins have the same {what}; every pin needs its own")

    def over(self, surface: Rules) -> Rules:
        """These with the surface's beneath: `deny` and `filters` add to the surface's, the rest stands in its place where it is given."""
        if not self.with_surface or surface == NO_RULES:
            return self
        if self == NO_RULES:
            return surface
        says_seen = self.seen is not None or self.seen_days is not None
        return replace(
            self,
            allow=surface.allow if self.allow is None else self.allow,
            deny=(*surface.deny, *self.deny),
            filters=(*surface.filters, *self.filters),
            seen=self.seen if says_seen else surface.seen,
            seen_days=self.seen_days if says_seen else surface.seen_days,
            pins=surface.pins if self.pins is None else self.pins,
            quotas=surface.quotas if self.quotas is None else self.quotas,
            diversity=surface.diversity if self.diversity is None else self.diversity,
            mix=surface.mix if self.mix is None else self.mix,
        )

    @property
    def arranges(self) -> bool:
        """Whether anything is to be done to the page after the last stage."""
        return bool(self.pins or self.quotas or self.diversity or self.mix)

    @property
    def item_fields(self) -> tuple[str, ...]:
        """Fields that they name."""
        named = [part.field for part in (*self.filters, *(self.quotas or ()), *((self.mix,) if self.mix else ()))]
        return (*named, *(self.diversity.fields if self.diversity else ()))


def _check_text(what: str, values: Sequence[object]) -> None:
    """ConfigError for text that is half a character, as JSON can hold it: no id and no value has it."""
    try:
        "".join(map(str, values)).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{what} holds text that is not Unicode ({error.reason})") from error


NO_RULES = Rules()
