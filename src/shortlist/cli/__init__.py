"""The command line. One thin file per command; heavy imports stay inside the command that needs them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Annotated

import typer

from shortlist.errors import ShortlistError

COMMANDS = {
    "demo": "Train and evaluate a four-stage cascade on the built-in shop log.",
    "check": "Say in words what a log holds and what it can serve.",
    "ingest": "Lay a log larger than memory down in a folder.",
    "train": "Train a cascade on a log.",
    "evaluate": "Evaluate a trained run on its held-out requests.",
    "compare": "Put runs and systems into one table with intervals and paired tests.",
    "recommend": "Print the page one user sees, with scores per stage.",
    "search": "Print what a query finds, or make the text index of a run.",
    "ads": "Calibrate a run's scores to chances of clicks, for its ads.",
    "calibrate": "Find what each chain of a run costs and brings, and make its allocator.",
    "refresh": "Summarise every user's whole history for serving.",
    "update": "Learn from what came in since a run was trained, and publish.",
    "publish": "Publish a run to a place that servers follow, or go back in it.",
    "serve": "Serve a trained run over HTTP.",
    "console": "Watch and steer a running server in a browser.",
    "keys": "Make, list or revoke the API keys of a server.",
    "experiment": "Say what experiments found, at any time.",
    "explain": "Say why a person gets each item of their page.",
    "export": "Write vectors, rankers or pages for other tools.",
    "budget": "Draw quality against cost for every way to choose chains.",
    "replay": "Ask logged requests again under another snapshot, budget, chain or rules.",
    "energy": "Say what 1,000 requests bring and take: quality, FLOPs, energy, carbon.",
    "tune": "Search settings within a budget, the same for every arm.",
    "import": "Read what RecBole, Gorse or FuxiCTR use.",
    "simulate": "Make a log whose truth is known, on top of a real one.",
    "datasets": "List the public data sets, and what is missing of them.",
    "systems": "List the published systems, or describe one.",
    "prove": "Run a claim and record its result, or list the claims.",
    "bench": "Run a benchmark under the lock, or list them.",
    "new": "Write the files of a new system: model, test, claim, page.",
    "doctor": "Print versions, devices and threads in one paste.",
}
"""Command names and their line in --help; command NAME is the function `command` in cli/NAME.py, imported when it is called."""
FILES = {"import": "import_"}
"""Files of commands whose name is a word of Python."""

ARGUMENTS: ContextVar[tuple[str, ...]] = ContextVar("arguments", default=())
"""What the running command was called with."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, which typer turns into a silent exit."""


def _version(wanted: bool) -> None:
    if wanted:
        from shortlist._version import __version__

        typer.echo(__version__)
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Shortlist: behaviour logs in, a trained cascade out, served inside a compute budget."""


def build(called: str | None) -> typer.Typer:
    """The command line, with the file of the called command alone imported, so that `shortlist --help` stays fast."""
    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        help="Shortlist: behaviour logs in, a trained cascade out, served inside a compute budget.",
        epilog="Try `shortlist demo`, or `shortlist train LOG.csv --out RUN` with a log of your own.",
    )
    app.callback()(_root)
    for name, line in COMMANDS.items():
        function = (
            importlib.import_module(f"shortlist.cli.{FILES.get(name, name)}").command if name == called else _root
        )
        app.command(name, short_help=line)(function)
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; errors the user can mend, files that can not be used among them, are one sentence on stderr and exit code 2."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    ARGUMENTS.set(tuple(argv))
    called = next((word for word in argv if not word.startswith("-")), None)
    try:
        build(called)(args=argv, prog_name="shortlist")
    except ShortlistError as error:
        typer.echo(f"shortlist: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        typer.echo(f"shortlist: {error.filename} can not be used: {error.strerror}; choose another place", err=True)
        sys.exit(2)
    except (SystemExit, KeyboardInterrupt) as ended:
        if isinstance(ended, SystemExit) and ended.code != INTERRUPTED:
            raise
        typer.echo("shortlist: interrupted; run the same command again to go on", err=True)
        sys.exit(INTERRUPTED)
