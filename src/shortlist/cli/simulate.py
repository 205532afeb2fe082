"""`shortlist simulate`: a log with known truth on top of a real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shortlist.cli._options import Json, LogOptions, Threads, with_log

if TYPE_CHECKING:
    import polars as pl

    from shortlist.simulation.policies import Policy
    from shortlist.simulation.world import World


@with_log
def command(
    log: LogOptions,
    out: Annotated[Path, typer.Option(help="Parquet file to write: the simulated log.")],
    requests: Annotated[int, typer.Option(min=1, help="Pages that are asked for.")] = 10_000,
    policy: Annotated[
        str, typer.Option(metavar="POLICY", help="Who makes the pages: random, popularity, best (the truth), or a RUN.")
    ] = "popularity",
    k: Annotated[int, typer.Option(min=1, help="Places of a page.")] = 10,
    explore: Annotated[float, typer.Option(help="Share of requests that get a random page.")] = 0.1,
    days: Annotated[
        float, typer.Option(help="Over how many days the requests come, most of them in the evening.")
    ] = 14.0,
    seed: Annotated[int, typer.Option(help="Of the world, the traffic and people's luck.")] = 0,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Change the world: attraction=0.2, values=pareto; repeat for several."
        ),
    ] = None,
    truth: Annotated[
        Path | None, typer.Option(help="Also write the chances behind every impression to this Parquet file.")
    ] = None,
    threads: Threads = None,
    json_: Json = False,
) -> None:
    """Make a log whose truth is known: tastes fitted on a real log, clicks by place, purchases that come later, heavy-tailed values.

    Example: shortlist simulate clicks.csv --out simulated.parquet --requests 20000 --policy random --seed 1
    """
    from shortlist.cascade.settings import build, parse_value
    from shortlist.errors import ConfigError
    from shortlist.simulation.config import WorldConfig
    from shortlist.simulation.logs import simulate
    from shortlist.simulation.traffic import DAY_S, Audience, Diurnal, arrive
    from shortlist.simulation.world import World

    values = {}
    for setting in settings or ():
        name, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting} has no value; write --set {name}=VALUE")
        values[name.strip()] = parse_value(text.strip())
    if not 0 < days < float("inf"):
        raise ConfigError(f"--days must be above 0, got {days}")
    config = build(WorldConfig, {"seed": seed, **values}, "world")
    for path in (out, truth):
        if path is not None and path.suffix != ".parquet":
            raise ConfigError(f"{path}: a simulated log is written as Parquet; give a name that ends in .parquet")
    events = log.open()
    world = World.from_log(events, config)
    arrivals = arrive(
        Diurnal(per_second=requests / (days * DAY_S)),
        Audience.by_activity(world.events_U),
        start=world.start,
        end=world.start + days * DAY_S,
        seed=seed,
        count=requests,
    )
    made = simulate(
        world, _policy(policy, world, k, explore), arrivals, seed=seed, items=events.items, users=events.users
    )
    _write(made.log.events.drop("group_id"), out)
    if truth is not None:
        _write(made.truth, truth)
    told, places = made.totals(), made.summary()
    if json_:
        typer.echo(json.dumps({"log": str(out), "policy": policy, **told, "places": places.to_dicts()}, indent=1))
        return
    typer.echo("\n".join(_lines(places, told, policy)))
    typer.echo(f"\nThe simulated log is in {out}. Next: shortlist train {out} --out RUN")


def _policy(name: str, world: World, k: int, explore: float) -> Policy:
    """The policy of that name, or of the run in that folder."""
    from shortlist.errors import ConfigError
    from shortlist.evaluation.runs import is_run
    from shortlist.simulation.policies import best, popular, uniform

    if name == "random":
        return uniform(k)
    if name in ("popularity", "best"):
        return (popular if name == "popularity" else best)(world, k, explore=explore)
    if not is_run(Path(name)):
        raise ConfigError(f"policy {name!r} is none of random, popularity, best, nor the folder of a run")
    from shortlist.cascade.policy import policy_of
    from shortlist.cascade.run import load_run

    return policy_of(load_run(Path(name)), world, k=k, explore=explore)


def _write(frame: pl.DataFrame, path: Path) -> None:
    """Beside it first, renamed when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    frame.write_parquet(part)
    part.replace(path)


def _lines(places: pl.DataFrame, told: dict[str, int | float | str], policy: str) -> list[str]:
    """The summary as text for a person."""
    from shortlist.evaluation.tables import aligned

    rows = [["place", "shown", "true click rate", "realised", "off by"]]
    rows += [
        [
            str(p["position"]),
            f"{p['impressions']:,}",
            f"{p['true_ctr']:.4f}",
            f"{p['realised_ctr']:.4f}",
            f"{p['z']:+.1f} s.e.",
        ]
        for p in places.iter_rows(named=True)
    ]
    return [
        f"Simulated: {told['requests']:,} requests answered by {policy}; a world with known truth, not people.",
        "",
        *aligned(rows),
        "",
        f"{told['clicks']:,} clicks (expected {told['expected_clicks']:,.1f}), {told['purchases']:,} purchases "
        f"(expected {told['expected_purchases']:,.1f}; {told['purchases_logged']:,} of them before the log ends).",
        f"Money per request: {told['value_per_request']:.4f}, expected {told['expected_value_per_request']:.4f}.",
    ]
