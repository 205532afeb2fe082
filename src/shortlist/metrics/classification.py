"""Metrics of predicted probabilities and scores against 0/1 labels: order (AUC, GAUC), loss, and calibration.

All take `labels` [n] of 0 and 1, `scores` or `probabilities` [n], optional non-negative row `weights` [n], as arrays or
tensors, and return a float. Tied scores count half, so a constant scorer has AUC 0.5. Whatever needs both classes
raises DataError when it finds one only.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shortlist.errors import ConfigError, DataError
from shortlist.metrics._arrays import Array, Floats, Integers, finite, floats, positive, to_numpy


def auc(labels: Array, scores: Array, weights: Array | None = None) -> float:
    """Chance that a random positive scores above a random negative, ties counting half; rows drawn by weight.

    Only the order of the scores matters: logits and probabilities give the same, infinities are allowed.
    """
    label_n, score_n, weight_n = _rows(labels, scores, weights)
    _need_both_classes("AUC", label_n, weight_n)
    wins, positives, negatives = _wins_by_group(np.zeros(len(label_n), dtype=np.int64), 1, label_n, score_n, weight_n)
    return float(wins[0] / (positives[0] * negatives[0]))


@dataclass(frozen=True, kw_only=True, slots=True)
class UserAUC:
    """AUC inside each user who has both classes, in ascending order of user. U such users."""

    users_U: NDArray[Any]
    """The users, as given."""
    auc_U: Floats
    """AUC over the user's own impressions."""
    impressions_U: Integers
    """Rows of the user: the weight in GAUC."""
    num_skipped: int
    """Users left out because their labels are all 0 or all 1."""


def auc_per_user(labels: Array, scores: Array, users: Array) -> UserAUC:
    """AUC of every user with both classes, in one sort of all rows. Raises DataError if there is no such user.

    `users` [n]: integers or strings. For an interval of GAUC give `auc_U * impressions_U` and `impressions_U` to
    `bootstrap_ratio`.
    """
    label_n, score_n, weight_n = _rows(labels, scores, None)
    users_n = to_numpy(users)
    if users_n.shape != label_n.shape:
        raise DataError(f"users has shape {users_n.shape}, but there are {len(label_n):,} labels: one user per row.")
    known, group_n = np.unique(users_n, return_inverse=True)
    wins, positives, negatives = _wins_by_group(group_n, len(known), label_n, score_n, weight_n)
    pairs = positives * negatives
    both = pairs > 0
    if not both.any():
        raise DataError(
            f"GAUC needs a user with both labels 0 and 1, but none of {len(known):,} users has both; use auc."
        )
    return UserAUC(
        users_U=known[both],
        auc_U=wins[both] / pairs[both],
        impressions_U=(positives + negatives)[both].astype(np.int64),
        num_skipped=int((~both).sum()),
    )


def gauc(labels: Array, scores: Array, users: Array) -> float:
    """Mean of the users' own AUC, weighted by impressions, over users with both classes (DIN, KDD 2018).

    It ignores how well users are told from each other, which plain AUC rewards and no page benefits from.
    """
    per_user = auc_per_user(labels, scores, users)
    return float(np.average(per_user.auc_U, weights=per_user.impressions_U))


def rela_impr(auc_model: float, auc_base: float) -> float:
    """Relative gain of an AUC over a base, in percent of the base's lead over chance (DIN, KDD 2018)."""
    if not auc_base > 0.5:
        raise DataError(f"the base AUC is {auc_base:g}, but a relative gain needs one above 0.5; choose another base.")
    return ((auc_model - 0.5) / (auc_base - 0.5) - 1.0) * 100.0


def pr_auc(labels: Array, scores: Array, weights: Array | None = None) -> float:
    """Area under the precision-recall steps: sum of precision x gain in recall, equal scores being one step."""
    label_n, score_n, weight_n = _rows(labels, scores, weights)
    _need_both_classes("the area under precision and recall", label_n, weight_n)
    order_n = np.argsort(-score_n, kind="stable")
    score_n, label_n, weight_n = score_n[order_n], label_n[order_n], weight_n[order_n]
    start_s = np.flatnonzero(np.append(True, score_n[1:] != score_n[:-1]))
    positive_s = np.add.reduceat(weight_n * label_n, start_s)
    shown_s = np.cumsum(np.add.reduceat(weight_n, start_s))
    # Leading rows of weight 0 show nothing yet: their step has no gain, so any finite precision will do.
    precision_s = np.divide(np.cumsum(positive_s), shown_s, out=np.zeros_like(shown_s), where=shown_s > 0)
    return float((precision_s * positive_s).sum() / positive_s.sum())


def logloss(labels: Array, probabilities: Array, weights: Array | None = None) -> float:
    """Mean negative log likelihood in nats. Probabilities keep 2.2e-16 from 0 and 1: a sure error costs 36."""
    label_n, probability_n, weight_n = _rows(labels, probabilities, weights, probabilities=True)
    edge = np.finfo(np.float64).eps
    probability_n = np.clip(probability_n, edge, 1.0 - edge)
    loss_n = -(label_n * np.log(probability_n) + (1.0 - label_n) * np.log1p(-probability_n))
    return float(np.average(loss_n, weights=weight_n))


def normalised_entropy(labels: Array, probabilities: Array, weights: Array | None = None) -> float:
    """Logloss / the logloss of always saying the mean label (He et al., ADKDD 2014): below 1 beats the mean."""
    label_n, _, weight_n = _rows(labels, probabilities, weights, probabilities=True)
    _need_both_classes("normalised entropy", label_n, weight_n)
    rate = np.average(label_n, weights=weight_n)
    return logloss(labels, probabilities, weights) / float(-(rate * np.log(rate) + (1.0 - rate) * np.log1p(-rate)))


def calibration(labels: Array, probabilities: Array, weights: Array | None = None) -> float:
    """Mean predicted / mean observed (He et al., ADKDD 2014): 1 is right on average, 2 promises twice what came."""
    label_n, probability_n, weight_n = _rows(labels, probabilities, weights, probabilities=True)
    if not (observed := float(label_n @ weight_n)) > 0:
        raise DataError("calibration needs a positive label, but all labels (with weight) are 0; take more rows.")
    return float(probability_n @ weight_n) / observed


def expected_calibration_error(
    labels: Array,
    probabilities: Array,
    weights: Array | None = None,
    *,
    bins: int = 10,
    spacing: Literal["width", "mass"] = "width",
) -> float:
    """Mean over rows of |mean predicted - mean observed| of the row's bin; in [0, 1], 0 is calibrated.

    `spacing` "width": bins of equal width over [0, 1] (Naeini et al., AAAI 2015), the last one closed. "mass": bins of
    equal weight, which is what small click rates need; equal predictions are never split, so the order of rows does not
    matter.
    """
    if spacing not in ("width", "mass"):
        raise ConfigError(f"spacing must be 'width' or 'mass', got {spacing!r}.")
    positive("bins", bins)
    label_n, probability_n, weight_n = _rows(labels, probabilities, weights, probabilities=True)
    if spacing == "width":
        place_n = probability_n
    else:
        distinct_s, step_n = np.unique(probability_n, return_inverse=True)
        weight_s = _sum_by(step_n, weight_n, len(distinct_s))
        place_n = ((np.cumsum(weight_s) - weight_s / 2.0) / weight_s.sum())[step_n]
    bin_n = np.minimum((place_n * bins).astype(np.int64), bins - 1)
    gap_b = _sum_by(bin_n, weight_n * (probability_n - label_n), bins)
    return float(np.abs(gap_b).sum() / weight_n.sum())


def _wins_by_group(
    group_n: Integers, num_groups: int, label_n: Floats, score_n: Floats, weight_n: Floats
) -> tuple[Floats, Floats, Floats]:
    """Per group: weight of (positive above negative) pairs, ties half; weight of positives; weight of negatives."""
    order_n = np.lexsort((score_n, group_n))
    group_n, label_n, score_n, weight_n = group_n[order_n], label_n[order_n], score_n[order_n], weight_n[order_n]
    # A step is a run of equal scores inside one group.
    start_s = np.flatnonzero(np.append(True, (group_n[1:] != group_n[:-1]) | (score_n[1:] != score_n[:-1])))
    group_s = group_n[start_s]
    positive_s = np.add.reduceat(weight_n * label_n, start_s)
    negative_s = np.add.reduceat(weight_n * (1.0 - label_n), start_s)
    negatives = _sum_by(group_s, negative_s, num_groups)
    before_group = np.cumsum(negatives) - negatives
    below_s = np.cumsum(negative_s) - negative_s - before_group[group_s]
    wins = _sum_by(group_s, positive_s * (below_s + negative_s / 2.0), num_groups)
    return wins, _sum_by(group_s, positive_s, num_groups), negatives


def _sum_by(group_n: Integers, value_n: Floats, num_groups: int) -> Floats:
    """Sum of the values of each group, float64 [groups]."""
    return np.bincount(group_n, value_n, minlength=num_groups).astype(np.float64)


def _rows(
    labels: Array, scores: Array, weights: Array | None, *, probabilities: bool = False
) -> tuple[Floats, Floats, Floats]:
    """Labels, scores and weights as float64 [n]. Raises DataError on an empty input or values out of range."""
    label_n = floats("labels", labels)
    if len(label_n) == 0:
        raise DataError("labels are empty; a metric needs at least one row.")
    if (wrong_n := (label_n != 0) & (label_n != 1)).any():
        raise DataError(
            f"labels must be 0 or 1, got {label_n[wrong_n][0]:g}; say which values count as positive first."
        )
    score_n = floats("probabilities" if probabilities else "scores", scores, length=len(label_n))
    if probabilities and (score_n.min() < 0 or score_n.max() > 1):
        raise DataError(
            f"probabilities must lie in [0, 1], got {score_n.min():g}..{score_n.max():g}; "
            "apply the sigmoid to logits first."
        )
    weight_n = np.ones(len(label_n)) if weights is None else finite("weights", weights, length=len(label_n))
    if weight_n.min() < 0 or not weight_n.sum() > 0:
        raise DataError(f"weights must be at least 0 and not all 0, got a smallest of {weight_n.min():g}.")
    return label_n, score_n, weight_n


def _need_both_classes(metric: str, label_n: Floats, weight_n: Floats) -> None:
    """Raise DataError unless both classes carry weight."""
    present = label_n[weight_n > 0]
    if present.min() == present.max():
        raise DataError(
            f"{metric} needs both labels 0 and 1, but all {len(present):,} rows are {present[0]:g}; take more rows."
        )
