"""BERT4Rec beside SASRec by training time, and what hiding the last item alone is worth, on ML-100K.

`shortlist prove bert4rec_convergence` (wants SHORTLIST_DATA); three seeds of 200 seconds per arm, resumes where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import _next_item as harness
from shortlist.data.dataset import Dataset, build_dataset
from shortlist.data.datasets import load
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab
from shortlist.metrics import Interval

BUDGET = 200.0
MOMENTS = (10, 20, 40, 80, 120, 160, 200)
SASREC, BERT, ALONE = "SASRec, full softmax", "BERT4Rec", "BERT4Rec, the last item never hidden alone"
WIDTH = {"dim": 64, "use_fields": False}
ARMS = {
    SASREC: harness.NextItemArm(system="sasrec", settings={**WIDTH, "dropout": 0.2}),
    BERT: harness.NextItemArm(system="bert4rec", settings=WIDTH),
    ALONE: harness.NextItemArm(system="bert4rec", settings={**WIDTH, "last_share": 0.0}),
}
SETTING = harness.Setting(
    data="ml-100k",
    arms={name: replace(arm, trainer={"max_seconds": BUDGET, "patience": None}) for name, arm in ARMS.items()},
    seeds=(0, 1, 2),
    batch_size=32,
    epochs=2_000,
    patience=2_000,
    validate_every=2,
)
QUICK = harness.Setting(
    data="walks",
    arms={name: harness.quick(arm) for name, arm in ARMS.items()},
    seeds=(0,),
    batch_size=64,
    epochs=5,
    patience=5,
    lr=1e-2,
    max_history=20,
)
GAIN = 1.05

CLAIM = Claim(
    name="bert4rec_convergence",
    systems=("bert4rec", "sasrec"),
    claim="At every equal training time SASRec with a full softmax is ahead of BERT4Rec, which goes on rising when SASRec has "
    "flattened; hiding the last item alone in a tenth of the sequences is worth 5 %.",
    data="MovieLens-100K (943 users, 1,349 items), users and items with at least 5 events",
    protocol=harness.PROTOCOL
    + f" Every arm trains for {BUDGET:.0f} s on one core, validation included; valid@Ns is the best validation NDCG@10 up to then.",
    bar="valid@Ns of SASRec at least BERT4Rec's at each N, mean over seeds; BERT4Rec's gain over the second half of the time is above "
    f"SASRec's; NDCG@10 on the test with the last item hidden alone at least {GAIN} x without.",
    published={
        "ML-1M, NDCG@10, original code at 0.4, 0.8, 1.6, 3.2, 12.8 million steps": "0.076, 0.105, 0.129, 0.144, 0.158",
        "ML-1M, SASRec, full softmax (Klenitskiy & Vasilev 2023)": {"ndcg@10": 0.1821},
        "ML-1M, BERT4Rec (Klenitskiy & Vasilev 2023)": {"ndcg@10": 0.1537},
    },
)


def run(lab: Lab) -> None:
    """Baselines, then every arm."""
    setting = QUICK if lab.quick else SETTING
    log = harness.walks() if lab.quick else load(setting.data, lab.data_root)
    dataset = build_dataset(log, setting.split)
    for name in setting.baselines:
        lab.measure(f"{setting.data}: {name}", 0, partial(harness.measured_baseline, name, dataset))
    for seed in setting.seeds:
        for name in setting.arms:
            lab.measure(f"{setting.data}: {name}", seed, partial(measured_curve, lab, setting, dataset, name, seed))


def measured_curve(
    lab: Lab, setting: harness.Setting, dataset: Dataset, name: str, seed: int
) -> dict[str, float | Interval]:
    """The trained system, and the best validation score by time."""
    system, report = harness.trained_arm(lab, setting, dataset, name, seed)
    moments = MOMENTS if not lab.quick else (1, 2, 4)
    scored = [(point.seconds, point.score) for point in report.curve if point.score is not None]
    best = {f"valid@{t}s": max([0.0, *(score for seconds, score in scored if seconds <= t)]) for t in moments}
    return {
        **harness.measured(system, dataset),
        **best,
        "cost:epochs": float(report.epochs),
        "cost:best_epoch": float(report.best_epoch or report.epochs),
        "cost:training_seconds": report.seconds,
    }


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bars, and both curves."""
    data = next(iter(arms)).split(": ")[0]
    sasrec, bert, alone = (arms[f"{data}: {name}"].metrics for name in ARMS)
    moments = [name for name in sasrec if name.startswith("valid@")]
    failures = [f"BERT4Rec is ahead at {m}" for m in moments if bert[m].mean > sasrec[m].mean]
    middle, end = moments[len(moments) // 2], moments[-1]
    gains = {name: arm[end].mean - arm[middle].mean for name, arm in ((SASREC, sasrec), (BERT, bert))}
    if gains[BERT] <= gains[SASREC]:
        failures.append(f"from {middle} on BERT4Rec gains {gains[BERT]:.4f} and SASRec {gains[SASREC]:.4f}")
    ratio = bert["ndcg@10"].mean / max(alone["ndcg@10"].mean, 1e-9)
    if ratio < GAIN:
        failures.append(f"with the last item hidden alone NDCG@10 is {ratio:.2f} x without")
    curves = "; ".join(
        f"{name} {', '.join(f'{arm[m].mean:.4f}' for m in moments)}" for name, arm in ((SASREC, sasrec), (BERT, bert))
    )
    shown = ", ".join(f"{name} {arms[f'{data}: {name}'].metrics['ndcg@10'].mean:.4f}" for name in ARMS)
    findings = [
        f"Validation at {', '.join(m.removeprefix('valid@') for m in moments)}: {curves}",
        f"NDCG@10 on the test: {shown}",
    ]
    return Judgement("fails" if failures else "holds", ". ".join([*failures, *findings]) + ".")
