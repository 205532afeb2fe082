"""Every allocator at five budgets on films, where cheap searches are well below dear ones.

`SHORTLIST_DATA=... shortlist prove budget_ml1m`. About 25 minutes on one core; one seed, resumable.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import _budget as budget
from shortlist.data.datasets import load
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab

CLAIM = Claim(
    name="budget_ml1m",
    systems=("greenflow", "dcaf", "queue-only", "mixture", "fixed", "oracle"),
    claim="On films, where nothing is watched twice, choosing a chain for each request brings more than any mixture of fixed chains at the "
    "same cost, and the default chain's gain for less compute.",
    data="MovieLens-1M: 1,000,209 ratings of 6,040 people on 3,706 films; times are partly interpolated, ratings are not used",
    protocol=f"{budget.PROTOCOL} One seed, for the time it takes. Split by time; films of the history are left out. Worth of a page: "
    "discounted gain of the held-out films on it.",
    bar=budget.BAR,
)
SETTINGS = (
    "data.repeats=no",
    "data.max_requests=12000",
    "allocation.worth=choice",
    'retrieval.systems=["ease", "item-knn", "counts", "popularity"]',
    'retrieval.offers=[{keep=80}, {systems=["counts", "popularity"], keep=80}]',
    "learning.fit_requests=6000",
)


def run(lab: Lab) -> None:
    """All arms."""
    lab.seeds = (0,)
    source = partial(load, "builtin") if lab.quick else partial(load, "ml-1m", lab.data_root)
    config = budget.example(*(() if lab.quick else SETTINGS))
    budget.budgets(lab, source, config, max_requests=3_000)


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The digests' bars."""
    return budget.verdict(arms)
