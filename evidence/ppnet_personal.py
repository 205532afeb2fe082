"""Hidden units gated by who asks and what is asked (PPNet), or by who asks alone (LHUC), against DNNs with as many parameters.

`shortlist prove ppnet_personal` (wants SHORTLIST_DATA); resumes where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from _ctr import num_parameters
from _gates import as_large, spread_over_users, watched
from _ranking_lab import Training, World, films, judged, like_rate, popularity, scores, trained
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab
from shortlist.layers.gates import LHUC, GateConfig, PPNet
from shortlist.metrics import Interval, gauc

DNN: dict[str, Any] = {"loss": "bce", "use_user_ids": True}
GATED: dict[str, dict[str, Any]] = {
    "PPNet": {**DNN, "gates": GateConfig(ppnet=("user", "item"), dim=16, hidden=64)},
    "LHUC": {**DNN, "gates": GateConfig(lhuc="user")},
}
KINDS = {"PPNet": PPNet, "LHUC": LHUC}
FULL = Training(epochs=3, batch_size=256, lrs=(1e-3, 3e-3), patience=1)
QUICK = Training(epochs=1, batch_size=64, lrs=(1e-2,), patience=2, max_history=20)
LEAST, SPREAD = 0.001, 0.02

CLAIM = Claim(
    name="ppnet_personal",
    systems=("ppnet", "lhuc", "dnn"),
    claim="Gates on hidden units that know who asks and what is asked rank each person's films better than a wider DNN with as many "
    "parameters.",
    data="MovieLens-1M, 1,500 users drawn from 6,040, rating of 4 or more against less (labels of nine in ten events are known; exact "
    "order, no times)",
    protocol="Each user's first 80 % train, 10 % validate, 10 % test; eight consecutive films are one request, which reads the 50 rated "
    "before it and whether each was liked. Embeddings of 32 with genres, tower 128-64, user ids read by all arms, binary cross-entropy, "
    "Adam; learning rate (one of two) and epoch of every arm chosen on validation GAUC, test once. PPNet's prior is user and item in "
    "tables of 16, gates 64 wide; LHUC has a vector per user. `as large as` widens both layers of the plain DNN until it has as many "
    "parameters, tables included. Few and many: the half of the test's users with fewer and more training rows. Spread: standard "
    "deviation over users of a unit's mean gate, mean of the units",
    bar=f"PPNet's GAUC is at least {LEAST} above the DNN as large as it, mean of the seeds, and the gates' spread over users is above "
    f"{SPREAD}; partly where only one of the two holds. LHUC is reported by the same measure and does not decide",
    published={
        "BARS, GAUC, KuaiVideo_x1": {"DNN": 0.6658, "PPNet": 0.6668},
        "MicroVideo1.7M_x1": {"DNN": 0.6857, "PPNet": 0.6865},
    },
)


def run(lab: Lab) -> None:
    """Trivial orders, then every arm with every seed."""
    world = films(None) if lab.quick else films(lab.data_root, num_users=1_500)
    lab.measure("popularity", 0, partial(judged, popularity(world, world.test), world.test))
    lab.measure("like rate of the item", 0, partial(judged, like_rate(world, world.test), world.test))
    for seed in lab.seeds:
        for name, settings in arms_of(world).items():
            lab.measure(name, seed, partial(measured, lab, world, name, settings, seed))


def arms_of(world: World) -> dict[str, dict[str, Any]]:
    """Settings of the DNN by arm; each gated one follows the plain one that is as large."""
    arms = {"DNN": DNN}
    for name, gated in GATED.items():
        arms |= {f"DNN as large as {name}": as_large(DNN, gated, world), name: gated}
    return arms


def measured(lab: Lab, world: World, name: str, settings: Mapping[str, Any], seed: int) -> dict[str, float | Interval]:
    """One arm, trained and tested once, and what its gates do."""
    system, report = trained("dnn", settings, world, QUICK if lab.quick else FULL, seed)
    found: dict[str, float | Interval] = {
        "cost:best_epoch": float(report.best_epoch or 0),
        "cost:parameters": float(num_parameters(system)),
        "cost:dense_parameters": float(num_parameters(system, dense=True)),
    }
    if name not in KINDS:
        score = scores(system, world, world.test)
    else:
        with watched(system, KINDS[name]) as gates:
            score = scores(system, world, world.test)
        found["spread"] = spread_over_users(gates(), world.test)
    return {**judged(score, world.test), **by_activity(score, world), **found}


def by_activity(score: torch.Tensor, world: World) -> dict[str, float]:
    """GAUC of the halves of the test's users with fewer and with more training rows."""
    user_t = world.test.user_of_row
    users, place_t = np.unique(user_t, return_inverse=True)
    rows_U = np.bincount(world.train.user_of_row, minlength=int(users[-1]) + 1)[users]
    rank_U = rows_U.argsort(kind="stable").argsort(kind="stable")
    is_active = rank_U[place_t] >= len(users) // 2
    return {
        f"gauc_{name}": gauc(world.test.label[mask], score[mask], user_t[mask.numpy()])
        for name, mask in {"few": torch.from_numpy(~is_active), "many": torch.from_numpy(is_active)}.items()
    }


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bar for PPNet, LHUC beside."""
    found = []
    for name in GATED:
        own, plain = arms[name], arms[f"DNN as large as {name}"]
        gain = {
            metric: np.array(own.per_seed[metric]) - np.array(plain.per_seed[metric])
            for metric in ("gauc", "gauc_few", "gauc_many", "auc")
        }
        spread = float(np.mean(own.per_seed["spread"]))
        found.append((gain, spread))
    shown = "; ".join(
        f"{name} against a DNN as large ({arms[name].cost['parameters']:,.0f} parameters): GAUC {gain['gauc'].mean():+.4f} "
        f"({gain['gauc'].min():+.4f} to {gain['gauc'].max():+.4f}), users with few rows {gain['gauc_few'].mean():+.4f}, with many "
        f"{gain['gauc_many'].mean():+.4f}, AUC {gain['auc'].mean():+.4f}, spread of gates {spread:.3f}"
        for name, (gain, spread) in zip(GATED, found, strict=True)
    )
    gain, spread = found[0]
    held = [bool(gain["gauc"].mean() >= LEAST), spread > SPREAD]
    reason = f"{shown}. The plain DNN has GAUC {arms['DNN'].metrics['gauc'].mean:.4f}."
    return Judgement("holds" if all(held) else "partly" if any(held) else "fails", reason)
