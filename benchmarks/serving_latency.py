"""Latency of one page at concurrency 1: the cascade alone, the engine around it, and HTTP around the engine; and events per second.

    python benchmarks/serving_latency.py [--requests 2000] [--quick] [--out benchmarks/results/serving_latency.json]

The run is made from the built-in shop log with systems that learn no weights. The server is a process of its own, reached over loopback by
one client that keeps its connection. The arms take turns, so that a busy moment hits all of them. `engine_overhead` is the time of an
engine's answer less that of its stages, request by request; `http_overhead` compares the medians.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from _server import served
from shortlist.cascade.build import train_cascade
from shortlist.cascade.config import RunConfig
from shortlist.cascade.engine import Engine
from shortlist.data.batches import request_batch
from shortlist.data.dataset import build_dataset
from shortlist.data.datasets import load
from shortlist.evaluation.benchmarks import record
from shortlist.evaluation.evidence import machine_lock
from shortlist.store.events import Event, EventStore

RESULT = Path(__file__).parent / "results" / "serving_latency.json"
RUN = """
[surface]
k = 10
[stages.retrieval]
systems = ["personal-frequency", "counts", "popularity"]
keep = 300
[stages.pre-ranking]
systems = ["counts"]
keep = 100
[stages.ranking]
systems = ["personal-frequency", "counts"]
keep = 50
[stages.re-ranking]
systems = ["mmr"]
"""


def make_run(folder: Path) -> Path:
    """A four-stage run on the built-in log."""
    config = RunConfig.from_toml(RUN)
    train_cascade(build_dataset(load("builtin"), config.data_settings), config, folder, progress=False)
    return folder


def ask_http(connection: http.client.HTTPConnection, method: str, path: str, body: object = None) -> dict:
    """One request on the kept connection."""
    content = None if body is None else json.dumps(body)
    connection.request(method, path, content, {"content-type": "application/json"})
    response = connection.getresponse()
    answer = json.loads(response.read())
    assert response.status == 200, answer
    return answer


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds, and what came out."""
    began = time.perf_counter()
    result = work()
    return (time.perf_counter() - began) * 1e3, result


def percentiles(times: list[float]) -> dict[str, float]:
    """p50 and p99 of milliseconds."""
    return {"p50_ms": round(float(np.percentile(times, 50)), 3), "p99_ms": round(float(np.percentile(times, 99)), 3)}


def measure_pages(
    engine: Engine, plain: Engine, connection: http.client.HTTPConnection, num_requests: int
) -> list[dict]:
    """The arms, in turns over the same users."""
    live = engine.live
    users = np.random.default_rng(0).choice(live.dataset.user_ids.ids.to_list(), num_requests)
    times: dict[str, list[float]] = {arm: [] for arm in ("cascade", "engine", "engine_with_state", "http")}
    overhead = []
    for number, user in enumerate(users.tolist()):
        histories, requests = live.dataset.requests_for([user], at=live.log_end)
        batch = request_batch(histories, live.user_fields, requests, max_history=live.cascade.max_history)
        in_turn: dict[str, Callable[[], Any]] = {
            "cascade": partial(live.cascade.run, batch, k=10),
            "engine": partial(plain.recommend, user, 10),
            "engine_with_state": partial(engine.recommend, user, 10),
            "http": partial(ask_http, connection, "GET", f"/v1/recommend/{user}?k=10"),
        }
        spent = {arm: timed(work) for arm, work in in_turn.items()}
        if number >= num_requests // 10:  # the first tenth warms up
            for arm, (ms, _) in spent.items():
                times[arm].append(ms)
            ms, answer = spent["engine_with_state"]
            overhead.append(ms - sum(stage.spent_ms for stage in answer.stages))
    arms = [{"arm": arm, "requests": len(ms), **percentiles(ms)} for arm, ms in times.items()]
    return [*arms, {"arm": "engine_overhead", "requests": len(overhead), **percentiles(overhead)}]


def measure_events(folder: Path, connection: http.client.HTTPConnection, num_batches: int) -> list[dict]:
    """Acknowledged events per second in batches of 100: the store with both settings, and HTTP."""
    arms = []
    batch = [Event(user=f"u{n % 37}", item=f"i{n}", timestamp=1.7e9 + n) for n in range(100)]
    for sync in ("full", "normal"):
        store = EventStore(folder / f"{sync}.db", sync=sync)
        seconds = sum(timed(partial(store.append, batch))[0] for _ in range(num_batches)) / 1e3
        arms.append({"arm": f"store, sync={sync}", "events_per_second": round(100 * num_batches / seconds)})
        store.close()
    body = [{"user": e.user, "item": e.item, "timestamp": e.timestamp} for e in batch]
    post = partial(ask_http, connection, "POST", "/v1/events", body)
    seconds = sum(timed(post)[0] for _ in range(num_batches)) / 1e3
    return [*arms, {"arm": "http, sync=full", "events_per_second": round(100 * num_batches / seconds)}]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2_000)
    parser.add_argument("--quick", action="store_true", help="200 requests, nothing written unless --out is given")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--note", default="", help="written into the result, such as what else ran on the machine")
    arguments = parser.parse_args()
    num_requests = 200 if arguments.quick else arguments.requests
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary, machine_lock():
        folder = Path(temporary)
        run = make_run(folder / "run")
        files = ("--events", folder / "events.db", "--request-log", folder / "requests.db")
        with (
            served(run, *files) as server,
            Engine.load(run) as plain,
            Engine.load(run, events=folder / "own.db", request_log=folder / "own-requests.db") as engine,
        ):
            connection = http.client.HTTPConnection("127.0.0.1", server.port)
            load_before = os.getloadavg()[0]
            pages = measure_pages(engine, plain, connection, num_requests)
            events = measure_events(folder, connection, max(num_requests // 20, 10))
    for arm in [*pages, *events]:
        print("  ".join(f"{value:<22}" if name == "arm" else f"{name} {value:,}" for name, value in arm.items()))
    figures = {
        "settings": {"requests": num_requests, "threads": 1, "concurrency": 1, "note": arguments.note},
        "arms": pages,
        "http_overhead_p50_ms": round(pages[3]["p50_ms"] - pages[2]["p50_ms"], 3),
        "events": events,
        "load_average": load_before,
    }
    record(RESULT, figures, quick=arguments.quick, out=arguments.out)


if __name__ == "__main__":
    main()
