"""GradVac: PCGrad that aims at the usual cosine of each pair of tasks instead of at 0.

"Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively Multilingual Models", Wang et al., ICLR 2021,
algorithm 1. For each i, over the other tasks j in random order, with phi the cosine of the current g_i' and g_j and rho_ij its running
mean: where phi < rho_ij

    g_i' += |g_i'| (rho sqrt(1 - phi^2) - phi sqrt(1 - rho^2)) / (|g_j| sqrt(1 - rho^2)) g_j

after which the cosine is rho; then rho_ij moves towards phi. The sum of all g_i' is the step. The paper keeps one rho per pair and
parameter matrix, here `by = "matrix"`; running means start at 0. T tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from shortlist.errors import ConfigError
from shortlist.registry import system
from shortlist.training.gradients.base import Floats, GradientRule
from shortlist.training.gradients.pcgrad import orders

CLOSE = 1 - 1e-12
"""Cosines are kept this far from 1, where no finite step reaches them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GradVacConfig:
    """Settings of GradVac."""

    decay: float = 0.01
    """How far the running cosine moves towards the one of the step."""
    by: Literal["matrix", "model"] = "matrix"
    """One running cosine per pair of tasks and parameter tensor, as in the paper, or one for all parameters."""

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            raise ConfigError(f"gradvac: decay must be above 0 and at most 1, got {self.decay}")


@system("gradvac", stage="training", paper="Wang et al., ICLR 2021")
class GradVac(GradientRule):
    """Turns each task's gradient towards the others until their cosines are as high as they usually are."""

    Config = GradVacConfig

    def __init__(self, config: GradVacConfig) -> None:
        self.config = config
        self.by_matrix = config.by == "matrix"
        self.usual: dict[int, Floats] = {}
        """Running cosine [T, T] by place."""

    def weigh(self, gram_TT: Floats, place: int) -> Floats:
        """See GradientRule. Where a task is missing in a step, the running cosines begin anew."""
        num_tasks = len(gram_TT)
        usual_TT = self.usual.get(place)
        if usual_TT is None or len(usual_TT) != num_tasks:
            usual_TT = np.zeros_like(gram_TT)
        every, norm_T = np.arange(num_tasks), np.sqrt(np.diag(gram_TT))
        mixed_TT, usual_TT = np.eye(num_tasks), usual_TT.copy()
        for other_T in orders(num_tasks).T:
            own_T = np.sqrt(np.einsum("ij,jk,ik->i", mixed_TT, gram_TT, mixed_TT).clip(min=0))
            product_T = (mixed_TT * gram_TT[other_T]).sum(1)
            cosine_T = (product_T / (own_T * norm_T[other_T]).clip(min=1e-300)).clip(-CLOSE, CLOSE)
            aim_T = usual_TT[every, other_T]
            gain_T = own_T * (aim_T * np.sqrt(1 - cosine_T**2) - cosine_T * np.sqrt(1 - aim_T**2))
            gain_T /= norm_T[other_T] * np.sqrt(1 - aim_T**2)
            mixed_TT[every, other_T] += np.where(cosine_T < aim_T, gain_T, 0.0)
            usual_TT[every, other_T] += self.config.decay * (cosine_T - aim_T)
        self.usual[place] = usual_TT
        return mixed_TT.sum(0) / num_tasks

    def state(self) -> dict[str, Any]:
        """The running cosines."""
        return {str(place): usual_TT.tolist() for place, usual_TT in self.usual.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        """See GradientRule."""
        self.usual = {int(place): np.array(rows, dtype=np.float64) for place, rows in state.items()}
