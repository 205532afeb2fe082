"""Vanilla: labels as they are when the observation window closes, taken at their word.

The baseline of ES-DFM (Yang et al., AAAI 2021) and DEFUSE (Chen et al., WWW 2022). One copy per click ends at f = p (1 - h). With the late
positives as further samples ("Vanilla-Win" in DEFUSE's code, "Vanilla" in ES-DFM's table) it ends at p / (1 + dp): still low.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shortlist.registry import system
from shortlist.training.feedback.base import FeedbackRule, Seen, Stream


@dataclass(frozen=True, kw_only=True, slots=True)
class VanillaConfig:
    """Settings of Vanilla."""

    duplicates: bool = False
    """A late conversion is one more sample; else it is lost."""


@system("vanilla", stage="training", paper="baseline")
class Vanilla(FeedbackRule):
    """Labels as seen within the observation window, without correction."""

    Config = VanillaConfig

    @property
    def stream(self) -> Stream:
        """See FeedbackRule."""
        return "late" if self.config.duplicates else "observed"

    def targets(self, chance_n: Tensor, seen: Seen) -> tuple[Tensor, Tensor]:
        """See FeedbackRule: the label."""
        return seen.label, 1 - seen.label
