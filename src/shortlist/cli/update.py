"""`shortlist update`: a run learns from what came in since it was trained, and is put in place where it is no worse."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from shortlist.cli._options import Json, Quiet, Threads, events_at

WORSE = 1
"""Exit code where the new run was not put in place."""


def command(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or a place of `shortlist publish`.")],
    events: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|URL",
            help="SQLite file or URL of the events; default: RUN.events.db, as the server of the run writes it.",
        ),
    ] = None,
    publish: Annotated[
        Path | None,
        typer.Option(
            metavar="PLACE", help="Place to publish to; default: RUN where it is a place, else RUN is replaced."
        ),
    ] = None,
    keep: Annotated[int, typer.Option(min=1, help="Versions that stay in the place.")] = 5,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Change a setting of [update], such as epochs=3; repeat for several."
        ),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on, with an update every update.every_hours, until told to stop.")
    ] = False,
    threads: Threads = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Learn from the events that a run has not seen, compare it with itself as it was on the newest of them, and put it in place.

    Exit code 1 where it is worse than before by more than update.margin; the old run then stays. Interrupted, it goes on where it was
    when it is run again, and until it is done the old run stays.

    Example: shortlist update PLACE --events PLACE.events.db
    """
    from shortlist.errors import DataError, ShortlistError
    from shortlist.store.events import StoreUnavailable

    source = run.absolute()
    where = events_at(source, events)
    if where is None:
        raise DataError(f"there is no {source.name}.events.db beside {source}; say with --events where events come in")

    def once() -> tuple[str, float]:
        """One update; its outcome and the hours to the next."""
        from shortlist.cascade.config import RunConfig
        from shortlist.cascade.run import CONFIG
        from shortlist.cascade.updating import update
        from shortlist.store.catalogue import CatalogueStore
        from shortlist.store.events import EventStore
        from shortlist.store.published import served_run

        chosen = RunConfig.from_toml(served_run(source) / CONFIG)
        config = chosen.override(*(f"update.{assignment}" for assignment in settings or ())).update
        store, catalogue = EventStore(where, patience_s=600.0), CatalogueStore(where)
        try:
            done = update(
                source,
                store,
                publish=publish,
                config=config,
                catalogue=catalogue,
                keep=keep,
                progress=not quiet,
                tell=(lambda line: None) if quiet else (lambda line: typer.echo(line, err=True)),
            )
        finally:
            catalogue.close()
            store.close()
        typer.echo(json.dumps(asdict(done), indent=1) if json_ else "\n".join(done.told()))
        return done.outcome, config.every_hours

    if not watch:
        outcome, _ = once()
        raise typer.Exit(WORSE if outcome == "worse" else 0)
    every_hours = 1.0
    while True:
        began = time.monotonic()
        try:
            _, every_hours = once()
        except (ShortlistError, StoreUnavailable, OSError) as error:  # the next one may find what this one missed
            typer.echo(f"shortlist: {error}", err=True)
        time.sleep(max(every_hours * 3600 - (time.monotonic() - began), 0))
