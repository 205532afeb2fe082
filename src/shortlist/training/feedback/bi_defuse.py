"""Bi-DEFUSE: conversions within the observation window and after it are two outputs; only the second needs correction.

"Asymptotically Unbiased Estimation for Delayed Feedback Modeling via Label Correction", Chen et al., WWW 2022.

    chance = sigmoid(within) + sigmoid(after), at most 1
    within   plain cross-entropy with the label seen; late copies do not count: what it learns from is final
    after    s: every click a negative first, every late copy a positive; r = s, not differentiated
             late copy: up 1          first copy: up r^2, down (1 - r)(1 + r)

Late copies weigh dp, so dp + s^2 up against 1 - s^2 down balance at s = dp. Both losses weigh the same. The two outputs are tasks of
whatever ranker is used: one network with two outputs of a DNN (the authors' simpler form), or a shared and an own expert for each, as in
the paper, of mmoe or ple. (The authors' code calls the first expert for both outputs.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shortlist.registry import system
from shortlist.training.feedback.base import LATE, FeedbackRule, Seen, cross_entropy


@dataclass(frozen=True, kw_only=True, slots=True)
class BiDEFUSEConfig:
    """Settings of Bi-DEFUSE."""


@system("bi-defuse", stage="training", paper="Chen et al., WWW 2022")
class BiDEFUSE(FeedbackRule):
    """Early and late conversions as two outputs of one network, added."""

    Config = BiDEFUSEConfig
    heads = ("within", "after")
    own_chance = False

    def targets(self, chance_n: Tensor, seen: Seen) -> tuple[Tensor, Tensor]:
        """Of the second output, for its chances [n]; see FeedbackRule."""
        is_late_n = (seen.kind == LATE).to(chance_n.dtype)
        up_n = is_late_n + (1 - is_late_n) * chance_n.square()
        return up_n, (1 - is_late_n) * (1 - chance_n) * (1 + chance_n)

    def losses(self, logit_nH: Tensor, seen: Seen) -> Tensor:
        """See FeedbackRule. The first output's losses are scaled so that their mean over the samples is that over first copies."""
        within_n, after_n = logit_nH.unbind(1)
        first_n = (seen.kind != LATE).to(logit_nH.dtype)
        scale_n = first_n * len(first_n) / first_n.sum().clamp(min=1)
        with torch.no_grad():
            up_n, down_n = self.targets(after_n.sigmoid(), seen)
        return scale_n * cross_entropy(within_n, seen.label, 1 - seen.label) + cross_entropy(after_n, up_n, down_n)

    def first_losses(self, logit_nH: Tensor, seen: Seen) -> Tensor:
        """See FeedbackRule: old clicks, of which it is known whether they converted early or late."""
        within_n, after_n = logit_nH.unbind(1)
        is_late_n = (seen.kind == LATE).to(logit_nH.dtype)
        early_n = seen.label - is_late_n
        return cross_entropy(within_n, early_n, 1 - early_n) + cross_entropy(after_n, is_late_n, 1 - is_late_n)

    def chance(self, logit_nH: Tensor) -> Tensor:
        """See FeedbackRule."""
        return logit_nH.sigmoid().sum(1).clamp(max=1.0)
