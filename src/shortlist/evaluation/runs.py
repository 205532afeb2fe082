"""Evaluation of trained runs and of the simple systems that must stand beside them in every table."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from shortlist.cascade.attribution import attribute_losses, lost_at
from shortlist.cascade.cascade import Cascade
from shortlist.cascade.fitting import fits
from shortlist.cascade.meter import Meter
from shortlist.cascade.run import Run, as_of
from shortlist.data.batches import Batch
from shortlist.data.dataset import Dataset
from shortlist.data.histories import Int, Requests
from shortlist.errors import ConfigError
from shortlist.evaluation.evaluate import Comparison, Report, Window, compare, evaluate, pager_of
from shortlist.evaluation.tasks import evaluate_tasks
from shortlist.extras import installed
from shortlist.metrics import Interval
from shortlist.models.base import System
from shortlist.registry import Entry, find

BASELINES = (
    "popularity",
    "personal-frequency",
    "counts",
    "item-knn",
    "ease",
    *(("als",) if installed("implicit") else ()),
)
"""The simple systems that stay in every recommendation table, strong ones included; ALS where its library is installed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunReport:
    """A cascade on one window: quality, where held-out items were lost, what it cost."""

    report: Report
    lost_at: Mapping[str, float]
    """Share of held-out items that each stage let fall, in the order of the stages; "shown" = on the page. Adds up to 1."""
    cost: Mapping[str, Mapping[str, float]]
    """Per stage and request: ms, mflop, received, kept."""
    tasks: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    """By ranker and task, where the run has tasks; see `evaluate_tasks`."""

    @property
    def metrics(self) -> Mapping[str, Interval]:
        """By name, such as ndcg@10."""
        return self.report.metrics

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **self.report.as_dict(),
            "lost_at": dict(self.lost_at),
            "cost": {s: dict(c) for s, c in self.cost.items()},
            **(
                {"tasks": {s: {t: dict(v) for t, v in of.items()} for s, of in self.tasks.items()}}
                if self.tasks
                else {}
            ),
        }


@dataclass(slots=True)
class _Account:
    """A pager over a cascade that keeps the accounts of what it answers."""

    cascade: Cascade
    k: int
    chain: str | None = None
    meter: Meter = field(default_factory=Meter)
    lost: list[Int] = field(default_factory=list)

    def __call__(self, batch: Batch, requests: Requests) -> Tensor:
        page = self.cascade.run(batch, k=self.k, chain=self.chain)
        self.meter.add(page.chain, page.reports)
        self.lost.append(lost_at(page, requests))
        return page.rows


def evaluate_run(
    run: Run,
    *,
    name: str = "cascade",
    window: Window = "test",
    k: int | None = None,
    repeats: bool | None = None,
    max_requests: int | None = None,
    chain: str | None = None,
    seed: int = 0,
) -> RunReport:
    """Pages of the whole cascade on a window's requests, through the same code that serves them; see `evaluate` for the arguments."""
    k = run.config.surface.k if k is None else k
    account = _Account(as_of(run, window), k, chain)
    report = evaluate(
        account,
        run.dataset,
        name=name,
        window=window,
        k=k,
        repeats=repeats,
        max_history=run.cascade.max_history,
        max_requests=max_requests,
        device=str(run.cascade.device),
        seed=seed,
    )
    stages = account.meter.summary().stages
    cost = {
        s.stage: {
            "ms": s.mean_ms,
            "mflop": s.mean_mflop,
            "received": s.num_received / max(s.num_requests, 1),
            "kept": s.num_kept / max(s.num_requests, 1),
        }
        for s in stages
    }
    return RunReport(
        report=report,
        lost_at=attribute_losses([s.stage for s in stages], account.lost),
        cost=cost,
        tasks=evaluate_tasks(run, window, max_requests=max_requests, seed=seed),
    )


def evaluate_counted(
    name: str,
    dataset: Dataset,
    *,
    settings: Mapping[str, Any] | None = None,
    made: System | None = None,
    window: Window = "test",
    k: int = 10,
    repeats: bool | None = None,
    max_requests: int | None = None,
    seed: int = 0,
) -> Report:
    """A system that only counts, on everything before the window, beside a trained run.

    Args:
        made: the system, where it has been counted on exactly that already.

    Raises ConfigError for a system that is trained by gradient (train it as a run) or that the log can not serve.
    """
    system = counted(find(name), dataset, window, settings) if made is None else made
    return evaluate(
        pager_of(system, k),
        dataset,
        name=name,
        window=window,
        k=k,
        repeats=repeats,
        max_history=max(system.max_history, 1),
        max_requests=max_requests,
        seed=seed,
    )


def counted(entry: Entry, dataset: Dataset, window: Window, settings: Mapping[str, Any] | None = None) -> System:
    """The system, prepared on everything before the window."""
    reason = fits(entry, dataset)
    if reason is not None:
        raise ConfigError(f"{entry.name} can not be used here: {reason}")
    view = dataset.view(window)
    torch.manual_seed(0)
    system: System = entry.cls(entry.config(settings), view.space)
    if system.phases():
        raise ConfigError(f"{entry.name} is trained by gradient; train a run with it and give the run's folder")
    system.prepare(view)
    return system.eval()


def baselines(dataset: Dataset, names: Sequence[str] = BASELINES) -> list[str]:
    """Those of the given systems that the log can serve."""
    return [name for name in names if fits(find(name), dataset) is None]


def reports_for(
    targets: Sequence[str],
    *,
    dataset: Dataset,
    runs: Mapping[str, Run],
    window: Window = "test",
    k: int | None = None,
    repeats: bool | None = None,
    max_requests: int | None = None,
) -> list[Report]:
    """One report per target, a run's name or a counting system's, all on the same requests of `dataset`."""
    found = []
    for target in targets:
        if target in runs:
            run = runs[target]
            found.append(
                evaluate_run(run, name=target, window=window, k=k, repeats=repeats, max_requests=max_requests).report
            )
        else:
            found.append(
                evaluate_counted(target, dataset, window=window, k=k or 10, repeats=repeats, max_requests=max_requests)
            )
    return found


def shown_metrics(k: int) -> list[str]:
    """The metrics that a table of pages leads with."""
    return [f"ndcg@{k}", f"recall@{k}", f"value@{k}", f"hr@{k}"]


def beside_baselines(
    run: Run,
    mine: RunReport,
    repeats: bool,
    names: Sequence[str] = BASELINES,
    *,
    window: Window = "test",
    max_requests: int | None = None,
    seconds: float = math.inf,
    rivals: Mapping[str, Run] = MappingProxyType({}),
    made: dict[str, System] | None = None,
) -> Comparison:
    """The cascade and the simple systems on the same requests, the cascade as the reference.

    Args:
        mine: the cascade on that window.
        names: of which those stand beside it that the log can serve.
        max_requests: as for `mine`.
        seconds: no further system is begun after so long; those that the run has already counted come first.
        rivals: other runs on the same dataset, by the name of their row; they come last.
        made: simple systems counted for this window so far; those that are counted now are added.
    """
    dataset, k, began = run.dataset, mine.report.k, time.perf_counter()
    made = {} if made is None else made
    made |= {name: system for name, system in _already_counted(run, window).items() if name not in made}
    reports = {}
    for name in sorted(baselines(dataset, names), key=lambda name: name not in made):
        if time.perf_counter() - began > seconds:
            continue
        if name not in made:
            made[name] = counted(find(name), dataset, window)
        reports[name] = evaluate_counted(
            name, dataset, made=made[name], window=window, k=k, repeats=repeats, max_requests=max_requests
        )
    found = [reports[name] for name in names if name in reports]
    for name, rival in rivals.items():
        judged = evaluate_run(rival, name=name, window=window, k=k, repeats=repeats, max_requests=max_requests)
        found.append(judged.report)
    return compare([mine.report, *found], reference=mine.report.name)


def _already_counted(run: Run, window: Window) -> dict[str, System]:
    """Retrievers of the run that only count, with their default settings, as they stood when the window began, by registered name."""
    at_hand = window == "test" or (window == "valid" and run.at_validation is not None)
    if not (run.config.learning.refresh and at_hand and run.cascade.device.type == "cpu"):
        return {}
    systems = as_of(run, window).systems
    chosen = {name: run.config.systems[name] for name in run.config.stages[0].systems}
    return {
        choice.system: systems[name]
        for name, choice in chosen.items()
        if not systems[name].phases() and choice.settings == choice.entry.config(None)
    }


def verdict(comparison: Comparison, surface: str) -> str:
    """One sentence: whether the cascade beats all others beyond chance, and if not, which ones it does not beat."""
    metric = f"ndcg@{comparison.reports[0].k}"
    against = {name: tests[metric] for name, tests in comparison.tests.items()}
    means = {report.name: report.metrics[metric].mean for report in comparison.reports}
    best = max(against, key=lambda name: means[name])
    test = against[best]
    relative = f"{test['difference'] / means[best]:+.1%}; " if means[best] else ""
    found = (
        f"{test['difference']:+.4f} {metric} ({relative}"
        f"95 % interval {test['low']:+.4f} to {test['high']:+.4f}, p {test['p_value']:.3f})"
    )
    not_beaten = [name for name, t in against.items() if t["low"] <= 0]
    if not_beaten:
        claim = f"the cascade does not beat {', '.join(not_beaten)} beyond the interval"
    else:
        claim = "the cascade beats all others beyond the interval"
    return f"{surface}: {claim}; against the best of them, {best}, it is {found}."


def cost_rows(cost: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """Cost per stage as rows of a text table, with a total."""
    rows = [["stage", "items in", "kept", "ms/request", "MFLOP/request"]]
    rows += [
        [stage, f"{c['received']:,.0f}", f"{c['kept']:,.0f}", f"{c['ms']:.3f}", f"{c['mflop']:.3f}"]
        for stage, c in cost.items()
    ]
    total = [sum(c[key] for c in cost.values()) for key in ("ms", "mflop")]
    return [*rows, ["all", "", "", f"{total[0]:.3f}", f"{total[1]:.3f}"]]


def is_run(folder: Path) -> bool:
    """Whether a folder looks like a trained run."""
    return (folder / "manifest.json").exists()
