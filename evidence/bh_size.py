"""AUC against the size of the id table, from a whole row per id to a thousandth: binary codes against other schemes at equal bytes.

`shortlist prove bh_size` (needs no data); resumes where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import polars as pl

from _ctr import Recipe, Table, world_of
from _ranking_lab import World
from _tables import INIT_STD, SCHEMES, Maker, chosen, fits, measured, sized
from shortlist.embeddings.base import TableChoice
from shortlist.embeddings.bh import BHConfig
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab, Verdict
from shortlist.metrics import Interval

SIZES = (10, 100, 1000)
FULL, NO_ID, BH = "a row per id", "no id at all", "BH, succession"
SKIP = "BH, skip, at most 1/100"

CLAIM = Claim(
    name="bh_size",
    systems=("bh", "hashed", "quotient-remainder", "multi-hash"),
    claim="At a thousandth of the id table's size binary-code hashing keeps 99 % of the AUC, and at every size it beats the hashing "
    "trick and quotient-remainder.",
    data="Planted: 2^18 ids by Zipf(1.1), each with a taste of rank 8 for ten context columns and a level of its own; 500,000 rows. The "
    "numbers of the ids say nothing about their frequency.",
    protocol="Rows split 8:1:1 at random; ids that training does not hold are unknown. DNN (128-64, width 16), Adam 1e-3, batch 4096, at "
    "most 8 epochs, best epoch on validation (AUC - logloss). BH takes the most rows that the size allows; every other scheme gets exactly "
    "as many, and quotient-remainder is left out where 2 sqrt(n) rows are more. Nothing is tuned, for any arm.",
    bar="BH's AUC is at least .99 of the full table's at 1/1000; BH is at least .005 above the hashing trick at 1/100 and 1/1000, above "
    "two summed hashes at 1/1000, and at no size below quotient-remainder. The share of what the id is worth, (AUC - no id) / "
    "(full - no id), stands beside: .99 of the AUC can be less than no id gives.",
    published={"the paper's abstract": "1000 times smaller with 99 % of the performance"},
)  # fmt: skip


def planted(quick: bool, seed: int = 0) -> World:
    """Labels by levels and tastes of ids; the log is the same for all seeds of training."""
    num_ids, num_rows = (1 << 11, 12_000) if quick else (1 << 18, 500_000)
    rng = np.random.default_rng(seed)
    share = np.arange(1, num_ids + 1) ** -1.1
    number = rng.permutation(num_ids)
    place = rng.choice(num_ids, num_rows, p=share / share.sum())
    context = rng.integers(0, 10, (num_rows, 10))
    values = rng.standard_normal((10, 10, 8)) / np.sqrt(10)
    wish = sum(values[column, context[:, column]] for column in range(10))
    taste = rng.standard_normal((num_ids, 8)) / np.sqrt(8)
    logit = rng.standard_normal(num_ids)[place] + 1.5 * (wish * taste[place]).sum(1) - 0.5
    columns: dict[str, Any] = {"label": (rng.random(num_rows) < 1 / (1 + np.exp(-logit))).astype(np.int64)}
    columns |= {"item": number[place], **{f"context {i}": context[:, i] for i in range(10)}}
    rows = pl.DataFrame(columns)
    first, second = int(0.8 * num_rows), int(0.9 * num_rows)
    return world_of(Table(train=rows[:first], valid=rows[first:second], test=rows[second:], user=None))


def run(lab: Lab) -> None:
    """The full table, no table, and every scheme at every size that it can have."""
    world = planted(lab.quick)
    num_ids = world.space.num_items
    sizes = SIZES[:1] if lab.quick else SIZES
    for seed in lab.seeds:
        lab.measure(FULL, seed, partial(one, lab, world, seed, chosen(TableChoice(init_std=INIT_STD))))
        lab.measure(NO_ID, seed, partial(one, lab, world, seed, sized("hashing trick", num_ids), use_ids=False))
        for size in sizes:
            for scheme in SCHEMES:
                if fits(scheme, num_ids, size):
                    lab.measure(f"{scheme}, 1/{size}", seed, partial(one, lab, world, seed, sized(scheme, size)))
        if not lab.quick:
            skip = BHConfig(compression=100, strategy="skip", init_std=INIT_STD)
            lab.measure(SKIP, seed, partial(one, lab, world, seed, chosen(skip)))


def one(lab: Lab, world: World, seed: int, make: Maker, *, use_ids: bool = True) -> dict[str, float | Interval]:
    """A DNN with that table."""
    settings = {"dim": 16, "widths": (128, 64), "dropout": 0.0, "id_dropout": 0.0, "use_ids": use_ids}
    recipe = Recipe(table_l2=0.0, init_std=None, epochs=2 if lab.quick else 8, batch_size=512 if lab.quick else 4096)
    return measured(settings, world, recipe, seed, make)[1]


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bar on means over seeds, and the whole curve."""
    auc = {name: arm.metrics["auc"].mean for name, arm in arms.items()}
    full, none = auc[FULL], auc[NO_ID]
    failures, checks, shown = [], 0, []
    for size in SIZES:
        ours = auc.get(f"{BH}, 1/{size}")
        if ours is None:
            continue
        wanted = [("quotient-remainder, added", 0.0), ("quotient-remainder, multiplied", 0.0)]
        wanted += [("hashing trick", 0.005)] if size >= 100 else []
        wanted += [("two hashes, summed", 0.0)] if size >= 1000 else []
        for scheme, margin in wanted:
            theirs = auc.get(f"{scheme}, 1/{size}")
            checks += theirs is not None
            if theirs is not None and ours < theirs + margin:
                failures.append(f"at 1/{size} BH has {ours:.4f}, {scheme} {theirs:.4f}")
        shown += [
            f"{name}: {value:.4f}, {(value - none) / (full - none):.0%} of what the id is worth"
            for name, value in auc.items()
            if name.endswith(f"1/{size}")
        ]
    smallest = auc.get(f"{BH}, 1/{SIZES[-1]}")
    if smallest is not None:
        checks += 1
        if smallest < 0.99 * full:
            failures.append(f"at 1/1000 BH keeps {smallest / full:.1%} of the full table's AUC")
    verdict: Verdict = "holds" if not failures else "fails" if len(failures) == checks else "partly"
    return Judgement(
        verdict, ". ".join([*failures, f"Full table {full:.4f}, no id {none:.4f}; {'; '.join(shown)}"]) + "."
    )
