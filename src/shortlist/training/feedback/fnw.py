"""FNW: fake negatives, weighed. Every click is a negative at once and a second, positive sample when it converts.

"Addressing delayed feedback for continuous training with neural networks in CTR prediction", Ktena et al., RecSys 2019, section 4.2.

    positive   1 + f          negative   (1 - f)(1 + f)          f the network's own chance, not differentiated

No observation window is waited for. Masses: p up, 1 down, so that p (1 + f)(1 - f) = (1 - f)(1 + f) f at f = p.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shortlist.registry import system
from shortlist.training.feedback.base import FeedbackRule, Seen, Stream, by_label


@dataclass(frozen=True, kw_only=True, slots=True)
class FNWConfig:
    """FNW has no settings."""


@system("fnw", stage="training", paper="Ktena et al., RecSys 2019")
class FNW(FeedbackRule):
    """Every click a negative, every conversion a positive, weighed by the network's own chance."""

    Config = FNWConfig

    @property
    def stream(self) -> Stream:
        """See FeedbackRule."""
        return "fake-negatives"

    def targets(self, chance_n: Tensor, seen: Seen) -> tuple[Tensor, Tensor]:
        """See FeedbackRule."""
        return by_label(seen, 1 + chance_n, (1 - chance_n) * (1 + chance_n))
