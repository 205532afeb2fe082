"""S3-Rec's pre-training on Amazon Beauty: what it adds to its own encoder, under the paper's loss and under a full softmax.

`shortlist prove s3rec_beauty` (wants SHORTLIST_DATA); three seeds under the paper's loss, one under the full softmax; resumes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import polars as pl

import _next_item as harness
from shortlist.data.dataset import Dataset, build_dataset
from shortlist.data.datasets import load
from shortlist.data.log import EventLog, read
from shortlist.evaluation.evaluate import held_out, make_pages, pager_of
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab
from shortlist.metrics import Interval

ENCODER: dict[str, Any] = {"dim": 64, "dropout": 0.5}
BCE, SOFTMAX = {"loss": "bce"}, {"loss": "full_softmax"}
PRETRAINED_BCE, SCRATCH_BCE = "pre-trained, BCE", "from scratch, BCE"
PRETRAINED, SCRATCH, SASREC = "pre-trained, full softmax", "from scratch, full softmax", "SASRec, full softmax"
ATTRIBUTES = ("attributes",)


def s3rec(loss: Mapping[str, Any], pretrain_epochs: int, **trainer: Any) -> harness.NextItemArm:
    """The encoder with or without pre-training."""
    settings = {**ENCODER, **loss, "pretrain_epochs": pretrain_epochs, "num_prefixes": 3, "attributes": ATTRIBUTES}
    return harness.NextItemArm(system="s3rec", settings=settings, trainer=trainer)


PRETRAIN_EPOCHS = 12
LONG = {"epochs": 100, "validate_every": 5, "patience": 3}
BY_BCE = {SCRATCH_BCE: s3rec(BCE, 0, **LONG), PRETRAINED_BCE: s3rec(BCE, PRETRAIN_EPOCHS, **LONG)}
BY_SOFTMAX = {
    SCRATCH: s3rec(SOFTMAX, 0),
    PRETRAINED: s3rec(SOFTMAX, PRETRAIN_EPOCHS),
    SASREC: harness.NextItemArm(system="sasrec", settings={**ENCODER, **SOFTMAX, "use_fields": False}),
}
SETTING = harness.Setting(
    data="s3rec-beauty", arms={**BY_BCE, **BY_SOFTMAX}, seeds=(0, 1, 2), batch_size=256, epochs=25, patience=2, max_history=50,
    validate_every=2,
)  # fmt: skip
QUICK = harness.Setting(
    data="walks",
    arms={
        name: replace(
            harness.quick(arm),
            settings={
                **harness.quick(arm).settings,
                **({"attributes": ()} if arm.system == "s3rec" else {}),
                **({"pretrain_epochs": 2} if "pre-trained" in name else {}),
            },
            trainer={},
        )
        for name, arm in {**BY_BCE, **BY_SOFTMAX}.items()
    },
    seeds=(0,),
    batch_size=64,
    epochs=3,
    patience=3,
    lr=1e-2,
    max_history=20,
)
FULL_GAIN, SAMPLED_GAIN = 1.05, 0.05

CLAIM = Claim(
    name="s3rec_beauty",
    systems=("s3rec", "sasrec"),
    claim="Pre-training on items, attributes and segments lifts the same encoder under the paper's loss; whether it does under a full "
    "softmax is reported.",
    data="Amazon Beauty, 5-core, as released with S3-Rec (22,363 users, 12,101 items, 637 attributes); item ids permuted",
    protocol=harness.PROTOCOL
    + f" Ranked among 100 where the paper ranks among 99. {PRETRAIN_EPOCHS} epochs of pre-training on 3 random prefixes per user, the "
    "paper's 150 on all of them; the validation event is in no training sequence. Full softmax with the first seed alone.",
    bar=f"Under BCE, mean over seeds: HR@20 with pre-training at least {FULL_GAIN} x without and NDCG@10 not lower, full ranking; "
    f"HR@10 among 101 at least {SAMPLED_GAIN:.2f} higher.",
    published={
        "SASRec in the paper's table": {"hr@10": 0.0605, "ndcg@10": 0.0318, "hr@20": 0.0902, "hr@10_of_101": 0.4696},
        "S3-Rec": {"hr@10": 0.0647, "ndcg@10": 0.0327, "hr@20": 0.0994, "hr@10_of_101": 0.5506},
        "SASRec, full softmax, as users report": {"hr@10": 0.083, "ndcg@10": 0.0416},
        "skip-gram Markov chain on the same training events": {"hr@10": 0.0805, "ndcg@10": 0.0505},
    },
)


def run(lab: Lab) -> None:
    """Baselines, then every arm; the full softmax with the first seed alone."""
    setting = QUICK if lab.quick else SETTING
    log = walks_with_kinds() if lab.quick else load(setting.data, lab.data_root)
    dataset = build_dataset(log, setting.split)
    for name in setting.baselines:
        lab.measure(f"{setting.data}: {name}", 0, partial(harness.measured_baseline, name, dataset))
    for seed in setting.seeds:
        for name in setting.arms:
            if name in BY_BCE or seed == setting.seeds[0]:
                lab.measure(f"{setting.data}: {name}", seed, partial(measured, lab, setting, dataset, name, seed))


def measured(lab: Lab, setting: harness.Setting, dataset: Dataset, name: str, seed: int) -> dict[str, float | Interval]:
    """The harness's figures and hit rate among 20."""
    system, report = harness.trained_arm(lab, setting, dataset, name, seed)
    requests = held_out(dataset, "test", repeats=dataset.repeats)
    rows = make_pages(pager_of(system, 20), dataset, requests, repeats=dataset.repeats)
    return {
        **harness.measured(system, dataset),
        "hr@20": float((rows == requests.target[:, None]).any(1).mean()),
        "cost:epochs": float(report.epochs),
        "cost:best_epoch": float(report.best_epoch or report.epochs),
        "cost:training_seconds": report.seconds,
    }


def walks_with_kinds(num_kinds: int = 10) -> EventLog:
    """The small planted log with a kind per item, ten neighbours sharing one, for the quick form."""
    events = harness.walks().events
    items = pl.DataFrame({"item_id": np.arange(100), "kind": [f"k{i // num_kinds}" for i in range(100)]})
    return read(events.select("user_id", "item_id", "timestamp"), items=items)


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bars under BCE, and what is left of the gain under a full softmax."""
    data = next(iter(arms)).split(": ")[0]
    mine = {name.removeprefix(f"{data}: "): arm.metrics for name, arm in arms.items()}
    before, after = mine[SCRATCH_BCE], mine[PRETRAINED_BCE]
    gain = after["hr@20"].mean / max(before["hr@20"].mean, 1e-9)
    higher = after["hr@10_of_101"].mean - before["hr@10_of_101"].mean
    failures = []
    if gain < FULL_GAIN:
        failures.append(f"HR@20 is {gain:.3f} x that from scratch")
    if after["ndcg@10"].mean < before["ndcg@10"].mean:
        failures.append(f"NDCG@10 falls from {before['ndcg@10'].mean:.4f} to {after['ndcg@10'].mean:.4f}")
    if higher < SAMPLED_GAIN:
        failures.append(f"HR@10 among 101 changes by {higher:+.4f}")
    under = mine[PRETRAINED]["hr@20"].mean / max(mine[SCRATCH]["hr@20"].mean, 1e-9)
    shown = ", ".join(
        f"{name} {metrics['ndcg@10'].mean:.4f} / {metrics['hr@10'].mean:.4f}"
        for name, metrics in mine.items()
        if "ndcg@10" in metrics
    )
    findings = [
        f"Under BCE HR@20 {gain:.3f} x, HR@10 among 101 {higher:+.4f}; under a full softmax HR@20 {under:.3f} x",
        f"NDCG@10 / HR@10 on {data}: {shown}",
    ]
    return Judgement("fails" if failures else "holds", ". ".join([*failures, *findings]) + ".")
