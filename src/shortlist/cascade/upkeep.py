"""Items and users as they are now, over a run that was made before: titles, attributes and availability at once, and users forgotten.

    store/catalogue.py      what was told, for good
    Upkeep                  the same applied to the run that answers, again after a swap, and about once a second what other processes told

A forgotten user is unknown from then on: the run's events and the id embedding of that user are read no more, what comes in later counts
as the past of a new person. What the run's own files hold of the user goes with the next training on a log without them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from shortlist.cascade.attributes import encoded, replaced
from shortlist.cascade.knowing import Known, reason_of
from shortlist.cascade.live import Live
from shortlist.cascade.request_log import RequestLog
from shortlist.cascade.ruling import Availability
from shortlist.data.batches import Batch
from shortlist.data.vocabulary import Id
from shortlist.store.campaigns import CampaignStore
from shortlist.store.catalogue import CatalogueStore, ItemNow, ItemUpdate, digest
from shortlist.store.events import EventStore, StoreUnavailable

LOOK_S = 1.0
"""Seconds between two looks for what other processes told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Upserted:
    """What became of items or users that were told of; all are kept."""

    num_kept: int
    num_unknown: int
    """Not in the snapshot; kept for the next training."""
    num_unknown_attributes: int
    """Values of columns that the snapshot does not read; kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Forgotten:
    """What was wiped of a user."""

    user: str
    in_snapshot: bool
    """Whether the run knew the user, who is unknown from now on."""
    num_events: int
    """Events that were wiped from the event store."""
    num_requests: int
    """Answers that were wiped from the request log."""
    num_summaries: int
    """Near-line summaries that were wiped."""
    written_anew: bool
    """Whether all files were written anew, so that no byte is left; False for very large ones, see store/erasing.py."""


class Upkeep:
    """Keeps the run that answers up to date; safe to use from many threads.

    Args:
        store: what was told of items and users.
    """

    def __init__(self, store: CatalogueStore) -> None:
        self.store = store
        self._lock = threading.Lock()
        self._gone: set[bytes] = set()
        self._any_users = False
        self._looked = 0.0

    def apply(self, live: Live) -> None:
        """Everything that was ever told, to a run that has just been opened."""
        with self._lock:
            self._renew(live)

    def look(self, live: Live, problems: list[str]) -> None:
        """What other processes told since, about once a second; a store that can not be read is a problem of the answer and no error."""
        if time.monotonic() - self._looked < LOOK_S:
            return
        with self._lock:
            self._looked = time.monotonic()
            try:
                self._renew(live)
            except StoreUnavailable as error:
                problems.append(f"changes of items are missing: {error}")

    def upsert_items(self, live: Live, updates: Sequence[ItemUpdate]) -> Upserted:
        """Keep what is new about items and show it from the next answer on; errors as of the store."""
        self.store.upsert_items(updates)
        with self._lock:
            self._renew(live)
        return Upserted(
            num_kept=len({update.item for update in updates}),
            num_unknown=int((live.items(list(dict.fromkeys(update.item for update in updates))) == 0).sum()),
            num_unknown_attributes=sum(not live.attributes.knows(name) for u in updates for name in u.attributes),
        )

    def remove_items(self, live: Live, items: Sequence[str]) -> Upserted:
        """Show these no more, from the next answer on."""
        self.store.remove_items(items)
        with self._lock:
            self._renew(live)
        unknown = int((live.items(list(dict.fromkeys(items))) == 0).sum())
        return Upserted(num_kept=len(set(items)), num_unknown=unknown, num_unknown_attributes=0)

    def upsert_users(self, live: Live, attributes: Mapping[str, Mapping[str, Any]]) -> Upserted:
        """Keep what is new about users and read it from the next answer on."""
        self.store.upsert_users(attributes)
        self._any_users = True
        columns = {f.column for f in live.dataset.schema.of("user")}
        return Upserted(
            num_kept=len(attributes),
            num_unknown=int((live.users(list(attributes)) == 0).sum()),
            num_unknown_attributes=sum(name not in columns for values in attributes.values() for name in values),
        )

    def forget_user(
        self,
        live: Live,
        user: str,
        events: EventStore | None,
        log: RequestLog | None,
        campaigns: CampaignStore | None = None,
    ) -> Forgotten:
        """Wipe a user: attributes, marks of ads seen, events, answers, memories, summaries. May be called again where it failed half-way.

        Raises StoreUnavailable where a file can not be written; the user is unknown all the same.
        """
        in_snapshot = int(live.dataset.user_ids.encode([user])[0]) > 0
        anew = [self.store.forget_user(user)]
        with self._lock:
            self._renew(live)
        num_events = num_requests = num_summaries = 0
        if campaigns is not None:
            campaigns.forget(user)
        if events is not None:
            num_events, done = events.forget(user)
            anew.append(done)
        if log is not None:
            num_requests, done = log.forget(user)
            anew.append(done)
        memories = live.cascade.memories
        if memories is not None:
            anew.append(memories.forget(user))
            num_summaries = sum(backing.forget(user) for backing in memories.backings.values())
        return Forgotten(
            user=user,
            in_snapshot=in_snapshot,
            num_events=num_events,
            num_requests=num_requests,
            num_summaries=num_summaries,
            written_anew=all(anew),
        )

    def known(self, live: Live, known: Known, users: Sequence[Id | None], problems: list[str]) -> Known:
        """What the engine found out, with what was told of the users; never fails."""
        if known.batch is None:
            return known
        try:
            return replace(known, batch=self.with_user_fields(live, known.batch, users))
        except Exception as error:  # a request always gets a page
            problems.append(reason_of("what was told of the user could not be read", error))
            return known

    def with_user_fields(self, live: Live, batch: Batch, users: Sequence[Id | None]) -> Batch:
        """The batch with what was told of its users in place of the run's; StoreUnavailable where that can not be read."""
        if not self._any_users:
            return batch
        told = self.store.users([str(user) for user in users if user is not None])
        if not told:
            return batch
        columns = dict(batch.user_fields)
        for fitted in live.dataset.schema.of("user"):
            mine = [i for i, user in enumerate(users) if fitted.column in told.get(str(user), {})]
            if mine and fitted.name in columns:
                raw = [told[str(users[i])][fitted.column] for i in mine]
                columns[fitted.name] = replaced(columns[fitted.name], np.array(mine), encoded(fitted, raw))
        return replace(batch, user_fields=columns)

    def _renew(self, live: Live) -> None:
        """Apply what the run has not been told."""
        news = self.store.changes(live.told)
        self._any_users = news.any_users
        if news.gone or (self._gone and not live.users.hides):
            self._gone |= set(news.gone)
            live.users.hide(lambda user: digest(str(user)) in self._gone)
            if live.cascade.memories is not None:
                fresh = set(news.gone)
                live.cascade.memories.forget_where(lambda user: digest(user) in fresh)
        if news.items:
            _show(live, news.items)
        live.told = news.mark
        self._looked = time.monotonic()


def _show(live: Live, items: Sequence[ItemNow]) -> None:
    """Put items as they are now over those of the run."""
    rows = live.items([item.item for item in items])
    known = [(row, item) for row, item in zip(rows.tolist(), items) if row]
    if not known:
        return
    column = live.dataset.schema.title or "title"
    # A title is told by itself or as the column that the run takes titles from; either way it is both.
    told = [(row, _with_title(item, column)) for row, item in known if item.attributes or item.title is not None]
    live.titles.update({row: str(given[column]) for row, given in told if given.get(column) is not None})
    if told:
        live.attributes = live.attributes.patched(np.array([row for row, _ in told]), [given for _, given in told])
    if live.availability is not None or not all(item.available for _, item in known):
        available = torch.ones(live.dataset.num_items + 1, dtype=torch.bool)
        available[0] = False
        if live.availability is not None:
            available = live.availability.available.clone()
        available[torch.tensor([row for row, _ in known])] = torch.tensor([item.available for _, item in known])
        num_gone = live.dataset.num_items - int(available.sum())
        live.availability = Availability(available=available, num_gone=num_gone) if num_gone else None


def _with_title(item: ItemNow, column: str) -> Mapping[str, Any]:
    return item.attributes if item.title is None else {**item.attributes, column: item.title}
