"""Gradient rules: how often a step points against a task, on random sets and on census-income, and GradOPS's sweep of trade-offs.

`shortlist prove gradient_rules` (wants SHORTLIST_DATA); resumes where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

import _multi_task as tables
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab
from shortlist.training.config import RuleChoice
from shortlist.training.gradients.base import Floats, GradientRule, make_rule
from shortlist.training.gradients.sum import Sum, SumConfig

RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "sum": ("sum", {}),
    "PCGrad": ("pcgrad", {}),
    "GradVac": ("gradvac", {"by": "model"}),
    "CAGrad": ("cagrad", {}),
    "MGDA": ("mgda", {}),
    "IMTL-G": ("imtl-g", {}),
    "Nash-MTL": ("nash-mtl", {}),
    "GradOPS": ("gradops", {}),
}
ALPHAS = (-3.0, -1.0, 1.0, 2.0)
TASKS = (tables.INCOME, tables.EDUCATION, tables.SINGLE)
CLOSE = 1e-7
"""A cosine below minus this is a conflict; float64 products of float32 gradients leave errors of 1e-8."""

CLAIM = Claim(
    name="gradient_rules",
    systems=("gradops", "pcgrad", "gradvac", "cagrad", "mgda", "imtl-g", "nash-mtl", "sum"),
    claim="GradOPS's step never points against a task, where the sum, PCGrad and GradVac do, and its one trade-off moves quality between "
    "tasks.",
    data=f"Random sets of 2, 3, 5 and 8 gradients of 50 numbers, lengths spread over four decades; {tables.DATA}",
    protocol="Random sets: 2,000 of each size, the same for all rules. Census: income above 50K, education of at least college and never "
    "married with a shared bottom of 64 and 32 units and towers of 16; Adam 0.002, batch 1,024, at most 20 epochs, the epoch with the best "
    "income AUC on validation, test once; three seeds. A conflict is a step whose product with the gradient of some task, both of the same "
    "minibatch and of shared parameters, is below 0; of the gradient, before Adam rescales it.",
    bar="GradOPS: no conflict in any random set and in no step of census training, for any trade-off; sum, PCGrad and GradVac conflict on "
    "random sets of three or more; the spread over trade-offs of some task's AUC is above the standard deviation over seeds.",
)  # fmt: skip


class Watched(GradientRule):
    """Another rule, and an account of its steps."""

    Config = SumConfig

    def __init__(self, rule: GradientRule) -> None:
        super().__init__(rule.config)
        self.rule, self.steps, self.conflicts, self.left = rule, 0, 0, 0.0

    def weigh(self, gram_TT: Floats, place: int) -> Floats:
        """As the rule says."""
        weight_T = self.rule.weigh(gram_TT, place)
        gain_T = gram_TT @ weight_T
        length = np.sqrt(max(float(weight_T @ gain_T), 0.0))
        self.steps += 1
        self.conflicts += bool((gain_T < -CLOSE * length * np.sqrt(np.diag(gram_TT))).any())
        self.left += length / np.sqrt(max(float(gram_TT.mean()), 1e-300))
        return weight_T


def watched(name: str, settings: Mapping[str, Any]) -> Watched:
    """The rule of that name under watch."""
    return Watched(make_rule(RuleChoice(rule=name, settings=settings)) or Sum(SumConfig()))


def run(lab: Lab) -> None:
    """Random sets first, then trainings."""
    for arm, (name, settings) in RULES.items():
        lab.measure(f"random sets: {arm}", 0, partial(_on_sets, name, settings, 100 if lab.quick else 2_000))
    arms = {f"census: {arm}": rule for arm, rule in RULES.items()}
    arms |= {f"census: GradOPS, alpha {a:g}": ("gradops", {"alpha": a}) for a in ALPHAS}
    for seed in lab.seeds:
        kept: list[tables.People] = []
        for arm, (name, settings) in arms.items():
            lab.measure(arm, seed, partial(_on_census, lab, name, settings, seed, kept))


def _on_sets(name: str, settings: Mapping[str, Any], num_sets: int) -> dict[str, float]:
    """Share of the sets whose step points against a task."""
    torch.manual_seed(0)
    found = {}
    for num_tasks in (2, 3, 5, 8):
        rng = np.random.default_rng(num_tasks)
        rule = watched(name, settings)
        for _ in range(num_sets):
            gradient_TP = rng.normal(size=(num_tasks, 50)) * 10 ** rng.uniform(-2, 2, (num_tasks, 1))
            rule.coefficients(gradient_TP @ gradient_TP.T)
        found[f"conflicts:{num_tasks}"] = rule.conflicts / rule.steps
    return found


def _on_census(
    lab: Lab, name: str, settings: Mapping[str, Any], seed: int, kept: list[tables.People]
) -> dict[str, float]:
    """AUC by task, and the share of steps with a conflict."""
    if not kept:
        kept.append(tables.people(lab, TASKS, seed))
    (data,) = kept
    sizes = {"widths": (64, 32), "tower_widths": (16,)}
    system = tables.built("shared-bottom", sizes, data, TASKS, seed)
    rule = watched(name, settings)
    told = tables.learned(system, data, TASKS, tables.QUICK if lab.quick else tables.Training(), seed, rule)
    return {**told, "conflicts": rule.conflicts / rule.steps, "length_of_step": rule.left / rule.steps}


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bar, and the table."""
    sets = {n.removeprefix("random sets: "): a.metrics for n, a in arms.items() if n.startswith("random sets: ")}
    census = {n.removeprefix("census: "): a for n, a in arms.items() if n.startswith("census: ")}
    sizes = ("2", "3", "5", "8")
    clean = all(sets["GradOPS"][f"conflicts:{s}"].mean == 0 for s in sizes)
    clean &= all(max(a.per_seed["conflicts"]) == 0 for n, a in census.items() if n.startswith("GradOPS"))
    others = all(sets[n][f"conflicts:{s}"].mean > 0 for n in ("sum", "PCGrad", "GradVac") for s in sizes[1:])
    sweep = {n: a for n, a in census.items() if n.startswith("GradOPS")}
    moved = {}
    for task in TASKS:
        means = [a.metrics[f"auc:{task}"].mean for a in sweep.values()]
        noise = float(
            np.mean([np.std(a.per_seed[f"auc:{task}"], ddof=min(1, len(a.seeds) - 1)) for a in sweep.values()])
        )
        moved[task] = (max(means) - min(means), noise)
    moves = any(spread > noise for spread, noise in moved.values())
    on_sets = "; ".join(f"{n} " + ", ".join(f"{m[f'conflicts:{s}'].mean:.1%}" for s in sizes) for n, m in sets.items())
    on_rows = "; ".join(
        f"{n} " + ", ".join(f"{a.metrics[f'auc:{t}'].mean:.4f}" for t in TASKS) + f", {a.metrics['conflicts'].mean:.1%}"
        for n, a in census.items()
    )
    swept = ", ".join(f"{task} {spread:.4f} against {noise:.4f}" for task, (spread, noise) in moved.items())
    reason = (
        f"random sets with a conflict, for 2, 3, 5 and 8 tasks: {on_sets}. Census, AUC of {', '.join(TASKS)} and steps with a conflict: "
        f"{on_rows}. GradOPS's sweep moves AUC by (against the deviation over seeds): {swept}."
    )
    met = (clean, others, moves)
    return Judgement("holds" if all(met) else "partly" if clean else "fails", reason)
