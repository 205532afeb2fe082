"""Why a page that was answered looked as it did: from the request log, and from the same question asked again of the run.

    from the log             the page, every stage's candidates with their scores, what each rule removed and where it laid out the page
    asked again              who found an item at which place; the past events nearest to it; what moved its score

What moved a score is measured by leaving it out: the stages up to the last one that scores are run once with all that was known, and once
without each past item and without each field of the user and the request; the difference is what it added. The candidates are those of
the logged request, so that nothing else changes. V variants, C candidates, P past items, F fields, k items of the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from shortlist.cascade.allocation.base import Budget
from shortlist.cascade.config import Chain
from shortlist.cascade.engine import Engine
from shortlist.cascade.explain import Below, Explanation, FoundBy, Near, OwnPast, explain, newest_events
from shortlist.cascade.fate import Fate, fate
from shortlist.cascade.live import Live
from shortlist.cascade.repeating import as_question
from shortlist.cascade.rules import NO_RULES
from shortlist.cascade.traced import Traced
from shortlist.data.batches import Batch, History
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Column
from shortlist.data.vocabulary import Id
from shortlist.errors import ConfigError, ShortlistError
from shortlist.models.base import Reranker

MAX_PAST, MAX_CANDIDATES, NUM_MOVED = 20, 100, 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """A stage that let the item through, as logged."""

    stage: str
    place: int
    """1 = best."""
    of: int
    """Items that the stage let through."""
    score: float | None
    """What the stage ordered by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MovedByEvent:
    """A past item and what it did to the score."""

    item_id: Id
    title: str | None
    timestamp: int | None
    """Of the newest event with it; None without a clock."""
    times: int
    """Events with it."""
    by: float
    """Score with it minus score without it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MovedByField:
    """A field of the user or the request and what it did to the score."""

    field: str
    by: float
    """Score with it minus score had it been unknown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WhyItem:
    """One place of the page."""

    item_id: Id
    title: str | None
    pinned: bool
    """A rule put it there."""
    found: tuple[FoundBy, ...]
    """Systems of the search that had it on their lists, best place first."""
    stages: tuple[Kept, ...]
    own: OwnPast | None
    """What the person did with it before."""
    near: tuple[Near, ...]
    """Past events that are like it."""
    events: tuple[MovedByEvent, ...]
    """Past items that moved its score most."""
    fields: tuple[MovedByField, ...]
    """Fields that moved its score most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Why:
    """Of a whole request."""

    request_id: str
    user: str | None
    at_ms: int
    """When it was answered."""
    chain: str
    snapshot_version: str
    degraded: str | None
    items: tuple[WhyItem, ...]
    below: tuple[Below, ...]
    """What came next and is not on the page."""
    removed: Mapping[str, int]
    """Items that each rule took away."""
    arranged: Mapping[str, int]
    """Places that each rule filled."""
    rules: Mapping[str, Any]
    """Those that the request brought, with the surface's in them; empty where the surface's own held."""
    scored_by: str | None
    """The stage whose scores `events` and `fields` speak of."""
    near_by: str | None
    """What `near` measures."""
    asked: Fate | None
    """What became of the item that was asked about; None where none was."""
    notes: tuple[str, ...] = field(default=())
    """What could not be found out, and why."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def why(engine: Engine, request_id: str, item: Id | None = None) -> Why | None:
    """What is known of an answered request, and of one item in it, shown or not; None where it is not, or no longer, in the log.

    ConfigError where the engine keeps no request log.
    """
    if engine.request_log is None:
        raise ConfigError("this engine keeps no request log; open it with request_log=PATH")
    found = engine.request_log.find(request_id)
    if found is None:
        return None
    notes: list[str] = []
    live = engine.live
    if found["snapshot_version"] != live.version:
        notes.append(f"answered by snapshot {found['snapshot_version']}; past and lists are told by {live.version}")
    traced = _asked_again(engine, live, found, notes)
    told = None if traced is None else explain(traced)
    moved = None if traced is None else _moved(traced, found, notes)
    rules = (found.get("asked") or {}).get("rules", {})
    pins = (
        {str(pin["item"]) for pin in rules.get("pins") or ()} if rules else {str(p.item) for p in live.rules.pins or ()}
    )
    return Why(
        request_id=request_id,
        user=found["user"],
        at_ms=found["at_ms"],
        chain=found["chain"],
        snapshot_version=found["snapshot_version"],
        degraded=found["degraded"],
        items=tuple(_item(live, found, item, pins, told, moved) for item in found["page"]),
        below=() if told is None else told.below,
        removed=found["removed"],
        arranged=found.get("arranged") or {},
        rules=rules,
        scored_by=None if moved is None else moved.stage,
        near_by=None if told is None else told.near_by,
        asked=None if item is None else _fate(live, found, item, traced),
        notes=tuple(notes),
    )


def _asked_again(engine: Engine, live: Live, found: Mapping[str, Any], notes: list[str]) -> Traced | None:
    """The question once more by the same chain, with the logged page in place of the new one; None where that is not possible."""
    if (found.get("asked") or {}).get("query") is not None:
        notes.append("a search is told of as it was logged; it is not asked again")
        return None
    try:
        live.cascade.config.chain(found["chain"])
        question = replace(as_question(found), chain=found["chain"], budget=Budget())
        traced = engine.trace(question)
    except ShortlistError as error:
        notes.append(f"it could not be asked again: {error}")
        return None
    notes += traced.problems
    if traced.live is not live or traced.batch is None:
        return None
    rows = torch.from_numpy(live.items(found["page"]))
    page = replace(traced.page, rows=rows[None], scores=torch.zeros(1, len(rows)))
    return replace(traced, page=page)


def _fate(live: Live, found: Mapping[str, Any], item: Id, traced: Traced | None) -> Fate:
    try:
        rules = as_question(found).rules.over(live.rules)
        live.check_rules(rules)
    except ShortlistError:
        rules = NO_RULES
    return fate(live, found, item, rules, None if traced is None else traced.batch)


def _item(
    live: Live,
    found: Mapping[str, Any],
    item: Id,
    pins: set[str],
    told: Explanation | None,
    moved: _Moved | None,
) -> WhyItem:
    reason = None if told is None else next((r for r in told.items if str(r.item_id) == str(item)), None)
    row = int(live.items([item])[0])
    events, fields = ((), ()) if moved is None else moved.of(row)
    return WhyItem(
        item_id=item,
        title=live.title(row) if row else None,
        pinned=str(item) in pins,
        found=() if reason is None else reason.found,
        stages=tuple(
            Kept(
                stage=stage["name"],
                place=stage["items"].index(item) + 1,
                of=len(stage["items"]),
                score=stage["scores"][stage["items"].index(item)],
            )
            for stage in found["stages"]
            if item in stage["items"]
        ),
        own=None if reason is None else reason.own,
        near=() if reason is None else reason.near,
        events=events,
        fields=fields,
    )


# -- what moved a score --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Moved:
    """By item of the page, what each past item and each field added to its score."""

    stage: str
    column: Mapping[int, int]
    """By catalogue row."""
    events: Sequence[tuple[Id, str | None, int | None, int]]
    """P: id, title, time, times."""
    fields: Sequence[str]
    by_VC: Tensor
    """float32 [P + F, C]."""

    def of(self, row: int) -> tuple[tuple[MovedByEvent, ...], tuple[MovedByField, ...]]:
        """What moved one item most, either way."""
        if row not in self.column:
            return (), ()
        by = self.by_VC[:, self.column[row]].tolist()
        events = [
            MovedByEvent(item_id=item, title=title, timestamp=then, times=times, by=value)
            for (item, title, then, times), value in zip(self.events, by)
            if value
        ]
        fields = [
            MovedByField(field=name, by=value) for name, value in zip(self.fields, by[len(self.events) :]) if value
        ]
        return (
            tuple(sorted(events, key=lambda one: -abs(one.by))[:NUM_MOVED]),
            tuple(sorted(fields, key=lambda one: -abs(one.by))[:NUM_MOVED]),
        )


def _moved(traced: Traced, found: Mapping[str, Any], notes: list[str]) -> _Moved | None:
    live, batch = traced.live, traced.batch
    assert batch is not None
    chain = live.cascade.config.chain(traced.page.chain)
    number = _last_scorer(live, chain)
    shown = traced.page.rows[0][traced.page.rows[0] > 0]
    others = torch.from_numpy(live.items(found["stages"][0]["items"][:MAX_CANDIDATES]))
    rows_C = torch.cat([shown, others[(others > 0) & ~torch.isin(others, shown)]])
    if not len(rows_C):
        return None
    events_P = newest_events(batch)[:MAX_PAST]
    items_P = batch.history.items.values[events_P]
    fields = [("user", name) for name in batch.user_fields] + [("request", name) for name in batch.context]
    variants = _variants(batch, items_P, fields)
    candidates = Jagged.from_rows([rows_C.tolist()] * variants.size)
    part = Chain(f"{chain.name} to its stage {number + 1}", chain.actions[: number + 1])
    try:
        page = live.cascade.run(variants, k=len(rows_C), candidates=candidates, chain=part)
    except Exception as error:  # an explanation must not fail where a page did not
        notes.append(f"what moved the scores could not be measured ({type(error).__name__}: {error})")
        return None
    trace = page.traces[number]
    place_N = torch.zeros(live.dataset.num_items + 1, dtype=torch.int64)
    place_N[rows_C] = torch.arange(len(rows_C))
    score_VC = torch.zeros(variants.size, len(rows_C))
    score_VC[trace.rows.row_of_value.cpu(), place_N[trace.rows.values.cpu()]] = trace.scores.cpu().float()
    has_clock = live.dataset.space.has_clock
    told = [
        (
            live.id(row),
            live.title(row),
            int(batch.history.time[event]) if has_clock else None,
            int((batch.history.items.values == row).sum()),
        )
        for row, event in zip(items_P.tolist(), events_P.tolist())
    ]
    return _Moved(
        stage=trace.name,
        column={row: i for i, row in enumerate(rows_C.tolist())},
        events=told,
        fields=[f"{side}.{name}" for side, name in fields],
        by_VC=score_VC[:1] - score_VC[1:],
    )


def _last_scorer(live: Live, chain: Chain) -> int:
    """Number of the last stage whose systems score candidates one by one."""
    scoring = [n for n, a in enumerate(chain.actions) if not isinstance(live.cascade.systems[a.systems[0]], Reranker)]
    return scoring[-1]


def _variants(batch: Batch, items_P: Tensor, fields: Sequence[tuple[str, str]]) -> Batch:
    """1 + P + F requests: the one of the batch as it is, without each past item, and without each field. Nobody is remembered by them."""
    num_past = len(items_P)
    many = batch.select(torch.zeros(1 + num_past + len(fields), dtype=torch.int64))
    history = many.history
    left_out = torch.full((many.size,), -1, dtype=torch.int64)
    left_out[1 : 1 + num_past] = items_P
    mask = history.items.values != left_out[history.items.row_of_value]
    columns = {name: getattr(history, name)[mask] for name in ("time", "action", "value", "group")}
    user_fields, context = dict(many.user_fields), dict(many.context)
    for place, (side, name) in enumerate(fields, start=1 + num_past):
        side_columns = user_fields if side == "user" else context
        side_columns[name] = _unknown(side_columns[name], place)
    return replace(
        many,
        history=History(items=history.items.keep(mask), **columns),
        user_fields=user_fields,
        context=context,
        excluded=None,
        key=(),
    )


def _unknown(column: Column, place: int) -> Column:
    """The column with the value of one request unknown."""
    if isinstance(column, Jagged):
        return column.keep(column.row_of_value != place)
    column = column.clone()
    column[place] = 0
    return column
