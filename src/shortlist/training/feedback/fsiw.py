"""FSIW: feedback-shift importance weights, from two auxiliary networks that know how old a click is.

"A Feedback Shift Correction in Predicting Conversion Rates under Delayed Feedback", Yasui et al., WWW 2020, section 4.

    positive   1 / f1, f1 = P(has converted by its age | converts)          negative   f0 = P(never converts | has not by its age)

Each click is one sample; late conversions are not used. Differences: the networks read the age on a logarithmic scale, since days do not
resolve an hour, and f1 is bounded below.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shortlist.errors import ConfigError
from shortlist.registry import system
from shortlist.training.feedback.base import FeedbackRule, Seen, Stream, by_label
from shortlist.training.feedback.targets import CounterfactualDeadline


@dataclass(frozen=True, kw_only=True, slots=True)
class FSIWConfig:
    """Settings of FSIW."""

    deadline_hours: float = 168.0
    """The auxiliary networks learn as if it were so many hours earlier than it is, so that what came since tells them the truth."""
    least: float = 0.01
    """f1 is taken to be at least this: no positive weighs more than 1 / least."""

    def __post_init__(self) -> None:
        if not self.deadline_hours > 0 or not 0 < self.least <= 1:
            raise ConfigError(
                f"fsiw: deadline_hours must be above 0 and least in 0..1, got {self.deadline_hours:g} and {self.least:g}"
            )


@system("fsiw", stage="training", paper="Yasui et al., WWW 2020")
class FSIW(FeedbackRule):
    """Positives weigh one over the chance to be seen by now, negatives the chance to stay one."""

    Config = FSIWConfig
    as_known = True

    def __init__(self, config: FSIWConfig) -> None:
        super().__init__(config)
        self.auxiliary = CounterfactualDeadline(config.deadline_hours)

    @property
    def stream(self) -> Stream:
        """See FeedbackRule."""
        return "observed"

    def targets(self, chance_n: Tensor, seen: Seen) -> tuple[Tensor, Tensor]:
        """See FeedbackRule."""
        return by_label(seen, 1 / seen.auxiliary["f1"].clamp(min=self.config.least), seen.auxiliary["f0"])
