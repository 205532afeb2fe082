"""`shortlist tune`: search settings within a budget, the same for every arm."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from shortlist.cli._options import Json, LogOptions, Quiet, Settings, Threads, called_as, with_log


@with_log
def command(
    log: LogOptions,
    out: Annotated[Path, typer.Option(help="Folder of the search; one that was stopped goes on.")],
    system: Annotated[
        list[str] | None,
        typer.Option(
            "--system", "--systems", help="System to tune, or several, separated by commas; default: the whole cascade."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML with stages and settings; default: chosen from what the log offers.")
    ] = None,
    settings: Settings = None,
    space: Annotated[
        Path | None, typer.Option(help="TOML of ranges, for all systems or in a table per system.")
    ] = None,
    range_: Annotated[
        list[str] | None,
        typer.Option(
            "--range", metavar="NAME=LOW:HIGH[:log]|A,B", help="What is tried for a setting; repeat for several."
        ),
    ] = None,
    only: Annotated[bool, typer.Option("--only", help="Try nothing but the ranges given.")] = False,
    trials: Annotated[
        int | None, typer.Option(help="Trials per system, defaults first; 20 where no budget is given.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Minutes per system.")] = None,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget the trials of an earlier search there.")] = False,
    threads: Threads = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Search settings by validation NDCG, the same effort for every system; the defaults are the first trial, the test window is not read.

    Example: shortlist tune clicks.csv --systems two-tower,sasrec --trials 20 --out tuned --range dim=16,32,64
    """
    from shortlist.api import settle
    from shortlist.cascade.config import RunConfig
    from shortlist.evaluation.tune import Budget, make_arms, table_text, tune
    from shortlist.evaluation.tuning_space import parse_ranges, read_ranges
    from shortlist.extras import library

    library("optuna", extra="tune", user="shortlist tune")
    budget = Budget(
        trials=20 if trials is None and minutes is None else trials, seconds=None if minutes is None else 60 * minutes
    )
    ranges = {**(read_ranges(space) if space else {}), **parse_ranges(range_ or ())}
    wanted = RunConfig.from_toml(config) if config else None
    dataset, base = settle(log.open(config_roles=wanted.roles if wanted else None), wanted, settings or ())
    names = [name.strip() for given in system or () for name in given.split(",") if name.strip()]
    tuning = tune(
        dataset,
        make_arms(base, names, ranges, only=only),
        out,
        budget=budget,
        seed=seed,
        command=called_as(),
        fresh=fresh,
        say=(lambda line: None) if quiet else (lambda line: typer.echo(line, err=True)),
        progress=not quiet and sys.stderr.isatty(),  # bars; as lines of a file they would hide the trials
    )
    if json_:
        typer.echo(json.dumps(tuning.as_dict(), indent=1))
    else:
        following = shlex.join(["shortlist", "train", *log.typed(), "--config", str(out / "best.toml"), "--out", "RUN"])
        typer.echo(f"{table_text(tuning)}\n\nNext: {following}")
