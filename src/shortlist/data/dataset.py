"""A log made ready: catalogue, histories, held-out requests and field tables, built once and read by training and serving alike.

    dataset = build_dataset(read("events.csv", items="items.csv"))
    view = dataset.view()                       what training may see
    dataset.split.test                          what is asked at the end

N events, U users, n items.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file as save_arrays
from torch import Tensor

from shortlist.data.arrays import (
    impression_arrays,
    impressions_of,
    read_arrays,
    request_arrays,
    requests_of,
    table_arrays,
    table_of,
)
from shortlist.data.encode import EncodedEvents, column_of, encode_events, events_of
from shortlist.data.fields import field_table, first_rows, stacked
from shortlist.data.histories import Histories, Int, Requests, View, ranges
from shortlist.data.impressions import Impressions, logged_impressions
from shortlist.data.infer import CANONICAL, infer_schema
from shortlist.data.ingested import Ingested, Log, is_simulated
from shortlist.data.jagged import Jagged
from shortlist.data.log import EventLog, dense_codes, k_core
from shortlist.data.manifest import read_json
from shortlist.data.schema import Categorical, Column, Field, FieldTable, Space
from shortlist.data.schema_file import Schema
from shortlist.data.splits import (
    HOURS,
    REPEAT_SHARE,
    WEEKDAYS,
    WINDOW_NUMBER,
    DataConfig,
    Plan,
    Split,
    Window,
    past_requests,
    plan_split,
    repeat_share,
    split_requests,
    time_context,
)
from shortlist.data.targets import TargetRule, target_rule
from shortlist.data.vocabulary import Id, Vocabulary
from shortlist.errors import DataError, SnapshotError

_TIME_FIELDS = (Categorical(name="hour", size=HOURS), Categorical(name="weekday", size=WEEKDAYS))
_PARTS = ("fit", "valid", "test")
SIMULATED_NOTE = "Simulated: a world with known truth drew this log, not people. "


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """All of a log as arrays. `histories` and `split` hold held-out events: training reads them through `view` alone."""

    schema: Schema
    """Fields by side with what was fitted, roles, actions."""
    space: Space
    """What systems know before training: fitted on events before the fit window."""
    item_ids: Vocabulary
    """Row of every item of the log and of the items table."""
    user_ids: Vocabulary
    """Row of every user of the log; users with training events come first."""
    all_users: FieldTable
    """User fields of rows 0..U, also of users that training does not know."""
    histories: Histories
    """ALL events; rows that `config.target_label` says were no choices stand in none."""
    split: Split
    """Held-out requests; they point into `histories`."""
    plan: Plan
    """What each event is for."""
    event_context: Mapping[str, NDArray[np.generic]]
    """Columns [N] declared as known before the event, encoded."""
    titles: list[str] | None
    """Text to show each item by, per row, "" for row 0; None where the log has no titles."""
    repeats: bool
    """True where items already seen may be shown again."""
    config: DataConfig
    """As built, "auto" settings unresolved."""
    logged: Impressions | None = None
    """What was shown, chosen or not; None where no label tells the two apart."""

    @property
    def users(self) -> FieldTable:
        """User fields of rows 0..`space.num_users`: anyone later is the unknown user to a system trained on view("fit")."""
        return first_rows(self.all_users, self.space.num_users + 1)

    @property
    def num_items(self) -> int:
        """n: items of the catalogue."""
        return self.space.num_items

    @property
    def simulated(self) -> bool:
        """A world of `shortlist.simulation` drew the log, not people."""
        return self.split.note.startswith(SIMULATED_NOTE)

    def view(self, window: Window = "fit") -> View:
        """Events before the window starts, with the users and items known by then; "end" = all events.

        Rows and field vocabularies are the same in all views; only `num_users` and `known_items` grow.
        """
        if window not in WINDOW_NUMBER:
            raise DataError(f"there is no window {window!r}; choose from {', '.join(WINDOW_NUMBER)}")
        return self._view(self._seen(window), self.plan.now[window])

    def view_before(self, moment: int) -> View:
        """Events before a moment (seconds) of the fit window or earlier, for logs cut by time; users and items known by then.

        DataError for a later moment, or where the log is not cut by time.
        """
        if self.split.protocol != "time" or not self.space.has_clock or moment > self.plan.now["valid"]:
            raise DataError("view_before reads a log that is cut by time, up to the validation window")
        return self._view(self._seen("valid") & (self.histories.time < moment), moment)

    def _view(self, seen: NDArray[np.bool_], now: int) -> View:
        kept = self.histories.keep(seen)
        known = torch.zeros(self.num_items + 1, dtype=torch.bool)
        known[torch.from_numpy(np.unique(kept.item))] = True
        active = np.flatnonzero(np.diff(kept.offsets))
        num_users = int(active.max(initial=0))
        return View(
            histories=replace(kept, offsets=kept.offsets[: num_users + 2]),
            space=replace(self.space, known_items=known, num_users=num_users),
            users=first_rows(self.all_users, num_users + 1),
            now=now,
            repeats=self.repeats,
        )

    def past_requests(
        self, window: Window = "fit", *, min_history: int = 0, max_per_user: int | None = None, seed: int = 0
    ) -> Requests:
        """Every group of view(window) as a request with all its context; the requests point into that view's histories."""
        seen = self._seen(window)
        return past_requests(
            self.histories.keep(seen),
            min_history=min_history,
            max_per_user=max_per_user,
            seed=seed,
            repeats=self.repeats,
            context={name: column[seen] for name, column in self.event_context.items()},
        )

    def impressions(self, window: Window = "fit") -> tuple[Requests, Jagged, dict[str, Tensor]]:
        """What the log's own pages showed in a window, whether chosen or not; see `data/impressions.py`.

        Returns: R requests that point into `histories` (their targets, what was chosen, may be none), R rows of shown catalogue rows, and
        the labels float32 [total] by column, first the one that says what was chosen.

        Raises DataError: no label decides what was chosen, or the window has no impression.
        """
        if self.logged is None:
            raise DataError(
                "the log has no impressions: every row is a choice. Name the column that tells clicked from shown with "
                "`data.target_label`"
            )
        if window not in _PARTS:
            raise DataError(f"impressions are those of a window: {', '.join(_PARTS)}; got {window!r}")
        found = self.logged.of(WINDOW_NUMBER[window])
        if not len(found[0]):
            raise DataError(f"the {window} window has no impression; choose another protocol or larger shares")
        return found

    def requests_for(
        self,
        users: Sequence[Id | None],
        *,
        rows: Int | None = None,
        at: int | Sequence[int] | Int | None = None,
        histories: Histories | None = None,
        spans: tuple[Int, Int] | None = None,
        context: Mapping[str, Sequence[Any]] | None = None,
    ) -> tuple[Histories, Requests]:
        """Requests without targets, for serving: B users, each with what is known of them at the moment `at`.

        Args:
            users: [B] ids; unknown ones are row 0.
            rows: [B] their rows, where the caller has looked them up already.
            at: seconds, one or [B]; later events are not read. None = one second after each history's last event.
            histories: user row i + 1 = the past of users[i], made with `sort_events`; None = what the log says.
            spans: [B] first event of each user's past in `histories`, and [B] one past its last, in place of their rows: so a past can be
                read where it stands.
            context: raw values [B] of declared context columns; missing ones are unknown.

        Returns: the histories that the requests point into, and B requests.
        """
        rows = self.user_ids.encode(users) if rows is None else rows
        past = self._pasts(rows) if histories is None else histories
        if spans is None and past.num_users != len(rows):
            raise DataError(
                f"{len(rows)} users were asked for, histories of {past.num_users} were given; give one history per user"
            )
        start, end = (past.offsets[1:-1], past.offsets[2:]) if spans is None else spans
        last = np.asarray(past.time)[end - 1] if past.num_events else np.zeros(len(rows), dtype=np.int64)
        if at is None or not self.space.has_clock:
            # Without a clock a moment is a place in the user's order: all that was given has happened.
            time = np.where(end > start, last, self.plan.now["end"] - 1) + 1
        else:
            time = np.full(len(rows), at, dtype=np.int64)
            if (last > time).any():
                index, lengths = ranges(start, end)
                owner = np.repeat(np.arange(len(rows)), lengths)
                end = start + np.bincount(owner[past.time[index] <= time[owner]], minlength=len(rows))
        requests = Requests(
            user=rows,
            time=time,
            start=start,
            end=end,
            target_offsets=np.zeros(len(rows) + 1, dtype=np.int64),
            target=np.zeros(0, dtype=np.int64),
            target_value=np.zeros(0, dtype=np.float32),
            context={**time_context(time), **self._context(context or {}, len(rows))},
        )
        return past, requests

    def action_ids(self, actions: Sequence[str | None]) -> Int:
        """int64 [n] action ids; 0 for actions that training has not seen."""
        number = {name: i for i, name in enumerate(self.space.actions, start=1)}
        return np.array([number.get(name or "", 0) for name in actions], dtype=np.int64)

    def with_items(self, frame: pl.DataFrame) -> Dataset:
        """The same with the new items of `frame` (`item_id` and any of the item columns) at the end of the catalogue, as not known.

        Items that the catalogue has already stay as they are. DataError where `item_id` is missing or repeated.
        """
        if "item_id" not in frame.columns:
            raise DataError(f"new items need a column 'item_id'; found {', '.join(frame.columns)}")
        if frame["item_id"].null_count() or frame["item_id"].n_unique() != frame.height:
            raise DataError("new items: every row needs its own 'item_id'; some are missing or repeated")
        item_ids = self.item_ids.extended(frame["item_id"], seed=self.config.seed)
        num_new = len(item_ids) - len(self.item_ids)
        if not num_new:
            return self
        row = item_ids.encode(frame["item_id"])
        fresh = frame.with_columns(row=pl.Series(row)).filter(pl.col("row") > len(self.item_ids)).sort("row")
        fitted = self.schema.of("item")
        absent = {f.column for f in fitted} - set(fresh.columns)
        fresh = fresh.with_columns(pl.lit(None).alias(column) for column in sorted(absent))
        items = stacked(self.space.items, field_table(fitted, fresh))
        known = torch.cat([self.space.known_items, torch.zeros(num_new, dtype=torch.bool)])
        titles = self.titles
        if titles is not None:
            shown = (
                fresh[self.schema.title]
                if self.schema.title in fresh.columns
                else pl.Series([None] * num_new, dtype=pl.String)
            )
            titles = titles + shown.cast(pl.String).fill_null("").to_list()
        return replace(
            self, item_ids=item_ids, titles=titles, space=replace(self.space, items=items, known_items=known)
        )

    def save(self, folder: Path) -> None:
        """Write to `folder`, beside it first and renamed when complete: TOML, JSON, Parquet, safetensors and npy."""
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        _write(self, part)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)

    @classmethod
    def load(cls, folder: Path) -> Dataset:
        """From a folder of `save`, histories memory-mapped. SnapshotError names a missing or damaged file, DataError a wrong field."""
        return _read(folder)

    def _seen(self, window: Window) -> NDArray[np.bool_]:
        return self.plan.window_of_event < WINDOW_NUMBER[window]

    def _pasts(self, rows: Int) -> Histories:
        """The log's events of the users [B] as histories of B users; none for row 0."""
        index = events_of(self.histories, rows)
        lengths = self.histories.offsets[rows + 1] - self.histories.offsets[rows]
        arrays = {f.name: getattr(self.histories, f.name)[index] for f in fields(Histories) if f.name != "offsets"}
        return Histories(offsets=np.concatenate([[0, 0], np.cumsum(lengths)]).astype(np.int64), **arrays)

    def unknown_context(self, num_rows: int) -> dict[str, NDArray[np.generic]]:
        """Declared context columns [num_rows] of events of which nothing is known."""
        return self._context({}, num_rows)

    def _context(self, given: Mapping[str, Sequence[Any]], num_rows: int) -> dict[str, NDArray[np.generic]]:
        declared = {f.column: f for f in self.schema.of("context")}
        for name in given:
            if name not in declared:
                raise DataError(f"{name!r} is no context field; this dataset has {', '.join(declared) or 'none'}")
        columns = {}
        for name, f in declared.items():
            values = pl.Series(name, given.get(name, [None] * num_rows), strict=False)
            if len(values) != num_rows:
                raise DataError(f"context {name!r} has {len(values)} values for {num_rows} requests; give one each")
            columns[f.name] = _array(f.encode(values))
        return columns


# -- build --------------------------------------------------------------------------------------------------------


def build_dataset(log: Log, config: DataConfig | None = None) -> Dataset:
    """Cut, number, fit and encode a log. Everything that is learned is learned from events before the fit window.

    An ingested log is read column by column; with a k-core, another seed than its own, or groups of single events, as a whole.

    Raises DataError where a part of the split would be empty, or a column, label or action named in the config does not exist.
    """
    config = config or DataConfig()
    _check(log, config)
    single = config.protocol == "leave-last-out-as-published"
    if isinstance(log, Ingested) and (config.kcore or single or config.seed != log.seed):
        log = log.in_memory()
    if config.kcore and isinstance(log, EventLog):
        log = _core(log, target_rule(log, config), config.kcore)
    rule = target_rule(log, config)
    used = config
    if config.protocol == "time" and not log.has_clock:
        used = replace(config, protocol="last-group")
    if isinstance(log, Ingested):
        item_ids, user_ids, shown = log.item_ids, log.user_ids, log.encoded
    else:
        tables = [frame["item_id"] for frame in (log.events, log.items) if frame is not None]
        item_ids = Vocabulary.build(*tables, seed=config.seed)
        user_ids = Vocabulary.build(log.events["user_id"], seed=config.seed)
        shown = encode_events(log, item_ids, user_ids, single=single, seed=config.seed)
    events = shown
    if rule.label is not None:
        events = shown.keep(_choices(log, rule, shown), has_clock=log.has_clock)
    plan = plan_split(events.histories, used, _targets(events, config), order_known=log.has_time)
    users = known_users_first(events.histories, plan)
    user_ids, events, plan = user_ids.reordered(users), events.reordered(users), reordered_plan(plan, events, users)

    training = plan.window_of_event == 0
    num_users = int(np.count_nonzero(np.bincount(events.histories.user_of_event[training])))
    known_items = np.zeros(len(item_ids) + 1, dtype=bool)
    known_items[events.histories.item[training]] = True
    schema, item_frame, user_frame = infer_schema(log, config.context, events, training, item_ids, user_ids)
    actions = _training_actions(events, training)
    histories = replace(events.histories, action=actions.row_of[events.histories.action])
    schema = replace(schema, actions=actions.names)

    event_context = {
        f.name: _array(f.encode(column_of(log.events, f.column, events.row))) for f in schema.of("context")
    }
    repeats = repeat_share(histories) > REPEAT_SHARE if config.repeats == "auto" else config.repeats == "yes"
    split = split_requests(
        histories, plan, used, is_target=_targets(events, config), repeats=repeats, context=event_context
    )
    split = replace(split, note=f"{SIMULATED_NOTE if is_simulated(log) else ''}{_note(split.note, config, used, rule)}")
    space = Space(
        items=field_table(schema.of("item"), item_frame),
        known_items=torch.from_numpy(known_items),
        num_users=num_users,
        user_fields=tuple(f.field for f in schema.of("user")),
        context_fields=_context_fields(schema),
        actions=actions.names,
        has_clock=log.has_clock,
    )
    titles = None
    if schema.title is not None:
        titles = ["", *item_frame[schema.title].cast(pl.String).fill_null("").to_list()]
    return Dataset(
        schema=schema,
        space=space,
        item_ids=item_ids,
        user_ids=user_ids,
        all_users=field_table(schema.of("user"), user_frame),
        histories=histories,
        split=split,
        plan=plan,
        event_context=event_context,
        titles=titles,
        repeats=repeats,
        config=config,
        logged=_logged(log, rule, shown.reordered(users), histories, plan, used, schema) if rule.label else None,
    )


def _choices(log: Log, rule: TargetRule, shown: EncodedEvents) -> NDArray[np.bool_]:
    """[N] in the order of the encoded events: the row is a choice."""
    chosen: NDArray[np.bool_] = rule.chosen(log.events).to_numpy()[shown.row]
    return chosen


def _logged(
    log: Log,
    rule: TargetRule,
    shown: EncodedEvents,
    histories: Histories,
    plan: Plan,
    used: DataConfig,
    schema: Schema,
) -> Impressions:
    assert rule.label is not None
    is_choice = _choices(log, rule, shown)
    return logged_impressions(
        log,
        shown,
        histories,
        plan,
        label=rule.label,
        is_choice=is_choice,
        is_target=is_choice & _targets(shown, used),
        by_time=used.protocol == "time",
        context={f.name: _array(f.encode(column_of(log.events, f.column, shown.row))) for f in schema.of("context")},
    )


def _core(log: EventLog, rule: TargetRule, k: int) -> EventLog:
    """Users and items with at least k choices each, and what was shown of those items to those users."""
    if rule.label is None:
        return k_core(log, k)
    kept = k_core(replace(log, events=log.events.filter(rule.chosen(log.events))), k)
    events = log.events
    for name in ("user_id", "item_id"):
        events = events.join(kept.events.select(name).unique(), on=name, how="semi", maintain_order="left")
    return replace(kept, events=events.with_columns(dense_codes(events.select("group_id"))))


def _note(note: str, config: DataConfig, used: DataConfig, rule: TargetRule) -> str:
    clock = "" if used is config else "The log has no clock, so it can not be split by time. "
    core = f" Only users and items with at least {config.kcore} events, held-out ones counted." if config.kcore else ""
    return f"{clock}{note}{core} {rule.note}".rstrip()


def _check(log: Log, config: DataConfig) -> None:
    for name in config.context:
        if name not in log.events.columns or name in CANONICAL - {"query", "position", "bid"}:
            others = [column for column in log.events.columns if column not in CANONICAL]
            raise DataError(
                f"context column {name!r} is not among the columns of the events: {', '.join(others) or 'none'}"
            )
    if config.target_actions:
        actions = log.events["action"].unique().to_list()
        for action in config.target_actions:
            if action not in actions:
                raise DataError(
                    f"target action {action!r} does not occur in the log; its actions are {', '.join(sorted(actions))}"
                )


def _targets(events: EncodedEvents, config: DataConfig) -> NDArray[np.bool_]:
    """[N]: events whose action is worth predicting. `events` has the action ids of the whole log."""
    if not config.target_actions:
        return np.ones(events.histories.num_events, dtype=bool)
    wanted = [i for i, name in enumerate(events.actions, start=1) if name in config.target_actions]
    return np.isin(events.histories.action, wanted)


def known_users_first(histories: Histories, plan: Plan) -> Int:
    """[U] user rows in their new order: those of the training events first, then those the fit window adds, and so on."""
    start, filled = histories.offsets[1:-1], np.diff(histories.offsets[1:]) > 0
    # Windows never fall within a user, so the first event tells when the user becomes known; users who only were shown things never do.
    known_from = np.full(len(start), max(WINDOW_NUMBER.values()), dtype=np.int8)
    known_from[filled] = plan.window_of_event[start[filled]]
    return np.argsort(known_from, kind="stable") + 1


def reordered_plan(plan: Plan, events: EncodedEvents, users: Int) -> Plan:
    """The plan of `events.reordered(users)`."""
    order = events_of(events.histories, users)
    return replace(plan, window_of_event=plan.window_of_event[order], request_of_event=plan.request_of_event[order])


@dataclass(frozen=True, slots=True)
class _Actions:
    names: tuple[str, ...]
    row_of: Int
    """New id of each old one; 0 for actions without training events."""


def _training_actions(events: EncodedEvents, training: NDArray[np.bool_]) -> _Actions:
    occurs = np.bincount(events.histories.action[training], minlength=len(events.actions) + 1) > 0
    occurs[0] = False
    names = tuple(name for name, seen in zip(events.actions, occurs[1:]) if seen)
    return _Actions(names, np.where(occurs, np.cumsum(occurs), 0).astype(np.int64))


def _context_fields(schema: Schema) -> tuple[Field, ...]:
    declared = tuple(f.field for f in schema.of("context"))
    names = {f.name for f in declared}
    clock = tuple(f for f in _TIME_FIELDS if f.name not in names) if schema.has_clock else ()
    return (*clock, *declared)


def _array(column: Column) -> NDArray[np.generic]:
    if isinstance(column, Jagged):
        raise DataError("a ragged column can not be context")
    array: NDArray[np.generic] = column.numpy()
    return array


# -- save and load ------------------------------------------------------------------------------------------------


def _write(dataset: Dataset, folder: Path) -> None:
    dataset.schema.save(folder)
    dataset.item_ids.save(folder / "items.parquet")
    dataset.user_ids.save(folder / "users.parquet")
    dataset.histories.save(folder / "histories")
    for name, table in (("item_fields", dataset.space.items), ("user_fields", dataset.all_users)):
        save_arrays(table_arrays(table), folder / f"{name}.safetensors")
    for part in _PARTS:
        save_arrays(request_arrays(getattr(dataset.split, part)), folder / f"{part}.safetensors")
    events = {"window": dataset.plan.window_of_event, "request": dataset.plan.request_of_event}
    events |= {f"context.{name}": np.ascontiguousarray(column) for name, column in dataset.event_context.items()}
    save_arrays({**events, "known_items": dataset.space.known_items.numpy()}, folder / "events.safetensors")
    if dataset.logged is not None:
        save_arrays(impression_arrays(dataset.logged), folder / "logged.safetensors")
    if dataset.titles is not None:
        pl.DataFrame({"title": dataset.titles}).write_parquet(folder / "titles.parquet")
    about = {
        "config": asdict(dataset.config),
        "repeats": dataset.repeats,
        "logged": None if dataset.logged is None else list(dataset.logged.labels),
        "num_users": dataset.space.num_users,
        "split": {"protocol": dataset.split.protocol, "note": dataset.split.note},
        "plan": {"now": dict(dataset.plan.now), "note": dataset.plan.note},
    }
    (folder / "dataset.json").write_text(json.dumps(about, indent=2, ensure_ascii=False), encoding="utf-8")


def _read(folder: Path) -> Dataset:
    schema = Schema.load(folder)
    path = folder / "dataset.json"
    about = read_json(path, remedy="restore the snapshot or train again")
    try:
        settings = {**about["config"], **{key: tuple(about["config"][key]) for key in ("target_actions", "context")}}
        config = DataConfig(**settings)
    except (ValueError, KeyError, TypeError) as error:
        raise SnapshotError(f"{path} is damaged ({error!r}); restore the snapshot or train again") from error
    events = read_arrays(folder / "events.safetensors")
    items = table_of(schema.of("item"), read_arrays(folder / "item_fields.safetensors"))
    users = table_of(schema.of("user"), read_arrays(folder / "user_fields.safetensors"))
    schema.check("item", items)
    schema.check("user", users)
    space = Space(
        items=items,
        known_items=torch.from_numpy(events["known_items"]),
        num_users=about["num_users"],
        user_fields=tuple(f.field for f in schema.of("user")),
        context_fields=_context_fields(schema),
        actions=schema.actions,
        has_clock=schema.has_clock,
    )
    titles_path = folder / "titles.parquet"
    try:
        titles = pl.read_parquet(titles_path)["title"].to_list() if schema.title is not None else None
    except (OSError, pl.exceptions.PolarsError) as error:
        raise SnapshotError(
            f"{titles_path} is missing or damaged ({error}); restore the snapshot or train again"
        ) from error
    labels: list[str] | None = about.get("logged")
    parts = {part: requests_of(read_arrays(folder / f"{part}.safetensors")) for part in _PARTS}
    return Dataset(
        schema=schema,
        space=space,
        item_ids=Vocabulary.load(folder / "items.parquet"),
        user_ids=Vocabulary.load(folder / "users.parquet"),
        all_users=users,
        histories=Histories.load(folder / "histories"),
        split=Split(protocol=about["split"]["protocol"], note=about["split"]["note"], **parts),
        plan=Plan(window_of_event=events["window"], request_of_event=events["request"], **about["plan"]),
        event_context={name.removeprefix("context."): a for name, a in events.items() if name.startswith("context.")},
        titles=titles,
        repeats=about["repeats"],
        config=config,
        logged=None if labels is None else impressions_of(read_arrays(folder / "logged.safetensors"), labels),
    )
