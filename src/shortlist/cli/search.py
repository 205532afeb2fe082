"""`shortlist search`: what somebody finds, and the index that makes it possible."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from shortlist.cli._options import EventsAt, Json, RunFolder, open_engine
from shortlist.cli.recommend import page_lines


def command(
    run: RunFolder,
    query: Annotated[
        str | None, typer.Argument(metavar="WORDS", help="What is searched; without it, the index is made ready.")
    ] = None,
    user: Annotated[str | None, typer.Option(help="Who is asking; without it, nobody in particular.")] = None,
    k: Annotated[int | None, typer.Option(help="Items on the page; default: as the run says.")] = None,
    events: EventsAt = None,
    json_: Json = False,
) -> None:
    """Print what a query finds, or make the text index with vectors beside the run. A server takes a new index when it starts.

    Example: shortlist search RUN "red mug" --user 12748
    """
    from shortlist.cascade.search import prepare, search_path

    with open_engine(run, events) as engine:
        if query is None:
            index = prepare(
                engine.live, engine.config.search.text, tell=lambda line: None if json_ else typer.echo(line)
            )
            if json_:
                typer.echo(json.dumps({"path": str(search_path(run.absolute())), **index.about}))
            return
        answer = engine.search(user, query, k)
    if json_:
        typer.echo(json.dumps(answer.to_dict(), ensure_ascii=False, indent=1))
        return
    typer.echo("\n".join(page_lines(answer, [])))
    if answer.note:
        typer.echo(f"note: {answer.note}")
