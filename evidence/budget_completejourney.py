"""Every allocator at five budgets on a year of groceries, valued in money.

`SHORTLIST_DATA=... shortlist prove budget_completejourney`. About 25 minutes on one core; one seed, resumable.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import _budget as budget
from shortlist.data.datasets import load
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab

CLAIM = Claim(
    name="budget_completejourney",
    systems=("greenflow", "dcaf", "queue-only", "mixture", "fixed", "oracle"),
    claim="On a grocer's log valued in money, choosing a chain for each request brings more than any mixture of fixed chains at the same "
    "cost, and the default chain's money for less compute.",
    data="The Complete Journey: 155,848 baskets of 2,469 households, items bought 20 times or more, with money",
    protocol=f"{budget.PROTOCOL} One seed, for the time it takes. Worth of a page: money of the held-out basket's items on it. "
    "EASE is left out of the searches: its matrix is the square of the catalogue.",
    bar=budget.BAR,
)
SETTINGS = (
    "data.kcore=20",
    'retrieval.systems=["personal-frequency", "item-knn", "lately", "popularity"]',
    "learning.fit_requests=8000",
)


def run(lab: Lab) -> None:
    """All arms."""
    lab.seeds = (0,)
    source = partial(load, "builtin") if lab.quick else partial(load, "completejourney", lab.data_root)
    config = budget.example(*(SETTINGS[1:2] if lab.quick else SETTINGS))
    budget.budgets(lab, source, config, max_requests=3_000)


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The digests' bars."""
    return budget.verdict(arms)
