"""`shortlist ingest`: a log larger than memory becomes a folder that the other commands read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from shortlist.cli._options import Json, LogOptions, Quiet, with_log


@with_log
def command(
    log: LogOptions,
    out: Annotated[
        Path, typer.Option(help="Folder to write; an ingested log there is replaced when the new one is complete.")
    ],
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Lay a log larger than memory down in a folder, which `check` and `train` then take in its place.

    Example: shortlist ingest clicks.csv.gz --items products.csv --out big
    """
    from shortlist.data.ingest import IngestConfig, ingest
    from shortlist.data.roles import describe_roles
    from shortlist.errors import ConfigError

    if log.quarantine is not None:
        raise ConfigError(f"bad rows are kept in {out / 'rejected.parquet'}; leave --quarantine out")
    made = ingest(
        log.source, out, items=log.items, users=log.users, roles=log.roles(), separator=log.separator,
        config=IngestConfig(max_bad_share=log.max_bad_share),
        say=(lambda line: None) if quiet else (lambda line: typer.echo(line, err=True)),
    )  # fmt: skip
    counts = {"events": made.events.height, "users": len(made.user_ids), "items": len(made.item_ids)}
    if json_:
        roles = describe_roles(made.roles, log.roles())
        about = {"roles": roles, "notes": list(made.notes), "rejected": dict(made.quarantined.counts)}
        typer.echo(json.dumps({"folder": str(out), **counts, **about}, indent=1))
        return
    typer.echo("\n".join([*describe_roles(made.roles, log.roles()), *made.notes]))
    if made.quarantined.total:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in made.quarantined.counts.items())
        typer.echo(f"{made.quarantined.total:,} bad rows kept aside in {made.quarantined.path}: {reasons}")
    typer.echo(f"{out}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))
    typer.echo(f"\nNext: shortlist check {out}; shortlist train {out} --out RUN")
