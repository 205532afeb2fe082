"""What an engine tells of events: what became of those that it was given, and the newest of a user, to be shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shortlist.cascade.knowing import stored
from shortlist.cascade.live import Live
from shortlist.cascade.pasts import pasts
from shortlist.data.vocabulary import Id
from shortlist.store.events import Event, EventStore


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """What became of events."""

    num_new: int
    num_repeated: int
    """Were there already under their event_id."""
    num_unknown_users: int
    """Not in the snapshot; kept."""
    num_unknown_items: int
    """Not in the catalogue; kept, and counted in histories once a snapshot knows the item."""
    num_unknown_actions: int
    """Not seen in training; kept, and read as the unknown action."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """An event of a user's past, to be shown."""

    item_id: Id
    title: str | None
    timestamp: int | None
    """Seconds since 1970 UTC; None where it is not known, as in a log without a clock."""
    action: str | None


def recorded(live: Live, events: Sequence[Event], num_new: int) -> Recorded:
    """What became of events of which the store found `num_new` to be new."""
    named = [event.action for event in events if event.action is not None]
    return Recorded(
        num_new=num_new,
        num_repeated=len(events) - num_new,
        num_unknown_users=int((live.users([event.user for event in events]) == 0).sum()),
        num_unknown_items=int((live.items([event.item for event in events]) == 0).sum()),
        num_unknown_actions=int((live.action_ids(named) == 0).sum()),
    )


def seen(live: Live, events: EventStore | None, user: Id, count: int) -> list[Seen]:
    """The newest `count` events of a user, newest first; StoreUnavailable when the event store can not be read."""
    past = pasts(
        live.dataset.histories,
        live.users([user]),
        stored(live, events, [user]),
        has_clock=live.dataset.space.has_clock,
        newest=max(count, 1),
    )
    newest = slice(None, -count - 1, -1)
    rows, actions = past.item[newest], past.action[newest].tolist()
    times = past.time[newest].tolist() if live.dataset.space.has_clock else [None] * len(rows)
    names = (None, *live.dataset.space.actions)
    return [
        Seen(item_id=live.id(row), title=live.title(row), timestamp=then, action=names[action])
        for row, then, action in zip(rows.tolist(), times, actions)
    ]
