"""DEFER: every click twice, so that features keep their frequencies, and weights from the shift in labels.

"Real Negatives Matter: Continuous Training with Real Negatives for Delayed Feedback Modeling", Gu et al., KDD 2021, section 4.

Beside the late positives, clicks that did not convert, and those that did at once, are emitted again when the attribution window closes.
So a click's mass is exactly 2, and q(1) = p - dp/2:

    positive   p / (p - dp/2)          negative   (1 - p) / (1 - p + dp/2)

p is the network's own chance, not differentiated; dp the joint chance f_dp of a frozen auxiliary network, at most p. (The authors' code
has 2 p / p (2 - h) where 2 / (2 - h) is meant, and takes h for dp; that ends at 0.41 where p = 0.2 and h = 0.5.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shortlist.registry import system
from shortlist.training.feedback.base import FeedbackRule, Seen, Stream, by_label
from shortlist.training.feedback.targets import LateConversions


@dataclass(frozen=True, kw_only=True, slots=True)
class DEFERConfig:
    """DEFER has no settings."""


@system("defer", stage="training", paper="Gu et al., KDD 2021")
class DEFER(FeedbackRule):
    """All clicks once more when their outcome is settled, and weights for the labels' shift."""

    Config = DEFERConfig
    auxiliary = LateConversions()

    @property
    def stream(self) -> Stream:
        """See FeedbackRule."""
        return "settled"

    def targets(self, chance_n: Tensor, seen: Seen) -> tuple[Tensor, Tensor]:
        """See FeedbackRule."""
        p_n = chance_n.clamp(min=torch.finfo(chance_n.dtype).tiny)
        half_n = torch.minimum(seen.auxiliary["f_dp"], p_n) / 2
        return by_label(seen, p_n / (p_n - half_n), (1 - p_n) / (1 - p_n + half_n).clamp(min=1e-12))
