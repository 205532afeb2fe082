"""What the claims about budgets share: one trained cascade, its chains replayed, and every allocator at five budgets.

    budgets(lab, log, config)     trains, calibrates, judges the test window once per seed, and measures every arm
    verdict(arms, ...)            the bar of GreenFlow and DCAF, part by part

Allocators explore nothing and keep no floor here: both cost what they cost, and the arms should differ in the choice alone.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shortlist.cascade.build import train_cascade
from shortlist.cascade.config import RunConfig
from shortlist.cascade.run import load_run
from shortlist.data.dataset import build_dataset
from shortlist.data.log import EventLog
from shortlist.evaluation.budget import judge_budgets
from shortlist.evaluation.evidence import Arm, Judgement, Lab, Verdict
from shortlist.evaluation.frontier import ARMS, STEPS
from shortlist.evaluation.runs import is_run
from shortlist.metrics import Interval

PLAIN = {
    "dcaf": {"explore": 0.0, "floor": 0.0},
    "queue-only": {"explore": 0.0, "floor": 0.0},
    "greenflow": {"explore": 0.0, "floor": 0.0},
}
MIDDLE = STEPS[len(STEPS) // 2]
QUICK = (
    "learning.fit_requests=200",
    "learning.slices=1",
    "trainer.epochs=1",
    "data.max_requests=400",
    "allocation.max_requests=200",
)
EXAMPLE = Path(__file__).parent.parent / "examples" / "budget.toml"

PROTOCOL = (
    "One cascade per seed with 27 chains (three searches, three pre-ranking counts, three rankers), trained as usual; 30 % of the log are "
    "for calibration. Chains are timed on this machine and replayed on the validation window; allocators learn on its first part and are "
    "aimed on later requests of other people; the test window is replayed once. Five budgets from 10 to 90 % of the way from the cheapest "
    "chain to the dearest that is worth keeping. `gain` is worth minus that of the best random mixture of fixed chains at the cost the arm "
    "really had, request by request, intervals over people. No exploration, no floor."
)


def example(*settings: str) -> RunConfig:
    """The cascade of examples/budget.toml with some settings changed, and more requests to calibrate on."""
    return RunConfig.from_toml(EXAMPLE).override("data.fit_share=0.3", "data.valid_share=0.3", *settings)


def budgets(lab: Lab, load: Callable[[], EventLog], config: RunConfig, *, max_requests: int = 4_000) -> None:
    """Every arm with every seed."""
    quick = QUICK if lab.quick else ()
    with tempfile.TemporaryDirectory() as temporary:
        place = lab.scratch or Path(temporary)
        for seed in lab.seeds:
            one = partial(
                judged,
                load,
                config.override(*quick, f"trainer.seed={seed}"),
                place / f"seed-{seed}",
                seed,
                max_requests,
            )
            for arm in ARMS:
                lab.measure(arm, seed, partial(figures_of, one, arm))


def judged(
    load: Callable[[], EventLog], config: RunConfig, folder: Path, seed: int, max_requests: int
) -> dict[str, Any]:
    """The frontier of one seed; made once and kept beside its run."""
    kept = folder.with_name(f"{folder.name}.json")
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text())
        return found
    if not is_run(folder):
        train_cascade(build_dataset(load(), config.data_settings), config, folder, progress=False)
    run = replace(load_run(folder), config=config)
    report = judge_budgets(run, window="test", settings=PLAIN, max_requests=max_requests, seed=seed)
    found = report.frontier.as_dict() | {"agreement": dict(report.calibration.costs.agreement)}
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(found))
    return found


def figures_of(one: Callable[[], Mapping[str, Any]], arm: str) -> dict[str, float | Interval]:
    """The metrics of one arm: at each step of the budget, and what it saves at the default chain's worth."""
    found = one()
    metrics: dict[str, float | Interval] = {}
    points = [point for point in found["points"] if point["arm"] == arm]
    for step, point in zip(STEPS, points, strict=True):
        gain = point["gain"]
        metrics[f"worth@{step}"] = Interval(**point["worth"])
        metrics[f"gain@{step}"] = Interval(gain["difference"], gain["low"], gain["high"])
        metrics[f"relative gain@{step}"] = gain["difference"] / max(point["mixture_at_that_cost"], 1e-12)
        metrics[f"ms@{step}"], metrics[f"mflop@{step}"] = point["ms"], point["mflop"]
        if point["of_oracle"] is not None:
            metrics[f"of oracle@{step}"] = point["of_oracle"]
    for resource in ("ms", "mflop"):
        saving = found["savings"][resource].get(arm)
        metrics[f"saving {resource}"] = float("nan") if saving is None else saving
    return metrics


def verdict(arms: Mapping[str, Arm]) -> Judgement:
    """The bar of the digests at the middle budget: GreenFlow's, and DCAF's beside it."""
    green, dcaf = arms["greenflow"], arms["dcaf"]
    gain = green.metrics[f"gain@{MIDDLE}"]
    relative = mean(green, f"relative gain@{MIDDLE}")
    of_oracle, dcaf_of_oracle = mean(green, f"of oracle@{MIDDLE}"), mean(dcaf, f"of oracle@{MIDDLE}")
    saving = {resource: mean(green, f"saving {resource}") for resource in ("ms", "mflop")}
    above = sum(mean(green, f"worth@{step}") > mean(dcaf, f"worth@{step}") for step in STEPS)
    parts = {
        f"{relative:+.1%} above the mixture at its cost ({gain.low:+.4f} to {gain.high:+.4f})": relative >= 0.01
        and gain.low > 0,
        f"{saved(saving['ms'], 'milliseconds')} and {saved(saving['mflop'], 'FLOPs')}": all(
            share >= 0.2 for share in saving.values()
        ),
        f"above DCAF at {above} of {len(STEPS)} budgets": above >= 3,
        f"{of_oracle:.0%} of the oracle's gain": of_oracle >= 0.3,
        f"DCAF: {saved(mean(dcaf, 'saving ms'), 'milliseconds')}": mean(dcaf, "saving ms") >= 0.2,
        f"DCAF has {dcaf_of_oracle:.0%} of the oracle's gain": dcaf_of_oracle >= 0.4,
    }
    first, second, *others = parts.values()
    held = (first or second) and all(others)
    outcome: Verdict = "holds" if held else "partly" if any(parts.values()) else "fails"
    told = "; ".join(f"{words} ({'yes' if ok else 'no'})" for words, ok in parts.items())
    return Judgement(outcome, f"At the middle budget GreenFlow is {told}.")


def saved(share: float, what: str) -> str:
    """What an arm needs less than the default chain for its worth, in words."""
    if np.isnan(share):
        return f"below the default chain's worth at every budget of some seed, so no {what} are saved"
    return f"needs {share:.0%} fewer {what} than the default chain for its worth"


def mean(arm: Arm, metric: str) -> float:
    """Of an arm's metric; NaN where it has none."""
    found = arm.metrics.get(metric)
    return float("nan") if found is None else float(np.float64(found.mean))


BAR = (
    "GreenFlow at the middle budget: worth at least 1 % above the best random mixture of fixed chains at the same cost with an interval "
    "above 0, or the default chain's worth for at most 80 % of its milliseconds and of its FLOPs; above DCAF at 3 of 5 budgets or more; at "
    "least 30 % of the oracle's gain. DCAF: the default chain's worth for at most 80 % of its milliseconds, and 40 % of the oracle's gain. "
    "Partly where some parts hold."
)
