"""Load on a server over real HTTP: open loop (requests come when they come) and closed loop (each client waits for its answer).

    replies = open_loop(port, arrivals_s, paths)             sent at their times whatever the server does
    replies = closed_loop(port, paths, concurrency=16)       as fast as the server answers

A path is asked for with GET; a `Post` brings a body.

Latency of an open loop counts from the moment a request was due, so a generator or a server that falls behind hides nothing. One process
and one thread, connections kept open; it speaks just the HTTP that it needs, so that the generator is not what is measured.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shortlist.errors import DataError

FAILED = 0
"""Status of a request that got no answer: refused connection, broken reply, or none in time."""
FRESH_S = 2.0
"""Seconds after which an idle connection is not used again: servers close theirs after a few, and that is no failure of a request."""


@dataclass(frozen=True, slots=True)
class Post:
    """A request that brings a body."""

    path: str
    body: bytes
    """JSON."""


Ask = str | Post
"""A path, asked for with GET, or a request with a body."""


@dataclass(frozen=True, kw_only=True)
class Replies:
    """What became of N requests, in the order in which they were due."""

    due_s: NDArray[np.float64]
    """[N] since the start."""
    sent_s: NDArray[np.float64]
    """[N] since the start; later than due where no connection was free or the generator fell behind."""
    latency_ms: NDArray[np.float64]
    """[N] from due to the last byte; of a failed request until it was given up."""
    status: NDArray[np.int64]
    """[N] HTTP status; 0 = no answer."""
    bodies: list[bytes | None]
    """[N] as the server sent them; None without an answer."""

    def percentile(self, share: float) -> float:
        """Milliseconds within which that share of the answered requests had their answer; NaN where none had."""
        answered = self.latency_ms[self.status == 200]
        return float(np.percentile(answered, share)) if len(answered) else float("nan")


def open_loop(
    port: int,
    arrivals_s: NDArray[np.float64],
    paths: Sequence[Ask],
    *,
    host: str = "127.0.0.1",
    max_connections: int = 256,
    timeout_s: float = 5.0,
) -> Replies:
    """Send request n, paths[n], at second arrivals_s[n], whatever became of those before.

    Args:
        arrivals_s: rising, seconds since the start.
        max_connections: open at once; a request that finds none free waits for one, and its latency counts that.
        timeout_s: time from due after which a request has failed.

    Raises DataError where there are not as many paths as arrivals, or the arrivals do not rise.
    """
    if len(paths) != len(arrivals_s) or (np.diff(arrivals_s) < 0).any():
        raise DataError(f"{len(arrivals_s)} rising arrivals need as many paths, got {len(paths)}")
    loop = _Load(host, port, paths, arrivals_s, max_connections, timeout_s)
    return asyncio.run(loop.run_open())


def closed_loop(
    port: int, paths: Sequence[Ask], *, concurrency: int, host: str = "127.0.0.1", timeout_s: float = 30.0
) -> Replies:
    """Send all requests, `concurrency` at a time, each as soon as another one is done."""
    loop = _Load(host, port, paths, np.zeros(len(paths)), concurrency, timeout_s)
    return asyncio.run(loop.run_closed(concurrency))


class _Load:
    """One run of a load; N requests."""

    def __init__(
        self,
        host: str,
        port: int,
        paths: Sequence[Ask],
        due_s: NDArray[np.float64],
        max_connections: int,
        timeout_s: float,
    ) -> None:
        self.host, self.port, self.timeout_s = host, port, timeout_s
        self.requests = [_request(host, ask) for ask in paths]
        self.due_s = due_s.astype(np.float64)
        self.sent_s, self.latency_ms = np.zeros(len(paths)), np.zeros(len(paths))
        self.status = np.zeros(len(paths), dtype=np.int64)
        self.bodies: list[bytes | None] = [None] * len(paths)
        self.free: deque[tuple[asyncio.StreamReader, asyncio.StreamWriter, float]] = deque()
        """Idle connections and since when, on the clock of `time.perf_counter`; the freshest is last."""
        self.most = max_connections

    async def run_open(self) -> Replies:
        """Every request at its time."""
        self.slots = asyncio.Semaphore(self.most)
        self.began = time.perf_counter()
        tasks = []
        for number, due in enumerate(self.due_s.tolist()):
            ahead = due - (time.perf_counter() - self.began)
            if ahead > 0:
                await asyncio.sleep(ahead)
            tasks.append(asyncio.create_task(self._one(number)))
        await asyncio.gather(*tasks)
        return self._replies()

    async def run_closed(self, concurrency: int) -> Replies:
        """So many clients, each with one request at a time."""
        self.slots = asyncio.Semaphore(self.most)
        self.began = time.perf_counter()
        numbers = iter(range(len(self.requests)))

        async def client() -> None:
            for number in numbers:
                self.due_s[number] = time.perf_counter() - self.began
                await self._one(number)

        await asyncio.gather(*(client() for _ in range(concurrency)))
        return self._replies()

    async def _one(self, number: int) -> None:
        due = self.began + self.due_s[number]
        try:
            async with asyncio.timeout(max(due + self.timeout_s - time.perf_counter(), 0.001)), self.slots:
                self.sent_s[number] = time.perf_counter() - self.began
                self.status[number], self.bodies[number] = await self._exchange(self.requests[number])
        except (OSError, TimeoutError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            self.status[number] = FAILED
        self.latency_ms[number] = (time.perf_counter() - due) * 1e3

    async def _exchange(self, request: bytes) -> tuple[int, bytes]:
        """One request on a free connection; one that broke or was given up is not used again."""
        reader, writer = self._kept() or await asyncio.open_connection(self.host, self.port)
        try:
            writer.write(request)
            lines = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
            fields = dict(line.lower().split(b":", 1) for line in lines[1:] if b":" in line)
            body = await reader.readexactly(int(fields[b"content-length"]))
        except BaseException:
            writer.close()
            raise
        if fields.get(b"connection", b"").strip() == b"close":
            writer.close()
        else:
            self.free.append((reader, writer, time.perf_counter()))
        return int(lines[0].split()[1]), body

    def _kept(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        """The freshest idle connection; those that lay too long are closed."""
        too_old = time.perf_counter() - FRESH_S
        while self.free and self.free[0][2] < too_old:
            self.free.popleft()[1].close()
        return self.free.pop()[:2] if self.free else None

    def _replies(self) -> Replies:
        for _, writer, _ in self.free:
            writer.close()
        return Replies(
            due_s=self.due_s, sent_s=self.sent_s, latency_ms=self.latency_ms, status=self.status, bodies=self.bodies
        )


def _request(host: str, ask: Ask) -> bytes:
    """As it goes over the wire."""
    if isinstance(ask, str):
        return f"GET {ask} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    head = f"POST {ask.path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(ask.body)}\r\n\r\n".encode() + ask.body
