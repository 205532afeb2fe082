"""`shortlist replay`: what another snapshot, budget, chain or set of rules would have shown."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shortlist.cli._bar import bars
from shortlist.cli._options import EventsAt, Json, Quiet, RunFolder, Threads, events_at

if TYPE_CHECKING:
    from shortlist.cascade.rules import Rules


def command(
    run: RunFolder,
    log: Annotated[
        Path | None, typer.Option(help="Request log of the server; default: RUN.requests.db beside the run.")
    ] = None,
    events: EventsAt = None,
    day: Annotated[str | None, typer.Option(help="Requests of this day (UTC), such as 2024-05-31.")] = None,
    since: Annotated[
        str | None,
        typer.Option("--from", help="Requests from this moment on: 2024-05-31T18:00 (UTC) or seconds since 1970."),
    ] = None,
    until: Annotated[str | None, typer.Option("--to", help="Requests before this moment.")] = None,
    other: Annotated[
        Path | None, typer.Option("--run", metavar="RUN", help="Another run that is to answer them.")
    ] = None,
    budget_ms: Annotated[
        float | None,
        typer.Option(help="Milliseconds that a request may cost on average; the allocator chooses chains."),
    ] = None,
    budget_mflop: Annotated[
        float | None, typer.Option(help="1e6 FLOPs that a request may cost on average; the allocator chooses chains.")
    ] = None,
    chain: Annotated[str | None, typer.Option(help="Name of the chain that is to answer all of them.")] = None,
    rules: Annotated[
        Path | None, typer.Option(help="TOML file of rules, as under [rules], laid over those of each request.")
    ] = None,
    deny: Annotated[
        list[str] | None, typer.Option(help="Item that is not to be shown; repeat for several. Goes with --rules.")
    ] = None,
    allow: Annotated[list[str] | None, typer.Option(help="Show only this item and others so named.")] = None,
    limit: Annotated[int, typer.Option(help="Requests at most, the newest ones.")] = 1_000,
    hours: Annotated[float, typer.Option(help="Time after a request in which what its user does is counted.")] = 24.0,
    seed: Annotated[int, typer.Option(help="Of intervals and of allocators that explore.")] = 0,
    threads: Threads = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Ask logged requests again, under another snapshot, budget, chain or set of rules, and show what would be different.

    Writes RUN-report/replay.html and replay.json. Without any change it checks that pages come back as they were.

    Example: shortlist replay RUN --day 2024-05-31 --budget-ms 2
    """
    from shortlist.cascade.allocation.base import Budget
    from shortlist.cascade.request_log import RequestLog
    from shortlist.errors import ConfigError
    from shortlist.evaluation.replay import open_replay, replay
    from shortlist.evaluation.replay_page import summary_table, write_replay
    from shortlist.evaluation.replayed import WHY, Change
    from shortlist.evaluation.tables import aligned
    from shortlist.store.snapshot import read_snapshot

    if chain is not None and (budget_ms is not None or budget_mflop is not None):
        raise ConfigError("give either --chain or a budget: with a budget the allocator chooses the chain")
    since_ms, until_ms = _window(day, since, until)
    folder = run.absolute()
    read_snapshot(folder, verify=False)
    change = Change(
        run=None if other is None else other.name,
        budget=Budget(ms=budget_ms, mflop=budget_mflop),
        chain=chain,
        rules=_rules(rules, allow, deny),
    )
    path = _there(log, folder.with_name(f"{folder.name}.requests.db"), "request log", "--log")
    store = events_at(folder, events)
    with open_replay(folder if other is None else other, change, events=store, seed=seed) as engine:
        records = RequestLog(path)
        try:
            with bars(shown=not quiet) as tell:
                found = replay(
                    engine,
                    records,
                    change,
                    run=folder,
                    since_ms=since_ms,
                    until_ms=until_ms,
                    limit=limit,
                    hours=hours,
                    seed=seed,
                    tell=tell,
                )
        finally:
            records.close()
    page = write_replay(folder, found)
    if json_:
        typer.echo(json.dumps(found.as_dict(), ensure_ascii=False, indent=1))
        return
    lines = [*found.sentences, *found.notes, *(f"{n:,} requests: {WHY[reason]}." for reason, n in found.why.items())]
    typer.echo("\n".join([*aligned(summary_table(found)), "", *lines, f"The page is {page}."]))


def _there(given: Path | None, beside: Path, what: str, option: str) -> Path:
    """The file that was named, else the one beside the run; DataError where it is not there."""
    from shortlist.errors import DataError

    path = beside if given is None else given
    if not path.is_file():
        raise DataError(f"{path}: no such file; give the {what} that the server wrote with {option}")
    return path


def _rules(path: Path | None, allow: list[str] | None, deny: list[str] | None) -> Rules | None:
    """What the options say; None where they say nothing."""
    import tomllib

    from shortlist.cascade.rules import Rules
    from shortlist.cascade.settings import build
    from shortlist.errors import ConfigError

    if path is None and allow is None and deny is None:
        return None
    table = {}
    if path is not None:
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not TOML: {error}") from error
        table = table.get("rules", table)  # a run's settings have them under [rules]
    ruled = build(Rules, table, "rules")
    named = Rules(allow=None if allow is None else tuple(allow), deny=tuple(deny or ()))
    return named.over(ruled)


def _window(day: str | None, since: str | None, until: str | None) -> tuple[int | None, int | None]:
    """Milliseconds, the end excluded; ConfigError for what is no day or moment, or no window."""
    from shortlist.errors import ConfigError

    if day is not None and (since is not None or until is not None):
        raise ConfigError("give either --day, or --from and --to")
    if day is not None:
        try:
            start = datetime.combine(date.fromisoformat(day), datetime.min.time(), UTC)
        except ValueError:
            raise ConfigError(f"--day must be a day such as 2024-05-31, got {day!r}") from None
        return _ms(start), _ms(start + timedelta(days=1))
    since_ms, until_ms = _moment(since, "--from"), _moment(until, "--to")
    if since_ms is not None and until_ms is not None and until_ms <= since_ms:
        raise ConfigError(f"--to must be after --from, got {since} and {until}")
    return since_ms, until_ms


def _moment(text: str | None, option: str) -> int | None:
    from shortlist.errors import ConfigError

    if text is None:
        return None
    try:
        try:
            moment = datetime.fromtimestamp(float(text), UTC)
        except ValueError:
            moment = datetime.fromisoformat(text)
    except (ValueError, OverflowError, OSError):
        raise ConfigError(
            f"{option} must be a moment such as 2024-05-31T18:00, or seconds since 1970, got {text!r}"
        ) from None
    return _ms(moment if moment.tzinfo else moment.replace(tzinfo=UTC))


def _ms(moment: datetime) -> int:
    return round(moment.timestamp() * 1000)
