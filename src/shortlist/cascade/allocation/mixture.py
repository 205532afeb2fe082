"""Random mixtures of fixed chains: the most that can be had at a cost without looking at requests."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from shortlist.cascade.allocation.base import ChainSet, Float, Int
from shortlist.cascade.allocation.body import Bools, ChoiceConfig, Chooser
from shortlist.cascade.allocation.solver import best_mixture
from shortlist.registry import system


@system("mixture", stage="allocation", paper="baseline", cold_users=True)
class Mixture(Chooser):
    """Draws a chain for each request from the best mixture: a point on the upper envelope of all fixed chains' past rewards over cost.

    The fair baseline of every allocator: two fixed chains mixed at random reach any cost between theirs. With one limit it mixes two
    chains, with two at most three. Under a cap the chance of a chain that it excludes goes to the best one before it that it allows.

    Args:
        config: settings.
        chains: to choose from.
        num_features: F.
    """

    Config = ChoiceConfig

    def __init__(self, config: ChoiceConfig, chains: ChainSet, num_features: int) -> None:
        super().__init__(config, chains, num_features)
        self.share_J: Float = np.zeros(len(chains))
        """Chances of chains, set by `aim`."""
        self.share_J[0] = 1.0

    def settle(self, values_RJ: Float, may_KJ: Bools, kind_R: Int, limits_C: Float) -> None:
        """The best mixture of chains with known rewards within the limits."""
        value_J = np.where(np.isnan(self.mean_J), -np.inf, self.mean_J)
        self.share_J = best_mixture(value_J, self.chains.costs_JC, limits_C)

    def shares(self, values_RJ: Float, may_KJ: Bools, kind_R: Int) -> Float:
        """[R, J]: the same for every request."""
        may_J = may_KJ[0]
        share_J = np.where(may_J, self.share_J, 0.0)
        for chain in np.flatnonzero((self.share_J > 0) & ~may_J):
            before_J = may_J & (np.arange(len(may_J)) < chain)
            known_J = np.where(before_J, np.nan_to_num(self.mean_J, nan=-1.0), -np.inf)
            share_J[known_J.argmax()] += self.share_J[chain]
        return np.tile(share_J, (len(kind_R), 1))

    def state(self) -> Mapping[str, Float]:
        """Arrays that `load_state` restores."""
        return {**super().state(), "shares": self.share_J}

    def load_state(self, state: Mapping[str, Float]) -> None:
        """Restore what `state` gave; DataError names what does not fit, and nothing changes."""
        super().load_state(state)
        self.share_J = np.array(state["shares"], dtype=np.float64)
