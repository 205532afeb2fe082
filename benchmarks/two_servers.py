"""Read-your-writes across two servers: how long until an event that one took is in the next page of the other, and how often it is not.

    python benchmarks/two_servers.py [--rounds 200] [--quick] [--out benchmarks/results/two_servers.json]

Two `shortlist serve` processes of one run on a part of the built-in shop log share an event store: a SQLite file, and PostgreSQL where it
is installed (tests/services.py starts one of its own). In every round one server is sent an event of a new user, and once it has answered
the other is asked for the user's page; they take turns. `ms` is the time from sending the event to the whole page. The bars: every first
page knows the event, within a second.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from _server import ONE_THREAD, ask, served
from _services import services, started
from kills import make_shop
from shortlist.evaluation.benchmarks import record
from shortlist.evaluation.evidence import machine_lock

RESULT = Path(__file__).parent / "results" / "two_servers.json"
BAR_MS = 1_000.0


@contextmanager
def stores(folder: Path) -> Iterator[dict[str, object]]:
    """Where events may be kept, by kind."""
    module = services()
    found: dict[str, object] = {"file": folder / "events.db"}
    if module.program("postgres") is None:
        print("PostgreSQL is not installed, so only the file is measured: make services")
        yield found
        return
    with started(module.Postgres) as postgres:
        yield {**found, "postgresql": postgres.schema()}


def measure(run: Path, events: object, rounds: int) -> dict[str, Any]:
    """All rounds over one store."""
    times_ms, stale = [], 0
    with ExitStack() as stack:
        ports = [
            stack.enter_context(
                served(run, "--events", events, "--request-log", run.with_name(f"{n}.db"), env=ONE_THREAD)
            ).port
            for n in range(2)
        ]
        for number in range(1, rounds + 1):
            told, asked = ports if number % 2 else ports[::-1]
            began = time.perf_counter()
            event = {"user": f"visitor-{number}", "item": number, "event_id": str(number)}
            status, answer = ask(told, "/v1/events", event)
            if status != 200 or answer["num_new"] != 1:
                raise SystemExit(f"the event was not taken: {status} {answer}")
            _, page = ask(asked, f"/v1/recommend/visitor-{number}")
            times_ms.append((time.perf_counter() - began) * 1e3)
            stale += page["num_history"] != 1
    percentiles = {f"p{share}": round(float(np.percentile(times_ms, share)), 1) for share in (50, 99)}
    return {"rounds": rounds, "stale": stale, "ms": {**percentiles, "max": round(max(times_ms), 1)}}


def main() -> None:
    """Measure, print, write; exit code 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200, help="for each store")
    parser.add_argument("--quick", action="store_true", help="20 rounds; nothing written without --out")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rounds = 20 if given.quick else given.rounds
    with tempfile.TemporaryDirectory() as name, nullcontext() if given.quick else machine_lock():
        load_before, folder = os.getloadavg()[0], Path(name)
        make_shop(folder, seed=0, share=12).train(folder / "run", "trainer.epochs=1").undisturbed()
        with stores(folder) as kinds:
            found = {kind: measure(folder / "run", events, rounds) for kind, events in kinds.items()}
    for kind, one in found.items():
        print(f"{kind:10}  " + "  ".join(f"{name} {value}" for name, value in one.items()))
    holds = all(one["stale"] == 0 and one["ms"]["max"] < BAR_MS for one in found.values())
    figures = {
        "settings": {"rounds": rounds, "threads": 1},
        "stores": found,
        "bar": f"every first page knows the event, within {BAR_MS:g} ms",
        "holds": holds,
        "load_average": load_before,
    }
    record(RESULT, figures, quick=given.quick, out=given.out)
    raise SystemExit(0 if holds else 1)


if __name__ == "__main__":
    main()
