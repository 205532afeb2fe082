"""HSTU's attention over sequences of different lengths: pointwise SiLU in place of softmax, relative position and time bias.

    A V = SiLU(alpha * Q K' + rab) V / n        (Zhai et al., ICML 2024, equation 2; n is a constant, not the row's length)
    rab[i, j] = w_p[position_i - position_j] + w_t[bucket(query_time_i - key_time_j)]
    bucket(s) = min(floor(ln(max(|s|, 1)) / 0.301), last)        seconds s, natural logarithm, as in the authors' code

B sequences, T keys of all sequences end to end, S queries end to end (the last ones of each sequence; S = T without a cache), H heads,
d width of a query and key, e width of a value, N - 1 = farthest relative position told apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

TIME_BASE = 0.301
"""Each bucket spans a factor e^0.301 of seconds."""


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


@dataclass(frozen=True, slots=True)
class RelativeBias:
    """The two tables of rab; either may be None."""

    position: Tensor | None
    """float [2 N - 1]: entry N - 1 + key's place - query's place, clamped."""
    time: Tensor | None
    """float [num_buckets]."""


def time_bucket(seconds: Tensor, num_buckets: int) -> Tensor:
    """int64 [...]: bucket of a time difference, in seconds (any sign)."""
    magnitude = seconds.abs().clamp(min=1).to(torch.float64)
    return (magnitude.log() / TIME_BASE).floor().long().clamp(max=num_buckets - 1)


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
        # Masked after SiLU: before it, -inf would give NaN and 0 would not be nothing once the bias is added.
        weight_Hij = silu(score_Hij) * may_see_ij / divisor
        out_SHe[queries] = torch.einsum("hij,jhe->ihe", weight_Hij, v_THe[keys])
    return out_SHe


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
    """The same as `hstu_attention_reference`, by the fastest way there is for the device."""
    return hstu_attention_reference(q_SHd, k_THd, v_THe, sequences, bias, alpha=alpha, divisor=divisor)


def softmax_attention(
    q_SHd: Tensor,
    k_THd: Tensor,
    v_THe: Tensor,
    sequences: Sequences,
    bias: RelativeBias,
    *,
    alpha: float,
) -> Tensor:
    """The twin with softmax(alpha * Q K' + rab) over what a query may see in place of SiLU(...) / n: float [S, H, e]."""
    out_SHe = v_THe.new_zeros(len(q_SHd), v_THe.shape[1], v_THe.shape[2])
    for row in range(len(sequences.offsets) - 1):
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
        weight_Hij = score_Hij.masked_fill(~may_see_ij, -torch.inf).softmax(-1)
        out_SHe[queries] = torch.einsum("hij,jhe->ihe", weight_Hij, v_THe[keys])
    return out_SHe
