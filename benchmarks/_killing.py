"""Commands of `shortlist` as processes of their own that are ended by kill -9, and what may be left of them."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from _server import ONE_THREAD, environment

LOOK_S = 0.002
"""Seconds between looks for the first trace of a command."""


@dataclass(kw_only=True)
class Tally:
    """What became of the kills of one kind."""

    kind: str
    kills: int = 0
    too_late: int = 0
    """Commands that had ended when their moment came; another one was drawn for each."""
    acknowledged: int = 0
    """Events for which a client had an answer."""
    lost: int = 0
    """Of these, events that were gone after the restart."""
    answers: int = 0
    """Pages that a server gave while writers were killed beside it."""
    half_read: int = 0
    """Times that somebody met something that was neither the old nor the new, whole."""
    differing: int = 0
    """Commands that were run again and ended with another result than without a kill, or not at all."""
    as_before: int = 0
    """Kills after which the old state stood, or nothing where nothing was."""
    undisturbed_s: float | None = None
    """Of the command from its first trace on disk to its end: the moment is drawn uniformly from it."""
    restart_s: list[float] = field(default_factory=list)
    """From the start of a server to its first page, on the files of one that was killed."""
    problems: list[str] = field(default_factory=list)

    def half(self, problem: str) -> None:
        """Note that something half-written was met."""
        self.half_read += 1
        self.problems.append(problem)

    def differs(self, problem: str) -> None:
        """Note that a command that was run again did not end as without a kill."""
        self.differing += 1
        self.problems.append(problem)


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command of `shortlist` that writes beneath a folder."""

    arguments: Sequence[object]
    watched: Path
    """Folder beneath which its first trace will be."""

    def undisturbed(self) -> float:
        """Let it run; seconds from its first trace to its end. SystemExit where it fails."""
        process, began = self._begun()
        _, told = process.communicate()
        if process.returncode:
            raise SystemExit(f"shortlist {self.arguments[0]} failed: {told.strip()}")
        return time.perf_counter() - began

    def killed(self, after_s: float) -> bool:
        """Start it, and kill it so many seconds after its first trace; False where it had ended by then."""
        process, _ = self._begun()
        try:
            process.wait(after_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return process.returncode == -signal.SIGKILL

    def again(self) -> str | None:
        """Run it to its end; what it said where it failed."""
        done = subprocess.run(_words(self.arguments), capture_output=True, text=True, env=environment(ONE_THREAD))
        return None if done.returncode == 0 else f"exit code {done.returncode}: {done.stderr.strip()[-300:]}"

    def _begun(self) -> tuple[subprocess.Popen[str], float]:
        """A process that has just left its first trace, and the moment."""
        before = names(self.watched)
        process = subprocess.Popen(
            _words(self.arguments),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(ONE_THREAD),
            start_new_session=True,
        )
        while process.poll() is None and names(self.watched) == before:
            time.sleep(LOOK_S)
        return process, time.perf_counter()


def names(folder: Path) -> set[str]:
    """Of all files and folders beneath; what goes while one looks is left out."""
    return {os.path.join(at, name) for at, inner, files in os.walk(folder) for name in (*inner, *files)}


def contents(folder: Path, leave_out: Sequence[str] = ()) -> dict[str, str]:
    """Digest of every file beneath, by its path inside.

    Args:
        leave_out: paths of files that tell the time.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in leave_out:
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _words(arguments: Sequence[object]) -> list[str]:
    return [sys.executable, "-m", "shortlist.cli", *map(str, arguments)]
