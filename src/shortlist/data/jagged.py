"""Rows of different lengths without padding: `values` end to end and `offsets` that cut them.

    offsets 0     3  4        7
    values  a b c d  e f g         row 0 = a b c, row 1 = d, row 2 = e f g

B rows, L longest row, total = sum of lengths.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Jagged:
    """`values [total, ...]` of any dtype and `offsets [B + 1]` int64, offsets[0] = 0, offsets[B] = total.

    `lengths`, `row_of_value` and `position_of_value` are worked out when first asked for and kept, since a request asks for them dozens
    of times; like the offsets that they follow from, they are not to be changed in place.
    """

    values: Tensor
    offsets: Tensor
    _lengths: Tensor | None = field(init=False, default=None, repr=False, compare=False)
    _row_of_value: Tensor | None = field(init=False, default=None, repr=False, compare=False)
    _position_of_value: Tensor | None = field(init=False, default=None, repr=False, compare=False)

    @classmethod
    def from_lengths(cls, values: Tensor, lengths_B: Tensor) -> Jagged:
        """Cut `values [total, ...]` into rows of the given lengths [B] int64."""
        offsets = torch.zeros(len(lengths_B) + 1, dtype=torch.int64, device=values.device)
        torch.cumsum(lengths_B, 0, out=offsets[1:])
        return cls(values, offsets)

    @classmethod
    def from_rows(cls, rows: list[list[int]]) -> Jagged:
        """From Python lists of integers; for tests and single requests, not for hot paths."""
        values = torch.tensor([value for row in rows for value in row], dtype=torch.int64)
        return cls.from_lengths(values, torch.tensor([len(row) for row in rows], dtype=torch.int64))

    @classmethod
    def from_padded(cls, padded: Tensor, mask_BL: Tensor) -> Jagged:
        """Keep the entries of `padded [B, L, ...]` where the mask [B, L] is True, in order."""
        return cls.from_lengths(padded[mask_BL], mask_BL.sum(1))

    @property
    def num_rows(self) -> int:
        """B."""
        return self.offsets.shape[0] - 1

    @property
    def lengths(self) -> Tensor:
        """[B] int64."""
        kept = self._lengths
        return self._keep("_lengths", self.offsets.diff()) if kept is None else kept

    @property
    def row_of_value(self) -> Tensor:
        """[total] int64: which row each value belongs to."""
        kept = self._row_of_value
        if kept is None:
            total = self.values.shape[0]
            kept = self._keep("_row_of_value", torch.repeat_interleave(self.lengths, output_size=total))
        return kept

    @property
    def position_of_value(self) -> Tensor:
        """[total] int64: 0 for the first value of each row, 1 for the next, ..."""
        kept = self._position_of_value
        if kept is None:
            place = torch.arange(self.values.shape[0], device=self.offsets.device)
            kept = self._keep("_position_of_value", place - self.offsets.index_select(0, self.row_of_value))
        return kept

    def _keep(self, name: str, known: Tensor) -> Tensor:
        # Two threads may both work it out, to the same end. A tensor made in inference mode is of no use to a later backward pass, in which
        # rows that were made outside of it may have a part.
        if self.offsets.is_inference() or not known.is_inference():
            object.__setattr__(self, name, known)
        return known

    def with_values(self, values: Tensor) -> Jagged:
        """Same rows, other values [total, ...]."""
        made = Jagged(values, self.offsets)
        for name in _OF_OFFSETS:
            object.__setattr__(made, name, getattr(self, name))
        return made

    def padded(self, length: int | None = None, fill: float = 0) -> tuple[Tensor, Tensor]:
        """Left-aligned dense form: padded [B, L, ...] and mask [B, L] bool, True where a value is real.

        `length` fixes L; longer rows keep their LAST values, so that the newest history survives.
        """
        longest = int(self.lengths.max()) if self.num_rows and len(self.values) else 0
        width = max(longest, 1) if length is None else length
        kept_B = self.lengths.clamp(max=width)
        mask_BL = torch.arange(width, device=self.offsets.device) < kept_B[:, None]
        dense = self.values.new_full((self.num_rows, width, *self.values.shape[1:]), fill)
        if longest <= width:
            dense[mask_BL] = self.values
        else:
            dense[mask_BL] = self.values[self.position_of_value >= (self.lengths - kept_B)[self.row_of_value]]
        return dense, mask_BL

    def last(self, count: int) -> Jagged:
        """The last `count` values of every row."""
        if not len(self.values) or int(self.lengths.max()) <= count:
            return self
        kept_B = self.lengths.clamp(max=count)
        return self.keep(self.position_of_value >= (self.lengths - kept_B)[self.row_of_value])

    def count(self, mask: Tensor) -> Tensor:
        """int64 [B]: how many values of each row have the mask [total] bool True."""
        return self._offsets_of(mask).diff()

    def keep(self, mask: Tensor) -> Jagged:
        """The rows without the values at which the mask [total] bool is False."""
        return Jagged(self.values[mask], self._offsets_of(mask))

    def _offsets_of(self, mask: Tensor) -> Tensor:
        seen = torch.cat([self.offsets.new_zeros(1), mask.cumsum(0)])
        return seen.index_select(0, self.offsets)

    def select(self, rows: Tensor) -> Jagged:
        """Rows [n] int64 of this, in the given order, repeats allowed."""
        index, lengths = self.where(rows)
        return Jagged.from_lengths(self.values.index_select(0, index), lengths)

    def lengths_of(self, rows: Tensor) -> Tensor:
        """Lengths of the given rows [n] int64, without those of all rows."""
        return self.offsets[1:][rows] - self.offsets[:-1][rows]

    def value_index(self, rows: Tensor) -> Tensor:
        """Positions in `values` of the given rows [n], end to end: int64 [sum of their lengths]."""
        return self.where(rows)[0]

    def where(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """`value_index` and `lengths_of` of the given rows [n] int64, none of them negative."""
        # index_select takes a third of the time of indexing by brackets.
        first = self.offsets.index_select(0, rows)
        lengths = self.offsets.index_select(0, rows + 1) - first
        ends = lengths.cumsum(0)
        total = int(ends[-1]) if len(ends) else 0
        index = (first - ends + lengths).repeat_interleave(lengths, output_size=total)
        return index.add_(torch.arange(total, device=index.device)), lengths

    def to(self, device: torch.device | str) -> Jagged:
        """The same on another device."""
        return Jagged(self.values.to(device), self.offsets.to(device))

    def to_nested(self) -> Tensor:
        """As a PyTorch jagged nested tensor, sharing memory."""
        return torch.nested.nested_tensor_from_jagged(self.values, self.offsets)

    @classmethod
    def from_nested(cls, nested: Tensor) -> Jagged:
        """From a PyTorch jagged nested tensor, sharing memory."""
        return cls(nested.values(), nested.offsets())  # type: ignore[attr-defined]

    def to_torchrec(self) -> object:
        """As TorchRec's JaggedTensor, sharing memory; needs the torchrec package."""
        from torchrec import JaggedTensor

        return JaggedTensor(values=self.values, offsets=self.offsets)


_OF_OFFSETS = ("_lengths", "_row_of_value", "_position_of_value")


def segment_sum(values: Tensor, row_of_value: Tensor, num_rows: int) -> Tensor:
    """Sum values [total, ...] by row: [num_rows, ...]; empty rows are 0."""
    out = values.new_zeros((num_rows, *values.shape[1:]))
    return out.index_add(0, row_of_value, values)


def segment_mean(values: Tensor, row_of_value: Tensor, num_rows: int) -> Tensor:
    """Mean of values [total, ...] by row: [num_rows, ...]; empty rows are 0."""
    count = values.new_zeros(num_rows).index_add(0, row_of_value, values.new_ones(len(row_of_value))).clamp(min=1)
    return segment_sum(values, row_of_value, num_rows) / count.view(-1, *[1] * (values.dim() - 1))
