"""HSTU's retriever on ML-1M beside its published figures and SASRec under the same loss, with and without the time bias.

`shortlist prove hstu_ml1m` (wants SHORTLIST_DATA); one seed, resumes where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping

import _hstu as shared
import _next_item as harness
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab

SETTING = harness.Setting(
    data="ml-1m",
    arms=shared.ARMS,
    seeds=(0,),
    batch_size=128,
    epochs=100,
    patience=6,
    validate_every=4,
    max_history=200,
)
QUICK = shared.quick_setting()
INDEPENDENT = {"the independent library's HSTU": 0.188, "its 8-block HSTU": 0.216}

CLAIM = Claim(
    name="hstu_ml1m",
    systems=("hstu", "sasrec"),
    claim="Under the same loss HSTU ranks better than SASRec on ML-1M, with its time bias and without.",
    data="MovieLens-1M (6,040 users, 3,416 items), users and items with at least 5 events; the order is exact, 39 % of the times are "
    "interpolated between the user's known neighbours: what the time bias adds here is not what it adds on the original file",
    protocol=f"{harness.PROTOCOL} {shared.PROTOCOL} One seed.",
    bar=f"NDCG@10 of HSTU at least {shared.FACTOR} x SASRec with the same width, loss and dropout; the distance to published figures is "
    "stated",
    published={
        **shared.PUBLISHED,
        "HSTU, an independent library with stable sorting": {"ndcg@10": 0.188},
        "HSTU, 8 blocks, the same library": {"ndcg@10": 0.216},
    },
)


def run(lab: Lab) -> None:
    """Baselines, then every arm."""
    harness.run_setting(lab, QUICK if lab.quick else SETTING)


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bar, the ablations, and the distance to published figures."""
    published = {name: values["ndcg@10"] for name, values in shared.PUBLISHED.items()}
    return shared.judge(arms, SETTING.epochs, {**published, **INDEPENDENT})
