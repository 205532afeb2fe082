"""Histories and requests become tensors. Training, evaluation and serving all make their batches here, so they can not skew.

B requests, total = all history events (or all candidates) of the batch end to end, P supervised positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shortlist.data.histories import Histories, Int, Requests, ranges
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Column, FieldTable

_C = TypeVar("_C", Tensor, Jagged, Column)


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """Past events of each request, oldest first; all tensors but `items.offsets` are [total]."""

    items: Jagged
    """int64 catalogue rows."""
    time: Tensor
    """int64 seconds."""
    action: Tensor
    """int64 action ids."""
    value: Tensor
    """float32."""
    group: Tensor
    """int64: events with the same number happened together."""

    def last(self, count: int) -> History:
        """Only the newest `count` events of each request."""
        if not len(self.items.values) or int(self.items.lengths.max()) <= count:
            return self
        left_B = (self.items.lengths - count).clamp(min=0)
        keep = self.items.position_of_value >= left_B[self.items.row_of_value]
        return History(
            items=Jagged.from_lengths(self.items.values[keep], self.items.lengths - left_B),
            time=self.time[keep],
            action=self.action[keep],
            value=self.value[keep],
            group=self.group[keep],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """Items to be scored for each request."""

    rows: Jagged
    """int64 catalogue rows [total]."""
    pair: Mapping[str, Tensor] = field(default_factory=dict)
    """User-item fields by name, float32 [total] each, as `Space.pair_fields` lists them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NextTargets:
    """Supervision of a next-event batch: positions that end a group, each with all items of the user's next group."""

    position: Tensor
    """int64 [P]: index into the history's values; only events at or before it may be read to predict."""
    items: Jagged
    """P rows of int64 catalogue rows: what was chosen next, distinct within the row."""
    weight: Tensor
    """float32, one per value of `items`."""


class Criterion(Protocol):
    """A loss of its own for one or several tasks, in place of that of their labels; a dataclass whose tensors move with the batch."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Whose loss it is."""

    def __call__(self, scores: Mapping[str, Tensor], weight: Tensor | None) -> Tensor:
        """The loss, a scalar, from logits [total] by task and the batch's weights [total]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """B requests as tensors on one device. `candidates`, `labels` and `targets` are there when the work needs them."""

    user: Tensor
    """int64 [B] user rows, 0 = unknown."""
    time: Tensor
    """int64 [B] seconds: when the request is made; never before the last event of its history."""
    history: History
    user_fields: Mapping[str, Column] = field(default_factory=dict)
    """Columns [B, ...] by field name."""
    context: Mapping[str, Column] = field(default_factory=dict)
    """Columns [B, ...] by field name."""
    candidates: Candidates | None = None
    labels: Mapping[str, Tensor] = field(default_factory=dict)
    """float32 [total] per task, aligned with the candidates."""
    weight: Tensor | None = None
    """float32 [total], aligned with the candidates; None = all 1."""
    sample_kind: Tensor | None = None
    """int64 [total] of streamed rows: what the row is to its click, such as the late copy of a conversion; see training/feedback."""
    emitted_at: Tensor | None = None
    """int64 [total] seconds of streamed rows: when the label was known as it stands."""
    criteria: tuple[Criterion, ...] = ()
    """Losses of tasks that labels alone do not decide; given to a batch when it is whole, since they can not be cut."""
    excluded: Jagged | None = None
    """Catalogue rows that must not be retrieved, per request."""
    targets: NextTargets | None = None
    key: tuple[str, ...] = ()
    """Who asks, one per request, for what systems remember between requests; empty = nobody is remembered."""

    @property
    def size(self) -> int:
        """B."""
        return len(self.user)

    @property
    def candidate_rows(self) -> Jagged:
        """Rows of the candidates; a ValueError where the batch has none."""
        if self.candidates is None:
            raise ValueError("this batch has no candidates to score; build it with candidates=...")
        return self.candidates.rows

    def with_candidates(
        self, rows: Jagged, pair: Mapping[str, Tensor] | None = None, labels: Mapping[str, Tensor] | None = None
    ) -> Batch:
        """The same requests with other candidates."""
        # Written out, since `replace` takes longer than what a light system does with the candidates.
        return Batch(
            user=self.user,
            time=self.time,
            history=self.history,
            user_fields=self.user_fields,
            context=self.context,
            excluded=self.excluded,
            targets=self.targets,
            key=self.key,
            candidates=Candidates(rows=rows, pair=pair or {}),
            labels=labels or {},
        )

    def select(self, index: Tensor) -> Batch:
        """The requests at `index` (int64 [B']), in that order; of a batch without candidates and targets, which ends in a ValueError."""
        if self.candidates is not None or self.targets is not None:
            raise ValueError(
                "only requests without candidates and targets can be selected; select before they are added"
            )
        where = self.history.items.value_index(index)
        columns = {name: getattr(self.history, name)[where] for name in ("time", "action", "value", "group")}
        return replace(
            self,
            user=self.user[index],
            time=self.time[index],
            history=History(items=self.history.items.select(index), **columns),
            user_fields={name: _chosen(column, index) for name, column in self.user_fields.items()},
            context={name: _chosen(column, index) for name, column in self.context.items()},
            excluded=None if self.excluded is None else self.excluded.select(index),
            key=tuple(self.key[i] for i in index.tolist()) if self.key else (),
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device."""
        moved = {f.name: _move(getattr(self, f.name), device) for f in fields(self)}
        return Batch(**moved)


def _chosen(column: Column, index: Tensor) -> Column:
    return column.select(index) if isinstance(column, Jagged) else column[index]


def _move(thing: Any, device: torch.device | str) -> Any:
    """Tensors, jagged rows and groups of them, on another device; what holds no tensor stays as it is."""
    if thing is None:
        return None
    if isinstance(thing, Tensor | Jagged):
        return thing.to(device)
    if isinstance(thing, tuple):
        return tuple(_move(inner, device) for inner in thing)
    if isinstance(thing, Mapping):
        return {name: _move(value, device) for name, value in thing.items()}
    if not is_dataclass(thing) or isinstance(thing, type):
        return thing
    return type(thing)(**{f.name: _move(getattr(thing, f.name), device) for f in fields(thing)})


def request_batch(
    histories: Histories,
    users: FieldTable,
    requests: Requests,
    *,
    max_history: int,
    exclude_history: bool = False,
    key: tuple[str, ...] = (),
) -> Batch:
    """A batch of all given requests, without candidates.

    Args:
        histories: events that the requests' `start` and `end` point into.
        users: user fields; rows beyond the table are read as the unknown user.
        requests: R of them; B = R.
        max_history: newest events kept per request.
        exclude_history: forbid retrieval of everything in the (uncut) history, for surfaces that never repeat.
        key: as of the batch.
    """
    start = np.maximum(requests.start, requests.end - max_history)
    index, lengths = ranges(start, requests.end)
    history = _history(histories, index, lengths)
    known = torch.from_numpy(np.where(requests.user < users.num_rows, requests.user, 0))
    excluded = None
    if exclude_history:
        seen, seen_lengths = ranges(requests.start, requests.end)
        excluded = Jagged.from_lengths(torch.from_numpy(histories.item[seen]), torch.from_numpy(seen_lengths))
    return Batch(
        user=known,
        time=torch.from_numpy(np.array(requests.time)),
        history=history,
        user_fields=users.gather(known),
        context={name: torch.from_numpy(np.array(column)) for name, column in requests.context.items()},
        excluded=excluded,
        key=key,
    )


def split_batch(batch: Batch, sizes: Sequence[int]) -> Iterator[Batch]:
    """The batch cut into batches of so many requests, in order; they share its memory. The sizes add up to B."""
    if sum(sizes) != batch.size:
        raise ValueError(f"a batch of {batch.size} requests is to be cut, got sizes {list(sizes)}")
    if batch.criteria:
        raise ValueError("a batch with criteria can not be cut; give them to the parts")
    sizes = list(sizes)
    user, time, items = batch.user.split(sizes), batch.time.split(sizes), _cut(batch.history.items, sizes)
    num_events = [len(part.values) for part in items]
    events = {name: getattr(batch.history, name).split(num_events) for name in ("time", "action", "value", "group")}
    user_fields = {name: _cut(column, sizes) for name, column in batch.user_fields.items()}
    context = {name: _cut(column, sizes) for name, column in batch.context.items()}
    excluded = None if batch.excluded is None else _cut(batch.excluded, sizes)
    targets = None if batch.targets is None else _cut_targets(batch.targets, num_events)
    rows: Sequence[Jagged] = [] if batch.candidates is None else _cut(batch.candidates.rows, sizes)
    num_rows = [len(part.values) for part in rows]
    pair = {} if batch.candidates is None else {name: c.split(num_rows) for name, c in batch.candidates.pair.items()}
    labels = {task: column.split(num_rows) for task, column in batch.labels.items()}
    by_row = {name: getattr(batch, name) for name in ("weight", "sample_kind", "emitted_at")}
    by_row = {name: column.split(num_rows) for name, column in by_row.items() if column is not None}
    first = 0
    for i, size in enumerate(sizes):
        yield Batch(
            user=user[i],
            time=time[i],
            history=History(items=items[i], **{name: parts[i] for name, parts in events.items()}),
            user_fields={name: parts[i] for name, parts in user_fields.items()},
            context={name: parts[i] for name, parts in context.items()},
            candidates=Candidates(rows=rows[i], pair={name: parts[i] for name, parts in pair.items()})
            if rows
            else None,
            labels={task: parts[i] for task, parts in labels.items()},
            **{name: parts[i] for name, parts in by_row.items()},
            excluded=None if excluded is None else excluded[i],
            targets=None if targets is None else targets[i],
            key=batch.key[first : first + size],
        )
        first += size


def _cut(column: _C, sizes: list[int]) -> Sequence[_C]:
    """A column [B, ...] cut into parts of so many rows; they share its memory."""
    if isinstance(column, Tensor):
        return column.split(sizes)
    ends = [0, *accumulate(sizes)]
    at = column.offsets[ends].tolist()
    values = column.values.split([b - a for a, b in pairwise(at)])
    offsets = [column.offsets[first : last + 1] - a for (first, last), a in zip(pairwise(ends), at, strict=False)]
    return [Jagged(*part) for part in zip(values, offsets, strict=True)]


def _cut_targets(targets: NextTargets, num_events: list[int]) -> list[NextTargets]:
    """The supervision of parts with so many history events each."""
    ends = [0, *accumulate(num_events)]
    # Positions rise, since they follow the history.
    num_positions = torch.searchsorted(targets.position, torch.tensor(ends)).diff().tolist()
    items = _cut(targets.items, num_positions)
    weight = targets.weight.split([len(part.values) for part in items])
    position = targets.position.split(num_positions)
    return [
        NextTargets(position=p - first, items=i, weight=w)
        for p, i, w, first in zip(position, items, weight, ends, strict=False)
    ]


def target_candidates(requests: Requests) -> Jagged:
    """The requests' own targets as candidates (all positive): what a two-tower trains on."""
    return Jagged(torch.from_numpy(np.array(requests.target)), torch.from_numpy(np.array(requests.target_offsets)))


def labels_of(candidates: Jagged, requests: Requests) -> tuple[Tensor, Tensor]:
    """Label and worth of each candidate: float32 [total] each; 1 and the target's value where the request chose it, else 0."""
    width = (
        int(max(int(candidates.values.max()) if len(candidates.values) else 0, int(requests.target.max(initial=0)))) + 1
    )
    request_of_target = np.repeat(np.arange(len(requests)), np.diff(requests.target_offsets))
    target_key = request_of_target * width + requests.target
    order = np.argsort(target_key, kind="stable")
    key = (candidates.row_of_value * width + candidates.values).numpy()
    if not len(target_key):
        return torch.zeros(len(key)), torch.zeros(len(key))
    place = np.searchsorted(target_key[order], key).clip(max=len(order) - 1)
    found = target_key[order][place] == key
    value = np.where(found, requests.target_value[order][place], 0.0)
    return torch.from_numpy(found.astype(np.float32)), torch.from_numpy(value.astype(np.float32))


def next_event_batch(
    histories: Histories,
    users: FieldTable,
    user_rows: Int,
    *,
    max_history: int,
    ends: Int | None = None,
) -> Batch:
    """One sequence per user, supervised at every position that ends a group.

    Inputs are the user's groups but the last one seen; at the last event of each group the targets are the distinct items of the next
    group, each weighing 1 / their number, so that a position weighs 1. Users with fewer than two groups give no position.

    Args:
        user_rows: [B] users.
        max_history: newest input events kept.
        ends: [B] one past the last event that may be seen, for random windows; None = all of the user's events.
    """
    start = histories.offsets[user_rows]
    stop = histories.offsets[user_rows + 1] if ends is None else ends
    # Drop the last group from the inputs: it is only ever a target.
    last_group = _newest(histories.group, start, stop, otherwise=-1)
    index, lengths = ranges(start, stop)
    owner = np.repeat(np.arange(len(user_rows)), lengths)
    is_input = histories.group[index] != last_group[owner]
    input_end = start + np.bincount(owner, weights=is_input, minlength=len(user_rows)).astype(np.int64)
    input_start = np.maximum(start, input_end - max_history)
    kept, kept_lengths = ranges(input_start, input_end)
    owner = np.repeat(np.arange(len(user_rows)), kept_lengths)

    # An input position is supervised when the event after it opens a new group (true by construction for the last input).
    group = histories.group[kept]
    ends_group = histories.group[kept + 1] != group if len(kept) else np.zeros(0, dtype=bool)
    position = np.flatnonzero(ends_group)
    first_target = kept[position] + 1
    boundaries = np.append(first_target, 0)
    # The next group ends where the next supervised position of the same user stands, or at the user's stop.
    same_user = owner[position][1:] == owner[position][:-1]
    group_end = stop[owner[position]]
    group_end[:-1] = np.where(same_user, boundaries[1:-1], group_end[:-1])
    targets, target_lengths = ranges(first_target, group_end)
    rows, row_lengths = _distinct(histories.item[targets], target_lengths)
    weight = np.repeat(1.0 / np.maximum(row_lengths, 1), row_lengths).astype(np.float32)

    known = torch.from_numpy(np.asarray(user_rows, dtype=np.int64))
    return Batch(
        user=known,
        time=torch.from_numpy(_newest(histories.time, start, stop, otherwise=0)),
        history=_history(histories, kept, kept_lengths),
        user_fields=users.gather(known),
        targets=NextTargets(
            position=torch.from_numpy(position),
            items=Jagged.from_lengths(torch.from_numpy(rows), torch.from_numpy(row_lengths)),
            weight=torch.from_numpy(weight),
        ),
    )


def _history(histories: Histories, index: Int, lengths: Int) -> History:
    where = torch.from_numpy(index)
    columns = {name: _taken(getattr(histories, name), where) for name in ("item", "time", "action", "value", "group")}
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    lengths.cumsum(out=offsets[1:])
    return History(items=Jagged(columns.pop("item"), torch.from_numpy(offsets)), **columns)


def _taken(column: NDArray[Any], index: Tensor) -> Tensor:
    """column[index] [n] as a tensor; memory maps, which torch can not hold, are read by NumPy."""
    if column.flags.writeable:
        return torch.from_numpy(column).index_select(0, index)
    return torch.from_numpy(np.asarray(column)[index.numpy()])


def _newest(values: Int, start: Int, stop: Int, *, otherwise: int) -> Int:
    """values[stop[i] - 1] of each row i, `otherwise` where start[i] .. stop[i] is empty."""
    newest = np.full(len(start), otherwise, dtype=np.int64)
    filled = stop > start
    newest[filled] = values[stop[filled] - 1]
    return newest


def _distinct(values: Int, lengths: Int) -> tuple[Int, Int]:
    """Distinct values within each row, sorted, and their number per row [P]."""
    row = np.repeat(np.arange(len(lengths)), lengths)
    order = np.lexsort((values, row))
    row, values = row[order], values[order]
    fresh = np.ones(len(values), dtype=bool)
    fresh[1:] = (row[1:] != row[:-1]) | (values[1:] != values[:-1])
    return values[fresh], np.bincount(row[fresh], minlength=len(lengths)).astype(np.int64)
