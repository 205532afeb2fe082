"""A dataset with events that came in since it was made: the same rows and vocabularies, new ones at their ends, and windows moved on.

    old      |------------- train ------------|--- fit ---|- valid -|--- test ---|
    new      |---------------- train -----------------|--- fit ----------|- valid -|- test -|
                                                            new events   |__________________|

Fields and actions stay as they were fitted: a value, and an action, that the first training did not see is the unknown one until the run
is trained from its log again. N old events, M new ones, U users.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from shortlist.data.dataset import SIMULATED_NOTE, Dataset, known_users_first, reordered_plan
from shortlist.data.encode import EncodedEvents, sort_events
from shortlist.data.fields import field_table, stacked
from shortlist.data.histories import Histories, Int
from shortlist.data.schema import FieldTable
from shortlist.data.sorting import dense_numbers, first_of_equal
from shortlist.data.splits import Groups, Plan, plan_of_cuts, split_requests
from shortlist.data.vocabulary import Vocabulary
from shortlist.errors import ConfigError, DataError

_MS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class NewEvents:
    """Events that came in, in any order."""

    user: pl.Series
    """[M] ids, as text or numbers."""
    item: pl.Series
    """[M] ids."""
    time_ms: Int
    """[M] milliseconds since 1970 UTC."""
    action: Sequence[str | None]
    """[M] names; None = the log's first action."""
    value: NDArray[np.float32]
    """[M] worth."""

    def __len__(self) -> int:
        return len(self.time_ms)


@dataclass(frozen=True, kw_only=True, slots=True)
class Extended:
    """The dataset with new events."""

    dataset: Dataset
    num_new: int
    """Events that were added."""
    num_repeated: int
    """Were there already: the same user, item and second."""
    num_unusable: int
    """Have an id that the run's ids can not hold: text where they are numbers."""
    num_new_users: int
    num_new_items: int
    user_before: Int
    """[U + 1] row that each user of the new dataset had in the old one; 0 = none."""


def unseen(dataset: Dataset, new: NewEvents) -> NDArray[np.bool_]:
    """bool [M]: whether an event is new to the dataset: no event of it has the same user, item and second."""
    user, item = dataset.user_ids.encode(new.user), dataset.item_ids.encode(new.item)
    return ~_among(user, item, new.time_ms // _MS, dataset.histories)


def extended(
    dataset: Dataset,
    new: NewEvents,
    *,
    valid_share: float,
    test_share: float,
    items: pl.DataFrame | None = None,
    without: Int | None = None,
    fit_from: int | None = None,
) -> Extended:
    """The dataset with new events; the newest of them are its validation and test windows, the fit window is as large as it was.

    Args:
        valid_share, test_share: of the new events.
        items: what is known of new items: `item_id` and item columns; None = nothing.
        without: rows of users whose old events are left out, such as those who asked for it.
        fit_from: seconds: the fit window begins there at the latest, however large it becomes; None = as large as it was.

    Raises:
        ConfigError: a dataset without a clock or cut in another way than by time, or one that learns from logged impressions.
        DataError: too few new events to judge by.
    """
    _check(dataset)
    user_ids = dataset.user_ids.extended(new.user, seed=dataset.config.seed)
    users = _with_users(dataset, user_ids)
    told = pl.DataFrame({"item_id": new.item.unique(maintain_order=True)})
    if items is not None:
        told = told.join(items.unique("item_id", keep="last"), on="item_id", how="left", maintain_order="left")
    grown = dataset.with_items(told)
    user, item = user_ids.encode(new.user), grown.item_ids.encode(new.item)
    usable = (user > 0) & (item > 0)
    stays = ~np.isin(dataset.histories.user_of_event, np.zeros(0, dtype=np.int64) if without is None else without)
    old = _of_more_users(dataset.histories.keep(stays), len(user_ids))
    fresh = usable & ~_among(user, item, new.time_ms // _MS, old)
    merged = _merged(dataset, old, new, user, item, np.flatnonzero(fresh), len(user_ids))
    num_old = old.num_events
    plan = _plan(
        merged.histories,
        _targets(dataset, merged),
        _cuts(dataset, old, new.time_ms[fresh] // _MS, valid_share, test_share, fit_from),
    )
    order = known_users_first(merged.histories, plan)
    moved, plan = merged.reordered(order), reordered_plan(plan, merged, order)
    context = {
        name: np.concatenate([column[stays], np.repeat(empty, fresh.sum()).astype(column.dtype)])[moved.row]
        for name, column, empty in _contexts(dataset)
    }
    is_target = _targets(dataset, moved)
    split = split_requests(
        moved.histories, plan, dataset.config, is_target=is_target, repeats=dataset.repeats, context=context
    )
    training = plan.window_of_event == 0
    known = torch.zeros(grown.num_items + 1, dtype=torch.bool)
    known[torch.from_numpy(np.unique(moved.histories.item[training]))] = True
    num_users = int(np.count_nonzero(np.bincount(moved.histories.user_of_event[training])))
    before = np.concatenate([[0], np.where(order <= len(dataset.user_ids), order, 0)]).astype(np.int64)
    made = replace(
        grown,
        user_ids=user_ids.reordered(order),
        all_users=_rows(users, order),
        histories=moved.histories,
        split=replace(split, note=_note(dataset, split.note, num_old, int(fresh.sum()))),
        plan=plan,
        event_context=context,
        space=replace(grown.space, known_items=known, num_users=num_users),
        logged=None,
    )
    return Extended(
        dataset=made,
        num_new=int(fresh.sum()),
        num_repeated=int((usable & ~fresh).sum()),
        num_unusable=int((~usable).sum()),
        num_new_users=len(user_ids) - len(dataset.user_ids),
        num_new_items=len(grown.item_ids) - len(dataset.item_ids),
        user_before=before,
    )


def _check(dataset: Dataset) -> None:
    if not dataset.space.has_clock or dataset.split.protocol != "time":
        raise ConfigError(
            f"this run is cut by {dataset.split.protocol!r} and can not be updated with new events, since only a log that is cut by time "
            "has a newest part to judge by; train it again from its log, with times and data.protocol = 'time'"
        )


def _note(dataset: Dataset, note: str, num_old: int, num_new: int) -> str:
    told = f"{note} {num_old:,} events of the run before, {num_new:,} that came in since."
    return f"{SIMULATED_NOTE}{told}" if dataset.simulated else told


# -- users and events -------------------------------------------------------------------------------------------------


def _with_users(dataset: Dataset, user_ids: Vocabulary) -> FieldTable:
    """User fields of all rows of the larger vocabulary; nothing is known of new users."""
    num_new = len(user_ids) - len(dataset.user_ids)
    fitted = dataset.schema.of("user")
    nothing = pl.DataFrame({f.column: pl.Series([None] * num_new, dtype=pl.String) for f in fitted})
    if not fitted:
        return FieldTable(dataset.all_users.num_rows + num_new)
    return stacked(dataset.all_users, field_table(fitted, nothing))


def _rows(table: FieldTable, order: Int) -> FieldTable:
    """The table with row order[i] as row i + 1."""
    rows = torch.from_numpy(np.concatenate([[0], order]).astype(np.int64))
    return FieldTable(table.num_rows, table.fields, table.gather(rows))


def _of_more_users(histories: Histories, num_users: int) -> Histories:
    """The same for more users, the new ones without events."""
    more = np.full(num_users - histories.num_users, histories.num_events, dtype=np.int64)
    return replace(histories, offsets=np.concatenate([histories.offsets, more]))


def _among(user: Int, item: Int, time: Int, old: Histories) -> NDArray[np.bool_]:
    """bool [M]: whether an event is among the old ones: the same user, item and second."""
    columns = ((old.user_of_event, user), (old.item, item), (old.time, time))
    first = first_of_equal(*(np.concatenate([np.asarray(a), b]).astype(np.int64) for a, b in columns))
    among: NDArray[np.bool_] = first[old.num_events :] < old.num_events
    return among


def _merged(
    dataset: Dataset, old: Histories, new: NewEvents, user: Int, item: Int, fresh: Int, num_users: int
) -> EncodedEvents:
    """Old and new events, sorted by the code that sorts them for training; `row` counts the old ones first, then those of `fresh`."""
    fresh_order = fresh[np.argsort(new.time_ms[fresh], kind="stable")]  # group numbers rise with time
    numbers = np.empty(len(fresh), dtype=np.int64)
    numbers[np.argsort(new.time_ms[fresh], kind="stable")] = dense_numbers(user[fresh_order], new.time_ms[fresh_order])
    default = dataset.space.actions[0] if dataset.space.actions else None
    actions = dataset.action_ids([default if name is None else name for name in new.action])
    first_new = int(old.group.max(initial=-1)) + 1
    histories, row = sort_events(
        np.concatenate([old.user_of_event, user[fresh]]),
        np.concatenate([old.item, item[fresh]]),
        np.concatenate([old.time * _MS, new.time_ms[fresh]]),
        group=np.concatenate([old.group, first_new + numbers]),
        action=np.concatenate([old.action, actions[fresh]]),
        value=np.concatenate([old.value, new.value[fresh]]),
        num_users=num_users,
        time_unit=_MS,
    )
    return EncodedEvents(histories=histories, row=row, actions=dataset.space.actions)


def _contexts(dataset: Dataset) -> list[tuple[str, NDArray[np.generic], NDArray[np.generic]]]:
    """Name, column [N] and the value [1] of an event of which nothing is known."""
    unknown = dataset.unknown_context(1)
    return [(name, np.asarray(column), unknown[name]) for name, column in dataset.event_context.items()]


def _targets(dataset: Dataset, events: EncodedEvents) -> NDArray[np.bool_]:
    """[N + M] events worth predicting."""
    wanted = dataset.config.target_actions
    if not wanted:
        return np.ones(events.histories.num_events, dtype=bool)
    return np.isin(events.histories.action, [i for i, name in enumerate(events.actions, start=1) if name in wanted])


# -- windows ----------------------------------------------------------------------------------------------------------


def _cuts(
    dataset: Dataset, old: Histories, new_time: Int, valid_share: float, test_share: float, fit_from: int | None
) -> Int:
    """[3] seconds at which fit, validation and test begin."""
    ordered = np.sort(np.concatenate([old.time, new_time]))
    newest = np.sort(new_time)
    if not len(newest):
        raise DataError("there are no new events to train on")
    valid, test = newest[
        np.floor(len(newest) * (1 - np.array([valid_share + test_share, test_share]))).astype(np.int64)
    ]
    num_fit = int(dataset.config.fit_share * len(ordered))
    fit = ordered[max(int(np.searchsorted(ordered, valid)) - num_fit, 0)]
    if fit_from is not None:
        fit = min(fit, fit_from)
    return np.array([fit, valid, test], dtype=np.int64)


def _plan(histories: Histories, is_target: NDArray[np.bool_], cuts: Int) -> Plan:
    groups = Groups.of(histories)
    has_target = np.add.reduceat(is_target.astype(np.int64), groups.start) > 0
    plan = plan_of_cuts(histories, groups, has_target, cuts)
    for window, number in (("training", 0), ("fit", 1), ("validation", 2), ("test", 3)):
        asked = plan.request_of_event == number if number else plan.window_of_event == 0
        if not asked.any():
            raise DataError(
                f"too few new events: the {window} window would be empty; wait for more, or raise update.valid_share and update.test_share"
            )
    return plan
