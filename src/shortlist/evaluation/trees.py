"""LambdaMART in place of a run's rankers: what boosted trees make of the same candidates, for the tables of a run.

    shared = Shared()
    run = train_cascade(dataset, config, out, shared=shared)
    trees = train_trees(run, beside(out), shared=shared)
    judge(run, "test", rivals={TREES: trees})

The rival has the run's retrieval, fit requests, pair fields and re-ranking, and its windows; only what ranks is another. It is a run like
any other, beside the first, and needs the extra [baselines].
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from shortlist.cascade.build import train_cascade
from shortlist.cascade.config import RunConfig
from shortlist.cascade.run import Run, load_run
from shortlist.cascade.sharing import Shared
from shortlist.errors import ConfigError
from shortlist.evaluation.runs import is_run
from shortlist.extras import installed

TREES = "lambdamart"
"""How tables call it; the registered name of the system too."""
NUM_NEGATIVES = 60
"""Candidates not chosen that the trees see per request, drawn once: more cost time and add nothing that could be measured."""
INSTALL = "pip install 'shortlist[baselines]'"


def has_trees() -> bool:
    """Whether LightGBM is installed."""
    return installed("lightgbm")


def missing_rows() -> str | None:
    """How to get the rows of a table that need a library; None where nothing is missing."""
    missing = [name for name, there in (("ALS", installed("implicit")), ("LambdaMART", has_trees())) if not there]
    if not missing:
        return None
    verb = "stands" if len(missing) == 1 else "stand"
    return f"{' and '.join(missing)} {verb} in these tables too after: {INSTALL}"


def beside(run: Path) -> Path:
    """Where the rival of a run's folder stands."""
    run = run.absolute()
    return run.with_name(f"{run.name}-{TREES}")


def trees_config(config: RunConfig, num_negatives: int | None = NUM_NEGATIVES) -> RunConfig:
    """The run with LambdaMART, as it is by default, as its only ranker: it sees all that retrieval finds. Re-rankers stay.

    Raises ConfigError: no stage of the run has a ranker.
    """
    kinds = {stage.name: config.systems[stage.systems[0]].entry.kind for stage in config.stages}
    rankers = [name for name, kind in kinds.items() if kind == "ranker"]
    if not rankers:
        raise ConfigError("no stage of the run ranks candidates, so LambdaMART has no place to take")
    table = config.to_table()
    stages: dict[str, Any] = {}
    for name, stage in table["stages"].items():
        if name == rankers[-1]:
            stages["ranking"] = {"systems": [TREES], **{key: stage[key] for key in ("keep",) if key in stage}}
        elif name not in rankers:
            stages[name] = stage
    used = {TREES, *(name for stage in config.stages if stage.name not in rankers for name in stage.systems)}
    for section in ("trainer", "index"):
        table[section] = {
            name: value for name, value in table[section].items() if name not in config.systems or name in used
        }
    return RunConfig.from_table(
        {
            **table,
            "stages": stages,
            "systems": {name: value for name, value in table["systems"].items() if name in used},
            "learning": {**table["learning"], "num_negatives": num_negatives},
        }
    )


def train_trees(
    run: Run, out: Path, *, shared: Shared | None = None, fresh: bool = False, progress: bool = True
) -> Run:
    """The rival of a run, written to `out`, or read from there where it stands already.

    Args:
        shared: what the training of the run has made, so that only the trees are left to grow.
        fresh: train anew even if it is there.

    Raises ConfigError: no stage of the run has a ranker, or LightGBM is missing, and how to install it.
    """
    config = trees_config(run.config)
    if is_run(out) and not fresh:
        there = load_run(out)
        same_data = there.dataset.plan.now == run.dataset.plan.now and (
            there.dataset.histories.num_events == run.dataset.histories.num_events
        )
        if same_data and there.config.to_toml() == config.to_toml():
            return there
    if progress:
        print(f"{TREES} in place of the rankers:", file=sys.stderr, flush=True)
    return train_cascade(run.dataset, config, out, progress=progress, resume=not fresh, shared=shared)
