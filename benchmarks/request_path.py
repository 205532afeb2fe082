"""The path of a request: a million items through four stages over HTTP, what the engine and HTTP add, and what answering together gains.

    python benchmarks/request_path.py [--items 1000000] [--requests 2000] [--quick] [--out benchmarks/results/request_path.json]

    large        1 M items of 64 numbers behind an IVF index, 500 candidates, then 200, 50 and a page of 10, weights untrained: HTTP at
                 concurrency 1, and the server's memory
    overhead     four stages that do nothing on 1,000 items: the engine's answer less its stages, and HTTP's answer less the engine's
    together     the large run at concurrency 16: batches of up to 16 against one request at a time

The server is a process of its own on loopback; the load generator keeps its connections.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from _server import Served, served
from shortlist.cascade.cascade import Cascade
from shortlist.cascade.config import RunConfig
from shortlist.cascade.engine import Engine
from shortlist.cascade.indexing import build_indexes
from shortlist.cascade.lessons import chunks, make_batch, sample
from shortlist.cascade.run import make_system, most_chosen, save_run
from shortlist.data.dataset import build_dataset
from shortlist.data.log import read
from shortlist.evaluation.benchmarks import record
from shortlist.evaluation.evidence import machine_lock
from shortlist.evaluation.load import closed_loop

RESULT = Path(__file__).parent / "results" / "request_path.json"
SYSTEMS = Path(__file__).parent / "_request_systems.py"
USERS, EVENTS, DIM = 4_000, 30, 64


def log_of(num_items: int, seed: int = 0) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Events of USERS people, and the catalogue."""
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(USERS), EVENTS)
    item = rng.zipf(1.2, len(user)) % num_items
    at = 1_600_000_000 + 86_400 * np.tile(np.arange(EVENTS), USERS) + user
    shelf = (np.arange(num_items) % 50).astype(str)
    return pl.DataFrame({"user_id": user, "item_id": item, "timestamp": at}), pl.DataFrame(
        {"item_id": np.arange(num_items), "shelf": shelf}
    )


def save(folder: Path, num_items: int, table: dict[str, Any]) -> None:
    """A run with untrained weights."""
    events, items = log_of(num_items)
    config = RunConfig.from_table(table)
    dataset = build_dataset(read(events, items=items), config.data_settings)
    view = dataset.view("test")
    systems = {}
    for name in config.systems:
        systems[name] = make_system(config, name, view.space)
        systems[name].prepare(view)
    cascade = Cascade(config, dataset.space, systems, popular=most_chosen(view))

    def queries(retriever: Any, most: int) -> Iterator[Any]:
        asked = sample(dataset.split.valid, most, 0)
        for index in chunks(len(asked), dataset.num_items):
            yield make_batch(dataset, asked.select(index), retriever.max_history)

    cascade.indexes, _ = build_indexes(cascade, queries)
    save_run(folder, dataset, config, cascade, {})


def large_table(vectors: Path) -> dict[str, Any]:
    """500 candidates through four stages."""
    return {
        "surface": {"k": 10, "repeats": "yes"},
        "stages": {
            "retrieval": {"systems": ["file-vectors"], "keep": 500},
            "pre-ranking": {"systems": ["light"], "keep": 200},
            "ranking": {"systems": ["dnn"], "keep": 50},
            "re-ranking": {"systems": ["mmr"], "keep": 10},
        },
        "systems": {
            "file-vectors": {"path": str(vectors)},
            "light": {"system": "dnn", "widths": [], "use_ids": False},
            "dnn": {"widths": [64, 32], "use_ids": False},
        },
    }


EMPTY_TABLE = {
    "surface": {"k": 10, "repeats": "yes"},
    "stages": {
        "retrieval": {"systems": ["first-rows"], "keep": 100},
        "pre-ranking": {"systems": ["no-op"], "keep": 50},
        "ranking": {"systems": ["nothing"], "keep": 20},
        "last": {"systems": ["last-nothing"], "keep": 10},
    },
    "systems": {"nothing": {"system": "no-op"}, "last-nothing": {"system": "no-op"}},
}


def server(run: Path, files: Path, *flags: str) -> AbstractContextManager[Served]:
    """A server of the run, with its files in a folder."""
    return served(run, "--threads", 1, "--events", files / "events.db", "--request-log", files / "requests.db", *flags)


def memory_mib(pid: int) -> float:
    """Resident memory of a process."""
    kib = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(kib[1]) / 1024 if kib else float("nan")


def percentiles(times: np.ndarray) -> dict[str, float]:
    """p50 and p99 of milliseconds."""
    return {"p50_ms": round(float(np.percentile(times, 50)), 3), "p99_ms": round(float(np.percentile(times, 99)), 3)}


def measure_large(run: Path, paths: list[str]) -> dict[str, Any]:
    """HTTP at concurrency 1, and memory."""
    with tempfile.TemporaryDirectory() as files, server(run, Path(files)) as made:
        port = made.port
        closed_loop(port, paths[: len(paths) // 5], concurrency=1)
        replies = closed_loop(port, paths, concurrency=1)
        return {
            **percentiles(replies.latency_ms),
            "failed": int((replies.status != 200).sum()),
            "memory_mib": round(memory_mib(made.process.pid)),
        }


def measure_overhead(run: Path, paths: list[str]) -> dict[str, Any]:
    """What the engine adds to its stages, and HTTP to the engine."""
    users = [path.rsplit("/", 1)[1] for path in paths]
    own, whole = [], []
    with Engine.load(run) as engine:
        for user in users:
            began = time.perf_counter()
            answer = engine.recommend(user)
            ms = (time.perf_counter() - began) * 1e3
            whole.append(ms)
            own.append(ms - sum(stage.spent_ms for stage in answer.stages))
    start = len(users) // 5  # the first fifth warms up
    with tempfile.TemporaryDirectory() as files, server(run, Path(files)) as made:
        port = made.port
        closed_loop(port, paths[:start], concurrency=1)
        replies = closed_loop(port, paths, concurrency=1)
    http = percentiles(replies.latency_ms)
    engine_ms = percentiles(np.array(whole[start:]))
    return {
        "engine_less_stages": percentiles(np.array(own[start:])),
        "engine": engine_ms,
        "http": http,
        "http_less_engine_p50_ms": round(http["p50_ms"] - engine_ms["p50_ms"], 3),
    }


def measure_together(run: Path, paths: list[str]) -> dict[str, Any]:
    """Requests per second at concurrency 16, alone and together."""
    found: dict[str, Any] = {}
    for name, flags in (("one at a time", ("--max-batch", "1")), ("together", ("--max-batch", "16"))):
        with tempfile.TemporaryDirectory() as files, server(run, Path(files), "--at-once", "1", *flags) as made:
            port = made.port
            closed_loop(port, paths[: len(paths) // 5], concurrency=16)
            began = time.perf_counter()
            replies = closed_loop(port, paths, concurrency=16)
            found[name] = {
                "requests_per_second": round(len(paths) / (time.perf_counter() - began), 1),
                **percentiles(replies.latency_ms),
                "failed": int((replies.status != 200).sum()),
            }
    ratio = found["together"]["requests_per_second"] / found["one at a time"]["requests_per_second"]
    return {**found, "throughput_ratio": round(ratio, 2)}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--requests", type=int, default=2_000)
    parser.add_argument(
        "--quick", action="store_true", help="20,000 items, 200 requests; nothing written unless --out is given"
    )
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    num_items, num_requests = (20_000, 200) if arguments.quick else (arguments.items, arguments.requests)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary, machine_lock():
        folder = Path(temporary)
        (folder / "systems").mkdir()
        shutil.copy(SYSTEMS, folder / "systems" / "request_systems.py")
        os.environ["SHORTLIST_SYSTEMS"] = str(folder / "systems")
        vectors = folder / "vectors.npy"
        rng = np.random.default_rng(0)
        centres = rng.normal(size=(num_items // 100 + 1, DIM))[np.arange(num_items + 1) // 100]
        np.save(vectors, (centres + 0.6 * rng.normal(size=centres.shape)).astype(np.float32))
        del centres
        save(folder / "large", num_items, large_table(vectors))
        save(folder / "empty", 1_000, EMPTY_TABLE)
        paths = [f"/v1/recommend/{user}" for user in rng.integers(0, USERS, num_requests).tolist()]
        figures = {
            "settings": {"items": num_items, "requests": num_requests, "threads": 1},
            "large": measure_large(folder / "large", paths),
            "overhead": measure_overhead(folder / "empty", paths),
            "together": measure_together(folder / "large", paths),
        }
    for name, found in figures.items():
        print(name, found)
    record(RESULT, figures, quick=arguments.quick, out=arguments.out)


if __name__ == "__main__":
    main()
