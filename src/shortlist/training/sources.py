"""Where training batches come from. A batch is a pure function of (seed, epoch, step), so training resumes at any step.

B rows of a batch (users or requests), U users, R requests.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shortlist.data.batches import Batch, Candidates, next_event_batch, request_batch, split_batch, target_candidates
from shortlist.data.histories import Histories, Int, Requests, View
from shortlist.data.jagged import Jagged
from shortlist.data.schema import FieldTable
from shortlist.errors import ConfigError, DataError

BATCHES_PER_BUCKET = 64
"""With length bucketing, so many batches are sorted by length among themselves: enough to save padding, few enough to stay random."""

REQUESTS_AT_ONCE = 4_096
"""Small batches are built together, so many requests at a time, and cut apart: most of the work of a small one is calls, not data."""


@runtime_checkable
class BatchSource(Protocol):
    """What the trainer reads."""

    def steps_per_epoch(self) -> int:
        """Batches of one epoch, the same for every epoch."""

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step `start` on; those before it are not built."""


class NextEventSource:
    """One sequence per user and epoch, supervised at every end of a group.

    Args:
        view: training-time events; users with fewer than two groups have nothing to predict and are left out.
        batch_size: users per batch.
        max_history: newest input events kept.
        seed: of the order and of the windows.
        random_window: a user with more events than `max_history` shows another stretch of them each epoch, ending at a group's end,
            instead of always the newest.
        bucket_by_length: users of similar length share a batch, which saves padding.

    Raises DataError when no user has two groups.
    """

    def __init__(
        self,
        view: View,
        *,
        batch_size: int,
        max_history: int,
        seed: int = 0,
        random_window: bool = False,
        bucket_by_length: bool = False,
    ) -> None:
        _check_sizes(batch_size, max_history)
        self.view = view
        self.batch_size, self.max_history, self.seed = batch_size, max_history, seed
        histories = view.histories
        start, stop = histories.offsets[:-1], histories.offsets[1:]
        filled = np.flatnonzero(stop - start >= 2)
        self.users: Int = filled[histories.group[start[filled]] != histories.group[stop[filled] - 1]]
        if not len(self.users):
            raise DataError(
                f"no user of {histories.num_users:,} has events at two different times before the cut, so there is no next event "
                "to learn from; move the cut later or choose a system that needs no order"
            )
        lengths = (stop - start)[self.users]
        self.lengths = np.minimum(lengths, max_history) if bucket_by_length else None
        self.group_ends: Int | None = None
        if random_window and int(lengths.max()) > max_history:
            changes = np.flatnonzero(np.diff(histories.group)) + 1
            self.group_ends = np.union1d(changes, histories.offsets)

    def steps_per_epoch(self) -> int:
        """See BatchSource."""
        return -(-len(self.users) // self.batch_size)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See BatchSource."""
        order = _epoch_order(len(self.users), self.batch_size, self.seed, epoch, self.lengths)
        for steps in _together(start, self.steps_per_epoch(), self.batch_size):
            parts = [self.users[part] for part in _parts(order, steps, self.batch_size)]
            ends = None
            if self.group_ends is not None:
                ends = np.concatenate([self._ends(part, epoch, step) for part, step in zip(parts, steps, strict=True)])
            batch = next_event_batch(
                self.view.histories,
                self.view.users,
                np.concatenate(parts),
                max_history=self.max_history,
                ends=ends,
            )
            yield from split_batch(batch, [len(part) for part in parts])

    def _ends(self, users: Int, epoch: int, step: int) -> Int:
        """[B] one past the last event shown: a random group end that leaves a full window, the user's end where all fits."""
        assert self.group_ends is not None
        first, stop = self.view.histories.offsets[users], self.view.histories.offsets[users + 1]
        # The last group is only ever a target: one event more than the window fills it, and one group alone teaches nothing.
        second_group = self.group_ends[np.searchsorted(self.group_ends, first + 1)] + 1
        earliest = np.minimum(np.maximum(first + self.max_history + 1, second_group), stop)
        drawn = _generator(self.seed, epoch, step).integers(earliest, stop, endpoint=True)
        ends: Int = self.group_ends[np.searchsorted(self.group_ends, drawn)]
        return ends


class TargetSource:
    """Past requests with what was then chosen as their candidates, all positive.

    Args:
        view: training-time events, which the requests' `start` and `end` point into, and the users' fields.
        requests: R past requests; those without a target are left out.
        batch_size: requests per batch.
        max_history: newest events kept per request.
        max_targets: targets kept per request, drawn anew each epoch; None = all.
        seed: of the order and the draws.
        bucket_by_length: requests with histories of similar length share a batch.

    Raises DataError when no request has a target.
    """

    def __init__(
        self,
        view: View,
        requests: Requests,
        *,
        batch_size: int,
        max_history: int,
        max_targets: int | None = None,
        seed: int = 0,
        bucket_by_length: bool = False,
    ) -> None:
        _check_sizes(batch_size, max_history)
        if max_targets is not None and max_targets < 1:
            raise ConfigError(f"max_targets must be at least 1, got {max_targets}; leave it out to keep all")
        self.view, self.requests = view, requests
        self.batch_size, self.max_history, self.max_targets, self.seed = batch_size, max_history, max_targets, seed
        self.kept: Int = np.flatnonzero(np.diff(requests.target_offsets) > 0)
        if not len(self.kept):
            raise DataError(f"none of {len(requests):,} past requests has a target, so there is nothing to learn from")
        self.lengths = _history_lengths(requests, max_history)[self.kept] if bucket_by_length else None

    def steps_per_epoch(self) -> int:
        """See BatchSource."""
        return -(-len(self.kept) // self.batch_size)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See BatchSource."""
        order = _epoch_order(len(self.kept), self.batch_size, self.seed, epoch, self.lengths)
        for steps in _together(start, self.steps_per_epoch(), self.batch_size):
            parts = [self.kept[part] for part in _parts(order, steps, self.batch_size)]
            requests = self.requests.select(np.concatenate(parts))
            whole = request_batch(self.view.histories, self.view.users, requests, max_history=self.max_history)
            whole = whole.with_candidates(target_candidates(requests))
            for step, batch in zip(steps, split_batch(whole, [len(part) for part in parts]), strict=True):
                yield batch if self.max_targets is None else self._some_targets(batch, epoch, step)

    def _some_targets(self, batch: Batch, epoch: int, step: int) -> Batch:
        rows = batch.candidate_rows
        limit = np.full(batch.size, self.max_targets)
        keep = _random_subset(rows, limit, _generator(self.seed, epoch, step))
        return batch.with_candidates(rows.keep(keep))


class CandidateSource:
    """Past requests with what the earlier stages let through, labelled.

    Args:
        histories: events that the requests' `start` and `end` point into.
        users: user fields.
        requests: R past requests.
        candidates: R rows of catalogue rows, total of them end to end, with their pair fields.
        labels: float32 [total] per task. A candidate is positive when any label is above 0.
        batch_size: requests per batch.
        max_history: newest events kept per request.
        num_negatives: candidates without a positive label kept per request, drawn anew each epoch; None = all. Positives are always
            kept, so the share of positives rises: order is not affected, calibration is.
        only_chosen: leave out requests without a positive. False where candidates are what was shown, and showing what nobody wants is
            a lesson too.
        seed: of the order and the draws.

    Raises DataError when sizes differ or no request has a positive candidate.
    """

    def __init__(
        self,
        histories: Histories,
        users: FieldTable,
        requests: Requests,
        candidates: Candidates,
        labels: Mapping[str, Tensor],
        *,
        batch_size: int,
        max_history: int,
        num_negatives: int | None = None,
        only_chosen: bool = True,
        seed: int = 0,
    ) -> None:
        _check_sizes(batch_size, max_history)
        if num_negatives is not None and num_negatives < 1:
            raise ConfigError(f"num_negatives must be at least 1, got {num_negatives}; leave it out to keep all")
        _check_candidates(requests, candidates, labels)
        self.histories, self.users, self.requests, self.candidates = histories, users, requests, candidates.rows
        self.asked = requests.without_targets()
        self.pair, self.labels = dict(candidates.pair), dict(labels)
        self.batch_size, self.max_history, self.num_negatives, self.seed = batch_size, max_history, num_negatives, seed
        self.positive = torch.stack(list(labels.values())).gt(0).any(0)
        counted = self.positive if only_chosen else torch.ones_like(self.positive)
        self.kept: Int = np.flatnonzero(candidates.rows.count(counted).numpy())
        if not self.positive.any():
            raise DataError(
                f"none of {len(requests):,} requests has a positive candidate: the earlier stages let nothing through that was "
                "then chosen; let them keep more, or check the labels"
            )

    def with_columns(self, columns: Mapping[str, Tensor]) -> CandidateSource:
        """The same with further columns [total], handed on among the labels of a batch; they make no candidate positive.

        Raises DataError where a column has another length.
        """
        _check_columns(columns, len(self.candidates.values))
        made = copy.copy(self)
        made.labels = {**self.labels, **columns}
        return made

    def steps_per_epoch(self) -> int:
        """See BatchSource."""
        return -(-len(self.kept) // self.batch_size)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See BatchSource."""
        order = _epoch_order(len(self.kept), self.batch_size, self.seed, epoch, None)
        for steps in _together(start, self.steps_per_epoch(), self.batch_size):
            parts = [self.kept[part] for part in _parts(order, steps, self.batch_size)]
            index, lengths_B = self._candidates_of(parts, epoch, steps)
            requests = self.asked.select(np.concatenate(parts))
            batch = request_batch(self.histories, self.users, requests, max_history=self.max_history).with_candidates(
                Jagged.from_lengths(self.candidates.values.index_select(0, index), lengths_B),
                {name: column.index_select(0, index) for name, column in self.pair.items()},
                {task: column.index_select(0, index) for task, column in self.labels.items()},
            )
            yield from split_batch(batch, [len(part) for part in parts])

    def _candidates_of(self, parts: Sequence[Int], epoch: int, steps: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Positions in the candidates' values of those kept for the steps' requests, end to end, and their number per request."""
        if self.num_negatives is None:
            return self.candidates.where(torch.from_numpy(np.concatenate(parts)))
        drawn = [self._drawn(torch.from_numpy(part), epoch, step) for part, step in zip(parts, steps, strict=True)]
        return torch.cat([index for index, _ in drawn]), torch.cat([lengths_B for _, lengths_B in drawn])

    def _drawn(self, chosen_B: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """The same for one step, whose draws are its own."""
        index, lengths_B = self.candidates.where(chosen_B)
        rows = Jagged.from_lengths(index, lengths_B)
        positive = self.positive[index]
        limit_B = (rows.count(positive) + (self.num_negatives or 0)).numpy()
        keep = _random_subset(rows, limit_B, _generator(self.seed, epoch, step), first=positive)
        return index[keep], rows.count(keep)


def _together(start: int, steps: int, batch_size: int) -> Iterator[range]:
    """The steps from `start` on in runs that are built at once."""
    run = max(REQUESTS_AT_ONCE // batch_size, 1)
    for first in range(start, steps, run):
        yield range(first, min(first + run, steps))


def _parts(order: Int, steps: Sequence[int], batch_size: int) -> list[Int]:
    """The stretch of the order that belongs to each step."""
    return [order[step * batch_size : (step + 1) * batch_size] for step in steps]


def _check_sizes(batch_size: int, max_history: int) -> None:
    if batch_size < 1 or max_history < 1:
        raise ConfigError(f"batch_size and max_history must be at least 1, got {batch_size} and {max_history}")


def _check_candidates(requests: Requests, candidates: Candidates, labels: Mapping[str, Tensor]) -> None:
    rows = candidates.rows
    if rows.num_rows != len(requests):
        raise DataError(f"{rows.num_rows:,} rows of candidates for {len(requests):,} requests; give one row each")
    if not labels:
        raise DataError("candidates to train on need at least one label")
    _check_columns({**candidates.pair, **labels}, len(rows.values))


def _check_columns(columns: Mapping[str, Tensor], total: int) -> None:
    for name, column in columns.items():
        if len(column) != total:
            raise DataError(f"column {name!r} has {len(column):,} values for {total:,} candidates")


def _history_lengths(requests: Requests, max_history: int) -> Int:
    return np.minimum(requests.end - requests.start, max_history)


def _generator(seed: int, *place: int) -> np.random.Generator:
    """Random numbers that depend on the seed and the place in training alone."""
    return np.random.default_rng([seed, *place])


def _epoch_order(num_rows: int, batch_size: int, seed: int, epoch: int, lengths: Int | None) -> Int:
    """A permutation of 0..num_rows-1; with lengths [num_rows], rows of similar length stand in the same batch."""
    generator = _generator(seed, epoch)
    order = generator.permutation(num_rows)
    if lengths is None:
        return order
    bucket = np.arange(num_rows) // (batch_size * BATCHES_PER_BUCKET)
    order = order[np.lexsort((lengths[order], bucket))]
    # Whole batches are shuffled, so that short and long ones alternate; a shorter last batch keeps its place.
    num_whole = num_rows // batch_size
    whole = order[: num_whole * batch_size].reshape(num_whole, batch_size)
    return np.concatenate([generator.permutation(whole).reshape(-1), order[num_whole * batch_size :]])


def _random_subset(
    rows: Jagged, limit_B: NDArray[np.int64], generator: np.random.Generator, first: Tensor | None = None
) -> Tensor:
    """Bool [total]: at most limit_B random values of each row, those with `first` [total] True before all others."""
    row = rows.row_of_value.numpy()
    key = generator.random(len(row), dtype=np.float64)
    if first is not None:
        key = key - first.numpy()
    order = np.lexsort((key, row))
    keep = np.zeros(len(row), dtype=bool)
    keep[order] = rows.position_of_value.numpy() < limit_B[row]
    return torch.from_numpy(keep)
