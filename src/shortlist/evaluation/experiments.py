"""What came of an experiment: its units' outcomes, variants against control with always-valid intervals, guardrails, and interleaving.

    exposures (request log) ──┐
                              ├──> one outcome per unit and metric ──> confidence sequences, checks ──> Findings
    events (event store) ─────┘

A unit's outcome is what it did within `hours` of its first page. Units whose time is not over are left out, so that every outcome is whole;
in the order of their first pages they are independent draws, which is what the intervals need (see `metrics/sequential.py` for the
formula). Each comparison has alpha / (variants - 1), so that all of an experiment's together, per metric, err with chance alpha at most.

N events, n units.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from shortlist.cascade.experiments import INTERLEAVED, Experiment, Metric
from shortlist.cascade.exposures import Exposure, defined_experiments, exposures_gone, read_exposures, read_stops
from shortlist.cascade.settings import nearest
from shortlist.cascade.trials import ALONE
from shortlist.data.log import read
from shortlist.errors import ConfigError, DataError
from shortlist.metrics.sequential import Course, Mismatch, confidence_sequence, difference, mismatch
from shortlist.store.events import EventStore

MISMATCHED = 1e-3
"""Below this p-value shares are called wrong, and nothing else that is measured can be trusted."""
_OF_PAGES = ("spent_ms", "degraded")
_HOUR_MS = 3_600_000
_PIECE = 10_000
_EVENTS = {"unit": pl.String, "item": pl.String, "time": pl.Int64, "action": pl.String, "value": pl.Float64}


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One variant, or both on one page."""

    variant: str
    share: float
    """That was set."""
    units: int
    """That saw it, whose time is over or not."""
    pages: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A variant against control in one metric."""

    variant: str
    metric: str
    control_mean: float | None
    """None without a unit."""
    variant_mean: float | None
    difference: float | None
    """Variant minus control; the interval's middle, near the difference of the means."""
    low: float | None
    """Always valid; None while too little is known for an interval."""
    high: float | None

    @property
    def is_sure(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Guarded:
    """A guardrail and a variant."""

    guardrail: str
    variant: str
    metric: str
    bad: str
    margin: float
    crossed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Preference:
    """Interleaving: whose items were taken."""

    first: str
    second: str
    taken_first: int
    """Items of pages that were taken, brought by the first team."""
    taken_second: int
    units: int
    """With any such item."""
    preference: float | None
    """Mean over units of (second - first) / (second + first): -1 = all for the first, 1 = all for the second, 0 = none."""
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """One experiment."""

    name: str
    primary: str
    hours: float
    alpha: float
    units: int
    """Whose time is over; only these are compared."""
    units_open: int
    """Whose time is not over yet."""
    units_mixed: int
    """That saw several variants, as after a change of shares; left out."""
    arms: Sequence[Arm]
    differences: Sequence[Difference]
    guardrails: Sequence[Guarded]
    mismatch: Mismatch | None
    preference: Preference | None
    stopped: str | None
    """Why it was stopped; None where it was not."""
    exposures_gone: int = 0
    """Rows of the log, of any experiment, that had to make room or were of deleted users."""

    @property
    def harm(self) -> str | None:
        """Which guardrails are crossed, as one sentence; None where none is."""
        crossed = [one for one in self.guardrails if one.crossed]
        if not crossed:
            return None
        named = ", ".join(f"{one.guardrail} by {one.variant} ({one.metric} {one.bad})" for one in crossed)
        return f"guardrail crossed: {named}"

    @property
    def sentences(self) -> list[str]:
        """What to make of it, most urgent first."""
        said = [] if self.stopped is None else [f"Stopped: {self.stopped}."]
        if self.mismatch is not None and min(self.mismatch.always_p, self.mismatch.p_value) < MISMATCHED:
            said.append(
                f"The shares are wrong (chi-square {self.mismatch.chi_square:.1f}, p = {self.mismatch.p_value:.2g}; at any time "
                f"{self.mismatch.always_p:.2g}): units were lost on the way, so no difference can be trusted. Find out where first."
            )
        if self.harm is not None:
            said.append(f"{self.harm[0].upper()}{self.harm[1:]}.")
        if self.preference is not None:
            said.append(_preference_sentence(self.preference))
        said += [_sentence(one) for one in self.differences if one.metric == self.primary]
        if self.exposures_gone:
            said.append(
                f"{self.exposures_gone:,} older pages of the log are gone: users who came before count from a later page than their first."
            )
        if self.units_mixed:
            said.append(f"{self.units_mixed:,} units saw several variants and are left out.")
        return said

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "harm": self.harm, "sentences": self.sentences}


def report(
    log: Path, events: Path | str | None, name: str | None = None, *, until_ms: int | None = None
) -> list[Findings]:
    """What came of the experiments of a request log.

    Args:
        log: request log of the server.
        events: its event store (SQLite file or postgresql:// address), or a log of events as `read` takes it; None = only what pages tell.
        name: of one experiment; None = all.
        until_ms: now, in milliseconds since 1970: units whose time ends later are not looked at; None = the newest page or event.

    Raises DataError where a file is not there or not what it should be, ConfigError where there is no such experiment.
    """
    if not Path(log).is_file():
        raise DataError(f"{log}: no such file; give the request log that the server writes")
    defined = defined_experiments(Path(log))
    if not defined:
        raise DataError(f"{log} has no experiments; give the request log of a server that ran with --experiments")
    if name is not None and name not in defined:
        raise ConfigError(f"{log} has no experiment {name!r}: {nearest(name, defined)}")
    stops, gone, found = read_stops(Path(log)), exposures_gone(Path(log)), []
    for experiment in [defined[name]] if name is not None else defined.values():
        pages = page_table(read_exposures(Path(log), experiment.name))
        happened = read_events(events, pages["unit"].unique(maintain_order=True).to_list())
        stopped = stops.get(experiment.name)
        found.append(findings(experiment, pages, happened, until_ms=until_ms, stopped=stopped, exposures_gone=gone))
    return found


def read_events(source: Path | str | None, units: Sequence[str]) -> pl.DataFrame:
    """Events of units: unit, item, time (ms), action, value. Arguments and errors as of `report`."""
    if source is None:
        return pl.DataFrame(schema=_EVENTS)
    is_address = "://" in str(source)
    if not is_address and not Path(source).is_file():
        raise DataError(f"{source}: no such file; give the event store that the server writes, or a log of events")
    if not is_address and Path(source).suffix != ".db":
        return _of_log(Path(source), units)
    store = EventStore(source if is_address else Path(source), max_per_user=1_000_000, patience_s=600.0)
    try:
        got = store.history(units)
    finally:
        store.close()
    names = np.array(units, dtype=object)[got.user].tolist()
    columns = (names, got.item, got.time_ms, got.action, got.value.astype(np.float64))
    return pl.DataFrame(dict(zip(_EVENTS, columns)), schema=_EVENTS)


def _of_log(path: Path, units: Sequence[str]) -> pl.DataFrame:
    log = read(path)
    if not log.has_clock:
        raise DataError(f"{path} has no times, so that no event can be told to have come after a page")
    columns = log.events.columns
    return log.events.select(
        unit=pl.col("user_id").cast(pl.String),
        item=pl.col("item_id").cast(pl.String),
        time=pl.col("timestamp").dt.epoch("ms"),
        action=pl.col("action").cast(pl.String) if "action" in columns else pl.lit(None, dtype=pl.String),
        value=pl.col("value").cast(pl.Float64) if "value" in columns else pl.lit(1.0),
    ).filter(pl.col("unit").is_in(list(units)))


def findings(
    experiment: Experiment,
    pages: pl.DataFrame,
    events: pl.DataFrame,
    *,
    until_ms: int | None = None,
    stopped: str | None = None,
    exposures_gone: int = 0,
) -> Findings:
    """What came of one experiment, from tables as `page_table` and `read_events` give them; see `report`."""
    newest = [value for value in (pages["at"].max(), events["time"].max()) if value is not None]
    until = until_ms if until_ms is not None else max((int(value) for value in newest), default=0)  # type: ignore[arg-type]
    window_ms = round(experiment.settings.hours * _HOUR_MS)
    units = (
        pages.group_by("unit")
        .agg(
            first=pl.col("at").min(),
            order=pl.col("number").min(),
            variant=pl.col("variant").sort_by("number").first(),
            variants=pl.col("variant").n_unique(),
        )
        .with_columns(end=pl.col("first") + window_ms)
        .sort("first", "order")
    )
    pure = units.filter(pl.col("variants") == 1)
    whole = pure.filter(pl.col("end") <= until)
    inside = pages.join(whole.select("unit", "first", "end"), on="unit").filter(pl.col("at") < pl.col("end"))
    mine = events.join(whole.select("unit", "first", "end"), on="unit").filter(
        (pl.col("time") >= pl.col("first")) & (pl.col("time") < pl.col("end"))
    )
    interleaves = experiment.settings.interleave
    differences = [] if interleaves else _differences(experiment, whole, inside, mine)
    return Findings(
        name=experiment.name,
        primary=experiment.primary,
        hours=experiment.settings.hours,
        alpha=experiment.settings.alpha,
        units=len(whole),
        units_open=len(pure) - len(whole),
        units_mixed=len(units) - len(pure),
        arms=_arms(experiment, pages, units),
        differences=differences,
        guardrails=_guardrails(experiment, differences),
        mismatch=None if interleaves else _mismatch(experiment, units),
        preference=_preference(experiment, whole, inside, mine) if interleaves else None,
        stopped=stopped,
        exposures_gone=exposures_gone,
    )


def page_table(exposures: Iterable[Exposure]) -> pl.DataFrame:
    """A row per page, numbered in the order given; pieces become columns at once, so that millions of pages fit into memory."""
    waiting, parts = iter(exposures), [_piece([])]
    while piece := list(islice(waiting, _PIECE)):
        parts.append(_piece(piece))
    return pl.concat(parts).with_row_index("number").with_columns(pl.col("number").cast(pl.Int64))


def _piece(exposures: Sequence[Exposure]) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "unit": pl.Series([e.unit for e in exposures], dtype=pl.String),
            "variant": pl.Series([e.variant for e in exposures], dtype=pl.String),
            "at": pl.Series([e.at_ms for e in exposures], dtype=pl.Int64),
            "spent_ms": pl.Series([e.spent_ms for e in exposures], dtype=pl.Float64),
            "degraded": pl.Series([float(e.degraded) for e in exposures], dtype=pl.Float64),
            "items": pl.Series([e.items for e in exposures], dtype=pl.List(pl.String)),
            "teams": pl.Series([e.teams for e in exposures], dtype=pl.List(pl.Int64)),
            "chances": pl.Series([e.chances for e in exposures], dtype=pl.List(pl.Float64)),
        }
    )


def _arms(experiment: Experiment, pages: pl.DataFrame, units: pl.DataFrame) -> list[Arm]:
    names = [INTERLEAVED] if experiment.settings.interleave else list(experiment.variants)
    num_pages = dict(pages.group_by("variant").len().iter_rows())
    num_units = dict(units.group_by("variant").len().iter_rows())
    return [
        Arm(
            variant=name,
            share=experiment.shares.get(name, 1.0),
            units=num_units.get(name, 0),
            pages=num_pages.get(name, 0),
        )
        for name in names
    ]


def _mismatch(experiment: Experiment, units: pl.DataFrame) -> Mismatch:
    known = units.filter(pl.col("variant").is_in(list(experiment.variants)))
    number_of = {name: number for number, name in enumerate(experiment.variants)}
    arms = np.array([number_of[name] for name in known["variant"]], dtype=np.int64)
    return mismatch(arms, list(experiment.shares.values()))


# -- outcomes -----------------------------------------------------------------------------------------------------


def outcomes(metric: Metric, units: pl.DataFrame, pages: pl.DataFrame, events: pl.DataFrame) -> pl.DataFrame:
    """One value per unit, in the units' order: unit, variant, value. Units that no event can be told of are left out where events count.

    Args:
        metric: what is counted.
        units: unit and variant, of those whose time is over.
        pages: of these units within their time.
        events: likewise.
    """
    if metric.of in _OF_PAGES:
        found = pages.group_by("unit").agg(value=pl.col(metric.of).mean())
        return units.join(found, on="unit", how="left", maintain_order="left").select("unit", "variant", "value")
    units = units.filter(~pl.col("unit").str.starts_with(ALONE))
    if metric.actions:
        events = events.filter(pl.col("action").is_in(list(metric.actions)))
    if metric.shown:
        shown = (
            pages.select("unit", "at", item="items").explode("item").group_by("unit", "item").agg(pl.col("at").min())
        )
        events = events.join(shown, on=["unit", "item"]).filter(pl.col("time") >= pl.col("at"))
    counted = {
        "events": pl.len().cast(pl.Float64),
        "converted": (pl.len() > 0).cast(pl.Float64),
        "value": pl.col("value").sum(),
    }[metric.of]
    found = events.group_by("unit").agg(value=counted)
    joined = units.join(found, on="unit", how="left", maintain_order="left")
    return joined.select("unit", "variant", pl.col("value").fill_null(0.0))


def _differences(
    experiment: Experiment, units: pl.DataFrame, pages: pl.DataFrame, events: pl.DataFrame
) -> list[Difference]:
    """Every metric of every variant but control."""
    found = []
    others = [name for name in experiment.variants if name != experiment.control]
    shares = experiment.shares
    for metric_name, metric in experiment.all_metrics.items():
        values = outcomes(metric, units, pages, events)
        for name in others:
            both = values.filter(pl.col("variant").is_in([experiment.control, name]))
            treated = (both["variant"] == name).to_numpy()
            value = both["value"].to_numpy()
            course = difference(
                value,
                treated,
                share=shares[name] / (shares[name] + shares[experiment.control]),
                alpha=experiment.settings.alpha / len(others),
                planned=experiment.settings.planned,
            )
            middle, low, high = _last(course)
            found.append(
                Difference(
                    variant=name,
                    metric=metric_name,
                    control_mean=float(value[~treated].mean()) if (~treated).any() else None,
                    variant_mean=float(value[treated].mean()) if treated.any() else None,
                    difference=middle,
                    low=low,
                    high=high,
                )
            )
    return found


def _last(course: Course) -> tuple[float | None, float | None, float | None]:
    """Where the sequence stands now; None for what is not known."""
    if not len(course):
        return None, None, None
    known = math.isfinite(course.high[-1])
    return float(course.mean[-1]), *((float(course.low[-1]), float(course.high[-1])) if known else (None, None))


def _guardrails(experiment: Experiment, differences: Sequence[Difference]) -> list[Guarded]:
    return [
        Guarded(
            guardrail=name,
            variant=one.variant,
            metric=one.metric,
            bad=guardrail.bad,
            margin=guardrail.margin,
            crossed=one.low is not None and one.high is not None and guardrail.crossed(one.low, one.high),
        )
        for name, guardrail in experiment.guardrails.items()
        for one in differences
        if one.metric == guardrail.metric
    ]


def taken(pages: pl.DataFrame, events: pl.DataFrame, *, within_ms: int | None = None) -> pl.DataFrame:
    """Items of pages that were taken: number of the page, unit, item, and team where pages have teams.

    An event belongs to the unit's newest page before it that showed its item, if that is not `within_ms` ago or longer; several of one
    item on one page count once.
    """
    lists = ["teams"] if (pages["teams"].list.len() > 0).all() else []
    placed = pages.select("number", "unit", "at", pl.col("items").alias("item"), *lists).explode("item", *lists)
    return (
        events.with_row_index("event")
        .join(placed, on=["unit", "item"])
        .filter(pl.col("time") >= pl.col("at"))
        .filter(True if within_ms is None else pl.col("time") < pl.col("at") + within_ms)
        .sort("number")
        .group_by("event", maintain_order=True)
        .last()
        .unique(["number", "item"])
        .select("number", "unit", "item", *lists)
    )


def _preference(experiment: Experiment, units: pl.DataFrame, pages: pl.DataFrame, events: pl.DataFrame) -> Preference:
    """Credit for each item taken goes to the team that brought it to the newest page before that showed it, once per page."""
    first, second = experiment.variants
    actions = experiment.all_metrics[experiment.primary].actions
    if actions:
        events = events.filter(pl.col("action").is_in(list(actions)))
    credits = taken(pages.filter(pl.col("teams").list.len() > 0), events)  # a page that failed has no teams
    by_unit = credits.group_by("unit").agg(
        taken_first=(pl.col("teams") == 0).sum().cast(pl.Int64),
        taken_second=(pl.col("teams") == 1).sum().cast(pl.Int64),
    )
    told = units.join(by_unit, on="unit", maintain_order="left")
    one, two = (told[name].to_numpy().astype(np.float64) for name in ("taken_first", "taken_second"))
    middle, low, high = _last(
        confidence_sequence(
            (two - one) / np.maximum(one + two, 1), alpha=experiment.settings.alpha, planned=experiment.settings.planned
        )
    )
    return Preference(
        first=first,
        second=second,
        taken_first=int(one.sum()),
        taken_second=int(two.sum()),
        units=len(told),
        preference=middle,
        low=low,
        high=high,
    )


# -- words --------------------------------------------------------------------------------------------------------


def _sentence(one: Difference) -> str:
    if one.difference is None:
        return f"Nobody's time is over yet, so nothing is known of {one.variant}."
    if one.low is None or one.high is None:
        return f"{one.variant}: {one.metric} {one.difference:+.4g} so far; too few units differ for an interval."
    sure = "higher" if one.low > 0 else "lower" if one.high < 0 else "not known to differ"
    return (
        f"{one.variant}: {one.metric} {one.difference:+.4g} [{one.low:+.4g}, {one.high:+.4g}] against control: {sure}."
    )


def _preference_sentence(one: Preference) -> str:
    if one.preference is None or one.low is None or one.high is None:
        return f"{one.units:,} units took something, too few to say whose items they prefer."
    sure = (
        f"{one.second} is preferred"
        if one.low > 0
        else f"{one.first} is preferred"
        if one.high < 0
        else "no preference known"
    )
    return f"Preference {one.preference:+.3f} [{one.low:+.3f}, {one.high:+.3f}], from {one.first} (-1) to {one.second} (+1): {sure}."
