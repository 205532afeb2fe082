"""Two server processes over one PostgreSQL and one Redis: what either acknowledged counts on both, also when one is killed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request

import pytest


@pytest.fixture
def servers(run, tmp_path, postgres, redis_server):
    """Two processes and their addresses, started side by side."""
    redis_server.empty()
    events, environment = postgres.schema(), {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    processes = []
    for number in range(2):
        words = ["serve", run, "--port", 0, "--events", events, "--memories", redis_server.url()]
        words += ["--request-log", tmp_path / f"{number}.db"]
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "shortlist.cli", *map(str, words)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
        )
    lines = [process.stdout.readline() for process in processes]
    found = [re.search(r" at (http://127\.0\.0\.1:\d+)", line) for line in lines]
    assert all(found), [process.stderr.read() for process, at in zip(processes, found) if at is None]
    yield processes, [at[1] for at in found]
    for process in processes:
        process.kill()
        process.communicate()


def call(address, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data=data, headers={"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as response:
        return json.load(response)


def test_what_one_acknowledged_the_other_shows(servers):
    processes, (first, second) = servers
    known = call(first, "/v1/recommend/user-3")["num_history"]
    for number, (told, asked) in enumerate([(first, second), (second, first)] * 3, start=1):
        began = time.perf_counter()
        assert (
            call(told, "/v1/events", {"user": "user-3", "item": 100 + number, "event_id": str(number)})["num_new"] == 1
        )
        answer = call(asked, "/v1/recommend/user-3")
        assert time.perf_counter() - began < 1.0
        assert (answer["num_history"], answer["degraded"]) == (known + number, None)
    again = call(second, "/v1/events", {"user": "user-3", "item": 101, "event_id": "1"})
    assert (again["num_new"], again["num_repeated"]) == (0, 1)
    call(first, "/v1/events", [{"user": "user-3", "item": 120 + n, "event_id": f"last-{n}"} for n in range(5)])
    processes[0].kill()
    processes[0].communicate()
    assert call(second, "/v1/recommend/user-3")["num_history"] == known + 6 + 5
    with urllib.request.urlopen(second + "/metrics", timeout=20) as response:
        assert 'shortlist_memory_limit_bytes{place="redis"} 1.073741824e+09' in response.read().decode()
