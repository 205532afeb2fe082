"""Options that several commands share, and how a log named on the command line is opened."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from shortlist.cascade.engine import Engine
    from shortlist.data.ingested import Log
    from shortlist.data.roles import Roles

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


def _use_threads(count: int | None) -> int | None:
    """Called when the option is read: before any work, and without loading PyTorch where it is not given."""
    if count is not None:
        import torch

        torch.set_num_threads(count)
    return count


Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        callback=_use_threads,
        help="Threads of PyTorch, LightGBM and FAISS; default: their own choice. 1 is fastest for small models on a busy machine.",
    ),
]
EventsAt = Annotated[
    str | None,
    typer.Option(
        metavar="PATH|URL",
        help="Event store of the server: a file, or postgresql://...; default: RUN.events.db where there is one.",
    ),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a trained run.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME.FIELD=VALUE",
        help="Change a setting, such as ranking.keep=50 or din.dim=64; repeat for several.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class LogOptions:
    """A log, its tables and its roles, as the command line names them. Every field is an option; `with_log` adds them to a command."""

    source: Annotated[
        str,
        typer.Argument(
            metavar="LOG",
            help="Log (CSV, Parquet, JSONL, Arrow), a folder of `shortlist ingest`, or a data set: builtin, ml-100k ...",
        ),
    ]
    items: Annotated[
        Path | None, typer.Option(help="Table of items: an id and fields such as title, price, category.")
    ] = None
    users: Annotated[Path | None, typer.Option(help="Table of users: an id and fields.")] = None
    user: Annotated[str | None, typer.Option(help="Column of the user.")] = None
    item: Annotated[str | None, typer.Option(help="Column of the item.")] = None
    timestamp: Annotated[str | None, typer.Option(help='Column of the time; "" says that there is none.')] = None
    action: Annotated[str | None, typer.Option(help="Column of the kind of event: view, click, buy.")] = None
    basket: Annotated[str | None, typer.Option(help="Column of the basket or order: its events happened together.")] = (
        None
    )
    request: Annotated[str | None, typer.Option(help="Column of the request or page view.")] = None
    position: Annotated[str | None, typer.Option(help="Column of the place on the page.")] = None
    value: Annotated[str | None, typer.Option(help='Column of the worth, or a product such as "price*quantity".')] = (
        None
    )
    bid: Annotated[str | None, typer.Option(help="Column of the bid.")] = None
    query: Annotated[str | None, typer.Option(help="Column of the query text.")] = None
    propensity: Annotated[str | None, typer.Option(help="Column of the probability with which the item was shown.")] = (
        None
    )
    label: Annotated[list[str] | None, typer.Option(help="Column of an outcome; repeat for several.")] = None
    separator: Annotated[
        str | None, typer.Option(help="Field separator of a CSV; found out where it is not given.")
    ] = None
    max_bad_share: Annotated[float, typer.Option(help="Share of bad rows above which reading stops.")] = 0.01
    quarantine: Annotated[
        Path | None, typer.Option(help="Where bad rows are kept with their reasons (Parquet or CSV).")
    ] = None

    def typed(self) -> list[str]:
        """The log with the options that were given, as they could be typed again."""
        words = [self.source]
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name != "source" and value != f.default and value is not None:
                option = f"--{f.name.replace('_', '-')}"
                words += [
                    word for one in (value if isinstance(value, list) else [value]) for word in (option, str(one))
                ]
        return words

    def roles(self, config: Roles | None = None) -> Roles | None:
        """The roles given, by flag first and then by `config`; None where none is."""
        from dataclasses import replace

        from shortlist.data.roles import Roles

        names = [f.name for f in fields(Roles) if f.name != "labels"]
        given: dict[str, Any] = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.label:
            given["labels"] = tuple(self.label)
        wanted = replace(config or Roles(), **given)
        return None if wanted == Roles() else wanted

    def open(self, default_quarantine: Path | None = None, config_roles: Roles | None = None) -> Log:
        """The log at the path, read or ingested before, or the data set of that name. Bad rows go to `quarantine`, else to
        `default_quarantine`."""
        from shortlist.data.datasets import load, names
        from shortlist.data.ingested import open_log
        from shortlist.errors import ConfigError

        if self.source in names() and not Path(self.source).exists():
            given = [f.name for f in fields(self) if f.name != "source" and getattr(self, f.name) != f.default]
            if given:
                flag = given[0].replace("_", "-")
                raise ConfigError(
                    f"{self.source} is a prepared data set, so --{flag} has no effect; leave it out or give a file"
                )
            return load(self.source)
        return open_log(
            Path(self.source),
            items=self.items,
            users=self.users,
            roles=self.roles(config_roles),
            separator=self.separator,
            quarantine=self.quarantine or default_quarantine,
            max_bad_share=self.max_bad_share,
        )


def called_as() -> str:
    """The command line that is running, as it could be typed again."""
    from shortlist.cli import ARGUMENTS

    return shlex.join(["shortlist", *ARGUMENTS.get()])


def events_at(folder: Path, given: str | None) -> Path | str | None:
    """Where a run's events are: the URL or file that is given, else the file that a server keeps beside the run, if any.

    Raises DataError where the given file is missing.
    """
    from shortlist.errors import DataError

    if given is None:
        beside = folder.with_name(f"{folder.name}.events.db")
        return beside if beside.exists() else None
    if "://" not in given and not Path(given).exists():
        raise DataError(f"{given}: no such file; give the event store that the server writes, or leave --events out")
    return given


def open_engine(run: Path, events: str | None) -> Engine:
    """The run, or what a place of runs serves now, with the events at the place given, else those that a server keeps beside it, if any."""
    from shortlist.cascade.engine import Engine
    from shortlist.store.published import served_run

    folder = run.absolute()
    return Engine.load(served_run(folder), events=events_at(folder, events))


def with_log(function: Callable[..., None]) -> Callable[..., None]:
    """A command whose first parameter is LogOptions gets all of them as options of its own."""
    own = [
        p.replace(annotation=annotation)
        for p, annotation in zip(
            list(inspect.signature(function).parameters.values())[1:], list(_hints(function).values())[1:], strict=False
        )
    ]
    hints = get_type_hints(LogOptions, include_extras=True)
    added = [
        inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if f.name == "source" else f.default,
            annotation=hints[f.name],
        )
        for f in fields(LogOptions)
    ]

    @wraps(function)
    def command(*, source: str, **values: Any) -> None:
        names = {f.name for f in fields(LogOptions)}
        log = LogOptions(source=source, **{n: v for n, v in values.items() if n in names})
        function(log, **{n: v for n, v in values.items() if n not in names})

    keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    command.__signature__ = inspect.Signature([*added, *keyword])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in [*added, *keyword]}
    del command.__wrapped__
    return command


def _hints(function: Callable[..., None]) -> dict[str, Any]:
    hints = get_type_hints(function, include_extras=True)
    return {name: hints[name] for name in inspect.signature(function).parameters}
