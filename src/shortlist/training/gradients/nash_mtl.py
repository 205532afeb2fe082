"""Nash-MTL: the weights on which the tasks would agree in a bargain.

"Multi-Task Learning as a Bargaining Game", Navon et al., ICML 2022: a > 0 with M a = 1 / a, elementwise. That is where the gradient of
a'Ma / 2 - sum_i log a_i is 0, a strictly convex function; damped Newton steps reach it, where the paper solves a sequence of convex
programs. Differences: the weights are scaled to add up to 1, so that the learning rate means what it means for the sum (the paper's step
always has length sqrt(T), and is clipped to norm 1). T tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from shortlist.errors import ConfigError
from shortlist.registry import system
from shortlist.training.gradients.base import Floats, GradientRule

NEWTON_STEPS = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class NashMTLConfig:
    """Settings of Nash-MTL."""

    every: int = 1
    """Steps between two solutions; in between the last weights stand."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(f"nash-mtl: every must be at least 1, got {self.every}")


@system("nash-mtl", stage="training", paper="Navon et al., ICML 2022")
class NashMTL(GradientRule):
    """The tasks' Nash bargaining solution: every task gains in proportion to what its gradient offers."""

    Config = NashMTLConfig

    def __init__(self, config: NashMTLConfig) -> None:
        self.config = config
        self.last: list[float] = []
        self.age = 0

    def weigh(self, gram_TT: Floats, place: int) -> Floats:
        """See GradientRule."""
        if len(self.last) != len(gram_TT) or self.age >= self.config.every:
            self.last, self.age = bargained(gram_TT).tolist(), 0
        self.age += 1
        return np.array(self.last)

    def state(self) -> dict[str, Any]:
        """The last weights and their age in steps."""
        return {"last": self.last, "age": self.age}

    def load_state(self, state: dict[str, Any]) -> None:
        """See GradientRule."""
        self.last, self.age = [float(weight) for weight in state["last"]], int(state["age"])


def bargained(gram_TT: Floats) -> Floats:
    """float64 [T], adding up to 1: proportional to a with M a = 1 / a.

    Where a combination of the gradients is 0, no such a exists and the weights tend to that combination.
    """
    norm_T = np.sqrt(np.diag(gram_TT))
    scaled_TT = gram_TT / np.outer(norm_T, norm_T)  # lengths only scale a
    a_T = np.full(len(gram_TT), 1 / np.sqrt(len(gram_TT)))
    for _ in range(NEWTON_STEPS):
        slope_T = scaled_TT @ a_T - 1 / a_T
        step_T = np.linalg.solve(scaled_TT + np.diag(1 / a_T**2), slope_T)
        decrement = float(np.sqrt(max(slope_T @ step_T, 0.0)))
        a_T = a_T - step_T / (1 + decrement)  # stays above 0: the function is self-concordant
        if decrement < 1e-12 or a_T.max() > 1e8:
            break
    weight_T: Floats = a_T / norm_T
    return weight_T / weight_T.sum()
