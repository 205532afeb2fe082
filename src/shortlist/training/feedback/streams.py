"""Clicks and conversions become a stream of samples, each emitted when its label was known.

    click at t0, observation window o, attribution window a, conversion after a delay d (counted where d < a)

    final            t0      the final label: not realisable, for the oracle
    observed         t0 + o  label: d <= o
    late             the same, and a positive copy at t0 + d where o < d < a
    fake-negatives   t0      label 0, and a positive copy at t0 + d where d < a
    settled          as late, and at t0 + a a second copy of every click that did not convert, or did so within o

R clicks, S samples; all times in whole seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from shortlist.data.histories import Float, Int
from shortlist.errors import ConfigError, DataError
from shortlist.training.feedback.base import (
    LATE,
    NEGATIVE,
    POSITIVE,
    SETTLED_NEGATIVE,
    SETTLED_POSITIVE,
    Seen,
    Stream,
)
from shortlist.training.feedback.windows import NEVER, Windows


@dataclass(frozen=True, kw_only=True, slots=True)
class Emitted:
    """Samples in the order of their emission; ties by click, then by kind."""

    click: Int
    """[S] numbers of the clicks."""
    label: Float
    """[S] as known when emitted."""
    kind: Int
    """[S]."""
    emitted_at: Int
    """[S]."""
    elapsed: Int
    """[S] since the click."""
    delay: Float
    """[S] from click to conversion; NaN where none had come."""

    def __len__(self) -> int:
        return len(self.click)

    def select(self, index: Int) -> Emitted:
        """Samples `index`."""
        return Emitted(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def between(self, start: int, end: int) -> Emitted:
        """Those emitted at start .. end - 1."""
        return self.select(np.arange(*np.searchsorted(self.emitted_at, [start, end])))

    def __add__(self, other: Emitted) -> Emitted:
        """These samples, then the others."""
        return Emitted(**{f.name: np.append(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)})

    def seen(self, auxiliary: Mapping[str, Tensor]) -> Seen:
        """The samples as a rule reads them; `auxiliary` float32 [S] by name."""
        return Seen(
            label=torch.from_numpy(self.label),
            kind=torch.from_numpy(self.kind),
            elapsed=torch.from_numpy(self.elapsed.astype(np.float32)),
            delay=torch.from_numpy(self.delay),
            auxiliary=auxiliary,
        )


def emit(clicked_at: Int, converted_at: Int, windows: Windows, stream: Stream) -> Emitted:
    """The whole stream of R clicks; `converted_at` is NEVER where there is no conversion.

    Raises DataError for a conversion before its click, ConfigError for an unknown stream.
    """
    _check(clicked_at, converted_at)
    if stream not in get_args(Stream):
        raise ConfigError(f"stream {stream!r} is unknown; choose from {', '.join(get_args(Stream))}")
    quick, late = windows.split(clicked_at, converted_at)
    converts, everyone = quick | late, np.arange(len(clicked_at))
    seen_at = clicked_at + windows.observation_s
    match stream:
        case "final":
            parts = [_part(everyone, np.where(converts, POSITIVE, NEGATIVE), clicked_at)]
        case "fake-negatives":
            parts = [_part(everyone, np.full_like(everyone, NEGATIVE), clicked_at)]
            parts.append(_part(np.flatnonzero(converts), LATE, converted_at))
        case _:
            parts = [_part(everyone, np.where(quick, POSITIVE, NEGATIVE), seen_at)]
    if stream in ("late", "settled"):
        parts.append(_part(np.flatnonzero(late), LATE, converted_at))
    if stream == "settled":
        closed = clicked_at + windows.attribution_s
        parts.append(_part(np.flatnonzero(quick), SETTLED_POSITIVE, closed))
        parts.append(_part(np.flatnonzero(~converts), SETTLED_NEGATIVE, closed))
    click, kind, at = (np.concatenate(column) for column in zip(*parts, strict=True))
    return _ordered(clicked_at, converted_at, click, kind, at)


def as_known(clicked_at: Int, converted_at: Int, windows: Windows, now: int) -> Emitted:
    """Clicks that are old enough at `now`, once each, with the label known then or when their attribution window closed.

    Those that converted after the observation window are LATE, though there is no other copy of them.
    """
    _check(clicked_at, converted_at)
    click = np.flatnonzero(clicked_at + windows.observation_s <= now)
    quick, late = windows.split(clicked_at[click], converted_at[click], now)
    kind = np.select([quick, late], [POSITIVE, LATE], NEGATIVE)
    at = np.minimum(clicked_at[click] + windows.attribution_s, now)
    return _ordered(clicked_at, converted_at, click, kind, at)


def stand_ins(known: Emitted, clicked_at: Int, windows: Windows, stream: Stream, now: int) -> Emitted:
    """What clicks whose attribution window is open at `now` may still send: the copies that stand for it in a training at one moment.

    With the chances of a click of its age, the copies of one that has not converted count 1 - f_rn (LATE) and f_rn (SETTLED_NEGATIVE), and
    SETTLED_POSITIVE counts fully; then late positives and settled clicks have the mass that they will have.

    Args:
        known: samples of the stream emitted up to `now`.
    """
    first = known.select(np.flatnonzero(np.isin(known.kind, (NEGATIVE, POSITIVE))))
    open_ = clicked_at[first.click] + windows.attribution_s > now
    waits = open_ & (first.kind == NEGATIVE) & ~np.isin(first.click, known.click[known.kind == LATE])
    parts = [_part(first.click[waits], LATE, np.full(len(clicked_at), now))]
    if stream == "settled":
        parts.append(_part(first.click[waits], SETTLED_NEGATIVE, np.full(len(clicked_at), now)))
        quick = open_ & (first.kind == POSITIVE)
        parts.append(_part(first.click[quick], SETTLED_POSITIVE, np.full(len(clicked_at), now)))
    click, kind, at = (np.concatenate(column) for column in zip(*parts, strict=True))
    made = _ordered(clicked_at, np.full(len(clicked_at), NEVER), click, kind, at)
    return replace(made, delay=np.full(len(made), np.nan, dtype=np.float32))


def emit_plainly(clicked_at: Int, converted_at: Int, windows: Windows, stream: Stream) -> list[tuple[int, ...]]:
    """`emit` click by click, as rows (emitted_at, click, kind): the plain form that it must agree with."""
    rows = []
    for click, (t0, t1) in enumerate(zip(clicked_at.tolist(), converted_at.tolist(), strict=True)):
        converts = t1 != NEVER and t1 - t0 < windows.attribution_s
        is_quick = converts and t1 - t0 <= windows.observation_s
        if stream == "final":
            rows.append((t0, click, POSITIVE if converts else NEGATIVE))
        elif stream == "fake-negatives":
            rows.append((t0, click, NEGATIVE))
            if converts:
                rows.append((t1, click, LATE))
        else:
            rows.append((t0 + windows.observation_s, click, POSITIVE if is_quick else NEGATIVE))
        if stream in ("late", "settled") and converts and not is_quick:
            rows.append((t1, click, LATE))
        if stream == "settled" and (is_quick or not converts):
            closed = t0 + windows.attribution_s
            rows.append((closed, click, SETTLED_POSITIVE if is_quick else SETTLED_NEGATIVE))
    return sorted(rows)


def _check(clicked_at: Int, converted_at: Int) -> None:
    if clicked_at.shape != converted_at.shape:
        raise DataError(f"{len(converted_at):,} conversion times for {len(clicked_at):,} clicks; give one each")
    before = np.flatnonzero(converted_at < clicked_at)
    if len(before):
        raise DataError(
            f"click {before[0]} converts {clicked_at[before[0]] - converted_at[before[0]]} seconds before it is made; "
            "check the two time columns, or drop such clicks"
        )


def _part(click: Int, kind: Int | int, at: Int) -> tuple[Int, Int, Int]:
    """Samples of some clicks; `at` [R] is by click."""
    return click, np.broadcast_to(np.asarray(kind, dtype=np.int64), click.shape), at[click]


def _ordered(clicked_at: Int, converted_at: Int, click: Int, kind: Int, at: Int) -> Emitted:
    order = np.lexsort((kind, click, at))
    click, kind, at = click[order], kind[order], at[order]
    label = np.isin(kind, (POSITIVE, LATE, SETTLED_POSITIVE))
    delay = np.where(label, converted_at[click] - clicked_at[click], np.nan)
    return Emitted(
        click=click,
        label=label.astype(np.float32),
        kind=kind,
        emitted_at=at,
        elapsed=at - clicked_at[click],
        delay=delay.astype(np.float32),
    )
