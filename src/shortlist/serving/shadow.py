"""Shadow mode: another run answers a share of the traffic off the request path; its answers are compared and never served.

    request ──> answer ──> caller
                  └──> a share, into a bounded queue ──> one worker asks the other run the same ──> overlap, correlation, latency

A request costs the time to put a reference into a queue. When the queue is full the comparison is dropped and counted.
"""

from __future__ import annotations

import json
import os
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from shortlist.cascade.answers import Answer
from shortlist.cascade.engine import Engine
from shortlist.cascade.live import load_live
from shortlist.cascade.questions import Question
from shortlist.errors import ConfigError, ShortlistError
from shortlist.store.published import served_run

WRITE_EVERY_S = 30.0
"""Seconds between writings of the summary."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShadowConfig:
    """How another run is tried beside the one that serves."""

    share: float = 0.1
    """Of the requests for pages; each is drawn by chance."""
    max_waiting: int = 64
    """Comparisons that may wait; beyond that they are dropped."""
    newest: int = 1_000
    """Comparisons that medians and percentiles are taken of."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"the shadow's share must be above 0 and at most 1, got {self.share}")
        for name in ("max_waiting", "newest"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two answers to one question."""

    overlap: float
    """Share of the longer page's items that both pages have; 1 where both are empty."""
    correlation: float | None
    """Pearson correlation of the scores of those items; None for fewer than three, or where all scores of a side are the same."""
    served_ms: float
    """What the served answer took."""
    shadow_ms: float
    """What the shadow's took."""
    same: bool
    """The same items in the same order."""
    served_degraded: bool
    shadow_degraded: bool


def compare(served: Answer, shadow: Answer) -> Comparison:
    """How much two pages for one question have in common; k is the longer one's length."""
    mine = {item.item_id: item.score for item in served.items}
    theirs = {item.item_id: item.score for item in shadow.items}
    longest = max(len(mine), len(theirs))
    scores = [(score, theirs.get(item)) for item, score in mine.items()]
    return Comparison(
        overlap=len(mine.keys() & theirs.keys()) / longest if longest else 1.0,
        correlation=_correlation([(a, b) for a, b in scores if a is not None and b is not None]),
        served_ms=served.spent_ms,
        shadow_ms=shadow.spent_ms,
        same=list(mine) == list(theirs),
        served_degraded=served.degraded is not None,
        shadow_degraded=shadow.degraded is not None,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ShadowSummary:
    """What came of the comparisons so far. Shares and latencies are of the newest comparisons, None where there are none."""

    served_version: str
    shadow_version: str
    share: float
    """Of the requests that are drawn."""
    num_offered: int
    """Requests drawn."""
    num_compared: int
    num_dropped: int
    """Drawn, but too many waited."""
    num_refused: int
    """The shadow had no answer to them: an item, a field or a rule that its run does not know."""
    num_failed: int
    """The shadow broke on them."""
    overlap: float | None
    """Mean share of items that both pages have."""
    correlation: float | None
    """Mean correlation of the scores of those items."""
    same: float | None
    """Share of pages that are the same."""
    served_degraded: float | None
    """Share of served pages that were degraded."""
    shadow_degraded: float | None
    served_ms: tuple[float, float] | None
    """p50 and p99 of the time that the served answers took."""
    shadow_ms: tuple[float, float] | None


class Shadow:
    """Another run beside the engine that serves; `offer` may be called from any thread and never raises.

    Args:
        engine: serves; its events and its news of items and users are read by the shadow too, so both know the same.
        run: folder of the other run, or of a place of published runs.
        config: share and bounds.
        summary: JSON file that is written now and then, and at the end; None = none.

    Raises SnapshotError where `run` is no run or is damaged.
    """

    def __init__(
        self, engine: Engine, run: Path, config: ShadowConfig | None = None, *, summary: Path | None = None
    ) -> None:
        self.engine, self.config, self.path = engine, config or ShadowConfig(), summary
        # No request log: what nobody was shown must not be read as having been shown.
        self.other = Engine(
            load_live(served_run(run)),
            events=engine.events,
            catalogue=None if engine.upkeep is None else engine.upkeep.store,
            config=engine.config,
        )
        self._draw = random.Random(self.config.seed)
        self._waiting: queue.Queue[tuple[Question, Answer] | None] = queue.Queue(self.config.max_waiting)
        self._newest: deque[Comparison] = deque(maxlen=self.config.newest)
        self.num_offered = self.num_compared = self.num_dropped = self.num_refused = self.num_failed = 0
        self._written_at = time.monotonic()
        self._closed = False
        self._worker = threading.Thread(target=self._work, name="shadow", daemon=True)
        self._worker.start()

    def offer(self, question: Question, answer: Answer) -> None:
        """A question and the answer that is served; drawn for comparison by chance."""
        if self._closed or self._draw.random() >= self.config.share:
            return
        self.num_offered += 1
        try:
            self._waiting.put_nowait((question, answer))
        except queue.Full:
            self.num_dropped += 1

    def wait(self) -> None:
        """Until everything that was drawn has been compared."""
        self._waiting.join()

    def summary(self) -> ShadowSummary:
        """What came of the comparisons so far."""
        newest = list(self._newest)
        correlations = [one.correlation for one in newest if one.correlation is not None]
        return ShadowSummary(
            served_version=self.engine.snapshot_version,
            shadow_version=self.other.snapshot_version,
            share=self.config.share,
            num_offered=self.num_offered,
            num_compared=self.num_compared,
            num_dropped=self.num_dropped,
            num_refused=self.num_refused,
            num_failed=self.num_failed,
            overlap=_mean([one.overlap for one in newest]),
            correlation=_mean(correlations),
            same=_mean([one.same for one in newest]),
            served_degraded=_mean([one.served_degraded for one in newest]),
            shadow_degraded=_mean([one.shadow_degraded for one in newest]),
            served_ms=_middle_and_tail([one.served_ms for one in newest]),
            shadow_ms=_middle_and_tail([one.shadow_ms for one in newest]),
        )

    def close(self) -> None:
        """Compare what waits for at most a few seconds, then write the summary. The engine's files stay open."""
        self._closed = True
        try:
            self._waiting.put(None, timeout=5)
            self._worker.join(timeout=5)
        except queue.Full:  # the worker hangs; it is a daemon and ends with the process
            return
        finally:
            self._write()
        self.other.events = self.other.upkeep = None  # their stores are the engine's to close
        self.other.close()

    # -- the worker ----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            drawn = self._waiting.get()
            try:
                if drawn is None:
                    return
                self._compare(*drawn)
                if time.monotonic() - self._written_at > WRITE_EVERY_S:
                    self._write()
            finally:
                self._waiting.task_done()

    def _compare(self, question: Question, answer: Answer) -> None:
        try:
            (shadow,) = self.other.answer([question])
        except Exception:  # a broken shadow is what this is here to find, and nobody waits for it
            self.num_failed += 1
            return
        if isinstance(shadow, ShortlistError):
            self.num_refused += 1
            return
        self._newest.append(compare(answer, shadow))
        self.num_compared += 1

    def _write(self) -> None:
        """The summary, beside its file and then renamed to it; a full disk must not end the comparisons."""
        self._written_at = time.monotonic()
        if self.path is None:
            return
        beside = self.path.with_name(f"{self.path.name}.part")
        try:
            beside.write_text(json.dumps(asdict(self.summary()), indent=1) + "\n", encoding="utf-8")
            os.replace(beside, self.path)
        except OSError:
            return


def _correlation(scores: list[tuple[float, float]]) -> float | None:
    if len(scores) < 3:
        return None
    a, b = (side - side.mean() for side in np.array(scores, dtype=np.float64).T)
    scale = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / scale if scale > 1e-12 else None


def _mean(values: list[float] | list[bool]) -> float | None:
    return float(np.mean(values)) if values else None


def _middle_and_tail(values: list[float]) -> tuple[float, float] | None:
    if not values:
        return None
    middle, tail = np.percentile(values, [50, 99])
    return float(middle), float(tail)


class ShadowNumbers(Collector):
    """The comparisons in /metrics."""

    def __init__(self, shadow: Shadow) -> None:
        self._shadow = shadow

    def collect(self) -> Iterator[Metric]:
        """What came of them so far."""
        found = self._shadow.summary()
        outcomes = CounterMetricFamily(
            "shortlist_shadow", "Requests drawn for the shadow, by what became of them.", labels=["outcome"]
        )
        for name in ("compared", "dropped", "refused", "failed"):
            outcomes.add_metric([name], getattr(found, f"num_{name}"))
        yield outcomes
        newest = GaugeMetricFamily("shortlist_shadow_newest", "Means over the newest comparisons.", labels=["what"])
        for name in ("overlap", "correlation", "same", "served_degraded", "shadow_degraded"):
            value = getattr(found, name)
            if value is not None:
                newest.add_metric([name], value)
        yield newest
        seconds = GaugeMetricFamily(
            "shortlist_shadow_seconds", "Time of the newest answers compared.", labels=["side", "quantile"]
        )
        for side, times in (("served", found.served_ms), ("shadow", found.shadow_ms)):
            for quantile, ms in zip(("0.5", "0.99"), times or ()):
                seconds.add_metric([side, quantile], ms / 1e3)
        yield seconds
        yield InfoMetricFamily("shortlist_shadow_snapshot", "The other run.", value={"version": found.shadow_version})
