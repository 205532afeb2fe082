"""ES-DFM: elapsed-time sampling, with weights that turn what is seen into what is true.

"Capturing Delayed Feedback in Conversion Rate Prediction via Elapsed-Time Sampling", Yang et al., AAAI 2021, section 4.

    positive   1 + f_dp          negative   (1 + f_dp) f_rn

f_dp = P(converts, but late), f_rn = P(never converts | has not within the observation window), both of a frozen auxiliary network. With
both exact it is unbiased: positives weigh p (1 + dp), negatives (1 - p + dp)(1 + dp)(1 - p)/(1 - p + dp) = (1 - p)(1 + dp).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shortlist.registry import system
from shortlist.training.feedback.base import FeedbackRule, Seen, by_label
from shortlist.training.feedback.targets import LateConversions


@dataclass(frozen=True, kw_only=True, slots=True)
class ESDFMConfig:
    """ES-DFM has no settings."""


@system("es-dfm", stage="training", paper="Yang et al., AAAI 2021")
class ESDFM(FeedbackRule):
    """Late positives as further samples, and importance weights from an auxiliary network."""

    Config = ESDFMConfig
    auxiliary = LateConversions()

    def targets(self, chance_n: Tensor, seen: Seen) -> tuple[Tensor, Tensor]:
        """See FeedbackRule."""
        whole_n = 1 + seen.auxiliary["f_dp"]
        return by_label(seen, whole_n, whole_n * seen.auxiliary["f_rn"])
