"""One chain for everybody: how a cascade without an allocator serves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from shortlist.cascade.allocation.base import ChainSet, Float, Int
from shortlist.cascade.allocation.body import Bools, ChoiceConfig, Chooser
from shortlist.errors import ConfigError
from shortlist.registry import nearest, system


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedConfig(ChoiceConfig):
    """Settings of the fixed chain."""

    chain: str = ""
    """Name of the chain; empty = of those within the budget the one with the best past rewards."""


@system("fixed", stage="allocation", paper="baseline", cold_users=True)
class Fixed(Chooser):
    """One chain for all requests: a named one, or the best within the budget by past rewards.

    Under a cap that excludes it, requests get the chain before it with the best past rewards that the cap allows. A named chain that costs
    more than the budget gives way to the best one that does not.

    Args:
        config: settings; ConfigError names the nearest chain where there is none of that name.
        chains: to choose from.
        num_features: F.
    """

    Config = FixedConfig

    def __init__(self, config: FixedConfig, chains: ChainSet, num_features: int) -> None:
        super().__init__(config, chains, num_features)
        if config.chain and config.chain not in chains.names:
            raise ConfigError(f"no chain named {config.chain!r}: {nearest(config.chain, list(chains.names))}")
        self.chain = chains.names.index(config.chain) if config.chain else 0

    def settle(self, values_RJ: Float, may_KJ: Bools, kind_R: Int, limits_C: Float) -> None:
        """The named chain if the limits allow it, else the best within them, else the first."""
        fits_J = self.chains.within_J(limits_C)
        named = self.chains.names.index(self.config.chain) if self.config.chain else None
        self.chain = named if named is not None and fits_J[named] else self._best(fits_J)

    def shares(self, values_RJ: Float, may_KJ: Bools, kind_R: Int) -> Float:
        """[R, J]: all on one chain."""
        chain = self.chain
        if not may_KJ[0, chain]:
            chain = self._best(may_KJ[0] & (np.arange(len(self.chains)) <= chain))
        share_RJ = np.zeros((len(kind_R), len(self.chains)))
        share_RJ[:, chain] = 1.0
        return share_RJ

    def state(self) -> Mapping[str, Float]:
        """Arrays that `load_state` restores."""
        return {**super().state(), "chain": np.array([float(self.chain)])}

    def load_state(self, state: Mapping[str, Float]) -> None:
        """Restore what `state` gave; DataError names what does not fit, and nothing changes."""
        super().load_state(state)
        self.chain = int(state["chain"][0])

    def _best(self, may_J: Bools) -> int:
        """The chain with the best past rewards; without any known, the dearest; the first where none may be had."""
        known_J = may_J & ~np.isnan(self.mean_J)
        if known_J.any():
            return int(np.where(known_J, self.mean_J, -np.inf).argmax())
        return int(np.flatnonzero(may_J)[-1]) if may_J.any() else 0
