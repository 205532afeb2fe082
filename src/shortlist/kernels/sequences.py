"""Sequences of different lengths and how they are cut into dense blocks: who may look at whom, and how far apart in time.

B sequences, T keys of all sequences end to end, S queries end to end (the last ones of each sequence; S = T without a cache), C classes
of sequences of similar length, R sequences of a class, I and J longest queries and keys of a class, t queries of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

TIME_BASE = 0.301
"""Each bucket spans a factor e^0.301 of seconds."""

CLASS_WIDTH = 16
"""Lengths 1..16 form a class, 17..32 the next."""
QUERY_TILE = 64
"""Queries of a block; a block reads only keys that its last query may see."""
CELLS_AT_ONCE = 1 << 16
"""Scores held at once, which then stay in the cache of a core."""
KEPT_BUCKETS = 1 << 26
"""Time buckets kept for the layers that follow, a byte each; where there are more, every layer finds them anew."""
MANTISSA_BITS = 4
"""Time differences are looked up by the exponent and so many bits of the mantissa."""
INT32_MAX = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class Sequences:
    """Who may look at whom, and how far apart they are. The queries of a sequence are its last keys.

    Of a sequence's keys the first `num_history` are seen by all that come after them; the rest are candidates, which see the
    history and themselves but not each other (M-FALCON, section 7).
    """

    offsets: Tensor
    """int64 [B + 1]: cuts of the keys."""
    query_offsets: Tensor
    """int64 [B + 1]: cuts of the queries; the same as `offsets` unless keys come from a cache."""
    num_history: Tensor
    """int64 [B]."""
    position: Tensor
    """int64 [T]: place of each key, counted so that candidates of one sequence may share one."""
    key_time: Tensor
    """int64 [T] seconds."""
    query_time: Tensor
    """int64 [S] seconds: the time that is asked about; for an event that of the next event, for the last one the request's."""
    _blocks: list[Blocks] = field(init=False, repr=False, compare=False, default_factory=list)

    @property
    def blocks(self) -> Blocks:
        """How attention is cut into blocks; made at first use and shared by the layers."""
        if not self._blocks:
            self._blocks.append(Blocks(self))
        return self._blocks[0]


def time_bucket(seconds: Tensor, num_buckets: int) -> Tensor:
    """int64 [...]: bucket of a time difference, in seconds (any sign)."""
    magnitude = seconds.abs().clamp(min=1).to(torch.float64)
    return (magnitude.log() / TIME_BASE).floor().long().clamp(max=num_buckets - 1)


class BucketTable(NamedTuple):
    """Buckets of differences below 2^31 seconds by the leading bits of the difference as float32; at most one bucket ends in between."""

    first: Tensor
    """int32: bucket of the smallest difference with these bits."""
    next_from: Tensor
    """int32: the difference from which on it is the next bucket."""


@lru_cache(maxsize=16)
def bucket_table(num_buckets: int, device: torch.device) -> BucketTable:
    """The table that gives what `time_bucket` gives, without a logarithm per pair."""
    number = torch.arange(num_buckets + 1)
    guess = (number.double() * TIME_BASE).exp().clamp(max=INT32_MAX).long()
    # The smallest whole number of seconds in each bucket, by the definition itself.
    near = guess[:, None] + torch.arange(-1, 3)
    starts_after = time_bucket(near, num_buckets + 1) < number[:, None]
    start = (guess - 1 + starts_after.sum(1)).clamp(max=INT32_MAX)
    start[num_buckets] = INT32_MAX
    bits = torch.arange((0x4F000000 >> (23 - MANTISSA_BITS)) + 1, dtype=torch.int32)
    value = (bits << (23 - MANTISSA_BITS)).view(torch.float32).double()
    # Above 2^24, rounding to float32 lifts a number by at most this much.
    smallest = torch.where(value > 1 << 24, value * (1 - 2.0**-24), value).ceil().long()
    first = time_bucket(smallest, num_buckets)
    return BucketTable(first.int().to(device), start[first + 1].int().to(device))


class Block(NamedTuple):
    """Some queries of some sequences of one class, with the keys they may see: all dense."""

    number: int
    class_number: int
    rows: slice
    queries: slice
    num_keys: int


class Blocks:
    """A jagged batch as dense blocks over history keys: classes of similar length, tiles of queries, as much as a cache holds.

    Candidates' own keys are not in the blocks: the pair of a candidate with itself is one number, computed beside them.
    """

    def __init__(self, sequences: Sequences) -> None:
        offsets, query_offsets = sequences.offsets.cpu(), sequences.query_offsets.cpu()
        self.device = sequences.offsets.device
        num_all_B, num_queries_B = offsets.diff(), query_offsets.diff()
        num_history_B = torch.minimum(sequences.num_history.cpu(), num_all_B)
        self.is_plain = bool((num_all_B == num_queries_B).all() and (num_history_B == num_all_B).all())
        class_B = _ceil(num_queries_B) * (1 << 32) + _ceil(num_history_B)
        class_B[(num_queries_B == 0) | (num_history_B == 0)] = 0
        numbers, inverse_B = class_B.unique(return_inverse=True)
        has_work_C = numbers > 0
        count_C = torch.bincount(inverse_B, minlength=len(numbers))
        longest_C2 = torch.zeros(len(numbers), 2, dtype=torch.int64)
        both_B2 = torch.stack([num_queries_B, num_history_B], 1)
        longest_C2.scatter_reduce_(0, inverse_B[:, None].expand(-1, 2), both_B2, "amax")
        longest_C2[~has_work_C] = 0
        self.shapes = [(R, *longest) for R, longest in zip(count_C.tolist(), longest_C2.tolist()) if longest[0]]

        # Sequence r of a class begins at cell base + r * longest.
        order_B = inverse_B.argsort(stable=True)
        rank_B = torch.empty_like(order_B)
        rank_B[order_B] = torch.arange(len(order_B)) - (count_C.cumsum(0) - count_C).repeat_interleave(count_C)
        size_C2 = count_C[:, None] * longest_C2
        first_B2 = (size_C2.cumsum(0) - size_C2)[inverse_B] + rank_B[:, None] * longest_C2[inverse_B]
        self.num_query_cells, self.num_key_cells = size_C2.sum(0).tolist()
        first_C2 = (size_C2.cumsum(0) - size_C2)[has_work_C]
        self.first_query, self.first_key = first_C2.T.tolist()

        row_S = torch.repeat_interleave(torch.arange(len(num_queries_B)), num_queries_B)
        row_T = torch.repeat_interleave(torch.arange(len(num_all_B)), num_all_B)
        local_S = torch.arange(len(row_S)) - query_offsets[row_S]
        local_T = torch.arange(len(row_T)) - offsets[row_T]
        place_S = local_S + (num_all_B - num_queries_B)[row_S]
        has_work_B = has_work_C[inverse_B]
        in_block_S, in_block_T = has_work_B[row_S], has_work_B[row_T] & (local_T < num_history_B[row_T])
        cell_S, cell_T = first_B2[row_S, 0] + local_S, first_B2[row_T, 1] + local_T
        self.query = _Cells.of(cell_S, in_block_S, self.num_query_cells, self.device)
        self.key = _Cells.of(cell_T, in_block_T, self.num_key_cells, self.device)

        visible_S = torch.minimum(place_S + 1, num_history_B[row_S])
        self.visible = None if self.is_plain else self._split_rows(self.query.pad(visible_S.to(self.device)), 1)
        is_candidate_S = place_S >= num_history_B[row_S]
        self.candidate = is_candidate_S.nonzero()[:, 0].to(self.device)
        self.candidate_key = (offsets[row_S] + place_S)[is_candidate_S].to(self.device)

        key_position_S = sequences.position[(offsets[row_S] + place_S).to(self.device)]
        step_T = torch.ones_like(sequences.position)
        step_T[1:] = sequences.position.diff()
        step_T[sequences.offsets[:-1][sequences.offsets.diff() > 0]] = 1
        self.counts_up = self.is_plain and bool((step_T == 1).all())
        self.query_position = self._split_rows(self.query.pad(key_position_S), 1)
        self.key_position = self._split_rows(self.key.pad(sequences.position), 2)
        self._set_times(sequences, row_S, row_T)
        self.candidate_seconds = sequences.query_time[self.candidate] - sequences.key_time[self.candidate_key]
        self._buckets: dict[int, dict[int, Tensor]] = {}
        self._num_kept = 0
        self.list = list(self._cut())

    def _set_times(self, sequences: Sequences, row_S: Tensor, row_T: Tensor) -> None:
        """Times of the cells since each sequence's first; as int32 where no sequence spans 2^31 seconds."""
        query_time_S, key_time_T = sequences.query_time.cpu(), sequences.key_time.cpu()
        row, when = torch.cat([row_S, row_T]), torch.cat([query_time_S, key_time_T])
        first_B = torch.zeros(len(sequences.num_history), dtype=torch.int64)
        first_B.scatter_reduce_(0, row, when, "amin", include_self=False)
        since = when - first_B[row]
        self.in_int32 = not len(since) or int(since.max()) < INT32_MAX
        since_S, since_T = (
            since.to(torch.int32 if self.in_int32 else torch.int64).to(self.device).split([len(row_S), len(row_T)])
        )
        self.query_time = self._split_rows(self.query.pad(since_S), 1)
        self.key_time = self._split_rows(self.key.pad(since_T), 2)

    def _split_rows(self, cells: Tensor, side: int) -> list[Tensor]:
        """Cells of the queries (side 1) or keys (side 2), cut into one tensor [R, longest, ...] per class."""
        parts = cells.split([shape[0] * shape[side] for shape in self.shapes])
        return [x.unflatten(0, (shape[0], shape[side])) for x, shape in zip(parts, self.shapes)]

    def of_queries(self, x_SHd: Tensor) -> Tensor:
        """Values of the queries as cells [H, num_query_cells, d], zeros where there is none."""
        return self.query.pad(x_SHd.transpose(0, 1), dim=1)

    def of_keys(self, x_THd: Tensor) -> Tensor:
        """Values of the history keys as cells [H, num_key_cells, d], zeros where there is none."""
        return self.key.pad(x_THd.transpose(0, 1), dim=1)

    def to_queries(self, cells: Tensor) -> Tensor:
        """From cells [H, num_query_cells, e] to [S, H, e]; 0 where a query sees no history."""
        return self.query.unpad(cells, dim=1).transpose(0, 1)

    def to_keys(self, cells: Tensor) -> Tensor:
        """From cells [H, num_key_cells, d] to [T, H, d]; 0 for keys that are not in a block."""
        return self.key.unpad(cells, dim=1).transpose(0, 1)

    def queries(self, block: Block, cells: Tensor, head: int) -> Tensor:
        """View [r, t, d] of a block's queries in cells [H, num_query_cells, d]."""
        R, longest, _ = self.shapes[block.class_number]
        first = self.first_query[block.class_number]
        return cells[head, first : first + R * longest].unflatten(0, (R, longest))[block.rows, block.queries]

    def keys(self, block: Block, cells: Tensor, head: int) -> Tensor:
        """View [r, k, d] of a block's keys in cells [H, num_key_cells, d]."""
        R, _, longest = self.shapes[block.class_number]
        first = self.first_key[block.class_number]
        return cells[head, first : first + R * longest].unflatten(0, (R, longest))[block.rows, : block.num_keys]

    def __iter__(self) -> Iterator[Block]:
        """All blocks, of at most CELLS_AT_ONCE pairs where one sequence has no more."""
        return iter(self.list)

    def _cut(self) -> Iterator[Block]:
        number = 0
        for class_number, (R, num_queries, longest) in enumerate(self.shapes):
            for low in range(0, num_queries, QUERY_TILE):
                high = min(low + QUERY_TILE, num_queries)
                num_keys = min(high, longest)
                if self.visible is not None:
                    num_keys = int(self.visible[class_number][:, low:high].max())
                if not num_keys:
                    continue
                step = max(CELLS_AT_ONCE // ((high - low) * num_keys), 1)
                for first in range(0, R, step):
                    yield Block(number, class_number, slice(first, min(first + step, R)), slice(low, high), num_keys)
                    number += 1

    def hidden(self, block: Block) -> Tensor | None:
        """bool [r, t, num_keys]: keys that the queries may not see; None where that is the plain causal triangle."""
        if self.visible is None:
            return None
        visible_rt = self.visible[block.class_number][block.rows, block.queries]
        return torch.arange(block.num_keys, device=self.device) >= visible_rt[:, :, None]

    def apart(self, block: Block, reach: int) -> Tensor:
        """int32 [r, t, num_keys]: entry of a table of relative positions -reach..reach, key's less query's."""
        query_rt = self.query_position[block.class_number][block.rows, block.queries]
        key_rk = self.key_position[block.class_number][block.rows, : block.num_keys]
        return (key_rk[:, None] - query_rt[:, :, None]).clamp_(-reach, reach).add_(reach).int()

    def buckets(self, block: Block, num_buckets: int) -> Tensor:
        """int32 [r, t, num_keys]: time bucket of each pair; found once for all layers while KEPT_BUCKETS lasts."""
        kept = self._buckets.setdefault(num_buckets, {})
        if block.number in kept:
            return kept[block.number].int()
        query_rt = self.query_time[block.class_number][block.rows, block.queries]
        key_rk = self.key_time[block.class_number][block.rows, : block.num_keys]
        seconds = query_rt[:, :, None] - key_rk[:, None]
        table = bucket_table(num_buckets, self.device) if self.in_int32 else None
        found = time_bucket(seconds, num_buckets).int() if table is None else _looked_up(seconds, table)
        if num_buckets <= 256 and self._num_kept < KEPT_BUCKETS:
            kept[block.number] = found.to(torch.uint8)
            self._num_kept += found.numel()
        return found


def _looked_up(seconds: Tensor, table: BucketTable) -> Tensor:
    """int32 like `seconds`, which is overwritten."""
    magnitude = seconds.abs_().flatten()
    bits = magnitude.float().view(torch.int32) >> (23 - MANTISSA_BITS)
    bucket = table.first.index_select(0, bits)
    bucket += magnitude >= table.next_from.index_select(0, bits)
    return bucket.view(seconds.shape)


class _Cells(NamedTuple):
    """Where values of a jagged tensor stand in dense cells."""

    cell: Tensor
    """int64: cell of each value that has one."""
    values: Tensor | None
    """int64: which values these are; None = all, in order."""
    num_cells: int
    num_values: int

    @classmethod
    def of(cls, cell: Tensor, has_cell: Tensor, num_cells: int, device: torch.device) -> _Cells:
        if bool(has_cell.all()):
            return cls(cell.to(device), None, num_cells, len(cell))
        return cls(cell[has_cell].to(device), has_cell.nonzero()[:, 0].to(device), num_cells, len(cell))

    def pad(self, x: Tensor, dim: int = 0) -> Tensor:
        """[..., num_cells, ...] from values [..., total, ...] with their number in `dim`; zeros elsewhere."""
        x = x if self.values is None else x.index_select(dim, self.values)
        shape = (*x.shape[:dim], self.num_cells, *x.shape[dim + 1 :])
        return x.new_zeros(shape).index_copy_(dim, self.cell, x)

    def unpad(self, cells: Tensor, dim: int) -> Tensor:
        """Values [..., total, ...] from cells, zeros where a value has none."""
        found = cells.index_select(dim, self.cell)
        if self.values is None:
            return found
        shape = (*found.shape[:dim], self.num_values, *found.shape[dim + 1 :])
        return found.new_zeros(shape).index_copy_(dim, self.values, found)


def _ceil(length_B: Tensor) -> Tensor:
    return (length_B + CLASS_WIDTH - 1).div(CLASS_WIDTH, rounding_mode="floor")
