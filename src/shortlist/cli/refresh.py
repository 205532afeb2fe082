"""`shortlist refresh`: every user's whole history becomes a summary that serving reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shortlist.cli._options import Json, Quiet, RunFolder

if TYPE_CHECKING:
    from shortlist.cascade.summaries import Done


def command(
    run: RunFolder,
    events: Annotated[
        Path | None,
        typer.Option(help="SQLite file of events; default: RUN.events.db beside the run, where there is one."),
    ] = None,
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
    from shortlist.errors import DataError
    from shortlist.store.events import EventStore

    folder = run.absolute()
    if events is not None and not events.exists():
        raise DataError(f"{events}: no such file; give the event store that the server writes, or leave --events out")
    beside = folder.with_name(f"{folder.name}.events.db")
    found = events or (beside if beside.exists() else None)
    live = load_live(folder)
    store = None if found is None else EventStore(found, max_per_user=ALL_EVENTS)
    try:
        with _bar(shown=not quiet) as tell:
            done = refresh(live, folder, events=store, fresh=fresh, tell=tell)
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


@contextmanager
def _bar(*, shown: bool) -> Iterator[Callable[[Done], None]]:
    """A moving bar on a terminal; nothing elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if not shown or not console.is_terminal:
        yield lambda done: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, object] = {}

        def tell(done: Done) -> None:
            if done.system not in tasks:
                tasks[done.system] = progress.add_task(done.system, total=done.of_users)
            progress.update(tasks[done.system], completed=done.num_users)  # type: ignore[arg-type]

        yield tell
