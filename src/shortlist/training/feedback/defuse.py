"""DEFUSE: observed negatives are split by the chance that they are fake, and the fake part is learned as positive.

"Asymptotically Unbiased Estimation for Delayed Feedback Modeling via Label Correction", Chen et al., WWW 2022.

    immediate positive 1 + dp     late positive 1     fake negative, as positive, dp     real negative 1 + dp

so that positives weigh p (1 + dp) and negatives (1 - p)(1 + dp). Fake and real negatives look alike; z = P(fake | observed negative) splits
each: up = z f_dp, down = (1 - z)(1 + f_dp). z is 1 - f_rn ("f_rn", the released code's), or f_dp / (f_dp + 1 - f) from the network's own
chance f ("current"). The same correction fits other rules' samples: what is emitted of a click has mass m; the samples of one that converts
late weigh 1 as the late and m - 1 as the fake one, every other sample m over its click's copies.

    samples     m         others    from
    es-dfm      1 + dp    1 + dp    as above
    fnw         1 + dp    1 + dp    no window, so that every conversion is late: dp = f, and z = f; no auxiliary network
    defer       2         1         nothing is left to weigh, only labels are corrected; settled samples are what they say

Reconstructed: the paper itself was not at hand; the weights are the code's, checked for unbiasedness, but by kind (the code adds those of
immediate and late positives for every positive, which ends near .33 where p = .2 and h = .5), on DEFER's samples with the masses of those
(the code keeps 1 + dp, which by kind ends near .16 there), and samples come when the observation window closes (the code's come at the
click, whose label is not known then).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shortlist.errors import ConfigError
from shortlist.registry import system
from shortlist.training.feedback.base import LATE, NEGATIVE, FeedbackRule, Seen, Stream
from shortlist.training.feedback.targets import LateConversions

STREAMS: dict[str, Stream] = {"es-dfm": "late", "fnw": "fake-negatives", "defer": "settled"}
"""What is emitted, by the rule whose samples they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DEFUSEConfig:
    """Settings of DEFUSE."""

    samples: Literal["es-dfm", "fnw", "defer"] = "es-dfm"
    """Whose samples are learned from: those of the observation window with late positives, every click as a negative at once, or with all
    clicks once more when they are settled."""
    posterior: Literal["f_rn", "current"] = "f_rn"
    """How likely an observed negative is fake: by the auxiliary network, or by its f_dp and the network's own chance."""

    def __post_init__(self) -> None:
        if self.samples not in STREAMS:
            raise ConfigError(f"defuse: samples must be one of {', '.join(STREAMS)}, got {self.samples!r}")
        if self.posterior not in ("f_rn", "current"):
            raise ConfigError(f"defuse: posterior must be f_rn or current, got {self.posterior!r}")
        if self.samples == "fnw" and self.posterior == "f_rn":
            raise ConfigError(
                'defuse: samples = "fnw" has no observation window and so no f_rn; set posterior = "current" as well'
            )


@system("defuse", stage="training", paper="Chen et al., WWW 2022")
class DEFUSE(FeedbackRule):
    """Importance weights by kind of sample, with the labels of likely fake negatives corrected."""

    Config = DEFUSEConfig

    def __init__(self, config: DEFUSEConfig) -> None:
        super().__init__(config)
        self.auxiliary = None if config.samples == "fnw" else LateConversions()

    @property
    def stream(self) -> Stream:
        """See FeedbackRule."""
        return STREAMS[self.config.samples]

    def targets(self, chance_n: Tensor, seen: Seen) -> tuple[Tensor, Tensor]:
        """See FeedbackRule."""
        dp_n = seen.auxiliary["f_dp"] if self.auxiliary else chance_n
        mass_n, other_n = 1 + dp_n, 1 + dp_n
        if self.config.samples == "defer":
            mass_n, other_n = torch.full_like(dp_n, 2), torch.ones_like(dp_n)
        fake_n = torch.where(seen.kind == NEGATIVE, self._fake(chance_n, dp_n, seen), 0)
        positive_n = torch.where(seen.kind == LATE, 1, other_n)
        up_n = torch.where(seen.label > 0, positive_n, fake_n * (mass_n - 1))
        return up_n, torch.where(seen.label > 0, 0, (1 - fake_n) * other_n)

    def _fake(self, chance_n: Tensor, dp_n: Tensor, seen: Seen) -> Tensor:
        """[n]: z, the chance that an observed negative converts later."""
        if self.config.posterior == "f_rn":
            return 1 - seen.auxiliary["f_rn"]
        return dp_n / (dp_n + 1 - chance_n).clamp(min=1e-12)
