"""The true rewards as values: what no allocator can pass, to measure others by."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shortlist.cascade.allocation.base import Float
from shortlist.cascade.allocation.body import ChoiceConfig, Chooser
from shortlist.errors import ConfigError
from shortlist.registry import system


@system("oracle", stage="allocation", paper="baseline")
class Oracle(Chooser):
    """Knows every chain's true reward for the very request; for reference, and refuses to serve.

    `aim_at(budget, rewards_RJ, kind_R)` and `choose_by(rewards_RJ, kind_R)` take the rewards; kinds are 0.

    Args:
        config: settings.
        chains: to choose from.
        num_features: F.
    """

    Config = ChoiceConfig

    def values(self, contexts_RF: NDArray[np.float32]) -> Float:
        """ConfigError: features are not enough."""
        raise ConfigError(
            "the oracle needs the true rewards of the requests that it chooses for, so it can not serve; choose greenflow or dcaf"
        )
