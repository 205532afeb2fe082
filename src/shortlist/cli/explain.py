"""`shortlist explain`: why a person gets each item of their page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from shortlist.cli._options import EventsAt, Json, RunFolder, open_engine

if TYPE_CHECKING:
    from shortlist.cascade.explain import Below, Explanation, Reason


def command(
    run: RunFolder,
    user: Annotated[str | None, typer.Option(help="Whose page; without it, that of a person without a past.")] = None,
    k: Annotated[int | None, typer.Option(help="Items on the page; default: as the run says.")] = None,
    history: Annotated[
        str | None,
        typer.Option(help="Item ids, oldest first, separated by commas, in place of the user's own history."),
    ] = None,
    events: EventsAt = None,
    json_: Json = False,
) -> None:
    """Say why a person gets each item: who found it, its place in every stage, the past events nearest to it.

    Example: shortlist explain RUN --user 12748 --k 5
    """
    from shortlist.cascade.explain import explain

    sent = None if history is None else [item.strip() for item in history.split(",") if item.strip()]
    with open_engine(run, events) as engine:
        told = explain(engine.traced(user, k, history=sent))
    typer.echo(
        json.dumps(told.as_dict(), ensure_ascii=False, indent=1) if json_ else "\n".join(explanation_lines(told))
    )


def explanation_lines(told: Explanation) -> Iterator[str]:
    """The explanation as text for a person."""
    who = "a person without a name" if told.user is None else f"user {told.user}"
    read = "" if told.num_read == told.num_history else f" (the newest {told.num_read} are read)"
    yield f"{who}, {told.num_history} past events{read}; a page of {len(told.items)} by the chain {told.chain!r}"
    for problem in told.degraded:
        yield f"degraded: {problem}"
    for place, item in enumerate(told.items, start=1):
        yield ""
        yield f"{place:>3}  {_name(item.item_id, item.title)}"
        yield from (f"     {line}" for line in _reason_lines(item, told))
    if told.below:
        yield ""
        yield "next, and not on the page"
        yield from (f"     {_below_line(item)}" for item in told.below)


def _reason_lines(item: Reason, told: Explanation) -> Iterator[str]:
    """What speaks for one item."""
    found = [f"{f.system} at {f.place} of {f.length} ({f.score:.4g})" for f in item.found]
    yield f"found by  {', '.join(found) or 'nobody: it fills the page'}"
    yield f"stages    {' > '.join(f'{s.stage} {s.place} of {s.kept} ({s.score:.4g})' for s in item.steps) or 'none'}"
    # A system that acts in two stages gives an item the same score in both.
    scores = {name: score for step in item.steps[1:] for name, score in step.by_system.items()}
    if scores:
        yield "scores    " + ", ".join(f"{name} {score:.4g}" for name, score in scores.items())
    if item.own.since_last is not None:
        ago = f"{item.own.since_last:,.1f} days" if told.has_clock else f"{item.own.since_last:,.0f} places"
        yield f"own past  {item.own.times} times on {item.own.groups} occasions, the last {ago} ago"
    if item.near:
        events = [f"{_when(n.timestamp)}{_name(n.item_id, n.title)} ({n.strength:.3g})" for n in item.near]
        yield f"nearest   {'; '.join(events)}  [{told.near_by}]"


def _below_line(item: Below) -> str:
    """How far it came, and by how much it fell short."""
    reached = item.reached
    lowest = "" if item.lowest_shown is None else f"; lowest shown {item.lowest_shown:.4g}"
    where = f"{reached.place} of {reached.kept} in {reached.stage} ({reached.score:.4g}{lowest})"
    return f"{_name(item.item_id, item.title)}: {where}, dropped by {item.dropped_by}"


def _when(timestamp: int | None) -> str:
    return "" if timestamp is None else f"{datetime.fromtimestamp(timestamp, UTC):%Y-%m-%d} "


def _name(item_id: str | int, title: str | None) -> str:
    return str(item_id) if title is None else f"{item_id} {title.strip()}"
