"""Multi-head self-attention over sequences of different lengths, causal or over the whole sequence.

B sequences, total = all their positions end to end, D width, H heads, d = D / H width of a head, L longest of a length class,
R sequences of a class, P positions that are asked for.

Sequences are cut into classes of similar length; each class is padded to its longest member and attended with PyTorch's fused
kernel. Padding stands at the RIGHT, where a causal mask hides it from every real position, so no second mask is needed and no row can
be wholly masked (which would give NaN). Attention over the whole sequence masks the padding of those classes that have any.
`benchmarks/sasrec_step.py` compares class widths with one padded block and one class per length; PyTorch's nested tensors have no
causal kernel on CPU (torch 2.13).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from shortlist.data.jagged import Jagged
from shortlist.errors import ConfigError

CLASS_WIDTH = 16
"""Lengths 1..16 form a class, 17..32 the next: near the best for short and for long histories (`benchmarks/sasrec_step.py`)."""


@dataclass(frozen=True, slots=True)
class LengthClasses:
    """How the positions of a jagged batch are laid out as padded blocks; made once per batch, used by every layer.

    offsets 0 2 5 6 with a class width of 2 gives blocks [[0, 1], [5, 5]] and [[2, 3, 4]]: position 5 repeated is padding.
    """

    shapes: tuple[tuple[int, int], ...]
    """(R, L) of each class, shortest first."""
    gather: Tensor
    """int64 [sum of R * L]: position in `total` that fills each cell, classes end to end."""
    place: Tensor
    """int64 [total]: the cell in which each position stands."""
    is_real: Tensor
    """bool [sum of R * L]: cells that are no padding."""
    is_full: tuple[bool, ...]
    """Of each class: it has no padding."""

    @classmethod
    def of(cls, rows: Jagged, width: int = CLASS_WIDTH) -> LengthClasses:
        """Group the rows of a jagged batch, whose values are not read; rows without values belong to no class."""
        offsets = rows.offsets.cpu()
        lengths_B = offsets.diff()
        class_B = (lengths_B + width - 1).div(width, rounding_mode="floor")
        shapes, cells, places = [], [], torch.empty(int(offsets[-1]), dtype=torch.int64)
        reals, is_full = [], []
        num_cells = 0
        for number in class_B[lengths_B > 0].unique().tolist():
            row_R = (class_B == number).nonzero()[:, 0]
            length_R = lengths_B[row_R]
            longest = int(length_R.max())
            column_L = torch.arange(longest)
            cell_RL = offsets[row_R][:, None] + torch.minimum(column_L, length_R[:, None] - 1)
            is_real_RL = column_L < length_R[:, None]
            places[cell_RL[is_real_RL]] = num_cells + is_real_RL.flatten().nonzero()[:, 0]
            shapes.append((len(row_R), longest))
            cells.append(cell_RL.flatten())
            reals.append(is_real_RL.flatten())
            is_full.append(int(length_R.min()) == longest)
            num_cells += cell_RL.numel()
        gather = torch.cat(cells) if cells else places
        is_real = torch.cat(reals) if reals else places.bool()
        device = rows.offsets.device
        return cls(tuple(shapes), gather.to(device), places.to(device), is_real.to(device), tuple(is_full))


def causal_attention(
    q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, classes: LengthClasses, dropout: float = 0.0
) -> Tensor:
    """softmax(q k' / sqrt(d)) v within each sequence, over the position itself and those before it: float [total, H, d].

    Args:
        q_THd: queries [total, H, d]; k_THd and v_THd alike.
        classes: layout of the batch.
        dropout: share of attention weights set to 0 (pass 0 outside training). On CPU any dropout leaves the fused kernel: about
            1.6 times the time with one head and 2.5 times with four.
    """
    return _attention(q_THd, k_THd, v_THd, classes, causal=True, dropout=dropout)


def whole_attention(
    q_PHd: Tensor,
    k_THd: Tensor,
    v_THd: Tensor,
    classes: LengthClasses,
    dropout: float = 0.0,
    at: Tensor | None = None,
) -> Tensor:
    """softmax(q k' / sqrt(d)) v over all positions of the own sequence, before and after: float [P, H, d].

    Arguments as of `causal_attention`, but for:

    Args:
        q_PHd: queries of the positions that ask.
        at: int64 [P], which these are; None = all, P = total.
    """
    if at is None:
        return _attention(q_PHd, k_THd, v_THd, classes, causal=False, dropout=dropout)
    if not len(at):
        return q_PHd
    sizes = [R * L for R, L in classes.shapes]
    k_cells, v_cells = (x_THd.index_select(0, classes.gather).split(sizes) for x_THd in (k_THd, v_THd))
    gathers, place_P = _asked_cells(classes, at)
    reals, blocks = classes.is_real.split(sizes), []
    for (R, L), is_real, is_full, gather, *kv in zip(
        classes.shapes, reals, classes.is_full, gathers, k_cells, v_cells, strict=True
    ):
        if not len(gather):
            continue
        num_heads, width = q_PHd.shape[1:]
        k_RHLd, v_RHLd = (x.view(R, L, num_heads, width).transpose(1, 2) for x in kv)
        q_RHQd = q_PHd.index_select(0, gather).view(R, -1, num_heads, width).transpose(1, 2)
        visible_R11L = None if is_full else is_real.view(R, 1, 1, L)
        out_RHQd = scaled_dot_product_attention(q_RHQd, k_RHLd, v_RHLd, attn_mask=visible_R11L, dropout_p=dropout)
        blocks.append(out_RHQd.transpose(1, 2).reshape(len(gather), num_heads, width))
    return torch.cat(blocks).index_select(0, place_P)


def _asked_cells(classes: LengthClasses, at: Tensor) -> tuple[list[Tensor], Tensor]:
    """Of each class, which of the P asked positions fill its R x Q cells, int64 [R * Q], Q the most asked of one sequence; and the cell
    of each, int64 [P], classes end to end. Cells that nobody fills repeat the first position asked."""
    cell_P, order_P = classes.place[at].sort(stable=True)
    ends = torch.tensor([R * L for R, L in classes.shapes]).cumsum(0)
    stops = torch.searchsorted(cell_P, ends.to(at.device)).tolist()
    gathers, place_P = [], torch.empty_like(order_P)
    start, num_cells = 0, 0
    for (R, L), stop, end in zip(classes.shapes, stops, ends.tolist(), strict=True):
        row = (cell_P[start:stop] - (end - R * L)).div(L, rounding_mode="floor")
        asked_R = torch.bincount(row, minlength=R)
        widest = int(asked_R.max())
        place = row * widest + torch.arange(len(row), device=at.device) - (asked_R.cumsum(0) - asked_R)[row]
        gather = order_P.new_zeros(R * widest)
        gather[place] = order_P[start:stop]
        gathers.append(gather)
        place_P[order_P[start:stop]] = num_cells + place
        start, num_cells = stop, num_cells + R * widest
    return gathers, place_P


def _attention(
    q_THd: Tensor,
    k_THd: Tensor,
    v_THd: Tensor,
    classes: LengthClasses,
    *,
    causal: bool,
    dropout: float,
) -> Tensor:
    """Either attention at every position: float [total, H, d]."""
    if not classes.shapes:
        return v_THd
    num_heads, width = q_THd.shape[1:]
    sizes = [R * L for R, L in classes.shapes]
    # One gather for all classes: each gather's backward pass would clear and add a tensor of the whole batch.
    q_cells, k_cells, v_cells = (x_THd.index_select(0, classes.gather).split(sizes) for x_THd in (q_THd, k_THd, v_THd))
    reals, blocks = classes.is_real.split(sizes), []
    for (R, L), is_real, is_full, *qkv in zip(
        classes.shapes, reals, classes.is_full, q_cells, k_cells, v_cells, strict=True
    ):
        q_RHLd, k_RHLd, v_RHLd = (x.view(R, L, num_heads, width).transpose(1, 2) for x in qkv)
        visible_R11L = None if causal or is_full else is_real.view(R, 1, 1, L)
        out_RHLd = scaled_dot_product_attention(
            q_RHLd, k_RHLd, v_RHLd, attn_mask=visible_R11L, is_causal=causal, dropout_p=dropout
        )
        blocks.append(out_RHLd.transpose(1, 2).reshape(R * L, num_heads, width))
    return torch.cat(blocks).index_select(0, classes.place)


def causal_attention_reference(q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, rows: Jagged) -> Tensor:
    """`causal_attention`, one sequence at a time with the softmax written out; for tests."""
    return _attention_reference(q_THd, k_THd, v_THd, rows, causal=True)


def whole_attention_reference(q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, rows: Jagged) -> Tensor:
    """`whole_attention`, one sequence at a time with the softmax written out; for tests."""
    return _attention_reference(q_THd, k_THd, v_THd, rows, causal=False)


def _attention_reference(q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, rows: Jagged, *, causal: bool) -> Tensor:
    out = torch.empty_like(v_THd)
    for start, stop in zip(rows.offsets[:-1].tolist(), rows.offsets[1:].tolist()):
        q, k, v = (x_THd[start:stop].transpose(0, 1) for x_THd in (q_THd, k_THd, v_THd))
        logit_HLL = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        if causal:
            is_later_LL = torch.ones(stop - start, stop - start, dtype=torch.bool).triu(1)
            logit_HLL = logit_HLL.masked_fill(is_later_LL, -torch.inf)
        out[start:stop] = (logit_HLL.softmax(-1) @ v).transpose(0, 1)
    return out


class SelfAttention(nn.Module):
    """Queries from one input, keys and values from another (or the same), heads, softmax, and an output map if wanted.

    Args:
        width: D, a multiple of num_heads.
        dropout: share of attention weights dropped in training; see `causal_attention` for what it costs.
        output_map: mix the heads by a linear map (the usual form; SASRec's original block has none).
    """

    def __init__(self, width: int, num_heads: int = 1, *, dropout: float = 0.0, output_map: bool = True) -> None:
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise ConfigError(f"dim must be a multiple of num_heads, got dim {width} and num_heads {num_heads}")
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width) if output_map else nn.Identity()

    def forward(
        self,
        query_TD: Tensor,
        source_TD: Tensor,
        classes: LengthClasses,
        *,
        causal: bool = True,
        at: Tensor | None = None,
    ) -> Tensor:
        """float [total, D]: each position's mix of the positions up to itself, in its own sequence.

        Args:
            query_TD: what asks, [total, D].
            source_TD: what is read, [total, D]; pass the same tensor for plain self-attention.
            causal: False = each position reads those after it too.
            at: int64 [P], positions wanted; the result is then [P, D], and the output map is applied to them alone. Where attention is
                not causal, they alone ask.
        """
        width = query_TD.shape[1]
        heads = (-1, self.num_heads, width // self.num_heads)
        k_TD, v_TD = self.key_value(source_TD).chunk(2, dim=-1)
        k_THd, v_THd = k_TD.reshape(heads), v_TD.reshape(heads)
        dropout = self.dropout if self.training else 0.0
        if causal:
            mixed_THd = causal_attention(self.query(query_TD).view(heads), k_THd, v_THd, classes, dropout)
            mixed_PHd = mixed_THd if at is None else mixed_THd.index_select(0, at)
        else:
            asking_PD = query_TD if at is None else query_TD.index_select(0, at)
            mixed_PHd = whole_attention(self.query(asking_PD).view(heads), k_THd, v_THd, classes, dropout, at)
        return self.out(mixed_PHd.reshape(-1, width))


CausalSelfAttention = SelfAttention
"""The name for those who never look ahead: causal is what `SelfAttention` does unless told otherwise."""


def attention_flops(length: int, width: int, *, output_map: bool = True, causal: bool = True) -> float:
    """FLOPs of one self-attention layer over `length` positions: maps, and scores and mix over half the square if causal."""
    maps = 2 * length * width * width * (4 if output_map else 3)
    pairs = length * (length + 1) / 2 if causal else length * length
    return maps + 4 * pairs * width
