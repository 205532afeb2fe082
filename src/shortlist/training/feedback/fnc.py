"""FNC: fake negatives, calibrated. Learned as labelled, and what comes out is turned back into the chance.

"Addressing delayed feedback for continuous training with neural networks in CTR prediction", Ktena et al., RecSys 2019, section 4.2.

With every click a negative and every conversion a further positive, the network learns b = p / (1 + p); p = b / (1 - b). In logits that
is p = exp(logit), at most 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shortlist.registry import system
from shortlist.training.feedback.base import FeedbackRule, Seen, Stream, cross_entropy


@dataclass(frozen=True, kw_only=True, slots=True)
class FNCConfig:
    """FNC has no settings."""


@system("fnc", stage="training", paper="Ktena et al., RecSys 2019")
class FNC(FeedbackRule):
    """Every click a negative, every conversion a positive, and the odds that come out are the chance."""

    Config = FNCConfig
    own_chance = False

    @property
    def stream(self) -> Stream:
        """See FeedbackRule."""
        return "fake-negatives"

    def targets(self, chance_n: Tensor, seen: Seen) -> tuple[Tensor, Tensor]:
        """See FeedbackRule: the label."""
        return seen.label, 1 - seen.label

    def first_losses(self, logit_nH: Tensor, seen: Seen) -> Tensor:
        """See FeedbackRule: each click as a negative and each conversion once more, so that training begins at b."""
        return cross_entropy(logit_nH[:, 0], seen.label, torch.ones_like(seen.label))

    def chance(self, logit_nH: Tensor) -> Tensor:
        """See FeedbackRule."""
        return logit_nH[:, 0].clamp(max=0.0).exp()
