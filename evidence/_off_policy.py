"""What both claims about off-policy estimates share: a model of rewards by item and place, and every estimator on one log."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from shortlist.metrics.off_policy import Estimate, Logged, doubly_robust, ips, snips

Float = NDArray[np.float64]
Int = NDArray[np.int64]
MOST_WEIGHT = 50.0
"""Where weights are clipped, and above which `switch` leaves a row to the model."""


def rates(reward_N: Float, place_N: Int, item_N: Int, num_places: int, num_items: int) -> Float:
    """Mean reward [P, n] of each item at each place, drawn towards the place's mean as if by 20 rows more."""
    cell_N, size = place_N * num_items + item_N, num_places * num_items
    count_PI = np.bincount(cell_N, minlength=size).reshape(num_places, num_items)
    total_PI = np.bincount(cell_N, reward_N, minlength=size).reshape(num_places, num_items)
    mean_P1 = total_PI.sum(1, keepdims=True) / np.maximum(count_PI.sum(1, keepdims=True), 1)
    found: Float = (total_PI + 20 * mean_P1) / (count_PI + 20)
    return found


def estimates(
    log: Logged, predicted_N: Float, expected_N: Float, *, seed: int, resamples: int
) -> Mapping[str, Estimate]:
    """Every estimator's answer."""
    drawn = {"seed": seed, "resamples": resamples}
    return {
        "ips": ips(log, **drawn),
        "clipped": ips(log, most_weight=MOST_WEIGHT, **drawn),
        "snips": snips(log, **drawn),
        "dr": doubly_robust(log, predicted_N, expected_N, **drawn),
        "switch": doubly_robust(log, predicted_N, expected_N, switch=MOST_WEIGHT, **drawn),
    }
