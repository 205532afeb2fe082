"""What rules mean for requests: which items are left to choose from, and what each rule took away.

Each rule is counted: what it alone took away of what the rules before it had left, in the order unavailable, allow, deny, filters, seen.
B requests of one set of rules, n items, row 0 = no item.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shortlist.cascade.attributes import Attributes
from shortlist.cascade.rules import Rules
from shortlist.data.histories import Histories, Int, Requests, ranges
from shortlist.data.jagged import Jagged
from shortlist.data.vocabulary import Id

_DAY_S = 86_400
Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ruling:
    """What rules mean for one request."""

    allowed: Tensor | None
    """bool [n + 1] by all rules but seen, False for row 0; None = no such rule. Seen items are left to the batch's exclusions."""
    removed: Mapping[str, int]
    """Items each rule took away: of the request's own candidates where it has some, else of the catalogue; `filters.FIELD` for a filter,
    `pins` for pinned items that other rules forbid."""
    ignored: Mapping[str, int]
    """Ids and values without a match, by rule."""
    pins: Mapping[int, int] = field(default_factory=dict)
    """Catalogue row by place on the page, from 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Availability:
    """Items that nobody may be shown."""

    available: Tensor
    """bool [n + 1], False for row 0."""
    num_gone: int
    """Items that are not available."""


def rule(
    rules: Rules,
    row_of: Callable[[Sequence[Id]], Int],
    num_items: int,
    *,
    seen: Int | None = None,
    candidates: Int | None = None,
    attributes: Attributes | None = None,
    availability: Availability | None = None,
) -> Ruling:
    """Apply rules to one request; see `rule_many`. `seen` are the catalogue rows that its history forbids."""
    excluded = None if seen is None else Jagged.from_lengths(torch.from_numpy(seen), torch.tensor([len(seen)]))
    return rule_many(
        rules,
        row_of,
        num_items,
        1,
        excluded=excluded,
        candidates=candidates,
        attributes=attributes,
        availability=availability,
    )[0]


def rule_many(
    rules: Rules,
    row_of: Callable[[Sequence[Id]], Int],
    num_items: int,
    num_requests: int,
    *,
    excluded: Jagged | None = None,
    candidates: Int | None = None,
    attributes: Attributes | None = None,
    availability: Availability | None = None,
) -> list[Ruling]:
    """Apply one set of rules to B requests; all that they share is worked out once.

    Args:
        rules: of the requests.
        row_of: catalogue rows of item ids, 0 where unknown; as Vocabulary.encode.
        num_items: n.
        num_requests: B.
        excluded: catalogue rows that each request's history forbids; repeats and 0 are allowed. None = seen items may be shown.
        candidates: rows the requests brought themselves; None = they choose from the catalogue.
        attributes: of the items; needed where the rules have filters.
        availability: None = all items are there.
    """
    left, shared = _mask(rules, row_of, num_items, candidates, attributes, availability)
    name = "seen" if rules.seen_days is None else "seen_days"
    if excluded is None:
        return [shared] * num_requests
    counts = _seen(excluded, num_requests, num_items + 1, left, candidates)
    return [replace(shared, removed={**shared.removed, name: count}) for count in counts]


def _mask(
    rules: Rules,
    row_of: Callable[[Sequence[Id]], Int],
    num_items: int,
    candidates: Int | None,
    attributes: Attributes | None,
    availability: Availability | None,
) -> tuple[Mask | None, Ruling]:
    """bool [n + 1] what is left of the catalogue or the candidates, None where nothing is ruled; and the ruling, but for what was seen."""
    if rules.allow is None and not (rules.deny or rules.filters or rules.pins):
        if availability is None:
            return None, Ruling(allowed=None, removed={}, ignored={})
        if candidates is None:  # most requests where an item is gone: what is left was worked out when it went
            gone = {"unavailable": availability.num_gone} if availability.num_gone else {}
            return availability.available.numpy(), Ruling(allowed=availability.available, removed=gone, ignored={})
    left = np.zeros(num_items + 1, dtype=bool)
    left[slice(1, None) if candidates is None else candidates[candidates > 0]] = True
    allowed = np.ones(num_items + 1, dtype=bool)
    allowed[0] = False
    removed: dict[str, int] = {}
    ignored: dict[str, int] = {}

    def keep(name: str, mask: Mask) -> None:
        before = int(left.sum())
        np.logical_and(left, mask, out=left)
        np.logical_and(allowed, mask, out=allowed)
        removed[name] = removed.get(name, 0) + before - int(left.sum())

    if availability is not None and availability.num_gone:
        keep("unavailable", availability.available.numpy())
    if rules.allow is not None:
        wanted, ignored["allow"] = _rows(rules.allow, row_of)
        mask = np.zeros(num_items + 1, dtype=bool)
        mask[wanted] = True
        keep("allow", mask)
    if rules.deny:
        unwanted, ignored["deny"] = _rows(rules.deny, row_of)
        removed["deny"] = int(left[unwanted].sum())
        left[unwanted] = allowed[unwanted] = False
    for wanted_values in rules.filters:
        assert attributes is not None, "filters need the items' attributes"
        mask, num_unknown = attributes.matches(wanted_values)
        name = f"filters.{wanted_values.field}"
        keep(name, mask)
        if num_unknown:
            ignored[name] = ignored.get(name, 0) + num_unknown
    pins = _pins(rules, row_of, left if candidates is not None else allowed, removed, ignored)
    shared = Ruling(allowed=torch.from_numpy(allowed), removed=removed, ignored=ignored, pins=pins)
    return left, shared


def _pins(
    rules: Rules,
    row_of: Callable[[Sequence[Id]], Int],
    allowed: Mask,
    removed: dict[str, int],
    ignored: dict[str, int],
) -> dict[int, int]:
    """Catalogue row by place; pins that no item matches, or that may not be shown, are counted."""
    if not rules.pins:
        return {}
    rows = row_of([pin.item for pin in rules.pins])
    ignored["pins"] = int((rows == 0).sum())
    removed["pins"] = int((~allowed[rows[rows > 0]]).sum())
    return {pin.position - 1: row for pin, row in zip(rules.pins, rows.tolist()) if row and allowed[row]}


def _seen(excluded: Jagged, num_requests: int, width: int, left: Mask | None, candidates: Int | None) -> list[int]:
    """For each request how many distinct items its history takes of what is left."""
    key = np.unique((excluded.row_of_value * width + excluded.values).numpy())
    row = key % width
    counted = row > 0
    if left is not None:
        counted &= left[row]
    elif candidates is not None:
        counted &= np.isin(row, candidates)
    counts: list[int] = np.bincount(key[counted] // width, minlength=num_requests).tolist()
    return counts


def seen_since(histories: Histories, requests: Requests, days: float) -> Jagged:
    """Catalogue rows [B] of events not older than so many days at each request's moment."""
    index, lengths = ranges(requests.start, requests.end)
    owner = np.repeat(np.arange(len(requests)), lengths)
    recent = histories.time[index] >= requests.time[owner] - days * _DAY_S
    counts = np.bincount(owner[recent], minlength=len(requests))
    return Jagged.from_lengths(torch.from_numpy(np.asarray(histories.item[index[recent]])), torch.from_numpy(counts))


def _rows(ids: Sequence[Id], row_of: Callable[[Sequence[Id]], Int]) -> tuple[Int, int]:
    """Distinct rows of the ids, and how many ids match none."""
    rows = row_of(ids)
    return np.unique(rows[rows > 0]), int((rows == 0).sum())
