"""PCGrad: each task's gradient loses what points against another task's, one pair after the other.

"Gradient Surgery for Multi-Task Learning", Yu et al., NeurIPS 2020, algorithm 1: for each i, over the other tasks j in random order,
where g_i'.g_j < 0, g_i' -= (g_i'.g_j / |g_j|^2) g_j with the original g_j; then the sum. With three or more tasks the outcome depends on
the order and may still point against a task.

Here g_i' = C_i G with a row C_i of coefficients, so that no gradient is touched before the end. T tasks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from shortlist.registry import system
from shortlist.training.gradients.base import Floats, GradientRule


@dataclass(frozen=True, kw_only=True, slots=True)
class PCGradConfig:
    """PCGrad has no settings."""


@system("pcgrad", stage="training", paper="Yu et al., NeurIPS 2020")
class PCGrad(GradientRule):
    """Projects each task's gradient off the others that it conflicts with, in random order."""

    Config = PCGradConfig

    def __init__(self, config: PCGradConfig) -> None:
        self.config = config

    def weigh(self, gram_TT: Floats, place: int) -> Floats:
        """See GradientRule. The order is drawn from torch's generator, whose state a checkpoint holds."""
        num_tasks = len(gram_TT)
        every = np.arange(num_tasks)
        mixed_TT = np.eye(num_tasks)
        for other_T in orders(num_tasks).T:
            product_T = (mixed_TT * gram_TT[other_T]).sum(1)
            mixed_TT[every, other_T] -= product_T.clip(max=0) / gram_TT[other_T, other_T]
        return mixed_TT.sum(0) / num_tasks


def orders(num_tasks: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """[T, T - 1] int64: for each task all others in random order."""
    lot = torch.rand(num_tasks, num_tasks, dtype=torch.float64)
    lot.fill_diagonal_(-1.0)
    drawn: np.ndarray[tuple[int, int], np.dtype[np.int64]] = lot.argsort(1)[:, 1:].numpy()
    return drawn
