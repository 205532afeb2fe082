"""VISTA against full target attention where tastes lie far back in long histories, and what the reconstruction loss is good for.

`shortlist prove vista_planted`; arms and protocol of `vista_auc`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial

from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab
from vista_auc import BAR, FULL, PLAIN, PROTOCOL, RECENT, SUMMARY, measure, planted
from vista_auc import judge as judge_auc

CLAIM = Claim(
    name="vista_planted",
    systems=("vista", "din"),
    claim="Where a person's tastes are spread over hundreds of events, thirty-two summary tokens keep what attention over all of them "
    "finds and the newest 50 events do not hold.",
    data="Planted: 800 users with 600 events over 60 topics of 5 items; four tastes at a time, one of which changes every 240 events; a "
    "run of 60 events shows one of them, so 50 events seldom show two. Likes at 85 % to taste, at 15 % else. 24 events are a day",
    protocol=f"{PROTOCOL} probe: whether a ridge regression tells from the summary which topics fill 5 % of the history.",
    bar=BAR,
)


def run(lab: Lab) -> None:
    """Every arm."""
    make = cache(partial(planted, 100, 200, 2) if lab.quick else partial(planted, 800, 600, 8))
    measure(lab, make, (FULL, SUMMARY, PLAIN, RECENT))


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """As for `vista_auc`."""
    return judge_auc(arms)
