"""Near-line refresh: every user's whole history through the encoder, into a file beside the run that serving reads.

    RUN.summaries.NAME      of system NAME; store/summaries.py says how it is written

A user's history is the run's and what the event store has on top, put together by the code that serves requests, so summaries can not
skew from what a request would see. A refresh that was stopped goes on where it was; a server takes up the new file within a second or so.

U users, n items, K tokens of D numbers each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from shortlist.cascade.live import Live
from shortlist.cascade.pasts import newer_stored, pasts
from shortlist.data.batches import Batch, request_batch
from shortlist.data.histories import Int
from shortlist.data.vocabulary import Id
from shortlist.errors import ConfigError, SnapshotError
from shortlist.store.events import EventStore
from shortlist.store.memories import Backing
from shortlist.store.summaries import SummaryHead, SummaryStore, SummaryWriter

EVENTS_AT_ONCE = 1 << 18
"""Events of the users whose summaries are made together: what a refresh holds in memory, but for a user who alone has more."""
USERS_AT_ONCE = 4_096
ALL_EVENTS = 1 << 62


@runtime_checkable
class Summarising(Protocol):
    """A system whose user side is a summary of the whole history, which can be made before anyone asks."""

    @property
    def summary_shape(self) -> tuple[int, int]:
        """K and D."""

    def item_vectors(self) -> Tensor:
        """float32 [n + 1, D]: what `summaries` reads of items, made once for many calls."""

    def summaries(self, batch: Batch, item_ND: Tensor | None = None) -> SummaryColumns:
        """Summaries of the batch's histories, uncut."""


class SummaryColumns(Protocol):
    """Summaries of B users."""

    code: Tensor
    """int8 [B, K, D]."""
    scale: Tensor
    """float32 [B, K]."""
    time: Tensor
    """int64 [B] seconds of the newest event."""
    num_events: Tensor
    """int64 [B]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refreshed:
    """What became of one system's summaries."""

    system: str
    path: Path
    num_users: int
    num_resumed: int
    """Of the users, those that an earlier refresh had done before it was stopped."""
    num_events: int
    """Events read by this refresh."""
    seconds: float
    bytes_per_user: int
    """On disk, index included."""

    @property
    def users_per_second(self) -> float:
        """Of this refresh."""
        return (self.num_users - self.num_resumed) / max(self.seconds, 1e-9)

    @property
    def events_per_second(self) -> float:
        """Of this refresh."""
        return self.num_events / max(self.seconds, 1e-9)


class Done(NamedTuple):
    """How far a refresh is."""

    system: str
    num_users: int
    of_users: int
    num_events: int


def summary_path(folder: Path, system: str) -> Path:
    """Where a run's summaries are: beside it and not in it, since a run is replaced as a whole when it is trained again."""
    return folder.with_name(f"{folder.name}.summaries.{system}")


def refresh(
    live: Live,
    folder: Path,
    *,
    events: EventStore | None = None,
    fresh: bool = False,
    tell: Callable[[Done], None] = lambda done: None,
) -> list[Refreshed]:
    """Write the summaries of every user for every system of the run that reads them.

    Args:
        live: the run.
        folder: its folder; the files are written beside it.
        events: opened with a `max_per_user` that leaves nothing out; None = the run's own events alone.
        fresh: begin anew where an earlier refresh was stopped.
        tell: called after every chunk of users.

    Raises ConfigError where no system of the run reads summaries, SnapshotError where another refresh of the run is at work.
    """
    systems = _summarising(live)
    if not systems:
        raise ConfigError(f"no system of {folder} reads summaries; a cascade with vista does (examples/vista.toml)")
    users, rows, lengths = _everyone(live, events)
    return [_refresh(live, folder, name, users, rows, lengths, events, fresh, tell) for name in systems]


def open_summaries(live: Live) -> tuple[dict[str, Backing], list[str]]:
    """What stands behind the memories of a run's systems, by name, and what is wrong with files that can not be used."""
    backings: dict[str, Backing] = {}
    problems: list[str] = []
    if live.folder is None:
        return backings, problems
    for name in _summarising(live):
        path = summary_path(live.folder, name)
        if not path.exists():
            continue
        try:
            backings[name] = SummaryStore.open(path, version=live.version)
        except SnapshotError as error:
            problems.append(f"{name} has no summaries: {error}")
    return backings, problems


def _summarising(live: Live) -> dict[str, Summarising]:
    return {name: system for name, system in live.cascade.systems.items() if isinstance(system, Summarising)}


def _everyone(live: Live, events: EventStore | None) -> tuple[list[Id], Int, Int]:
    """All users, their rows and their events in the run [U]: the run's, longest history first, then those of the event store alone.

    Users who were forgotten are left out, or new ones where they came back. The order does not change while events come in, so that a
    refresh can go on where it was.
    """
    lengths = np.diff(live.dataset.histories.offsets)
    rows = np.argsort(-lengths[1:], kind="stable") + 1
    users: list[Id] = live.dataset.user_ids.ids.gather(rows - 1).to_list()
    if live.users.hides:
        known = live.users(users) > 0
        rows, users = rows[known], [user for user, is_known in zip(users, known.tolist()) if is_known]
    others = [] if events is None else events.users()
    unknown = live.users(others) == 0
    others = [user for user, is_new in zip(others, unknown.tolist()) if is_new]
    rows = np.concatenate([rows, np.zeros(len(others), dtype=np.int64)])
    return [*users, *others], rows, lengths[rows]


def _refresh(
    live: Live,
    folder: Path,
    name: str,
    users: list[Id],
    rows: Int,
    lengths: Int,
    events: EventStore | None,
    fresh: bool,
    tell: Callable[[Done], None],
) -> Refreshed:
    system = _summarising(live)[name]
    num_tokens, width = system.summary_shape
    head = SummaryHead(version=live.version, system=name, num_tokens=num_tokens, width=width)
    path = summary_path(folder, name)
    began, num_events = time.perf_counter(), 0
    with torch.no_grad(), SummaryWriter(path, head, [live.key(user) for user in users], fresh=fresh) as writer:
        num_resumed = writer.num_done
        item_ND = system.item_vectors()
        for start, stop in _chunks(lengths, writer.num_done):
            batch = whole_histories(live, users[start:stop], rows[start:stop], events).to(live.cascade.device)
            made = system.summaries(batch, item_ND)
            writer.append({column: getattr(made, column).cpu().numpy() for column in _COLUMNS})
            num_events += len(batch.history.items.values)
            tell(Done(name, stop, len(users), num_events))
        head = writer.finish()
    return Refreshed(
        system=name,
        path=path,
        num_users=len(users),
        num_resumed=num_resumed,
        num_events=num_events,
        seconds=time.perf_counter() - began,
        bytes_per_user=head.bytes_per_user,
    )


_COLUMNS = ("code", "scale", "time", "num_events")


def whole_histories(live: Live, users: list[Id], rows: Int, events: EventStore | None) -> Batch:
    """A request of each of the users [B], with all that is known of them, at the moment of their newest event."""
    newer = None if events is None else newer_stored(events, users, live.items, live.action_ids)
    past = pasts(live.dataset.histories, rows, newer, has_clock=live.dataset.space.has_clock)
    histories, requests = live.dataset.requests_for(users, rows=rows, histories=past)
    return request_batch(histories, live.user_fields, requests, max_history=ALL_EVENTS)


def _chunks(lengths: Int, start: int) -> Iterator[tuple[int, int]]:
    """Ranges of users from `start` on with about EVENTS_AT_ONCE events each."""
    ends = np.cumsum(lengths)
    while start < len(lengths):
        before = int(ends[start - 1]) if start else 0
        stop = int(np.searchsorted(ends, before + EVENTS_AT_ONCE, side="right"))
        stop = min(max(stop, start + 1), start + USERS_AT_ONCE, len(lengths))
        yield start, stop
        start = stop


def told(done: Sequence[Refreshed]) -> list[str]:
    """What became of them, a line each."""
    return [
        f"{r.system}: summaries of {r.num_users:,} users ({r.num_resumed:,} were there already), {r.bytes_per_user:,} bytes each, "
        f"in {r.path}; {r.num_events:,} events in {r.seconds:.1f} s: {r.users_per_second:,.0f} users/s, "
        f"{r.events_per_second:,.0f} events/s"
        for r in done
    ]
