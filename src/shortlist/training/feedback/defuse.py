"""DEFUSE: observed negatives are split by the chance that they are fake, and the fake part is learned as positive.

"Asymptotically Unbiased Estimation for Delayed Feedback Modeling via Label Correction", Chen et al., WWW 2022.

    immediate positive 1 + dp     late positive 1     fake negative, as positive, dp     real negative 1 + dp

so that positives weigh p (1 + dp) and negatives (1 - p)(1 + dp). Fake and real negatives look alike; z = P(fake | observed negative) splits
each: up = z f_dp, down = (1 - z)(1 + f_dp). z is 1 - f_rn ("f_rn", the released code's), or f_dp / (f_dp + 1 - f) from the network's own
chance f ("current"). Reconstructed: the paper itself was not at hand; the weights are the code's, checked for unbiasedness, but by kind
(the code adds those of immediate and late positives for every positive, which ends near .33 where p = .2 and h = .5), and samples come
when the observation window closes (the code's come at the click, whose label is not known then).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shortlist.errors import ConfigError
from shortlist.registry import system
from shortlist.training.feedback.base import LATE, FeedbackRule, Seen
from shortlist.training.feedback.targets import LateConversions


@dataclass(frozen=True, kw_only=True, slots=True)
class DEFUSEConfig:
    """Settings of DEFUSE."""

    posterior: Literal["f_rn", "current"] = "f_rn"
    """How likely an observed negative is fake: by the auxiliary network, or by its f_dp and the network's own chance."""

    def __post_init__(self) -> None:
        if self.posterior not in ("f_rn", "current"):
            raise ConfigError(f"defuse: posterior must be f_rn or current, got {self.posterior!r}")


@system("defuse", stage="training", paper="Chen et al., WWW 2022")
class DEFUSE(FeedbackRule):
    """Importance weights by kind of sample, with the labels of likely fake negatives corrected."""

    Config = DEFUSEConfig
    auxiliary = LateConversions()

    def targets(self, chance_n: Tensor, seen: Seen) -> tuple[Tensor, Tensor]:
        """See FeedbackRule."""
        f_dp_n = seen.auxiliary["f_dp"]
        fake_n = self._fake(chance_n, seen)
        positive_n = torch.where(seen.kind == LATE, torch.ones_like(f_dp_n), 1 + f_dp_n)
        up_n = torch.where(seen.label > 0, positive_n, fake_n * f_dp_n)
        return up_n, torch.where(seen.label > 0, torch.zeros_like(up_n), (1 - fake_n) * (1 + f_dp_n))

    def _fake(self, chance_n: Tensor, seen: Seen) -> Tensor:
        """[n]: z, the chance that an observed negative converts later."""
        if self.config.posterior == "f_rn":
            return 1 - seen.auxiliary["f_rn"]
        return seen.auxiliary["f_dp"] / (seen.auxiliary["f_dp"] + 1 - chance_n).clamp(min=1e-12)
