"""What an engine knows of the users that it is asked about: their past in the run and since, as a batch, and what the rules leave them.

B questions that share everything but the user.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from shortlist.cascade.live import Live
from shortlist.cascade.pasts import Newer, newer_of, newer_stored, pasts
from shortlist.cascade.questions import Asked
from shortlist.cascade.ruling import Ruling, rule_many, seen_since
from shortlist.data.batches import Batch, request_batch
from shortlist.data.histories import Histories, Int
from shortlist.data.vocabulary import Id
from shortlist.store.events import EventStore, StoreUnavailable

_DAY_S = 86_400


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """What the engine found out about B users."""

    batch: Batch | None
    """None where even that failed."""
    num_history: list[int]
    moments: list[int]

    def select(self, places: Sequence[int]) -> Known:
        """Of some of the users."""
        return Known(
            batch=None if self.batch is None else self.batch.select(torch.tensor(places)),
            num_history=[self.num_history[place] for place in places],
            moments=[self.moments[place] for place in places],
        )


def find_out(live: Live, events: EventStore | None, asked: Asked, *, stale_days: float, problems: list[str]) -> Known:
    """The batch of B questions, from all that is known of their users.

    Args:
        live: the run.
        events: what happened since; None = nothing is on record.
        stale_days: a log that ended longer ago is asked as of its end, unless the user has newer events.
        problems: what goes wrong is added here; nothing is raised.
    """
    now = time.time()
    days = asked.rules.seen_days
    excludes = days is None and not (live.repeats if asked.rules.seen is None else asked.rules.seen == "keep")
    # What systems read, unless all that was seen is to be left out or the question is of an earlier moment.
    all_of_it = excludes or days is not None or asked.at is not None or not live.dataset.space.has_clock
    most = live.cascade.max_history
    newest = None if all_of_it else most
    named = asked.sent is None and asked.at is None and all(user is not None for user in asked.users)
    try:
        keys = tuple(live.key(user) for user in asked.users) if named else ()
        rows = live.users(asked.users)
        past = _past_of(live, events, asked, rows, now, newest, stale_days, problems)
        histories, requests = live.dataset.requests_for(
            asked.users, rows=rows, at=past.moments, histories=past.histories, spans=past.spans, context=asked.context
        )
        batch = request_batch(
            histories,
            live.user_fields,
            requests,
            max_history=most,
            exclude_history=excludes,
            key=keys,
        )
        if days is not None:
            batch = replace(batch, excluded=seen_since(histories, requests, days))
    except Exception as error:  # a request always gets a page
        problems.append(reason_of("the user's past could not be read", error))
        return Known(batch=None, num_history=[0] * len(asked.users), moments=[int(now)] * len(asked.users))
    known = requests.end - requests.start + past.unread
    return Known(batch=batch, num_history=known.tolist(), moments=past.moments.tolist())


class _Past(NamedTuple):
    """What happened before B questions."""

    histories: Histories
    spans: tuple[Int, Int]
    """[B] first event of each user in `histories`, and [B] one past the last."""
    moments: Int
    """[B] seconds: when each is asked about."""
    unread: Int | int
    """[B] older events that were left out of `histories`."""


def _past_of(
    live: Live,
    events: EventStore | None,
    asked: Asked,
    rows: Int,
    now: float,
    newest: int | None,
    stale_days: float,
    problems: list[str],
) -> _Past:
    """What happened before; where nothing is newer than the log, it is read where it stands."""
    log, has_clock = live.dataset.histories, live.dataset.space.has_clock
    newer: Newer | None = None
    if asked.sent is not None:
        rows = np.zeros_like(rows)  # what the request says stands in place of what is on record
        actions = live.action_ids([event.action for event in asked.sent])
        newer = newer_of(asked.sent, live.items, actions, now if asked.at is None else asked.at)
    else:
        try:
            newer = stored(live, events, asked.users)
        except StoreUnavailable as error:
            problems.append(f"recent events are missing: {error}")
    offsets = np.asarray(log.offsets)
    spans, unread = (offsets[rows], offsets[rows + 1]), 0
    if newer is not None:
        if newest is not None:
            unread = np.maximum(spans[1] - spans[0] - newest, 0)
        log = pasts(log, rows, newer, has_clock=has_clock, newest=newest)
        spans = (log.offsets[1:-1], log.offsets[2:])
    if asked.at is not None:
        return _Past(log, spans, np.full(len(rows), asked.at, dtype=np.int64), unread)
    is_stale = now - live.log_end > stale_days * _DAY_S
    moments = np.full(len(rows), live.log_end if is_stale else int(now), dtype=np.int64)
    if newer is not None:
        moments[newer.user] = int(now)
    if has_clock:
        moments = np.maximum(moments, _last_times(log, *spans))
    return _Past(log, spans, moments, unread)


def stored(live: Live, events: EventStore | None, users: Sequence[Id | None]) -> Newer | None:
    """What the event store has of the users on top of the run; StoreUnavailable where it can not be read."""
    return None if events is None else newer_stored(events, users, live.items, live.action_ids)


def _last_times(past: Histories, start: Int, end: Int) -> Int:
    """int64 [B]: time of the newest event of each span; 0 without one."""
    if not past.num_events:
        return np.zeros(len(start), dtype=np.int64)
    return np.where(end > start, np.asarray(past.time)[end - 1], 0)


def rulings_of(live: Live, asked: Asked, known: Known) -> list[Ruling]:
    """The rules' meaning per request; all but what was seen is the same for all."""
    return rule_many(
        asked.rules,
        live.items,
        live.dataset.num_items,
        len(asked.users),
        excluded=None if known.batch is None else known.batch.excluded,
        candidates=asked.candidates,
        attributes=live.attributes,
        availability=live.availability,
    )


def reason_of(what: str, error: Exception) -> str:
    """One line of an answer's `degraded`."""
    return f"{what} ({type(error).__name__}: {error})"
