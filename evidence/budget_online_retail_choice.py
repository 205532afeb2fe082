"""The same shop where every bought item counts alike: how much of the gain comes from money's heavy tail.

`shortlist prove budget_online_retail_choice`; needs no data but the built-in log. About six minutes a seed on one core.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import _budget as budget
from shortlist.data.datasets import load
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab

CLAIM = Claim(
    name="budget_online_retail_choice",
    systems=("greenflow", "dcaf", "queue-only", "mixture", "fixed", "oracle"),
    claim="On a shop's log where every bought item counts alike, choosing a chain for each request brings more than any mixture of fixed "
    "chains at the same cost, and the default chain's gain for less compute.",
    data="UCI Online Retail as shipped: 18,532 baskets of 4,338 customers on 3,665 items, each item worth 1",
    protocol=f"{budget.PROTOCOL} Worth of a page: discounted gain of the held-out basket's items on it.",
    bar=budget.BAR,
)


def run(lab: Lab) -> None:
    """All arms with all seeds."""
    budget.budgets(lab, partial(load, "builtin"), budget.example("allocation.worth=choice"))


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The digests' bars."""
    return budget.verdict(arms)
