"""Rankers with and without a history's pair statistics: a tower on T, with a stored table, with PCF-GNN, and on H and T together.

`shortlist prove pcf_downstream` (wants SHORTLIST_DATA); resumes where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from _pair_rates import HEAD, Windows, film_windows, planted
from _ranking_lab import Training, scores, trained
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab, hold_if
from shortlist.metrics import auc, gauc, logloss

BASE, TABLE, PLAIN, GRAPH, WHOLE = "tower on T", "+ table", "+ PCF, K = 0", "+ PCF-GNN", "tower on H and T"
FM, FM_WHOLE = "DeepFM on T", "DeepFM on H and T"
PCF: dict[str, dict[str, Any]] = {
    TABLE: {"statistic": "table"},
    PLAIN: {"num_layers": 0},
    GRAPH: {"num_layers": 1},
}
OTHERS = {BASE: "can", WHOLE: "can", FM: "deepfm", FM_WHOLE: "deepfm"}
ARMS = (BASE, TABLE, PLAIN, GRAPH, WHOLE, FM, FM_WHOLE)
SETS = ("planted", "ml-1m")
FULL = {
    "planted": Training(epochs=8, batch_size=1_024, lrs=(1e-3, 3e-3), patience=1, max_history=1),
    "ml-1m": Training(epochs=8, batch_size=128, lrs=(1e-3, 3e-3), patience=1, max_history=1),
}
QUICK = {
    "planted": Training(epochs=2, batch_size=256, lrs=(1e-2,), patience=2, max_history=1),
    "ml-1m": Training(epochs=2, batch_size=32, lrs=(1e-2,), patience=2, max_history=1),
}
LEAST = 0.003

CLAIM = Claim(
    name="pcf_downstream",
    systems=("pcf-gnn", "can", "deepfm"),
    claim="Pair statistics told by a pre-trained network carry a long history into a ranker that trains on recent rows alone, better than "
    "a stored table does.",
    data="Planted: 1,000 users, 500 items, click by biases and an inner product of rank 4, three windows of 100,000 impressions. "
    "MovieLens-1M, 1,500 users drawn from 6,040, rating of 4 or more against less (labels of nine in ten events are known; exact order, no "
    "times), with age, occupation and genres",
    protocol="History (H): the first window, or half of each user's films; training (T): the second, of which the last tenth validates, or "
    "three tenths, and a tenth to validate; evaluation (E): the third, or the last tenth. One tower 64-32 over vectors of 16 of all fields "
    "for all arms; + table and + PCF give it the standardised logit of each pair's statistic from H (item with user; on films also with "
    "age and occupation). on H and T: the honest control, which trains on all rows. DeepFM beside. Learning rate (one of two) and epoch by "
    "validation GAUC, tested once",
    bar=f"On both logs PCF-GNN's mean AUC is at least {LEAST} above the tower's on T and above the table's, with every seed above both. "
    "The towers on H and T stand beside: a claim to beat them is not made. Holds on one log: partly",
    published={"MovieLens and Alibaba": "PCF-GNN above table and implicit models; no figures in what is public"},
)  # fmt: skip


def run(lab: Lab) -> None:
    """Every arm on both logs with every seed."""
    logs = {
        "planted": planted(150, 100, 6_000) if lab.quick else planted(),
        "ml-1m": film_windows(lab, 1_500),
    }
    for data, windows in logs.items():
        for seed in lab.seeds:
            for name in ARMS:
                lab.measure(f"{data}: {name}", seed, partial(measured, lab, data, windows, name, seed))


def measured(lab: Lab, data: str, windows: Windows, name: str, seed: int) -> dict[str, float]:
    """One arm, trained and judged on E."""
    world = windows.world
    settings: dict[str, Any] = {"fields": windows.fields, "head": HEAD}
    if name in PCF:
        system_name = "pcf-gnn"
        settings |= {"pairs": windows.pairs, "clicks": windows.clicks, **PCF[name]}
    else:
        system_name = OTHERS[name]
        settings |= {"pairs": ()} if system_name == "can" else {}
        world = replace(world, train=windows.whole) if name in (WHOLE, FM_WHOLE) else world
    training = (QUICK if lab.quick else FULL)[data]
    system, report = trained(system_name, settings, world, training, seed)
    score, label = scores(system, world, world.test), world.test.label
    return {
        "auc": auc(label, score),
        "gauc": gauc(label, score, world.test.user_of_row),
        "logloss": logloss(label, score.double().sigmoid()),
        "cost:best_epoch": float(report.best_epoch or 0),
        "cost:rows": float(len(world.train.label)),
    }


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bar on each log."""
    reached, shown = [], []
    for data in SETS:
        value = {name: np.array(arms[f"{data}: {name}"].per_seed["auc"]) for name in ARMS}
        gains = [value[GRAPH] - value[other] for other in (BASE, TABLE)]
        reached.append(all(gain.mean() >= LEAST and (gain > 0).all() for gain in gains))
        loss = {name: arms[f"{data}: {name}"].metrics["logloss"].mean for name in (BASE, GRAPH, WHOLE)}
        shown.append(
            f"{data}: AUC "
            + ", ".join(f"{name} {found.mean():.4f}" for name, found in value.items())
            + "; logloss "
            + ", ".join(f"{name} {found:.4f}" for name, found in loss.items())
        )
    reason = ". ".join(shown) + "."
    if any(reached) and not all(reached):
        return Judgement("partly", reason)
    return hold_if(all(reached), reason)
