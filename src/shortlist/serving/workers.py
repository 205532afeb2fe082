"""A server as one process, or as several that share a socket, an event store and a memory-mapped snapshot.

    one      serve(opening, listener, ...)          engine, watcher of its place, shadow, HTTP
    many     serve_many(opening, listener, 4, ...)  a parent that starts, watches and stops four of the former

The parent binds the port and takes no requests; the kernel gives each connection to whichever worker accepts it first. A worker that
dies is replaced; all stop with the parent, also when it is killed. Nothing heavy is imported before a worker needs it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from shortlist.errors import ConfigError, ShortlistError
from shortlist.serving.settings import ServerConfig

LOOK_S = 0.2
"""Seconds between looks at the workers."""
AGAIN_S = 1.0
"""Seconds until a worker that died is replaced."""
STOP_S = 10.0
"""Seconds beyond the grace of requests that a worker may take to write down what it holds."""

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Opening:
    """What a server serves and how: plain values, so that they can be handed to another process."""

    folder: Path
    """A run, or a place of published runs, which is then followed."""
    events: Path | str
    """Where events are kept, as `Engine.load` takes it."""
    request_log: Path
    """Where answers are logged."""
    config: ServerConfig
    memories: Path | str | None = None
    """Where memories of users outlast a process, as `Engine.load` takes it; None = nowhere."""
    memory_mib: int = 256
    """Bound of memories in a process, in MiB."""
    memories_mib: int = 1_024
    """Bound of what `memories` names, in MiB."""
    deadline_ms: float | None = None
    """Time after which no stage is waited for; None = wait."""
    allocate: bool = True
    """Whether a calibrated allocator chooses chains."""
    budget_ms: float | None = None
    """Milliseconds a request may cost on average; None = as calibrated."""
    budget_mflop: float | None = None
    """1e6 FLOPs a request may cost on average; None = as calibrated."""
    capacity_ms: float | None = None
    """Milliseconds of work that all requests of a second may cost; None = no such limit."""
    target_ms: float | None = None
    """Latency to keep to under overload; None = none."""
    experiments: Path | None = None
    """TOML file of experiments, whose relative folders begin at its own; None = none."""
    shadow: Path | None = None
    """Another run, or place, that answers a share of the traffic unseen; None = none."""
    shadow_share: float = 0.1
    """That share."""
    shared: Path | None = None
    """Folder in which the workers of one server tell each other what was set while they run; None = there is one."""

    @property
    def summary(self) -> Path:
        """Where the shadow's comparisons are summed up."""
        return self.folder.with_name(f"{self.folder.name}.shadow.json")


def serve(opening: Opening, listener: socket.socket, admin: socket.socket | None, say: Say, *, number: int = 0) -> None:
    """Serve in this process until SIGTERM or SIGINT.

    Args:
        opening: what to serve.
        listener, admin: bound sockets; see `server.run`.
        say: gets a line when requests are taken.
        number: of the worker; the first one writes the shadow's summary and judges guardrails of experiments.

    Raises SnapshotError where there is no run or it is damaged, ConfigError or DataError for settings that do not go with it.
    """
    from shortlist.cascade.allocation.base import Budget
    from shortlist.cascade.engine import Engine, EngineConfig
    from shortlist.cascade.experiments import read_experiments
    from shortlist.cascade.governor import GovernorConfig
    from shortlist.cascade.trials import Trials
    from shortlist.serving import server
    from shortlist.serving.budgeting import Budgets
    from shortlist.serving.experimenting import Referee, judge_beside
    from shortlist.serving.shadow import Shadow, ShadowConfig
    from shortlist.serving.watching import Watcher
    from shortlist.store.published import Place, is_place, served_run
    from shortlist.store.shelf import ShelfConfig

    governor = GovernorConfig(
        allocate=opening.allocate,
        budget=Budget(ms=opening.budget_ms, mflop=opening.budget_mflop),
        capacity=Budget(ms=opening.capacity_ms),
        target_ms=opening.target_ms,
    )
    with ExitStack() as stack:
        engine = stack.enter_context(
            Engine.load(
                served_run(opening.folder),
                events=opening.events,
                request_log=opening.request_log,
                memories=opening.memories,
                config=EngineConfig(
                    deadline_ms=opening.deadline_ms,
                    memory_mib=opening.memory_mib,
                    shelf=ShelfConfig(max_mib=opening.memories_mib),
                    governor=governor,
                ),
            )
        )
        watcher = shadow = budgets = trials = None
        if opening.experiments is not None:
            file = opening.experiments.absolute()
            trials = stack.enter_context(Trials(engine, read_experiments(file), folder=file.parent))
            judge = None if number else judge_beside(opening.request_log, opening.events)
            stack.callback(Referee(trials, judge).start().close)
        if opening.shared is not None:
            budgets = Budgets(engine, opening.shared / "budget.json").start()
            stack.callback(budgets.close)
        if opening.shadow is not None:
            config, summary = ShadowConfig(share=opening.shadow_share), None if number else opening.summary
            shadow = Shadow(engine, opening.shadow, config, summary=summary)
            stack.callback(shadow.close)
        if is_place(opening.folder):
            watcher = Watcher(engine, Place(opening.folder)).start()
            stack.callback(watcher.close)
        server.run(
            engine,
            listener,
            opening.config,
            say=say,
            admin=admin,
            watcher=watcher,
            shadow=shadow,
            budgets=budgets,
            trials=trials,
        )


def serve_many(
    opening: Opening, listener: socket.socket, admin: socket.socket | None, num_workers: int, say: Say
) -> None:
    """Serve in `num_workers` processes until SIGTERM or SIGINT; arguments and errors as of `serve`.

    The first one is waited for before the others start, so that it makes the files which all share, and a fault is told once.
    """
    shared = tempfile.TemporaryDirectory(prefix="shortlist-")
    crew = _Crew(replace(opening, shared=Path(shared.name)), listener, admin, say)
    before = {number: signal.signal(number, crew.stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        crew.run(num_workers)
    finally:
        crew.end()
        shared.cleanup()
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(slots=True)
class _Worker:
    process: SpawnProcess
    words: Connection
    """What the worker says: (True, line) when it takes requests, (False, sentence) when it can not."""
    is_ready: bool = False
    last_words: str = field(default="")


class _Crew:
    """The workers of one server."""

    def __init__(self, opening: Opening, listener: socket.socket, admin: socket.socket | None, say: Say) -> None:
        self.opening, self.listener, self.admin, self.say = opening, listener, admin, say
        self.context = multiprocessing.get_context("spawn")
        # Nothing is ever sent: that its other end has closed tells the workers that the parent is gone.
        self.alive, self.holding = self.context.Pipe(duplex=False)
        self.workers: dict[int, _Worker] = {}
        self.again_at: dict[int, float] = {}
        self.stopping = False

    def stop(self, *_: object) -> None:
        """Called on a signal."""
        self.stopping = True

    def run(self, num_workers: int) -> None:
        """Start them, and put others in the place of those that die."""
        self._start(0)
        told = False
        while not self.stopping:
            if self.workers and self.workers[0].is_ready:
                for number in range(len(self.workers), num_workers):
                    self._start(number)
            self._look()
            if not told and len(self.workers) == num_workers and all(w.is_ready for w in self.workers.values()):
                told = True
                self.say(f"{self.workers[0].last_words} with {num_workers} workers")

    def _start(self, number: int) -> None:
        words, theirs = self.context.Pipe(duplex=False)
        process = self.context.Process(
            target=_work,
            args=(self.opening, self.listener, self.admin, number, theirs, self.alive),
            name=f"worker-{number}",
            daemon=False,
        )
        process.start()
        theirs.close()
        self.workers[number] = _Worker(process, words)

    def _look(self) -> None:
        """Hear what workers say, and replace those that died."""
        wait([worker.words for worker in self.workers.values() if not worker.words.closed], timeout=LOOK_S)
        for number, worker in self.workers.items():
            self._hear(worker)
            if worker.process.exitcode is None or self.stopping:
                continue
            if not worker.is_ready and number not in self.again_at:
                raise ConfigError(worker.last_words or "a worker ended before it took requests; its log above says why")
            self.again_at.setdefault(number, time.monotonic() + AGAIN_S)
            if time.monotonic() >= self.again_at[number]:
                self.say(f"worker {number} ended (exit code {worker.process.exitcode}) and is replaced")
                self.again_at[number] = time.monotonic() + AGAIN_S
                self._start(number)

    def _hear(self, worker: _Worker) -> None:
        try:
            while not worker.words.closed and worker.words.poll():
                worker.is_ready, worker.last_words = worker.words.recv()
        except (EOFError, OSError):  # it has ended
            worker.words.close()

    def end(self) -> None:
        """Tell all to stop, wait for what they have to finish, and end by force those that hang."""
        for worker in self.workers.values():
            if worker.process.exitcode is None:
                worker.process.terminate()
        until = time.monotonic() + self.opening.config.grace_s + STOP_S
        for worker in self.workers.values():
            worker.process.join(max(until - time.monotonic(), 0))
            if worker.process.exitcode is None:
                worker.process.kill()
                worker.process.join()
        self.listener.close()
        if self.admin is not None:
            self.admin.close()


def _work(
    opening: Opening,
    listener: socket.socket,
    admin: socket.socket | None,
    number: int,
    words: Connection,
    alive: Connection,
) -> None:
    """One worker process."""
    threading.Thread(target=_stop_with_parent, args=(alive,), name="parent", daemon=True).start()

    def say(line: str) -> None:
        words.send((True, line))

    try:
        serve(opening, listener, admin, say, number=number)
    except (ShortlistError, OSError) as error:
        words.send((False, str(error)))
        raise SystemExit(2) from None


def _stop_with_parent(alive: Connection) -> None:
    """Stop as on SIGTERM when the parent is gone, however it went."""
    try:
        alive.recv()
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGTERM)
