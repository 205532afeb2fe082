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
from functools import cache
from importlib.util import find_spec
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
    """The same as `hstu_attention_reference`: on a GPU with Triton by its kernels, else in blocks, in float32 where the input is half.

    Sums are not normalised, so that half precision could not hold them; the kernels keep theirs in float32 too.
    """
    if q_SHd.is_cuda and has_triton():
        from shortlist.kernels.hstu_triton import hstu_attention_triton

        return hstu_attention_triton(
            q_SHd, k_THd, v_THe, sequences, bias.position, bias.time, alpha=alpha, divisor=divisor
        )
    if q_SHd.dtype in (torch.bfloat16, torch.float16):
        q_SHd, k_THd, v_THe = q_SHd.float(), k_THd.float(), v_THe.float()
    blocks = sequences.blocks
    with torch.autocast(q_SHd.device.type, enabled=False):
        out_SHe: Tensor = _Blocked.apply(q_SHd, k_THd, v_THe, bias.position, bias.time, blocks, alpha, divisor)
        if len(blocks.candidate):
            own_MHe = _own_pairs(q_SHd, k_THd, v_THe, blocks, bias, alpha) / divisor
            out_SHe = out_SHe.index_add(0, blocks.candidate, own_MHe)
    return out_SHe


@cache
def has_triton() -> bool:
    """Whether the extra [gpu] is installed."""
    return find_spec("triton") is not None


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
    q_Hcd, k_Hcd, v_Hce = blocks.of_queries(q_SHd), blocks.of_keys(k_THd), blocks.of_keys(v_THe)
    parts: list[Tensor] = []
    # Zeros stand after the real positions, where a causal mask hides them.
    for R, longest, _ in blocks.shapes:
        first = sum(part.shape[1] for part in parts)
        q, k, v = (x[:, first : first + R * longest].unflatten(1, (R, longest)) for x in (q_Hcd, k_Hcd, v_Hce))
        part_HRLe = scaled_dot_product_attention(q, k, v, is_causal=True, scale=alpha)
        parts.append(part_HRLe.flatten(1, 2))
    return blocks.to_queries(torch.cat(parts, dim=1)) if parts else v_THe


class _Tables:
    """The bias of a block from the two tables, and the tables' gradients from those of its scores."""

    def __init__(self, position: Tensor | None, time: Tensor | None, blocks: Blocks) -> None:
        self.position, self.blocks = position, blocks
        self.lanes = None if time is None else time.repeat(LANES)
        self.num_buckets = 0 if time is None else len(time)
        self.d_lanes = None if self.lanes is None else torch.zeros_like(self.lanes)
        self.d_position = None if position is None else torch.zeros_like(position)
        self.by_distance: Tensor | None = None
        if position is not None and blocks.counts_up:
            # Entry of each distance that occurs, so that a tile's rows are this table moved by one.
            longest = max((shape[1] for shape in blocks.shapes), default=1)
            reach = (len(position) - 1) // 2
            self.entry = torch.arange(1 - longest, longest, device=position.device).clamp(-reach, reach) + reach
            self.by_distance = position.index_select(0, self.entry)
            self.d_distance = torch.zeros_like(self.by_distance)
            self.distances = torch.arange(len(self.entry), device=position.device)

    def put(self, block: Block, out_rtk: Tensor) -> bool:
        """Write rab of a block into `out_rtk`; False where there are no tables."""
        if self.lanes is not None:
            torch.index_select(self.lanes, 0, self._lane_index(block), out=out_rtk.view(-1))
        if self.position is not None:
            if self.by_distance is not None:
                part = _moved(self.by_distance, block)
            else:
                apart = self.blocks.apart(block, (len(self.position) - 1) // 2)
                part = self.position.index_select(0, apart.view(-1)).view(apart.shape)
            if self.lanes is None:
                out_rtk.copy_(part)
            else:
                out_rtk.add_(part)
        return self.lanes is not None or self.position is not None

    def add_gradients(self, block: Block, grad_rtk: Tensor) -> None:
        """Add to the tables' gradients what those of a block's scores, summed over heads, give."""
        if self.d_lanes is not None:
            self.d_lanes += torch.bincount(self._lane_index(block), grad_rtk.view(-1), len(self.d_lanes))
        if self.by_distance is not None:
            distance_tk = _moved(self.distances, block)
            self.d_distance += torch.bincount(distance_tk.view(-1), grad_rtk.sum(0).view(-1), len(self.distances))
        elif self.d_position is not None:
            apart = self.blocks.apart(block, (len(self.d_position) - 1) // 2)
            self.d_position += torch.bincount(apart.view(-1), grad_rtk.view(-1), len(self.d_position))

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Of the position table and of the time table, once all blocks are added."""
        if self.by_distance is not None and self.d_position is not None:
            self.d_position.index_add_(0, self.entry, self.d_distance)
        return self.d_position, None if self.d_lanes is None else self.d_lanes.view(LANES, -1).sum(0)

    def _lane_index(self, block: Block) -> Tensor:
        """int32 [r * t * k]: entry of each pair in the copies of the time table."""
        bucket_rtk = self.blocks.buckets(block, self.num_buckets)
        lane_k = torch.arange(block.num_keys, device=bucket_rtk.device, dtype=torch.int32).remainder_(LANES)
        return bucket_rtk.add_(lane_k.mul_(self.num_buckets)).view(-1)


class _Blocked(torch.autograd.Function):
    """Attention over the history keys, block by block; scores are in memory for one block and head at a time."""

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
        """float [S, H, e]."""
        ctx.save_for_backward(q_SHd, k_THd, v_THe, position, time)
        ctx.blocks, ctx.alpha, ctx.divisor = blocks, alpha, divisor
        tables, work = _Tables(position, time, blocks), _Work(q_SHd)
        q, k, v = blocks.of_queries(q_SHd), blocks.of_keys(k_THd), blocks.of_keys(v_THe)
        out = q.new_zeros(*q.shape[:2], v.shape[2])
        for block in blocks:
            bias_rtk = work.take(0, block)
            has_bias = tables.put(block, bias_rtk)
            for head in range(len(q)):
                q_rtd, k_rkd = blocks.queries(block, q, head), blocks.keys(block, k, head)
                is_last = head == len(q) - 1
                weight_rtk = bias_rtk if is_last else work.take(1, block).copy_(bias_rtk)
                weight_rtk.baddbmm_(q_rtd, k_rkd.transpose(1, 2), beta=int(has_bias), alpha=alpha)
                _hide(silu(weight_rtk, inplace=True), block, blocks)
                # The product goes through memory of its own: into a slice, it would be made one matrix at a time.
                blocks.queries(block, out, head).copy_(torch.bmm(weight_rtk, blocks.keys(block, v, head)))
        return blocks.to_queries(out.div_(divisor))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q_SHd, k_THd, v_THe, position, time = ctx.saved_tensors
        blocks, alpha = ctx.blocks, ctx.alpha
        tables, work = _Tables(position, time, blocks), _Work(q_SHd)
        q, k, v = blocks.of_queries(q_SHd), blocks.of_keys(k_THd), blocks.of_keys(v_THe)
        grad = blocks.of_queries(grad_outputs[0]).div_(ctx.divisor)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for block in blocks:
            bias_rtk, weight_rtk = work.take(0, block), work.take(1, block)
            has_bias = tables.put(block, bias_rtk)
            total_rtk: Tensor | None = None
            for head in range(len(q)):
                q_rtd, k_rkd = blocks.queries(block, q, head), blocks.keys(block, k, head)
                v_rke, grad_rte = blocks.keys(block, v, head), blocks.queries(block, grad, head)
                is_last = head == len(q) - 1
                score_rtk = bias_rtk if is_last else work.take(2, block).copy_(bias_rtk)
                score_rtk.baddbmm_(q_rtd, k_rkd.transpose(1, 2), beta=int(has_bias), alpha=alpha)
                _hide(torch.ops.aten.silu.out(score_rtk, out=weight_rtk), block, blocks)
                blocks.keys(block, dv, head).add_(torch.bmm(weight_rtk.transpose(1, 2), grad_rte))
                torch.bmm(grad_rte, v_rke.transpose(1, 2), out=weight_rtk)
                torch.ops.aten.silu_backward.grad_input(weight_rtk, score_rtk, grad_input=score_rtk)
                d_score_rtk = _hide(score_rtk, block, blocks)
                blocks.queries(block, dq, head).copy_(torch.bmm(d_score_rtk, k_rkd))
                blocks.keys(block, dk, head).add_(torch.bmm(d_score_rtk.transpose(1, 2), q_rtd))
                if not is_last:
                    total_rtk = (
                        work.take(3, block).copy_(d_score_rtk) if total_rtk is None else total_rtk.add_(d_score_rtk)
                    )
            if has_bias:
                tables.add_gradients(block, score_rtk if total_rtk is None else total_rtk.add_(score_rtk))
        of_qk = blocks.to_queries(dq.mul_(alpha)), blocks.to_keys(dk.mul_(alpha))
        return (*of_qk, blocks.to_keys(dv), *tables.gradients(), None, None, None)


def _moved(by_distance: Tensor, block: Block) -> Tensor:
    """[t, k] from one value per distance key - query, of which there are as many on either side of 0: a copy of moved rows."""
    t = block.queries.stop - block.queries.start
    # The last query's row comes first in memory, each row before it begins one entry later.
    first = len(by_distance) // 2 - (block.queries.stop - 1)
    return by_distance.as_strided((t, block.num_keys), (1, 1), first).contiguous().flip(0)


class _Work:
    """Memory for the scores of one block, reused by all."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.buffers: dict[int, Tensor] = {}

    def take(self, number: int, block: Block) -> Tensor:
        """Buffer `number` as [r, t, k], not cleared."""
        shape = (block.rows.stop - block.rows.start, block.queries.stop - block.queries.start, block.num_keys)
        size = shape[0] * shape[1] * shape[2]
        if number not in self.buffers or len(self.buffers[number]) < size:
            self.buffers[number] = self.like.new_empty(size)
        return self.buffers[number][:size].view(shape)


def _hide(x_rtk: Tensor, block: Block, blocks: Blocks) -> Tensor:
    """Set to 0, in place, the pairs that may not see each other."""
    hidden_rtk = blocks.hidden(block)
    return x_rtk.tril_(block.queries.start) if hidden_rtk is None else x_rtk.masked_fill_(hidden_rtk, 0.0)
