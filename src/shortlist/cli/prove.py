"""`shortlist prove`: run a claim, or list all claims and their verdicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def command(
    name: Annotated[str | None, typer.Argument(help="Claim to run; without it, all claims are listed.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Ten-second version: no verdict on the full claim.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget the measurements of an unfinished run.")] = False,
    judge: Annotated[
        bool, typer.Option("--judge", help="Judge the recorded measurements again; measure nothing.")
    ] = False,
    page: Annotated[Path | None, typer.Option(help="Write the page of all results (Markdown) to this file.")] = None,
    evidence: Annotated[Path | None, typer.Option(help="Folder of claims; default: evidence/ of the clone.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run a claim's arms in one run and record the result, or list the claims.

    Example: shortlist prove demo_page --quick
    """
    from shortlist.errors import ConfigError
    from shortlist.evaluation import evidence as frame
    from shortlist.registry import nearest

    folder = frame.evidence_folder(evidence)
    files = frame.claim_files(folder)
    if page is not None:
        page.write_text(frame.results_page(folder))
        typer.echo(f"wrote {page}")
        return
    if name is None:
        listed = frame.listing(folder)
        typer.echo(json.dumps(listed, indent=1) if json_ else "\n".join(frame.listing_lines(listed)))
        return
    if name not in files:
        raise ConfigError(f"no claim named {name!r} in {folder}: {nearest(name, list(files))}")
    if judge:
        result = frame.judge_again(files[name])
    else:
        result = frame.prove(files[name], quick=quick, fresh=fresh, say=lambda line: typer.echo(line, err=True))
    if json_:
        typer.echo(json.dumps(result, indent=1))
    else:
        typer.echo(f"{result['name']}: {result['verdict']}{' (quick form)' if quick else ''}. {result['reason']}")
