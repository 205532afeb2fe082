"""Losses that several systems share: next-item and two-tower models first, rankers at the end.

P positions (or requests) with a query vector each, T targets end to end (a position may have several: the items of one basket),
n items (matrices have n + 1 rows, row 0 is the unknown item and never counts), k negatives, d width.

Sampled losses work on scores, so that any sampler and any way of scoring can feed them:

    positive_T  = target_scores(query_Pd, target_vectors_Td, targets)
    negative_Pk = negative_scores(query_Pd, negative_vectors)           # shared by the batch [k, d], or own ones [P, k, d]
    negative_Pk = hide_hits(negative_Pk, negative_rows, targets)        # a negative that is a target is no negative
    loss        = sampled_softmax_loss(positive_T, negative_Pk, targets, weight_T, log_expected)

For cosine scores with a temperature, pass `unit(query) / temperature` and `unit(items)`. Every loss is a weighted mean: weights
[T] say how much a target counts; targets of row 0 never do; nothing to learn from gives 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, softplus

from shortlist.data.jagged import Jagged, segment_sum
from shortlist.errors import ConfigError

LOGITS_AT_ONCE = 1 << 24  # 64 MiB of float32; a full softmax over more is cut into chunks of positions


def unit(vectors: Tensor, eps: float = 1e-6) -> Tensor:
    """Vectors [..., d] at length 1; ones shorter than `eps` are divided by `eps` instead, so that 0 stays 0."""
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=eps)


def target_scores(query_Pd: Tensor, vectors_Td: Tensor, targets: Jagged) -> Tensor:
    """Inner product of each target's vector with its position's query: float [T]."""
    return (query_Pd[targets.row_of_value] * vectors_Td).sum(-1)


def negative_scores(query_Pd: Tensor, vectors: Tensor) -> Tensor:
    """Inner products of queries and negatives, float [P, k]: vectors [k, d] are shared, [P, k, d] are each position's own."""
    if vectors.dim() == 2:
        return query_Pd @ vectors.T
    return torch.einsum("pd,pkd->pk", query_Pd, vectors)


def hide_hits(negative_Pk: Tensor, rows: Tensor, targets: Jagged) -> Tensor:
    """Scores [P, k] where negatives that are targets of their own position, or row 0, are as good as -infinity.

    Args:
        negative_Pk: scores of the negatives.
        rows: catalogue rows of the negatives, int64 [k] shared by all positions or [P, k].
        targets: catalogue rows of the targets, one row per position.
    """
    own = rows if rows.dim() == 1 else rows[targets.row_of_value]
    target_of_hit, column = (own == targets.values[:, None]).nonzero(as_tuple=True)
    hidden_Pk = (rows == 0).expand(negative_Pk.shape).clone()
    hidden_Pk[targets.row_of_value[target_of_hit], column] = True
    return negative_Pk.masked_fill(hidden_Pk, torch.finfo(negative_Pk.dtype).min)


def bce_loss(positive_T: Tensor, negative_Pk: Tensor, targets: Jagged, weight_T: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of each target against its position's k negatives (Kang & McAuley 2018, section III-E, k = 1).

    -[log s(positive) + sum_k log(1 - s(negative))] / (k + 1), s the sigmoid. The paper does not divide, which only scales it.
    """
    return gbce_loss(positive_T, negative_Pk, targets, weight_T, beta=1.0)


def gbce_beta(num_negatives: int, num_items: int, calibration: float) -> float:
    """The power of gBCE (Petrov & Macdonald 2023, eq. 12): alpha (t (1 - 1/alpha) + 1/alpha), alpha = k / (n - 1) the sampling rate.

    Args:
        num_negatives: k per position.
        num_items: n.
        calibration: t in [0, 1]; 0 is plain BCE (power 1), 1 is calibrated (power alpha).
    """
    if not 0 <= calibration <= 1:
        raise ConfigError(f"the calibration t of gBCE must lie in 0..1, got {calibration}")
    if num_negatives < 1 or num_items < 2:
        raise ConfigError(f"gBCE needs a negative and two items, got {num_negatives} negatives of {num_items} items")
    alpha = min(num_negatives / (num_items - 1), 1.0)
    return calibration * (alpha - 1) + 1


def gbce_loss(
    positive_T: Tensor, negative_Pk: Tensor, targets: Jagged, weight_T: Tensor | None = None, *, beta: float
) -> Tensor:
    """Generalised BCE: -[beta log s(positive) + sum_k log(1 - s(negative))] / (k + 1) per target; `beta` from `gbce_beta`.

    log s(x)^beta is beta log s(x), so no power of a sigmoid is taken and float32 is enough.
    """
    against_P = softplus(negative_Pk).sum(1)
    loss_T = (against_P[targets.row_of_value] - beta * logsigmoid(positive_T)) / (negative_Pk.shape[1] + 1)
    return weighted_mean(loss_T, _live(targets, weight_T))


def sampled_softmax_loss(
    positive_T: Tensor,
    negative_Pk: Tensor,
    targets: Jagged,
    weight_T: Tensor | None = None,
    log_expected: Tensor | float = 0.0,
) -> Tensor:
    """Cross-entropy of each target against itself and its position's negatives.

    Args:
        log_expected: log of how often each negative is expected among the k, float [k] or [P, k]: `log k + sampler.log_q(rows)`.
            Taken off the negatives' scores, it makes their sum an unbiased estimate of the sum over all items but the target,
            so that the loss tends to the full softmax; with k distinct items out of n it is log(k / n). 0 = no correction,
            as in the sampled softmax of HSTU's baselines.
    """
    log_rest_P = torch.logsumexp(negative_Pk - log_expected, dim=1)
    loss_T = softplus(log_rest_P[targets.row_of_value] - positive_T)
    return weighted_mean(loss_T, _live(targets, weight_T))


def bpr_loss(positive_T: Tensor, negative_Pk: Tensor, targets: Jagged, weight_T: Tensor | None = None) -> Tensor:
    """-mean_k log s(positive - negative), s the sigmoid (Rendle et al., UAI 2009; GRU4Rec, Hidasi et al. 2016, section 3.1.3).

    Hidden negatives (see `hide_hits`) do not count; a target without any other costs nothing. So with the three losses below.
    """
    negative_Tk, is_shown_Tk = _of_targets(negative_Pk, targets)
    loss_Tk = softplus(negative_Tk - positive_T[:, None])
    return _mean_over_shown(loss_Tk, is_shown_Tk, targets, weight_T)


def top1_loss(positive_T: Tensor, negative_Pk: Tensor, targets: Jagged, weight_T: Tensor | None = None) -> Tensor:
    """mean_k [s(negative - positive) + s(negative^2)]: a soft rank and a pull of negatives towards 0 (GRU4Rec 2016, section 3.1.3)."""
    negative_Tk, is_shown_Tk = _of_targets(negative_Pk, targets)
    loss_Tk = _top1(positive_T, negative_Tk)
    return _mean_over_shown(loss_Tk, is_shown_Tk, targets, weight_T)


def top1_max_loss(positive_T: Tensor, negative_Pk: Tensor, targets: Jagged, weight_T: Tensor | None = None) -> Tensor:
    """sum_k w_k [s(negative - positive) + s(negative^2)], w the softmax of the negatives alone (Hidasi & Karatzoglou 2018, eq. 6).

    The mean of `top1_loss` is over mostly easy negatives, whose gradients vanish; here the hard ones weigh.
    """
    negative_Tk, is_shown_Tk = _of_targets(negative_Pk, targets)
    weight_Tk = _log_hardness(negative_Tk, is_shown_Tk).exp()
    loss_T = (weight_Tk * _top1(positive_T, negative_Tk)).sum(1)
    return weighted_mean(loss_T, _live(targets, weight_T) * is_shown_Tk.any(1))


def bpr_max_loss(
    positive_T: Tensor,
    negative_Pk: Tensor,
    targets: Jagged,
    weight_T: Tensor | None = None,
    *,
    penalty: float = 1.0,
) -> Tensor:
    """-log sum_k w_k s(positive - negative) + penalty * sum_k w_k negative^2 (Hidasi & Karatzoglou 2018, eq. 9 and 10).

    w is the softmax of the negatives alone. The logarithm is taken of a sum of exponentials, so no constant guards it from 0.
    """
    negative_Tk, is_shown_Tk = _of_targets(negative_Pk, targets)
    log_weight_Tk = _log_hardness(negative_Tk, is_shown_Tk)
    win_T = torch.logsumexp(log_weight_Tk + logsigmoid(positive_T[:, None] - negative_Tk), dim=1)
    loss_T = penalty * (log_weight_Tk.exp() * negative_Tk.square()).sum(1) - win_T
    return weighted_mean(loss_T, _live(targets, weight_T) * is_shown_Tk.any(1))


def _of_targets(negative_Pk: Tensor, targets: Jagged) -> tuple[Tensor, Tensor]:
    """Each target's negatives [T, k], 0 where hidden, and bool [T, k]: not hidden."""
    is_shown_Pk = negative_Pk > torch.finfo(negative_Pk.dtype).min / 2
    negative_Pk = negative_Pk.masked_fill(~is_shown_Pk, 0.0)
    if bool((targets.lengths == 1).all()):  # the usual case: nothing to copy
        return negative_Pk, is_shown_Pk
    row_T = targets.row_of_value
    return negative_Pk[row_T], is_shown_Pk[row_T]


def _top1(positive_T: Tensor, negative_Tk: Tensor) -> Tensor:
    return (negative_Tk - positive_T[:, None]).sigmoid() + negative_Tk.square().sigmoid()


def _log_hardness(negative_Tk: Tensor, is_shown_Tk: Tensor) -> Tensor:
    """Log of the softmax of the shown negatives, the smallest number for the others; gradients flow through it, as in the paper."""
    return negative_Tk.masked_fill(~is_shown_Tk, torch.finfo(negative_Tk.dtype).min / 4).log_softmax(1)


def _mean_over_shown(loss_Tk: Tensor, is_shown_Tk: Tensor, targets: Jagged, weight_T: Tensor | None) -> Tensor:
    num_shown_T = is_shown_Tk.sum(1)
    loss_T = (loss_Tk * is_shown_Tk).sum(1) / num_shown_T.clamp(min=1)
    return weighted_mean(loss_T, _live(targets, weight_T) * (num_shown_T > 0))


def in_batch_softmax_loss(
    query_Pd: Tensor,
    pool_Md: Tensor,
    pool_rows: Tensor,
    targets: Jagged,
    log_expected_M: Tensor | None = None,
    weight_T: Tensor | None = None,
    *,
    correct_target: bool = True,
) -> Tensor:
    """Cross-entropy of each target against the other items of a pool (Yi et al., RecSys 2019, eq. 4-5).

    Args:
        pool_Md: vectors of the pool: the batch's T targets first, in their order, then any extra negatives.
        pool_rows: their catalogue rows, int64 [M]. Hits of a position's own targets are left out of its negatives.
        log_expected_M: log of how often each item is expected in the pool (or of its chance: a constant changes nothing);
            None = no correction, which punishes popular items.
        correct_target: correct the target's own score too, as the paper does; False = only the negatives', which is the
            unbiased estimate and then wants expected numbers, not chances.
    """
    logits_PM = query_Pd @ pool_Md.T
    own_T = torch.arange(len(targets.values), device=query_Pd.device)
    positive_T = logits_PM[targets.row_of_value, own_T]
    if log_expected_M is not None:
        logits_PM = logits_PM - log_expected_M
        if correct_target:
            positive_T = positive_T - log_expected_M[own_T]
    return sampled_softmax_loss(positive_T, hide_hits(logits_PM, pool_rows, targets), targets, weight_T)


def full_softmax_loss(
    query_Pd: Tensor,
    items_Nd: Tensor,
    targets: Jagged,
    weight_T: Tensor | None = None,
    *,
    allowed_N: Tensor | None = None,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> Tensor:
    """Cross-entropy of each target against all items: one sum of exponentials per position, shared by its targets.

    Memory holds at most `logits_at_once` scores, whatever P and n are; the gradient is formed on the way, so a step costs three
    matrix products, as without chunks.

    Args:
        items_Nd: vectors of all items, row 0 included (and left out of the sum).
        allowed_N: bool [n + 1], items that take part in the sum; None = all. Targets must be among them.
    """
    weight_T = _live(targets, weight_T)
    weight_P = segment_sum(weight_T, targets.row_of_value, targets.num_rows)
    mask_N = (
        torch.ones(len(items_Nd), dtype=torch.bool, device=items_Nd.device) if allowed_N is None else allowed_N.clone()
    )
    mask_N[0] = False
    log_sums: Tensor = _LogSumExp.apply(query_Pd, items_Nd, weight_P, mask_N, logits_at_once)
    positive_T = target_scores(query_Pd, items_Nd[targets.values], targets)
    return (log_sums - (weight_T * positive_T).sum()) / weight_T.sum().clamp(min=_tiny(weight_T))


class _LogSumExp(torch.autograd.Function):
    """Sum over positions of weight_P * logsumexp_N(query_Pd . items_Nd), in chunks of positions, never holding all logits."""

    @staticmethod
    def forward(
        ctx: Any, query_Pd: Tensor, items_Nd: Tensor, weight_P: Tensor, mask_N: Tensor, logits_at_once: int
    ) -> Tensor:
        total = weight_P.new_zeros(())
        wanted = any(ctx.needs_input_grad[:2])
        grad_query_Pd = torch.zeros_like(query_Pd) if wanted else None
        grad_items_Nd = torch.zeros_like(items_Nd) if wanted else None
        step = max(logits_at_once // len(items_Nd), 1)
        for start in range(0, len(query_Pd), step):
            query_Cd, weight_C = query_Pd[start : start + step], weight_P[start : start + step]
            logits_CN = (query_Cd @ items_Nd.T).to(weight_P.dtype).masked_fill_(~mask_N, -torch.inf)
            top_C = logits_CN.amax(1)
            # In place and with one exponential for value and gradient: passes over the logits are what a CPU waits for.
            exp_CN = logits_CN.sub_(top_C[:, None]).exp_()
            sum_C = exp_CN.sum(1)
            total = total + (weight_C * (sum_C.log() + top_C)).sum()
            if grad_query_Pd is not None and grad_items_Nd is not None:
                share_CN = exp_CN.mul_((weight_C / sum_C)[:, None]).to(query_Pd.dtype)
                grad_query_Pd[start : start + step] = share_CN @ items_Nd
                grad_items_Nd += (share_CN.T @ query_Cd).to(items_Nd.dtype)
        ctx.save_for_backward(grad_query_Pd, grad_items_Nd)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_query_Pd, grad_items_Nd = ctx.saved_tensors
        return grad_query_Pd * grad_outputs[0], grad_items_Nd * grad_outputs[0], None, None, None


def binary_loss(scores: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
    """Logistic loss of candidates: logits, labels in 0..1 and weights, all float [total]; the weighted mean."""
    loss = binary_cross_entropy_with_logits(scores, labels, reduction="none")
    return weighted_mean(loss, weight)


def softmax_ranking_loss(scores: Tensor, labels: Tensor, rows: Jagged, weight: Tensor | None = None) -> Tensor:
    """Listwise loss: cross-entropy between each request's labels, scaled to sum 1, and the softmax of its candidates' scores.

    A request counts as much as its positives weigh on average (1 without weights), whatever their number; one without a positive
    counts nothing.

    Args:
        scores, labels: float [total]; labels are 0 or above.
        rows: the candidates, one row per request; only its offsets are read.
        weight: float [total], read at the positives; None = all 1.
    """
    row = rows.row_of_value
    top_B = scores.new_full((rows.num_rows,), -torch.inf).scatter_reduce(0, row, scores.detach(), "amax")
    log_sum_B = segment_sum((scores - top_B[row]).exp(), row, rows.num_rows).clamp(min=_tiny(scores)).log()
    label_sum_B = segment_sum(labels, row, rows.num_rows)
    share = labels / label_sum_B[row].clamp(min=_tiny(labels))
    return weighted_mean(log_sum_B[row] + top_B[row] - scores, share if weight is None else share * weight)


def weighted_mean(loss: Tensor, weight: Tensor | None) -> Tensor:
    """Mean of losses [total] by weights [total]; 0 where all weights are 0 or there is nothing."""
    if weight is None:
        weight = torch.ones_like(loss)
    return (loss * weight).sum() / weight.sum().clamp(min=_tiny(weight))


def _live(targets: Jagged, weight_T: Tensor | None) -> Tensor:
    """Weights [T] with 0 at unknown targets; all 1 where none are given."""
    live_T = (targets.values != 0).to(torch.get_default_dtype() if weight_T is None else weight_T.dtype)
    return live_T if weight_T is None else live_T * weight_T


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny
