"""HSTU's attention as Triton kernels for a GPU: jagged, no padding, scores and bias never in memory, forward and backward.

The formula is that of kernels/hstu_attention.py; `hstu_attention_reference` there is what the kernels must agree with. A program owns
a tile of one sequence's queries (forward, and gradients of queries and tables) or of its keys (gradients of keys and values) and walks
over the tiles it may see; pointwise weights need no running maximum. Scores are computed anew on the way back. On a CPU the same
code runs in Triton's interpreter (TRITON_INTERPRET=1), which is how it is tested where there is no GPU.

B sequences, T keys, S queries, H heads, d width of a query and key, e width of a value; M queries and N keys of a tile.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shortlist.kernels.sequences import TIME_BASE, Sequences

TILE_QUERIES, TILE_KEYS = 32, 32
TABLE_COPIES = 64
"""Copies of the bias tables' gradients, so that programs do not all wait to add to one number; summed at the end."""


@triton.jit
def _bucket(
    seconds: Any, thresholds: Any, num_buckets: Any,
) -> Any:  # fmt: skip
    """floor(ln(max(|seconds|, 1)) / 0.301), exact: an estimate in float32, set right by the whole seconds at which buckets begin."""
    magnitude = tl.maximum(tl.abs(seconds), 1)
    guess = (tl.log(magnitude.to(tl.float32)) * (1.0 / 0.301)).to(tl.int32)
    guess = tl.minimum(tl.maximum(guess, 0), num_buckets - 1)
    guess -= (magnitude < tl.load(thresholds + guess)).to(tl.int32)
    guess += (magnitude >= tl.load(thresholds + guess + 1)).to(tl.int32)
    return tl.minimum(guess, num_buckets - 1)


@triton.jit
def _tile(values: Any, row: Any, real: Any, head: Any, H: tl.constexpr, d: tl.constexpr, width: Any) -> Any:
    """One head's vectors [rows, width] of values [*, H, d]; 0 where a row is not real or the width goes beyond d."""
    mask = real[:, None] & (width[None, :] < d)
    return tl.load(values + (row[:, None] * H + head) * d + width[None, :], mask=mask, other=0.0)


@triton.jit
def _put(values: Any, row: Any, real: Any, head: Any, H: tl.constexpr, d: tl.constexpr, width: Any, tile: Any) -> Any:
    """Write one head's vectors, as `_tile` reads them."""
    mask = real[:, None] & (width[None, :] < d)
    tl.store(values + (row[:, None] * H + head) * d + width[None, :], tile, mask=mask)


@triton.jit
def _scores(
    q_Md: Any, k_Nd: Any, own_M: Any, place_N: Any, num_keys: Any, num_history: Any, real_M: Any,
    position_M: Any, query_time_M: Any, position: Any, key_time: Any, key_start: Any, w_position: Any,
    w_time: Any, thresholds: Any, alpha: Any, reach: Any, num_buckets: Any, HAS_POSITION: tl.constexpr,
    HAS_TIME: tl.constexpr,
) -> Any:  # fmt: skip
    """Scores before SiLU [M, N], which of them count, and the rows of the two tables that they read."""
    real_N = place_N < num_keys
    score_MN = tl.dot(q_Md, tl.trans(k_Nd), input_precision="ieee") * alpha
    apart_MN = place_N[None, :] * 0 + own_M[:, None] * 0
    bucket_MN = apart_MN
    if HAS_POSITION:
        position_N = tl.load(position + key_start + place_N, mask=real_N, other=0)
        apart_MN = (position_N[None, :] - position_M[:, None]).to(tl.int32)
        apart_MN = tl.minimum(tl.maximum(apart_MN, -reach), reach) + reach
        score_MN += tl.load(w_position + apart_MN)
    if HAS_TIME:
        time_N = tl.load(key_time + key_start + place_N, mask=real_N, other=0)
        bucket_MN = _bucket(query_time_M[:, None] - time_N[None, :], thresholds, num_buckets)
        score_MN += tl.load(w_time + bucket_MN)
    sees_MN = (place_N[None, :] <= own_M[:, None]) & real_M[:, None] & real_N[None, :]
    sees_MN = sees_MN & ((place_N[None, :] < num_history) | (place_N[None, :] == own_M[:, None]))
    return score_MN, sees_MN, apart_MN, bucket_MN


@triton.jit
def _forward(
    q: Any, k: Any, v: Any, out: Any, offsets: Any, query_offsets: Any, history: Any, position: Any,
    key_time: Any, query_time: Any, w_position: Any, w_time: Any, thresholds: Any, alpha: Any, inverse: Any,
    reach: Any, num_buckets: Any, H: tl.constexpr, d: tl.constexpr, e: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr, E: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr,
) -> Any:  # fmt: skip
    row, head = tl.program_id(1) // H, tl.program_id(1) % H
    query_start = tl.load(query_offsets + row)
    num_queries = (tl.load(query_offsets + row + 1) - query_start).to(tl.int32)
    first = tl.program_id(0) * M
    if first >= num_queries:
        return
    key_start = tl.load(offsets + row)
    num_keys = (tl.load(offsets + row + 1) - key_start).to(tl.int32)
    num_history = tl.load(history + row).to(tl.int32)
    index_M = first + tl.arange(0, M)
    real_M = index_M < num_queries
    own_M = num_keys - num_queries + index_M
    width_D, width_E = tl.arange(0, D), tl.arange(0, E)
    q_Md = _tile(q, query_start + index_M, real_M, head, H, d, width_D)
    position_M = tl.load(position + key_start + own_M, mask=real_M, other=0)
    query_time_M = tl.load(query_time + query_start + index_M, mask=real_M, other=0)
    out_ME = tl.zeros((M, E), dtype=tl.float32)
    last = tl.minimum(num_keys, num_keys - num_queries + first + M)
    # The history first; then, where the tile holds candidates, the tiles around its own diagonal.
    own_first = tl.maximum(num_history, num_keys - num_queries + first)
    num_before = tl.cdiv(tl.minimum(last, num_history), N)
    num_own = tl.cdiv(tl.maximum(last - own_first, 0), N)
    for tile in range(num_before + num_own):
        start = tl.where(tile < num_before, tile * N, own_first + (tile - num_before) * N)
        place_N = start + tl.arange(0, N)
        # Keys of the history are all in the tiles before; the last of those must not take candidates too.
        stop = tl.where(tile < num_before, tl.minimum(num_history, num_keys), num_keys)
        real_N = place_N < stop
        k_Nd = _tile(k, key_start + place_N, real_N, head, H, d, width_D)
        v_NE = _tile(v, key_start + place_N, real_N, head, H, e, width_E)
        score_MN, sees_MN, _, _ = _scores(
            q_Md, k_Nd, own_M, place_N, stop, num_history, real_M, position_M, query_time_M, position, key_time,
            key_start, w_position, w_time, thresholds, alpha, reach, num_buckets, HAS_POSITION, HAS_TIME,
        )  # fmt: skip
        weight_MN = tl.where(sees_MN, score_MN * tl.sigmoid(score_MN), 0.0)
        out_ME += tl.dot(weight_MN.to(v_NE.dtype), v_NE, input_precision="ieee")
    _put(out, query_start + index_M, real_M, head, H, e, width_E, out_ME * inverse)


@triton.jit
def _slope(
    score_MN: Any, sees_MN: Any, back_Me: Any, v_NE: Any, inverse: Any,
) -> Any:  # fmt: skip
    """Gradient of the scores: what comes back through V, times SiLU's derivative."""
    sigma_MN = tl.sigmoid(score_MN)
    through_MN = tl.dot(back_Me, tl.trans(v_NE), input_precision="ieee") * inverse
    return tl.where(sees_MN, through_MN * sigma_MN * (1.0 + score_MN * (1.0 - sigma_MN)), 0.0)


@triton.jit
def _backward_queries(
    q: Any, k: Any, v: Any, back: Any, grad_q: Any, grad_position: Any, grad_time: Any, offsets: Any,
    query_offsets: Any, history: Any, position: Any, key_time: Any, query_time: Any, w_position: Any,
    w_time: Any, thresholds: Any, alpha: Any, inverse: Any, reach: Any, num_buckets: Any, num_copies: Any,
    H: tl.constexpr, d: tl.constexpr, e: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    E: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr,
) -> Any:  # fmt: skip
    row, head = tl.program_id(1) // H, tl.program_id(1) % H
    query_start = tl.load(query_offsets + row)
    num_queries = (tl.load(query_offsets + row + 1) - query_start).to(tl.int32)
    first = tl.program_id(0) * M
    if first >= num_queries:
        return
    copy = (tl.program_id(0) + tl.program_id(1)) % num_copies
    key_start = tl.load(offsets + row)
    num_keys = (tl.load(offsets + row + 1) - key_start).to(tl.int32)
    num_history = tl.load(history + row).to(tl.int32)
    index_M = first + tl.arange(0, M)
    real_M = index_M < num_queries
    own_M = num_keys - num_queries + index_M
    width_D, width_E = tl.arange(0, D), tl.arange(0, E)
    q_Md = _tile(q, query_start + index_M, real_M, head, H, d, width_D)
    back_Me = _tile(back, query_start + index_M, real_M, head, H, e, width_E)
    position_M = tl.load(position + key_start + own_M, mask=real_M, other=0)
    query_time_M = tl.load(query_time + query_start + index_M, mask=real_M, other=0)
    grad_MD = tl.zeros((M, D), dtype=tl.float32)
    last = tl.minimum(num_keys, num_keys - num_queries + first + M)
    own_first = tl.maximum(num_history, num_keys - num_queries + first)
    num_before = tl.cdiv(tl.minimum(last, num_history), N)
    num_own = tl.cdiv(tl.maximum(last - own_first, 0), N)
    for tile in range(num_before + num_own):
        start = tl.where(tile < num_before, tile * N, own_first + (tile - num_before) * N)
        place_N = start + tl.arange(0, N)
        stop = tl.where(tile < num_before, tl.minimum(num_history, num_keys), num_keys)
        real_N = place_N < stop
        k_Nd = _tile(k, key_start + place_N, real_N, head, H, d, width_D)
        v_NE = _tile(v, key_start + place_N, real_N, head, H, e, width_E)
        score_MN, sees_MN, apart_MN, bucket_MN = _scores(
            q_Md, k_Nd, own_M, place_N, stop, num_history, real_M, position_M, query_time_M, position, key_time,
            key_start, w_position, w_time, thresholds, alpha, reach, num_buckets, HAS_POSITION, HAS_TIME,
        )  # fmt: skip
        slope_MN = _slope(score_MN, sees_MN, back_Me, v_NE, inverse)
        grad_MD += tl.dot(slope_MN.to(k_Nd.dtype), k_Nd, input_precision="ieee") * alpha
        if HAS_POSITION:
            tl.atomic_add(grad_position + copy * (2 * reach + 1) + apart_MN, slope_MN, mask=sees_MN)
        if HAS_TIME:
            tl.atomic_add(grad_time + copy * num_buckets + bucket_MN, slope_MN, mask=sees_MN)
    _put(grad_q, query_start + index_M, real_M, head, H, d, width_D, grad_MD)


@triton.jit
def _backward_keys(
    q: Any, k: Any, v: Any, back: Any, grad_k: Any, grad_v: Any, offsets: Any, query_offsets: Any,
    history: Any, position: Any, key_time: Any, query_time: Any, w_position: Any, w_time: Any,
    thresholds: Any, alpha: Any, inverse: Any, reach: Any, num_buckets: Any, H: tl.constexpr,
    d: tl.constexpr, e: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr,
) -> Any:  # fmt: skip
    row, head = tl.program_id(1) // H, tl.program_id(1) % H
    key_start = tl.load(offsets + row)
    num_keys = (tl.load(offsets + row + 1) - key_start).to(tl.int32)
    start = tl.program_id(0) * N
    if start >= num_keys:
        return
    query_start = tl.load(query_offsets + row)
    num_queries = (tl.load(query_offsets + row + 1) - query_start).to(tl.int32)
    num_history = tl.load(history + row).to(tl.int32)
    place_N = start + tl.arange(0, N)
    real_N = place_N < num_keys
    width_D, width_E = tl.arange(0, D), tl.arange(0, E)
    k_Nd = _tile(k, key_start + place_N, real_N, head, H, d, width_D)
    v_NE = _tile(v, key_start + place_N, real_N, head, H, e, width_E)
    grad_k_ND = tl.zeros((N, D), dtype=tl.float32)
    grad_v_NE = tl.zeros((N, E), dtype=tl.float32)
    # Queries that stand at or after the tile's first key; where the tile holds candidates alone, only its own.
    first_query = tl.maximum(start - (num_keys - num_queries), 0) // M
    last_query = num_queries
    if start >= num_history:
        last_query = tl.minimum(num_queries, tl.maximum(start + N - (num_keys - num_queries), 0))
    for tile in range(first_query, tl.cdiv(last_query, M)):
        index_M = tile * M + tl.arange(0, M)
        real_M = index_M < num_queries
        own_M = num_keys - num_queries + index_M
        q_Md = _tile(q, query_start + index_M, real_M, head, H, d, width_D)
        back_Me = _tile(back, query_start + index_M, real_M, head, H, e, width_E)
        position_M = tl.load(position + key_start + own_M, mask=real_M, other=0)
        query_time_M = tl.load(query_time + query_start + index_M, mask=real_M, other=0)
        score_MN, sees_MN, _, _ = _scores(
            q_Md, k_Nd, own_M, place_N, num_keys, num_history, real_M, position_M, query_time_M, position, key_time,
            key_start, w_position, w_time, thresholds, alpha, reach, num_buckets, HAS_POSITION, HAS_TIME,
        )  # fmt: skip
        weight_MN = tl.where(sees_MN, score_MN * tl.sigmoid(score_MN), 0.0)
        grad_v_NE += tl.dot(tl.trans(weight_MN).to(back_Me.dtype), back_Me, input_precision="ieee") * inverse
        slope_MN = _slope(score_MN, sees_MN, back_Me, v_NE, inverse)
        grad_k_ND += tl.dot(tl.trans(slope_MN).to(q_Md.dtype), q_Md, input_precision="ieee") * alpha
    _put(grad_k, key_start + place_N, real_N, head, H, d, width_D, grad_k_ND)
    _put(grad_v, key_start + place_N, real_N, head, H, e, width_E, grad_v_NE)


def thresholds(num_buckets: int) -> list[int]:
    """The whole seconds at which buckets 0, 1, ... begin, and one number more that nothing reaches."""
    starts = []
    for bucket in range(num_buckets):
        seconds = min(max(math.floor(math.exp(TIME_BASE * bucket)) - 1, 1), 1 << 62)
        while seconds < 1 << 62 and math.floor(math.log(seconds) / TIME_BASE) < bucket:
            seconds += 1
            if bucket > 60:  # far beyond any log: one second more or less decides nothing
                break
        starts.append(0 if bucket == 0 else seconds)
    return [*starts, (1 << 63) - 1]


@lru_cache(maxsize=16)
def _starts(num_buckets: int, device: torch.device) -> Tensor:
    """`thresholds` as int64 [num_buckets + 1], made once per device: every layer of every step reads them."""
    return torch.tensor(thresholds(num_buckets), dtype=torch.int64, device=device)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_SHd: Tensor,
        k_THd: Tensor,
        v_THe: Tensor,
        position: Tensor | None,
        time: Tensor | None,
        sequences: Sequences,
        alpha: float,
        divisor: float,
    ) -> Tensor:
        """float [S, H, e]."""
        q_SHd, k_THd, v_THe = q_SHd.contiguous(), k_THd.contiguous(), v_THe.contiguous()
        out_SHe = torch.empty(len(q_SHd), *v_THe.shape[1:], dtype=v_THe.dtype, device=v_THe.device)
        ctx.save_for_backward(q_SHd, k_THd, v_THe, position, time)
        ctx.sequences, ctx.alpha, ctx.divisor = sequences, alpha, divisor
        most = int(sequences.query_offsets.diff().max()) if len(sequences.query_offsets) > 1 else 0
        if most:
            grid = (triton.cdiv(most, TILE_QUERIES), (len(sequences.offsets) - 1) * q_SHd.shape[1])
            shared, constants = _arguments(q_SHd, v_THe, position, time, sequences, alpha, divisor)
            _forward[grid](q_SHd, k_THd, v_THe, out_SHe, *shared, **constants)
        return out_SHe

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q_SHd, k_THd, v_THe, position, time = ctx.saved_tensors
        sequences: Sequences = ctx.sequences
        back_SHe = grad_outputs[0].contiguous()
        grad_q, grad_k, grad_v = torch.zeros_like(q_SHd), torch.zeros_like(k_THd), torch.zeros_like(v_THe)
        tables = [
            None if table is None else torch.zeros(TABLE_COPIES, len(table), device=q_SHd.device)
            for table in (position, time)
        ]
        given = [q_SHd if table is None else table for table in tables]  # never read where there is no table
        shared, constants = _arguments(q_SHd, v_THe, position, time, sequences, ctx.alpha, ctx.divisor)
        num_rows = (len(sequences.offsets) - 1) * q_SHd.shape[1]
        if len(q_SHd):
            most = int(sequences.query_offsets.diff().max())
            grid = (triton.cdiv(most, TILE_QUERIES), num_rows)
            _backward_queries[grid](
                q_SHd, k_THd, v_THe, back_SHe, grad_q, *given, *shared, TABLE_COPIES, **constants
            )  # fmt: skip
            most = int(sequences.offsets.diff().max())
            grid = (triton.cdiv(most, TILE_KEYS), num_rows)
            _backward_keys[grid](q_SHd, k_THd, v_THe, back_SHe, grad_k, grad_v, *shared, **constants)
        summed = [
            None if table is None or like is None else table.sum(0).to(like.dtype)
            for table, like in zip(tables, (position, time))
        ]
        return grad_q, grad_k, grad_v, summed[0], summed[1], None, None, None


def _arguments(
    q_SHd: Tensor,
    v_THe: Tensor,
    position: Tensor | None,
    time: Tensor | None,
    sequences: Sequences,
    alpha: float,
    divisor: float,
) -> tuple[list[Any], dict[str, Any]]:
    """What all three kernels take after their own tensors."""
    num_heads, d, e = q_SHd.shape[1], q_SHd.shape[2], v_THe.shape[2]
    num_buckets = 1 if time is None else len(time)
    starts = _starts(num_buckets, q_SHd.device)
    shared = [
        sequences.offsets,
        sequences.query_offsets,
        sequences.num_history,
        sequences.position,
        sequences.key_time,
        sequences.query_time,
        q_SHd if position is None else position.contiguous(),
        q_SHd if time is None else time.contiguous(),
        starts,
        float(alpha),
        1.0 / divisor,
        0 if position is None else (len(position) - 1) // 2,
        num_buckets,
    ]
    constants = {
        "H": num_heads,
        "d": d,
        "e": e,
        "M": TILE_QUERIES,
        "N": TILE_KEYS,
        "D": max(16, triton.next_power_of_2(d)),
        "E": max(16, triton.next_power_of_2(e)),
        "HAS_POSITION": position is not None,
        "HAS_TIME": time is not None,
    }
    return shared, constants


def hstu_attention_triton(
    q_SHd: Tensor,
    k_THd: Tensor,
    v_THe: Tensor,
    sequences: Sequences,
    position: Tensor | None,
    time: Tensor | None,
    *,
    alpha: float,
    divisor: float,
) -> Tensor:
    """As `hstu_attention`, float [S, H, e] in the dtype of the values; accumulators are float32.

    Args:
        q_SHd, k_THd, v_THe: on a GPU, or anywhere under Triton's interpreter.
        sequences: on the same device.
        position, time: tables of the relative bias; None = without.
    """
    out: Tensor = _Attention.apply(q_SHd, k_THd, v_THe, position, time, sequences, alpha, divisor)
    return out
