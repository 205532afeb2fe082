"""Generative training of HSTU: one sequence per user teaches as much as one row per impression, for a small part of the time.

`shortlist prove hstu_generative` (wants SHORTLIST_DATA); resumes where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from _liked import Liked, LikedArm, measured, measured_share, ml1m, planted
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab
from shortlist.layers.hstu import HSTUBlockConfig
from shortlist.layers.scoring import HeadConfig

SEQUENCES, ROWS = "HSTU, one sequence per user", "HSTU, one row per impression"
SHARE = "share of likes"
EQUAL, FASTER = 0.01, 10.0
MAX_HISTORY = 70
ID_DROPOUT = 0.2
"""For all arms: the films are many and the lessons few, so fields must carry their part."""

CLAIM = Claim(
    name="hstu_generative",
    systems=("hstu-ranker", "din", "dnn"),
    claim="HSTU learns outcomes from one sequence per user, all positions at once, as well as from one row per impression, in a tenth of "
    "the training time or less.",
    data="MovieLens-1M, liked = a rating of 4 or more, ordered by `pos`, first 80 % of time (later ratings are not all known); 1,000 users "
    "with 20 to 100 such events",
    protocol="Each user's order is cut at 70 and 85 %: training, validation, test; what others did later is in training, alike for all "
    "arms. Every event is an impression with the events before it; it is asked whether the film was liked. Epoch chosen on validation "
    "AUC, test once; the same model and settings for both ways, steps of about the same number of examples. One sequence holds all of "
    "a user's training events. No time is read, since missing times tell low ratings here.",
    bar=f"Mean validation AUC of sequences no more than {EQUAL} below that of rows, and training at least {FASTER:.0f} times as fast per "
    "epoch. DIN, DNN and the films' share of likes in the same run, for comparison alone.",
)  # fmt: skip


def arms(quick: bool) -> dict[str, LikedArm]:
    """By name; the quick form is narrow."""
    dim, epochs, patience = (16, 6, 6) if quick else (32, 6, 2)
    head = HeadConfig(widths=(64,), activation="relu", loss="bce")
    trainer: dict[str, float | int] = {
        "weight_decay": 0.1,
        "epochs": epochs,
        "patience": patience,
        "lr": 3e-3 if quick else 1e-3,
        "batch_size": 128 if quick else 256,
    }
    hstu = {
        "dim": dim,
        "tokens": "interleaved",
        "max_history": MAX_HISTORY,
        "layers": HSTUBlockConfig(num_blocks=2, num_heads=4, block_dropout=0.5),
        "dropout": 0.5,
        "id_dropout": ID_DROPOUT,
        "head": head,
    }
    plain = {"dim": dim, "max_history": MAX_HISTORY, "widths": (64,), "loss": "bce", "id_dropout": ID_DROPOUT}
    # An epoch of sequences costs little: it may take as many as it wants.
    sequences = trainer | {"epochs": 4 * epochs, "validate_every": 2, "patience": patience + 1}
    return {
        SEQUENCES: LikedArm(system="hstu-ranker", settings={**hstu, "learning": "generative"}, trainer=sequences),
        ROWS: LikedArm(system="hstu-ranker", settings={**hstu, "learning": "candidates"}, trainer=trainer),
        "DIN": LikedArm(system="din", settings=plain, trainer=trainer),
        "DNN": LikedArm(system="dnn", settings=plain, trainer=trainer),
    }


def run(lab: Lab) -> None:
    """The baseline without a user, then every ranker with every seed."""
    world: Liked = planted() if lab.quick else ml1m(lab.data_root, num_users=1_000, most_events=100)
    lab.measure(SHARE, 0, partial(measured_share, world, 1))
    for seed in lab.seeds:
        for name, arm in arms(lab.quick).items():
            lab.measure(name, seed, partial(measured, lab, world, name, arm, seed, per_request=1))


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """Equal quality and a tenth of the time."""
    one, other = arms[SEQUENCES], arms[ROWS]
    gap = one.metrics["validation_auc"].mean - other.metrics["validation_auc"].mean
    per_epoch = [arm.cost["training_seconds"] / arm.cost["epochs"] for arm in (other, one)]
    faster = per_epoch[0] / per_epoch[1]
    tests = ", ".join(f"{name} {arm.metrics['auc'].mean:.4f}" for name, arm in arms.items())
    reason = (
        f"Validation AUC {one.metrics['validation_auc'].mean:.4f} from sequences and {other.metrics['validation_auc'].mean:.4f} from rows "
        f"(difference {gap:+.4f}); an epoch takes {per_epoch[1]:.1f} s and {per_epoch[0]:.1f} s ({faster:.0f} x, validation apart), the "
        f"whole training with the first seed {one.cost['training_seconds']:.0f} s and {other.cost['training_seconds']:.0f} s. "
        f"Test AUC: {tests}."
    )
    verdicts = {True: "holds", False: "fails"}
    equal, fast = gap >= -EQUAL, faster >= FASTER
    return Judgement("partly" if equal != fast else verdicts[equal], reason)  # type: ignore[arg-type]
