"""PCF-GNN's statistics alone against stored tables on films that a user has not rated yet, by user, age and occupation.

`shortlist prove pcf_unseen_pairs_ml1m` (wants SHORTLIST_DATA).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from _pair_rates import FILM_PAIRS, film_windows, measured_alone, seen_in_history
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab, hold_if

PAIR = "item*user"
ARMS: dict[str, dict[str, Any]] = {"K = 0": {"num_layers": 0}, "K = 1": {"num_layers": 1}}
LEAST, ISSUE = 0.60, 0.70

CLAIM = Claim(
    name="pcf_unseen_pairs_ml1m",
    systems=("pcf-gnn",),
    claim="A network over the graph of users, their groups and films tells whether a film will be liked by someone who has not seen it, of "
    "which a stored table of pairs knows nothing.",
    data="MovieLens-1M, 2,000 users drawn from 6,040, rating of 4 or more against less (labels of nine in ten events are known; exact "
    "order, no times); age and occupation of users",
    protocol="Of each user's films, in order, the first half are the history (H), three tenths training (T), a tenth chooses L2 (0 or "
    ".001), the last tenth evaluates. Pairs of film with user, age and occupation; AUC of each pair's p alone. A user rates a film once, "
    "so that no pair of film and user was seen. One network for the three relations, 16 dimensions, 12 epochs, weight n",
    bar=f"For film and user K = 1 reaches {ISSUE:.2f} with every seed where the table has .50 (partly: {LEAST:.2f}), its mean is at least "
    "that of K = 0",
    published={"MovieLens": "better AUC than table and implicit models; variant, split and figures are not in what is public"},
)  # fmt: skip


def run(lab: Lab) -> None:
    """The table, then the network with and without its layer."""
    windows = film_windows(lab, 2_000)
    seen_tP = seen_in_history(windows)
    lab.measure("table", 0, lambda: measured_alone(windows, seen_tP, 0, (0.0,), statistic="table"))
    for seed in lab.seeds:
        for name, settings in ARMS.items():
            lab.measure(name, seed, lambda s=settings, seed=seed: measured_alone(windows, seen_tP, seed, **s))  # type: ignore[misc]


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bar, and the other pairs beside."""
    mean = {name: {m: i.mean for m, i in arm.metrics.items()} for name, arm in arms.items()}
    reached = np.array(arms["K = 1"].per_seed[f"{PAIR}, unseen"])
    shown = "; ".join(
        f"{pair}: " + ", ".join(f"{name} {found[pair]:.4f}" for name, found in mean.items()) for pair in FILM_PAIRS
    )
    reason = (
        f"AUC of p alone: {shown}. Film and user, unseen: "
        + ", ".join(f"{name} {found[f'{PAIR}, unseen']:.4f}" for name, found in mean.items())
        + f"; bytes {mean['K = 1']['bytes']:,.0f} against {mean['table']['bytes']:,.0f}."
    )
    knows_nothing = abs(mean["table"][f"{PAIR}, unseen"] - 0.5) < 1e-9
    better = mean["K = 1"][f"{PAIR}, unseen"] >= mean["K = 0"][f"{PAIR}, unseen"]
    if knows_nothing and (reached >= LEAST).all() and not (better and (reached >= ISSUE).all()):
        return Judgement("partly", reason)
    return hold_if(knows_nothing and better and bool((reached >= ISSUE).all()), reason)
