"""Experiments of a server: stopped by themselves when a guardrail is crossed, and counted.

    every few seconds    what other servers of the same request log have stopped is taken over
    once a minute        one process of the server judges all guardrails, in a process of its own so that no answer waits for it

Intervals hold at all times at once (metrics/sequential.py), so looking once a minute stops no harmless experiment more often than looking
once would.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shortlist.cascade.every import Every
from shortlist.cascade.trials import Trials
from shortlist.errors import DataError, ShortlistError
from shortlist.store.events import StoreUnavailable

LOG = logging.getLogger("shortlist.serving")
LOOK_S = 5.0
"""Seconds between looks at what others have stopped."""
JUDGE_S = 60.0
"""Seconds between judgements at least; one that takes long is followed by a pause ten times as long."""
Judge = Callable[[], Mapping[str, str]]
"""Why each harmful experiment should be stopped, by name."""


def harms(log: Path, events: Path | str | None) -> dict[str, str]:
    """Crossed guardrails of experiments that are not stopped yet, by name; errors as of `evaluation.experiments.report`."""
    from shortlist.evaluation.experiments import report

    return {found.name: found.harm for found in report(log, events) if found.harm and found.stopped is None}


def judge_beside(log: Path, events: Path | str | None) -> Judge:
    """`harms` in a process of its own, at low priority, which ends after each judgement, and with the server."""

    def judge() -> Mapping[str, str]:
        context = multiprocessing.get_context("spawn")
        words, theirs = context.Pipe(duplex=False)
        process = context.Process(target=tell_harms, args=(theirs, log, events), name="judge", daemon=True)
        process.start()
        theirs.close()
        try:
            is_well, found = words.recv()
        except EOFError:
            raise DataError("the judge ended without a word; the log above says why") from None
        finally:
            process.join()
        if not is_well:
            raise DataError(found)
        harmful: Mapping[str, str] = found
        return harmful

    return judge


def tell_harms(words: Connection, log: Path, events: Path | str | None) -> None:
    """The judge's process: sends (True, harms) or (False, what is wrong)."""
    os.nice(10)
    try:
        words.send((True, harms(log, events)))
    except (ShortlistError, StoreUnavailable) as error:
        words.send((False, str(error)))


class Referee:
    """Stops experiments that do harm.

    Args:
        trials: the experiments at work.
        judge: None = this process only takes over what others stop.
        look_s: seconds between looks.
        judge_s: seconds between judgements.
    """

    def __init__(
        self, trials: Trials, judge: Judge | None = None, *, look_s: float = LOOK_S, judge_s: float = JUDGE_S
    ) -> None:
        guarded = any(experiment.guardrails for experiment in trials.experiments.values())
        self.trials, self.judge = trials, judge if guarded else None
        self.judge_s = judge_s
        self._judge_at = 0.0
        self._looks = Every(look_s, self._watch, "referee")

    def start(self) -> Referee:
        """Look from now on, in a thread of its own."""
        self._judge_at = time.monotonic() + self.judge_s
        self._looks.start()
        return self

    def close(self) -> None:
        """Stop looking; a judgement under way is not waited for."""
        self._looks.stop()

    def look(self) -> None:
        """Take over what others have stopped. Never raises."""
        try:
            self.trials.look_for_stops()
        except Exception as error:  # the files may be away for a while; pages are served all the same
            LOG.warning("stopped experiments can not be read: %s", error)

    def judge_now(self) -> None:
        """Stop what crosses a guardrail. Never raises."""
        if self.judge is None:
            return
        try:
            for name, reason in self.judge().items():
                LOG.warning("the experiment %s is stopped: %s", name, reason)
                self.trials.stop(name, reason)
        except ShortlistError as error:
            LOG.warning("guardrails can not be judged: %s", error)
        except Exception:
            LOG.exception("guardrails can not be judged")

    def _watch(self) -> None:
        self.look()
        began = time.monotonic()
        if began >= self._judge_at:
            self.judge_now()
            now = time.monotonic()
            self._judge_at = now + max(self.judge_s, 10 * (now - began))


class TrialNumbers(Collector):
    """Experiments in /metrics."""

    def __init__(self, trials: Trials) -> None:
        self._trials = trials

    def collect(self) -> Iterator[Metric]:
        """See `prometheus_client`."""
        pages = CounterMetricFamily(
            "shortlist_experiment_pages", "Pages that an experiment had a hand in.", labels=["experiment", "variant"]
        )
        for (name, variant), count in list(self._trials.shown.items()):
            pages.add_metric([name, variant], count)
        yield pages
        running = GaugeMetricFamily(
            "shortlist_experiment_running", "1 while an experiment runs, 0 once it is stopped.", labels=["experiment"]
        )
        for name, experiment in self._trials.experiments.items():
            running.add_metric([name], experiment.settings.running and name not in self._trials.stopped)
        yield running
