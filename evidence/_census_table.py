"""The table of networks on census-income, shared by the two groups of tasks: single tasks, shared-bottom, OMoE, MMoE, CGC and PLE."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

import _multi_task as tables
from shortlist.evaluation.evidence import Arm, Judgement, Lab
from shortlist.layers.experts import gate_diagnosis
from shortlist.models.base import Ranker
from shortlist.models.ranking.mmoe import MMoE

TOWER = (8,)
SINGLE, SHARED, OMOE, MMOE, CGC, PLE = "single task", "shared-bottom", "OMoE", "MMoE", "CGC", "PLE"
PROTOCOL = (
    "8 experts of 16 units in MMoE; every other network is made as large by its width (within 5%, gates counted, embeddings of 8 the same "
    "for all); the two single-task networks have half of that each. Adam 0.002, batch 1,024, at most 20 epochs, the epoch with the best "
    "AUC of the first task on validation, test once; ten seeds, each with its own split. No tuning by arm."
)
BAR = (
    "MMoE's mean AUC of the first task is above shared-bottom's by 0.001 or more, that of the second is not lower by more than 0.001, and "
    "the sizes agree within 5%"
)


def network(arm: str, width: int) -> tuple[str, dict[str, Any]]:
    """Registered name and settings."""
    match arm:
        case "OMoE" | "MMoE":
            gates = "one" if arm == OMOE else "each"
            return "mmoe", {"num_experts": 8, "expert_widths": (width,), "tower_widths": TOWER, "gates": gates}
        case "CGC" | "PLE":
            return "ple", {"num_levels": 1 if arm == CGC else 2, "expert_widths": (width,), "tower_widths": TOWER}
    return "shared-bottom", {"widths": (width,), "tower_widths": TOWER}


def run_table(lab: Lab, tasks: tuple[str, str]) -> None:
    """All arms with all seeds."""
    training = tables.QUICK if lab.quick else tables.Training()
    for seed in (0,) if lab.quick else range(10):
        kept: dict[int, tables.People] = {}
        for arm in (SINGLE, SHARED, OMOE, MMOE, CGC, PLE):
            lab.measure(arm, seed, partial(_measured, lab, arm, tasks, training, seed, kept))


def _measured(
    lab: Lab, arm: str, tasks: tuple[str, str], training: tables.Training, seed: int, kept: dict[int, tables.People]
) -> dict[str, float]:
    if seed not in kept:
        kept[seed] = tables.people(lab, tasks, seed)
    data = kept[seed]
    size = tables.size_of(tables.built(*network(MMOE, 16), data, tasks))

    def make(of: tuple[str, ...]) -> Callable[[int], Ranker]:
        return lambda width: tables.built(*network(arm, width), data, of, seed)

    if arm != SINGLE:
        made = make(tasks)(16 if arm == MMOE else tables.width_for(size, make(tasks)))
        told = tables.learned(made, data, tasks, training, seed)
        return {**told, **_gates(made, data)} if isinstance(made, MMoE) else told
    found: dict[str, float] = {"cost:parameters": 0.0}
    for task in tasks:
        width = tables.width_for(size // 2, make((task,)))
        told = tables.learned(make((task,))(width), data, (task,), training, seed)
        found["cost:parameters"] += told.pop("cost:parameters")
        found |= told
    return found


def _gates(made: MMoE, data: tables.People) -> dict[str, float]:
    """Entropy of the gates (near 0 = one expert takes all) and how far apart they are, means over the tasks, on 2,000 test rows."""
    test = data.world.test
    batch = test.batch(data.world, np.arange(min(2_000, len(test.requests))), 1)
    found = gate_diagnosis(made.gate_weights(batch)).values()
    return {f"gate_{name}": sum(task[name] for task in found) / len(found) for name in ("entropy", "apart")}


def judge_table(arms: Mapping[str, Arm], tasks: tuple[str, str]) -> Judgement:
    """The bar, and every mean."""
    main, other = (f"auc:{task}" for task in tasks)
    mmoe, shared = arms[MMOE].metrics, arms[SHARED].metrics
    gain, loss = mmoe[main].mean - shared[main].mean, shared[other].mean - mmoe[other].mean
    sizes = [arm.cost["parameters"] for arm in arms.values()]
    equal = max(sizes) <= 1.05 * min(sizes)
    best = max(arms, key=lambda name: arms[name].metrics[main].mean)
    shown = "; ".join(f"{n} {a.metrics[main].mean:.4f} / {a.metrics[other].mean:.4f}" for n, a in arms.items())
    spread = ", ".join(f"{n} {_spread(a.per_seed[main]):.4f}" for n, a in arms.items())
    reason = (
        f"MMoE against shared-bottom: {gain:+.4f} on {tasks[0]}, {-loss:+.4f} on {tasks[1]}. AUC {tasks[0]} / {tasks[1]}: {shown}. Best on "
        f"{tasks[0]}: {best}. MMoE's gates: entropy {mmoe['gate_entropy'].mean:.2f} of the largest, {mmoe['gate_apart'].mean:.2f} apart. "
        f"Standard deviation over seeds, splits included: {spread}. Sizes from {min(sizes):,.0f} to {max(sizes):,.0f}."
    )
    if gain >= 0.001 and loss <= 0.001 and equal:
        return Judgement("holds", reason)
    return Judgement("partly" if gain > 0 and loss <= 0.001 and equal else "fails", reason)


def _spread(values: tuple[float, ...]) -> float:
    mean = sum(values) / len(values)
    return float((sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1)) ** 0.5)
