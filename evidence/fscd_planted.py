"""FSCD on signals that stand in a cheap and in a dear field each: does it keep the cheap ones, and what does the choice cost in AUC?

`shortlist prove fscd_planted`; needs no data.
"""

from __future__ import annotations

from collections.abc import Mapping

from _ctr import world_of
from _planted_fields import PricedFields, priced_log
from _pre_ranking import (
    NUM_RANDOM,
    WEIGHTS,
    Log,
    Plan,
    at_random,
    best_by_weight,
    fitted,
    names_of,
    pre_ranker,
    row_auc,
    told,
)
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab, hold_if
from shortlist.layers.selection import ChoiceConfig
from shortlist.training.config import TrainerConfig

KEEP, NUM_ROWS, EPOCHS = 8, 60_000, 10
PLAN = Plan(
    trainer=TrainerConfig(epochs=EPOCHS, batch_size=1024, lr=2e-3, weight_decay=1e-4, patience=2), select_epochs=4
)
EVERY, OURS, BLIND, COLD = "all 24 fields", "FSCD", "FSCD, cost-blind", "COLD"

CLAIM = Claim(
    name="fscd_planted",
    systems=("fscd", "cold"),
    claim="Where a signal stands in a cheap and in a dear field, FSCD keeps the cheap one: eight of 24 fields, at a quarter of their cost, "
    "are as good as all; gates that do not see costs keep dear copies.",
    data=f"Planted, another one per seed: 8 signals of 50 values and falling strength, each in a field of cost 0.5 and again in one of "
    f"cost 3; 8 fields of noise, half of them dear; the first two signals also act by their product; {NUM_ROWS:,} rows",
    protocol=f"Split 8:1:1. All arms: vectors of 8, hidden layers of 64 and 32, AdamW 2e-3, batch 1024, up to {EPOCHS} epochs, stopped by "
    f"validation AUC; arms that choose have {PLAN.select_epochs} epochs of choosing before and go on from their weights. The weight of the "
    f"cost term is one of {', '.join(map(str, WEIGHTS))}, for both kinds of gates the cheapest of those within .002 of the best validation "
    f"AUC. Random: {NUM_RANDOM} draws of 8 fields per seed",
    bar="FSCD's AUC >= that of all fields - .004 at <= 25 % of their cost, means of the seeds, and FSCD is cheaper than cost-blind gates "
    "at an AUC that is not lower",
    published={"a test of the digest's, one seed": "all fields .8332 at cost 42; FSCD .8313 at 9.0; cost-blind .8207 at 14"},
)  # fmt: skip


def run(lab: Lab) -> None:
    """Every arm with every seed."""
    for seed in lab.seeds:
        planted = priced_log(8_000 if lab.quick else NUM_ROWS, seed=seed)
        lab.measure("the true odds", seed, lambda planted=planted: {"auc": planted.oracle})  # type: ignore[misc]
        log = priced(planted)
        for name in (EVERY, OURS, BLIND, COLD, "random"):
            lab.measure(name, seed, lambda name=name, log=log, seed=seed: measured(lab, log, name, seed))  # type: ignore[misc]


def priced(planted: PricedFields) -> Log:
    """The log with its declared costs."""
    work = {f"context.{column}": cost for column, cost in planted.cost.items()}
    return Log(world_of(planted.table), names_of(planted.table), work, dim=8)


def measured(lab: Lab, log: Log, name: str, seed: int) -> dict[str, float]:
    """One arm, tested once."""
    choice = ChoiceConfig(epochs=1 if lab.quick else PLAN.select_epochs, keep=KEEP)
    if name in (OURS, BLIND):
        chosen, weight = best_by_weight(log, PLAN, seed, choice, cost_aware=name == OURS)
        counts = chosen.body.choice.histogram()
        undecided = sum(counts[3:7]) / sum(counts)
        return {**told(chosen, log), "cost:weight": weight, "cost:gates_from_.3_to_.7": undecided}
    if name == "random":
        return at_random(log, PLAN, seed, KEEP, NUM_RANDOM)
    system = pre_ranker(log, PLAN, seed, cold=name == COLD, choice=choice if name == COLD else ChoiceConfig(epochs=0))
    return told(fitted(system, log.world, PLAN, seed, row_auc(log.world)), log)


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bar."""
    auc = {name: arms[name].metrics["auc"].mean for name in arms}
    cost = {name: arms[name].metrics["cost"].mean for name in arms if "cost" in arms[name].metrics}
    shown = "; ".join(f"{name} {auc[name]:.4f} at cost {cost[name]:.1f}" for name in cost)
    holds = (
        auc[OURS] >= auc[EVERY] - 0.004
        and cost[OURS] <= 0.25 * cost[EVERY]
        and cost[OURS] < cost[BLIND]
        and auc[OURS] >= auc[BLIND]
    )
    return hold_if(
        holds,
        f"AUC, {auc['the true odds']:.4f} for the true odds: {shown}. FSCD against all fields {auc[OURS] - auc[EVERY]:+.4f} at "
        f"{100 * cost[OURS] / cost[EVERY]:.0f} % of the cost, against cost-blind gates {auc[OURS] - auc[BLIND]:+.4f}; the spread of random "
        f"eights is {arms['random'].metrics['auc_sd'].mean:.4f}.",
    )
