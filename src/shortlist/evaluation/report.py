"""What a run leaves for people: `RUN-report/report.html`, one page that needs nothing else, and the same numbers as `report.json`.

    judged = judge(run, "valid")
    write_report(run, [judged], health=check(log).sentences(), command="shortlist train ...", seconds=81.0)

Training looks at the validation window alone; the test window is read by who asks for it. The folder stands beside the run: a run is
hashed file by file and replaced whole.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from shortlist.cascade.run import Run
from shortlist.data.dataset import Dataset
from shortlist.data.histories import Int, Requests
from shortlist.errors import DataError
from shortlist.evaluation.evaluate import Comparison, Report, Window, held_out
from shortlist.evaluation.evidence import surroundings, write_json
from shortlist.evaluation.runs import BASELINES, RunReport, baselines, beside_baselines, evaluate_run, verdict
from shortlist.models.base import System
from shortlist.training.checkpoint import write_atomically

PAGE, NUMBERS = "report.html", "report.json"
NUM_EXAMPLES, NUM_RECENT, NUM_CHOSEN = 3, 6, 12
QUICK_SECONDS = 5.0
"""After so long the report of a training begins no further baseline."""
SLOW = {"ease": 5_000, "als": 0}
"""Baselines that the report of a training leaves out where the catalogue is larger: EASE's time grows with its cube, ALS is iterated."""
SURFACES = {True: "Items seen before may be shown", False: "New items only"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """One place of an example's page."""

    title: str
    seen: bool
    """It stands in the history."""
    chosen: bool
    """It was then chosen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One request: what was known, what was shown, what was then chosen."""

    user: str
    num_past: int
    """Events of the history."""
    recent: tuple[str, ...]
    """The last of them, newest first."""
    page: tuple[Shown, ...]
    chosen: tuple[str, ...]
    """All held-out items."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """A run on one window, beside the simple systems."""

    window: Window
    cascade: RunReport
    """On the first surface."""
    comparisons: tuple[Comparison, ...]
    """One per surface, the cascade as the reference."""
    verdicts: tuple[str, ...]
    """A sentence per surface; none where nothing could be compared."""
    left_out: tuple[str, ...]
    """Simple systems that the log could serve and that were not measured, to save time."""
    examples: tuple[Example, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "window": self.window,
            "cascade": self.cascade.as_dict(),
            "comparisons": [comparison.as_dict() for comparison in self.comparisons],
            "verdicts": list(self.verdicts),
            "left_out": list(self.left_out),
            "examples": [asdict(example) for example in self.examples],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Everything that a report says."""

    name: str
    version: str
    has_value: bool
    """The log says what events are worth."""
    health: tuple[str, ...] | None
    """Sentences about the log; None where it was not at hand."""
    split: str
    """In words."""
    windows: Mapping[str, Mapping[str, int]]
    """By window: requests, users, held-out items."""
    settings: str
    """All of them, TOML."""
    systems: tuple[Mapping[str, Any], ...]
    """How each system was made."""
    curves: Mapping[str, Sequence[Mapping[str, Any]]]
    """Loss and validation score by epoch of each system that was trained; empty for runs of older versions."""
    judged: tuple[Judged, ...]
    problems: tuple[str, ...]
    """Why a window could not be judged."""
    command: str
    seconds: float
    surroundings: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        plain = {name: getattr(self, name) for name in ("name", "version", "command", "seconds", "split", "settings")}
        return {
            **plain,
            "health": None if self.health is None else list(self.health),
            "windows": {window: dict(counts) for window, counts in self.windows.items()},
            "systems": [dict(system) for system in self.systems],
            "curves": {name: [dict(point) for point in points] for name, points in self.curves.items()},
            "judged": [judged.as_dict() for judged in self.judged],
            "problems": list(self.problems),
            **self.surroundings,
        }


def judge(
    run: Run,
    window: Window,
    *,
    k: int | None = None,
    surfaces: Sequence[bool] | None = None,
    max_requests: int | None = None,
    names: Sequence[str] = BASELINES,
    seconds: float = math.inf,
    rivals: Mapping[str, Run] = MappingProxyType({}),
) -> Judged:
    """The run and the simple systems on a window's requests, and a few pages to look at.

    Args:
        k: page length; None = the run's.
        surfaces: whether items seen before may be shown; several are judged one by one. None = as the run's surface.
        max_requests: a seeded sample; None = all.
        names: of which those stand beside it that the log can serve.
        seconds: no further simple system is begun after so long.
        rivals: other runs on the same dataset that stand beside it too, by the name of their row.

    Raises DataError where the window holds no request that counts.
    """
    surfaces = (run.dataset.repeats,) if surfaces is None else tuple(surfaces)
    if max_requests is not None and len(getattr(run.dataset.split, window)) <= max_requests:
        max_requests = None
    mine, comparisons, verdicts = [], [], []
    made: dict[str, System] = {}
    for repeats in surfaces:
        measured = evaluate_run(run, window=window, k=k, repeats=repeats, max_requests=max_requests)
        comparison = beside_baselines(
            run,
            measured,
            repeats,
            names,
            window=window,
            max_requests=max_requests,
            seconds=seconds,
            rivals=rivals,
            made=made,
        )
        mine.append(measured)
        comparisons.append(comparison)
        if comparison.tests:
            verdicts.append(verdict(comparison, SURFACES[repeats]))
    requests = held_out(run.dataset, window, repeats=surfaces[0], max_requests=max_requests)
    compared = {report.name for comparison in comparisons for report in comparison.reports}
    return Judged(
        window=window,
        cascade=mine[0],
        comparisons=tuple(comparisons),
        verdicts=tuple(verdicts),
        left_out=tuple(name for name in baselines(run.dataset) if name not in compared),
        examples=tuple(examples(run.dataset, requests, mine[0].report)),
    )


def report_training(run: Run, *, health: Sequence[str] | None = None, command: str = "", seconds: float = 0.0) -> Path:
    """The report at the end of a training: the validation window, as large a sample of it as training used, and baselines that are quick.

    Returns: the page.
    """
    names = [name for name in BASELINES if run.dataset.num_items <= SLOW.get(name, math.inf)]
    judged, problems = [], []
    try:
        most = run.config.learning.valid_requests
        judged.append(judge(run, "valid", max_requests=most, names=names, seconds=QUICK_SECONDS))
    except DataError as error:
        problems.append(str(error))
    return write_report(run, judged, health=health, problems=problems, command=command, seconds=seconds)


def report_evaluation(
    run: Run,
    window: Window,
    *,
    k: int | None = None,
    repeats: bool | None = None,
    max_requests: int | None = None,
    command: str = "",
) -> tuple[RunReport, Path]:
    """The run on a window (see `judge`), and the page that tells of it, of other windows than validation after validation.

    Raises DataError where the window holds no request that counts.
    """
    began = time.perf_counter()
    surfaces = None if repeats is None else (repeats,)
    judged, problems = [judge(run, window, k=k, surfaces=surfaces, max_requests=max_requests)], []
    if window != "valid":
        try:
            judged.insert(0, judge(run, "valid", k=k, surfaces=surfaces, max_requests=max_requests))
        except DataError as error:
            problems.append(str(error))
    seconds = time.perf_counter() - began
    return judged[-1].cascade, write_report(run, judged, problems=problems, command=command, seconds=seconds)


def write_report(
    run: Run,
    judged: Sequence[Judged],
    *,
    health: Sequence[str] | None = None,
    problems: Sequence[str] = (),
    command: str = "",
    seconds: float = 0.0,
) -> Path:
    """Write `RUN-report/report.html` and `report.json`.

    Args:
        judged: windows in the order in which they are told.
        health: sentences of `check(log)`; None where the log is not at hand: those of an earlier report of the same run stay.
        problems: why a window is missing.
        command: how the run was called for.
        seconds: that it took.

    Returns: the page.
    """
    from shortlist.evaluation.page import render

    folder = report_folder(run.folder)
    if health is None:
        health = _earlier_health(folder / NUMBERS, run.version)
    summary = Summary(
        name=run.folder.name,
        version=run.version,
        has_value="value" in run.dataset.schema.roles,
        health=None if health is None else tuple(health),
        split=run.dataset.split.note,
        windows={name: _sizes(getattr(run.dataset.split, name)) for name in ("fit", "valid", "test")},
        settings=run.config.to_toml(),
        systems=tuple(run.metrics.get("systems", ())),
        curves=run.metrics.get("curves", {}),
        judged=tuple(judged),
        problems=tuple(problems),
        command=command,
        seconds=round(seconds, 1),
        surroundings=surroundings(),
    )
    write_json(folder / NUMBERS, summary.as_dict())
    page = folder / PAGE
    write_atomically(page, render(summary))
    return page


def report_folder(run: Path) -> Path:
    """Where the report of a run's folder stands: beside it."""
    run = run.absolute()
    return run.with_name(f"{run.name}-report")


def examples(dataset: Dataset, requests: Requests, report: Report, *, seed: int = 0) -> Iterator[Example]:
    """Some requests of a report, drawn at random: different users with a history, then one newcomer where there is any."""
    past = requests.end - requests.start
    order = np.random.default_rng(seed).permutation(len(requests))
    known = order[past[order] > 0]
    _, first = np.unique(requests.user[known], return_index=True)
    chosen = [*known[np.sort(first)][:NUM_EXAMPLES].tolist(), *order[past[order] == 0][:1].tolist()]
    for request in chosen:
        yield _example(dataset, requests, report, request)


def _example(dataset: Dataset, requests: Requests, report: Report, request: int) -> Example:
    past = dataset.histories.item[requests.start[request] : requests.end[request]]
    targets = requests.target[requests.target_offsets[request] : requests.target_offsets[request + 1]]
    shown = report.rows[request, : report.k]
    shown = shown[shown > 0]
    seen, wanted = np.isin(shown, past).tolist(), np.isin(shown, targets).tolist()
    return Example(
        user=str(dataset.user_ids.decode(requests.user[request : request + 1])[0]),
        num_past=len(past),
        recent=tuple(names_of(dataset, past[::-1][:NUM_RECENT])),
        page=tuple(Shown(title=title, seen=s, chosen=c) for title, s, c in zip(names_of(dataset, shown), seen, wanted)),
        chosen=tuple(names_of(dataset, targets)),
    )


def names_of(dataset: Dataset, rows: Int) -> list[str]:
    """Text to show catalogue rows by: the title, else the id."""
    ids = dataset.item_ids.decode(rows)
    titles = dataset.titles
    return [(titles[row] if titles is not None else "") or f"item {id_}" for row, id_ in zip(rows.tolist(), ids)]


def _sizes(requests: Requests) -> dict[str, int]:
    return {
        "requests": len(requests),
        "users": len(np.unique(requests.user)),
        "held-out items": len(requests.target),
    }


def _earlier_health(path: Path, version: str) -> list[str] | None:
    """The sentences of a report of the same version of the run; None where there is none that can be read."""
    try:
        content = json.loads(path.read_text())
        return content["health"] if content["version"] == version else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
