"""Items like an item, by the first of these that the run offers and that says anything about the item:

    vectors of NAME       cosine of item vectors, of the first retriever that has them
    NAME, event by event  the score that a retriever gives each item to a person who did nothing but this
    shared fields         mean likeness of item fields: same category, overlap of words or tags, cosine of vectors

An item without events has no vector of its own where a system learns one per item, so such items are compared by their fields. Nothing
is filled up: what is not like the item is not on the list, and of an unknown item nothing is known, so its list is empty.
n items, row 0 = no item.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from shortlist.cascade.arranging import Ground, arrange, list_length
from shortlist.cascade.candidates import Blocked
from shortlist.cascade.cascade import Page
from shortlist.cascade.knowing import find_out
from shortlist.cascade.live import Live
from shortlist.cascade.pasts import PastEvent
from shortlist.cascade.questions import Asked, Bounds, Question, check
from shortlist.cascade.rules import NO_RULES, Rules
from shortlist.cascade.ruling import rule_many
from shortlist.data.jagged import Jagged
from shortlist.data.vocabulary import Id
from shortlist.models.base import ItemScorer, VectorRetriever

_AT_ONCE = 1 << 16
"""Items compared together by their fields."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SimilarItem:
    """One place of the list."""

    item_id: Id
    title: str | None
    score: float | None
    """In the unit of `Similar.by`; None for a pinned item that is not like the item."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Similar:
    """Items like an item."""

    item: Id
    items: tuple[SimilarItem, ...]
    """Most alike first; empty where the item is unknown or nothing is like it."""
    by: str | None
    """What was compared; None where there was nothing to compare."""
    snapshot_version: str
    removed: Mapping[str, int]
    """Items of the catalogue that each rule took away."""
    arranged: Mapping[str, int]
    """Places that each rule filled with another item than would stand there without it."""
    ignored: Mapping[str, int]
    """Ids and values that match nothing, by where they stood; `item` is 1 where the item is not in the catalogue."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def similar(live: Live, item: Id, k: int | None, rules: Rules | None, bounds: Bounds) -> Similar:
    """The k items most like an item, under the surface's rules and those given; what a person has seen plays no part.

    ConfigError where `k` is out of range or the items can not follow the rules.
    """
    asked = check(live, Question(user=None, k=k, rules=rules or NO_RULES), bounds)
    ruled = replace(asked.rules, seen=None, seen_days=None)
    ruling = rule_many(
        ruled,
        live.items,
        live.dataset.num_items,
        1,
        attributes=live.attributes,
        availability=live.availability,
    )[0]
    row = int(live.items([item])[0])
    by, page = (None, _nothing()) if not row else _most_alike(live, row, ruling.allowed, list_length(ruled, asked.k))
    arranged: Mapping[str, int] = {}
    if ruled.arranges and row:
        ground = Ground(
            attributes=live.attributes,
            popular=page.rows[0, :0],
            blocked=Blocked(live.dataset.num_items, None, ruling.allowed),
            past=Jagged.from_rows([[]]),
        )
        pins = {place: pinned for place, pinned in ruling.pins.items() if pinned != row}
        page, (arranged,) = arrange(page, asked.k, ruled, pins, ground)
    shown = [
        SimilarItem(item_id=live.id(r), title=live.title(r), score=score if score > -torch.inf else None)
        for r, score in zip(page.rows[0].tolist(), page.scores[0].tolist())
        if r
    ]
    return Similar(
        item=item,
        items=tuple(shown),
        by=by,
        snapshot_version=live.version,
        removed=ruling.removed,
        arranged=arranged,
        ignored=ruling.ignored if row else {**ruling.ignored, "item": 1},
    )


def _most_alike(live: Live, row: int, allowed: Tensor | None, count: int) -> tuple[str | None, Page]:
    """What was compared, and the `count` items most like that of `row`."""
    for by, like_N in _measures(live, row):
        fine_N = torch.isfinite(like_N) & (like_N > 0)
        fine_N[0] = fine_N[row] = False
        if not fine_N.any():
            continue
        if allowed is not None:
            fine_N &= allowed
        best = like_N.masked_fill(~fine_N, -torch.inf).topk(min(count, len(like_N)))
        rows = best.indices.masked_fill(best.values == -torch.inf, 0)
        return by, Page(rows=rows[None], scores=best.values[None], traces=(), chain="")
    return None, _nothing()


def _nothing() -> Page:
    empty = torch.zeros(1, 0, dtype=torch.int64)
    return Page(rows=empty, scores=empty.float(), traces=(), chain="")


@torch.no_grad()
def _measures(live: Live, row: int) -> Iterator[tuple[str, Tensor]]:
    """Name and likeness float32 [n + 1], on the CPU, by each measure; above 0 where items are alike."""
    first = live.cascade.config.stages[0].systems
    systems = {name: live.cascade.systems[name] for name in first}
    entries = {name: live.cascade.config.systems[name].entry for name in first}
    for name, system in systems.items():
        knows = entries[name].cold_items or bool(system.space.known_items[row])
        if isinstance(system, VectorRetriever) and knows:
            yield f"vectors of {name}", _cosine(live, name, system, row)
    for name, system in systems.items():
        if isinstance(system, ItemScorer) and "history" in entries[name].needs:
            yield f"{name}, event by event", _after(live, system, row)
    parts = live.attributes.compared(())
    if parts:
        yield "shared fields", _by_fields(parts, row, live.dataset.num_items + 1)


def _cosine(live: Live, name: str, system: VectorRetriever, row: int) -> Tensor:
    item_Nd = system.item_matrix()
    if name not in live.lengths:
        live.lengths[name] = item_Nd.norm(dim=1).clamp(min=1e-12)
    length_N = live.lengths[name]
    return ((item_Nd @ item_Nd[row]) / (length_N * length_N[row])).float().cpu()


def _after(live: Live, system: ItemScorer, row: int) -> Tensor:
    """What one event with the item adds to the score of every item. A score of 0 or less is a system's way to say that it knows no link."""
    alone_N, nothing_N = (_scores(live, system, sent) for sent in ([PastEvent(item=live.id(row))], []))
    return torch.where(alone_N > 0, alone_N - nothing_N.clamp(min=0), 0.0)


def _scores(live: Live, system: ItemScorer, sent: Sequence[PastEvent]) -> Tensor:
    """float32 [n + 1]: scores of all items for a person with this past and no other."""
    problems: list[str] = []
    asked = Asked(users=[None], k=1, sent=sent, rules=Rules(seen="keep"))
    known = find_out(live, None, asked, stale_days=30.0, problems=problems)
    if known.batch is None:
        return torch.zeros(live.dataset.num_items + 1)
    return system.score_all(known.batch.to(live.cascade.device))[0].float().cpu()


def _by_fields(parts: Sequence[Any], row: int, num_rows: int) -> Tensor:
    """float32 [n + 1]: mean likeness over fields, part by part of the catalogue; the item itself stands first in each."""
    like = []
    here_B1 = torch.zeros(1, 1, dtype=torch.int64)
    for rows in torch.arange(num_rows).split(_AT_ONCE):
        rows_1C = torch.cat([torch.tensor([row]), rows])[None]
        each = [part.likeness(part.features(rows_1C), here_B1)[0, 1:] for part in parts]
        like.append(torch.stack(each).mean(0))
    return torch.cat(like)
