"""MGDA: the shortest convex combination of the tasks' gradients, which points against none of them.

"Multi-Task Learning as Multi-Objective Optimization", Sener and Koltun, NeurIPS 2018: min over the simplex of |sum_i w_i g_i|^2. It is 0
exactly where no direction improves all tasks. Differences: the minimum is found exactly, by exchanges of pairs of weights in place of
Frank-Wolfe steps; `unit` lets every gradient count with length 1, since the shortest combination leans to the shortest gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shortlist.registry import system
from shortlist.training.gradients.base import Floats, GradientRule
from shortlist.training.gradients.solvers import on_simplex


@dataclass(frozen=True, kw_only=True, slots=True)
class MGDAConfig:
    """Settings of MGDA."""

    unit: bool = False
    """Choose the weights for gradients scaled to length 1, then scale back by the mean of their lengths."""


@system("mgda", stage="training", paper="Sener & Koltun, NeurIPS 2018")
class MGDA(GradientRule):
    """The minimum-norm point of the gradients' convex hull."""

    Config = MGDAConfig

    def __init__(self, config: MGDAConfig) -> None:
        self.config = config

    def weigh(self, gram_TT: Floats, place: int) -> Floats:
        """See GradientRule."""
        if not self.config.unit:
            return on_simplex(gram_TT)
        norm_T = np.sqrt(np.diag(gram_TT))
        return on_simplex(gram_TT / np.outer(norm_T, norm_T)) / norm_T * norm_T.mean()
