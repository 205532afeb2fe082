"""Requests that wait at the same time are answered together.

    ask ──> waiting ──> worker takes all that wait, up to a batch ──> one pass of the cascade ──> every caller its answer

A worker that is free takes a request at once, so nothing waits for company; while workers are busy, what comes in becomes the next
batch. A request that could not be answered within its time is refused before it costs anything (Overloaded), and one that a hanging
worker holds is given up at its time limit (Late), while a new worker takes the place of the one that hangs.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shortlist.cascade.answers import Answer
from shortlist.cascade.questions import Question
from shortlist.errors import ShortlistError
from shortlist.serving.settings import ServerConfig

Outcome = Answer | ShortlistError
Answering = Callable[[Sequence[Question], float | None], Sequence[Outcome]]
"""Answers to questions within so many milliseconds (None = without a limit)."""
FOR_STAGES = 0.8
"""Share of the time left that the stages get; in the rest a page is made of what those in time have given."""
MOST_GIVEN_UP = 64
"""Workers that hang and were replaced at most: when as many hang for good, more threads would not help."""


class Overloaded(RuntimeError):
    """More requests wait than can be answered in time."""


class Late(RuntimeError):
    """A request got no answer within its time."""


@dataclass(slots=True)
class _Waiting:
    question: Question
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Outcome]
    since: float


class Batcher:
    """Worker threads in front of an engine; `ask` belongs to the event loop of the server.

    Args:
        answer: answers to questions, in their order; may raise.
        config: bounds.
    """

    def __init__(self, answer: Answering, config: ServerConfig | None = None) -> None:
        self.config = config or ServerConfig()
        self._answer = answer
        self._waiting: deque[_Waiting] = deque()
        self._there = threading.Condition()
        self._closed = False
        self._busy_since: dict[threading.Thread, float] = {}
        self._batch_s = 0.0
        """Seconds that a batch takes, of late."""
        self._batch_size = 1.0
        """Requests in a batch, of late."""
        self.num_replaced = 0
        """Workers that hung and were replaced."""
        self._workers: set[threading.Thread] = set()
        self._given_up: set[threading.Thread] = set()
        for _ in range(self.config.num_workers):
            self._hire()

    @property
    def num_waiting(self) -> int:
        """Requests that no worker has taken yet."""
        return len(self._waiting)

    async def ask(self, question: Question) -> Answer:
        """The answer to a question.

        Raises:
            Overloaded: it could not be answered within the time limit; nothing was spent on it.
            Late: it was not answered within the time limit.
            ShortlistError: the question can not be answered as it is.
        """
        loop = asyncio.get_running_loop()
        one = _Waiting(question, loop, loop.create_future(), time.monotonic())
        limit_ms = self.config.time_limit_ms
        with self._there:
            too_late = limit_ms is not None and bool(self._waiting) and self._expected_s() * 1e3 > limit_ms
            if too_late or len(self._waiting) >= self.config.max_waiting:
                raise Overloaded(
                    f"{len(self._waiting)} requests wait already, more than can be answered in time; try again"
                )
            self._waiting.append(one)
            self._there.notify()
        if limit_ms is None:
            result = await one.future
        else:
            try:
                result = await asyncio.wait_for(one.future, limit_ms / 1e3)
            except TimeoutError:
                self._replace_hanging()
                raise Late(f"no answer within {limit_ms:g} ms") from None
        if isinstance(result, ShortlistError):
            raise result
        return result

    def close(self) -> None:
        """Answer what waits, then let the workers go; a worker that hangs is not waited for."""
        with self._there:
            self._closed = True
            self._there.notify_all()
        for worker in list(self._workers):
            worker.join(timeout=5)

    # -- workers -------------------------------------------------------------------------------------------------

    def _expected_s(self) -> float:
        """Seconds until a request that came now would have its answer."""
        batch_size = min(max(self._batch_size, len(self._waiting) / self.config.num_workers), self.config.max_batch)
        rounds = len(self._waiting) / (batch_size * self.config.num_workers) + 1
        return rounds * self._batch_s

    def _hire(self) -> None:
        worker = threading.Thread(target=self._work, name="answers", daemon=True)
        self._workers.add(worker)
        worker.start()

    def _work(self) -> None:
        """Take what waits and answer it, until the batcher is closed or the worker was given up."""
        me = threading.current_thread()
        while True:
            batch = self._take(me)
            if batch is None:
                return
            began = time.monotonic()
            results = self._answered([one.question for one in batch], self._left_ms(batch, began))
            took_s = time.monotonic() - began
            with self._there:
                self._busy_since.pop(me, None)
                self._batch_s += 0.2 * (took_s - self._batch_s)
                self._batch_size += 0.2 * (len(batch) - self._batch_size)
            _deliver(batch, results)

    def _take(self, me: threading.Thread) -> list[_Waiting] | None:
        """Requests that still can be answered in time; None when there is nothing left to do."""
        with self._there:
            while True:
                while not self._waiting and not self._closed and me in self._workers:
                    self._there.wait()
                if me not in self._workers or (self._closed and not self._waiting):
                    return None
                self._linger()
                batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), self.config.max_batch))]
                batch = [one for one in batch if not self._is_over(one)]
                if batch:
                    self._busy_since[me] = time.monotonic()
                    return batch

    def _linger(self) -> None:
        """Wait for company until the oldest request has waited long enough."""
        while self._waiting and len(self._waiting) < self.config.max_batch and not self._closed:
            left_s = self._waiting[0].since + self.config.linger_ms / 1e3 - time.monotonic()
            if left_s <= 0:
                return
            self._there.wait(left_s)

    def _is_over(self, one: _Waiting) -> bool:
        limit_ms = self.config.time_limit_ms
        return one.future.cancelled() or (limit_ms is not None and (time.monotonic() - one.since) * 1e3 >= limit_ms)

    def _left_ms(self, batch: Sequence[_Waiting], now: float) -> float | None:
        """What the stages may take of what the request that has waited longest has left."""
        limit_ms = self.config.time_limit_ms
        if limit_ms is None:
            return None
        return max(FOR_STAGES * (limit_ms - (now - min(one.since for one in batch)) * 1e3), 1.0)

    def _answered(self, questions: Sequence[Question], left_ms: float | None) -> Sequence[Outcome | Exception]:
        try:
            return self._answer(questions, left_ms)
        except Exception as error:  # a fault must not end the worker, and not reach those who only waited beside it
            if len(questions) == 1:
                return [error]
            return [self._answered([one], left_ms)[0] for one in questions]

    def _replace_hanging(self) -> None:
        """Hire for workers that have been at one batch for twice the time limit; they end by themselves if they ever come back."""
        limit_ms = self.config.time_limit_ms
        if limit_ms is None:
            return
        with self._there:
            now = time.monotonic()
            hanging = [one for one, since in self._busy_since.items() if (now - since) * 1e3 > 2 * limit_ms]
            self._given_up = {worker for worker in self._given_up if worker.is_alive()}
            for worker in hanging[: MOST_GIVEN_UP - len(self._given_up)]:
                self._workers.discard(worker)
                self._given_up.add(worker)
                del self._busy_since[worker]
                self.num_replaced += 1
                self._hire()


def _deliver(batch: Sequence[_Waiting], results: Sequence[Outcome | Exception]) -> None:
    """Results into the futures, in their own loop."""

    def deliver() -> None:
        for one, result in zip(batch, results):
            if one.future.done():
                continue
            if isinstance(result, Exception) and not isinstance(result, ShortlistError):
                one.future.set_exception(result)
            else:
                one.future.set_result(result)

    try:
        batch[0].loop.call_soon_threadsafe(deliver)
    except RuntimeError:  # the loop is closed: nobody waits any more
        return
