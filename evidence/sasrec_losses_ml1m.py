"""SASRec's loss ladder on ML-1M with histories of 100 events and 30 epochs; see sasrec_losses.py for the arms.

`shortlist prove sasrec_losses_ml1m` (wants SHORTLIST_DATA); one seed, resumes where it was stopped. `next_item_ml1m` trains the ends of the
ladder to the end, on 200 events.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import _next_item as harness
import sasrec_losses as ladder
from shortlist.evaluation.evidence import Arm, Judgement, Lab

FACTOR, FULL_SOFTMAX_FLOOR, BCE_RANGE = 1.25, 0.165, (0.11, 0.14)
CLAIM = replace(
    ladder.CLAIM,
    name="sasrec_losses_ml1m",
    data="MovieLens-1M (6,040 users, 3,416 items), users and items with at least 5 events; order exact, times not used",
    protocol=harness.PROTOCOL
    + " The same settings for all losses; BCE and gBCE with 256 negatives learn one offset of all scores, gBCE is also run without it. "
    "Histories of 100 events and at most 30 epochs, so that one seed fits two cores; published runs read 200 and trained longer.",
    bar=f"NDCG@10 of full softmax, sampled softmax and gBCE is at least {FACTOR} x that of BCE with one negative, full softmax "
    f"reaches {FULL_SOFTMAX_FLOOR} and BCE lies within {BCE_RANGE[0]} to {BCE_RANGE[1]}.",
    published={
        "BCE (Klenitskiy & Vasilev 2023)": {"hr@10": 0.2500, "ndcg@10": 0.1341},
        "BCE (Petrov & Macdonald 2023)": {"hr@10": 0.2392, "ndcg@10": 0.1259},
        "gBCE (Petrov & Macdonald 2023)": {"hr@10": 0.3003, "ndcg@10": 0.1726},
        "sampled softmax, cosine / 0.05 (HSTU's baseline, no validation item)": {"hr@10": 0.2853, "ndcg@10": 0.1603},
        "full softmax (Klenitskiy & Vasilev 2023)": {"hr@10": 0.3152, "ndcg@10": 0.1821},
        "BCE, 100 negatives (Kang & McAuley 2018, as recalled)": {"hr@10_of_101": 0.8245, "ndcg@10_of_101": 0.5905},
    },
)
SETTING = replace(
    ladder.SETTING,
    data="ml-1m",
    arms={name: ladder.ARMS[name] for name in ladder.LADDER},
    seeds=(0,),
    batch_size=128,
    epochs=30,
    patience=4,
    validate_every=2,
    max_history=100,
)


def run(lab: Lab) -> None:
    """Baselines, then every loss."""
    harness.run_setting(lab, ladder.QUICK if lab.quick else SETTING)


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bars, and what the ladder found."""
    found = ladder.judge(arms)
    data = next(iter(arms)).split(": ")[0]
    ndcg = {loss: arms[f"{data}: {loss}"].metrics["ndcg@10"].mean for loss in ladder.LADDER}
    bce, full = ndcg[ladder.BCE], ndcg["full softmax"]
    failures = [
        f"{loss} is only {ndcg[loss] / max(bce, 1e-9):.2f} x BCE"
        for loss in ladder.CHALLENGERS
        if ndcg[loss] < FACTOR * bce
    ]
    if full < FULL_SOFTMAX_FLOOR:
        failures.append(f"full softmax reaches {full:.4f}, not {FULL_SOFTMAX_FLOOR}")
    if not BCE_RANGE[0] <= bce <= BCE_RANGE[1]:
        failures.append(f"BCE is at {bce:.4f}, outside {BCE_RANGE[0]} to {BCE_RANGE[1]}")
    return Judgement("fails" if failures else "holds", ". ".join([*failures, found.reason]))
