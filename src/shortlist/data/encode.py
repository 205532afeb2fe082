"""An event log becomes histories: rows instead of ids, sorted by user and time, groups whole. Training and serving sort here alike."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray

from shortlist.data.histories import Histories, Int, ranges
from shortlist.data.log import EventLog
from shortlist.data.sorting import stable_order
from shortlist.data.vocabulary import Vocabulary

_MS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedEvents:
    """All events of a log as histories, and where each came from."""

    histories: Histories
    """Users are the rows of the vocabulary they were encoded with; actions are numbered by `actions`."""
    row: Int
    """[N]: the event's row in `log.events`."""
    actions: tuple[str, ...]
    """Action names of the whole log, sorted; action ids are 1.. in this order."""

    def reordered(self, users: Int) -> EncodedEvents:
        """With user users[i] in row i + 1; `users` [U] is a permutation of 1..U."""
        order = events_of(self.histories, users)
        lengths = np.diff(self.histories.offsets)[users]
        offsets = np.concatenate([[0, 0], np.cumsum(lengths)]).astype(np.int64)
        old = self.histories
        moved = Histories(
            offsets=offsets,
            item=old.item[order],
            time=old.time[order],
            group=old.group[order],
            action=old.action[order],
            value=old.value[order],
        )
        return EncodedEvents(histories=moved, row=self.row[order], actions=self.actions)

    def keep(self, mask: NDArray[np.bool_], *, has_clock: bool) -> EncodedEvents:
        """Only the events where the mask [N] is True; without a clock their times are places among what is left."""
        kept = self.histories.keep(mask)
        if not has_clock:
            user, group = kept.user_of_event, kept.group
            opens = np.ones(len(user), dtype=bool)
            opens[1:] = group[1:] != group[:-1]
            number = np.cumsum(opens) - 1
            first = kept.offsets[user]
            kept = replace(kept, time=number - number[first])
        return EncodedEvents(histories=kept, row=self.row[mask], actions=self.actions)


def encode_events(
    log: EventLog, items: Vocabulary, users: Vocabulary, *, single: bool = False, seed: int = 0
) -> EncodedEvents:
    """Number the ids of a log and sort its events.

    Times become whole seconds; where the log has no clock they become the place of the group in the user's order. Without any order
    the groups of each user are shuffled with the seed, since the order of a file may say what an event was (files sorted by item).

    Args:
        single: every event is a group of its own, in time and file order, as published leave-last-out tables have it.
    """
    events = log.events
    num_events = events.height
    group = np.arange(num_events) if single else events["group_id"].to_numpy()
    if log.has_time:
        time = events["timestamp"].dt.timestamp("ms").to_numpy()
    elif single:
        time = np.zeros(num_events, dtype=np.int64)
    else:
        lots = np.random.default_rng([seed, 3]).permutation(int(group.max(initial=-1)) + 1)
        time = lots[group].astype(np.int64)
    names = tuple(sorted(events["action"].unique().drop_nulls().to_list()))
    action = events["action"].replace_strict(
        list(names), list(range(1, len(names) + 1)), default=0, return_dtype=pl.Int64
    )
    value = np.ones(num_events, dtype=np.float32)
    if "value" in events.columns:
        value = events["value"].fill_null(0.0).to_numpy().astype(np.float32)
    histories, row = sort_events(
        users.encode(events["user_id"]),
        items.encode(events["item_id"]),
        time,
        group=group,
        action=action.to_numpy(),
        value=value,
        num_users=len(users),
        time_unit=_MS if log.has_clock else None,
    )
    return EncodedEvents(histories=histories, row=row, actions=names)


def sort_events(
    user: Int,
    item: Int,
    time: Int,
    *,
    group: Int | None = None,
    action: Int | None = None,
    value: NDArray[np.float32] | None = None,
    num_users: int,
    time_unit: int | None = 1,
) -> tuple[Histories, Int]:
    """Histories from events [N] in any order, and the event [N] that each of their places came from.

    Events of a group stand together, at the time of its last event: before that the group was not complete, so neither may it be read.
    Groups of a user stand in time order, those of one moment in order of their numbers, events of a group in the given order.

    Args:
        user: rows 1..num_users.
        group: any numbers that are equal where events happened together, never for two users; None = same user and time.
        action: ids; None = 1.
        value: worth; None = 1.
        time_unit: ticks per second of `time`; None = time is an order and no clock.
    """
    if group is None:
        group = _number_pairs(user, time)
    num_groups = int(group.max(initial=-1)) + 1
    group_time = np.full(num_groups, time.min(initial=0), dtype=np.int64)
    np.maximum.at(group_time, group, time)
    group_user = np.zeros(num_groups, dtype=np.int64)
    group_user[group] = user
    sorted_groups = stable_order(group_time, group_user)
    rank = np.empty(num_groups, dtype=np.int64)
    rank[sorted_groups] = np.arange(num_groups)
    number = rank[group]
    row = stable_order(number)
    counts = np.bincount(user, minlength=num_users + 1)
    ordered = np.repeat(np.arange(num_groups), np.bincount(number, minlength=num_groups))
    if time_unit is None:
        # Numbers left unused by `group` sort first, as user 0, so they shift nothing.
        user_of_group = group_user[sorted_groups]
        place = np.arange(num_groups) - np.searchsorted(user_of_group, user_of_group)
    else:
        place = group_time[sorted_groups] // time_unit
    histories = Histories(
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        item=item[row],
        time=place[ordered],
        group=ordered,
        action=np.ones(len(row), dtype=np.int64) if action is None else action[row].astype(np.int64, copy=False),
        value=np.ones(len(row), dtype=np.float32) if value is None else value[row].astype(np.float32, copy=False),
    )
    return histories, row


def events_of(histories: Histories, users: Int) -> Int:
    """Indices of all events of the given user rows [n], end to end."""
    return ranges(histories.offsets[users], histories.offsets[users + 1])[0]


def _number_pairs(first: Int, second: Int) -> Int:
    """Dense numbers for the distinct pairs, sorted by pair."""
    order = stable_order(second, first)
    fresh = np.ones(len(order), dtype=bool)
    fresh[1:] = (first[order][1:] != first[order][:-1]) | (second[order][1:] != second[order][:-1])
    numbers = np.empty(len(order), dtype=np.int64)
    numbers[order] = np.cumsum(fresh) - 1
    return numbers


class Columns(Protocol):
    """Anything that gives columns by name: a frame, or columns on disk."""

    def __getitem__(self, name: str, /) -> pl.Series:
        """The column [N]."""


def column_of(frame: Columns, name: str, row: Int) -> pl.Series:
    """One column of the events in the order of the histories."""
    column: Any = frame[name].gather(row)
    return column
