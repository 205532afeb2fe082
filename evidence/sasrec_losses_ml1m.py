"""SASRec's loss ladder on ML-1M, beside the published figures; see sasrec_losses.py for the arms.

`shortlist prove sasrec_losses_ml1m` (wants SHORTLIST_DATA); one seed, resumes where it was stopped.
"""

from __future__ import annotations

from dataclasses import replace

import sasrec_losses as ladder
from shortlist.evaluation.evidence import Lab

CLAIM = replace(
    ladder.CLAIM,
    name="sasrec_losses_ml1m",
    data="MovieLens-1M (6,040 users, 3,416 items), users and items with at least 5 events; order exact, times not used",
    protocol=ladder.PROTOCOL
    + " Histories of 100 events and at most 30 epochs, so that one seed fits two cores; the published runs "
    "read 200 events and trained longer.",
    bar=f"NDCG@10 of full softmax, sampled softmax and gBCE is at least {ladder.FACTOR} x that of BCE with one negative, full softmax "
    f"reaches {ladder.FULL_SOFTMAX_FLOOR} and BCE lies within {ladder.BCE_RANGE[0]} to {ladder.BCE_RANGE[1]}.",
    published={
        "BCE (Klenitskiy & Vasilev 2023)": {"hr@10": 0.2500, "ndcg@10": 0.1341},
        "BCE (Petrov & Macdonald 2023)": {"hr@10": 0.2392, "ndcg@10": 0.1259},
        "gBCE (Petrov & Macdonald 2023)": {"hr@10": 0.3003, "ndcg@10": 0.1726},
        "sampled softmax, cosine / 0.05 (HSTU's baseline, no validation item)": {"hr@10": 0.2853, "ndcg@10": 0.1603},
        "full softmax (Klenitskiy & Vasilev 2023)": {"hr@10": 0.3152, "ndcg@10": 0.1821},
        "BCE, 100 negatives (Kang & McAuley 2018, as recalled)": {"hr@10_of_101": 0.8245, "ndcg@10_of_101": 0.5905},
    },
)
SETTING = ladder.Setting(
    data="ml-1m",
    seeds=(0,),
    batch_size=128,
    epochs=30,
    patience=4,
    validate_every=2,
    max_history=100,
    losses=tuple(ladder.LADDER),
)


def run(lab: Lab) -> None:
    """Baselines, then every loss."""
    ladder.run(lab, SETTING)


judge = ladder.judge
