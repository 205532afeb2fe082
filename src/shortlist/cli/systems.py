"""`shortlist systems`: the registry as a table, JSON or Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def command(
    name: Annotated[str | None, typer.Argument(help="Describe one system and its settings.")] = None,
    stage: Annotated[str | None, typer.Option(help="Only systems of this stage, such as retrieval or ranking.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the docs' table.")] = False,
    pages: Annotated[
        Path | None,
        typer.Option(
            help="Write the docs' pages of systems and the API reference under this folder, or the page of the one that is named."
        ),
    ] = None,
    evidence: Annotated[
        Path | None, typer.Option(help="Folder of claims; default: evidence/ where there is one.")
    ] = None,
) -> None:
    """List the published systems: name, kind, stage, paper, cold start, proof.

    Example: shortlist systems --stage ranking
    """
    from shortlist.errors import ConfigError
    from shortlist.evaluation.evidence import evidence_folder
    from shortlist.evaluation.systems_table import describe, markdown_table, rows, text_table
    from shortlist.registry import find, systems

    if pages is not None:
        from shortlist.cli import _reference
        from shortlist.evaluation import pages as of_systems

        if name is not None:
            path, text = of_systems.page_alone(find(name))
            (pages / path).parent.mkdir(parents=True, exist_ok=True)
            (pages / path).write_text(text)
            typer.echo(f"wrote {pages / path}")
            return
        made = of_systems.pages() | _reference.pages()
        of_systems.write(pages, made)
        typer.echo(f"wrote {len(made)} pages under {pages}")
        return
    folder = evidence_folder(evidence) if evidence else Path("evidence")
    if name is not None:
        described = describe(find(name))
        typer.echo(json.dumps(described, indent=1) if json_ else described["text"])
        return
    stages = sorted({entry.stage for entry in systems()})
    if stage is not None and stage not in stages:
        raise ConfigError(f"no system has the stage {stage!r}; there are {', '.join(stages)}")
    table = rows(stage=stage, evidence=folder if folder.is_dir() else None)
    if json_:
        typer.echo(json.dumps(table, indent=1))
    elif markdown:
        typer.echo(markdown_table(table))
    else:
        typer.echo(text_table(table))
