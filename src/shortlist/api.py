"""Shortlist from Python, in a dozen names: what `import shortlist` offers.

log = shortlist.read("clicks.csv", items="products.csv")
run = shortlist.train(log, out="runs/shop")
shortlist.evaluate(run).metrics["ndcg@10"]
with shortlist.Engine.load("runs/shop") as engine:
    engine.recommend("u17", k=10)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from shortlist.cascade.build import train_cascade
from shortlist.cascade.config import RunConfig
from shortlist.cascade.engine import Engine
from shortlist.cascade.fitting import default_config
from shortlist.cascade.run import Run, load_run
from shortlist.data.check import check
from shortlist.data.dataset import Dataset, build_dataset
from shortlist.data.datasets import load as dataset
from shortlist.data.ingested import Log
from shortlist.data.ingested import open_log as read
from shortlist.data.splits import DataConfig
from shortlist.evaluation.evaluate import Comparison, Window
from shortlist.evaluation.evaluate import compare as compare_reports
from shortlist.evaluation.report import report_training
from shortlist.evaluation.runs import RunReport, baselines, evaluate_run, reports_for
from shortlist.registry import find, systems

__all__ = [
    "DataConfig",
    "Engine",
    "RunConfig",
    "check",
    "compare",
    "dataset",
    "evaluate",
    "find",
    "load",
    "read",
    "split",
    "systems",
    "train",
]

load = load_run
SECTIONS = ("data", "roles", "surface", "learning", "trainer", "index")
"""Sections of a run's settings that are read before stages are chosen from the log."""


def split(log: Log, config: DataConfig | None = None) -> Dataset:
    """Cut, number and encode a log; see `shortlist.data.dataset.build_dataset`. DataError where a part would be empty."""
    return build_dataset(log, config)


def settle(
    log: Log, config: RunConfig | Path | str | None = None, settings: Sequence[str] = ()
) -> tuple[Dataset, RunConfig]:
    """The encoded log and every setting of a run on it.

    Args:
        config: settings, or a TOML file of them; None or one without stages = stages chosen from what the log offers.
        settings: overrides such as "ranking.keep=50"; those of chosen stages and systems apply after the choice.

    Raises:
        ConfigError: a setting that does not exist or does not fit. DataError: a log that can not be cut as asked.
    """
    wanted = config if isinstance(config, RunConfig) else RunConfig.from_toml(Path(config)) if config else RunConfig()
    early = [s for s in settings if wanted.stages or s.partition(".")[0] in SECTIONS]
    wanted = wanted.override(*early)
    encoded = build_dataset(log, wanted.data_settings)
    return encoded, default_config(encoded, wanted).override(*(s for s in settings if s not in early))


def train(
    log: Log,
    *,
    out: Path | str,
    config: RunConfig | Path | str | None = None,
    settings: Sequence[str] = (),
    progress: bool = True,
    report: bool = True,
) -> Run:
    """Train a cascade and write it to the folder `out`; see `settle` for the settings and `train_cascade` for what happens.

    Args:
        report: also write `OUT-report/report.html`, on the validation window.
    """
    began = time.perf_counter()
    encoded, wanted = settle(log, config, settings)
    run = train_cascade(encoded, wanted, Path(out), progress=progress)
    if report:
        seconds = time.perf_counter() - began
        report_training(run, health=check(log).sentences(), command="shortlist.train(...)", seconds=seconds)
    return run


def evaluate(
    run: Run | Path | str, *, window: Window = "test", k: int | None = None, repeats: bool | None = None
) -> RunReport:
    """Quality with intervals, where held-out items were lost, and what each stage cost; see `evaluate_run`."""
    return evaluate_run(_run(run), window=window, k=k, repeats=repeats)


def compare(
    run: Run | Path | str, names: Sequence[str] | None = None, *, window: Window = "test", repeats: bool | None = None
) -> Comparison:
    """A run beside simple systems by name (default: all baselines that the log can serve), tested on the same requests."""
    mine = _run(run)
    targets = ["run", *(baselines(mine.dataset) if names is None else names)]
    reports = reports_for(
        targets, dataset=mine.dataset, runs={"run": mine}, window=window, k=mine.config.surface.k, repeats=repeats
    )
    return compare_reports(reports, reference="run")


def _run(run: Run | Path | str) -> Run:
    return run if isinstance(run, Run) else load_run(Path(run))
