"""Acknowledged events per second in batches of 100: SQLite with both settings, PostgreSQL, and the same through HTTP.

    python benchmarks/events.py [--batches 500] [--postgres URL] [--folder DIR] [--quick] [--out benchmarks/results/events.json]

Every event is new, of one of 10,000 users, and half of them carry an event_id. A batch counts when its call has returned: with SQLite
"full" and with PostgreSQL the disk has it then. The arms take turns batch by batch, so that a busy moment hits all of them. Servers are
processes of their own, reached over loopback; `clients` is the number of connections that send at once, each a thread here. Without
--postgres a server is installed and started from Debian's packages, its data in --folder beside the SQLite files.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from _server import ONE_THREAD, served
from _services import services, started
from shortlist.cascade.build import train_cascade
from shortlist.cascade.config import RunConfig
from shortlist.data.dataset import build_dataset
from shortlist.data.datasets import load
from shortlist.evaluation.benchmarks import record
from shortlist.evaluation.evidence import machine_lock
from shortlist.store.events import Event, EventStore

RESULT = Path(__file__).parent / "results" / "events.json"
GOAL = 20_000
SIZE = 100
RUN = """
[stages.retrieval]
systems = ["counts", "popularity"]
keep = 100
"""


def batches() -> Iterator[list[Event]]:
    """Batches without end."""
    for number in count():
        first = number * SIZE
        yield [
            Event(
                user=f"user-{n * 7919 % 10_000}",
                item=f"item-{n % 5_003}",
                timestamp=1.7e9 + n / 10,
                action="view",
                event_id=f"event-{n}" if n % 2 else None,
            )
            for n in range(first, first + SIZE)
        ]


def body(batch: list[Event]) -> bytes:
    """A batch as a client sends it."""
    names = ("user", "item", "timestamp", "action", "event_id")
    return json.dumps(
        [{name: getattr(e, name) for name in names if getattr(e, name) is not None} for e in batch]
    ).encode()


def post(connection: http.client.HTTPConnection, content: bytes) -> None:
    """Send a batch, and wait until it is acknowledged."""
    connection.request("POST", "/v1/events", content, {"content-type": "application/json"})
    response = connection.getresponse()
    answer = json.loads(response.read())
    assert answer.get("num_new") == SIZE, answer


@contextmanager
def postgres(given: str | None, folder: Path) -> Iterator[Callable[[], str]]:
    """Gives URLs: of the given database, or each time of an empty schema of a server that is started for it."""
    if given is not None:
        yield lambda: given
        return
    module = services()
    module.install()
    with started(partial(module.Postgres, str(folder))) as service:
        yield service.schema


def in_turns(arms: dict[str, Callable[[], Any]], num_batches: int) -> list[dict[str, Any]]:
    """Events per second of each arm, and milliseconds of a batch, over the same number of batches."""
    spent: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(num_batches + 3):
        for name, work in arms.items():
            began = time.perf_counter()
            work()
            if number >= 3:  # the first ones open connections
                spent[name].append(time.perf_counter() - began)
    return [{"arm": name, "clients": 1, **figures(np.array(times))} for name, times in spent.items()]


def figures(seconds: np.ndarray, total_s: float | None = None) -> dict[str, float]:
    """What is told of the seconds of batches; `total_s` where they overlapped."""
    p50, p99 = np.percentile(seconds * 1e3, [50, 99]).round(2).tolist()
    rate = SIZE * len(seconds) / (seconds.sum() if total_s is None else total_s)
    return {"events_per_second": round(float(rate)), "p50_ms": p50, "p99_ms": p99}


def at_once(port: int, num_clients: int, num_batches: int, source: Iterator[list[Event]]) -> dict[str, float]:
    """Several connections that send as fast as they are answered; bodies are made before the clock starts."""
    each = -(-num_batches // num_clients)
    contents = [[body(next(source)) for _ in range(each)] for _ in range(num_clients)]
    times: list[float] = []

    def client(mine: list[bytes]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        for content in mine:
            began = time.perf_counter()
            post(connection, content)
            times.append(time.perf_counter() - began)

    threads = [threading.Thread(target=client, args=(mine,)) for mine in contents]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return figures(np.array(times), time.perf_counter() - began)


def measure(folder: Path, given: str | None, num_batches: int) -> list[dict[str, Any]]:
    """All arms."""
    torch.set_num_threads(1)
    config = RunConfig.from_toml(RUN)
    run = folder / "run"
    train_cascade(build_dataset(load("builtin"), config.data_settings), config, run, progress=False)
    with ExitStack() as stack:
        url = stack.enter_context(postgres(given, folder))
        places = {"sqlite": str(folder / "served.db"), "postgresql": url()}
        sources = {name: batches() for name in ("full", "normal", "pg", *places)}
        stores = {
            "full": EventStore(folder / "full.db"),
            "normal": EventStore(folder / "normal.db", sync="normal"),
            "pg": EventStore(url()),
        }
        for store in stores.values():
            stack.callback(store.close)
        ports = {}
        for name, place in places.items():
            (folder / name).mkdir()
            files = ("--events", place, "--request-log", folder / name / "requests.db")
            ports[name] = stack.enter_context(served(run, *files, env=ONE_THREAD)).port

        def append(name: str) -> None:
            stores[name].append(next(sources[name]))

        connections = {name: http.client.HTTPConnection("127.0.0.1", port) for name, port in ports.items()}
        ready = {name: [body(next(sources[name])) for _ in range(num_batches + 3)] for name in places}

        def send(name: str) -> None:
            post(connections[name], ready[name].pop())

        arms: dict[str, Callable[[], Any]] = {
            "store, sqlite full": partial(append, "full"),
            "store, sqlite normal": partial(append, "normal"),
            "store, postgresql": partial(append, "pg"),
            **{f"http, {name}": partial(send, name) for name in places},
        }
        told = in_turns(arms, num_batches)
        for name, port in ports.items():
            found = at_once(port, 4, num_batches, sources[name])
            told.append({"arm": f"http, {name}", "clients": 4, **found})
    return told


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=500)
    parser.add_argument("--postgres", help="URL of an empty database; default: a server of its own")
    parser.add_argument("--folder", type=Path, help="where the files are written; default: a temporary folder")
    parser.add_argument("--quick", action="store_true", help="30 batches, nothing written unless --out is given")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--note", default="", help="written into the result, such as what else ran on the machine")
    arguments = parser.parse_args()
    num_batches = 30 if arguments.quick else arguments.batches
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary, machine_lock():
        folder = Path(temporary)
        folder.chmod(0o755)  # PostgreSQL's own user passes through
        load_before = os.getloadavg()[0]
        arms = measure(folder, arguments.postgres, num_batches)
    for arm in arms:
        print("  ".join(f"{value:<22}" if name == "arm" else f"{name} {value:,}" for name, value in arm.items()))
    told = {
        "settings": {"batches": num_batches, "batch_size": SIZE, "note": arguments.note},
        "goal_events_per_second": GOAL,
        "arms": arms,
        "load_average": load_before,
    }
    record(RESULT, told, quick=arguments.quick, out=arguments.out)


if __name__ == "__main__":
    main()
