"""`shortlist new`: the files of a new system."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from shortlist.cli._options import Json


def command(
    name: Annotated[str, typer.Argument(help="Name of the system, such as item-knn.")],
    kind: Annotated[Literal["retriever", "ranker", "reranker"], typer.Option(help="Which contract it fulfils.")],
    room: Annotated[
        Literal["retrieval", "ranking"] | None,
        typer.Option(help="Folder of the model in the clone; default: the kind's."),
    ] = None,
    dir_: Annotated[
        Path | None,
        typer.Option(
            "--dir", help="Write into this folder, for SHORTLIST_SYSTEMS, and not into the clone one stands in."
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """Write a model that works, its test, its claim and its page, and say what to do next. Overwrites nothing.

    Example: shortlist new my-model --kind ranker --dir systems
    """
    from shortlist.evaluation.scaffold import next_steps, plan, write

    scaffold = plan(name, kind, room=room, folder=dir_)
    written = [str(path) for path in write(scaffold)]
    if json_:
        typer.echo(json.dumps({"name": name, "written": written, "next": next_steps(scaffold)}, indent=1))
    else:
        typer.echo(
            "\n".join([*(f"wrote {path}" for path in written), "Next:", *(f"    {s}" for s in next_steps(scaffold))])
        )
