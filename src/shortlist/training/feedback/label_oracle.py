"""The oracle of labels: every click at once with the label that it will have when its attribution window closes.

It can not be had outside an experiment, and is what the others are measured against.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shortlist.registry import system
from shortlist.training.feedback.base import FeedbackRule, Seen, Stream


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelOracleConfig:
    """The oracle has no settings."""


@system("label-oracle", stage="training", paper="baseline")
class LabelOracle(FeedbackRule):
    """Final labels at the time of the click: the bound of what can be learned."""

    Config = LabelOracleConfig
    realisable = False

    @property
    def stream(self) -> Stream:
        """See FeedbackRule."""
        return "final"

    def targets(self, chance_n: Tensor, seen: Seen) -> tuple[Tensor, Tensor]:
        """See FeedbackRule: the label."""
        return seen.label, 1 - seen.label
