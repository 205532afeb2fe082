"""`shortlist compare`: runs and simple systems in one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from shortlist.cli._options import Json, Threads


def command(
    targets: Annotated[
        list[str], typer.Argument(metavar="A B ...", help="Folders of runs, and names of systems that only count.")
    ],
    window: Annotated[Literal["valid", "test"], typer.Option(help="Choose on valid; look at test once.")] = "test",
    k: Annotated[int | None, typer.Option(help="Page length; default: that of the first run.")] = None,
    no_repeats: Annotated[
        bool, typer.Option("--no-repeats", help="Filter items seen before, and do not count them.")
    ] = False,
    max_requests: Annotated[int | None, typer.Option(help="A seeded sample of so many requests.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="What the others are tested against; default: the first.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the table as JSON to this file.")] = None,
    threads: Threads = None,
    json_: Json = False,
) -> None:
    """One table, means with intervals over users, paired tests against the first. All on the same requests.

    Example: shortlist compare runs/shop popularity personal-frequency counts ease
    """
    from shortlist.cascade.run import load_run
    from shortlist.errors import ConfigError
    from shortlist.evaluation.evaluate import compare
    from shortlist.evaluation.evidence import write_json
    from shortlist.evaluation.runs import is_run, reports_for
    from shortlist.evaluation.tables import comparison_text

    # A path that is no run is refused as such, and not looked up as a system.
    runs = {t: load_run(Path(t)) for t in dict.fromkeys(targets) if is_run(Path(t)) or len(Path(t).parts) > 1}
    if not runs:
        raise ConfigError(
            f"compare needs at least one folder of a trained run, which says what requests are asked; got {', '.join(targets)}"
        )
    if len(set(targets)) < len(targets):
        raise ConfigError(f"compare was given the same twice: {', '.join(targets)}")
    first = next(iter(runs.values()))
    reports = reports_for(
        targets,
        dataset=first.dataset,
        runs=runs,
        window=window,
        k=k or first.config.surface.k,
        repeats=False if no_repeats else None,
        max_requests=max_requests,
    )
    comparison = compare(reports, reference=reference)
    if out is not None:
        write_json(out, comparison.as_dict())
    typer.echo(json.dumps(comparison.as_dict(), indent=1) if json_ else comparison_text(comparison))
