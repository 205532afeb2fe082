"""A server process for benchmarks: started, waited for, ended."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Served:
    """A server that takes requests."""

    process: subprocess.Popen[str]
    address: str
    port: int


@contextmanager
def served(
    *arguments: object, env: Mapping[str, str] | None = None, first: Callable[[], None] | None = None
) -> Iterator[Served]:
    """`shortlist serve ARGUMENTS --port 0` in a process of its own.

    Args:
        env: variables beside those of this process.
        first: called in the new process before anything else.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "shortlist.cli", "serve", *map(str, arguments), "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **(env or {})},
        preexec_fn=first,
    )
    try:
        assert process.stdout is not None
        told = re.search(r"(http://\S+:(\d+)) ", process.stdout.readline())
        if told is None:
            raise SystemExit("the server did not start; its message is above")
        yield Served(process=process, address=told[1], port=int(told[2]))
    finally:
        process.terminate()
        process.wait()
