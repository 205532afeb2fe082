"""GreenFlow's reward model and DCAF's against other ways to predict what a chain is worth, learned from one random chain per request.

`shortlist prove allocation_estimators`; needs no data, about ten minutes on one core; resumes where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

import _planted_funnel as planted
from shortlist.cascade.allocation.base import ChainSet, Float
from shortlist.cascade.allocation.dcaf import varied_J
from shortlist.cascade.allocation.rewards import CountOrder, Kind, RewardConfig, RewardModel
from shortlist.cascade.allocation.solver import best_mixture, solve
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab
from shortlist.metrics.intervals import seed_interval

MODELS: dict[str, tuple[Kind, dict[str, Any]]] = {
    "recursive": ("recursive", {}),
    "recursive, softmin": ("recursive", {"join": "softmin"}),
    "one log basis": ("log", {}),
    "plain network": ("plain", {}),
    "per-stage additive": ("additive", {}),
    "monotone network": ("monotone", {}),
    "linear": ("linear", {}),
}
TRAINING: dict[int, dict[str, Any]] = {
    2_000: {"dim": 32, "epochs": 60, "patience": 10},
    20_000: {"dim": 32, "epochs": 20, "patience": 5},
}
"""By number of requests: a pass over few is short."""
RATES = (1e-3, 4e-3)
"""Step sizes; each model gets the one that is better on the requests that validate."""
SAMPLES = (2_000, 20_000)
TESTED = 4_000
SHARE = 0.4
"""Budget in milliseconds between the cheapest and the dearest chain."""

CLAIM = Claim(
    name="allocation_estimators",
    systems=("greenflow", "dcaf"),
    claim="Learned from one random chain per request, GreenFlow's recursive multi-basis model allocates better than a plain network, never "
    "predicts that more candidates are worth less, and a monotone network recovers more of DCAF's possible gain than a linear model.",
    data="simulated: 84 chains over three stages with curves that are none of the models' bases, Poisson clicks, heavy-tailed values",
    protocol="2,000 and 20,000 requests with one chain each, drawn evenly; 15 % of users validate (early stopping and, of two step sizes, "
    "the better). 4,000 new requests are allocated at one budget (40 % of the way from the cheapest to the dearest chain, milliseconds) by "
    "predicted values and judged by true expected rewards. Gain: 0 is the best mixture of fixed chains, which is given the true means, 1 "
    "is the true rewards as values. NDCG: of the chains' order per request, gains are true rewards. DCAF: the same where only the "
    "ranking stage's count moves. Three seeds, each another world; two "
    "trials on one of them, with other requests, came before sizes and lengths of training were set.",
    bar="recursive: gain not below the plain network's at 2,000 requests and above it at 20,000, as means over seeds; no violation of "
    "monotonicity at all. DCAF: a monotone network's gain at least 1.2 times the linear model's at 20,000",
)


def run(lab: Lab) -> None:
    """Every model and number of requests."""
    samples = (2_000,) if lab.quick else SAMPLES
    for seed in lab.seeds:
        for number in samples:
            for name, (kind, settings) in MODELS.items():
                if not lab.quick or name in ("recursive", "plain network", "linear", "monotone network"):
                    lab.measure(f"{name}, {number:,}", seed, partial(measured, kind, settings, number, seed, lab.quick))


def measured(kind: Kind, settings: Mapping[str, Any], number: int, seed: int, quick: bool) -> dict[str, float]:
    """What a model learns from so many requests, and what its values buy."""
    chains, world = planted.chains(), planted.Funnel.drawn(seed)
    model = best_of_rates(kind, settings, chains, world, number, seed, quick)
    contexts_RF = world.contexts(TESTED, seed + 1_000)
    true_RJ = world.rewards(contexts_RF, chains)
    value_RJ = model.predict(contexts_RF)
    moved_J = varied_J(chains, planted.STAGES.index("ranking"), len(chains) - 1)
    rows = np.linspace(0, TESTED - 1, 500).astype(int)
    return {
        "gain": gained(value_RJ, true_RJ, chains, np.ones(len(chains), dtype=bool)),
        "gain_dcaf": gained(value_RJ, true_RJ, chains, moved_J),
        "ndcg": ndcg(value_RJ, true_RJ),
        "violations": CountOrder(chains).violations(value_RJ[rows]),
        "cost:step_size": model.config.lr,
    }


def best_of_rates(
    kind: Kind,
    settings: Mapping[str, Any],
    chains: ChainSet,
    world: planted.Funnel,
    number: int,
    seed: int,
    quick: bool,
) -> RewardModel:
    """The model with the better step size."""
    past = world.logged(number, chains, seed)
    fitted = []
    for lr in RATES[1:] if quick or kind == "linear" else RATES:
        training = {**TRAINING[number], **({"epochs": 8} if quick else {}), "lr": lr, "seed": seed}
        model = RewardModel(kind, RewardConfig(**settings, **training), chains, planted.NUM_FEATURES)
        model.fit(past)
        fitted.append(model)
    return min(fitted, key=lambda m: m.valid_loss)


def gained(value_RJ: Float, true_RJ: Float, chains: ChainSet, own_J: np.typing.NDArray[np.bool_]) -> float:
    """Share of the gain between the best mixture of fixed chains, of all of them, and the true rewards as values, of `own_J`."""
    spread = chains.costs_JC[-1, 1] - chains.costs_JC[0, 1]
    limits_C = np.array([np.inf, chains.costs_JC[0, 1] + SHARE * spread])
    mean_J = true_RJ.mean(0)
    mixed = float(best_mixture(np.where(own_J, mean_J, -np.inf), chains.costs_JC, limits_C) @ mean_J)
    ideal = solve(np.where(own_J, true_RJ, -np.inf), chains.costs_JC, limits_C)
    found = solve(np.where(own_J, value_RJ, -np.inf), chains.costs_JC, limits_C)
    reached = float(true_RJ[np.arange(len(true_RJ)), found.chain_R].mean())
    return (reached - mixed) / (ideal.value - mixed)


def ndcg(value_RJ: Float, true_RJ: Float) -> float:
    """Mean over requests of the discounted true rewards in predicted order over those in true order."""
    discount_J = 1 / np.log2(np.arange(value_RJ.shape[1]) + 2)
    sorted_RJ = np.take_along_axis(true_RJ, np.argsort(-value_RJ, axis=1, kind="stable"), 1)
    return float(((sorted_RJ @ discount_J) / (-np.sort(-true_RJ, 1) @ discount_J)).mean())


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bar, and the table."""
    samples = [n for n in SAMPLES if f"recursive, {n:,}" in arms]
    few, many = samples[0], samples[-1]

    def gain(name: str, number: int, metric: str = "gain") -> Float:
        return np.array(arms[f"{name}, {number:,}"].per_seed[metric])

    behind, ahead = (float((gain("recursive", n) - gain("plain network", n)).mean()) for n in (few, many))
    clean = all(max(arms[f"recursive, {n:,}"].per_seed["violations"]) == 0 for n in samples)
    dcaf = {name: float(gain(name, many, "gain_dcaf").mean()) for name in ("monotone network", "linear")}
    recovers = dcaf["monotone network"] >= 1.2 * dcaf["linear"]
    differences = seed_interval(tuple(gain("recursive", many) - gain("plain network", many))) if many != few else None
    table = "; ".join(
        f"{name} {arm.metrics['gain'].mean:.2f} (DCAF {arm.metrics['gain_dcaf'].mean:.2f}, NDCG {arm.metrics['ndcg'].mean:.4f}, "
        f"violations {arm.metrics['violations'].mean:.2%})"
        for name, arm in arms.items()
    )
    over = f", interval over seeds {differences.low:+.3f} to {differences.high:+.3f}" if differences else ""
    said = "recovers" if recovers else "does not recover"
    reason = (
        f"recursive over plain network: {behind:+.3f} of the possible gain at {few:,} requests, {ahead:+.3f} at {many:,}{over}. A monotone "
        f"network {said} 1.2 times the linear model's gain in DCAF: {dcaf['monotone network']:.2f} against {dcaf['linear']:.2f}. "
        f"Gains: {table}."
    )
    first = behind >= 0 and ahead > 0 and clean
    return Judgement("holds" if first and recovers else "partly" if first or recovers else "fails", reason)
