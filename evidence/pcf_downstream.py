"""Rankers with and without a history's pair statistics on a planted log: a tower on recent rows, with a table, with PCF-GNN, on all rows.

`shortlist prove pcf_downstream`; needs no data; resumes where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping

from _pair_rates import BAR, DOWNSTREAM, judged_downstream, measure_downstream, planted
from _ranking_lab import Training
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab

FULL = Training(epochs=8, batch_size=1_024, lrs=(1e-3, 3e-3), patience=1, max_history=1)
QUICK = Training(epochs=2, batch_size=256, lrs=(1e-2,), patience=2, max_history=1)

CLAIM = Claim(
    name="pcf_downstream",
    systems=("pcf-gnn", "can", "deepfm"),
    claim="Pair statistics told by a pre-trained network carry a long history into a ranker that trains on recent rows alone, better than "
    "a stored table does.",
    data="Planted: 1,000 users, 500 items, click by biases and an inner product of rank 4, users and items by 1 / place^.8; three windows "
    "of 100,000 impressions each",
    protocol="The first window is the history (H), the second trains (T; its last tenth validates), the third evaluates. The pair is item "
    "and user. " + DOWNSTREAM,
    bar=BAR,
    published={"MovieLens and Alibaba": "PCF-GNN above table and implicit models; no figures in what is public"},
)  # fmt: skip


def run(lab: Lab) -> None:
    """Every arm with every seed."""
    windows = planted(150, 100, 6_000) if lab.quick else planted()
    measure_downstream(lab, windows, QUICK if lab.quick else FULL)


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bar."""
    return judged_downstream(arms)
