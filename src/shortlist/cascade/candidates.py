"""What the cascade does to lists of candidates between systems: merge, filter, standardise, cut, fill. Pure functions of tensors.

B requests, S systems, K items a system retrieves per request, C columns of a padded list, total = all candidates of the batch end to
end, n items (row 0 = no item).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shortlist.data.jagged import Jagged
from shortlist.models.base import Retrieved

RRF_CONSTANT = 60
"""The constant of reciprocal rank fusion (Cormack, Clarke and Büttcher, SIGIR 2009)."""
SPREAD, CLIP = 3.0, 2.0
"""In-request standardised scores: so many deviations make 1, and nothing goes beyond +-2."""
ROUNDING = 1e-5
"""Standardised scores nearer than this share a place."""
_WIDTH = 1 << 40
"""Distance between requests in a number that sorts by request, then by rounded score."""


@dataclass(frozen=True, slots=True)
class Blocked:
    """Items that a request must not see: its own exclusions and what nobody may see."""

    num_items: int
    excluded: Jagged | None = None
    """Catalogue rows per request."""
    allowed: Tensor | None = None
    """bool [n + 1], the same for all requests; None = all."""

    def permits(self, request: Tensor, rows: Tensor) -> Tensor:
        """bool, the shape of `rows`: real items that request number `request` (same shape) may see."""
        fine = rows > 0
        if self.allowed is not None:
            fine &= self.allowed[rows]
        if self.excluded is not None and len(self.excluded.values):
            width = self.num_items + 1
            excluded = self.excluded.row_of_value * width + self.excluded.values
            fine &= ~torch.isin(request * width + rows, excluded)
        return fine


def merge(found: Sequence[Retrieved], keep: int) -> tuple[Jagged, Tensor]:
    """One list per request from the lists of several retrievers, by reciprocal rank fusion.

    An item's score is the sum of 1 / (60 + its place) over the lists that hold it; among equals, the better best place and then the
    earlier retriever comes first.

    Args:
        found: S results of B requests, K may differ; row 0 = no item.
        keep: longest list made.

    Returns:
        Rows, best first, distinct within a request, and their scores, float32 [total].
    """
    if len(found) == 1 and not _repeats(found[0].rows):
        return _first(found[0].rows, keep)
    width = max(part.rows.shape[1] for part in found)
    padded = [torch.nn.functional.pad(part.rows, (0, width - part.rows.shape[1])) for part in found]
    # Columns run place by place, system by system: the column number is then the order among equals.
    rows_BC = torch.stack(padded, 2).flatten(1)
    place_C = torch.arange(width, device=rows_BC.device).repeat_interleave(len(found))
    weight_BC = torch.where(rows_BC > 0, _rrf(place_C), 0.0).double()
    by_row_BC, order_BC = rows_BC.sort(dim=1, stable=True)
    is_first_BC = torch.ones_like(by_row_BC, dtype=torch.bool)
    is_first_BC[:, 1:] = by_row_BC[:, 1:] != by_row_BC[:, :-1]
    group_BC = is_first_BC.cumsum(1) - 1
    sum_BC = torch.zeros_like(weight_BC).scatter_add_(1, group_BC, weight_BC.gather(1, order_BC))
    # The fused weight stands where the item was first met; its other places fall out.
    fused_BC = torch.where(is_first_BC & (by_row_BC > 0), sum_BC.gather(1, group_BC), -torch.inf)
    fused_BC = torch.empty_like(fused_BC).scatter_(1, order_BC, fused_BC)
    score_BC, best_BC = fused_BC.sort(dim=1, descending=True, stable=True)
    score_BC, best_BC = score_BC[:, :keep], best_BC[:, :keep]
    real_BC = score_BC > -torch.inf
    return Jagged.from_padded(rows_BC.gather(1, best_BC), real_BC), score_BC[real_BC].float()


def _rrf(place: Tensor) -> Tensor:
    """float32, what a list gives to the item at a place, from 0."""
    return 1.0 / (RRF_CONSTANT + 1 + place)


def _repeats(rows_BC: Tensor) -> bool:
    """Whether any request's list holds an item twice."""
    by_row_BC = rows_BC.sort(dim=1).values
    next_BC = by_row_BC[:, 1:]
    same_BC = next_BC == by_row_BC[:, :-1]
    return bool(same_BC.any()) and bool((same_BC & (next_BC > 0)).any())


def _first(rows_BC: Tensor, keep: int) -> tuple[Jagged, Tensor]:
    """`merge` of a single list of distinct items: its first `keep`, scored by their places."""
    real_BC = rows_BC > 0
    if rows_BC.shape[1] > keep:
        real_BC &= real_BC.cumsum(1) <= keep
    score_C = _rrf(torch.arange(rows_BC.shape[1], device=rows_BC.device))
    return Jagged.from_padded(rows_BC, real_BC), score_C.expand_as(rows_BC)[real_BC]


def best_first(rows: Jagged, scores: Tensor, keep: int | None = None) -> Tensor:
    """Index [kept] int64 into the candidates: the `keep` best of each request, best first; equals keep their order."""
    order = scores.argsort(descending=True, stable=True)
    if rows.num_rows == 1:  # nothing to tell apart
        return order[:keep]
    order = order.index_select(0, rows.row_of_value.index_select(0, order).argsort(stable=True))
    return order if keep is None else order[rows.position_of_value < keep]


def take(rows: Jagged, index: Tensor) -> Jagged:
    """The candidates at `index` [kept], which runs request by request."""
    counts = torch.bincount(rows.row_of_value.index_select(0, index), minlength=rows.num_rows)
    return Jagged.from_lengths(rows.values.index_select(0, index), counts)


def finite(rows: Jagged, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores fit to sort and average by, float32 [total], and which requests had none such, bool [B].

    -inf ("would not recommend") becomes the lowest finite score of its request; a request with NaN, +inf or nothing but -inf is bad.
    """
    scores = scores.float()
    if math.isfinite(scores.sum()):  # a sum is finite only where all its terms are
        return scores, torch.zeros(rows.num_rows, dtype=torch.bool, device=scores.device)
    request = rows.row_of_value
    broken = torch.isnan(scores) | (scores == torch.inf)
    lowest_B = torch.full((rows.num_rows,), torch.inf, device=scores.device)
    usable = torch.where(torch.isfinite(scores), scores, torch.inf)
    lowest_B = lowest_B.scatter_reduce(0, request, usable, "amin")
    bad_B = torch.zeros(rows.num_rows, dtype=torch.bool, device=scores.device)
    bad_B[request[broken]] = True
    bad_B |= (lowest_B == torch.inf) & (rows.lengths > 0)
    clean = torch.where(torch.isfinite(scores), scores, lowest_B[request])
    return torch.where(bad_B[request], 0.0, clean), bad_B


def standardise(rows: Jagged, scores_ST: Tensor) -> tuple[Tensor, Tensor]:
    """Scores as a later system reads them, the same in training and serving: within the request, by value and by place.

    Args:
        rows: candidates of B requests.
        scores_ST: finite float32 [S, total], one row per system.

    Returns:
        value [S, total]: distance from the request's mean, 1 for three deviations, cut at +-2; place [S, total]: share of the
        request's candidates with a lower score, equals counted half, from -1 (worst) to 1 (best). Both are 0 where all are equal.
    """
    num_systems, total = scores_ST.shape
    if not total:
        return scores_ST, scores_ST.clone()
    request, count_B = rows.row_of_value, rows.lengths.clamp(min=1)
    values_ST = scores_ST.double()
    nothing_SB = values_ST.new_zeros(num_systems, rows.num_rows)
    mean_SB = nothing_SB.index_add(1, request, values_ST) / count_B
    centred_ST = values_ST - mean_SB.index_select(1, request)
    deviation_SB = (nothing_SB.index_add(1, request, centred_ST.square()) / count_B).sqrt()
    deviation_ST = deviation_SB.index_select(1, request)
    is_spread_ST = deviation_ST > 1e-9 * (1 + values_ST.abs())
    spread_ST = torch.where(is_spread_ST, centred_ST / (SPREAD * deviation_ST).clamp(min=1e-300), 0.0)

    # One number per score that sorts by request, then by value; those that are equal but for rounding, which differs with the batch,
    # count as equal. Values are far below the width: none lies further from the mean than sqrt(total) deviations.
    value_ST = (spread_ST / ROUNDING).round_().long() + request * _WIDTH
    sorted_ST = value_ST.sort(dim=1).values
    place_ST = torch.searchsorted(sorted_ST, value_ST) + torch.searchsorted(sorted_ST, value_ST, right=True)
    first_T, count_T = (column.index_select(0, request) for column in (rows.offsets[:-1], count_B))
    share_ST = (place_ST - 2 * first_T) / count_T.double() - 1
    return spread_ST.clamp(-CLIP, CLIP).float(), share_ST.float()


def first_permitted(rows_BC: Tensor, blocked: Blocked, k: int) -> Tensor:
    """int64 [B, k]: the first k distinct permitted items of each row, 0 where there are fewer."""
    by_row_BC, order_BC = rows_BC.sort(dim=1, stable=True)
    again_BC = torch.zeros_like(by_row_BC, dtype=torch.bool)
    again_BC[:, 1:] = by_row_BC[:, 1:] == by_row_BC[:, :-1]
    again_BC = torch.empty_like(again_BC).scatter_(1, order_BC, again_BC)
    request_BC = torch.arange(len(rows_BC), device=rows_BC.device)[:, None].expand_as(rows_BC)
    fine_BC = blocked.permits(request_BC, rows_BC) & ~again_BC
    first_BC = (~fine_BC).long().argsort(dim=1, stable=True)[:, :k]
    rows_Bk = torch.where(fine_BC.gather(1, first_BC), rows_BC.gather(1, first_BC), 0)
    return torch.nn.functional.pad(rows_Bk, (0, k - rows_Bk.shape[1]))


def contained(rows: Jagged, others: Jagged) -> Tensor:
    """bool [total of rows]: whether the same request of `others` holds the value."""
    if not len(rows.values) or not len(others.values):
        return torch.zeros(len(rows.values), dtype=torch.bool, device=rows.values.device)
    width = int(torch.maximum(rows.values.max(), others.values.max())) + 1
    return torch.isin(rows.row_of_value * width + rows.values, others.row_of_value * width + others.values)


def mean_score(rows: Jagged, given: Sequence[Tensor], bad: Sequence[Tensor], before: Tensor) -> Tensor:
    """What to order candidates by, float32 [total]: one system's scores as they are, or the mean of several's, standardised.

    Args:
        rows: candidates of B requests.
        given: finite scores [total] of each system; one at least.
        bad: bool [B] for each system: requests where its scores do not count.
        before: [total], what stands where no system's do.
    """
    if len(given) == 1:
        mean, all_bad_B = given[0] + 0.0, bad[0]  # -0 becomes 0, as in a mean
    else:
        bad_SB, (value_ST, _) = torch.stack(list(bad)), standardise(rows, torch.stack(list(given)))
        weight_ST = (~bad_SB).float().index_select(1, rows.row_of_value)
        mean, all_bad_B = (value_ST * weight_ST).sum(0) / weight_ST.sum(0).clamp(min=1), bad_SB.all(0)
    if not bool(all_bad_B.any()):
        return mean
    return torch.where(all_bad_B.index_select(0, rows.row_of_value), before, mean)


def by_item(rows: Jagged) -> Tensor:
    """One number per candidate that sorts by request, then by item."""
    width = int(rows.values.max()) + 1 if len(rows.values) else 1
    return rows.row_of_value * width + rows.values


def choose(first_B: Tensor, one: tuple[Jagged, Tensor], other: tuple[Jagged, Tensor]) -> tuple[Jagged, Tensor]:
    """Request by request the first list where `first_B` [B] is True, else the other."""
    lists = Jagged(
        torch.cat([one[0].values, other[0].values]), torch.cat([one[0].offsets, other[0].offsets[1:] + len(one[1])])
    )
    number = torch.arange(len(first_B), device=first_B.device) + torch.where(first_B, 0, len(first_B))
    return lists.select(number), torch.cat([one[1], other[1]])[lists.value_index(number)]
