"""What requests may cost on average, set while a server runs: in its process, and in all of them where several share a port.

    Budgets(engine).set(Budget(ms=2.0))             one process
    Budgets(engine, path).start()                   one of several: what any of them sets stands in a file, which all follow

The file lives as long as the server, so a start goes by the command line again.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from dataclasses import asdict, replace
from pathlib import Path

from shortlist.cascade.allocation.base import Budget
from shortlist.cascade.engine import Engine
from shortlist.cascade.every import Every
from shortlist.errors import ConfigError, ShortlistError

LOG = logging.getLogger("shortlist.serving")
EVERY_S = 1.0
"""Seconds between looks at what other processes set."""


class Budgets:
    """Sets an engine's budget; safe to use from many threads.

    Args:
        engine: over a calibrated run, else nothing can be set.
        path: of the file that the processes of a server share; None = there is one process.
        every_s: seconds between looks at it.
    """

    def __init__(self, engine: Engine, path: Path | None = None, *, every_s: float = EVERY_S) -> None:
        self.engine, self.path, self.every_s = engine, path, every_s
        self._setting = threading.Lock()
        self._stamp: tuple[int, int] | None = None
        self._looks = Every(every_s, self.look, "budgets")

    def set(self, budget: Budget) -> None:
        """Let a request cost another budget on average from now on, after a swap too; no limits = as calibrated.

        Raises ConfigError, and changes nothing, where the run is not calibrated or its prices follow the traffic.
        """
        with self._setting:
            self._aim(budget)
            if self.path is not None:
                beside = self.path.with_suffix(f".{os.getpid()}")
                beside.write_text(json.dumps(asdict(budget)), encoding="utf-8")
                beside.replace(self.path)
                self._stamp = self._seen()

    def look(self) -> bool:
        """Take up what another process set; whether there was something. Never raises."""
        with self._setting:
            stamp = self._seen()
            if self.path is None or stamp is None or stamp == self._stamp:
                return False
            self._stamp = stamp
            try:
                self._aim(Budget(**json.loads(self.path.read_text(encoding="utf-8"))))
            except (ShortlistError, OSError, ValueError, TypeError) as error:
                LOG.error("the budget stays as it was: %s", error)
                return False
            return True

    def start(self) -> Budgets:
        """Look from now on, in a thread of its own."""
        self.look()
        self._looks.start()
        return self

    def close(self) -> None:
        """Stop looking."""
        self._looks.stop()

    def _aim(self, budget: Budget) -> None:
        engine = self.engine
        with engine.swapping:
            if engine.live.governor is None:
                raise ConfigError(
                    "no budget can be kept, because this run is not calibrated: run `shortlist calibrate` on it and serve it again"
                )
            engine.live.governor.aim(budget)
            engine.config = replace(engine.config, governor=replace(engine.config.governor, budget=budget))

    def _seen(self) -> tuple[int, int] | None:
        try:
            found = None if self.path is None else self.path.stat()
        except OSError:
            return None
        return None if found is None else (found.st_ino, found.st_mtime_ns)
