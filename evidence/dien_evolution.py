"""The ladder of DIEN's paper, and who deserves the credit: gates, auxiliary loss, and the same loss for models without a GRU.

`shortlist prove dien_evolution` (wants SHORTLIST_DATA); resumes where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from _ranking_lab import (
    Training,
    World,
    changed_minds,
    judged,
    outcome,
    popularity,
    purchases,
    trained,
    with_auxiliary,
)
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab, Verdict
from shortlist.layers.scoring import HeadConfig
from shortlist.metrics import Interval

BEAUTY, DRIFT = "s3rec-beauty", "changed minds"
HEAD = HeadConfig(loss="bce")
FLAT: dict[str, Any] = {"loss": "bce", "activation": "dice"}
DIN_: dict[str, Any] = {**FLAT, "mba": 0.0}


def gated(evolution: str, auxiliary: float = 0.0, **more: Any) -> tuple[str, dict[str, Any]]:
    """DIEN with one kind of second GRU."""
    return "dien", {"evolution": evolution, "auxiliary": auxiliary, "head": HEAD, **more}


DIEN, AUGRU, TWO_GRUS, POOLING, DIN = (
    "DIEN (AUGRU and auxiliary loss)",
    "AUGRU",
    "GRU and attention",
    "DNN, mean",
    "DIN",
)
RELEASED, RELEASED_AUX = "AUGRU, released gate", "DIEN, released gate"
HELPED_DIN, HELPED_POOLING = "DIN and auxiliary loss", "DNN and auxiliary loss"
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    POOLING: ("dnn", FLAT),
    DIN: ("din", DIN_),
    TWO_GRUS: gated("gru"),
    "AIGRU": gated("aigru"),
    "AGRU": gated("agru"),
    AUGRU: gated("augru"),
    RELEASED: gated("augru-released"),
    DIEN: gated("augru", 1.0),
    "DIEN, sigmoid attention": gated("augru", 1.0, weights="sigmoid"),
    RELEASED_AUX: gated("augru-released", 1.0),
    HELPED_POOLING: ("dnn", FLAT),
    HELPED_DIN: ("din", DIN_),
    "DSIN": ("dsin", {"head": HEAD, "gap_minutes": 60.0, "num_sessions": 10}),
    "BST": ("bst", {"head": HEAD}),
}
ON_DRIFT = (DIN, AUGRU, RELEASED, DIEN, "BST")
FULL = {
    BEAUTY: Training(epochs=10, batch_size=128, lrs=(2e-3,), patience=2, max_history=20),
    DRIFT: Training(epochs=8, batch_size=128, lrs=(1e-2,), patience=8, max_history=20),
}
QUICK = Training(epochs=5, batch_size=64, lrs=(1e-2,), patience=5, max_history=20)
SEEDS = 5
FROM_AUXILIARY, SLACK, FROM_ORDER = 0.005, 0.001, 0.05

CLAIM = Claim(
    name="dien_evolution",
    systems=("dien", "din", "dsin", "bst", "dnn"),
    claim="Most of DIEN's gain is its auxiliary loss, not its gate; where interests move, its GRUs see what DIN can not.",
    data="Amazon Beauty 5-core (S3-Rec release, days); 6,000 planted users whose interest moves once from one of 20 groups to another",
    protocol="Beauty as in the paper: one label per user, the last item of the last day against one item drawn by popularity, "
    "history of at least two events, from earlier days; users split 80 / 10 / 10 at random. Changed minds: an item of the old and "
    "of the new interest is offered, the new one is chosen. Embeddings and states of 32, tower 128-64, Adam, epoch chosen on "
    "validation GAUC, test once, five seeds. With one positive and one negative per user, GAUC is the share of users whose pair "
    "is in order; AUC compares across users. DSIN's visits are days here. DNN and DIN with auxiliary loss: a linear map of the "
    "running mean of the past tells the next item.",
    bar="Beauty, mean AUC, the paper's metric: DIEN >= AUGRU + .005; AUGRU >= GRU and attention - .001; what the auxiliary loss "
    "adds is more than what the gate adds. Changed minds: DIEN >= DIN + .05 GAUC. A preview of Beauty with one seed scored the "
    "test.",
    published={
        "DIEN's paper, Electronics (AUC)": {"DIN": 0.7603, "GRU and attention": 0.7605, "AUGRU": 0.7640, "DIEN": 0.7792},
        "DIEN's paper, Books (AUC)": {"DIN": 0.7880, "GRU and attention": 0.7890, "AUGRU": 0.7911, "DIEN": 0.8453},
    },
)  # fmt: skip


def run(lab: Lab) -> None:
    """The ladder on purchases, then the planted log."""
    settings: dict[str, Any] = {"negatives": (0, 1), "split": "user", "min_history": 2}
    beauty = purchases(None if lab.quick else lab.data_root, "s3rec-beauty", **settings)
    drift = changed_minds(2_000 if lab.quick else 6_000)
    lab.measure(f"{BEAUTY}: popularity", 0, partial(judged, popularity(beauty, beauty.test), beauty.test))
    for seed in range(1 if lab.quick else SEEDS):
        for name in ARMS:
            lab.measure(f"{BEAUTY}: {name}", seed, partial(measured_arm, lab, BEAUTY, beauty, name, seed))
        for name in ON_DRIFT:
            lab.measure(f"{DRIFT}: {name}", seed, partial(measured_arm, lab, DRIFT, drift, name, seed))


def measured_arm(lab: Lab, data: str, world: World, name: str, seed: int) -> dict[str, float | Interval]:
    """One arm, trained and tested."""
    entry, settings = ARMS[name]
    change = with_auxiliary if name in (HELPED_DIN, HELPED_POOLING) else None
    system, report = trained(entry, settings, world, QUICK if lab.quick else FULL[data], seed, change=change)
    return outcome(system, report, world, num_history=50)


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The four parts of the bar, and who gains how much from the auxiliary loss."""
    value, pair = (
        {name: np.array(arms[f"{BEAUTY}: {name}"].per_seed[metric]) for name in ARMS} for metric in ("auc", "gauc")
    )
    mean = {name: float(v.mean()) for name, v in value.items()}
    order = arms[f"{DRIFT}: {DIEN}"].metrics["gauc"].mean - arms[f"{DRIFT}: {DIN}"].metrics["gauc"].mean
    from_loss, from_gate = mean[DIEN] - mean[AUGRU], mean[AUGRU] - mean[TWO_GRUS]
    parts = {
        f"the auxiliary loss adds {from_loss:+.4f} AUC to AUGRU": from_loss >= FROM_AUXILIARY,
        f"the gate adds {from_gate:+.4f} to two GRUs": from_gate >= -SLACK,
        f"loss against gate {from_loss - from_gate:+.4f}": from_loss > from_gate,
        f"where minds change DIEN is {order:+.4f} GAUC against DIN": order >= FROM_ORDER,
    }
    gains = {
        "DIN": value[HELPED_DIN] - value[DIN],
        "mean pooling": value[HELPED_POOLING] - value[POOLING],
        "AUGRU with the released gate": value[RELEASED_AUX] - value[RELEASED],
    }
    shown = "; ".join(
        f"{name} {gain.mean():+.4f} ({gain.min():+.4f} to {gain.max():+.4f})" for name, gain in gains.items()
    )
    verdict: Verdict = "holds" if all(parts.values()) else "partly" if any(parts.values()) else "fails"
    told = ", ".join(f"{text} ({'reached' if held else 'not reached'})" for text, held in parts.items())
    by_pairs = (pair[DIEN] - pair[AUGRU]).mean()
    return Judgement(
        verdict, f"Beauty: {told}. The same loss adds AUC to {shown}. In GAUC it adds {by_pairs:+.4f} to AUGRU."
    )
