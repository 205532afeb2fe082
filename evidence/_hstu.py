"""What the claims about HSTU's retriever share: its arms beside SASRec under the same loss, and how they are judged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import _next_item as harness
from shortlist.evaluation.evidence import Arm, Judgement
from shortlist.layers.hstu import HSTUBlockConfig

RECIPE: dict[str, Any] = {
    "dim": 50,
    "dropout": 0.2,
    "use_fields": False,
    "loss": "sampled_softmax",
    "num_negatives": 128,
    "normalise": True,
    "temperature": 0.05,
}
"""Of the public code: the same width, loss and dropout for every arm."""
FULL_SOFTMAX: dict[str, Any] = {
    **RECIPE,
    "loss": "full_softmax",
    "normalise": False,
    "temperature": 1.0,
}
SASREC, HSTU, WITHOUT_TIME, OWN_TIME = "SASRec, same loss", "HSTU", "HSTU without time bias", "HSTU, event's own time"
SASREC_FULL, HSTU_FULL = "SASRec, full softmax", "HSTU, full softmax"
ARMS = {
    HSTU: harness.NextItemArm(system="hstu", settings=RECIPE),
    SASREC: harness.NextItemArm(system="sasrec", settings=RECIPE),
    WITHOUT_TIME: harness.NextItemArm(system="hstu", settings={**RECIPE, "layers": HSTUBlockConfig(time_bias=False)}),
    OWN_TIME: harness.NextItemArm(system="hstu", settings={**RECIPE, "query_time": "own"}),
    SASREC_FULL: harness.NextItemArm(system="sasrec", settings=FULL_SOFTMAX),
    HSTU_FULL: harness.NextItemArm(system="hstu", settings=FULL_SOFTMAX),
}
FACTOR = 1.05

PROTOCOL = (
    "The time of an event's question is that of the next event, and in the test that of the request, which is the target's: known to an "
    "online system, but it says something of the target where ratings are entered in bursts; hence the two ablations. SASRec reads no time."
)
PUBLISHED: dict[str, dict[str, float]] = {
    "SASRec, same loss (Zhai et al. 2024; epoch not chosen on validation)": {"ndcg@10": 0.1603, "hr@10": 0.2853},
    "HSTU (Zhai et al. 2024; the same)": {"ndcg@10": 0.1720, "hr@10": 0.3097},
    "HSTU-large, 8 blocks (Zhai et al. 2024; the same)": {"ndcg@10": 0.1893, "hr@10": 0.3294},
}


def quick_setting(arms: Mapping[str, harness.NextItemArm] = ARMS) -> harness.Setting:
    """The ten-second form, on the planted walks."""
    return harness.Setting(
        data="walks",
        arms={name: harness.quick(arm) for name, arm in arms.items()},
        seeds=(0,),
        batch_size=64,
        epochs=3,
        patience=6,
        lr=1e-2,
        max_history=20,
        baselines=("popularity", "counts"),
    )


def judge(arms: Mapping[str, Arm], last_epoch: int, published: Mapping[str, float] | None = None) -> Judgement:
    """HSTU at least FACTOR x SASRec, and what time adds.

    Args:
        last_epoch: epochs at most; arms that rose until then are named.
        published: NDCG@10 by name, to state the distance to.
    """
    data = next(iter(arms)).split(": ")[0]
    ndcg = {name.removeprefix(f"{data}: "): arm.metrics["ndcg@10"].mean for name, arm in arms.items()}
    ratio = ndcg[HSTU] / max(ndcg[SASREC], 1e-9)
    ablations = {WITHOUT_TIME: "without the time bias", OWN_TIME: "with each event's own time"}
    shares = [f"{ndcg[n] / max(ndcg[SASREC], 1e-9):.2f} x {how}" for n, how in ablations.items() if n in ndcg]
    lines = [", ".join([f"HSTU is {ratio:.2f} x SASRec under the same loss", *shares])]
    if HSTU_FULL in ndcg:
        beside, itself = (ndcg[HSTU_FULL] / max(ndcg[name], 1e-9) for name in (SASREC_FULL, HSTU))
        lines.append(f"With a full softmax HSTU is {beside:.2f} x SASRec and {itself:.2f} x itself")
    rising = [name for name, arm in arms.items() if 0 < last_epoch <= arm.cost.get("best_epoch", 0)]
    if rising:
        lines.append(f"{', '.join(rising)} still rose at the last epoch")
    lines += [f"{ndcg[HSTU] - value:+.4f} to {name}" for name, value in (published or {}).items()]
    shown = ", ".join(f"{name} {value:.4f}" for name, value in ndcg.items())
    return Judgement("holds" if ratio >= FACTOR else "fails", ". ".join([*lines, f"NDCG@10 on {data}: {shown}"]) + ".")
