"""Sampled softmax against negatives that all positions share, loss and gradients in one pass over the logits.

    loss = sum over targets t of weight_t * log(1 + sum over negatives j of exp(q_t . n_j - q_t . v_t)),  own targets among j left out

P positions, T their targets end to end, k negatives, d width of a vector.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

LOGITS_AT_ONCE = 1 << 18
"""Logits held at a time (1 MiB of float32), so that all passes over them stay in the processor's cache."""


def shared_sampled_softmax(
    query_Pd: Tensor,
    target_Td: Tensor,
    negative_kd: Tensor,
    position_T: Tensor,
    target_rows_T: Tensor,
    negative_rows_k: Tensor,
    weight_T: Tensor,
) -> Tensor:
    """The sum of the weighted losses, a scalar. Memory does not grow with P * k.

    Args:
        query_Pd: what each position asks for.
        target_Td, negative_kd: vectors of the targets and of the negatives.
        position_T: int64 position of each target, ascending.
        target_rows_T, negative_rows_k: int64 catalogue rows, by which a position's own targets are known among the negatives; the
            negatives are distinct.
        weight_T: of each target, in the dtype of the loss.
    """
    loss: Tensor = _SharedSampledSoftmax.apply(
        query_Pd, target_Td, negative_kd, position_T, target_rows_T, negative_rows_k, weight_T
    )
    return loss


class _SharedSampledSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_Pd: Tensor,
        target_Td: Tensor,
        negative_kd: Tensor,
        position_T: Tensor,
        target_rows_T: Tensor,
        negative_rows_k: Tensor,
        weight_T: Tensor,
    ) -> Tensor:
        num_positions, num_negatives = len(query_Pd), len(negative_kd)
        hit_T, hit_k = _hits(target_rows_T, negative_rows_k)
        hit_position = position_T[hit_T]
        score_T = (query_Pd[position_T] * target_Td).sum(1).to(weight_T.dtype)
        wanted = any(ctx.needs_input_grad[:3])
        grad_query_Pd = torch.zeros_like(query_Pd) if wanted else None
        grad_target_Td = torch.zeros_like(target_Td) if wanted else None
        grad_negative_kd = torch.zeros_like(negative_kd) if wanted else None
        total = weight_T.new_zeros(())
        step = max(LOGITS_AT_ONCE // max(num_negatives, 1), 1)
        cuts = torch.arange(0, num_positions + step, step, device=query_Pd.device).clamp(max=num_positions)
        target_cuts, hit_cuts = (torch.searchsorted(x, cuts).tolist() for x in (position_T, hit_position))
        for number, start in enumerate(cuts[:-1].tolist()):
            stop = min(start + step, num_positions)
            query_Cd = query_Pd[start:stop]
            logits_Ck = (query_Cd @ negative_kd.T).to(weight_T.dtype)
            hits = slice(hit_cuts[number], hit_cuts[number + 1])
            logits_Ck[hit_position[hits] - start, hit_k[hits]] = -torch.inf
            # Where every negative is a hit nothing is left to sum: the lowest number in place of -inf keeps NaN out.
            top_C = logits_Ck.amax(1).clamp(min=torch.finfo(logits_Ck.dtype).min)
            exp_Ck = logits_Ck.sub_(top_C[:, None]).exp_()
            sum_C = exp_Ck.sum(1)
            targets = slice(target_cuts[number], target_cuts[number + 1])
            place = position_T[targets] - start
            behind = (sum_C.log() + top_C)[place] - score_T[targets]
            total = total + (weight_T[targets] * softplus(behind)).sum()
            if grad_query_Pd is not None and grad_target_Td is not None and grad_negative_kd is not None:
                slope_t = weight_T[targets] * behind.sigmoid()
                slope_C = torch.zeros_like(sum_C).index_add_(0, place, slope_t)
                share_Ck = exp_Ck.mul_((slope_C / sum_C.clamp(min=torch.finfo(sum_C.dtype).tiny))[:, None])
                share_Ck = share_Ck.to(query_Pd.dtype)
                slope_t1 = slope_t.to(query_Pd.dtype)[:, None]
                grad_negative_kd += share_Ck.T @ query_Cd
                # Under autocast a product is half precision where its factors are not.
                grad_query_Cd = (share_Ck @ negative_kd).to(query_Pd.dtype)
                pull_td = (slope_t1 * target_Td[targets]).to(query_Pd.dtype)
                grad_query_Pd[start:stop] = grad_query_Cd.index_add_(0, place, pull_td, alpha=-1)
                grad_target_Td[targets] = -slope_t1 * query_Cd[place]
        ctx.save_for_backward(grad_query_Pd, grad_target_Td, grad_negative_kd)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None, None]:
        query, target, negative = ctx.saved_tensors
        scale = grad_outputs[0]
        return query * scale, target * scale, negative * scale, None, None, None, None


def _hits(target_rows_T: Tensor, negative_rows_k: Tensor) -> tuple[Tensor, Tensor]:
    """Targets that stand among the negatives, and where: int64 [hits] each."""
    if not len(negative_rows_k):
        nothing = target_rows_T[:0]
        return nothing, nothing
    rows_k, order_k = negative_rows_k.sort()
    place_T = torch.searchsorted(rows_k, target_rows_T).clamp(max=len(rows_k) - 1)
    hit_T = (rows_k[place_T] == target_rows_T).nonzero()[:, 0]
    return hit_T, order_k[place_T[hit_T]]
