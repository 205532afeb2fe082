"""Recurrent nets over sequences of different lengths, without padding.

B sequences, total = all their positions end to end, n_s sequences longer than s, D width of the input, H of the state.

    values a b c | d | e f      time-major: sequences longest first, then step by step      a e d  b f  c      sizes 3 2 1
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from shortlist.data.jagged import Jagged


@dataclass(frozen=True, slots=True)
class TimeMajor:
    """Where each position of a jagged batch stands when all sequences take their steps together."""

    sizes: tuple[int, ...]
    """n_0 >= n_1 >= ...: how many sequences take each step; as long as the longest sequence."""
    order: Tensor
    """int64 [total]: the positions in time-major order."""
    place: Tensor
    """int64 [total]: where each position stands in that order."""
    row_order: Tensor
    """int64 [B]: the sequences, longest first; equal lengths keep their order, empty ones stand last."""
    row_place: Tensor
    """int64 [B]: where each sequence stands in that order."""

    @classmethod
    def of(cls, rows: Jagged) -> TimeMajor:
        """Layout of the rows, whose values are not read."""
        lengths_B = rows.lengths
        row_order = lengths_B.argsort(descending=True, stable=True)
        row_place = torch.empty_like(row_order)
        row_place[row_order] = torch.arange(len(row_order), device=row_order.device)
        position_T = torch.arange(int(rows.offsets[-1]), device=rows.offsets.device)
        position_T = position_T - rows.offsets[:-1].repeat_interleave(lengths_B)
        sizes = torch.bincount(position_T)
        starts = sizes.cumsum(0) - sizes
        place = starts[position_T] + row_place.repeat_interleave(lengths_B)
        order = torch.empty_like(place)
        order[place] = torch.arange(len(place), device=place.device)
        return cls(tuple(sizes.tolist()), order, place, row_order, row_place)

    @property
    def filled(self) -> Tensor:
        """int64 [n_0]: the sequences that are not empty, longest first."""
        return self.row_order[: self.sizes[0] if self.sizes else 0]

    def packed(self, values: Tensor) -> PackedSequence:
        """Values [total, D] as PyTorch's recurrent nets take them."""
        return PackedSequence(values.index_select(0, self.order), torch.tensor(self.sizes))


def run_recurrent(net: nn.GRU | nn.LSTM, inputs: Jagged, start_BH: Tensor | None = None) -> Tensor:
    """States of a one-layer net after every position: float [total, H], or [total, 2 H] where it reads both ways.

    Args:
        net: reads width D.
        inputs: float [total, D]; empty sequences take no step.
        start_BH: a GRU's state before the first position, float [B, H]; None = 0.
    """
    width = net.hidden_size * (2 if net.bidirectional else 1)
    if not len(inputs.values):
        return inputs.values.new_zeros(0, width)
    layout = TimeMajor.of(inputs)
    start = None if start_BH is None else start_BH[layout.filled][None]
    states, _ = net(layout.packed(inputs.values), start)
    return states.data.index_select(0, layout.place)
