"""GIN against DIN and two graphs that say nothing, on purchases of people and items with few of them.

`shortlist prove gin_sparse_beauty` (wants SHORTLIST_DATA); resumes where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping

from _ranking_lab import purchases
from _sparse_clicks import LEAST, PROTOCOL, clears, measure_all, shown
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab, hold_if

DATA = "s3rec-beauty"

CLAIM = Claim(
    name="gin_sparse_beauty",
    systems=("gin", "din"),
    claim="Where clicks are few, reading each click together with its neighbours in the graph of co-clicks ranks better than target "
    "attention alone, and it is the graph that does it, not its parameters.",
    data="Amazon Beauty 5-core (S3-Rec release, days; 22,363 people, 12,101 items, 9 purchases each on average), item ids alone. One "
    "popularity negative per positive",
    protocol="Each user's last day tests, the day before validates, up to two earlier ones train. " + PROTOCOL,
    bar=f"GIN's mean AUC is at least {LEAST} above that of DIN, self-loops and the random graph, and above each with every seed; so "
    "it is where two purchases are read",
    published={"TGIN's paper, Amazon Books and Electronics": "GIN stands in its tables; the figures are not in what is public"},
)  # fmt: skip


def run(lab: Lab) -> None:
    """All arms."""
    root = None if lab.quick else lab.data_root
    measure_all(lab, DATA, purchases(root, DATA, negatives=(0, 1), max_per_user=2))


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bar."""
    return hold_if(clears(arms, DATA), f"{shown(arms, DATA)}.")
