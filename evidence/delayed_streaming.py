"""Ways to learn from conversions that come late, all on one stream: MovieLens-100K in its order, with made delays.

`shortlist prove delayed_streaming` (wants SHORTLIST_DATA); resumes where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from _delayed import ARMS, METRICS, Stream, of_delays, stream, told
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab
from shortlist.metrics.intervals import seed_interval

CLAIM = Claim(
    name="delayed_streaming",
    systems=("defuse", "bi-defuse", "es-dfm", "defer", "fnw", "fnc", "fsiw", "dfm", "vanilla", "label-oracle"),
    claim="DEFUSE closes a large part of the gap between labels as seen after an hour and final labels, and no smaller one than ES-DFM.",
    data="MovieLens-100K: 100,000 ratings in the order of their times, a rating of 5 is a conversion. Labels and features are real; "
    "moments (evenly over 60 days) and delays are simulated: exponential of 20 minutes or of 1 to 20 days, as hidden functions of genres, "
    "age, gender and occupation say",
    protocol="Days 0-30, with conversions known by then: 5 epochs for the ranker and 5 for auxiliary networks. Days 30-60: each window of "
    "6 hours is told by its final outcomes (within 30 days), then the samples emitted in it are learned from once, in their order. A DNN "
    "of 64 and 32 units over user, film and their fields, Adam 0.001, batch 256, observation window an hour, for every rule; nothing is "
    "selected. Metrics are means over windows, weighted by clicks. R = (metric - vanilla) / (oracle - vanilla), by seed; three seeds draw "
    "delays, weights and order",
    bar="R of DEFUSE's NLL above 0.3, and at least that of ES-DFM less 0.02 (means over seeds); the first alone is partly",
    published={
        "ES-DFM's paper, Criteo's conversion log, AUC": {
            "vanilla, duplicates": 0.8376,
            "oracle": 0.8450,
            "DFM": 0.8132,
            "FSIW": 0.8290,
            "FNC": 0.8373,
            "FNW": 0.8373,
            "ES-DFM": 0.8402,
        },
    },
)  # fmt: skip


def run(lab: Lab) -> None:
    """Every rule on every seed's stream."""
    for seed in lab.seeds:
        kept: list[Stream] = []
        lab.measure("the delays", seed, lambda seed=seed, kept=kept: of_delays(_made(lab, seed, kept)))  # type: ignore[misc]
        for arm in ARMS:
            lab.measure(arm, seed, partial(_told, lab, seed, arm, kept))


def _made(lab: Lab, seed: int, kept: list[Stream]) -> Stream:
    """The seed's stream, made when first asked for."""
    if not kept:
        kept.append(stream(lab, seed))
    return kept[0]


def _told(lab: Lab, seed: int, arm: str, kept: list[Stream]) -> dict[str, float]:
    return told(_made(lab, seed, kept), arm, seed, quick=lab.quick)


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bar, and R of every rule."""
    relative = {arm: {metric: _relative(arms, arm, metric) for metric in METRICS} for arm in ARMS if arm not in ENDS}
    mean = {arm: float(np.mean(of["nll"])) for arm, of in relative.items()}
    large, no_smaller = mean["DEFUSE"] > 0.3, mean["DEFUSE"] >= mean["ES-DFM"] - 0.02
    listed = "; ".join(f"{arm} " + ", ".join(_shown(of[metric]) for metric in METRICS) for arm, of in relative.items())
    told = ", ".join(f"{arm} {arms[arm].metrics['calibration'].mean:.2f}" for arm in ARMS)
    gap = {metric: arms["oracle"].metrics[metric].mean - arms["vanilla"].metrics[metric].mean for metric in METRICS}
    paired = np.array(relative["DEFUSE"]["nll"]) - np.array(relative["ES-DFM"]["nll"])
    reason = (
        f"R of AUC, PR-AUC and NLL, mean and spread over seeds: {listed}. Oracle less vanilla: "
        + ", ".join(f"{metric} {value:+.4f}" for metric, value in gap.items())
        + f". DEFUSE less ES-DFM, R of NLL, by seed: {', '.join(f'{d:+.3f}' for d in paired)}. Mean chance told over the share of "
        f"conversions: {told}."
    )
    verdict = "holds" if large and no_smaller else "partly" if large else "fails"
    return Judgement(verdict, reason)  # type: ignore[arg-type]


ENDS = ("vanilla", "oracle")


def _relative(arms: Mapping[str, Arm], arm: str, metric: str) -> tuple[float, ...]:
    """R by seed."""
    low, high = (np.array(arms[end].per_seed[metric]) for end in ENDS)
    return tuple((np.array(arms[arm].per_seed[metric]) - low) / (high - low))


def _shown(values: tuple[float, ...]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f}"
    interval = seed_interval(values)
    return f"{interval.mean:.2f} ({interval.low:.2f} to {interval.high:.2f})"
