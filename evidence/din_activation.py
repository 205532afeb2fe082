"""Dice against PReLU and ReLU in DIN's tower and activation unit, five seeds: a small matter, measured.

`shortlist prove din_activation` (wants SHORTLIST_DATA); resumes where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import combinations

import numpy as np

from _ranking_lab import Training, World, outcome, purchases, trained
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab, hold_if
from shortlist.metrics import Interval

ACTIVATIONS = ("dice", "prelu", "relu")
FULL = Training(epochs=6, batch_size=256, lrs=(1e-3,), patience=2, max_history=20)
QUICK = Training(epochs=2, batch_size=64, lrs=(1e-2,), max_history=20)
SEEDS = 5
MOST = 0.005

CLAIM = Claim(
    name="din_activation",
    systems=("din",),
    claim="Which activation DIN uses is a small matter: Dice, PReLU and ReLU end near each other.",
    data="Amazon Beauty 5-core (S3-Rec release, days), one uniform and one popularity negative per purchase",
    protocol="As in din_attention: the last day's last item tests, the day before validates. DIN with softmax, no product, no "
    "regulariser, dropout .1; the activation of tower and unit changes, nothing else. Epoch chosen on validation GAUC, test once, "
    "five seeds.",
    bar="No two of the three differ by more than .005 GAUC on average.",
    published={"DIN's paper, Electronics as corrected (GAUC)": {"DIN (PReLU)": 0.8698, "DIN (Dice)": 0.8711}},
)  # fmt: skip


def run(lab: Lab) -> None:
    """Every activation with every seed."""
    root = None if lab.quick else lab.data_root
    world = purchases(root, "s3rec-beauty", negatives=(1, 1), max_per_user=2)
    for seed in range(1 if lab.quick else SEEDS):
        for name in ACTIVATIONS:
            lab.measure(name, seed, partial(measured_arm, lab, world, name, seed))


def measured_arm(lab: Lab, world: World, name: str, seed: int) -> dict[str, float | Interval]:
    """DIN with one activation."""
    settings = {"loss": "bce", "mba": 0.0, "cross": False, "activation": name}
    system, report = trained("din", settings, world, QUICK if lab.quick else FULL, seed)
    return outcome(system, report, world)


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The widest mean difference, and how much of it is noise between seeds."""
    value = {name: np.array(arms[name].per_seed["gauc"]) for name in ACTIVATIONS}
    gaps = {(a, b): value[a] - value[b] for a, b in combinations(ACTIVATIONS, 2)}
    shown = "; ".join(
        f"{a} less {b} {gap.mean():+.4f} ({gap.min():+.4f} to {gap.max():+.4f})" for (a, b), gap in gaps.items()
    )
    return hold_if(
        max(abs(gap.mean()) for gap in gaps.values()) <= MOST, f"GAUC, mean and range over paired seeds: {shown}."
    )
