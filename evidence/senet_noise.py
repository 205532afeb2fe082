"""SENet under fields that say nothing: what weights they get, and how much of the DNN's loss it saves. Frappe with random columns.

`shortlist prove senet_noise` (wants SHORTLIST_DATA); resumes where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from _ctr import Recipe, Table, frappe, num_parameters, quality, trained, world_of
from _ranking_lab import World
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab, hold_if
from shortlist.layers.field_matrix import FieldsConfig
from shortlist.layers.gates import GateConfig, SENet
from shortlist.layers.scoring import HeadConfig
from shortlist.models.base import Ranker
from shortlist.models.ranking.can import CAN

NUM_NOISE, NOISE_VALUES = 10, 1_000
FIELDS = FieldsConfig(dim=10, use_history=False, max_history=1)
HEAD = HeadConfig(
    widths=(400,),
    activation="relu",
    dropout=0.2,
    norm="batch",
    use_user_ids=True,
    id_dropout=0.0,
    pair_bins=0,
    loss="bce",
)
GATES = {
    "DNN": GateConfig(),
    "SENet": GateConfig(senet=True),
    "SENet as published": GateConfig(senet=True, senet_squeeze="mean", senet_output="relu"),
}

CLAIM = Claim(
    name="senet_noise",
    systems=("senet", "can"),
    claim="SENet turns down fields that say nothing, and so loses less to them than a DNN without it.",
    data=f"Frappe_x1 (training negatives redrawn), plain and with {NUM_NOISE} columns of {NOISE_VALUES:,} random ids each",
    protocol="The leaderboard's rule of training, embeddings of 10, one hidden layer of 400 (CAN without pairs, which is a DNN), the same "
    "for all arms. Weights: means over the test rows of the noisy log. `as published` squeezes by the mean alone and ends in ReLU",
    bar="SENet's mean weight of noise fields is below half of that of real ones, and it loses at most half of the AUC that the DNN loses, "
    "means of the seeds",
)  # fmt: skip


def noisy(table: Table, number: int, values: int) -> Table:
    """The table with random columns."""
    rng = np.random.default_rng(0)

    def wider(rows: pl.DataFrame) -> pl.DataFrame:
        return rows.with_columns(pl.Series(f"random{n}", rng.integers(0, values, len(rows))) for n in range(number))

    return replace(table, train=wider(table.train), valid=wider(table.valid), test=wider(table.test))


def run(lab: Lab) -> None:
    """Every kind of gate on both logs with every seed."""
    plain = frappe(None if lab.quick else lab.data_root)
    number, values = (4, 50) if lab.quick else (NUM_NOISE, NOISE_VALUES)
    worlds = {"plain": world_of(plain), "noisy": world_of(noisy(plain, number, values))}
    for seed in lab.seeds:
        for data, world in worlds.items():
            for name in GATES:
                lab.measure(
                    f"{data}: {name}",
                    seed,
                    lambda world=world, name=name, seed=seed: measured(lab, world, name, seed),  # type: ignore[misc]
                )


def measured(lab: Lab, world: World, name: str, seed: int) -> dict[str, float]:
    """One arm, tested once, with the mean weights of real and random fields."""
    recipe = Recipe()
    if lab.quick:
        recipe = Recipe(table_l2=0.0, batch_size=256, epochs=2, lr=1e-2, init_std=None)
    settings = {"fields": FIELDS, "pairs": (), "head": replace(HEAD, gates=GATES[name])}
    system, course = trained("can", settings, world, recipe, seed)
    weights: list[Tensor] = []

    def watch(gate: nn.Module, given: tuple[Tensor]) -> None:
        assert isinstance(gate, SENet)
        weights.append(gate.weights(given[0]).sum(0))

    hooks = [m.register_forward_pre_hook(watch) for m in system.modules() if isinstance(m, SENet)]
    found = quality(system, world, world.test)
    for hook in hooks:
        hook.remove()
    found |= {"cost:parameters": float(num_parameters(system)), "cost:best_epoch": float(course.best_epoch)}
    return found | (field_weights(system, torch.stack(weights).sum(0) / len(world.test.label)) if weights else {})


def field_weights(system: Ranker, weight_F: Tensor) -> dict[str, float]:
    """Mean weights of real and of random fields, and the share of fields that are off."""
    assert isinstance(system, CAN)
    names = system.fields.matrix.request_names + system.fields.matrix.candidate_names
    is_random = torch.tensor(["random" in name for name in names])
    made = {"weight_real": float(weight_F[~is_random].mean()), "off": float((weight_F == 0).float().mean())}
    return made | ({"weight_random": float(weight_F[is_random].mean())} if is_random.any() else {})


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bar for SENet, the published form beside."""
    auc = {name: np.array(arm.per_seed["auc"]) for name, arm in arms.items()}
    lost = {name: float((auc[f"plain: {name}"] - auc[f"noisy: {name}"]).mean()) for name in GATES}
    weight = {
        name: {m: arms[f"noisy: {name}"].metrics[m].mean for m in ("weight_real", "weight_random", "off")}
        for name in GATES
        if name != "DNN"
    }
    shown = "; ".join(
        f"{name} {auc[f'plain: {name}'].mean():.4f}, with noise {auc[f'noisy: {name}'].mean():.4f} ({-lost[name]:+.4f})"
        for name in GATES
    )
    of_weights = "; ".join(
        f"{name} real {w['weight_real']:.3f}, random {w['weight_random']:.3f}, share of fields off {w['off']:.2f}"
        for name, w in weight.items()
    )
    found = weight["SENet"]
    holds = found["weight_random"] < 0.5 * found["weight_real"] and lost["SENet"] <= 0.5 * lost["DNN"]
    return hold_if(holds, f"AUC: {shown}. Mean weights: {of_weights}.")
