"""Something done again and again beside the requests: the governor's tick, looks at what other processes did."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Every:
    """Calls `work` every so many seconds, in a thread of its own, from `start` to `stop`.

    Args:
        seconds: between two calls; the first one comes after as many.
        work: must not raise, or the calls end.
        name: of the thread.
    """

    def __init__(self, seconds: float, work: Callable[[], object], name: str) -> None:
        self.seconds, self._work = seconds, work
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Call from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Call no more; a call under way is waited for no longer than twice the time between two. Does nothing where none was started."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2 * self.seconds)

    def _run(self) -> None:
        while not self._stopping.wait(self.seconds):
            self._work()
