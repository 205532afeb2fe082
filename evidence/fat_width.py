"""FAT's AUC against its width, with a power law fitted, and the plain Transformer beside.

`shortlist prove fat_width`; needs no data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from _ctr import Recipe, num_parameters, quality, trained, world_of
from _planted_fields import FieldPairs, field_pairs_log
from fat_fields import FAT, HEAD, NAMES, NUM_FIELDS, NUM_PAIRS, NUM_ROWS, NUM_VALUES, PLAIN
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab, hold_if
from shortlist.layers.field_matrix import FieldsConfig

WIDTHS = (2, 4, 8, 16)
KINDS = {"FAT": FAT, "plain": PLAIN}

CLAIM = Claim(
    name="fat_width",
    systems=("fat",),
    claim="FAT's AUC grows with its width by a power law of its parameters.",
    data=f"Planted, as in fat_fields: {NUM_FIELDS} fields of {NUM_VALUES} values, {NUM_ROWS:,} rows, {NUM_PAIRS} ordered pairs",
    protocol=f"As fat_fields; widths {', '.join(map(str, WIDTHS))} of tokens and embeddings, feed-forward four times as wide. "
    "The power law is a line through log(AUC - .5) over log(parameters without embeddings), least squares over the means of the seeds",
    bar="FAT's mean AUC rises with every step of width up to the largest but one, and the residuals of the fit are at most .1 in log "
    "units. The published exponent is not known to us; no exponent is claimed",
)  # fmt: skip


def run(lab: Lab) -> None:
    """Every width of both with every seed, on the same log."""
    log = (
        field_pairs_log(4, 10, 1, 3_000) if lab.quick else field_pairs_log(NUM_FIELDS, NUM_VALUES, NUM_PAIRS, NUM_ROWS)
    )
    lab.measure("the true odds", 0, lambda: {"auc": log.oracle})
    for seed in lab.seeds:
        for kind in KINDS:
            for width in WIDTHS:
                lab.measure(
                    f"{kind}, width {width}",
                    seed,
                    lambda kind=kind, width=width, seed=seed: measured(lab, log, kind, width, seed),  # type: ignore[misc]
                )


def measured(lab: Lab, log: FieldPairs, kind: str, width: int, seed: int) -> dict[str, float]:
    """One width, tested once."""
    world = world_of(log.table)
    recipe = Recipe(batch_size=512, lr=3e-3, table_l2=0.0, epochs=2 if lab.quick else 25, init_std=None)
    blocks = replace(KINDS[kind], width=width, ffn_width=4 * width)
    settings = {
        "fields": FieldsConfig(dim=width, names=NAMES[:4] if lab.quick else NAMES),
        "head": HEAD,
        "blocks": blocks,
    }
    system, _ = trained("fat", settings, world, recipe, seed)
    return {**quality(system, world, world.test), "cost:dense_parameters": float(num_parameters(system, dense=True))}


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """Slopes and residuals of both."""
    findings, rises, close = [], False, False
    for kind in KINDS:
        found = [arms[f"{kind}, width {width}"] for width in WIDTHS]
        auc = np.array([np.mean(arm.per_seed["auc"]) for arm in found])
        x = np.log([arm.cost["dense_parameters"] for arm in found])
        y = np.log(np.maximum(auc - 0.5, 1e-4))
        slope, level = np.polyfit(x, y, 1)
        residual = y - (slope * x + level)
        if kind == "FAT":
            rises = bool((np.diff(auc)[:-1] > 0).all())
            close = bool(np.abs(residual).max() <= 0.1)
        findings.append(
            f"{kind}: AUC {', '.join(f'{a:.4f}' for a in auc)}; exponent {slope:.3f}, residuals "
            f"{', '.join(f'{r:+.3f}' for r in residual)}"
        )
    oracle = arms["the true odds"].metrics["auc"].mean
    return hold_if(rises and close, f"Widths {WIDTHS}, {oracle:.4f} for the true odds. {'. '.join(findings)}.")
