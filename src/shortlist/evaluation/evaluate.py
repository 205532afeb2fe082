"""Quality of pages on held-out requests: one protocol for single systems and whole cascades.

Every request is answered from the full catalogue, in chunks whose score matrices fit memory, so that memory depends neither on the
number of requests nor, but for the item vectors and counts themselves, on the size of the catalogue. R requests, B of a chunk, K page
length, T targets of all requests.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shortlist.cascade.lessons import CHUNK as CHUNK
from shortlist.cascade.lessons import chunks
from shortlist.data.batches import Batch, request_batch
from shortlist.data.dataset import Dataset
from shortlist.data.histories import Histories, Int, Requests, ranges
from shortlist.data.schema import Categorical, Sequence
from shortlist.errors import ConfigError, DataError
from shortlist.metrics import Interval, ranking
from shortlist.metrics import beyond as reach
from shortlist.metrics.intervals import bootstrap_ratio, holm, paired_difference
from shortlist.models.base import System

Pager = Callable[[Batch, Requests], Tensor]
"""Gives the page of every request of a batch: int64 rows [B, K], 0 = nothing. The requests carry the targets, for accounts of where they
were lost; a pager must not look at them to make its page."""
Window = Literal["fit", "valid", "test"]
_FEWEST_COUNTED = 20
"""Of so many users all are missed by one draw in e ** 20."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What one system or cascade reached on one window."""

    name: str
    protocol: str
    """Split, window, repeats, candidates: what must be equal for two reports to be comparable."""
    note: str
    """Caveat that every table built on it carries; empty where there is none."""
    k: int
    num_requests: int
    num_users: int
    metrics: Mapping[str, Interval]
    """By name, such as ndcg@10, with intervals over users; coverage, gini and the like have no interval (low = high)."""
    slices: Mapping[str, Mapping[str, float]]
    """The first metric by length of history: {"no history": {"requests": 12, "ndcg@10": 0.03}, ...}."""
    seconds: float
    rows: Int
    """[R, K] the pages."""
    users: Int
    """[R] whose request it was."""
    per_request: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]] = field(repr=False)
    """Numerator and denominator [R] of every metric that has an interval, for paired tests."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON: everything but the pages and the single requests."""
        return {
            "name": self.name,
            "protocol": self.protocol,
            "note": self.note,
            "k": self.k,
            "num_requests": self.num_requests,
            "num_users": self.num_users,
            "metrics": {name: asdict(interval) for name, interval in self.metrics.items()},
            "slices": {name: dict(values) for name, values in self.slices.items()},
            "seconds": round(self.seconds, 3),
        }


def pager_of(system: System, k: int) -> Pager:
    """Pages of a single retriever."""
    if system.kind != "retriever":
        raise ConfigError(
            f"{type(system).__name__} is a {system.kind}; alone, only a retriever makes pages. Put it into a cascade"
        )

    def page(batch: Batch, _: Requests) -> Tensor:
        return system.retrieve(batch, k).rows  # type: ignore[operator]

    return page


def held_out(
    dataset: Dataset, window: Window, *, repeats: bool | None = None, max_requests: int | None = None, seed: int = 0
) -> Requests:
    """The requests of a window.

    Args:
        repeats: False drops targets that are already in the request's history, and requests with no target left;
            None = as the data set's surface.
        max_requests: a seeded sample of at most so many; None = all.
    """
    if max_requests is not None and max_requests < 1:
        raise ConfigError(f"max_requests must be at least 1, got {max_requests}; leave it out for all")
    requests: Requests = getattr(dataset.split, window)
    if not (dataset.repeats if repeats is None else repeats):
        requests = without_seen_targets(dataset.histories, requests)
        if not len(requests):
            raise DataError(f"window {window!r}: every target stands in its user's history already; count repeats too")
    if max_requests is not None and len(requests) > max_requests:
        chosen = np.random.default_rng(seed).choice(len(requests), max_requests, replace=False)
        requests = requests.select(np.sort(chosen))
    if not len(requests):
        raise DataError(f"window {window!r} holds no request; give it a larger share of the log")
    return requests


def without_seen_targets(histories: Histories, requests: Requests) -> Requests:
    """The requests with only those targets that their history does not hold; those left without a target are dropped."""
    width = int(max(histories.item.max(initial=0), requests.target.max(initial=0))) + 1
    where, lengths = ranges(requests.start, requests.end)
    seen = np.unique(np.repeat(np.arange(len(requests)), lengths) * width + histories.item[where])
    request_of_target = np.repeat(np.arange(len(requests)), np.diff(requests.target_offsets))
    fresh = ~np.isin(request_of_target * width + requests.target, seen)
    counts = np.bincount(request_of_target[fresh], minlength=len(requests))
    kept = replace(
        requests,
        target_offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        target=requests.target[fresh],
        target_value=requests.target_value[fresh],
    )
    return kept.select(np.flatnonzero(counts))


def make_pages(
    pager: Pager,
    dataset: Dataset,
    requests: Requests,
    *,
    repeats: bool,
    max_history: int = 200,
    device: str = "cpu",
    chunk: int | None = None,
) -> Int:
    """Pages [R, K] of all requests; history is excluded where the surface never repeats.

    `chunk` requests are answered at once; None = as many as memory allows for a catalogue of this size.
    """
    count, pages = len(requests), []
    parts = chunks(count, dataset.num_items) if chunk is None else np.array_split(np.arange(count), -(-count // chunk))
    with torch.inference_mode():
        for index in parts:
            part = requests.select(index)
            batch = request_batch(
                dataset.histories, dataset.users, part, max_history=max_history, exclude_history=not repeats
            )
            pages.append(pager(batch.to(device), part).cpu().numpy())
    return np.concatenate(pages)


def evaluate(
    pager: Pager,
    dataset: Dataset,
    *,
    name: str,
    window: Window = "test",
    k: int = 10,
    repeats: bool | None = None,
    max_history: int = 200,
    max_requests: int | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Report:
    """Make and judge the pages of a window's requests.

    Args:
        pager: makes pages of at least k rows.
        name: how tables call it.
        window: "test" once, after everything was chosen on "valid".
        k: page length that metrics look at.
        repeats: may items of the history be shown and count; None = as the data set's surface.
        max_history: newest events given to the pager.
        max_requests: a seeded sample; None = all.
        seed: of the sample and the bootstrap.

    Raises DataError for an empty window.
    """
    repeats = dataset.repeats if repeats is None else repeats
    requests = held_out(dataset, window, repeats=repeats, max_requests=max_requests, seed=seed)
    started = time.perf_counter()
    rows = make_pages(pager, dataset, requests, repeats=repeats, max_history=max_history, device=device)
    seconds = time.perf_counter() - started
    per_request = judge_pages(rows, requests, k)
    metrics = {metric: over_users(top, bottom, requests.user, seed) for metric, (top, bottom) in per_request.items()}
    metrics |= {
        metric: Interval(value, value, value) for metric, value in page_statistics(rows[:, :k], dataset, window).items()
    }
    shown = "items seen before may be shown" if repeats else "items seen before are filtered and do not count"
    sampled = f", a sample of {len(requests)} requests" if max_requests is not None else ""
    return Report(
        name=name,
        protocol=f"{dataset.split.protocol} split, {window} window, full catalogue of {dataset.space.num_items} items, {shown}{sampled}",
        note=dataset.split.note,
        k=k,
        num_requests=len(requests),
        num_users=len(np.unique(requests.user)),
        metrics=metrics,
        slices=by_history_length(requests, f"ndcg@{k}", per_request),
        seconds=seconds,
        rows=rows,
        users=np.asarray(requests.user),
        per_request=per_request,
    )


def judge_pages(rows: Int, requests: Requests, k: int) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Numerator and denominator [R] of every page metric at k; the metric is the ratio of their sums."""
    judged = ranking.judge(rows, requests.target, requests.target_offsets)
    one = np.ones(len(requests))
    plain = {
        f"ndcg@{k}": ranking.ndcg(judged, k),
        f"recall@{k}": ranking.recall(judged, k),
        f"hr@{k}": ranking.hit_rate(judged, k),
        f"mrr@{k}": ranking.mrr(judged, k),
        f"map@{k}": ranking.average_precision(judged, k),
    }
    table = {name: (values, one) for name, values in plain.items()}
    table[f"value@{k}"] = ranking.value_recovered(judged, requests.target_value, k)
    return table


def over_users(top: NDArray[np.float64], bottom: NDArray[np.float64], users: Int, seed: int) -> Interval:
    """Ratio of sums with its bootstrap interval over users. A point for one user alone, and where so few have a denominator above 0
    (money, where purchases are rare) that a draw of users might hold none; 0 where nobody has."""
    num_users, num_counted = len(np.unique(users)), len(np.unique(users[bottom > 0]))
    if num_users > 1 and num_counted >= min(num_users, _FEWEST_COUNTED):
        return bootstrap_ratio(top, bottom, users, seed=seed)
    mean = float(top.sum() / bottom.sum()) if num_counted else 0.0
    return Interval(mean, mean, mean)


def page_statistics(rows: Int, dataset: Dataset, window: Window) -> dict[str, float]:
    """Coverage, Gini of exposure, novelty and diversity of pages [R, k]; coverage alone where every page is empty."""
    if not rows.any():
        return {"coverage": 0.0}
    histories = dataset.view(window).histories
    counts = np.bincount(histories.item, minlength=dataset.space.num_items + 1)
    return {
        "coverage": reach.coverage(rows, dataset.space.num_items),
        "gini": reach.gini(rows, dataset.space.num_items),
        "novelty": float(np.nanmean(reach.novelty(rows, counts))),
        **diversity(rows, dataset),
    }


def diversity(rows: Int, dataset: Dataset) -> dict[str, float]:
    """Mean difference of the pairs of a page [R, k]: by the first categorical item field, else by the first one that holds sets, such
    as genres or the words of a title (Jaccard distance). Nothing where there is no such field or no page holds two items.
    """
    fields = dataset.space.items.fields
    chosen = next(
        (f for f in fields if isinstance(f, Categorical)), next((f for f in fields if isinstance(f, Sequence)), None)
    )
    if chosen is None or (rows > 0).sum(1).max(initial=0) < 2:
        return {}
    column = dataset.space.items.columns[chosen.name]
    if isinstance(column, Tensor):
        per_page = reach.category_diversity(rows, column.numpy())
    else:
        shown = np.union1d([0], rows)  # only these need a row of the multi-hot table
        sets = column.select(torch.from_numpy(shown))
        table_SG = np.zeros((len(shown), chosen.size + 1), dtype=np.int8)
        table_SG[sets.row_of_value.numpy(), sets.values.numpy()] = 1
        per_page = reach.genre_diversity(np.searchsorted(shown, rows), table_SG)
    return {f"diversity:{chosen.name}": float(np.nanmean(per_page))}


def by_history_length(
    requests: Requests, metric: str, per_request: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]]
) -> dict[str, dict[str, float]]:
    """The metric's mean for requests without history, and with short, middling and long ones."""
    length = requests.end - requests.start
    values = per_request[metric][0]
    bands = {"no history": (0, 0), "1-10 events": (1, 10), "11-50 events": (11, 50), "over 50 events": (51, np.inf)}
    table = {}
    for name, (low, high) in bands.items():
        inside = (length >= low) & (length <= high)
        if inside.any():
            table[name] = {"requests": float(inside.sum()), metric: float(values[inside].mean())}
    return table


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Several reports of one protocol, each tested against a reference on the same requests."""

    reports: tuple[Report, ...]
    reference: str
    """Name of the report that the others are tested against."""
    tests: Mapping[str, Mapping[str, Mapping[str, float]]]
    """name -> metric -> {difference, low, high, p_value}, reference minus the other; p by Holm over all of one metric."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        tests = {name: {m: dict(t) for m, t in of.items()} for name, of in self.tests.items()}
        return {"reference": self.reference, "reports": [r.as_dict() for r in self.reports], "tests": tests}

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(self.as_dict(), indent=1) + "\n")


def compare(reports: list[Report], *, reference: str | None = None, seed: int = 0) -> Comparison:
    """Paired tests of every report against the reference (default: the first), on the same requests.

    Raises DataError where the reports do not speak of the same requests.
    """
    if not reports:
        raise DataError("nothing to compare: give at least one report")
    base = next((r for r in reports if r.name == reference), None) if reference else reports[0]
    if base is None:
        raise ConfigError(f"no report is called {reference!r}; there are {', '.join(r.name for r in reports)}")
    for other in reports:
        if other.protocol != base.protocol or not np.array_equal(other.users, base.users):
            raise DataError(
                f"{other.name} and {base.name} were measured on different requests: {other.protocol} / {base.protocol}"
            )
    tests: dict[str, dict[str, dict[str, float]]] = {r.name: {} for r in reports if r is not base}
    for metric in base.per_request:
        top, bottom = base.per_request[metric]
        scale = bottom.mean() or 1.0
        found = {
            r.name: paired_difference(top / scale, r.per_request[metric][0] / scale, base.users, seed=seed)
            for r in reports
            if r is not base
        }
        corrected = holm([t.p_value for t in found.values()]).tolist() if found else []
        for (name, t), p in zip(found.items(), corrected):
            tests[name][metric] = {"difference": t.difference, "low": t.low, "high": t.high, "p_value": p}
    return Comparison(reports=tuple(reports), reference=base.name, tests=tests)
