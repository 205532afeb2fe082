"""CAN, Cartesian crosses and neither on purchases: AUC on all candidates and on those of which no pair with the past stands in training.

`shortlist prove can_behaviour` (wants SHORTLIST_DATA); resumes where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from _ctr import num_parameters
from _ranking_lab import Examples, Training, World, measured, popularity, purchases, scores, trained
from shortlist.data.batches import request_batch
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab, hold_if
from shortlist.layers.co_action import CoActionConfig
from shortlist.layers.field_matrix import FieldsConfig
from shortlist.layers.scoring import HeadConfig
from shortlist.metrics import Interval, auc
from shortlist.models.ranking.can import CAN

LENGTH = 20
FIELDS = FieldsConfig(dim=18, max_history=LENGTH, names=("history", "item"))
HEAD = HeadConfig(widths=(200, 80), activation="relu", dropout=0.1, pair_bins=0, loss="bce")
PAIR = ("item*history",)
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "DNN": ("can", {"fields": FIELDS, "head": HEAD, "pairs": ()}),
    "DNN, inner product": ("deepfm", {"fields": FIELDS, "head": HEAD}),
    "Cartesian": (
        "can",
        {"fields": FIELDS, "head": HEAD, "pairs": (), "crosses": PAIR, "cross_rows": 2_000_000, "cross_dim": 18},
    ),
    "CAN": ("can", {"fields": FIELDS, "head": HEAD, "pairs": PAIR, "co_action": CoActionConfig()}),
}
FULL = Training(epochs=6, batch_size=256, lrs=(2e-3,), patience=1, max_history=LENGTH)
QUICK = Training(epochs=2, batch_size=32, lrs=(1e-2,), patience=2, max_history=LENGTH)

CLAIM = Claim(
    name="can_behaviour",
    systems=("can", "deepfm"),
    claim="Co-action units of candidate and past gain over a DNN what Cartesian crosses gain, with a sixth of their parameters or less, "
    "and keep half of it on pairs that training lacked, where crosses gain nothing.",
    data="Amazon Beauty 5-core (S3-Rec release, days), one uniform and one popularity negative per purchase; item ids alone",
    protocol="Each user's last day tests, the day before validates, up to three earlier ones train; a request reads up to 20 earlier "
    "purchases. Embeddings of 18, tower 200-80, Adam 2e-3, epoch chosen on validation GAUC, tested once. Crosses: every pair of a "
    "candidate and a past item of the training rows. Parameters are those beyond the DNN's. unseen: test rows none of whose pairs with "
    "the past stands in training",
    bar="With every seed CAN's AUC is at least the DNN's + .005 and the crosses' - .003, with at most a sixth of the crosses' extra "
    "parameters; on unseen pairs the crosses' mean gain over the DNN is at most .002 in size, and CAN keeps at least half of its own",
    published={"Amazon Books (AUC)": {"DNN": 0.7640, "DNN + Cartesian": 0.7891, "DNN + CAN": 0.7935}},
)  # fmt: skip


def run(lab: Lab) -> None:
    """Popularity, then every arm with every seed."""
    world = (
        purchases(None, "", negatives=(1, 1), max_per_user=3)
        if lab.quick
        else purchases(lab.data_root, "s3rec-beauty", negatives=(1, 1), max_per_user=3)
    )
    unseen = torch.from_numpy(unseen_rows(world))
    popular = popularity(world, world.test)
    lab.measure("popularity", 0, lambda: {"auc": auc(world.test.label, popular), "rows_unseen": float(unseen.sum())})
    for seed in lab.seeds:
        for name in ARMS:
            lab.measure(name, seed, lambda name=name, seed=seed: measured_arm(lab, world, unseen, name, seed))  # type: ignore[misc]


def pairs_of(world: World, examples: Examples) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Keys of all (candidate, past item) pairs of the rows, end to end, and the row of each."""
    batch = request_batch(world.histories, world.users, examples.requests, max_history=LENGTH)
    past, row_of_t = batch.history.items, examples.rows.row_of_value
    index, lengths = past.where(row_of_t)
    row = torch.arange(len(row_of_t)).repeat_interleave(lengths)
    key = examples.rows.values[row] * (world.space.num_items + 1) + past.values[index]
    return key.numpy(), row.numpy()


def unseen_rows(world: World) -> NDArray[np.bool_]:
    """[t] test rows with a past, none of whose pairs stands in training."""
    trained_key, _ = pairs_of(world, world.train)
    key, row = pairs_of(world, world.test)
    total = len(world.test.label)
    pairs = np.bincount(row, minlength=total)
    met = np.bincount(row, weights=np.isin(key, trained_key), minlength=total)
    return np.asarray((pairs > 0) & (met == 0))


def measured_arm(lab: Lab, world: World, unseen: torch.Tensor, name: str, seed: int) -> dict[str, float | Interval]:
    """One arm, trained and tested."""
    system_name, settings = ARMS[name]
    if lab.quick and "cross_rows" in settings:
        settings = {**settings, "cross_rows": 20_000}
    system, report = trained(system_name, settings, world, QUICK if lab.quick else FULL, seed)
    score, label = scores(system, world, world.test), world.test.label
    both = label[unseen].unique().numel() == 2
    parameters = num_parameters(system)
    if isinstance(system, CAN) and system.crosses is not None:
        parameters += system.crosses.num_used - system.crosses.table.num_floats
    found = measured(system, world, world.test)
    return {
        "gauc": found["gauc"],
        "auc": found["auc"].mean,
        "auc_unseen": auc(label[unseen], score[unseen]) if both else 0.5,
        "parameters": float(parameters),
        "cost:best_epoch": float(report.best_epoch or 0),
    }


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bar, and the inner product beside."""
    value = {name: {m: np.array(v) for m, v in arms[name].per_seed.items()} for name in ARMS}
    gain = {name: {m: value[name][m] - value["DNN"][m] for m in ("auc", "auc_unseen", "parameters")} for name in ARMS}
    can, crosses = gain["CAN"], gain["Cartesian"]
    share = can["parameters"].mean() / crosses["parameters"].mean()
    kept = can["auc_unseen"].mean() / max(can["auc"].mean(), 1e-9)
    shown = "; ".join(
        f"{name} {value[name]['auc'].mean():.4f} ({g['auc'].mean():+.4f}), unseen {value[name]['auc_unseen'].mean():.4f} "
        f"({g['auc_unseen'].mean():+.4f})"
        for name, g in gain.items()
    )
    holds = (
        bool((can["auc"] >= 0.005).all())
        and bool((can["auc"] >= crosses["auc"] - 0.003).all())
        and share <= 1 / 6
        and abs(crosses["auc_unseen"].mean()) <= 0.002
        and kept >= 0.5
    )
    return hold_if(
        holds,
        f"AUC and its gain over the DNN: {shown}. CAN adds {share:.3f} of the crosses' parameters and keeps {kept:.2f} of its gain on the "
        f"{arms['popularity'].metrics['rows_unseen'].mean:,.0f} test rows without a pair of training.",
    )
