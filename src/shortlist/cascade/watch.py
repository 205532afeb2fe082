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


@dataclass(frozen=True, slots=True)
class Problem:
    """Why something was passed over."""

    reason: str
    requests: Tensor | None = None
    """bool [B]: for which requests; None = all."""

    def concerns(self, request: int) -> bool:
        """Whether request number `request` of the batch is one of them."""
        return self.requests is None or bool(self.requests[request])


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
        box: _Box[T] = _Box()
        thread = threading.Thread(target=box.fill, args=(work,), daemon=True, name=f"cascade-{what}")
        thread.start()
        thread.join(left)
        if not box.done:
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

    result: T | None = None
    error: Exception | None = None
    done: bool = False

    def fill(self, work: Callable[[], T]) -> None:
        try:
            with torch.no_grad():  # gradient mode belongs to a thread
                self.result = work()
        except Exception as error:
            self.error = error
        self.done = True
