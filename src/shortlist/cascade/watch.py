"""Work that may fail or be late, and the account of it. B requests of a batch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

from shortlist.errors import DataError

T = TypeVar("T")
MOST_LEFT = 8
"""Late calls of one thing that may still run: beyond that it is not started again until one of them has ended."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Why something was passed over."""

    reason: str
    requests: Tensor | None = None
    """bool [B]: for which requests; None = all."""

    def concerns(self, request: int) -> bool:
        """Whether request number `request` of the batch is one of them."""
        return self.requests is None or bool(self.requests[request])


class LeftBehind:
    """Calls that were late, were left behind and still run, so that what hangs for good does not fill memory with threads."""

    def __init__(self) -> None:
        self._threads: dict[str, list[threading.Thread]] = {}
        self._lock = threading.Lock()

    def add(self, what: str, thread: threading.Thread) -> None:
        """One more."""
        with self._lock:
            self._threads.setdefault(what, []).append(thread)

    def count(self, what: str) -> int:
        """Those that still run."""
        if what not in self._threads:
            return 0
        with self._lock:
            self._threads[what] = [thread for thread in self._threads[what] if thread.is_alive()]
            return len(self._threads[what])


@dataclass(slots=True)
class Watch:
    """Looks over one stage: runs its work, and keeps what it cost and what went wrong."""

    deadline: float | None = None
    """On the clock of `time.perf_counter`; None = wait for everything."""
    strict: bool = False
    """Failures are raised: for training, where nothing may be lost in silence."""
    flops: float = 0.0
    """Per request."""
    problems: list[Problem] = field(default_factory=list)
    left: LeftBehind = field(default_factory=LeftBehind)
    """Shared by all stages of a cascade."""

    def attempt(self, what: str, work: Callable[[], T]) -> T | None:
        """The result of `work`; None, with a problem noted, when it failed or the deadline passed first.

        With a deadline the work runs in a thread of its own and is left behind when it is late: a running tensor operation can
        not be stopped, but nobody has to wait for it.
        """
        if self.strict:
            return work()
        if self.deadline is None:
            try:
                return work()
            except Exception as error:
                self._failed(what, error)
                return None
        left = self.deadline - time.perf_counter()
        if left <= 0:
            self.problems.append(Problem(f"{what} was not started: no time left before the deadline"))
            return None
        still = self.left.count(what)
        if still >= MOST_LEFT:
            self.problems.append(Problem(f"{what} was not started: {still} late calls of it still run"))
            return None
        box: _Box[T] = _Box(torch.is_inference_mode_enabled())
        thread = threading.Thread(target=box.fill, args=(work,), daemon=True, name=f"cascade-{what}")
        thread.start()
        thread.join(left)
        if not box.done:
            self.left.add(what, thread)
            self.problems.append(
                Problem(f"{what} was late: not ready {left * 1e3:.0f} ms after its start, at the deadline")
            )
            return None
        if box.error is not None:
            self._failed(what, box.error)
        return box.result

    def note_bad(self, what: str, bad_B: Tensor, fault: str = "scores that are no numbers") -> None:
        """Note requests for which something gave what can not be used, bool [B]."""
        if bool(bad_B.any()):
            reason = f"{what} gave {fault}"
            if self.strict:
                raise DataError(f"{reason}, for {int(bad_B.sum())} of {len(bad_B)} requests")
            self.problems.append(Problem(reason, bad_B))

    def _failed(self, what: str, error: Exception) -> None:
        self.problems.append(Problem(f"{what} failed ({type(error).__name__}: {error})"))


@dataclass(slots=True)
class _Box(Generic[T]):
    """What a worker thread leaves behind."""

    in_inference: bool
    """Whether who waits is in inference mode."""
    result: T | None = None
    error: Exception | None = None
    done: bool = False

    def fill(self, work: Callable[[], T]) -> None:
        try:
            with torch.no_grad(), torch.inference_mode(self.in_inference):  # modes belong to a thread
                self.result = work()
        except Exception as error:
            self.error = error
        self.done = True
