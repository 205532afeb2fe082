"""Ranking metrics over the whole catalogue, from the pages that were shown and the items held out.

An evaluator has, for R requests, the page (the best K rows, best first) and the held-out targets; no metric needs the
scores of the other items, so memory is R x K, whatever the size of the catalogue. `judge` finds the hits once, and
every metric reads the result:

    rows     [[5, 2, 9],        targets  [2, 7,   4]       hits  [[F, T, F],
              [4, 0, 0]]        offsets  [0,      2, 3]           [T, F, F]]

Every metric returns float64 [R] in the order of the requests; the mean over requests, and its interval, are the
caller's (`metrics.intervals`). Where all N scores of a request are at hand and there is one target, use the
`*_from_ranks` forms.

Shapes: R requests, K places on a page, T targets of all requests together, B rows of scores, N columns (items).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from shortlist.errors import ConfigError, DataError
from shortlist.metrics._arrays import Array, Booleans, Floats, Integers, finite, floats, integers, positive


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """Pages compared with their targets: what every page metric reads."""

    target_RK: Integers
    """Which target stands at each place, as an index into the T targets; -1 where none does."""
    offsets: Integers
    """Where the targets of each request begin, [R + 1]."""

    @property
    def hits_RK(self) -> Booleans:
        """True where a place holds a target."""
        return self.target_RK >= 0

    @property
    def num_targets_R(self) -> Integers:
        """Targets of each request, found or not; at least 1."""
        return np.diff(self.offsets)


def judge(rows: Array, targets: Array, offsets: Array) -> Judged:
    """Find the targets on the pages by one sort of the targets and one binary search per place.

    `rows` integers [R, K]: recommended item rows, best first; 0 is an empty place. `targets` integers [T] and `offsets`
    integers [R + 1]: request r holds the distinct rows `targets[offsets[r]:offsets[r + 1]]`, at least one. An item
    shown twice on a page counts once, at its first place. Raises DataError on broken offsets, a request without
    targets, a target that is 0, or one named twice.
    """
    rows_RK, target_T = integers("rows", rows, ndim=2), integers("targets", targets, ndim=1)
    offsets = integers("offsets", offsets, ndim=1)
    request_T, stride = _check_targets(rows_RK, target_T, offsets)

    # One number per (request, item), so that a single sorted array serves all requests.
    key_T = request_T * stride + target_T
    order_T = np.argsort(key_T, kind="stable")
    key_T = key_T[order_T]
    if (twice := np.flatnonzero(key_T[1:] == key_T[:-1])).size:
        request, item = divmod(int(key_T[twice[0]]), stride)
        raise DataError(f"targets name item row {item} twice in request {request}; keep each target once per request.")

    found_RK = np.full(rows_RK.shape, -1, dtype=np.int64)
    if len(target_T) and rows_RK.size:
        page_key_RK = np.arange(len(rows_RK), dtype=np.int64)[:, None] * stride + rows_RK
        place_RK = np.minimum(np.searchsorted(key_T, page_key_RK), len(key_T) - 1)
        hit_flat = np.flatnonzero(key_T[place_RK] == page_key_RK)
        # A target belongs to one request, and flat order is page order, so unique() keeps its first place.
        target_hit, first = np.unique(order_T[place_RK.ravel()[hit_flat]], return_index=True)
        found_RK.ravel()[hit_flat[first]] = target_hit
    return Judged(target_RK=found_RK, offsets=offsets)


def _check_targets(rows_RK: Integers, target_T: Integers, offsets: Integers) -> tuple[Integers, int]:
    """The request of each target [T] and a stride larger than any row, after checking that the three arrays fit."""
    num_requests = len(rows_RK)
    if len(offsets) != num_requests + 1 or offsets[0] != 0 or offsets[-1] != len(target_T):
        raise DataError(
            f"offsets must have {num_requests + 1:,} entries (pages + 1) from 0 to {len(target_T):,} (targets), "
            f"got {len(offsets):,} entries ending in {offsets[-1:].tolist()}."
        )
    num_targets_R = np.diff(offsets)
    if (empty := np.flatnonzero(num_targets_R < 1)).size:
        raise DataError(f"request {empty[0]} and {len(empty) - 1:,} others have no target; leave such requests out.")
    if len(target_T) and target_T.min() == 0:
        raise DataError(
            "targets hold row 0, which means nothing; give every held-out item its catalogue row, 1 or more."
        )
    stride = 1 + max(int(rows_RK.max(initial=0)), int(target_T.max(initial=0)))
    if num_requests * stride >= 2**63:
        raise DataError(
            f"rows reach {stride - 1:,}; give dense catalogue rows, not hashed ids, or judge in smaller chunks."
        )
    return np.repeat(np.arange(num_requests, dtype=np.int64), num_targets_R), stride


def hits(rows: Array, targets: Array, offsets: Array) -> Booleans:
    """True [R, K] where a place holds one of the request's targets; arguments and errors as in `judge`."""
    return judge(rows, targets, offsets).hits_RK


def first_hit_rank(judged: Judged) -> Integers:
    """Place of the first target on each page, int64 [R], counted from 1; 0 where the page holds none."""
    hits_RK = judged.hits_RK
    return np.where(hits_RK.any(1), hits_RK.argmax(1) + 1, 0)


def hit_rate(judged: Judged, k: int) -> Floats:
    """1.0 if at least one target is among the first k, else 0.0; [R]."""
    return np.asarray(_top(judged, k).any(1), dtype=np.float64)


def recall(judged: Judged, k: int) -> Floats:
    """Targets among the first k / all targets; [R]. With more than k targets it cannot reach 1: see `capped_recall`."""
    return np.asarray(_top(judged, k).sum(1) / judged.num_targets_R)


def capped_recall(judged: Judged, k: int) -> Floats:
    """Targets among the first k / min(k, all targets); [R]. A perfect page always gets 1."""
    return np.asarray(_top(judged, k).sum(1) / np.minimum(k, judged.num_targets_R))


def precision(judged: Judged, k: int) -> Floats:
    """Targets among the first k / k; [R]. Empty places count as misses."""
    return np.asarray(_top(judged, k).sum(1) / k)


def ndcg(judged: Judged, k: int) -> Floats:
    """Discounted gain of the first k / that of the best possible page; [R] in [0, 1].

    Gains are 0 or 1, the discount of place j is 1 / log2(1 + j), and the best page holds min(k, targets) hits on top
    (Järvelin and Kekäläinen, 2002, with binary gains).
    """
    hits_Rk = _top(judged, k)
    discount_k = 1.0 / np.log2(np.arange(2, k + 2))
    ideal_k = np.cumsum(discount_k)
    # The same running sum as the ideal, so that a perfect page has exactly 1.
    gain_R = np.cumsum(np.where(hits_Rk, discount_k, 0.0), axis=1)[:, -1]
    return np.asarray(gain_R / ideal_k[np.minimum(k, judged.num_targets_R) - 1])


def mrr(judged: Judged, k: int) -> Floats:
    """1 / place of the first target among the first k, 0.0 without one; [R]."""
    _top(judged, k)
    return mrr_from_ranks(first_hit_rank(judged), k)


def average_precision(judged: Judged, k: int) -> Floats:
    """Sum of the precision at each hit among the first k / min(k, targets); [R]. Its mean over requests is MAP@k."""
    hits_Rk = _top(judged, k)
    precision_Rk = np.cumsum(hits_Rk, axis=1) / np.arange(1, k + 1)
    return np.asarray((precision_Rk * hits_Rk).sum(1) / np.minimum(k, judged.num_targets_R))


def value_recovered(judged: Judged, values: Array, k: int) -> tuple[Floats, Floats]:
    """Value of the targets among the first k [R], and value of all targets [R], in the unit of `values`.

    `values` [T], zero or more each, in the order of the targets given to `judge`. The pair feeds
    `intervals.bootstrap_ratio`.
    """
    value_T = finite("values", values, length=int(judged.offsets[-1]))
    if value_T.size and value_T.min() < 0:
        raise DataError(
            f"values hold {value_T.min():g}; the value of a target is at least 0, leave returned goods out."
        )
    hits_Rk = _top(judged, k)
    # The index -1 of a miss reads the last value; the zero appended there makes it count nothing.
    recovered_R = np.append(value_T, 0.0)[np.where(hits_Rk, judged.target_RK[:, :k], -1)].sum(1)
    total_R = np.add.reduceat(value_T, judged.offsets[:-1]) if len(hits_Rk) else np.zeros(0)
    return recovered_R, total_R


def value_recall(judged: Judged, values: Array, k: int) -> Floats:
    """Share of each request's target value among the first k; [R], every request counts the same.

    NaN where all targets of a request are worth 0: nothing could be recovered. `value_recall_total` has no such gaps.
    """
    recovered_R, total_R = value_recovered(judged, values, k)
    return np.divide(recovered_R, total_R, out=np.full(len(total_R), np.nan), where=total_R > 0)


def value_recall_total(judged: Judged, values: Array, k: int) -> float:
    """Sum of value among the first k / sum of all target value, over all requests: every coin counts the same."""
    recovered_R, total_R = value_recovered(judged, values, k)
    if not total_R.sum() > 0:
        raise DataError("all targets are worth 0, so no share of their value exists; use recall, or give other values.")
    return float(recovered_R.sum() / total_R.sum())


def _top(judged: Judged, k: int) -> Booleans:
    """The first k columns of the hits. Raises ConfigError where the pages are shorter than k."""
    positive("k", k, most=judged.target_RK.shape[1])
    return judged.hits_RK[:, :k]


PAGE_METRICS: Mapping[str, Callable[[Judged, int], Floats]] = MappingProxyType(
    {
        "hit_rate": hit_rate,
        "recall": recall,
        "capped_recall": capped_recall,
        "precision": precision,
        "ndcg": ndcg,
        "mrr": mrr,
        "average_precision": average_precision,
    }
)
"""Every metric of a judged page by its name; the figure of a table is the mean over requests."""


def ranks_from_scores(
    scores_BN: Tensor,
    target_B: Tensor,
    excluded: Tensor | None = None,
    *,
    ties: Literal["pessimistic", "averaged"] = "pessimistic",
) -> Floats:
    """Rank of each row's target among all N scores, counted from 1; float64 [B].

    `target_B` integers: the column of the target. `excluded` bool [B, N] or [N]: columns out of the race, such as items
    already bought or column 0, the unknown item. A target that is itself excluded gets rank 0: not found. Ties:
    "pessimistic" puts the target behind all its equals, so a scorer that says the same of every item ranks last;
    "averaged" takes the middle of its equals (ranks may end in .5), as a random order among equals would on average.
    Memory is a few bool [B, N]: give chunks of rows. Raises DataError on wrong shapes, NaN scores or a target outside
    the columns.
    """
    if ties not in ("pessimistic", "averaged"):
        raise ConfigError(f"ties must be 'pessimistic' or 'averaged', got {ties!r}.")
    _check_scores(scores_BN, target_B, excluded)
    target_B1 = target_B.to(device=scores_BN.device, dtype=torch.int64)[:, None]
    target_score_B1 = scores_BN.gather(1, target_B1)
    allowed_BN = None if excluded is None else ~excluded.to(scores_BN.device).expand_as(scores_BN)

    def count_B(beats_BN: Tensor) -> Tensor:
        return (beats_BN if allowed_BN is None else beats_BN & allowed_BN).sum(1).double()

    rank_B = count_B(scores_BN >= target_score_B1)  # the target is one of its own equals
    if ties == "averaged":
        rank_B = (count_B(scores_BN > target_score_B1) + 1.0 + rank_B) / 2.0
    if allowed_BN is not None:
        rank_B = rank_B * allowed_BN.gather(1, target_B1).squeeze(1)
    return np.asarray(rank_B.cpu().numpy(), dtype=np.float64)


def _check_scores(scores_BN: Tensor, target_B: Tensor, excluded: Tensor | None) -> None:
    """Raise DataError unless the arguments of `ranks_from_scores` fit together."""
    if scores_BN.ndim != 2 or target_B.shape != scores_BN.shape[:1] or target_B.is_floating_point():
        raise DataError(
            f"scores must be [B, N] and targets integers [B], got {list(scores_BN.shape)} "
            f"and {list(target_B.shape)} of {target_B.dtype}."
        )
    if excluded is not None and (
        excluded.dtype != torch.bool or excluded.shape not in (scores_BN.shape, scores_BN.shape[1:])
    ):
        raise DataError(f"excluded must be bool [B, N] or [N], got {list(excluded.shape)} of {excluded.dtype}.")
    num_columns = scores_BN.shape[1]
    if target_B.numel() and (int(target_B.min()) < 0 or int(target_B.max()) >= num_columns):
        raise DataError(f"targets must be columns 0..{num_columns - 1}, got {target_B.min()}..{target_B.max()}.")
    if bool(torch.isnan(scores_BN).any()):
        raise DataError("scores hold NaN, which has no rank; the model has diverged or an input is broken.")


def hit_rate_from_ranks(ranks: Array, k: int) -> Floats:
    """1.0 where the single target ranks in 1..k, else 0.0; [R]. Rank 0 means not found. Equals recall@k."""
    rank_R = _checked_ranks(ranks)
    return ((rank_R >= 1) & (rank_R <= positive("k", k))).astype(np.float64)


def ndcg_from_ranks(ranks: Array, k: int) -> Floats:
    """1 / log2(1 + rank) where the single target ranks in 1..k, else 0.0; [R]. The best possible page has gain 1."""
    return hit_rate_from_ranks(ranks, k) / np.log2(1.0 + np.maximum(_checked_ranks(ranks), 1.0))


def mrr_from_ranks(ranks: Array, k: int) -> Floats:
    """1 / rank where the single target ranks in 1..k, else 0.0; [R]. Equals average precision for one target."""
    return hit_rate_from_ranks(ranks, k) / np.maximum(_checked_ranks(ranks), 1.0)


def _checked_ranks(ranks: Array) -> Floats:
    """Ranks as float64 [R], each 0 (not found) or at least 1 (infinity is a rank never reached). Raises DataError."""
    rank_R = floats("ranks", ranks)
    if (wrong_R := (rank_R < 1) & (rank_R != 0)).any():
        raise DataError(f"ranks count from 1, and 0 means not found; got {rank_R[wrong_R][0]:g}.")
    return rank_R
