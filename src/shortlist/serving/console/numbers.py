"""What /metrics says over time: rates, quantiles and costs of the last minute, from counters that only ever rise.

    history = History()
    history.add(parse(text, at=time.monotonic()))        every two seconds
    history.reading()                                    the last minute

A server of several processes shares one port, and each scrape shows the counters of whichever process took it. So what rose is counted
process by process and then added up. A counter that fell was set back by a restart: what it shows now is what rose since.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from prometheus_client.parser import text_string_to_metric_families

from shortlist.errors import DataError

OWN = ("/metrics", "/v1/admin", "/v1/health", "/docs", "/openapi.json", "/static-offline-docs")
"""Routes that a console and a load balancer ask, which are no traffic."""
WINDOW_S = 60.0
"""Seconds that a reading looks back."""
NEAR_S = 10.0
"""Seconds that a point of the curves looks back."""
KEPT_S = 600.0
"""Seconds that are remembered."""

Series = tuple[str, tuple[tuple[str, str], ...]]
"""A sample's name and its labels, sorted."""
Wanted = Callable[[str], bool]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scrape:
    """One reading of /metrics."""

    at: float
    """Seconds on a clock that never goes back."""
    process: str
    """Whose counters these are."""
    values: Mapping[Series, float]

    def of(self, name: str) -> dict[tuple[tuple[str, str], ...], float]:
        """By labels, the samples of one name."""
        return {labels: value for (found, labels), value in self.values.items() if found == name}

    def one(self, name: str) -> float | None:
        """The sample without labels of that name; None where there is none."""
        return self.values.get((name, ()))


def parse(text: str, at: float) -> Scrape:
    """Prometheus' text format as a scrape; DataError where it is something else."""
    try:
        values = {
            (sample.name, tuple(sorted(sample.labels.items()))): float(sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if not sample.name.endswith("_created")
        }
    except (ValueError, KeyError, IndexError) as error:
        raise DataError(f"/metrics is not in Prometheus' text format ({error}); is this a Shortlist server?") from error
    process = next((dict(labels)["pid"] for name, labels in values if name == "shortlist_process_info"), "")
    return Scrape(at=at, process=process, values=values)


def quantile(buckets: Sequence[tuple[float, float]], q: float) -> float:
    """The q-quantile of a histogram, found on a straight line inside its bucket.

    Args:
        buckets: (upper bound, observations up to it), by rising bound; the last bound is infinite.
        q: from 0 to 1.

    Returns: NaN where nothing was observed; infinity where the quantile lies beyond the last finite bound.
    """
    total = buckets[-1][1] if buckets else 0.0
    if total <= 0:
        return math.nan
    rank, below, floor = q * total, 0.0, 0.0
    for bound, count in buckets:
        if count >= rank and count > below:
            return bound if math.isinf(bound) else floor + (bound - floor) * max(rank - below, 0.0) / (count - below)
        below, floor = count, bound
    return math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """Traffic of one route, or of all."""

    route: str
    per_s: float
    """Requests a second."""
    p50_ms: float
    p99_ms: float
    failed: float
    """Share of the requests that were answered with 4xx or 5xx, or not at all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """What a stage takes of one page."""

    stage: str
    ms: float
    p99_ms: float
    mflop: float
    degraded: float
    """Share of the pages on which it was passed over, or a part of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What the last minute was like; rates are NaN until there are two scrapes of a process."""

    all: Route
    routes: Sequence[Route]
    """Busiest first."""
    stages: Sequence[Stage]
    """In the order in which the server names them."""
    chains: Mapping[tuple[str, str], float]
    """Pages by (chain, reason), most first."""
    pages: float
    """Their sum."""
    degraded: float
    """Degraded parts per page."""
    waiting: float
    """Requests that wait for a worker, at the last scrape."""
    events_per_s: float
    workers_replaced: float
    """Since the server started."""
    prices: Mapping[str, float]
    """By resource; empty where the run is not calibrated."""
    cap_ms: float | None
    """Dearest chain that the server affords; None = any."""
    snapshot: str
    processes: int
    """Processes of the server that were seen."""


@dataclass(frozen=True, slots=True)
class Point:
    """One place of the curves."""

    at: float
    per_s: float
    p50_ms: float
    p99_ms: float
    degraded: float


@dataclass
class History:
    """Scrapes of the last ten minutes, and the curves they make; belongs to one thread."""

    scrapes: deque[Scrape] = field(default_factory=deque)
    points: deque[Point] = field(default_factory=deque)

    def add(self, scrape: Scrape) -> None:
        """One more scrape; those that are too old go."""
        self.scrapes.append(scrape)
        near = _Rise(self._since(scrape.at - NEAR_S))
        traffic = _route("all", near, _is_traffic)
        parts = near.total("shortlist_degraded_total") / max(near.total("shortlist_chains_total"), 1.0)
        self.points.append(Point(scrape.at, traffic.per_s, traffic.p50_ms, traffic.p99_ms, parts))
        while self.scrapes[0].at < scrape.at - WINDOW_S - NEAR_S:
            self.scrapes.popleft()
        while self.points[0].at < scrape.at - KEPT_S:
            self.points.popleft()

    def reading(self) -> Reading:
        """What the last minute was like; DataError before the first scrape."""
        if not self.scrapes:
            raise DataError("nothing was read from /metrics so far")
        last = self.scrapes[-1]
        rise = _Rise(self._since(last.at - WINDOW_S))
        chains = {
            (dict(labels)["chain"], dict(labels)["reason"]): count
            for labels, count in rise.of("shortlist_chains_total").items()
            if count
        }
        pages = sum(chains.values())
        routes = [_route(name, rise, _is(name)) for name in rise.labelled("shortlist_http_seconds_count", "route")]
        cap = last.one("shortlist_cap_ms")
        return Reading(
            all=_route("all", rise, _is_traffic),
            routes=sorted((r for r in routes if r.per_s > 0 and _is_traffic(r.route)), key=lambda r: -r.per_s),
            stages=_stages(rise),
            chains=dict(sorted(chains.items(), key=lambda entry: -entry[1])),
            pages=pages,
            degraded=rise.total("shortlist_degraded_total") / pages if pages else math.nan,
            waiting=last.one("shortlist_waiting") or 0.0,
            events_per_s=rise.per_s("shortlist_events_total"),
            workers_replaced=last.one("shortlist_workers_replaced_total") or 0.0,
            prices={dict(labels)["resource"]: price for labels, price in last.of("shortlist_price").items()},
            cap_ms=None if cap is None or cap < 0 else cap,
            snapshot=next((dict(labels).get("version", "") for labels in last.of("shortlist_snapshot_info")), ""),
            processes=len({scrape.process for scrape in self.scrapes}),
        )

    def _since(self, at: float) -> list[Scrape]:
        return [scrape for scrape in self.scrapes if scrape.at >= at]


class _Rise:
    """What counters rose by over some scrapes, oldest first, all processes together."""

    def __init__(self, scrapes: Iterable[Scrape]) -> None:
        by_process: dict[str, list[Scrape]] = {}
        for scrape in scrapes:
            by_process.setdefault(scrape.process, []).append(scrape)
        self._counts: dict[Series, float] = {}
        self._rates: dict[Series, float] = {}
        self.known = False
        for own in by_process.values():
            seconds = own[-1].at - own[0].at
            if seconds <= 0:
                continue
            self.known = True
            for series in own[-1].values:
                risen = sum(
                    _risen(before.values.get(series, 0.0), after.values.get(series, 0.0))
                    for before, after in pairwise(own)
                )
                self._counts[series] = self._counts.get(series, 0.0) + risen
                self._rates[series] = self._rates.get(series, 0.0) + risen / seconds

    def of(self, name: str) -> dict[tuple[tuple[str, str], ...], float]:
        """By labels."""
        return {labels: count for (found, labels), count in self._counts.items() if found == name}

    def total(self, name: str) -> float:
        """Of all labels together."""
        return sum(self.of(name).values())

    def per_s(self, name: str) -> float:
        """Of all labels together, a second; NaN where no time has passed."""
        if not self.known:
            return math.nan
        return sum(rate for (found, _), rate in self._rates.items() if found == name)

    def labelled(self, name: str, label: str) -> list[str]:
        """Values of a label, in the order in which the server has them."""
        return list(dict.fromkeys(dict(labels)[label] for labels in self.of(name)))

    def buckets(self, name: str, label: str, wanted: Wanted) -> list[tuple[float, float]]:
        """Of a histogram, those series added up whose label passes `wanted`; for `quantile`."""
        found: dict[float, float] = {}
        for labels, count in self.of(f"{name}_bucket").items():
            named = dict(labels)
            if wanted(named[label]):
                found[float(named["le"])] = found.get(float(named["le"]), 0.0) + count
        return sorted(found.items())

    def rate(self, name: str, label: str, wanted: Wanted) -> float:
        """Of the series whose label passes `wanted`, a second; NaN where no time has passed."""
        if not self.known:
            return math.nan
        return sum(
            rate for (found, labels), rate in self._rates.items() if found == name and wanted(dict(labels)[label])
        )


def _risen(before: float, after: float) -> float:
    return after - before if after >= before else after


def _is(name: str) -> Wanted:
    return lambda found: found == name


def _is_traffic(route: str) -> bool:
    return not any(route == own or route.startswith(f"{own}/") for own in OWN)


def _route(name: str, rise: _Rise, wanted: Wanted) -> Route:
    buckets = rise.buckets("shortlist_http_seconds", "route", wanted)
    asked = failed = 0.0
    for labels, count in rise.of("shortlist_http_requests_total").items():
        named = dict(labels)
        if wanted(named["route"]):
            asked += count
            failed += count if named["status"] >= "400" else 0.0
    return Route(
        route=name,
        per_s=rise.rate("shortlist_http_seconds_count", "route", wanted),
        p50_ms=quantile(buckets, 0.5) * 1e3,
        p99_ms=quantile(buckets, 0.99) * 1e3,
        failed=failed / asked if asked else math.nan,
    )


def _stages(rise: _Rise) -> list[Stage]:
    found = []
    for name in rise.labelled("shortlist_stage_seconds_count", "stage"):
        key = (("stage", name),)
        pages = rise.of("shortlist_stage_seconds_count")[key]
        if pages:
            found.append(
                Stage(
                    stage=name,
                    ms=rise.of("shortlist_stage_seconds_sum")[key] * 1e3 / pages,
                    p99_ms=quantile(rise.buckets("shortlist_stage_seconds", "stage", _is(name)), 0.99) * 1e3,
                    mflop=rise.of("shortlist_stage_mflop_total").get(key, 0.0) / pages,
                    degraded=rise.of("shortlist_degraded_total").get((("part", name),), 0.0) / pages,
                )
            )
    return found
