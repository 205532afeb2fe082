"""`shortlist export`: vectors, a ranker or pages of a run for other tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from shortlist.cli._options import Json, Quiet, RunFolder


def command(
    run: RunFolder,
    what: Annotated[
        Literal["vectors", "ranker", "pages"],
        typer.Option(
            help="vectors: of items and users, with a FAISS index; ranker: its user side and its scores of candidates, as torch.export "
            "and ONNX; pages: "
            "everybody's page as Parquet."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of vectors or ranker; Parquet file of pages.")],
    system: Annotated[
        str | None, typer.Option(help="Which system, where the run has several that could be meant.")
    ] = None,
    users: Annotated[
        Path | None,
        typer.Option(help="Users to export: Parquet or CSV with a column user_id, or text with one id a line."),
    ] = None,
    k: Annotated[int | None, typer.Option(help="Items of a page; default: as the run says.")] = None,
    no_onnx: Annotated[bool, typer.Option("--no-onnx", help="Write a ranker for torch alone.")] = False,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Write vectors, a ranker or pages for other tools; each is compared with the run before it is put into place.

    Example: shortlist export runs/shop --what pages --out pages.parquet
    """
    from shortlist.cascade import exports
    from shortlist.cascade.export_pages import export_pages
    from shortlist.cascade.export_ranker import export_ranker
    from shortlist.cascade.run import load_run
    from shortlist.errors import ConfigError

    unused = {"--system": system, "--users": users, "--k": k, "--no-onnx": no_onnx or None}
    for option in {"vectors": ("--k", "--no-onnx"), "ranker": ("--users", "--k"), "pages": ("--system", "--no-onnx")}[
        what
    ]:
        if unused[option] is not None:
            raise ConfigError(f"{option} has no effect on the export of {what}; leave it out")
    ids = None if users is None else exports.read_users(users)
    loaded = load_run(run)
    about: dict[str, Any]
    if what == "vectors":
        about = exports.export_vectors(loaded, out, system=system, users=ids)
    elif what == "ranker":
        about = export_ranker(loaded, out, system=system, onnx=not no_onnx)
    else:
        say = (lambda line: None) if quiet else (lambda line: typer.echo(line, err=True))
        about = export_pages(loaded, out, users=ids, k=k, say=say)
    if json_:
        typer.echo(json.dumps({"out": str(out), **about}, indent=1))
    else:
        typer.echo("\n".join([*_told(about), f"written to {out}"]))


def _told(about: dict[str, Any]) -> list[str]:
    """What was exported, in words."""
    if about["what"] == "pages":
        unknown = f", {about['num_unknown_users']:,} of them unknown" if about["num_unknown_users"] else ""
        lines = [
            f"{about['num_rows']:,} places on the pages of {about['num_users']:,} users{unknown}, {about['seconds']} s"
        ]
        return [*lines, *(f"passed over: {reason}" for reason in about["degraded"])]
    check = about["check"]
    if about["what"] == "vectors":
        people = f" and {about['num_users']:,} users" if "num_users" in about else ""
        return [
            f"{about['system']}: vectors of {about['num_items']:,} items{people}, {about['dim']} numbers each",
            f"FAISS beside the run on {check['requests']:,} requests: scores differ by at most {check['max_difference']:.1e}, "
            f"{check['same_items']:.1%} of the first {check['places']} places hold the same item",
        ]
    beside = f"on {check['requests']:,} requests with {check['candidates']:,} candidates"
    differences = [f"{name}: scores differ by at most {d:.1e} {beside}" for name, d in check["max_difference"].items()]
    scores = ", ".join(o["name"] for o in about["outputs"])
    user_side = about["user_side"]
    if "left_out" in user_side:
        users = [f"user side left out: {user_side['left_out']}"]
    else:
        users = [f"user side: {_inputs(user_side)} -> {', '.join(user_side['outputs'])}"]
        users += [f"{n}: state differs by at most {d:.1e}" for n, d in user_side["check"]["max_difference"].items()]
    return [*users, f"{about['system']}: {_inputs(about)} -> {scores} [B, C]", *differences]


def _inputs(program: dict[str, Any]) -> str:
    return ", ".join(f"{i['name']} {i['dtype']} [{', '.join(map(str, i['shape']))}]" for i in program["inputs"])
