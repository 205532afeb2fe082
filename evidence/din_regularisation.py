"""Mini-batch aware regularisation against none, dropout and plain decay: DIN on a log of rare places, test AUC epoch by epoch.

`shortlist prove din_regularisation` (wants SHORTLIST_DATA); resumes where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from _ranking_lab import Training, World, outcome, purchases, scores, trained
from shortlist.embeddings.base import TableChoice
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab, Verdict
from shortlist.metrics import Interval, auc
from shortlist.models.base import Ranker

EPOCHS = 5
NONE, DROPOUT = "none", "dropout .5 in the tower"
ARMS: dict[str, dict[str, Any]] = {
    NONE: {},
    DROPOUT: {"dropout": 0.5},
    "plain decay of rows read, 1e-4": {"l2": 1e-4},
    "plain decay of rows read, 1e-3": {"l2": 1e-3},
    "mini-batch aware, .01": {"mba": 0.01},
    "mini-batch aware, .1": {"mba": 0.1},
}
AWARE = [name for name in ARMS if name.startswith("mini-batch")]
FULL = Training(epochs=EPOCHS, batch_size=256, lrs=(5e-3,), patience=EPOCHS, max_history=20)
QUICK = Training(epochs=EPOCHS, batch_size=64, lrs=(1e-2,), patience=EPOCHS, max_history=20)
NEAR = 0.002

CLAIM = Claim(
    name="din_regularisation",
    systems=("din",),
    claim="With wide embeddings of rare ids DIN overfits after an epoch or two; decay that weighs each id by its count stops the fall.",
    data="Yelp 2019 5-core (S3-Rec release), 20,033 places, at most two training requests per user, one uniform negative each",
    protocol="A user's last group tests, the one before validates. DIN with softmax, embeddings of 64, ids alone (no attributes, no id "
    "dropout), sparse tables (row-wise Adam: only rows of the batch move), 5e-3; five epochs whatever happens, and the test AUC of each "
    "epoch is shown, so that its best is a choice on the test set for every arm alike.",
    bar="Without regularisation the AUC peaks by epoch 2 and then falls; the better mini-batch aware arm's best epoch is at least "
    "as good as that of every other arm, and its last epoch is within .002 of its best. A preview of four arms with one seed, at "
    "1e-3 and 5e-3, scored the test and chose 5e-3.",
    published={"DIN's paper, Alibaba (AUC)": {"none": 0.5959, "dropout": 0.5970, "mini-batch aware": 0.6031}},
)  # fmt: skip


def run(lab: Lab) -> None:
    """Every arm with every seed."""
    root = None if lab.quick else lab.data_root
    world = purchases(root, "s3rec-yelp", negatives=(1, 0), max_per_user=2)
    for seed in lab.seeds:
        for name in ARMS:
            lab.measure(name, seed, partial(measured_arm, lab, world, name, seed))


def measured_arm(lab: Lab, world: World, name: str, seed: int) -> dict[str, float | Interval]:
    """DIN with one regulariser; `epoch_1` to `epoch_5` are test AUCs."""
    curve: list[float] = []

    def look(system: Ranker) -> None:
        curve.append(auc(world.test.label, scores(system, world, world.test)))

    settings = {
        "dim": 16 if lab.quick else 64,
        "loss": "bce",
        "cross": False,
        "id_dropout": 0.0,
        "dropout": 0.0,
        "mba": 0.0,
        "table": TableChoice(sparse=True),
        **ARMS[name],
    }
    training = QUICK if lab.quick else FULL
    system, report = trained("din", settings, world, training, seed, use_fields=False, after_epoch=look)
    return {
        **outcome(system, report, world),
        "peak": max(curve),
        **{f"epoch_{i}": value for i, value in enumerate(curve, 1)},
    }


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bar in its three parts, on means over seeds."""
    curve = {name: np.array([arms[name].metrics[f"epoch_{i}"].mean for i in range(1, EPOCHS + 1)]) for name in ARMS}
    best = max(AWARE, key=lambda name: curve[name].max())
    failures = []
    plain = curve[NONE]
    if plain.argmax() > 1 or plain[-1] >= plain.max():
        failures.append(f"without regularisation the peak is epoch {plain.argmax() + 1}")
    others = max(curve[name].max() for name in ARMS if name not in AWARE)
    if curve[best].max() < others:
        failures.append(f"{best} peaks at {curve[best].max():.4f}, another arm at {others:.4f}")
    if curve[best].max() - curve[best][-1] > NEAR:
        failures.append(f"{best} ends {curve[best].max() - curve[best][-1]:.4f} below its peak")
    shown = "; ".join(
        f"{name} {values.max():.4f} in epoch {values.argmax() + 1}, then {values[-1]:.4f}"
        for name, values in curve.items()
    )
    verdict: Verdict = "fails" if len(failures) == 3 else "partly" if failures else "holds"
    return Judgement(verdict, ". ".join([*failures, f"Test AUC at its peak and in the last epoch: {shown}"]) + ".")
