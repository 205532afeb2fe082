"""`shortlist compare`: runs and simple systems in one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from shortlist.cli._options import Json, Threads


def command(
    targets: Annotated[
        list[str] | None,
        typer.Argument(metavar="A B ...", help="Folders of runs, and names of systems that only count."),
    ] = None,
    window: Annotated[Literal["valid", "test"], typer.Option(help="Choose on valid; look at test once.")] = "test",
    k: Annotated[int | None, typer.Option(help="Page length; default: that of the first run.")] = None,
    no_repeats: Annotated[
        bool, typer.Option("--no-repeats", help="Filter items seen before, and do not count them.")
    ] = False,
    max_requests: Annotated[int | None, typer.Option(help="A seeded sample of so many requests.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="What the others are tested against; default: the first.")
    ] = None,
    leaderboard: Annotated[
        str | None,
        typer.Option(help="Show a public leaderboard instead, our recorded rows beside the published ones: frappe."),
    ] = None,
    evidence: Annotated[
        Path | None, typer.Option(help="With --leaderboard: folder of claims; default: evidence/ of the clone.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the table as JSON to this file.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    threads: Threads = None,
    json_: Json = False,
) -> None:
    """One table, means with intervals over users, paired tests against the first. All on the same requests.

    Example: shortlist compare runs/shop popularity personal-frequency counts ease

    A public leaderboard, from what is recorded: shortlist compare --leaderboard frappe
    """
    from shortlist.errors import ConfigError

    if leaderboard is not None:
        if targets:
            raise ConfigError(f"a leaderboard is shown from recorded results alone; leave out {', '.join(targets)}")
        _show_leaderboard(leaderboard, evidence, out, markdown=markdown, json_=json_)
        return
    from shortlist.cascade.run import load_run
    from shortlist.evaluation.evaluate import compare
    from shortlist.evaluation.evidence import write_json
    from shortlist.evaluation.runs import is_run, reports_for
    from shortlist.evaluation.tables import comparison_markdown, comparison_text

    targets = targets or []
    # A path that is no run is refused as such, and not looked up as a system.
    runs = {t: load_run(Path(t)) for t in dict.fromkeys(targets) if is_run(Path(t)) or len(Path(t).parts) > 1}
    if not runs:
        raise ConfigError(
            f"compare needs at least one folder of a trained run, which says what requests are asked; got {', '.join(targets) or 'nothing'}"
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
    if json_:
        typer.echo(json.dumps(comparison.as_dict(), indent=1))
    else:
        typer.echo(comparison_markdown(comparison) if markdown else comparison_text(comparison))


def _show_leaderboard(name: str, evidence: Path | None, out: Path | None, *, markdown: bool, json_: bool) -> None:
    """Print a leaderboard, and write it where `out` says."""
    from shortlist.evaluation.evidence import write_json
    from shortlist.evaluation.leaderboards import leaderboard, leaderboard_markdown, leaderboard_text

    table = leaderboard(name, evidence)
    if out is not None:
        write_json(out, table.as_dict())
    if json_:
        typer.echo(json.dumps(table.as_dict(), indent=1, ensure_ascii=False))
    else:
        typer.echo(leaderboard_markdown(table) if markdown else leaderboard_text(table))
