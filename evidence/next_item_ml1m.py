"""Next-item systems on ML-1M beside their published figures: SASRec by its losses, BERT4Rec and GRU4Rec, in one harness.

`shortlist prove next_item_ml1m` (wants SHORTLIST_DATA); one seed, resumes where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping

import _next_item as harness
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab

SASREC = {"dim": 64, "dropout": 0.2, "use_fields": False}
ARMS = {
    "SASRec, full softmax": harness.NextItemArm(system="sasrec", settings={**SASREC, "loss": "full_softmax"}),
    "SASRec, gBCE, 256 negatives": harness.NextItemArm(
        system="sasrec", settings={**SASREC, "loss": "gbce", "num_negatives": 256, "gbce_t": 0.75}
    ),
    "SASRec, BCE, 1 negative": harness.NextItemArm(system="sasrec", settings={**SASREC, "loss": "bce"}),
    **harness.MASKED_AND_RECURRENT,
}
SETTING = harness.Setting(
    data="ml-1m", arms=ARMS, seeds=(0,), batch_size=128, epochs=120, patience=6, validate_every=2, max_history=200
)
QUICK = harness.Setting(
    data="walks",
    arms={name: harness.quick(arm) for name, arm in ARMS.items()},
    seeds=(0,),
    batch_size=64,
    epochs=6,
    patience=6,
    lr=1e-2,
    max_history=20,
)
BARS = {"SASRec, full softmax": 0.182, "BERT4Rec": 0.158}
FACTOR = 1.25

CLAIM = Claim(
    name="next_item_ml1m",
    systems=("sasrec", "bert4rec", "gru4rec"),
    claim="In one harness SASRec with a full softmax and BERT4Rec reach their best published figures on ML-1M, and the loss decides: "
    "full softmax and gBCE lift the same SASRec far above its original loss.",
    data="MovieLens-1M (6,040 users, 3,416 items), users and items with at least 5 events; order exact, times not used",
    protocol=harness.PROTOCOL,
    bar=f"NDCG@10 of SASRec with full softmax at least {BARS['SASRec, full softmax']}, of BERT4Rec at least {BARS['BERT4Rec']}; full "
    f"softmax and gBCE at least {FACTOR} x BCE with one negative.",
    published={
        "SASRec, BCE (Klenitskiy & Vasilev 2023)": {"hr@10": 0.2500, "ndcg@10": 0.1341},
        "SASRec, BCE (Petrov & Macdonald 2023)": {"hr@10": 0.2392, "ndcg@10": 0.1259},
        "SASRec, gBCE (Petrov & Macdonald 2023)": {"hr@10": 0.3003, "ndcg@10": 0.1726},
        "SASRec, full softmax (Klenitskiy & Vasilev 2023)": {"hr@10": 0.3152, "ndcg@10": 0.1821},
        "BERT4Rec (Klenitskiy & Vasilev 2023)": {"hr@10": 0.2843, "ndcg@10": 0.1537},
        "SASRec, BCE, 100 negatives (Kang & McAuley 2018, as recalled)": {
            "hr@10_of_101": 0.8245,
            "ndcg@10_of_101": 0.5905,
        },
    },
)


def run(lab: Lab) -> None:
    """Baselines, then every arm."""
    harness.run_setting(lab, QUICK if lab.quick else SETTING)


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bars, and what each arm reached."""
    data = next(iter(arms)).split(": ")[0]
    ndcg = {name.removeprefix(f"{data}: "): arm.metrics["ndcg@10"].mean for name, arm in arms.items()}
    failures = [f"{name} reaches {ndcg[name]:.4f}, not {bar}" for name, bar in BARS.items() if ndcg[name] < bar]
    bce = max(ndcg["SASRec, BCE, 1 negative"], 1e-9)
    for name in ("SASRec, full softmax", "SASRec, gBCE, 256 negatives"):
        if ndcg[name] < FACTOR * bce:
            failures.append(f"{name} is only {ndcg[name] / bce:.2f} x BCE")
    rising = [
        name
        for name, arm in arms.items()
        if 0 < arm.cost.get("epochs", 0) < arm.cost.get("best_epoch", 0) + 2 and arm.cost["epochs"] >= SETTING.epochs
    ]
    reasons = [f"{', '.join(rising)} still rose at the last epoch"] if rising else []
    shown = ", ".join(f"{name} {value:.4f}" for name, value in ndcg.items())
    return Judgement(
        "fails" if failures else "holds", ". ".join([*failures, *reasons, f"NDCG@10 on {data}: {shown}"]) + "."
    )
