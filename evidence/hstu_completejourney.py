"""HSTU's retriever against SASRec under the same loss on a year of groceries with real times: the next basket.

`shortlist prove hstu_completejourney` (wants SHORTLIST_DATA); one seed, resumes where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping

import _hstu as shared
import _next_item as harness
from shortlist.data.splits import DataConfig
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab
from shortlist.layers.hstu import HSTUBlockConfig

SPLIT = DataConfig(
    protocol="time",
    fit_share=0.02,
    valid_share=0.05,
    test_share=0.10,
    requests_per_user="first",
    max_requests=2_000,
    kcore=50,
)
LOSS = {**shared.FULL_SOFTMAX, "dim": 64}
ARMS = {
    shared.HSTU: harness.NextItemArm(system="hstu", settings=LOSS),
    shared.SASREC: harness.NextItemArm(system="sasrec", settings=LOSS),
    shared.WITHOUT_TIME: harness.NextItemArm(
        system="hstu", settings={**LOSS, "layers": HSTUBlockConfig(time_bias=False)}
    ),
}
SETTING = harness.Setting(
    data="completejourney",
    arms=ARMS,
    seeds=(0,),
    batch_size=32,
    epochs=60,
    patience=3,
    validate_every=4,
    max_history=200,
    lr=3e-3,
    split=SPLIT,
    baselines=("popularity", "personal-frequency"),
    sampled=False,
)
QUICK = shared.quick_setting(ARMS)

CLAIM = Claim(
    name="hstu_completejourney",
    systems=("hstu", "sasrec", "personal-frequency"),
    claim="On groceries with real times HSTU ranks the next basket better than SASRec under the same loss, a full softmax.",
    data="Complete Journey (2,469 households, a year), products and households with at least 50 lines (6,322 products); a basket is one "
    "group, its order is not read; repeat purchases are the norm, so what a household often buys is the baseline to beat",
    protocol="Split by time: the last 10 % of lines are the test window, 5 % before it the validation window; of each household the "
    "first basket in a window is the request, 2,000 at most; full ranking, seen items stay in. Epoch chosen on validation NDCG@10, test "
    f"once. {shared.PROTOCOL}",
    bar=f"NDCG@10 of HSTU at least {shared.FACTOR} x SASRec with the same width, loss and dropout, one seed",
)


def run(lab: Lab) -> None:
    """Baselines, then every arm."""
    harness.run_setting(lab, QUICK if lab.quick else SETTING)


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bar, and the ablations."""
    return shared.judge(arms, SETTING.epochs)
