"""What a request gets back, made from the cascade's tensors; and the same as a record for the request log."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shortlist.cascade.cascade import Page, StageTrace
from shortlist.cascade.governor import Allotted
from shortlist.cascade.live import Live
from shortlist.cascade.meter import StageReport
from shortlist.cascade.pasts import MS
from shortlist.cascade.questions import Asked
from shortlist.cascade.repeating import as_logged, brought_candidates
from shortlist.cascade.request_log import LoggedRequest, LoggedStage
from shortlist.cascade.rules import Rules
from shortlist.cascade.ruling import Ruling
from shortlist.data.histories import Int
from shortlist.data.vocabulary import Id


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One place of a page."""

    item_id: Id
    score: float | None
    """By the last stage; None where the item only fills the page."""
    title: str | None
    scores: Mapping[str, float | None]
    """By stage: what it ordered its candidates by; a stage that did not let the item through is left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A page and how it came about."""

    request_id: str
    user: Id | None
    items: tuple[Item, ...]
    """Best first; fewer than asked only where rules or candidates leave no more."""
    chain: str
    stages: tuple[StageReport, ...]
    snapshot_version: str
    degraded: str | None
    """What went wrong on the way; None when nothing did."""
    removed: Mapping[str, int]
    """Items that each rule took away: of the request's candidates where it has some, else of the catalogue."""
    arranged: Mapping[str, int]
    """Places of the page that each rule filled with another item than would stand there without it."""
    ignored: Mapping[str, int]
    """Ids and values of the request that match nothing, by where they stood."""
    num_history: int
    """Events the answer knows of."""
    at: int
    """Moment that was asked for, seconds since 1970 UTC."""
    spent_ms: float
    """Wall time; of a batch, its share."""
    allotted: Allotted
    """Why it was this chain."""
    note: str | None = None
    """What else to know of the answer, such as how a query was read; no fault."""
    variants: Mapping[str, str] = field(default_factory=dict)
    """Which variant of which experiment made it; empty where none had a hand in it."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = {f: getattr(self, f) for f in _PLAIN}
        return {
            **plain,
            "items": [{f: getattr(item, f) for f in Item.__slots__} for item in self.items],
            "allotted": {f: getattr(self.allotted, f) for f in Allotted.__slots__},
            "stages": [{f: getattr(stage, f) for f in StageReport.__slots__} for stage in self.stages],
        }


_PLAIN = tuple(f for f in Answer.__slots__ if f not in ("items", "stages", "allotted"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Circumstances:
    """What there is to tell of B requests beside their page."""

    users: Sequence[Id | None]
    """[B] as asked."""
    num_history: Sequence[int]
    """[B] events known."""
    moments: Sequence[int]
    """[B] seconds."""
    rulings: Sequence[Ruling]
    """[B]."""
    arranged: Sequence[Mapping[str, int]]
    """[B] places that each rule filled."""
    problems: Sequence[str]
    """What went wrong outside the stages, for all of them."""
    num_unknown_candidates: int | None
    """Candidates without a match; None where the request brought none."""
    spent_ms: float
    """Per request."""
    allotted: Sequence[Allotted]
    """[B]."""
    note: str | None = None
    """For all of them."""


def make_answers(live: Live, page: Page, told: Circumstances) -> list[Answer]:
    """Answers to B requests from their page; Python touches the items shown, not the candidates."""
    rows_Bk, scores_Bk = page.rows.cpu().numpy(), page.scores.cpu().numpy()
    answers = []
    for place, (user, ruling, reports) in enumerate(zip(told.users, told.rulings, page.reports)):
        shown = rows_Bk[place] > 0
        rows_k = rows_Bk[place][shown]
        scores_k: list[dict[str, float | None]] = [{} for _ in rows_k]
        for trace in page.traces:
            _add_scores(scores_k, trace, place, rows_k)
        items = tuple(
            Item(item_id=live.id(row), score=_number(score), title=live.title(row), scores=scores)
            for row, score, scores in zip(rows_k.tolist(), scores_Bk[place][shown].tolist(), scores_k)
        )
        degraded = [*told.problems, *(f"{report.stage}: {report.degraded}" for report in reports if report.degraded)]
        ignored = dict(ruling.ignored)
        if told.num_unknown_candidates is not None:
            ignored["candidates"] = told.num_unknown_candidates
        answers.append(
            Answer(
                request_id=uuid.uuid4().hex,
                user=user,
                items=items,
                chain=page.chain,
                stages=tuple(reports),
                snapshot_version=live.version,
                degraded="; ".join(degraded) or None,
                removed=ruling.removed,
                arranged=told.arranged[place],
                ignored=ignored,
                num_history=told.num_history[place],
                at=told.moments[place],
                spent_ms=told.spent_ms,
                allotted=told.allotted[place],
                note=told.note,
            )
        )
    return answers


def _add_scores(scores_k: Sequence[dict[str, float | None]], trace: StageTrace, request: int, rows_k: Int) -> None:
    """What a stage gave to the items [k] of a request's page, for those that it let through."""
    rows_C, scores_C = trace.of(request)
    if not len(rows_C):
        return
    place_k = (rows_k[:, None] == rows_C).argmax(1)
    for scores, same, score in zip(scores_k, (rows_C[place_k] == rows_k).tolist(), scores_C[place_k].tolist()):
        if same:
            scores[trace.name] = _number(score)


def logged(page: Page, answer: Answer, place: int, asked: Asked, number: int, surface: Rules) -> LoggedRequest:
    """A request for the request log: at `place` of the page, and at `number` of those that were asked together.

    `surface` are the rules that hold without any from the request.
    """
    candidates = [(trace.name, *trace.of(place)) for trace in page.traces]
    return LoggedRequest(
        request_id=answer.request_id,
        at_ms=round(time.time() * MS),
        user=None if answer.user is None else str(answer.user),
        k=asked.k,
        chain=answer.chain,
        snapshot_version=answer.snapshot_version,
        page=[item.item_id for item in answer.items],
        stages=[LoggedStage(name=name, rows=rows, scores=scores) for name, rows, scores in candidates],
        reports=answer.stages,
        removed=answer.removed,
        arranged=answer.arranged,
        degraded=answer.degraded,
        propensity=answer.allotted.propensity,
        reason=answer.allotted.reason,
        moment=answer.at,
        num_history=answer.num_history,
        asked=as_logged(asked, number, surface),
        candidates=brought_candidates(asked),
    )


def _number(value: float) -> float | None:
    """JSON knows no infinity; an item without a score has None."""
    return value if math.isfinite(value) else None
