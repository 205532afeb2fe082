"""A funnel whose every chain's worth to every request is known: what allocators and their value models are tested on. Simulated.

Three stages. What a stage lets through of what is worth showing grows with the candidates it scores, at a speed that the request decides,
up to a level that its model and the request decide; the page is worth what all three let through, times the request's value, which has
heavy tails. The curves are none of the bases that the value models are made of.

R requests, F features, J chains, K stages.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

from shortlist.cascade.allocation.base import ChainSet, Float, Outcomes

STAGES = ("retrieval", "pre-ranking", "ranking")
COUNTS = ((50, 150, 450), (20, 50, 150), (10, 20, 50))
MODELS = (1, 2, 2)
USER_MFLOP = ((0.2,), (0.1, 0.3), (0.5, 2.0))
ITEM_MFLOP = ((0.002,), (0.004, 0.02), (0.05, 0.2))
MS_PER_MFLOP = (0.8, 0.5, 0.3)
"""Searching moves more bytes per FLOP than ranking."""
QUALITY = ((1.5,), (0.0, 0.8), (-0.2, 1.0))
"""Logits of the level that a model reaches."""
HALF = (120.0, 40.0, 15.0)
"""Candidates at which a stage is about half way there, for a request like the mean."""
NUM_FEATURES = 8
CLICKS = 3.0
"""Per page, where every stage lets all through."""


def chains() -> ChainSet:
    """All 84 chains in which no stage scores more than the one before, by rising milliseconds."""
    rows = [
        (models, counts)
        for models in product(*(range(m) for m in MODELS))
        for counts in product(*COUNTS)
        if counts[0] >= counts[1] >= counts[2]
    ]
    model_JK = np.array([models for models, _ in rows])
    count_JK = np.array([counts for _, counts in rows])
    mflop_JK = np.stack(
        [
            np.array(USER_MFLOP[k])[model_JK[:, k]] + np.array(ITEM_MFLOP[k])[model_JK[:, k]] * count_JK[:, k]
            for k in range(len(STAGES))
        ],
        1,
    )
    made = ChainSet(
        names=tuple("/".join(f"{s} {m}:{n}" for s, m, n in zip(STAGES, *row)) for row in rows),
        stages=STAGES,
        model_JK=model_JK,
        count_JK=count_JK,
        costs_JC=np.stack([mflop_JK.sum(1), mflop_JK @ np.array(MS_PER_MFLOP)], 1),
    )
    return made.select(np.argsort(made.costs_JC[:, 1], kind="stable"))


@dataclass(frozen=True, kw_only=True)
class Funnel:
    """How requests differ: directions in the space of their features."""

    speed_FK: Float
    """Makes a stage need more candidates."""
    level_FK: Float
    """Makes a stage let more through."""
    better_FK: Float
    """Makes a better model matter more."""
    value_F: Float
    """Logarithm of what a click is worth."""

    @classmethod
    def drawn(cls, seed: int) -> Funnel:
        """Directions of a length that makes requests differ by about the same factor in every world."""
        rng = np.random.default_rng((seed, 1))

        def direction(length: float, *more: int) -> Float:
            drawn: Float = rng.normal(size=(NUM_FEATURES, *more))
            return length * drawn / np.sqrt((drawn**2).sum(0))

        size = len(STAGES)
        return cls(
            speed_FK=direction(0.8, size),
            level_FK=direction(0.6, size),
            better_FK=direction(0.8, size),
            value_F=direction(1.0),
        )

    def contexts(self, number: int, seed: int) -> Float:
        """[R, F] standard normal features."""
        drawn: Float = np.random.default_rng((seed, 2)).normal(size=(number, NUM_FEATURES)).astype(np.float32)
        return drawn

    def clicks(self, contexts_RF: Float, chains: ChainSet) -> Float:
        """[R, J] expected clicks on the page of each chain."""
        passed_RJ = np.full((len(contexts_RF), len(chains)), CLICKS)
        for k in range(len(STAGES)):
            half_R1 = HALF[k] * np.exp(contexts_RF @ self.speed_FK[:, k])[:, None]
            reached_RJ = 1 - (1 + chains.count_JK[:, k] / half_R1) ** -1.2
            better_R1 = np.exp(contexts_RF @ self.better_FK[:, k] / 2)[:, None]
            logit_RJ = np.array(QUALITY[k])[chains.model_JK[:, k]] * better_R1
            passed_RJ *= reached_RJ / (1 + np.exp(-logit_RJ - (contexts_RF @ self.level_FK[:, k])[:, None]))
        return passed_RJ

    def rewards(self, contexts_RF: Float, chains: ChainSet) -> Float:
        """[R, J] expected worth of the page of each chain."""
        return self.clicks(contexts_RF, chains) * np.exp(contexts_RF @ self.value_F)[:, None]

    def logged(self, number: int, chains: ChainSet, seed: int) -> Outcomes:
        """Requests of which each got one chain at random, all with the same chance: clicks are Poisson, each of the request's value."""
        rng = np.random.default_rng((seed, 3))
        contexts_RF = self.contexts(number, seed)
        chain_R = rng.integers(0, len(chains), number)
        request_R = np.arange(number)
        reward_RJ = np.full((number, len(chains)), np.nan)
        clicks_R = rng.poisson(self.clicks(contexts_RF, chains)[request_R, chain_R])
        reward_RJ[request_R, chain_R] = clicks_R * np.exp(contexts_RF @ self.value_F)
        return Outcomes(
            contexts_RF=contexts_RF,
            rewards_RJ=reward_RJ,
            users_R=request_R // 2,
            times_R=request_R,
            propensity_RJ=np.full(reward_RJ.shape, 1 / len(chains)),
        )
