"""Rare tastes that lie far back: rankers that search or summarise a long past, beside DIN on the newest events and on all.

`shortlist prove sim_long_history`; needs no data. `sim_long_history_ml1m` asks the same of a real log.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import _long_history as harness
from _long_history import FINE, FULL, HARD, LONG, MIMN_ARM, SDIM_ARM, SEARCHES, SHARP, SHORT, SOFT, TWIN_ARM
from _ranking_lab import Training
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab, Verdict

LENGTH, USERS = 600, (1_500, 300, 1_000)
SDIM_GAP, TWIN_ALIKE = 0.002, 0.9
SHOWN = (SHORT, FULL, *LONG, MIMN_ARM, SHARP, FINE)

CLAIM = Claim(
    name="sim_long_history",
    systems=("sim", "eta", "sdim", "twin", "mimn", "din"),
    claim="Where rare old events matter, every ranker of the whole past is above target attention to the newest 50; learned search is at "
    "least as good as search by a coarse attribute, SDIM is as good as DIN on all events, and TWIN's first stage finds what its "
    "second would have ranked first.",
    data=f"planted: pasts of {LENGTH} events over 1,280 items in 64 kinds on 8 shelves, 24 old events of rare kinds; items are read by "
    "their fields (shelf and kind) alone; 1,500 / 300 / 1,000 users; 10 candidates, liked with chance .9 where the past holds their "
    "kind, else .1, so that no ranker can pass an AUC of about .90",
    protocol="One request per user; users are apart in training, validation and test. Same width, tower, loss (binary cross-entropy), "
    "learning rate and epochs for all; epoch chosen on validation GAUC, test once. Searches hand on 50 events and read the newest 20 "
    "whole. SIM hard compares shelves, which everyday events fill up; extra arms compare the kind, which tells all, and want 6 signs to "
    "agree in SDIM, not 3. MIMN reads the newest 100, for the time it takes. consistency = share of the 50 events that the exact stage "
    "would rank first on the whole past which the search hands to it, 64 test requests.",
    bar="GAUC of every ranker that searches or summarises the whole past above DIN on the newest 50 with every seed; SIM soft at least SIM "
    f"hard on average; SDIM's AUC at most {SDIM_GAP} below DIN's on all events; TWIN's consistency at least {TWIN_ALIKE} and above SIM "
    "hard's",
    published={
        "Taobao, AUC (Cao et al. 2022)": {"DIN long": 0.8848, "DIN short": 0.8627, "SIM hard": 0.8692, "ETA": 0.8753, "SDIM": 0.8854},
        "consistency of 100 (Chang et al. 2023)": {"TWIN": 94.0, "SIM hard": 40.0},
    },
)  # fmt: skip


def run(lab: Lab) -> None:
    """Every arm with every seed; the log is the same for all seeds."""
    length, users = (120, (200, 60, 100)) if lab.quick else (LENGTH, USERS)
    world = harness.planted(num_users=users, length=length)
    training = Training(epochs=1 if lab.quick else 8, batch_size=32, lrs=(2e-2,), patience=8, max_history=length)
    arms = harness.arms(dim=16, max_history=length, recency="gap", coarse="shelf", fine="kind", use_ids=False)
    for seed in lab.seeds:
        for name, arm in arms.items():
            lab.measure(name, seed, partial(harness.measured_arm, arm, world, training, seed))


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bar, part by part: partly where the first part holds and another does not."""
    below = [name for name in LONG if not harness.ordered_in_every_seed(arms[name], arms[SHORT], "gauc")]
    gauc = {name: arm.metrics["gauc"].mean for name, arm in arms.items()}
    gap = arms[FULL].metrics["auc"].mean - arms[SDIM_ARM].metrics["auc"].mean
    alike = {name: arms[name].metrics["consistency"].mean for name in SEARCHES}
    others = []
    if gauc[SOFT] < gauc[HARD]:
        others.append(f"SIM soft is {gauc[HARD] - gauc[SOFT]:.4f} GAUC below SIM hard")
    if gap > SDIM_GAP:
        others.append(f"SDIM is {gap:.4f} AUC below DIN on all events")
    if alike[TWIN_ARM] < TWIN_ALIKE or alike[TWIN_ARM] <= alike[HARD]:
        others.append(f"TWIN's first stage finds only {alike[TWIN_ARM]:.2f} of what its second would rank first")
    verdict: Verdict = "fails" if below else "partly" if others else "holds"
    failures = [f"not above DIN on the newest 50 with every seed: {', '.join(below)}"] if below else []
    told = [
        f"GAUC: {harness.shown(arms, 'gauc', SHOWN)}",
        f"consistency: {harness.shown(arms, 'consistency', SEARCHES)}",
        f"SDIM's AUC less that of DIN on all events: {-gap:+.4f}",
    ]
    return Judgement(verdict, ". ".join([*failures, *others, *told]) + ".")
