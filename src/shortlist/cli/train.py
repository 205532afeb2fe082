"""`shortlist train`: a log becomes a trained cascade."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shortlist.cli._options import Json, LogOptions, Quiet, Settings, Threads, called_as, with_log

if TYPE_CHECKING:
    from shortlist.cascade.run import Run
    from shortlist.data.ingested import Log
    from shortlist.data.roles import Roles


@with_log
def command(
    log: LogOptions,
    out: Annotated[
        Path, typer.Option(help="Folder of the run; an earlier run there is replaced when the new one is complete.")
    ],
    config: Annotated[
        Path | None, typer.Option(help="TOML with stages and settings; default: chosen from what the log offers.")
    ] = None,
    settings: Settings = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not go on from a training that was stopped.")] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print every setting as TOML and stop.")] = False,
    no_report: Annotated[bool, typer.Option("--no-report", help="Write no report.html beside the run.")] = False,
    threads: Threads = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Train a cascade on a log: every stage, each later one on what the earlier ones let through.

    Example: shortlist train clicks.csv --items products.csv --out runs/shop --set ranking.keep=50
    """
    from shortlist.api import settle
    from shortlist.cascade.build import train_cascade
    from shortlist.cascade.config import RunConfig
    from shortlist.evaluation.tables import aligned, losses_text
    from shortlist.evaluation.tasks import task_rows
    from shortlist.store.snapshot import check_writable

    began = time.perf_counter()
    check_writable(out)
    say = (lambda line: None) if quiet else (lambda line: typer.echo(line, err=True))
    wanted = (
        RunConfig.from_toml(config) if config else None
    )  # before the log: a wrong setting should not cost a long read
    roles = wanted.roles if wanted else None
    events = log.open(out.with_name(f"{out.name}.quarantine.csv"), roles)
    for line in _reading(events, log.roles(roles)):
        say(line)
    dataset, run_config = settle(events, wanted, settings or ())
    if print_config:
        typer.echo(run_config.to_toml())
        return
    run = train_cascade(dataset, run_config, out, progress=not quiet, resume=not fresh)
    page = None if no_report else _report(run, events, began)
    if json_:
        told = {"run": str(out), "version": run.version, "report": None if page is None else str(page)}
        typer.echo(json.dumps({**told, **run.metrics}, indent=1))
        return
    valid = run.metrics["validation"]
    rows = [["system", "stage", "epochs", "validation ndcg", "seconds"]]
    rows += [
        [s["name"], s["stage"], str(s["epochs"]), f"{s['ndcg']:.4f}", f"{s['seconds']:.1f}"]
        for s in run.metrics["systems"]
    ]
    k = run.config.surface.k
    typer.echo("\n".join(aligned(rows)))
    by_task = {s["name"]: s["tasks"] for s in run.metrics["systems"] if s.get("tasks")}
    if by_task:
        typer.echo("\n" + "\n".join(aligned(task_rows(by_task))))
    asked = "simulated requests" if run.dataset.simulated else "requests"
    typer.echo(f"\nvalidation page: ndcg@{k} {valid[f'ndcg@{k}']:.4f} on {valid['requests']:,} {asked}\n")
    typer.echo(losses_text(valid["lost_at"]))
    if page is not None:
        typer.echo(f"\nThe report is in {page}.")
    typer.echo(
        f"\nThe run is in {out}. Next: shortlist evaluate {out}; shortlist recommend {out} --user ID; shortlist serve {out}"
    )


def _report(run: Run, events: Log, began: float) -> Path:
    """Write the report, with what the log has to say; its path."""
    from shortlist.data.check import check
    from shortlist.evaluation.report import report_training

    seconds = time.perf_counter() - began
    return report_training(run, health=check(events).sentences(), command=called_as(), seconds=seconds)


def _reading(events: Log, given: Roles | None) -> list[str]:
    """What was read and how it was understood."""
    from shortlist.data.roles import describe_roles

    lines = [
        f"{events.source}: {events.events.height:,} events",
        *describe_roles(events.roles, given),
        *events.notes,
    ]
    if events.quarantined.total:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in events.quarantined.counts.items())
        lines.append(f"{events.quarantined.total:,} bad rows kept aside in {events.quarantined.path}: {reasons}")
    return lines
