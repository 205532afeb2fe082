"""Logged impressions: the items a request showed, chosen or not, as candidates with labels.

    request_id  user  item  click  like          requests   ann at 10:00, with her choices before 10:00 as history
    r1          ann   a     0      0             rows       [a, b]
    r1          ann   b     1      0             labels     click [0, 1], like [0, 0]

Rows of one user and request_id are one impression; where the log has no request_id, those of one group (basket, or user and moment).
N rows of the log in the order of the histories, M of them choices, R impressions, total = shown items of all impressions end to end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from shortlist.data.encode import EncodedEvents, column_of
from shortlist.data.histories import Histories, Int, Requests
from shortlist.data.ingested import Log
from shortlist.data.jagged import Jagged
from shortlist.data.log import dense_codes
from shortlist.data.splits import Bools, Columns, Groups, Plan, Small, time_context
from shortlist.data.targets import label_columns, label_values


@dataclass(frozen=True, kw_only=True, slots=True)
class Impressions:
    """Everything that was shown, by user and then by time."""

    requests: Requests
    """R, pointing into the dataset's histories; targets are what was chosen, and may be none."""
    window: Small
    """[R]: 0 = training; 1, 2, 3 = the windows fit, valid, test."""
    rows: Jagged
    """R rows of distinct catalogue rows, total of them: what was shown."""
    labels: Mapping[str, Tensor]
    """float32 [total] by label column. The first says whether the item was chosen (0 or 1); the others are the log's own numbers, the
    largest where an item was shown twice, 0 where there is none."""

    def of(self, window: int) -> tuple[Requests, Jagged, dict[str, Tensor]]:
        """Requests, shown items and labels of one window."""
        index = np.flatnonzero(self.window == window)
        chosen = torch.from_numpy(index)
        where = self.rows.value_index(chosen)
        labels = {name: column[where] for name, column in self.labels.items()}
        return self.requests.select(index), self.rows.select(chosen), labels


def logged_impressions(
    log: Log,
    shown: EncodedEvents,
    histories: Histories,
    plan: Plan,
    *,
    label: str,
    is_choice: Bools,
    is_target: Bools,
    by_time: bool,
    context: Columns,
) -> Impressions:
    """Group the rows of a log into impressions.

    A request is made at the time of its impression's first row and reads the user's choices in groups before that one. Split by time, its
    window is that of its last row; else that of the user's last choice up to then, or of the first choice where there was none yet.

    Args:
        log: whose events `shown` was made from.
        shown: all N rows, chosen or not.
        histories: the M choices among them, in the same order.
        plan: of the choices.
        label: column that decided what a choice is; its task comes first.
        is_choice: [N] rows that stand in `histories`.
        is_target: [N] rows that were chosen and are worth predicting.
        by_time: the plan cuts by time.
        context: encoded columns [N].
    """
    groups = Groups.of(shown.histories)
    impression, first, last = _by_first_row(_impression_of_row(log, shown), groups)
    num_impressions = len(first)

    num_choices = np.concatenate([[0], np.cumsum(is_choice)])
    user = shown.histories.user_of_event[first]
    start, end = histories.offsets[user], num_choices[first]
    time = shown.histories.time[first] if log.has_clock else _places(histories, start, end)
    window = _by_choice(histories, plan, user, num_choices[last])
    if by_time:
        cuts = [plan.now["fit"], plan.now["valid"], plan.now["test"]]
        window = np.searchsorted(cuts, shown.histories.time[last - 1], side="right").astype(np.int8)

    row = np.lexsort((shown.histories.item, impression))
    item, owner = shown.histories.item[row], impression[row]
    fresh = np.ones(len(row), dtype=bool)
    fresh[1:] = (item[1:] != item[:-1]) | (owner[1:] != owner[:-1])
    opens = np.flatnonzero(fresh)
    chosen = np.maximum.reduceat(is_target[row], opens)
    worth = np.add.reduceat(np.where(is_target, shown.histories.value, 0.0)[row], opens)
    columns: dict[str, NDArray[np.generic]] = dict(time_context(time))
    by_impression = np.argsort(impression, kind="stable")
    bounds = np.searchsorted(impression[by_impression], np.arange(num_impressions))
    for name, column in context.items():
        columns[name] = np.maximum.reduceat(column[by_impression], bounds)
    requests = Requests(
        user=user,
        time=time,
        start=start,
        end=end,
        target_offsets=_offsets(owner[opens][chosen], num_impressions),
        target=item[opens][chosen],
        target_value=worth[chosen].astype(np.float32),
        context=columns,
    )
    labels = {label: torch.from_numpy(chosen.astype(np.float32))}
    for name in label_columns(log):
        if name != label:
            values = label_values(column_of(log.events, name, shown.row)).fill_null(0.0).to_numpy()
            labels[name] = torch.from_numpy(np.maximum.reduceat(values[row], opens).astype(np.float32))
    offsets = torch.from_numpy(_offsets(owner[opens], num_impressions))
    return Impressions(
        requests=requests, window=window, rows=Jagged(torch.from_numpy(item[opens]), offsets), labels=labels
    )


def _by_first_row(impression: Int, groups: Groups) -> tuple[Int, Int, Int]:
    """Impressions numbered by their first row: that of each row [N], and where the groups of its rows begin and end, [impressions]."""
    num_impressions, lengths = int(impression.max()) + 1, groups.end - groups.start
    first = np.full(num_impressions, len(impression), dtype=np.int64)
    last = np.zeros(num_impressions, dtype=np.int64)
    np.minimum.at(first, impression, np.repeat(groups.start, lengths))
    np.maximum.at(last, impression, np.repeat(groups.end, lengths))
    order = np.lexsort((np.arange(num_impressions), first))
    number = np.empty(num_impressions, dtype=np.int64)
    number[order] = np.arange(num_impressions)
    return number[impression], first[order], last[order]


def _impression_of_row(log: Log, shown: EncodedEvents) -> Int:
    """[N] dense numbers: equal for the rows of one impression. Rows without a request_id go by their group."""
    keys = log.events.select("group_id")
    if "request_id" in log.events.columns:
        group = pl.when(pl.col("request_id").is_null()).then("group_id").alias("group_id")
        keys = log.events.select("user_id", "request_id", group)
    numbers: Int = dense_codes(keys).to_numpy()[shown.row]
    return numbers


def _places(histories: Histories, start: Int, end: Int) -> Int:
    """[R] groups of choices between start[r] and end[r]: the time of a request where there is no clock."""
    opens = Groups.of(histories).start
    return np.searchsorted(opens, end) - np.searchsorted(opens, start)


def _by_choice(histories: Histories, plan: Plan, user: Int, stop: Int) -> Small:
    """[R] window of the last of the user's choices before stop[r], of the first one where there is none; 0 for users without choices."""
    start = histories.offsets[user]
    window = np.zeros(len(user), dtype=np.int8)
    has_choice = histories.offsets[user + 1] > start
    window[has_choice] = plan.window_of_event[np.maximum(stop - 1, start)[has_choice]]
    return window


def _offsets(owner: Int, num_rows: int) -> Int:
    return np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=num_rows))]).astype(np.int64)
