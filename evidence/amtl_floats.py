"""Learned lengths of embeddings on Frappe: AUC and numbers stored, against fixed widths, one network, a step rule and random lengths.

`shortlist prove amtl_floats` (wants SHORTLIST_DATA); resumes where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from _ctr import Recipe, frappe, world_of
from _ranking_lab import World
from _tables import INIT_STD, Maker, chosen, id_tables, measured
from shortlist.embeddings.amtl import AMTLConfig, AMTLTable
from shortlist.embeddings.base import Table, TableChoice
from shortlist.embeddings.frequency_steps import FrequencyStepsConfig, FrequencyStepsTable
from shortlist.embeddings.packed import emptied
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab, Verdict
from shortlist.metrics import Interval
from shortlist.models.base import Ranker

WIDTH = 16
FIXED = (4, 8, 16)
PRESSURES = (0.003, 0.03)
PLAIN = "AMTL, task loss alone"
PRESSED = tuple(f"AMTL, size weight {weight:g}" for weight in PRESSURES)
SINGLE, STEPS, RANDOM = "one network of double width", "its lengths by rank of count", "its lengths at random"
OURS = PRESSED[1]
"""Whose lengths the step rule and the random lengths get, and whose size weight the single network has."""
SLACK = 0.0005

CLAIM = Claim(
    name="amtl_floats",
    systems=("amtl", "frequency-steps"),
    claim="Lengths learned by frequency halve the stored embedding numbers of apps and users on Frappe without loss of AUC.",
    data="Frappe_x1, valid and test the benchmark's own, training negatives redrawn",
    protocol="Rules of the BARS leaderboards (batch 4096, Adam 1e-3, whole-table decay .05, best epoch on valid AUC - logloss), DNN "
    "with one hidden layer of 200. Tables of apps and users are masked (16 dimensions at most), those of the context columns stay "
    "plain. Numbers are counted as stored after training. The paper's loss has no size term: that arm is the paper's, those with a "
    "size weight are ours. Step rule and random lengths get the very lengths that the stronger weight's arm learned, by rank of count "
    "or shuffled.",
    bar="An AMTL arm stores at most half of the id numbers of the best fixed width, with a mean AUC no more than .0005 below it and at "
    "least that of the step rule with its lengths (also less .0005). Besides, mean length by decile of frequency rises with frequency "
    "(Spearman at least .9).",
    published={"the paper's abstract": "60 % less embedding memory without loss, on MovieLens, IJCAI-AAC and Taobao"},
)  # fmt: skip


def run(lab: Lab) -> None:
    """Fixed widths, AMTL with and without pressure, and its controls."""
    world = world_of(frappe(None if lab.quick else lab.data_root))

    @cache
    def learned(seed: int) -> tuple[dict[str, float | Interval], list[list[int]]]:
        """Figures of the stronger pressure, and the lengths of apps and users."""
        choice = AMTLConfig(size_weight=PRESSURES[1], init_std=INIT_STD)
        system, found = one(lab, world, seed, chosen(choice))
        return found, [t.lengths().tolist() for t in id_tables(system) if isinstance(t, AMTLTable)]

    for seed in lab.seeds:
        for width in FIXED[-1:] if lab.quick else FIXED:
            plain = chosen(TableChoice(init_std=INIT_STD))
            lab.measure(f"fixed width {width}", seed, partial(figures, lab, world, seed, plain, width))
        arms: dict[str, AMTLConfig] = {
            PLAIN: AMTLConfig(init_std=INIT_STD),
            PRESSED[0]: AMTLConfig(size_weight=PRESSURES[0], init_std=INIT_STD),
            SINGLE: AMTLConfig(size_weight=PRESSURES[1], twins=False, init_std=INIT_STD),
        }
        for name, choice in arms.items():
            lab.measure(name, seed, partial(figures, lab, world, seed, chosen(choice)))
        lab.measure(OURS, seed, lambda seed=seed: learned(seed)[0])  # type: ignore[misc]
        for name in (STEPS, RANDOM):
            lab.measure(name, seed, lambda seed=seed, name=name: fixed(lab, world, seed, learned(seed)[1], name))  # type: ignore[misc]


def figures(lab: Lab, world: World, seed: int, make: Maker, width: int = WIDTH) -> dict[str, float | Interval]:
    """A DNN with those tables for apps and users."""
    return one(lab, world, seed, make, width)[1]


def one(
    lab: Lab, world: World, seed: int, make: Maker, width: int = WIDTH
) -> tuple[Ranker, dict[str, float | Interval]]:
    """The trained DNN and its figures."""
    settings: dict[str, Any] = {
        "dim": width,
        "widths": (32,) if lab.quick else (200,),
        "norm": "batch",
        "dropout": 0.2,
        "id_dropout": 0.0,
        "use_user_ids": True,
    }
    recipe = Recipe(table_l2=0.05, init_std=None, epochs=2 if lab.quick else 25, batch_size=512 if lab.quick else 4096)
    system, found = measured(settings, world, recipe, seed, make)
    return system, {**found, **shape_of(system, world)}


def fixed(lab: Lab, world: World, seed: int, lengths: list[list[int]], rule: str) -> dict[str, float | Interval]:
    """The same with given lengths of apps and users, the unknown id's first: the longest for the most frequent, or shuffled."""
    waiting = [torch.tensor(one_table) for one_table in lengths]
    rng = np.random.default_rng(seed)

    def make(num_rows: int, dim: int, counts: Tensor) -> Table:
        given = waiting.pop(0)[1:]
        if rule == STEPS:
            order = counts[1:].argsort(descending=True, stable=True)
            given = torch.empty_like(given).scatter_(0, order, given.sort(descending=True).values)
        else:
            given = given[torch.from_numpy(rng.permutation(len(given)))]
        table = FrequencyStepsTable(num_rows, dim, FrequencyStepsConfig(init_std=INIT_STD))
        table.packed.fill(table.rows.weight, torch.cat([torch.tensor([dim]), given]))
        emptied(table.rows)
        return table

    return figures(lab, world, seed, make)


def shape_of(system: Ranker, world: World) -> dict[str, float]:
    """Mean length of the apps by tenth of them, rarest first, where lengths were learned."""
    table = id_tables(system)[0]
    if not isinstance(table, AMTLTable):
        return {}
    counts = torch.bincount(world.train.rows.values, minlength=table.num_rows)[1:]
    tenths = table.lengths()[1:][counts.argsort(stable=True)].float().tensor_split(10)
    return {f"cost:length_{i}": float(tenth.mean()) for i, tenth in enumerate(tenths, 1)}


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bar on means over seeds; numbers are those of the first seed."""
    auc = {name: arm.metrics["auc"].mean for name, arm in arms.items()}
    floats = {name: arm.cost.get("id_floats", 0.0) for name, arm in arms.items()}
    best = max((name for name in arms if name.startswith("fixed")), key=auc.__getitem__)
    good = {name: floats[name] <= floats[best] / 2 and auc[name] >= auc[best] - SLACK for name in (PLAIN, *PRESSED)}
    failures = []
    if not any(good.values()):
        failures.append(
            f"no AMTL arm is within .0005 of {best} ({auc[best]:.4f}) at half its {floats[best]:,.0f} numbers"
        )
    if auc[OURS] < auc[STEPS] - SLACK:
        failures.append(f"{OURS} has {auc[OURS]:.4f}, the step rule with its lengths {auc[STEPS]:.4f}")
    rises = {name: rank_correlation(arms[name]) for name in (PLAIN, *PRESSED, SINGLE)}
    if rises[OURS] < 0.9:
        failures.append(f"length against frequency: Spearman {rises[OURS]:.2f} over tenths of the apps")
    verdict: Verdict = "holds" if not failures else "fails" if not any(good.values()) else "partly"
    shown = "; ".join(f"{name} {auc[name]:.4f} with {floats[name]:,.0f}" for name in arms)
    tail = ", ".join(f"{name} {value:.2f}" for name, value in rises.items())
    return Judgement(verdict, ". ".join([*failures, f"AUC and numbers: {shown}", f"Spearman: {tail}"]) + ".")


def rank_correlation(arm: Arm) -> float:
    """Spearman's correlation of mean length and tenth; 0 where all lengths are equal."""
    length = np.array([arm.cost[f"length_{i}"] for i in range(1, 11)])
    if np.ptp(length) == 0:
        return 0.0
    rank = np.array([((length < value).sum() + (length <= value).sum() - 1) / 2 for value in length])
    return float(np.corrcoef(rank, np.arange(10))[0, 1])
