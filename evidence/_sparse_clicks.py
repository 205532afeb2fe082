"""What the claims about GIN share: its arms, parts of a test by how much is known of the user, and a planted log of few clicks.

t candidates of all requests end to end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from _ranking_lab import Training, World, outcome, popularity, trained
from shortlist.evaluation.evidence import Arm, Lab
from shortlist.layers.scoring import HeadConfig
from shortlist.metrics import Interval, auc
from shortlist.models.base import Ranker

DIM, LENGTH, UNIT = 32, 20, (16,)
HEAD = HeadConfig(widths=(128, 64), loss="bce")
DIN: dict[str, Any] = {"dim": DIM, "unit_widths": UNIT, "widths": HEAD.widths, "loss": "bce", "mba": 0.0}
GIN: dict[str, Any] = {"dim": DIM, "unit_widths": UNIT, "head": HEAD}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "DIN": ("din", DIN),
    "self-loops": ("gin", {**GIN, "graph": "self-loop"}),
    "random graph": ("gin", {**GIN, "graph": "random"}),
    "GIN": ("gin", GIN),
    "GIN, own clicks in its graph": ("gin", {**GIN, "folds": 0}),
}
CONTROLS = ("DIN", "self-loops", "random graph")
PARTS = {"1-2 clicks": (1, 2), "3-5 clicks": (3, 5), "6 clicks and more": (6, 1 << 30)}
FULL = Training(epochs=8, batch_size=256, lrs=(1e-3, 3e-3), patience=1, max_history=LENGTH)
QUICK = Training(epochs=2, batch_size=64, lrs=(1e-2,), patience=2, max_history=LENGTH)
LEAST = 0.003
PROTOCOL = (
    "The graph is made of the training events alone; a training request reads one without its user's own clicks, since each of them is "
    "somebody's label. Same embeddings (32), activation unit, tower 128-64, cross-entropy and Adam for all; learning rate (one of two) and "
    "epoch by validation GAUC, tested once. self-loops: every item is its own only neighbour. random graph: one end of every pair of "
    "neighbours moved to another pair. last 2: the same models read the newest two clicks of each test request. own clicks: the fault "
    "of a graph that holds its labels. How GIN's map starts was chosen on a planted log of a sixth of this size, with one seed"
)


def few_clicks(num_users: int = 8_000, num_groups: int = 100, per_group: int = 30) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Users who click 3 to 10 items, a day apart: the next is of the same group with chance .8, else of a group next to it.

    Items of a group are clicked with chances 1 / sqrt(place). Times of first clicks differ.
    """
    rng = np.random.default_rng(0)
    length = rng.integers(3, 11, num_users)
    moves = np.where(rng.random((num_users, 10)) < 0.8, 0, rng.choice([-1, 1], (num_users, 10)))
    moves[:, 0] = rng.integers(0, num_groups, num_users)
    group = moves.cumsum(1) % num_groups
    chance = 1 / np.sqrt(1 + np.arange(per_group))
    place = rng.choice(per_group, (num_users, 10), p=chance / chance.sum())
    names = rng.permutation(num_groups * per_group)
    item = names[group * per_group + place]
    is_click = np.arange(10) < length[:, None]
    day = np.broadcast_to(np.arange(10), is_click.shape)
    events = {
        "user_id": np.repeat(np.arange(num_users), length),
        "item_id": item[is_click],
        "time": 86_400 * day[is_click],
        "group": day[is_click],
    }
    nothing = pl.Series([[] for _ in names], dtype=pl.List(pl.String))
    return pl.DataFrame(events), pl.DataFrame({"item_id": np.arange(len(names)), "attributes": nothing})


def measure_all(lab: Lab, data: str, world: World) -> None:
    """Popularity, then every arm with every seed."""
    popular = popularity(world, world.test)
    lab.measure(f"{data}: popularity", 0, lambda: {"auc": auc(world.test.label, popular)})
    for seed in lab.seeds:
        for name in ARMS:
            lab.measure(f"{data}: {name}", seed, lambda n=name, s=seed: measured(lab, world, n, s))  # type: ignore[misc]


def measured(lab: Lab, world: World, name: str, seed: int) -> dict[str, float | Interval]:
    """One arm: all of the test, parts of it by how much is known of the user, and with two clicks alone."""
    entry, settings = ARMS[name]
    system, report = trained(entry, settings, world, QUICK if lab.quick else FULL, seed, use_fields=False)
    found = outcome(system, report, world, num_history=LENGTH)
    whole, label = scores_at(system, world, LENGTH), world.test.label
    known = torch.from_numpy(world.test.requests.end - world.test.requests.start)[world.test.rows.row_of_value]
    for part, (low, high) in PARTS.items():
        inside = (known >= low) & (known <= high)
        if inside.sum() >= 100:
            found[f"auc, {part}"] = auc(label[inside], whole[inside])
    found["auc, last 2"] = auc(label, scores_at(system, world, 2))
    return found


@torch.inference_mode()
def scores_at(system: Ranker, world: World, max_history: int) -> Tensor:
    """float32 [t]: scores of the test rows where no more than so many past events are read."""
    parts = np.array_split(np.arange(len(world.test.requests)), -(-len(world.test.requests) // 512))
    return torch.cat([system.score(world.test.batch(world, part, max_history))["target"] for part in parts])


def leads(arms: Mapping[str, Arm], data: str, metric: str, others: Sequence[str] = CONTROLS) -> dict[str, np.ndarray]:
    """How far GIN is above each of the others, by seed."""
    own = np.array(arms[f"{data}: GIN"].per_seed[metric])
    return {other: own - np.array(arms[f"{data}: {other}"].per_seed[metric]) for other in others}


def clears(arms: Mapping[str, Arm], data: str) -> bool:
    """GIN is above all controls with every seed, and far enough on average; with two clicks too."""
    found = [*leads(arms, data, "auc").values(), *leads(arms, data, "auc, last 2").values()]
    return all(bool(lead.mean() >= LEAST and (lead > 0).all()) for lead in found)


def shown(arms: Mapping[str, Arm], data: str) -> str:
    """AUC of all arms, and GIN's least mean lead over a control on the whole test and on its parts."""
    means = ", ".join(f"{name} {arms[f'{data}: {name}'].metrics['auc'].mean:.4f}" for name in ARMS)
    known = [m for m in ("auc, last 2", *(f"auc, {p}" for p in PARTS)) if m in arms[f"{data}: GIN"].per_seed]
    parts = ", ".join(f"{_least(arms, data, m):+.4f} {m.removeprefix('auc, ')}" for m in known)
    return f"{data}: AUC {means}; least lead of GIN over a control {_least(arms, data, 'auc'):+.4f}; {parts}"


def _least(arms: Mapping[str, Arm], data: str, metric: str) -> float:
    return float(min(lead.mean() for lead in leads(arms, data, metric).values()))
