"""What became of one item in a request that was answered: the rule that took it away, or the stage that lost it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from shortlist.cascade.live import Live
from shortlist.cascade.rules import Rules
from shortlist.data.batches import Batch
from shortlist.data.vocabulary import Id


@dataclass(frozen=True, kw_only=True, slots=True)
class Fate:
    """Of one item."""

    item_id: Id
    title: str | None
    place: int | None
    """On the page, 1 = on top; None where it is not there."""
    rules: tuple[str, ...]
    """Rules that each alone would have kept it away, as `removed` names them; they are today's where the surface's own held."""
    last_stage: str | None
    """The last stage that let it through; None where none did."""
    lost_by: str | None
    """A rule, `catalogue` (it has no such item), `candidates` (the request's own, without it), the stage that did not let it through, or
    `the end of the page`; None where it is on the page."""


def fate(live: Live, found: Mapping[str, Any], item: Id, rules: Rules, batch: Batch | None) -> Fate:
    """What became of an item.

    Args:
        live: the run.
        found: the request, as `RequestLog.find` gives it.
        item: id, known or not.
        rules: that held for the request.
        batch: the request as the cascade got it, for what was seen; None = not known.
    """
    row = int(live.items([item])[0])
    known = Fate(
        item_id=live.id(row) if row else item,
        title=live.title(row) if row else None,
        place=None,
        rules=tuple(_against(live, row, rules, batch)) if row else (),
        last_stage=None,
        lost_by="catalogue",
    )
    if not row:
        return known
    page = [str(one) for one in found["page"]]
    names = [stage["name"] for stage in found["stages"]]
    kept = [str(item) in map(str, stage["items"]) for stage in found["stages"]]
    last = max((number for number, is_kept in enumerate(kept) if is_kept), default=None)
    known = replace(known, last_stage=None if last is None else names[last])
    if str(item) in page:
        return replace(known, place=page.index(str(item)) + 1, lost_by=None)
    if last is not None:
        return replace(known, lost_by=names[last + 1] if last + 1 < len(names) else "the end of the page")
    own = (found.get("asked") or {}).get("candidates")
    if known.rules:
        return replace(known, lost_by=known.rules[0])
    if own is not None and str(item) not in map(str, own):
        return replace(known, lost_by="candidates")
    return replace(known, lost_by=names[0] if names else None)


def _against(live: Live, row: int, rules: Rules, batch: Batch | None) -> Iterator[str]:
    """Rules that forbid the item, in the order in which they act."""
    if live.availability is not None and not live.availability.available[row]:
        yield "unavailable"
    if rules.allow is not None and row not in live.items(list(rules.allow)):
        yield "allow"
    if row in live.items(list(rules.deny)):
        yield "deny"
    for wanted in rules.filters:
        if not live.attributes.matches(wanted)[0][row]:
            yield f"filters.{wanted.field}"
    if batch is not None and batch.excluded is not None and bool((batch.excluded.values == row).any()):
        yield "seen" if rules.seen_days is None else "seen_days"
