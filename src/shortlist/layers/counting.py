"""Counting that the closed-form retrievers share: popularity, recency in groups, sums over pairs of items, and falling back.

B requests, E events (of a batch or of the log), N = n + 1 catalogue rows, row 0 unknown: it is never counted and never a reason.
A sparse matrix of items is kept as `offsets [N + 1]`, `columns` and `weights`: its row i is entries offsets[i] .. offsets[i + 1].
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shortlist.data.batches import History
from shortlist.data.histories import Histories, Int, View
from shortlist.data.jagged import Jagged

PAIRS_AT_ONCE = 1 << 22  # entries expanded together, about 100 MB with their sums
ENTRIES_AT_ONCE = 1 << 17  # of sparse rows; more do not fit the processor's cache
TIE_BREAK = 1e-4  # popularity decides between scores nearer to each other than this share
SECONDS_PER_DAY = 86_400.0
Weights = NDArray[np.float64]
# PyTorch says so at the first use of every process; what is used here is compared with the plain form by a test.
warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)


class SparseRows(NamedTuple):
    """A sparse [N, N] matrix."""

    offsets: Tensor
    """int64 [N + 1]."""
    columns: Tensor
    """int32, rising within a row."""
    weights: Tensor
    """float32."""

    def check(self) -> None:
        """ValueError where offsets or columns point outside: products of sparse matrices read there without looking."""
        offsets, columns, weights = self
        whole = offsets.dtype == torch.int64 and columns.dtype in (torch.int32, torch.int64)
        flat = offsets.dim() == columns.dim() == weights.dim() == 1 and len(offsets) > 0
        if not whole or not flat or len(columns) != len(weights):
            raise ValueError("a sparse matrix is rows of whole numbers with a weight beside each")
        if int(offsets[0]) != 0 or int(offsets[-1]) != len(columns) or bool((offsets.diff() < 0).any()):
            raise ValueError("the offsets of a sparse matrix rise from 0 to the number of its columns")
        if len(columns) and not 0 <= int(columns.min()) <= int(columns.max()) < len(offsets) - 1:
            raise ValueError("the columns of a sparse matrix are rows of it too")


class UserItems(NamedTuple):
    """What each user chose, sorted by user, then item: C cells of the matrix of users and items."""

    offsets: Int
    """[U + 2]: cells of user row u are offsets[u] .. offsets[u + 1]."""
    user: Int
    """[C] user rows."""
    item: Int
    """[C] catalogue rows, known items only."""
    num_groups: Int
    """[C] in how many of the user's groups the item occurs."""
    groups_ago: Int
    """[C] how many of the user's groups came after the last of these."""


class PairSums(NamedTuple):
    """Sums of a block of rows, sorted by row, then column."""

    row: Int
    column: Int
    weight: Weights


def item_popularity(
    view: View, *, window_days: float | None = None, half_life_days: float | None = None, per_user: bool = False
) -> Tensor:
    """How often each item occurs, float32 [N].

    Args:
        window_days: count only events of the last so many days before `view.now`; None = all.
        half_life_days: an event of this age counts half; None = all alike.
        per_user: count a user once per item, by the newest event.

    Both times are ignored where the log has no clock.
    """
    histories = view.histories
    weight = (histories.item > 0).astype(np.float64)
    if view.space.has_clock:
        age_days = (view.now - histories.time) / SECONDS_PER_DAY
        if window_days is not None:
            weight *= age_days <= window_days
        if half_life_days is not None:
            weight *= np.exp2(-np.maximum(age_days, 0) / half_life_days)
    if per_user:
        newest = last_of_each(histories.user_of_event * view.space.items.num_rows + histories.item)
        weight *= newest
    counts = np.bincount(histories.item, weights=weight, minlength=view.space.items.num_rows)
    return torch.from_numpy(counts.astype(np.float32))


def popularity_order(view: View, window_days: float | None) -> Tensor:
    """What to show where nothing better is known, float32 [N] in 0..1: items of the last days by number of events, then all others."""
    lately_N = item_popularity(view, window_days=window_days)
    return (then_popular(lately_N / lately_N.max().clamp(min=1e-9), item_popularity(view)) + 1) / (2 + TIE_BREAK)


def last_of_each(keys: Int) -> NDArray[np.bool_]:
    """True where a key [E] occurs for the last time."""
    _, from_end = np.unique(keys[::-1], return_index=True)
    mask = np.zeros(len(keys), dtype=bool)
    mask[len(keys) - 1 - from_end] = True
    return mask


def distinct_in_groups(histories: Histories, num_rows: int) -> Histories:
    """The log with each known item once per group, so that ten lines of one item in a basket are one choice of it."""
    run = group_runs(histories)
    return histories.keep(last_of_each(run * num_rows + histories.item) & (histories.item > 0))


def user_items(histories: Histories, num_rows: int) -> UserItems:
    """The log as a sparse matrix of users and items."""
    run = group_runs(histories)
    last_run_of_user = run[np.maximum(histories.offsets[1:] - 1, 0)] if len(run) else np.zeros(0, np.int64)
    known = histories.item > 0
    user = histories.user_of_event[known]
    key = user * num_rows + histories.item[known]
    cells, cell_of_event = np.unique(key, return_inverse=True)
    newest = np.zeros(len(cells), dtype=np.int64)
    np.maximum.at(newest, cell_of_event, run[known])
    in_group = last_of_each(cell_of_event * (int(run[-1]) + 1) + run[known]) if len(run) else known
    owner = cells // num_rows
    return UserItems(
        offsets=np.searchsorted(owner, np.arange(len(histories.offsets))),
        user=owner,
        item=cells % num_rows,
        num_groups=np.bincount(cell_of_event[in_group], minlength=len(cells)),
        groups_ago=last_run_of_user[owner] - newest,
    )


def group_runs(histories: Histories) -> Int:
    """int64 [E]: 0 for the first group of the first user, 1 for the next one, ... : groups of all users, numbered through."""
    fresh = np.ones(histories.num_events, dtype=bool)
    fresh[1:] = np.diff(histories.group) != 0
    starts = histories.offsets[:-1]
    fresh[starts[starts < histories.num_events]] = True
    return np.cumsum(fresh) - 1


def groups_ago(history: History) -> Tensor:
    """int64 [E]: 0 for events of a request's newest group, 1 for the group before it, ..."""
    row = history.items.row_of_value
    if not len(row):
        return row
    fresh = torch.ones_like(row)
    fresh[1:] = ((history.group[1:] != history.group[:-1]) | (row[1:] != row[:-1])).to(row.dtype)
    number = fresh.cumsum(0)
    newest_B = number[(history.items.offsets[1:] - 1).clamp(min=0)]
    return newest_B[row] - number


def distinct_events(history: History, *, per_group: bool) -> Tensor:
    """bool [E]: the newest event of each known item per request, or per request and group."""
    items = history.items
    if not len(items.values):
        return torch.zeros(0, dtype=torch.bool, device=items.values.device)
    rank = groups_ago(history) if per_group else torch.zeros_like(items.values)
    width, depth = items.values.max() + 1, rank.max() + 1
    key = (items.row_of_value * depth + rank) * width + items.values
    order = key.argsort(stable=True)
    last = torch.ones_like(order, dtype=torch.bool)
    last[:-1] = key[order][1:] != key[order][:-1]
    mask = torch.zeros_like(last)
    mask[order] = last
    return mask & (items.values > 0)


def pair_sums(
    source: Int,
    start: Int,
    stop: Int,
    weight: Weights,
    partner: Int,
    partner_weight: Weights,
    num_rows: int,
    pairs_at_once: int = PAIRS_AT_ONCE,
) -> Iterator[PairSums]:
    """For events e and partners p in start[e] .. stop[e]: the sum of weight[e] * partner_weight[p] per (source[e], partner[p]).

    Comes in blocks of whole source items, so that memory depends on `pairs_at_once` (or the busiest item), not on N squared.

    Args:
        source, start, stop, weight: [E] catalogue row, range of partners and weight of each event.
        partner, partner_weight: [P] catalogue rows and weights that the ranges point into.
        num_rows: N.
    """
    order = np.argsort(source, kind="stable")
    source, start, stop, weight = source[order], start[order], stop[order], weight[order]
    pairs_of_item = np.bincount(source, weights=np.maximum(stop - start, 0), minlength=num_rows)
    block_of_item = (np.cumsum(pairs_of_item) // pairs_at_once).astype(np.int64)
    first_item = np.flatnonzero(np.diff(block_of_item, prepend=-1))
    first_event = np.append(np.searchsorted(source, first_item), len(source))
    for low, a, b in zip(first_item, first_event[:-1], first_event[1:]):
        length = np.maximum(stop[a:b] - start[a:b], 0)
        if not length.sum():
            continue
        shift = start[a:b] - (np.cumsum(length) - length)
        where = np.arange(length.sum()) + np.repeat(shift, length)
        key = np.repeat((source[a:b] - low) * num_rows, length) + partner[where]
        value = np.repeat(weight[a:b], length) * partner_weight[where]
        keys, sums = sum_by_key(key, value, (int(source[b - 1]) - int(low) + 1) * num_rows)
        yield PairSums(row=keys // num_rows + low, column=keys % num_rows, weight=sums)


def sum_by_key(key: Int, value: Weights, num_keys: int) -> tuple[Int, Weights]:
    """Distinct keys in rising order and the sums of their values; keys whose values sum to 0 may be left out."""
    if num_keys <= 8 * len(key):
        dense = np.bincount(key, weights=value, minlength=num_keys).astype(np.float64, copy=False)
        keys: Int = np.flatnonzero(dense)
        return keys, dense[keys]
    order = np.argsort(key, kind="stable")
    key, value = key[order], value[order]
    first = np.flatnonzero(np.diff(key, prepend=-1))
    sums = np.add.reduceat(value, first)
    return key[first].astype(np.int64), sums.astype(np.float64)


def sparse_rows(blocks: Iterator[PairSums] | list[PairSums], num_rows: int) -> SparseRows:
    """Blocks of rising rows as one sparse matrix."""
    kept = [(b.row, b.column.astype(np.int32), b.weight.astype(np.float32)) for b in blocks]
    empty = (np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))
    row, column, weight = (np.concatenate(parts) for parts in zip(empty, *kept))
    lengths = torch.from_numpy(np.bincount(row, minlength=num_rows))
    return SparseRows(
        offsets=Jagged.from_lengths(torch.from_numpy(row), lengths).offsets,
        columns=torch.from_numpy(column),
        weights=torch.from_numpy(weight),
    )


def add_sparse_rows(
    scores_BN: Tensor,
    request: Tensor,
    item: Tensor,
    weight: Tensor,
    matrix: SparseRows,
) -> Tensor:
    """Add to each request's scores the matrix rows of its events, in place: scores[request[e]] += weight[e] * matrix[item[e]].

    On the CPU this is a product of two sparse matrices by MKL, where PyTorch has it: the plain form spends its time on the places of
    single entries, some ten times as long where items have many neighbours. Both agree but for the order of additions.

    Args:
        scores_BN: float32 [B, N].
        request, item, weight: [E].
    """
    has_product = scores_BN.device.type == "cpu" and torch.backends.mkl.is_available()
    if not has_product or not len(item) or not 0 < len(matrix.columns) < 1 << 31:
        return plain_add_sparse_rows(scores_BN, request, item, weight, matrix)
    num_requests, num_rows = scores_BN.shape
    if len(matrix.offsets) != num_rows + 1:
        raise ValueError(f"the matrix has {len(matrix.offsets) - 1} rows where there are scores of {num_rows} items")
    pair, pair_of_event = torch.unique(request * num_rows + item, return_inverse=True)
    weight_of_pair = weight.new_zeros(len(pair)).index_add_(0, pair_of_event, weight)
    first_pair = torch.searchsorted(pair, torch.arange(num_requests + 1) * num_rows)
    chosen = torch.sparse_csr_tensor(
        first_pair.int(), (pair % num_rows).int(), weight_of_pair, (num_requests, num_rows), check_invariants=False
    )
    rows = torch.sparse_csr_tensor(
        matrix.offsets.int(), matrix.columns, matrix.weights, (num_rows, num_rows), check_invariants=False
    )
    # Not `chosen @ rows`: that product of two sparse matrices into a third loses some 40 KB of MKL's memory at every call (torch 2.13).
    return scores_BN.addmm_(chosen, rows)


def plain_add_sparse_rows(
    scores_BN: Tensor,
    request: Tensor,
    item: Tensor,
    weight: Tensor,
    matrix: SparseRows,
    entries_at_once: int = ENTRIES_AT_ONCE,
) -> Tensor:
    """The same entry by entry, on any device."""
    rows = Jagged(matrix.columns, matrix.offsets)
    lengths = rows.lengths[item]
    block = (lengths.cumsum(0) // entries_at_once).contiguous()
    num_blocks = int(block[-1]) + 1 if len(block) else 0
    cuts = torch.searchsorted(block, torch.arange(num_blocks + 1, device=block.device)).tolist()
    flat = scores_BN.view(-1)
    for a, b in pairwise(cuts):
        entry = rows.value_index(item[a:b])
        place = (request[a:b] * scores_BN.shape[1]).repeat_interleave(lengths[a:b]) + matrix.columns[entry]
        flat.index_add_(0, place, weight[a:b].repeat_interleave(lengths[a:b]) * matrix.weights[entry])
    return scores_BN


def then_popular(scores_BN: Tensor, popular_N: Tensor) -> Tensor:
    """Items with a score above 0 in its order, the rest behind them by popularity; near-ties go to the more popular item too.

    Without this, items that a count knows nothing of would come in the order of their rows, which is no order at all.
    """
    share_N = popular_N / popular_N.max().clamp(min=torch.finfo(popular_N.dtype).tiny)
    return torch.where(scores_BN > 0, scores_BN * (1 + TIE_BREAK * share_N), share_N - 1)
