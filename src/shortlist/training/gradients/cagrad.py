"""CAGrad: the direction near the mean gradient that helps the worst-off task most.

"Conflict-Averse Gradient Descent for Multi-task Learning", Liu et al., NeurIPS 2021: max over d of min_i g_i.d with |d - g_0| <= c |g_0|,
g_0 the mean. Its dual is min over the simplex of F(w) = g_w.g_0 + c |g_0| |g_w|, and d = g_0 + c |g_0| g_w / |g_w|. Difference: d is
divided by 1 + c, so that equal gradients give their mean; the authors' code divides by 1 + c^2, which only scales the learning rate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shortlist.errors import ConfigError
from shortlist.registry import system
from shortlist.training.gradients.base import Floats, GradientRule
from shortlist.training.gradients.solvers import on_simplex


@dataclass(frozen=True, kw_only=True, slots=True)
class CAGradConfig:
    """Settings of CAGrad."""

    c: float = 0.5
    """How far from the mean gradient the direction may lie, as a share of its length: 0 = the mean; near 1 it nears MGDA's."""

    def __post_init__(self) -> None:
        if not 0 <= self.c < 1:
            raise ConfigError(f"cagrad: c must be from 0 to below 1, got {self.c}")


@system("cagrad", stage="training", paper="Liu et al., NeurIPS 2021")
class CAGrad(GradientRule):
    """The best direction for the worst-off task within a ball around the mean gradient."""

    Config = CAGradConfig

    def __init__(self, config: CAGradConfig) -> None:
        self.config = config

    def weigh(self, gram_TT: Floats, place: int) -> Floats:
        """See GradientRule."""
        num_tasks, c = len(gram_TT), self.config.c
        mean_T = np.full(num_tasks, 1 / num_tasks)
        slope_T = gram_TT @ mean_T
        radius = c * float(np.sqrt(max(float(slope_T.mean()), 0.0)))
        worst_T = on_simplex(gram_TT, slope_T, radius)
        length = float(np.sqrt(max(float(worst_T @ gram_TT @ worst_T), 0.0)))
        if length <= 0.0:  # no direction helps every task
            return mean_T
        return (mean_T + radius / length * worst_T) / (1 + c)
