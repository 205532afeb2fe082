"""What spares requests the wait for a server that was gone a moment ago."""

from __future__ import annotations

import threading
import time


class Breaker:
    """Remembers that a server did not answer; safe to use from many threads.

    Args:
        rest_s: seconds after a failure in which nobody tries again; then one caller does, and the others wait for what it finds.
    """

    def __init__(self, rest_s: float) -> None:
        self.rest_s = rest_s
        self._lock = threading.Lock()
        self._reason: str | None = None
        self._until = 0.0

    @property
    def reason(self) -> str | None:
        """Why the server could not be used when it was last tried; None where it could."""
        return self._reason

    def refusal(self) -> str | None:
        """None: try the server, and tell with `worked` or `failed`. Else why not to try it now."""
        with self._lock:
            if self._reason is None:
                return None
            now = time.monotonic()
            if now < self._until:
                return self._reason
            self._until = now + self.rest_s
            return None

    def failed(self, reason: str) -> None:
        """The server could not be used."""
        with self._lock:
            self._reason, self._until = reason, time.monotonic() + self.rest_s

    def worked(self) -> None:
        """The server answered."""
        if self._reason is not None:
            with self._lock:
                self._reason = None
