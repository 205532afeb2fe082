"""GRU4Rec's losses with and without extra negatives, in session-parallel batches on Amazon Beauty.

`shortlist prove gru4rec_losses` (wants SHORTLIST_DATA); one seed, resumes where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import _next_item as harness
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab

LANES, EXTRA = 128, 2_048
LOSSES: dict[str, dict[str, Any]] = {
    "TOP1": {"loss": "top1"},
    "BPR": {"loss": "bpr"},
    "TOP1-max": {"loss": "top1_max"},
    "BPR-max": {"loss": "bpr_max", "elu": 1.0, "score_penalty": 1.0},
    "cross-entropy": {"loss": "sampled_softmax", "log_q": 0.0},
    "cross-entropy, log q": {"loss": "sampled_softmax", "log_q": 1.0},
}
WHOLE = "whole sequences, full softmax"
IN_LANES: dict[str, Any] = {
    "dim": 64,
    "use_fields": False,
    "negatives": "in_batch",
    "popularity_alpha": 0.5,
    "dropout": 0.4,
}


def arms(num_extra: int, losses: Mapping[str, Mapping[str, Any]]) -> dict[str, harness.NextItemArm]:
    """Session-parallel arms with so many extra negatives."""
    return {
        f"{name}, {num_extra:,} extra": harness.NextItemArm(
            system="gru4rec",
            settings={**IN_LANES, "num_negatives": num_extra, **settings},
            trainer={"optimiser": "adagrad", "lr": 0.05, "batch_size": LANES},
            in_lanes=True,
        )
        for name, settings in losses.items()
    }


ARMS = {
    **arms(0, LOSSES),
    **arms(EXTRA, LOSSES),
    WHOLE: harness.NextItemArm(system="gru4rec", settings={"dim": 64, "use_fields": False, "dropout": 0.4}),
}
SETTING = harness.Setting(
    data="s3rec-beauty", arms=ARMS, seeds=(0,), batch_size=128, epochs=8, patience=2, validate_every=2, max_history=50
)
QUICK = harness.Setting(
    data="walks",
    arms={
        name: harness.quick(arm) for name, arm in {**arms(0, LOSSES), **arms(32, LOSSES), WHOLE: ARMS[WHOLE]}.items()
    },
    seeds=(0,),
    batch_size=64,
    epochs=2,
    patience=2,
    lr=1e-2,
    max_history=20,
)
FACTOR, PUBLISHED, BETTER = 1.15, 0.0283, 1.5

CLAIM = Claim(
    name="gru4rec_losses",
    systems=("gru4rec",),
    claim="With many extra negatives BPR-max and cross-entropy rank far better than TOP1 and BPR, which extra negatives do not help; "
    "and GRU4Rec is far better than its published row on Beauty.",
    data="Amazon Beauty, 5-core, as released with S3-Rec (22,363 users, 12,101 items); each user's history is one session, so the task is "
    "not session-like",
    protocol=harness.PROTOCOL
    + f" Session-parallel batches of {LANES} lanes, no gradient into earlier steps, Adagrad 0.05, the same for all losses; negatives are "
    "the other lanes' targets and the stated number of extra items drawn by the root of their count.",
    bar=f"NDCG@10 of BPR-max and of cross-entropy with {EXTRA:,} extra negatives at least {FACTOR} x the better of TOP1 and BPR there; "
    f"TOP1 and BPR gain less than {FACTOR} x from the extra ones; the best HR@10 at least {BETTER} x the published {PUBLISHED}.",
    published={"GRU4Rec in the S3-Rec paper's table": {"hr@10": PUBLISHED}},
)


def run(lab: Lab) -> None:
    """Baselines, then every arm."""
    harness.run_setting(lab, QUICK if lab.quick else SETTING)


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bars, and every arm's figure."""
    data = next(iter(arms)).split(": ")[0]
    mine = {name.removeprefix(f"{data}: "): arm for name, arm in arms.items()}
    ndcg = {name: arm.metrics["ndcg@10"].mean for name, arm in mine.items()}
    few, many = (
        next(n for n in ndcg if n.startswith("TOP1, ") and n.startswith("TOP1, 0") == zero) for zero in (True, False)
    )
    few, many = few.removeprefix("TOP1, "), many.removeprefix("TOP1, ")
    plain = max(ndcg[f"TOP1, {many}"], ndcg[f"BPR, {many}"], 1e-9)
    softmax = max(ndcg[f"cross-entropy, {many}"], ndcg[f"cross-entropy, log q, {many}"])
    failures = [
        f"{name} with {many} is {value / plain:.2f} x the better of TOP1 and BPR"
        for name, value in (("BPR-max", ndcg[f"BPR-max, {many}"]), ("cross-entropy", softmax))
        if value < FACTOR * plain
    ]
    for name in ("TOP1", "BPR"):
        gain = ndcg[f"{name}, {many}"] / max(ndcg[f"{name}, {few}"], 1e-9)
        if gain >= FACTOR:
            failures.append(f"{name} gains {gain:.2f} x from extra negatives")
    best = max((name for name in mine if name in ARMS or "extra" in name), key=lambda n: mine[n].metrics["hr@10"].mean)
    reached = mine[best].metrics["hr@10"].mean
    if reached < BETTER * PUBLISHED:
        failures.append(f"the best HR@10 is {reached:.4f} ({best})")
    shown = ", ".join(f"{name} {value:.4f}" for name, value in ndcg.items())
    return Judgement("fails" if failures else "holds", ". ".join([*failures, f"NDCG@10 on {data}: {shown}"]) + ".")
