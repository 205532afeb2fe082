"""HSTU's attention over sequences of different lengths: pointwise SiLU in place of softmax, relative position and time bias.

    A V = SiLU(alpha * Q K' + rab) V / n        (Zhai et al., ICML 2024, equation 2; n is a constant, not the row's length)
    rab[i, j] = w_p[position_i - position_j] + w_t[bucket(query_time_i - key_time_j)]
    bucket(s) = min(floor(ln(max(|s|, 1)) / 0.301), last)        seconds s, natural logarithm, as in the authors' code

`hstu_attention_reference` is the formula as it stands. `hstu_attention` cuts the batch into blocks that stay in a core's cache
(`kernels/sequences.py`) and computes them forward and backward without ever holding weights or bias of the whole batch: per block two
matrix products, one gather of the bias and one pass of SiLU; the backward pass computes scores anew. `benchmarks/hstu_step.py` times it.

B sequences, T keys of all sequences end to end, S queries end to end (the last ones of each sequence; S = T without a cache), H heads,
d width of a query and key, e width of a value, N - 1 = farthest relative position told apart; a block has r sequences, t queries and k
keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from shortlist.kernels.sequences import TIME_BASE, Block, Blocks, Sequences, time_bucket

__all__ = [
    "TIME_BASE",
    "RelativeBias",
    "Sequences",
    "hstu_attention",
    "hstu_attention_reference",
    "softmax_attention",
    "softmax_attention_reference",
    "time_bucket",
]

LANES = 8
"""Copies of the time table, one per key modulo 8: neighbouring keys share a bucket, and sums into one number wait for each other."""


@dataclass(frozen=True, slots=True)
class RelativeBias:
    """The two tables of rab; either may be None."""

    position: Tensor | None
    """float [2 N - 1]: entry N - 1 + key's place - query's place, clamped."""
    time: Tensor | None
    """float [num_buckets]."""


def hstu_attention_reference(
    q_SHd: Tensor,
    k_THd: Tensor,
    v_THe: Tensor,
    sequences: Sequences,
    bias: RelativeBias,
    *,
    alpha: float,
    divisor: float,
) -> Tensor:
    """The formula as it stands, sequence by sequence: float [S, H, e]. For tests, and to read.

    Args:
        q_SHd: queries; k_THd keys, v_THe values.
        alpha: factor of the inner products before SiLU.
        divisor: n.
    """
    out_SHe = v_THe.new_zeros(len(q_SHd), v_THe.shape[1], v_THe.shape[2])
    for row in range(len(sequences.offsets) - 1):
        one = _one_sequence(q_SHd, k_THd, sequences, bias, alpha, row)
        # Masked after SiLU: before it, -inf would give NaN and 0 would not be nothing once the bias is added.
        weight_Hij = silu(one.score_Hij) * one.may_see_ij / divisor
        out_SHe[one.queries] = torch.einsum("hij,jhe->ihe", weight_Hij, v_THe[one.keys])
    return out_SHe


def softmax_attention_reference(
    q_SHd: Tensor, k_THd: Tensor, v_THe: Tensor, sequences: Sequences, bias: RelativeBias, *, alpha: float
) -> Tensor:
    """The twin with softmax(alpha * Q K' + rab) over what a query may see in place of SiLU(...) / n: float [S, H, e]."""
    out_SHe = v_THe.new_zeros(len(q_SHd), v_THe.shape[1], v_THe.shape[2])
    for row in range(len(sequences.offsets) - 1):
        one = _one_sequence(q_SHd, k_THd, sequences, bias, alpha, row)
        weight_Hij = one.score_Hij.masked_fill(~one.may_see_ij, -torch.inf).softmax(-1)
        out_SHe[one.queries] = torch.einsum("hij,jhe->ihe", weight_Hij, v_THe[one.keys])
    return out_SHe


class _OneSequence(NamedTuple):
    queries: slice
    keys: slice
    score_Hij: Tensor
    """alpha * Q K' + rab."""
    may_see_ij: Tensor


def _one_sequence(
    q_SHd: Tensor, k_THd: Tensor, sequences: Sequences, bias: RelativeBias, alpha: float, row: int
) -> _OneSequence:
    keys = slice(int(sequences.offsets[row]), int(sequences.offsets[row + 1]))
    queries = slice(int(sequences.query_offsets[row]), int(sequences.query_offsets[row + 1]))
    num_keys, num_queries = keys.stop - keys.start, queries.stop - queries.start
    place_j = torch.arange(num_keys, device=q_SHd.device)
    place_i = place_j[num_keys - num_queries :, None]
    may_see_ij = (place_j <= place_i) & ((place_j < sequences.num_history[row]) | (place_j == place_i))
    score_Hij = alpha * torch.einsum("ihd,jhd->hij", q_SHd[queries], k_THd[keys])
    if bias.position is not None:
        position_j = sequences.position[keys]
        reach = (len(bias.position) - 1) // 2
        apart_ij = position_j - position_j[num_keys - num_queries :, None]
        score_Hij = score_Hij + bias.position[apart_ij.clamp(-reach, reach) + reach]
    if bias.time is not None:
        seconds_ij = sequences.query_time[queries, None] - sequences.key_time[keys]
        score_Hij = score_Hij + bias.time[time_bucket(seconds_ij, len(bias.time))]
    return _OneSequence(queries, keys, score_Hij, may_see_ij)


def hstu_attention(
    q_SHd: Tensor,
    k_THd: Tensor,
    v_THe: Tensor,
    sequences: Sequences,
    bias: RelativeBias,
    *,
    alpha: float,
    divisor: float,
) -> Tensor:
    """The same as `hstu_attention_reference`, in blocks. Half precision is computed in float32, since sums are not normalised."""
    if q_SHd.dtype in (torch.bfloat16, torch.float16):
        q_SHd, k_THd, v_THe = q_SHd.float(), k_THd.float(), v_THe.float()
    blocks = sequences.blocks
    with torch.autocast(q_SHd.device.type, enabled=False):
        out_SHe: Tensor = _Blocked.apply(q_SHd, k_THd, v_THe, bias.position, bias.time, blocks, alpha, divisor)
        if len(blocks.candidate):
            own_MHe = _own_pairs(q_SHd, k_THd, v_THe, blocks, bias, alpha) / divisor
            out_SHe = out_SHe.index_add(0, blocks.candidate, own_MHe)
    return out_SHe


def _own_pairs(q_SHd: Tensor, k_THd: Tensor, v_THe: Tensor, blocks: Blocks, bias: RelativeBias, alpha: float) -> Tensor:
    """float [M, H, e]: what each of M candidates takes from itself."""
    score_MH = alpha * (q_SHd[blocks.candidate] * k_THd[blocks.candidate_key]).sum(-1)
    if bias.position is not None:
        score_MH = score_MH + bias.position[(len(bias.position) - 1) // 2]
    if bias.time is not None:
        score_MH = score_MH + bias.time[time_bucket(blocks.candidate_seconds, len(bias.time))][:, None]
    return silu(score_MH)[:, :, None] * v_THe[blocks.candidate_key]


def softmax_attention(
    q_SHd: Tensor, k_THd: Tensor, v_THe: Tensor, sequences: Sequences, bias: RelativeBias, *, alpha: float
) -> Tensor:
    """The same as `softmax_attention_reference`; quick in the form that the paper compares: no bias, no candidates, no cache."""
    blocks = sequences.blocks
    if bias.position is not None or bias.time is not None or not blocks.is_plain:
        return softmax_attention_reference(q_SHd, k_THd, v_THe, sequences, bias, alpha=alpha)
    # Zeros stand after the real positions, where a causal mask hides them.
    qkv = zip(blocks.of_queries(q_SHd), blocks.of_keys(k_THd), blocks.of_keys(v_THe))
    parts = [scaled_dot_product_attention(q, k, v, is_causal=True, scale=alpha) for q, k, v in qkv]
    return blocks.to_queries(parts, v_THe)


class _Tables:
    """The bias of a block from the two tables, and the tables' gradients from those of its scores."""

    def __init__(self, position: Tensor | None, time: Tensor | None, blocks: Blocks, num_heads: int) -> None:
        self.position, self.time, self.blocks, self.num_heads = position, time, blocks, num_heads
        self.lanes = None if time is None else time.repeat(LANES)

    def scores(self, block: Block, q_rtd: Tensor, k_rkd: Tensor, alpha: float, out_rtk: Tensor) -> Tensor:
        """alpha * Q K' + rab of a block, float [r * H, t, k], written into `out_rtk`."""
        shape = (-1, self.num_heads, *out_rtk.shape[1:])
        score_rHtk = out_rtk.view(shape)
        beta = 1
        if self.time is not None and self.lanes is not None:
            index = self._lane_index(block).view(-1)
            if self.num_heads == 1:
                torch.index_select(self.lanes, 0, index, out=out_rtk.view(-1))
            else:
                score_rHtk.copy_(self.lanes.index_select(0, index).view(-1, 1, *out_rtk.shape[1:]))
        if self.position is not None:
            apart = self.blocks.apart(block, (len(self.position) - 1) // 2)
            part = self.position.index_select(0, apart.view(-1)).view(len(apart), 1, *out_rtk.shape[1:])
            if self.time is None:
                score_rHtk.copy_(part)
            else:
                score_rHtk.add_(part)
        elif self.time is None:
            beta = 0
        return out_rtk.baddbmm_(q_rtd, k_rkd.transpose(1, 2), beta=beta, alpha=alpha)

    def add_gradients(self, block: Block, grad_rtk: Tensor, position: Tensor | None, time: Tensor | None) -> None:
        """Add to the gradients of the tables, [2 N - 1] and [LANES * num_buckets], what a block's scores [r * H, t, k] give."""
        grad_rHtk = grad_rtk.unflatten(0, (-1, self.num_heads))
        grad_r1tk = grad_rHtk if self.num_heads == 1 else grad_rHtk.sum(1, keepdim=True)
        if time is not None:
            time += torch.bincount(self._lane_index(block).view(-1), grad_r1tk.view(-1), len(time))
        if position is not None:
            apart = self.blocks.apart(block, (len(position) - 1) // 2)
            sums = grad_r1tk.sum(0) if len(apart) == 1 else grad_r1tk
            position += torch.bincount(apart.view(-1), sums.reshape(-1), len(position))

    def _lane_index(self, block: Block) -> Tensor:
        """int32 [r, t, k]: entry of each pair in the copies of the time table."""
        assert self.time is not None
        bucket_rtk = self.blocks.buckets(block, len(self.time), self.num_heads)
        lane_k = torch.arange(block.num_keys, device=bucket_rtk.device, dtype=torch.int32) % LANES
        return bucket_rtk + lane_k * len(self.time)


class _Blocked(torch.autograd.Function):
    """Attention over the history keys, block by block."""

    @staticmethod
    def forward(
        ctx: Any,
        q_SHd: Tensor,
        k_THd: Tensor,
        v_THe: Tensor,
        position: Tensor | None,
        time: Tensor | None,
        blocks: Blocks,
        alpha: float,
        divisor: float,
    ) -> Tensor:
        ctx.save_for_backward(q_SHd, k_THd, v_THe, position, time)
        ctx.blocks, ctx.alpha, ctx.divisor = blocks, alpha, divisor
        num_heads = q_SHd.shape[1]
        tables = _Tables(position, time, blocks, num_heads)
        q, k, v = blocks.of_queries(q_SHd), blocks.of_keys(k_THd), blocks.of_keys(v_THe)
        out = [x.new_zeros(*x.shape[:-1], v_THe.shape[-1]) for x in q]
        work = _Work(q_SHd, blocks.blocks(num_heads), num_heads)
        for block in blocks.blocks(num_heads):
            q_rtd, k_rkd, v_rke = _parts(block, q, k, v)
            weight_rtk = tables.scores(block, q_rtd, k_rkd, alpha, work.take(0, q_rtd, block))
            silu(weight_rtk, inplace=True)
            _hide(weight_rtk, block, blocks, num_heads)
            out_rHte = out[block.class_number][block.rows, :, block.queries]
            torch.bmm(weight_rtk, v_rke, out=out_rHte.flatten(0, 1))
        return blocks.to_queries(out, v_THe).div_(divisor)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q_SHd, k_THd, v_THe, position, time = ctx.saved_tensors
        blocks, alpha = ctx.blocks, ctx.alpha
        num_heads = q_SHd.shape[1]
        tables = _Tables(position, time, blocks, num_heads)
        q, k, v = blocks.of_queries(q_SHd), blocks.of_keys(k_THd), blocks.of_keys(v_THe)
        grad = blocks.of_queries(grad_outputs[0] / ctx.divisor)
        dq, dk, dv = ([torch.zeros_like(x) for x in xs] for xs in (q, k, v))
        d_position = None if position is None else torch.zeros_like(position)
        d_lanes = None if time is None else time.new_zeros(LANES * len(time))
        work = _Work(q_SHd, blocks.blocks(num_heads), num_heads)
        for block in blocks.blocks(num_heads):
            q_rtd, k_rkd, v_rke = _parts(block, q, k, v)
            grad_rte = grad[block.class_number][block.rows, :, block.queries].flatten(0, 1)
            score_rtk = tables.scores(block, q_rtd, k_rkd, alpha, work.take(0, q_rtd, block))
            weight_rtk = torch.ops.aten.silu.out(score_rtk, out=work.take(1, q_rtd, block))
            _hide(weight_rtk, block, blocks, num_heads)
            dv_rke = dv[block.class_number][block.rows, :, : block.num_keys].flatten(0, 1)
            dv_rke.baddbmm_(weight_rtk.transpose(1, 2), grad_rte)
            d_weight_rtk = torch.bmm(grad_rte, v_rke.transpose(1, 2), out=weight_rtk)
            d_score_rtk = torch.ops.aten.silu_backward.grad_input(d_weight_rtk, score_rtk, grad_input=score_rtk)
            _hide(d_score_rtk, block, blocks, num_heads)
            dq_rtd = dq[block.class_number][block.rows, :, block.queries].flatten(0, 1)
            dq_rtd.baddbmm_(d_score_rtk, k_rkd, beta=0, alpha=alpha)
            dk_rkd = dk[block.class_number][block.rows, :, : block.num_keys].flatten(0, 1)
            dk_rkd.baddbmm_(d_score_rtk.transpose(1, 2), q_rtd, alpha=alpha)
            tables.add_gradients(block, d_score_rtk, d_position, d_lanes)
        d_time = None if time is None or d_lanes is None else d_lanes.view(LANES, -1).sum(0)
        of_qkv = (blocks.to_queries(dq, q_SHd), blocks.to_keys(dk, k_THd), blocks.to_keys(dv, v_THe))
        return (*of_qkv, d_position, d_time, None, None, None)


class _Work:
    """Memory for the scores of one block, reused by all."""

    def __init__(self, like: Tensor, blocks: list[Block], num_heads: int) -> None:
        self.like, self.num_heads = like, num_heads
        self.buffers: dict[int, Tensor] = {}

    def take(self, number: int, q_rtd: Tensor, block: Block) -> Tensor:
        """Buffer `number` as [r * H, t, k], not cleared."""
        shape = (*q_rtd.shape[:2], block.num_keys)
        size = shape[0] * shape[1] * shape[2]
        if number not in self.buffers or len(self.buffers[number]) < size:
            self.buffers[number] = self.like.new_empty(size)
        return self.buffers[number][:size].view(shape)


def _parts(block: Block, q: list[Tensor], k: list[Tensor], v: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [r * H, t, d], keys [r * H, k, d] and values [r * H, k, e] of a block; views."""
    number, rows, num_keys = block.class_number, block.rows, block.num_keys
    return (
        q[number][rows, :, block.queries].flatten(0, 1),
        k[number][rows, :, :num_keys].flatten(0, 1),
        v[number][rows, :, :num_keys].flatten(0, 1),
    )


def _hide(x_rtk: Tensor, block: Block, blocks: Blocks, num_heads: int) -> None:
    """Set to 0, in place, the pairs that may not see each other."""
    hidden_r1tk = blocks.hidden(block)
    if hidden_r1tk is None:
        x_rtk.tril_(block.queries.start)
    else:
        x_rtk.unflatten(0, (-1, num_heads)).masked_fill_(hidden_r1tk, 0.0)
