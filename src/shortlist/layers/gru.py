"""A GRU of any depth over jagged sequences, from and to given states, and the lanes of session-parallel training.

B sequences, b of them not empty, total = all their events end to end, D width, N layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shortlist.data.jagged import Jagged
from shortlist.layers.time_major import TimeMajor

LANE = "lane"
"""Context column of a session-parallel batch, int64 [B]: which lane a row continues."""
SESSION_START = "session_start"
"""Context column of a session-parallel batch, bool [B]: the row opens a session, so its lane starts from zeros."""


def run_gru(gru: nn.GRU, input_TD: Tensor, rows: Jagged, start_NBD: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run over each row: outputs of the last layer at every event [total, D], and the states after each row's last event [N, B, D].

    Args:
        input_TD: what is read, [total, D].
        rows: the sequences; values are not read. An empty row keeps the state it starts with.
        start_NBD: states before the first event; None = zeros.
    """
    if start_NBD is None:
        start_NBD = input_TD.new_zeros(gru.num_layers, rows.num_rows, gru.hidden_size)
    if not len(input_TD):
        return input_TD.new_zeros(0, gru.hidden_size), start_NBD
    layout = TimeMajor.of(rows)
    out, last_NbD = gru(layout.packed(input_TD), start_NBD[:, layout.filled].to(input_TD.dtype).contiguous())
    last_NBD = start_NBD.to(last_NbD.dtype).index_copy(1, layout.filled, last_NbD)
    return out.data.index_select(0, layout.place), last_NBD


def run_gru_reference(
    gru: nn.GRU, input_TD: Tensor, rows: Jagged, start_NBD: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same, one row at a time; for tests."""
    outs, lasts = [input_TD.new_zeros(0, gru.hidden_size)], []
    for r, part in enumerate(input_TD.split(rows.lengths.tolist())):
        start = input_TD.new_zeros(gru.num_layers, gru.hidden_size) if start_NBD is None else start_NBD[:, r]
        out, last = gru(part, start.contiguous()) if len(part) else (part.new_zeros(0, gru.hidden_size), start)
        outs.append(out)
        lasts.append(last)
    return torch.cat(outs), torch.stack(lasts, dim=1)


def gru_flops(width: int, hidden: int, num_layers: int) -> float:
    """FLOPs of one event: the maps of three gates from input and state, in every layer; activations are not counted."""
    return sum(2 * 3 * hidden * ((width if layer == 0 else hidden) + hidden) for layer in range(num_layers))
