"""Every allocator at five budgets on a year of a real shop, valued in money.

`shortlist prove budget_online_retail`; needs no data but the built-in log. About six minutes a seed on one core.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import _budget as budget
from shortlist.data.datasets import load
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab

CLAIM = Claim(
    name="budget_online_retail",
    systems=("greenflow", "dcaf", "queue-only", "mixture", "fixed", "oracle"),
    claim="On a shop's log valued in money, choosing a chain for each request brings more than any mixture of fixed chains at the same "
    "cost, and the default chain's money for less compute.",
    data="UCI Online Retail as shipped: 18,532 baskets of 4,338 customers on 3,665 items, with money",
    protocol=f"{budget.PROTOCOL} Worth of a page: money of the held-out basket's items on it.",
    bar=budget.BAR,
    published={
        "GreenFlow (Lu et al. 2023)": "compute -41 % at equal revenue, online",
        "DCAF (Jiang et al. 2020)": "cost -49 % at equal eCPM, replay",
    },
)


def run(lab: Lab) -> None:
    """All arms with all seeds."""
    budget.budgets(lab, partial(load, "builtin"), budget.example())


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The digests' bars."""
    return budget.verdict(arms)
