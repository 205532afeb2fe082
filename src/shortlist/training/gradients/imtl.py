"""IMTL-G: the combination with the same projection on every task's gradient, whatever the lengths of the gradients.

"Towards Impartial Multi-task Learning", Liu et al., ICLR 2021, equation 6. With u_i = g_i / |g_i|, D = [g_1 - g_i], U = [u_1 - u_i] for
i = 2..T, the weights of tasks 2..T are g_1 U' (D U')^-1 and all add up to 1. Weights may be negative. The paper's IMTL-L, which learns
scales of the losses, is not built. T tasks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shortlist.registry import system
from shortlist.training.gradients.base import Floats, GradientRule


@dataclass(frozen=True, kw_only=True, slots=True)
class IMTLConfig:
    """IMTL-G has no settings."""


@system("imtl-g", stage="training", paper="Liu et al., ICLR 2021")
class IMTL(GradientRule):
    """Weights, adding up to 1, under which the step makes the same angle with all tasks' gradients."""

    Config = IMTLConfig

    def __init__(self, config: IMTLConfig) -> None:
        self.config = config

    def weigh(self, gram_TT: Floats, place: int) -> Floats:
        """See GradientRule. Where directions are equal, the least-squares solution stands in for the inverse."""
        norm_T = np.sqrt(np.diag(gram_TT))
        along_TT = gram_TT / norm_T  # g_i . u_j
        first_U = along_TT[0, 0] - along_TT[0, 1:]
        rest_DU = along_TT[0, 0] - along_TT[0, 1:][None] - along_TT[1:, 0][:, None] + along_TT[1:, 1:]
        others = np.linalg.lstsq(rest_DU.T, first_U, rcond=1e-12)[0]
        return np.concatenate([[1 - others.sum()], others])
