"""DFM: the chance of a conversion and the rate at which it comes, learned together as a survival model.

"Modeling Delayed Feedback in Display Advertising", Chapelle, KDD 2014, section 4. With rate L = softplus(second output) per day:

    converted after d          -(log p + log L - L d)
    not converted at age e     -log(1 - p + p exp(-L e))

Delays are taken to be exponential; where they are not, p is wrong, the more so the shorter clicks are watched. Each click is one sample;
late conversions are not used. The actual delay is read, in days; the code bases of ES-DFM and DEFUSE pass the age, in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from shortlist.registry import system
from shortlist.training.feedback.base import DAY_S, FeedbackRule, Seen, Stream

TINY = 1e-6
"""The rate per day is at least this, so that its logarithm exists."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DFMConfig:
    """DFM has no settings."""


@system("dfm", stage="training", paper="Chapelle, KDD 2014")
class DFM(FeedbackRule):
    """A chance and an exponential delay, by maximum likelihood."""

    Config = DFMConfig
    heads = ("chance", "rate")
    as_known = True
    own_chance = False

    @property
    def stream(self) -> Stream:
        """See FeedbackRule."""
        return "observed"

    def losses(self, logit_nH: Tensor, seen: Seen) -> Tensor:
        """See FeedbackRule."""
        rate_n = softplus(logit_nH[:, 1]) + TINY
        yes_n, no_n = logsigmoid(logit_nH[:, 0]), logsigmoid(-logit_nH[:, 0])
        came_n = yes_n + rate_n.log() - rate_n * seen.delay.nan_to_num() / DAY_S
        not_yet_n = torch.logaddexp(no_n, yes_n - rate_n * seen.elapsed / DAY_S)
        return -torch.where(seen.label > 0, came_n, not_yet_n)

    def first_losses(self, logit_nH: Tensor, seen: Seen) -> Tensor:
        """See FeedbackRule: the same, which is right at any age."""
        return self.losses(logit_nH, seen)
