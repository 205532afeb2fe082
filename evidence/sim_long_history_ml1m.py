"""Rankers of long pasts on ML-1M: whether a film will be liked, read with up to 600 films rated before, beside DIN on 50 and on all.

`shortlist prove sim_long_history_ml1m` (wants SHORTLIST_DATA).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import _long_history as harness
from _long_history import FULL, HARD, LONG, MIMN_ARM, SHORT, SOFT
from _ranking_lab import Training, films, judged, like_rate, popularity
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab, Verdict

LEAST, MOST = 200, {"train": 3_000, "valid": 800, "test": 2_500}
MAX_HISTORY = 600
TOLERANCE = 0.002

CLAIM = Claim(
    name="sim_long_history_ml1m",
    systems=("sim", "eta", "sdim", "twin", "mimn", "din"),
    claim="On films, where genres overlap and tastes are broad, reading the whole past does not lose against the newest 50 events.",
    data="MovieLens-1M in its exact order, no times read; liked = rating of 4 or 5 where known (.92 of the ratings), read as the action of "
    "past events; requests with at least 200 rated films before: 3,000 for training, 800 for validation, 2,500 for testing, drawn at "
    "random; the label is known alike often for all parts of a past but the last tenth",
    protocol="8 consecutive films of a user are one request; a user's first eighty percent train, the next ten validate, the last ten "
    "test. Same width, tower, loss (binary cross-entropy), learning rate and epochs for all; epoch chosen on validation GAUC, test once. "
    "Searches hand on 50 events and read the newest 20 whole; SIM hard compares a film's first genre; MIMN reads the newest 100.",
    bar=f"mean GAUC of every ranker that reads the whole past at most {TOLERANCE} below DIN on the newest 50, and of at least one above it "
    "with every seed",
    published={
        "Taobao, AUC (Qi et al. 2020)": {"DIN short": 0.9214, "mean long": 0.9281, "MIMN": 0.9278, "SIM hard": 0.9332, "SIM soft": 0.9416},
    },
)  # fmt: skip


def run(lab: Lab) -> None:
    """Baselines without a past, then every arm with every seed."""
    world = films(None) if lab.quick else films(lab.data_root)
    most = dict.fromkeys(MOST, 100) if lab.quick else MOST
    world = harness.long_pasts(world, least=10 if lab.quick else LEAST, most=most)
    for name, score in (("popularity", popularity), ("share of likes", like_rate)):
        lab.measure(name, 0, lambda score=score: judged(score(world, world.test), world.test))  # type: ignore[misc]
    length = 40 if lab.quick else MAX_HISTORY
    training = Training(epochs=1 if lab.quick else 5, batch_size=32, lrs=(5e-3,), patience=2, max_history=length)
    arms = harness.arms(dim=16, max_history=length, recency="position", coarse="attributes")
    for seed in lab.seeds:
        for name, arm in arms.items():
            lab.measure(name, seed, partial(harness.measured_arm, arm, world, training, seed))


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bar."""
    gauc = {name: arm.metrics["gauc"].mean for name, arm in arms.items()}
    long = (FULL, *LONG)
    below = [name for name in long if gauc[name] < gauc[SHORT] - TOLERANCE]
    above = [name for name in long if harness.ordered_in_every_seed(arms[name], arms[SHORT], "gauc")]
    verdict: Verdict = "holds" if above and not below else "partly" if above else "fails"
    failures = [f"{name} is {gauc[SHORT] - gauc[name]:.4f} GAUC below DIN on the newest 50" for name in below]
    told = [
        f"above DIN on the newest 50 with every seed: {', '.join(above) or 'none'}",
        f"GAUC: {harness.shown(arms, 'gauc', ('popularity', 'share of likes', SHORT, *long, MIMN_ARM))}",
        f"SIM soft less SIM hard: {gauc[SOFT] - gauc[HARD]:+.4f}",
    ]
    return Judgement(verdict, ". ".join([*failures, *told]) + ".")
