"""GradOPS: every conflicting gradient is projected off the span of all others at once, so that no combination conflicts with any task.

"Gradient Deconfliction via Orthogonal Projections onto Subspaces For Multi-task Learning", Zhu et al., WSDM 2025.

    g_i' = g_i - P_i g_i, P_i the projection on span{g_j : j != i}, where g_i.g_j < 0 for some j; else g_i' = g_i

Then g_i'.g_j >= 0 for all i and j, and so (sum_i w_i g_i').g_j >= 0 for all weights w >= 0. For two tasks it is PCGrad. The weights carry
the trade-off between tasks (reconstructed: the published text was not at hand):

    r_i = (sum_j g_j').g_i / |g_i|^2        R_i = r_i / mean r        w_i = R_i^alpha / mean R^alpha

alpha above 0 favours tasks that gain most already, below 0 the neglected ones, 0 is the plain sum of the g_i'. A fixed preference for a
task is the trainer's `task_weights`: a span does not change with the lengths of its vectors, so it scales g_i' alone.
Only inner products are needed: g_i' = A_i G with A_i from a pseudo-inverse of the others' products, where the paper orthogonalises the
gradients themselves. The promise is one of the gradient: an optimiser that rescales coordinates may still step against a task. T tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from shortlist.errors import ConfigError
from shortlist.registry import system
from shortlist.training.gradients.base import Floats, GradientRule

NOTHING_LEFT = 1e-10
"""Share of a gradient's square below which its projection is rounding error, and taken as 0."""
LEAST, MOST = 1e-3, 1e3


@dataclass(frozen=True, kw_only=True, slots=True)
class GradOPSConfig:
    """Settings of GradOPS."""

    alpha: float = 0.0
    """Trade-off: above 0 for tasks that gain most already, below 0 for neglected ones, 0 for all alike."""
    span: Literal["others", "conflicting"] = "others"
    """Project off all other gradients, or off the conflicting ones alone: that keeps more of a gradient, but not the promise."""

    def __post_init__(self) -> None:
        if not np.isfinite(self.alpha):
            raise ConfigError(f"gradops: alpha must be a number, got {self.alpha}")


@system("gradops", stage="training", paper="Zhu et al., WSDM 2025")
class GradOPS(GradientRule):
    """Gradients without any conflict, by orthogonal projections, weighed by one trade-off."""

    Config = GradOPSConfig

    def __init__(self, config: GradOPSConfig) -> None:
        self.config = config

    def weigh(self, gram_TT: Floats, place: int) -> Floats:
        """See GradientRule."""
        num_tasks = len(gram_TT)
        mixed_TT = projected(gram_TT, only_conflicting=self.config.span == "conflicting")
        gain_T = (mixed_TT.sum(0) @ gram_TT / np.diag(gram_TT)).clip(min=0)
        weight_T = np.ones(num_tasks)
        if gain_T.mean() > 0:
            weight_T = (gain_T / gain_T.mean()).clip(LEAST, MOST) ** self.config.alpha
        return weight_T / weight_T.mean() @ mixed_TT / num_tasks


def projected(gram_TT: Floats, *, only_conflicting: bool = False) -> Floats:
    """float64 [T, T]: row i has the coefficients of g_i' in the gradients; the identity's row where nothing conflicts with g_i."""
    norm_T = np.sqrt(np.diag(gram_TT))
    cosine_TT = gram_TT / np.outer(norm_T, norm_T)
    mixed_TT = np.eye(len(gram_TT))
    for task in np.flatnonzero((gram_TT < 0).any(1)):
        off = gram_TT[task] < 0 if only_conflicting else np.arange(len(gram_TT)) != task
        part_R = np.linalg.pinv(cosine_TT[np.ix_(off, off)], rcond=1e-12, hermitian=True) @ cosine_TT[off, task]
        if 1 - float(part_R @ cosine_TT[off, task]) < NOTHING_LEFT:
            mixed_TT[task] = 0.0
        else:
            mixed_TT[task, off] -= part_R * norm_T[task] / norm_T[off]
    return mixed_TT
