"""HSTU as a ranker: merged against interleaved tokens, with and without a generative phase, beside DIN and DNN.

`shortlist prove hstu_ranking` (wants SHORTLIST_DATA); resumes where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from _liked import Liked, LikedArm, measured, measured_share, ml1m, planted
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab
from shortlist.layers.hstu import HSTUBlockConfig
from shortlist.layers.scoring import HeadConfig

MERGED, INTERLEAVED = "HSTU, merged", "HSTU, interleaved"
NEXT_FIRST, OUTCOMES_FIRST = "HSTU, merged, next item first", "HSTU, interleaved, outcomes first"
DIN, SHARE = "DIN", "share of likes"
PER_REQUEST, MAX_HISTORY, EQUAL = 10, 50, 0.005

CLAIM = Claim(
    name="hstu_ranking",
    systems=("hstu-ranker", "din", "dnn"),
    claim="HSTU ranks films by outcome better than DIN with the same lessons, and merged tokens do so at two thirds of the cost "
    "of interleaved ones without losing quality.",
    data="MovieLens-1M, liked = a rating of 4 or more, ordered by `pos`, first 80 % of time (later ratings are not all known); 600 users",
    protocol="Each user's order is cut at 70 and 85 %: training, validation, test; what others did later is in training, alike for all "
    "arms. A request offers the ten films that the user rated next, which see the history and not each other, and asks which were "
    "liked. Epoch chosen on validation AUC, test once, the same trainer for all; newest 50 events. HSTU's heads and dropout are the best "
    "on validation of four settings tried with one seed, DIN's settings are its defaults. No time is read, since missing times tell low "
    "ratings here.",
    bar=f"Mean test AUC of the better HSTU trained from candidates alone above DIN's; merged no more than {EQUAL} below interleaved, "
    "with at most 0.65 of its FLOPs per request.",
)  # fmt: skip


def arms(quick: bool) -> dict[str, LikedArm]:
    """By name; the quick form is narrow."""
    dim, epochs = (16, 5) if quick else (32, 6)
    head = HeadConfig(widths=(64,), activation="relu", loss="bce")
    trainer = {"epochs": epochs, "patience": 2, "lr": 3e-3 if quick else 1e-3, "batch_size": 320, "weight_decay": 0.1}
    hstu = {
        "dim": dim,
        "max_history": MAX_HISTORY,
        "layers": HSTUBlockConfig(num_blocks=2, num_heads=4, block_dropout=0.5),
        "dropout": 0.5,
        "head": head,
        "id_dropout": 0.2,
    }
    plain = {"dim": dim, "max_history": MAX_HISTORY, "widths": (64,), "loss": "bce", "id_dropout": 0.2}

    def ranker(**settings: str | int) -> LikedArm:
        return LikedArm(system="hstu-ranker", settings={**hstu, **settings}, trainer=trainer, per_request=PER_REQUEST)

    return {
        MERGED: ranker(tokens="merged", learning="candidates"),
        INTERLEAVED: ranker(tokens="interleaved", learning="candidates"),
        NEXT_FIRST: ranker(tokens="merged", learning="both", generative_epochs=epochs),
        OUTCOMES_FIRST: ranker(tokens="interleaved", learning="both", generative_epochs=2 * epochs),
        DIN: LikedArm(system="din", settings=plain, trainer=trainer, per_request=PER_REQUEST),
        "DNN": LikedArm(system="dnn", settings=plain, trainer=trainer, per_request=PER_REQUEST),
    }


def run(lab: Lab) -> None:
    """The baseline without a user, then every ranker with every seed."""
    world: Liked = planted() if lab.quick else ml1m(lab.data_root, num_users=600)
    lab.measure(SHARE, 0, partial(measured_share, world, PER_REQUEST))
    for seed in lab.seeds:
        for name, arm in arms(lab.quick).items():
            lab.measure(name, seed, partial(measured, lab, world, name, arm, seed, per_request=PER_REQUEST))


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """Quality against DIN; quality and cost of the two layouts."""
    auc = {name: arm.metrics["auc"].mean for name, arm in arms.items()}
    best = max((MERGED, INTERLEAVED), key=lambda name: auc[name])
    work = arms[MERGED].cost["mflop_per_request"] / arms[INTERLEAVED].cost["mflop_per_request"]
    better, cheap = auc[best] > auc[DIN], auc[MERGED] >= auc[INTERLEAVED] - EQUAL and work <= 0.65
    figures = "; ".join(
        f"{name} AUC {auc[name]:.4f}, within users {arm.metrics['gauc'].mean:.4f}"
        + (f", {arm.cost['training_seconds']:.0f} s of training" if "training_seconds" in arm.cost else "")
        for name, arm in arms.items()
    )
    reason = f"Merged costs {work:.2f} of interleaved per request of 50 events and 100 films. Test: {figures}."
    if better != cheap:
        return Judgement("partly", reason)
    return Judgement("holds" if better else "fails", reason)
