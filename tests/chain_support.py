"""A small funnel with known rewards, for tests of allocators: two stages, two rankers, nine counts.

R requests, F = 3 features: the second tells newcomers (below 0), the first and third how much a request needs and is worth.
"""

import numpy as np

from shortlist.cascade.allocation.base import ChainSet, Outcomes

F = 3
NEW = 1
COUNTS = ((20, 60, 180), (5, 15, 45))
ITEM_MFLOP = ((0.01,), (0.05, 0.2))
LEVEL = (0.6, 1.0)


def small_chains():
    """18 chains by rising milliseconds; milliseconds are no multiple of the MFLOPs."""
    rows = [(m, a, b) for m in range(2) for a in COUNTS[0] for b in COUNTS[1]]
    model = np.array([(0, m) for m, _, _ in rows])
    count = np.array([(a, b) for _, a, b in rows])
    first, second = 0.01 * count[:, 0], np.array(ITEM_MFLOP[1])[model[:, 1]] * count[:, 1]
    costs = np.stack([0.3 + first + second, 0.2 + 0.8 * first + 0.3 * second + 0.01 * model[:, 1]], 1)
    chains = ChainSet(
        names=tuple(f"search:{a}/rank {m}:{b}" for m, a, b in rows),
        stages=("retrieval", "ranking"),
        model_JK=model,
        count_JK=count,
        costs_JC=costs,
    )
    return chains.select(np.argsort(costs[:, 1], kind="stable"))


def contexts(number, seed=0, new_share=0.2):
    """float32 [R, F]."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(number, F)).astype(np.float32)
    x[:, NEW] = np.where(rng.random(number) < new_share, -2.0, 0.5)
    return x


def true_rewards(x, chains):
    """[R, J]: value * min-like product of what both stages let through; more candidates and the better ranker never lose."""
    need = np.exp(x[:, :1] + np.array([[np.log(50.0), np.log(12.0)]]))  # [R, K]
    passed = chains.count_JK[None] / (chains.count_JK[None] + need[:, None])  # [R, J, K]
    level = np.array(LEVEL)[chains.model_JK[:, 1]]
    return np.exp(x[:, 2:]) * passed.prod(2) * level


def replayed(number, chains, seed=0):
    """Outcomes of all chains, two requests per user."""
    x = contexts(number, seed)
    users = np.arange(number) // 2
    return Outcomes(contexts_RF=x, rewards_RJ=true_rewards(x, chains), users_R=users, times_R=np.arange(number))


def logged(number, chains, seed=0, noise=0.3, chance_J=None):
    """Outcomes of one drawn chain per request, with noise around what it brings; `chance_J` are the chances, even by default."""
    rng = np.random.default_rng((seed, 1))
    chance_J = np.full(len(chains), 1 / len(chains)) if chance_J is None else chance_J
    whole = replayed(number, chains, seed)
    chain_R = rng.choice(len(chains), number, p=chance_J)
    kept = np.zeros((number, len(chains)), dtype=bool)
    kept[np.arange(number), chain_R] = True
    noisy = whole.rewards_RJ * rng.gamma(1 / noise**2, noise**2, size=kept.shape)
    return Outcomes(
        contexts_RF=whole.contexts_RF,
        rewards_RJ=np.where(kept, noisy, np.nan),
        users_R=whole.users_R,
        times_R=whole.times_R,
        propensity_RJ=np.tile(chance_J, (number, 1)),
    )
