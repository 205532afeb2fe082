"""What the server counts, in a registry of its own, so that several servers in one process do not mix."""

from __future__ import annotations

import os
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from shortlist.cascade.ads import AdsAnswer
from shortlist.cascade.allocation.base import RESOURCES
from shortlist.cascade.answers import Answer
from shortlist.cascade.engine import Engine, Recorded
from shortlist.serving.batching import Batcher
from shortlist.store.ads import Charge

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self, engine: Engine, batcher: Batcher) -> None:
        self.registry = CollectorRegistry()
        own = self.registry
        self._requests = Counter(
            "shortlist_http_requests", "Requests answered.", ("route", "method", "status"), registry=own
        )
        self._seconds = Histogram(
            "shortlist_http_seconds",
            "Time from a request's head to its last byte.",
            ("route",),
            buckets=SECONDS,
            registry=own,
        )
        self._stage_seconds = Histogram(
            "shortlist_stage_seconds", "Time in a stage of the cascade.", ("stage",), buckets=SECONDS, registry=own
        )
        self._stage_mflop = Counter("shortlist_stage_mflop", "1e6 FLOPs spent in a stage.", ("stage",), registry=own)
        self._degraded = Counter(
            "shortlist_degraded",
            "Pages made although something failed: a stage, or the engine around it.",
            ("part",),
            registry=own,
        )
        self._chains = Counter("shortlist_chains", "Pages by chain and reason.", ("chain", "reason"), registry=own)
        self._items = Counter("shortlist_items_shown", "Items on pages.", registry=own)
        self._events = Counter(
            "shortlist_events", "Events received, by what became of them.", ("outcome",), registry=own
        )
        self._unknown = Counter(
            "shortlist_events_unknown", "Events that name something the snapshot lacks.", ("what",), registry=own
        )
        self._ads = Counter(
            "shortlist_ads", "Ads shown and clicks told, by what became of them.", ("outcome",), registry=own
        )
        self._charged = Counter("shortlist_ads_charged", "Money charged for clicks.", registry=own)
        self.registry.register(_ServerState(engine, batcher))

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """One request is done."""
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def page(self, answer: Answer) -> None:
        """One page was made."""
        self._items.inc(len(answer.items))
        self._chains.labels(answer.chain, answer.allotted.reason).inc()
        self._made(answer)

    def ads(self, answer: AdsAnswer) -> None:
        """Ads of one page were chosen."""
        self._ads.labels("shown").inc(len(answer.ads))
        self._made(answer)

    def click(self, charge: Charge) -> None:
        """A click on an ad was told."""
        outcome = "repeated" if charge.repeated else "charged" if charge.charged == charge.price else "unpaid"
        self._ads.labels(outcome).inc()
        self._charged.inc(0.0 if charge.repeated else charge.charged)

    def _made(self, answer: Answer | AdsAnswer) -> None:
        for stage in answer.stages:
            self._stage_seconds.labels(stage.stage).observe(stage.spent_ms / 1e3)
            self._stage_mflop.labels(stage.stage).inc(stage.spent_mflop)
            if stage.degraded:
                self._degraded.labels(stage.stage).inc()
        if answer.degraded and not any(stage.degraded for stage in answer.stages):
            self._degraded.labels("engine").inc()

    def events(self, recorded: Recorded) -> None:
        """Events were kept."""
        self._events.labels("new").inc(recorded.num_new)
        self._events.labels("repeated").inc(recorded.num_repeated)
        self._unknown.labels("user").inc(recorded.num_unknown_users)
        self._unknown.labels("item").inc(recorded.num_unknown_items)
        self._unknown.labels("action").inc(recorded.num_unknown_actions)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)


class _ServerState(Collector):
    """What the engine and the batcher know themselves, read when asked for."""

    def __init__(self, engine: Engine, batcher: Batcher) -> None:
        self._engine, self._batcher = engine, batcher

    def collect(self) -> Iterator[Metric]:
        dropped = 0 if self._engine.request_log is None else self._engine.request_log.dropped
        yield CounterMetricFamily(
            "shortlist_request_log_dropped", "Answers that did not get into the request log.", value=dropped
        )
        yield GaugeMetricFamily(
            "shortlist_waiting", "Requests for pages that wait for a worker.", value=self._batcher.num_waiting
        )
        yield CounterMetricFamily(
            "shortlist_workers_replaced", "Workers that hung and were replaced.", value=self._batcher.num_replaced
        )
        yield from _memories(self._engine)
        governor = self._engine.live.governor
        if governor is not None:
            prices = GaugeMetricFamily(
                "shortlist_price", "Worth of one unit of a resource at which chains are chosen.", labels=["resource"]
            )
            for name, price in zip(RESOURCES, governor.allocator.prices_C.tolist()):
                prices.add_metric([name], price)
            yield prices
            yield GaugeMetricFamily(
                "shortlist_cap_ms", "Dearest chain that the server affords now; -1 = any.", value=governor.cap_ms or -1
            )
        yield InfoMetricFamily(
            "shortlist_process",
            "The process whose numbers these are; several may share a port.",
            value={"pid": str(os.getpid())},
        )
        yield InfoMetricFamily(
            "shortlist_snapshot", "The snapshot that answers now.", value={"version": self._engine.snapshot_version}
        )


def _memories(engine: Engine) -> Iterator[Metric]:
    """What systems remember of users, by the place where it is, each within its bound."""
    memories = engine.live.cascade.memories
    if memories is None:
        return
    status = memories.status()
    places = [("process", status.num_bytes, status.max_bytes, status.num_entries)]
    found = [("process", status.num_hits - status.num_shelved - status.num_read), ("summaries", status.num_read)]
    if status.shelf is not None:
        shelf = status.shelf
        places.append((shelf.kind, shelf.num_bytes, shelf.max_bytes, shelf.num_entries))
        found.append((shelf.kind, status.num_shelved))
        yield GaugeMetricFamily(
            "shortlist_memories_away", "1 while the place of memories can not be used.", value=shelf.problem is not None
        )
        yield CounterMetricFamily(
            "shortlist_memories_evicted", "Memories that had to make room.", value=shelf.num_evicted
        )
    for name, text, column in (
        ("shortlist_memory_bytes", "Bytes of what systems remember of users.", 1),
        ("shortlist_memory_limit_bytes", "Their bound.", 2),
        ("shortlist_memory_entries", "Memories kept.", 3),
    ):
        family = GaugeMetricFamily(name, text, labels=["place"])
        for place in places:
            family.add_metric([str(place[0])], float(place[column]))
        yield family
    lookups = CounterMetricFamily(
        "shortlist_memory_lookups", "Questions for a memory, by where it was found.", labels=["place"]
    )
    for name, count in (*found, ("nowhere", status.num_misses)):
        lookups.add_metric([name], count)
    yield lookups
