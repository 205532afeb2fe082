"""The plain sum of the tasks' gradients: what training does without a rule, and what every rule is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shortlist.registry import system
from shortlist.training.gradients.base import Floats, GradientRule


@dataclass(frozen=True, kw_only=True, slots=True)
class SumConfig:
    """The sum has no settings; task weights are the trainer's `task_weights`."""


@system("sum", stage="training", paper="baseline")
class Sum(GradientRule):
    """All tasks' gradients count alike."""

    Config = SumConfig

    def __init__(self, config: SumConfig) -> None:
        self.config = config

    def weigh(self, gram_TT: Floats, place: int) -> Floats:
        """See GradientRule."""
        return np.full(len(gram_TT), 1 / len(gram_TT))
