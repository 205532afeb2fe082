"""What an engine knows of the users that it is asked about: their past in the run and since, as a batch, and what the rules leave them.

B questions that share everything but the user.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
        past, moments = _pasts(live, events, asked, rows, now, newest, stale_days, problems)
        histories, requests = live.dataset.requests_for(
            asked.users, rows=rows, at=moments, histories=past, context=asked.context
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
    known = requests.end - requests.start
    if newest is not None and asked.sent is None:
        offsets = np.asarray(live.dataset.histories.offsets)
        known = known + np.maximum(offsets[rows + 1] - offsets[rows] - newest, 0)
    return Known(batch=batch, num_history=known.tolist(), moments=moments.tolist())


def _pasts(
    live: Live,
    events: EventStore | None,
    asked: Asked,
    rows: Int,
    now: float,
    newest: int | None,
    stale_days: float,
    problems: list[str],
) -> tuple[Histories, Int]:
    """Histories of B users, and the moment [B] each is asked about."""
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
    past = pasts(live.dataset.histories, rows, newer, has_clock=live.dataset.space.has_clock, newest=newest)
    if asked.at is not None:
        return past, np.full(len(rows), asked.at, dtype=np.int64)
    is_stale = now - live.log_end > stale_days * _DAY_S
    moments = np.full(len(rows), live.log_end if is_stale else int(now), dtype=np.int64)
    if newer is not None:
        moments[newer.user] = int(now)
    return past, np.maximum(moments, _last_times(past)) if live.dataset.space.has_clock else moments


def stored(live: Live, events: EventStore | None, users: Sequence[Id | None]) -> Newer | None:
    """What the event store has of the users on top of the run; StoreUnavailable where it can not be read."""
    return None if events is None else newer_stored(events, users, live.items, live.action_ids)


def _last_times(past: Histories) -> Int:
    """int64 [B]: time of each user's newest event; 0 without one."""
    start, end = past.offsets[1:-1], past.offsets[2:]
    if not past.num_events:
        return np.zeros(len(start), dtype=np.int64)
    return np.where(end > start, past.time[np.maximum(end - 1, 0)], 0)


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
