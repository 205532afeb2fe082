"""Rankers with and without a history's pair statistics on films: a tower on recent rows, with a table, with PCF-GNN, on all rows.

`shortlist prove pcf_downstream_ml1m` (wants SHORTLIST_DATA); resumes where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping

from _pair_rates import BAR, DOWNSTREAM, film_windows, judged_downstream, measure_downstream
from _ranking_lab import Training
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab

FULL = Training(epochs=8, batch_size=128, lrs=(1e-3, 3e-3), patience=1, max_history=1)
QUICK = Training(epochs=2, batch_size=32, lrs=(1e-2,), patience=2, max_history=1)

CLAIM = Claim(
    name="pcf_downstream_ml1m",
    systems=("pcf-gnn", "can", "deepfm"),
    claim="Pair statistics told by a pre-trained network carry a long history into a ranker that trains on recent rows alone, better than "
    "a stored table does.",
    data="MovieLens-1M, 1,500 users drawn from 6,040, rating of 4 or more against less (labels of nine in ten events are known; exact "
    "order, no times), with age, occupation and genres",
    protocol="Of each user's films, in order, the first half are the history (H), three tenths train (T), a tenth validates, the last "
    "tenth evaluates. Pairs of film with user, age and occupation. " + DOWNSTREAM,
    bar=BAR,
    published={"MovieLens and Alibaba": "PCF-GNN above table and implicit models; no figures in what is public"},
)  # fmt: skip


def run(lab: Lab) -> None:
    """Every arm with every seed."""
    windows = film_windows(lab, 1_500)
    measure_downstream(lab, windows, QUICK if lab.quick else FULL)


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bar."""
    return judged_downstream(arms)
