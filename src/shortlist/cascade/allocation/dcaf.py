"""DCAF: how many candidates one stage scores, by what the request is worth.

"DCAF: A Dynamic Computation Allocation Framework for Online Serving System", Jiang et al., DLP-KDD 2020. With a price per unit of compute
a request gets argmax_j (value_ij - price * cost_j) over the counts j of one stage; the price is the lowest that keeps the budget, found by
bisection on past requests. The value model is linear in features x one-hot count, as it was served, then made monotone. Differences:
Algorithm 1 is corrected (solver.py says where); every request is served, so none gets nothing; cost is measured instead of the number of
candidates, one price per resource; newcomers get a floor. The cap (MaxPower) is `most_C`, which stress control sets.

J chains j, R requests i.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shortlist.cascade.allocation.base import ChainSet
from shortlist.cascade.allocation.body import Bools, Chooser, PricedConfig
from shortlist.cascade.allocation.rewards import Kind
from shortlist.errors import ConfigError
from shortlist.registry import nearest, system

RANKING = "ranking"


@dataclass(frozen=True, kw_only=True, slots=True)
class DCAFConfig(PricedConfig):
    """Settings of DCAF."""

    stage: str = RANKING
    """Stage whose number of candidates is chosen; the last stage where there is none of that name and this is the default."""
    chain: str = ""
    """Chain that all other stages are as in; empty = the dearest, the cascade at full strength."""
    model: Kind = "linear"
    """Value model; linear is the paper's. For others see greenflow."""


@system("dcaf", stage="allocation", paper="Jiang et al., DLP-KDD 2020", cold_users=True)
class DCAF(Chooser):
    """Chooses for each request how many candidates one stage scores; models and other stages stay as in one chain.

    The first of all chains stays possible, so that any budget and cap can be kept.

    Args:
        config: settings; ConfigError names the nearest stage or chain where there is none of that name.
        chains: to choose from.
        num_features: F.
    """

    Config = DCAFConfig

    def __init__(self, config: DCAFConfig, chains: ChainSet, num_features: int) -> None:
        super().__init__(config, chains, num_features)
        self.own_J = varied_J(chains, _place(config, chains), _anchor(config, chains))


def varied_J(chains: ChainSet, stage: int, anchor: int) -> Bools:
    """bool [J]: chains that differ from `anchor` in the candidates of `stage` alone, and the first chain.

    Later stages count as the same where they score all that the stage lets through because it is less than in `anchor`.
    """
    count_JK, base_K = chains.count_JK, chains.count_JK[anchor]
    wanted_JK = np.tile(base_K, (len(chains), 1))
    wanted_JK[:, stage] = count_JK[:, stage]
    wanted_JK[:, stage + 1 :] = np.minimum(base_K[stage + 1 :], count_JK[:, stage, None])
    own_J: Bools = (chains.model_JK == chains.model_JK[anchor]).all(1) & (count_JK == wanted_JK).all(1)
    own_J[[0, anchor]] = True
    return own_J


def _place(config: DCAFConfig, chains: ChainSet) -> int:
    if config.stage in chains.stages:
        return chains.stages.index(config.stage)
    if config.stage == RANKING:
        return len(chains.stages) - 1
    raise ConfigError(f"no stage named {config.stage!r}: {nearest(config.stage, list(chains.stages))}")


def _anchor(config: DCAFConfig, chains: ChainSet) -> int:
    if not config.chain:
        return len(chains) - 1
    if config.chain not in chains.names:
        raise ConfigError(f"no chain named {config.chain!r}: {nearest(config.chain, list(chains.names))}")
    return chains.names.index(config.chain)
