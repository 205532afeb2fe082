"""The health of a log, in numbers and in words: what it holds, what it can serve, and what in it would fool a model.

health = check(read("events.csv"))
print("\\n".join(health.sentences()))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from shortlist.data.ingested import Ingested, Log, is_simulated
from shortlist.data.leaks import Leak, find_leaks
from shortlist.data.log import EventLog
from shortlist.data.splits import DataConfig
from shortlist.data.targets import target_rule, target_words
from shortlist.errors import DataError

REPEATS_WANTED = 0.1
"""Share of repeats from which a log is taken as one in which items already seen may be shown again."""
_SORTED = 0.9
_CORRELATED = 0.9
_FEWEST_ITEMS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """What `check` found. Counts are rows of the log unless the name says otherwise; shares lie in [0, 1]."""

    source: str
    """Path or kind of frame."""
    num_events: int
    """Usable rows."""
    num_users: int
    """Distinct users with events."""
    num_items: int
    """Distinct items with events."""
    num_groups: int
    """Groups: one per (user, basket) or (user, time)."""
    first_at: datetime | None
    """Earliest event, UTC; None without a clock."""
    last_at: datetime | None
    """Latest event, UTC."""
    time_unit: str | None
    """Unit or format of the times, as recognised."""
    events_per_user_median: float
    """Half of the users have fewer events."""
    events_per_user_p90: float
    """Nine in ten users have fewer events."""
    num_single_group_users: int
    """Users with one group: nothing of theirs can be held out."""
    density: float
    """Distinct (user, item) pairs over users times items."""
    actions: Mapping[str, int]
    """Rows per action, most frequent first."""
    repeat_share: float
    """Share of chosen (user, item, group) in which the user had chosen the item in another group before."""
    exact_duplicates: int
    """Rows equal in every column to another row, first ones not counted."""
    tied_events: int
    """Rows in groups of two or more."""
    ascending_share: float | None
    """Share of ascending item ids among neighbours inside groups; 0.5 when groups are not sorted. None without such neighbours."""
    out_of_order: int | None
    """Rows earlier than the row before of the same user; None without times."""
    first_appearance_correlation: float | None
    """Rank correlation of item id with order of first appearance; None for fewer than 20 items."""
    leaks: tuple[Leak, ...]
    """Columns that give a label or the action away."""
    num_listed_items: int | None
    """Rows of the items table; None without one."""
    items_without_events: int | None
    """Items of the table that nobody touched."""
    events_without_item: int | None
    """Rows whose item is absent from the items table."""
    events_without_user: int | None
    """Rows whose user is absent from the users table."""
    labels: tuple[str, ...]
    """Label columns."""
    target: str
    """What counts as a choice, and how to change it, in words; empty where there is no label."""
    surfaces: tuple[str, ...]
    """What the log can serve: "recommend", and "search" with queries, "ads" with bids."""
    can_order: bool
    """Events are ordered; if not, sequence systems are refused."""
    has_clock: bool
    """Times are clock times, not mere order."""
    quarantined: Mapping[str, int]
    """Rows kept aside while reading, by reason."""
    notes: tuple[str, ...]
    """What was assumed while reading."""

    @property
    def may_repeat(self) -> bool:
        """The guess whether items already seen may be shown again."""
        return self.repeat_share >= REPEATS_WANTED

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; times as ISO text."""
        plain = dataclasses.asdict(self) | {"may_repeat": self.may_repeat}
        plain["first_at"] = self.first_at.isoformat() if self.first_at else None
        plain["last_at"] = self.last_at.isoformat() if self.last_at else None
        return plain

    def sentences(self) -> list[str]:
        """What was found and what follows from it, one sentence or two each, the plain facts first."""
        return [*_facts(self), *_order_words(self), *_trap_words(self), *_table_words(self), *_use_words(self)]


def check(log: Log) -> Health:
    """Examine a log. Reads every row once or twice; single-column leaks are sought in a sample of 200,000 rows."""
    log = log.numbered() if isinstance(log, Ingested) else log
    events = log.events
    per_user = events.group_by("user_id").agg(pl.len(), groups=pl.col("group_id").n_unique())
    num_pairs = _num_distinct(events, "user_id", "item_id")
    chosen, target = _choices(log)
    num_visits = _num_distinct(chosen, "user_id", "item_id", "group_id")
    num_items = events["item_id"].n_unique()
    times = events["timestamp"] if log.has_clock else None
    found = events["item_id"].unique()
    return Health(
        source=log.source,
        num_events=events.height,
        num_users=per_user.height,
        num_items=num_items,
        num_groups=events["group_id"].n_unique(),
        first_at=_moment(times.min()) if times is not None else None,
        last_at=_moment(times.max()) if times is not None else None,
        time_unit=log.time_unit,
        events_per_user_median=float(per_user["len"].quantile(0.5, "linear") or 0.0),
        events_per_user_p90=float(per_user["len"].quantile(0.9, "linear") or 0.0),
        num_single_group_users=int((per_user["groups"] == 1).sum()),
        density=num_pairs / max(per_user.height * num_items, 1),
        actions=dict(events["action"].value_counts(sort=True).iter_rows()),
        repeat_share=1.0 - _num_distinct(chosen, "user_id", "item_id") / max(num_visits, 1),
        exact_duplicates=_num_duplicates(events),
        tied_events=int((events.select(pl.len().over("group_id")).to_series() > 1).sum()),
        ascending_share=_ascending_share(events),
        out_of_order=_num_out_of_order(events) if log.has_time else None,
        first_appearance_correlation=_first_appearance_correlation(events["item_id"]),
        leaks=find_leaks(events, log.roles.labels),
        num_listed_items=None if log.items is None else log.items.height,
        items_without_events=None if log.items is None else int((~log.items["item_id"].is_in(found.implode())).sum()),
        events_without_item=_num_absent(events, log.items, "item_id"),
        events_without_user=_num_absent(events, log.users, "user_id"),
        labels=log.roles.labels,
        target=target,
        surfaces=("recommend", *(["search"] if log.roles.query else []), *(["ads"] if log.roles.bid else [])),
        can_order=log.has_time,
        has_clock=log.has_clock,
        quarantined=dict(log.quarantined.counts),
        notes=(
            *log.notes,
            *(["simulated: a world with known truth drew this log, not people."] if is_simulated(log) else []),
        ),
    )


# -- numbers ------------------------------------------------------------------------------------------------------


def _moment(value: object) -> datetime | None:
    return value if isinstance(value, datetime) else None


def _choices(log: EventLog) -> tuple[pl.DataFrame, str]:
    """The rows that count as choices by default, and what is said of that; all rows where no sense can be made of the labels."""
    try:
        return log.events.filter(target_rule(log, DataConfig()).chosen(log.events)), target_words(log)
    except DataError as error:
        return log.events, f"What counts as a choice is not clear: {error}"


def _num_distinct(events: pl.DataFrame, *columns: str) -> int:
    return events.select(columns).unique().height


def _num_duplicates(events: pl.DataFrame) -> int:
    """By 64-bit row hashes: in five million rows a false duplicate has odds below one in a million."""
    flat = events.select(name for name, dtype in events.schema.items() if not dtype.is_nested() and name != "group_id")
    return events.height - flat.hash_rows(seed=0).n_unique()


def _num_absent(events: pl.DataFrame, table: pl.DataFrame | None, name: str) -> int | None:
    if table is None:
        return None
    return int((~events[name].is_in(table[name].implode())).sum())


def _ordinal(ids: pl.Series) -> pl.Series:
    """Ids as numbers in their natural order: integers (also when written as text) by size, other text by alphabet."""
    if ids.dtype == pl.String:
        whole = ids.cast(pl.Int64, strict=False)
        return whole if whole.null_count() == 0 else ids.rank("dense").cast(pl.Int64)
    return ids


def _ascending_share(events: pl.DataFrame) -> float | None:
    """Neighbours in file order inside a group, equal items left out."""
    ordered = pl.DataFrame({"group": events["group_id"], "item": _ordinal(events["item_id"])})
    ordered = ordered.sort("group", maintain_order=True)
    step = ordered["item"].diff().filter(ordered["group"].diff() == 0)
    step = step.filter(step != 0)
    return None if len(step) == 0 else float((step > 0).sum()) / len(step)


def _num_out_of_order(events: pl.DataFrame) -> int:
    earlier = events.select((pl.col("timestamp") < pl.col("timestamp").shift(1)).over("user_id")).to_series()
    return int(earlier.sum())


def _first_appearance_correlation(items: pl.Series) -> float | None:
    ranks = _ordinal(items.unique(maintain_order=True)).rank().to_numpy()
    if len(ranks) < _FEWEST_ITEMS:
        return None
    appearance: NDArray[np.float64] = np.arange(len(ranks), dtype=np.float64)
    return float(np.corrcoef(ranks, appearance)[0, 1])


# -- words --------------------------------------------------------------------------------------------------------


def _facts(health: Health) -> list[str]:
    words = [
        f"{health.num_events:,} events of {health.num_users:,} users on {health.num_items:,} items in {health.num_groups:,} groups "
        f"(density {health.density:.3%})."
    ]
    if health.first_at and health.last_at:
        days = (health.last_at - health.first_at).total_seconds() / 86_400
        words.append(f"From {health.first_at:%Y-%m-%d %H:%M} to {health.last_at:%Y-%m-%d %H:%M} UTC, {days:,.1f} days.")
    single = health.num_single_group_users / max(health.num_users, 1)
    words.append(
        f"The median user has {health.events_per_user_median:,.0f} events, one in ten has {health.events_per_user_p90:,.0f} or more; "
        f"{single:.0%} have a single group, so nothing of theirs can be held out."
    )
    if len(health.actions) > 1:
        kinds = ", ".join(f"{name} {count:,}" for name, count in list(health.actions.items())[:8])
        words.append(f"Actions: {kinds}. A system learns one target: say which of them it is.")
    if health.quarantined:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in health.quarantined.items())
        words.append(
            f"{sum(health.quarantined.values()):,} bad rows were kept aside ({counts}); nothing else was dropped."
        )
    return [*words, *(note[:1].upper() + note[1:] for note in health.notes)]


def _order_words(health: Health) -> list[str]:
    words = []
    if health.time_unit is None:
        words.append("There are no times: systems that need order (sequences, sessions, splits by time) are refused.")
    elif not health.has_clock:
        words.append("There is order but no clock: splits by date, time gaps and hours of the day are refused.")
    else:
        words.append(f"Times were read as {_UNIT_WORDS[health.time_unit]}.")
    if health.out_of_order:
        late = health.out_of_order / health.num_events
        words.append(
            f"{health.out_of_order:,} rows ({late:.1%}) are earlier than the row before of the same user: "
            "histories are sorted by time, so the order of the file does not count."
        )
    tied = health.tied_events / max(health.num_events, 1)
    if health.tied_events:
        words.append(
            f"{tied:.0%} of events share a group with others: no model predicts inside a group and no split cuts one."
        )
    share = health.ascending_share
    if share is not None and (share >= _SORTED or share <= 1 - _SORTED):
        way = "ascending" if share >= _SORTED else "descending"
        words.append(
            f"Inside groups items are sorted by id ({share:.0%} of neighbours ascend, 50% expected; {way}): "
            "a model that predicts inside a group would learn the sort, not the person."
        )
    elif share is not None:
        words.append(f"Inside groups items are not sorted by id ({share:.0%} of neighbours ascend, 50% expected).")
    return words


_UNIT_WORDS = {
    "s": "seconds since 1970", "ms": "milliseconds since 1970", "us": "microseconds since 1970", "ns": "nanoseconds since 1970",
    "iso": "text (UTC where no zone is given)", "date": "days without hours: events of one day are one group unless baskets say otherwise",
    "datetime": "date and time (UTC where no zone is given)",
}  # fmt: skip


def _trap_words(health: Health) -> list[str]:
    words = [health.target] if health.target else []
    answer = "yes" if health.may_repeat else "no"
    words.append(
        f"{health.repeat_share:.1%} of choices are items the user had chosen before; items may be shown again: {answer} "
        "(a guess; it is a setting of the surface)."
    )
    if health.exact_duplicates:
        words.append(
            f"{health.exact_duplicates:,} rows repeat another row in every column; they are kept and count twice."
        )
    correlation = health.first_appearance_correlation
    if correlation is not None and abs(correlation) >= _CORRELATED:
        words.append(
            f"Item ids follow the order of first appearance (rank correlation {correlation:.2f}): they tell the future. "
            "Never feed ids as numbers or break ties by id."
        )
    for leak in health.leaks:
        what = f"whether {leak.column} is missing" if leak.kind == "missing" else f"column {leak.column}"
        words.append(
            f"{what[:1].upper()}{what[1:]} gives {leak.label} away (AUC {leak.auc:.3f} alone): it was probably written after the event. "
            "Leave it out of the features."
        )
    return words


def _table_words(health: Health) -> list[str]:
    words = []
    if health.num_listed_items is None:
        words.append(
            "There is no items table: items are known by id alone, and new items cannot be placed (`--items TABLE`)."
        )
    if health.items_without_events:
        words.append(
            f"{health.items_without_events:,} of {health.num_listed_items:,} listed items have no events: they can be recommended "
            "by their fields only."
        )
    if health.events_without_item:
        words.append(
            f"{health.events_without_item:,} events are on items absent from the items table: their fields are unknown."
        )
    if health.events_without_user:
        words.append(
            f"{health.events_without_user:,} events are of users absent from the users table: their fields are unknown."
        )
    return words


def _use_words(health: Health) -> list[str]:
    missing = [
        f"{surface} needs a {role} column (`--{role} COLUMN`)"
        for surface, role in (("search", "query"), ("ads", "bid"))
        if surface not in health.surfaces
    ]
    words = [f"The log can serve: {', '.join(health.surfaces)}{'; ' if missing else ''}{', '.join(missing)}."]
    if health.can_order:
        words.append(
            "Every kind of retrieval can be trained: popularity, counts, closed forms, two-tower and sequence systems."
        )
    else:
        words.append("Popularity, counts, closed forms and two-tower systems can be trained; sequence systems cannot.")
    if not health.labels and len(health.actions) < 2:
        words.append("There is one action and no label: rankers learn it against candidates that were not chosen.")
    return words
