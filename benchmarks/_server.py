"""A server process for benchmarks: started, waited for, asked, ended."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Variables of a process that computes with one thread."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """A server that takes requests."""

    process: subprocess.Popen[str]
    address: str
    port: int


def on_core(core: int) -> None:
    """Keep this process on one core, where there is more than one."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[core % len(cores)]})


def environment(own: Mapping[str, str] | None = None) -> dict[str, str]:
    """Of this process, so that another one finds the same package; and variables of its own."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **(own or {})}


@contextmanager
def served(
    *arguments: object,
    env: Mapping[str, str] | None = None,
    first: Callable[[], None] | None = None,
    port: int = 0,
) -> Iterator[Served]:
    """`shortlist serve ARGUMENTS --port PORT` in a process of its own.

    Args:
        env: variables beside those of this process.
        first: called in the new process before anything else.
        port: 0 = any free one.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "shortlist.cli", "serve", *map(str, arguments), "--port", str(port)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(env),
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


def ask(port: int, path: str, body: Any = None, *, timeout_s: float = 20.0) -> tuple[int, Any]:
    """One request on a connection of its own, POST where it has a body: status and answer. OSError or HTTPException without an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        data = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, data, {"content-type": "application/json"})
        response = connection.getresponse()
        return response.status, json.load(response)
    finally:
        connection.close()
