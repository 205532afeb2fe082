"""`shortlist recommend`: the page one user sees, or those of many in a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shortlist.cli._options import EventsAt, Quiet, open_engine
from shortlist.cli._rules import RulesFile, read_rules

if TYPE_CHECKING:
    from shortlist.cascade.answers import Answer
    from shortlist.cascade.engine import Seen


def command(
    run: Annotated[Path, typer.Argument(help="Folder that `shortlist train --out` wrote.")],
    user: Annotated[str | None, typer.Option(help="Who is asking; without it, a person without a past.")] = None,
    k: Annotated[int | None, typer.Option(help="Items on the page; default: as the run says.")] = None,
    history: Annotated[
        str | None,
        typer.Option(help="Item ids, oldest first, separated by commas, in place of the user's own history."),
    ] = None,
    events: EventsAt = None,
    rules: RulesFile = None,
    users: Annotated[
        Path | None,
        typer.Option(
            help="People whose pages go to --out: Parquet or CSV with a column user_id, or text with one id a line."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Parquet file for the pages of --users.")] = None,
    quiet: Quiet = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the page one user sees, with scores per stage, and what the user did last; or write the pages of many.

    Example: shortlist recommend RUN --user 12748 --k 10
    """
    from shortlist.cascade.engine import Seen
    from shortlist.errors import ConfigError

    if (users is None) != (out is None):
        raise ConfigError("--users and --out go together: whose pages, and the Parquet file to write them to")
    if users is not None and out is not None:
        if user is not None or history is not None:
            raise ConfigError("--user and --history have no effect on the pages of --users; leave them out")
        _write(run, events, users, out, k, rules, quiet=quiet, json_=json_)
        return
    sent = None if history is None else [item.strip() for item in history.split(",") if item.strip()]
    with open_engine(run, events) as engine:
        answer = engine.recommend(user, k, history=sent, rules=read_rules(rules))
        if sent is None:
            past = [] if user is None else engine.history(user, 10)
        else:
            newest, live = sent[:-11:-1], engine.live
            titles = [live.title(row) for row in live.items(newest).tolist()]
            past = [Seen(item_id=i, title=title, timestamp=None, action=None) for i, title in zip(newest, titles)]
    if json_:
        shown = [{name: getattr(event, name) for name in Seen.__slots__} for event in past]
        typer.echo(json.dumps({**answer.to_dict(), "history": shown}, ensure_ascii=False, indent=1))
    else:
        typer.echo("\n".join(page_lines(answer, past)))


def _write(
    run: Path,
    events: str | None,
    users: Path,
    out: Path,
    k: int | None,
    rules: Path | None,
    *,
    quiet: bool,
    json_: bool,
) -> None:
    """The pages of many as a file, and what became of them."""
    from shortlist.cascade.exports import read_users
    from shortlist.cascade.many_pages import write_pages

    ids, ruled = read_users(users), read_rules(rules)
    say = (lambda line: None) if quiet else (lambda line: typer.echo(line, err=True))
    with open_engine(run, events) as engine:
        done = write_pages(engine, ids, out, k=k, rules=ruled, say=say)
    if json_:
        typer.echo(json.dumps({name: getattr(done, name) for name in done.__slots__}, indent=1))
        return
    typer.echo(f"{done.num_rows:,} places on the pages of {done.num_users:,} users, written to {done.out}")
    if done.num_unknown_users:
        typer.echo(f"{done.num_unknown_users:,} users are unknown: pages of people without a past")
    if done.num_short:
        typer.echo(f"{done.num_short:,} pages are shorter than asked for: rules or the catalogue leave no more")
    for reason in done.degraded:
        typer.echo(f"degraded: {reason}")


def page_lines(answer: Answer, past: list[Seen]) -> Iterator[str]:
    """The page as text for a person."""
    who = "a person without a name" if answer.user is None else f"user {answer.user}"
    yield f"{who}, {answer.num_history} past events" + (", the latest:" if past else "")
    for event in past:
        when = "" if event.timestamp is None else f"{datetime.fromtimestamp(event.timestamp, UTC):%Y-%m-%d %H:%M}  "
        yield f"    {when}{_name(event.item_id, event.title)}"
    stages = [stage.stage for stage in answer.stages]
    names = [_name(item.item_id, item.title) for item in answer.items]
    width = max(map(len, names), default=0)
    yield ""
    yield f"{'':4}{'page':<{width}}  " + "  ".join(f"{stage:>12}" for stage in stages)
    for place, (item, name) in enumerate(zip(answer.items, names), start=1):
        scores = "  ".join(_score(item.scores.get(stage)) for stage in stages)
        yield f"{place:>3} {name:<{width}}  {scores}".rstrip()
    yield ""
    for stage in answer.stages:
        note = f"  PASSED OVER: {stage.degraded}" if stage.degraded else ""
        yield (
            f"{stage.stage:<12} {', '.join(stage.systems)}: {stage.num_received:,} -> {stage.num_kept:,} items, "
            f"{stage.spent_ms:.1f} ms, {stage.spent_mflop:.2f} MFLOP{note}"
        )
    if answer.degraded:
        yield f"degraded: {answer.degraded}"


def _name(item_id: str | int, title: str | None) -> str:
    text = str(item_id) if title is None else f"{item_id}  {title}"
    return text if len(text) <= 52 else f"{text[:51]}…"


def _score(score: float | None) -> str:
    return f"{score:>12.4f}" if score is not None else f"{'-':>12}"
