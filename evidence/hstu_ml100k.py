"""HSTU's retriever against SASRec under the same loss on ML-100K, whose times are real, and what its time bias adds.

`shortlist prove hstu_ml100k` (wants SHORTLIST_DATA); three seeds, resumes where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping

import _hstu as shared
import _next_item as harness
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab

SETTING = harness.Setting(data="ml-100k", arms=shared.ARMS, seeds=(0, 1, 2), batch_size=32, epochs=60, patience=10)
QUICK = shared.quick_setting()

CLAIM = Claim(
    name="hstu_ml100k",
    systems=("hstu", "sasrec"),
    claim="Under the same loss HSTU ranks better than SASRec; part of the gain is the time of the request, which SASRec does not read.",
    data="MovieLens-100K (943 users, 1,349 items), users and items with at least 5 events; real times, ratings entered in bursts",
    protocol=f"{harness.PROTOCOL} {shared.PROTOCOL}",
    bar=f"NDCG@10 of HSTU at least {shared.FACTOR} x SASRec with the same width, loss and dropout (the public recipe's), mean of three "
    "seeds; a full softmax for both stands beside",
)


def run(lab: Lab) -> None:
    """Baselines, then every arm."""
    harness.run_setting(lab, QUICK if lab.quick else SETTING)


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bar, and the ablations."""
    return shared.judge(arms, SETTING.epochs)
