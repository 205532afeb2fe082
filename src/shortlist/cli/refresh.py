"""`shortlist refresh`: every user's whole history becomes a summary that serving reads."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from shortlist.cli._bar import bars
from shortlist.cli._options import EventsAt, Json, Quiet, RunFolder, events_at


def command(
    run: RunFolder,
    events: EventsAt = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not go on from a refresh that was stopped.")] = False,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Stream every user's whole history through the run's summarising systems and write what they keep beside the run.

    Interrupted, it goes on where it was when it is run again; a server that is running takes up the new summaries by itself.

    Example: shortlist refresh RUN
    """
    from shortlist.cascade.live import load_live
    from shortlist.cascade.summaries import ALL_EVENTS, refresh, told
    from shortlist.cascade.upkeep import Upkeep
    from shortlist.store.catalogue import CatalogueStore
    from shortlist.store.events import EventStore

    folder = run.absolute()
    found = events_at(folder, events)
    live = load_live(folder)
    store = None if found is None else EventStore(found, max_per_user=ALL_EVENTS, patience_s=600.0)
    if found is not None:
        news = CatalogueStore(found)
        Upkeep(news).apply(live)  # users who were forgotten have no summary
        news.close()
    try:
        with bars(shown=not quiet) as tell:
            done = refresh(
                live,
                folder,
                events=store,
                fresh=fresh,
                tell=lambda d: tell(d.system, d.num_users, d.of_users),
            )
    finally:
        if store is not None:
            store.close()
    if json_:
        rates = [(r.users_per_second, r.events_per_second) for r in done]
        rows = [
            {**asdict(r), "path": str(r.path), "users_per_second": users, "events_per_second": events_}
            for r, (users, events_) in zip(done, rates)
        ]
        typer.echo(json.dumps(rows, indent=1))
        return
    typer.echo("\n".join(told(done)))
