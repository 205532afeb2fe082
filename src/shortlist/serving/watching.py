"""A server follows the place whose runs it serves: when another version becomes the current one, it is loaded beside and swapped in.

    Watcher(engine, place).start()       looks at PLACE/current.json once a second

Every server and every worker process of a place watches by itself, so all follow within about a second and the time that loading takes.
Requests under way finish on the old version. A version that can not be loaded is left out and told; the old one goes on answering.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shortlist.cascade.engine import Engine
from shortlist.cascade.every import Every
from shortlist.errors import ShortlistError
from shortlist.store.published import Place, State, Version

LOG = logging.getLogger("shortlist.serving")
EVERY_S = 1.0
"""Seconds between looks."""
RETRY_S = 30.0
"""Seconds until a version that could not be loaded is tried again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Following:
    """How a server stands to its place."""

    serving: str
    """The version that answers now."""
    num_swaps: int
    """Versions taken up since the server started."""
    num_failed: int
    """Attempts to take up a version that failed."""
    problem: str | None
    """Why the current version of the place is not served; None where it is."""


class Watcher:
    """Keeps an engine at the current version of a place; safe to use from many threads.

    Args:
        engine: serves a version of the place.
        place: where versions are published.
        every_s: seconds between looks.
    """

    def __init__(self, engine: Engine, place: Place, *, every_s: float = EVERY_S) -> None:
        self.engine, self.place, self.every_s = engine, place, every_s
        self._looking = threading.Lock()
        self._looks = Every(every_s, self.look, "watcher")
        self._stamp: tuple[int, int, int] | None = None
        self._retry_at = 0.0
        self._num_swaps = self._num_failed = 0
        self._problem: str | None = None

    def start(self) -> Watcher:
        """Look from now on, in a thread of its own."""
        self._looks.start()
        return self

    def close(self) -> None:
        """Stop looking; a version that is being loaded is not waited for."""
        self._looks.stop()

    @property
    def following(self) -> Following:
        """How it stands now."""
        return Following(
            serving=self.engine.snapshot_version,
            num_swaps=self._num_swaps,
            num_failed=self._num_failed,
            problem=self._problem,
        )

    def look(self) -> bool:
        """Take up the current version where it is another one; whether it was taken up. Never raises."""
        with self._looking:
            stamp = self.place.stamp()
            if stamp == self._stamp and (self._problem is None or time.monotonic() < self._retry_at):
                return False
            try:
                wanted = self.place.state().current
                swapped = wanted != self.engine.snapshot_version
                if swapped:
                    self.engine.swap(self.place.run(wanted))
                    self._num_swaps += 1
                    LOG.info("serving %s", wanted)
                self._problem = None
            except Exception as error:  # whatever is wrong with a new version, the old one answers
                swapped = False
                self._num_failed += 1
                self._problem = str(error) if isinstance(error, ShortlistError) else f"{type(error).__name__}: {error}"
                self._retry_at = time.monotonic() + RETRY_S
                LOG.error("%s stays in use: %s", self.engine.snapshot_version, self._problem)
            self._stamp = stamp
            return swapped

    def serve(self, version: str) -> Version:
        """Make a version of the place the current one and serve it; SnapshotError where it is not there or damaged."""
        chosen = self.place.select(version)
        self.look()
        return chosen

    def rollback(self, version: str | None = None) -> Version:
        """Go back in the place (see Place.rollback) and serve what is then current."""
        chosen = self.place.rollback(version)
        self.look()
        return chosen

    def state(self) -> State:
        """What the place holds."""
        return self.place.state()


class WatcherNumbers(Collector):
    """Swaps in /metrics."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher

    def collect(self) -> Iterator[Metric]:
        """How the server stands to its place."""
        found = self._watcher.following
        yield CounterMetricFamily("shortlist_swaps", "Snapshots taken up while serving.", value=found.num_swaps)
        yield CounterMetricFamily(
            "shortlist_swaps_failed", "Attempts to take up a snapshot that failed.", value=found.num_failed
        )
        yield GaugeMetricFamily(
            "shortlist_snapshot_behind",
            "1 while the current snapshot of the place could not be taken up.",
            value=found.problem is not None,
        )
