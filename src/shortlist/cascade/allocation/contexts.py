"""What is known of a request before any stage acts: the features by which an allocator tells what a request is worth.

They are made from the batch that the cascade itself gets, in calibration and in serving by this code, so they can not skew. Those that
a log can not have (a time of day without a clock, money where all is worth 1) are the same for all requests, and standardised to 0.

R requests, F features, N events of the whole batch end to end, n items (row 0 = no item).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from shortlist.cascade.allocation.base import Float, Int
from shortlist.data.batches import Batch
from shortlist.errors import DataError

CONTEXT_NAMES = (
    "known user",
    "has history",
    "log events",
    "log distinct items",
    "distinct share",
    "repeated share",
    "log visits",
    "log days since",
    "log days between",
    "overdue",
    "log days known",
    "log events of a week",
    "log mean value",
    "log value",
    "log newest value",
    "mean popularity",
    "newest popularity",
    "hour sin",
    "hour cos",
    "weekday sin",
    "weekday cos",
)
"""F features in their order; "log" is log(1 + x), days are real numbers, a visit is a group of events that happened together.

known user               1 where training knew the user, else 0
has history              1 where there is at least one event, else 0; all features of an empty history are 0
distinct share           distinct items of the history / its events
repeated share           distinct items that stand in it more than once / distinct items
days since               from the newest event to the request
days between             from the first event to the newest one / (visits - 1); 0 for a single visit
overdue                  log days since - log days between
days known               from the first event to the request
events of a week         events of the seven days before the request
mean value, value        of the events: their mean, their sum; below 0 counts as 0
newest value             sum over the newest visit
mean popularity          mean over the history of log(1 + how often the item was chosen in all)
newest popularity        the same over the newest visit
hour, weekday            of the request, UTC, on a circle
"""
F = len(CONTEXT_NAMES)
YES_OR_NO = [CONTEXT_NAMES.index(name) for name in ("known user", "has history")]
MOST = 4.0
"""Standardised features are cut at so many deviations, so that no request is far outside of what calibration saw."""
_DAY = 86_400.0


def raw_contexts(batch: Batch, popularity_N: Float, *, has_clock: bool) -> Float:
    """The features of a batch's requests before they are standardised.

    Args:
        batch: requests, as the cascade gets them; candidates are not looked at.
        popularity_N: float64 [n + 1] log(1 + number of events) of every item.
        has_clock: whether times are seconds; without, everything that is made of them is 0.

    Returns float64 [R, F], finite.
    """
    history = batch.history
    offsets, items = _numpy(history.items.offsets), _numpy(history.items.values)
    num_R = np.diff(offsets)
    request_N = np.repeat(np.arange(len(num_R)), num_R)
    filled_R, first_R, newest_R = num_R > 0, offsets[:-1], np.maximum(offsets[1:] - 1, 0)
    some_R = np.maximum(num_R, 1)

    def summed(column_N: Float | NDArray[np.bool_]) -> Float:
        """[R] sum over each request's events."""
        return np.bincount(request_N, weights=column_N, minlength=len(num_R)).astype(np.float64, copy=False)

    def at(column_N: Int, place_R: Int) -> Int:
        """[R] the column at a place of each history; 0 where that is empty."""
        padded_N = np.append(column_N, 0)  # an empty history at the end of the batch begins behind the last event
        return np.where(filled_R, padded_N[place_R], 0)

    distinct_R, repeated_R = _distinct(request_N, items, len(num_R))
    group_N, time_N = _numpy(history.group), _numpy(history.time)
    opens_N = np.ones(len(items), dtype=bool)
    opens_N[1:] = (group_N[1:] != group_N[:-1]) | (request_N[1:] != request_N[:-1])
    visits_R = summed(opens_N)
    in_newest_N = group_N == at(group_N, newest_R)[request_N]
    value_N = np.maximum(_numpy(history.value).astype(np.float64), 0.0)
    value_R, popularity_of_N = summed(value_N), popularity_N[items]

    columns = [
        _numpy(batch.user) > 0,
        filled_R,
        np.log1p(num_R),
        np.log1p(distinct_R),
        distinct_R / some_R,
        repeated_R / np.maximum(distinct_R, 1),
        np.log1p(visits_R),
        *_moments(batch, request_N, visits_R, at(time_N, first_R), at(time_N, newest_R), has_clock),
        np.log1p(value_R / some_R),
        np.log1p(value_R),
        np.log1p(summed(value_N * in_newest_N)),
        summed(popularity_of_N) / some_R,
        summed(popularity_of_N * in_newest_N) / np.maximum(summed(in_newest_N), 1),
        *_clock(_numpy(batch.time), has_clock),
    ]
    return np.stack(columns, 1).astype(np.float64)


def _moments(
    batch: Batch, request_N: Int, visits_R: Float, first_R: Int, newest_R: Int, has_clock: bool
) -> list[Float]:
    """Features of the times of a history, whose first and newest are given: days since, between, overdue, known, events of a week."""
    if not has_clock:
        return [np.zeros(batch.size)] * 5
    now_R = _numpy(batch.time)
    filled_R = visits_R > 0
    since_R, known_R = (np.where(filled_R, np.maximum(now_R - then_R, 0) / _DAY, 0.0) for then_R in (newest_R, first_R))
    between_R = np.maximum(known_R - since_R, 0.0) / np.maximum(visits_R - 1, 1)
    is_late_N = _numpy(batch.history.time) > now_R[request_N] - 7 * _DAY
    week_R = np.bincount(request_N, weights=is_late_N, minlength=batch.size)
    since, between = np.log1p(since_R), np.log1p(between_R)
    return [since, between, since - between, np.log1p(known_R), np.log1p(week_R)]


def _clock(time_R: Int, has_clock: bool) -> list[Float]:
    """Hour and weekday of the request on a circle: sine and cosine each."""
    if not has_clock:
        return [np.zeros(len(time_R))] * 4
    day_R = time_R / _DAY
    hour_R = 2 * np.pi * (day_R % 1.0)
    weekday_R = 2 * np.pi / 7 * ((np.floor(day_R) + 3) % 7)  # 1 January 1970 was a Thursday; Monday = 0
    return [np.sin(hour_R), np.cos(hour_R), np.sin(weekday_R), np.cos(weekday_R)]


def _distinct(request_N: Int, items_N: Int, num_requests: int) -> tuple[Int, Int]:
    """[R] distinct items of each request, and those that it holds more than once."""
    if not len(items_N):
        return np.zeros(num_requests, dtype=np.int64), np.zeros(num_requests, dtype=np.int64)
    width = int(items_N.max()) + 1
    key_N = np.sort(request_N * width + items_N)
    is_first_N = np.ones(len(key_N), dtype=bool)
    is_first_N[1:] = key_N[1:] != key_N[:-1]
    # The second of equal ones stands behind a first: each repeated item is counted once.
    is_second_N = np.zeros(len(key_N), dtype=bool)
    is_second_N[1:] = ~is_first_N[1:] & is_first_N[:-1]
    owner_N = key_N // width
    return (
        np.bincount(owner_N[is_first_N], minlength=num_requests),
        np.bincount(owner_N[is_second_N], minlength=num_requests),
    )


def _numpy(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.cpu().numpy()
    return array


@dataclass(frozen=True, kw_only=True)
class Contexts:
    """Makes standardised features of requests; what it knows is measured once, at calibration, and saved with the allocator."""

    mean_F: Float
    scale_F: Float
    """Standard deviation of each feature; infinite where it was the same for all requests, which makes it 0."""
    popularity_N: Float
    """[n + 1] log(1 + number of events) of every item."""
    has_clock: bool

    def __post_init__(self) -> None:
        for name in ("mean_F", "scale_F"):
            if getattr(self, name).shape != (F,):
                raise DataError(
                    f"contexts have {F} features, but {name} speaks of {getattr(self, name).shape}; calibrate again"
                )

    def __call__(self, batch: Batch) -> NDArray[np.float32]:
        """float32 [R, F] of a batch's requests, finite, within `MOST` deviations."""
        raw_RF = raw_contexts(batch, self.popularity_N, has_clock=self.has_clock)
        standard_RF = (raw_RF - self.mean_F) / self.scale_F
        return np.clip(standard_RF, -MOST, MOST).astype(np.float32)

    @classmethod
    def measured(cls, batches: Iterable[Batch], popularity_N: Float, *, has_clock: bool) -> Contexts:
        """Means and deviations of the requests of all batches; DataError where there is none."""
        parts = [raw_contexts(batch, popularity_N, has_clock=has_clock) for batch in batches]
        if not sum(len(part) for part in parts):
            raise DataError("no request to measure contexts on; give calibration a longer validation window")
        raw_RF = np.concatenate(parts)
        mean_F, deviation_F = raw_RF.mean(0), raw_RF.std(0)
        varies_F = deviation_F > 1e-9 * (1 + np.abs(mean_F))
        scale_F = np.where(varies_F, deviation_F, np.inf)
        # Yes or no stays 1 or -1: who is new must be told apart in serving even where calibration met nobody who is.
        mean_F[YES_OR_NO] = scale_F[YES_OR_NO] = 0.5
        return cls(
            mean_F=mean_F,
            scale_F=scale_F,
            popularity_N=popularity_N,
            has_clock=has_clock,
        )

    def state(self) -> dict[str, Float]:
        """Arrays that `of_state` restores."""
        return {"mean": self.mean_F, "scale": self.scale_F, "popularity": self.popularity_N}

    @classmethod
    def of_state(cls, state: Mapping[str, Float], *, has_clock: bool) -> Contexts:
        """From what `state` gave; DataError where something is missing or of another number of features."""
        missing = [name for name in ("mean", "scale", "popularity") if name not in state]
        if missing:
            raise DataError(f"the statistics of contexts lack {missing[0]!r}; calibrate again")
        return cls(mean_F=state["mean"], scale_F=state["scale"], popularity_N=state["popularity"], has_clock=has_clock)


def popularity(items: Int, num_items: int) -> Float:
    """float64 [n + 1]: log(1 + number of events) of every item; `items` are the rows of all events."""
    return np.log1p(np.bincount(items, minlength=num_items + 1).astype(np.float64))
