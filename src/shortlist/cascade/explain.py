"""Why a person gets each item of a page: who found it, how it fared in every stage, what in the person's own past speaks for it.

Everything is read from the traces of the very page that is explained; nothing is scored a second way. What the past says is
"nearest" by the first of these that the run offers:

    vectors of NAME       cosine of item vectors, of the first retriever that has them
    NAME, event by event  the score that a retriever would give the item had the person done this one thing only
    shared fields         mean likeness of item fields: same category, overlap of words or tags, cosine of vectors

k items of the page, P distinct items of the past, newest first, S most members of a set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from shortlist.cascade.acting import score
from shortlist.cascade.cascade import StageTrace
from shortlist.cascade.live import Live
from shortlist.cascade.traced import Traced
from shortlist.data.batches import Batch
from shortlist.data.jagged import Jagged
from shortlist.data.pairs import PAIR_FIELDS, pair_fields
from shortlist.data.schema import Categorical, FieldTable, Sequence, Vector
from shortlist.data.vocabulary import Id
from shortlist.models.base import ItemScorer, VectorRetriever

NUM_NEAR, NUM_BELOW, MAX_PAST = 3, 5, 200
_AT_ONCE = 16
"""Past events asked together: a system that scores the whole catalogue makes a row of it for each."""
_DAY_S = 86_400


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundBy:
    """A retriever that had the item on its own list."""

    system: str
    place: int
    """1 = best."""
    length: int
    """Items on that list."""
    score: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A stage that let the item through."""

    stage: str
    place: int
    """1 = best."""
    kept: int
    """Items that the stage let through."""
    score: float
    """What the stage ordered by."""
    by_system: Mapping[str, float]
    """Raw scores of the stage's systems; empty for a re-ranker."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnPast:
    """What the person did with the item before."""

    times: int
    """Events with it."""
    groups: int
    """Baskets, or moments, with it."""
    since_last: float | None
    """Days since the last one; places in the person's order where the log has no clock; None where there is none."""
    pair: Mapping[str, float]
    """Pair fields about it, as rankers read them; those that are 0 are left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Near:
    """A past event that is like the item."""

    item_id: Id
    title: str | None
    timestamp: int | None
    """Of the newest such event, seconds since 1970 UTC; None without a clock."""
    strength: float
    """In the unit of `Explanation.near_by`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reason:
    """One place of the page."""

    item_id: Id
    title: str | None
    found: tuple[FoundBy, ...]
    """Best place first; empty for an item that only fills the page."""
    steps: tuple[Step, ...]
    """In the order of the stages, those that let it through."""
    own: OwnPast
    near: tuple[Near, ...]
    """Best first, the item itself left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Below:
    """An item that came next and is not on the page."""

    item_id: Id
    title: str | None
    reached: Step
    """The last stage that let it through."""
    dropped_by: str
    """The stage that did not, or "the end of the page"."""
    lowest_shown: float | None
    """Lowest score of the page's items in the stage that it reached last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """Of a whole page."""

    user: Id | None
    num_history: int
    """Events known of the person."""
    num_read: int
    """The newest of them, which systems could read; what is said of the past is said of these."""
    chain: str
    near_by: str | None
    """What `Near.strength` measures; None where nothing does."""
    has_clock: bool
    items: tuple[Reason, ...]
    below: tuple[Below, ...]
    degraded: tuple[str, ...] = field(default=())
    """What went wrong on the way."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def explain(traced: Traced, *, num_below: int = NUM_BELOW, num_near: int = NUM_NEAR) -> Explanation:
    """Reasons for the page of one question, as `Engine.traced` gives it."""
    live, page, batch = traced.live, traced.page, traced.batch
    rows = page.rows[0][page.rows[0] > 0].tolist()
    has_clock = live.dataset.space.has_clock
    near_by, near = (None, [()] * len(rows)) if batch is None else _near(traced, batch, rows, num_near)
    own = _own(batch, rows, has_clock=has_clock)
    degraded = [*traced.problems, *(f"{t.name}: {reason}" for t in page.traces if (reason := t.degraded(0)))]
    return Explanation(
        user=traced.user,
        num_history=traced.num_history,
        num_read=0 if batch is None else len(batch.history.items.values),
        chain=page.chain,
        near_by=near_by,
        has_clock=has_clock,
        items=tuple(
            Reason(
                item_id=live.id(row),
                title=live.title(row),
                found=_found(page.traces[0], row),
                steps=tuple(step for trace in page.traces if (step := _step(trace, row))),
                own=past,
                near=events,
            )
            for row, past, events in zip(rows, own, near)
        ),
        below=tuple(_below(live, page.traces, rows, num_below)),
        degraded=tuple(degraded),
    )


# -- traces ---------------------------------------------------------------------------------------------------------


def _found(search: StageTrace, row: int) -> tuple[FoundBy, ...]:
    """Which lists of the search hold the item."""
    lists = []
    for system, best in search.found.items():
        place = (best.rows[0] == row).nonzero()[:, 0]
        if len(place):
            at, length = int(place[0]), int((best.rows[0] > 0).sum())
            lists.append(FoundBy(system=system, place=at + 1, length=length, score=float(best.scores[0, at])))
    return tuple(sorted(lists, key=lambda found: found.place))


def _step(trace: StageTrace, row: int) -> Step | None:
    """What a stage made of the item; None where it did not let it through. The trace is of one request."""
    place = (trace.rows.values == row).nonzero()[:, 0]
    if not len(place):
        return None
    at = int(place[0])
    return Step(
        stage=trace.name,
        place=at + 1,
        kept=len(trace.rows.values),
        score=float(trace.scores[at]),
        by_system={name: float(scores[at]) for name, scores in trace.system_scores.items()},
    )


def _below(live: Live, traces: tuple[StageTrace, ...], shown: list[int], count: int) -> Iterator[Below]:
    """The items that came nearest to the page: those that got farthest, and among them the best."""
    named = set(shown)
    for number in range(len(traces) - 1, -1, -1):
        trace = traces[number]
        dropped_by = traces[number + 1].name if number + 1 < len(traces) else "the end of the page"
        of_page = torch.isin(trace.rows.values, torch.tensor(shown, device=trace.rows.values.device))
        lowest = float(trace.scores[of_page].min()) if of_page.any() else None
        # No more than this many of a stage can be wanted: those on the page or named already are passed over.
        for row in trace.rows.values[: count + len(named)].tolist():
            step = None if row in named else _step(trace, row)
            if step is not None and count > 0:
                named.add(row)
                count -= 1
                title = live.title(row)
                yield Below(item_id=live.id(row), title=title, reached=step, dropped_by=dropped_by, lowest_shown=lowest)


# -- the person's past ----------------------------------------------------------------------------------------------


def _own(batch: Batch | None, rows: list[int], *, has_clock: bool) -> list[OwnPast]:
    """What the past says of the very items of the page."""
    if batch is None:
        return [OwnPast(times=0, groups=0, since_last=None, pair={}) for _ in rows]
    history, unit = batch.history, _DAY_S if has_clock else 1
    pair = pair_fields(batch, Jagged.from_rows([rows]), has_clock=has_clock)
    about = [f.name for f in PAIR_FIELDS if not f.name.startswith("pair_history")]
    found = []
    for place, row in enumerate(rows):
        same = history.items.values == row
        since = None if not same.any() else (int(batch.time[0]) - int(history.time[same].max())) / unit
        values = {name: float(pair[name][place]) for name in about}
        found.append(
            OwnPast(
                times=int(same.sum()),
                groups=len(history.group[same].unique()),
                since_last=since,
                pair={name: value for name, value in values.items() if value},
            )
        )
    return found


def _near(traced: Traced, batch: Batch, rows: list[int], count: int) -> tuple[str | None, list[tuple[Near, ...]]]:
    """The measure, and for every item of the page the past events nearest to it."""
    live = traced.live
    events_P = newest_events(batch)
    past_P, rows_k = batch.history.items.values[events_P], torch.tensor(rows)
    measure, strength_kP = _strengths(traced, batch, events_P, rows_k)
    if strength_kP is None:
        return None, [()] * len(rows)
    strength_kP = strength_kP.masked_fill(rows_k[:, None] == past_P, -torch.inf)
    best = strength_kP.topk(min(count, len(past_P)), dim=1)
    near = []
    for strengths, places in zip(best.values.tolist(), best.indices.tolist()):
        events = []
        for strength, place in zip(strengths, places):
            if strength > 0:
                row, time = int(past_P[place]), int(batch.history.time[events_P[place]])
                timestamp = time if live.dataset.space.has_clock else None
                events.append(Near(item_id=live.id(row), title=live.title(row), timestamp=timestamp, strength=strength))
        near.append(tuple(events))
    return measure, near


def newest_events(batch: Batch) -> Tensor:
    """int64 [P]: the newest event of every distinct item of the only request, newest first, at most MAX_PAST."""
    newest_first = batch.history.items.values.flip(0)
    distinct, which = newest_first.unique(return_inverse=True)
    first = torch.full((len(distinct),), len(newest_first)).scatter_reduce(
        0, which, torch.arange(len(newest_first)), "amin"
    )
    return len(newest_first) - 1 - first.sort().values[:MAX_PAST]


def _strengths(traced: Traced, batch: Batch, events_P: Tensor, rows_k: Tensor) -> tuple[str | None, Tensor | None]:
    """How near every past item is to every item of the page, float32 [k, P], above 0 where it is near at all; see the file's head."""
    past_P, cascade = batch.history.items.values[events_P], traced.live.cascade
    if not len(past_P) or not len(rows_k):
        return None, None
    # Those that worked for this very page; one that is out of order explains nothing.
    search = traced.page.traces[0]
    retrievers = {name: cascade.systems[name] for name in search.found if name in search.system_scores}
    for name, system in retrievers.items():
        if isinstance(system, VectorRetriever):
            unit_Nd = normalize(system.item_matrix().cpu(), dim=1)
            return f"vectors of {name}", unit_Nd[rows_k] @ unit_Nd[past_P].T
    for name, system in retrievers.items():
        if isinstance(system, ItemScorer) and "history" in cascade.config.systems[name].entry.needs:
            strength_kP = _alone(system, batch.to(cascade.device), events_P, rows_k)
            if (strength_kP[rows_k[:, None] != past_P] > 0).any():
                return f"{name}, event by event", strength_kP
    strength = _likeness(traced.live.dataset.space.items, rows_k, past_P)
    return (None, None) if strength is None else ("shared fields", strength)


def _alone(system: ItemScorer, batch: Batch, events_P: Tensor, rows_k: Tensor) -> Tensor:
    """float32 [k, P]: what an event adds to the score of a person who did nothing else."""

    def scores(events: Tensor, lengths: Tensor) -> Tensor:
        history, one = batch.history, torch.zeros_like(lengths)
        histories = replace(
            history,
            items=Jagged.from_lengths(history.items.values[events], lengths),
            time=history.time[events],
            action=history.action[events],
            value=history.value[events],
            group=history.group[events],
        )
        asked = replace(
            batch,
            user=batch.user[one],
            time=batch.time[one],
            history=histories,
            user_fields={n: c.select(one) if isinstance(c, Jagged) else c[one] for n, c in batch.user_fields.items()},
            context={n: c.select(one) if isinstance(c, Jagged) else c[one] for n, c in batch.context.items()},
            excluded=None,
        )
        tiled = rows_k.to(batch.user.device).repeat(len(lengths))
        candidates = Jagged.from_lengths(tiled, torch.full_like(lengths, len(rows_k)))
        return score(system, asked.with_candidates(candidates)).view(len(lengths), len(rows_k))

    with torch.no_grad():
        events_P = events_P.to(batch.user.device)
        nothing_1k = scores(events_P[:0], torch.zeros_like(events_P[:1]))
        alone_Pk = torch.cat([scores(part, torch.ones_like(part)) for part in events_P.split(_AT_ONCE)])
        # A score of 0 or less is a system's way to say that it knows no link.
        return torch.where(alone_Pk > 0, alone_Pk - nothing_1k.clamp(min=0), 0.0).T.cpu()


def _likeness(items: FieldTable, rows_k: Tensor, past_P: Tensor) -> Tensor | None:
    """float32 [k, P] in 0..1: mean over the item fields that can be compared; None where there are none."""
    parts = []
    for f in items.fields:
        column = items.columns[f.name]
        if isinstance(column, Jagged) and isinstance(f, Sequence):
            one_kS, other_PS = (column.select(rows).padded()[0] for rows in (rows_k, past_P))
            parts.append(_overlap(one_kS, other_PS))
        elif isinstance(column, Tensor) and isinstance(f, Categorical):
            parts.append(((column[rows_k][:, None] == column[past_P]) & (column[past_P] > 0)).float())
        elif isinstance(column, Tensor) and isinstance(f, Vector):
            parts.append((normalize(column[rows_k], dim=1) @ normalize(column[past_P], dim=1).T).clamp(min=0))
    return torch.stack(parts).mean(0) if parts else None


def _overlap(one_kS: Tensor, other_PS: Tensor) -> Tensor:
    """float32 [k, P]: Jaccard overlap of sets of ids; 0 fills up, repeated members count once."""
    size = 1 + int(max(one_kS.max(), other_PS.max()))
    one, other = (torch.zeros(len(ids), size).scatter_(1, ids, 1.0) for ids in (one_kS, other_PS))
    one[:, 0] = other[:, 0] = 0
    shared = one @ other.T
    return shared / (one.sum(1)[:, None] + other.sum(1) - shared).clamp(min=1)
