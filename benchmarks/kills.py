"""kill -9 at random moments during ingest, publish, update, train and the taking of events: what is lost, half-written or slow to return.

    python benchmarks/kills.py [--kills 50] [--seed 0] [--quick] [--out benchmarks/results/kills.json]

With the real commands as processes of their own, on the built-in shop log (all of it for ingest, every sixth customer else). Each kind gets
a fifth of the kills:

    events    a server takes batches of events over HTTP from a client that notes every answer; half of the kills are of a server with two
              workers, the whole group at once. Started again on the same files, every event that was acknowledged must be there.
    ingest    `shortlist ingest`, into a new folder and over an older one: afterwards the folder is absent, the old one or the new one
    publish   `shortlist publish`, while a server of the place is asked all the time: every page is of the old or the new version
    update    `shortlist update` of a place, with the last weeks of the log as new events
    train     `shortlist train`, into a new folder and over an older run

The moment is drawn uniformly from the time between a command's first trace on disk and its end, as an undisturbed run had it; for events
from the first two seconds of the client. After every kill the command runs again, and must end with the same files as without a kill
(but for those that tell the time). The bars: no event lost, nothing half read, no other result, a restart under 5 s.
"""

from __future__ import annotations

import argparse
import http.client
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from _killing import Command, Tally, contents
from _server import ONE_THREAD, ask, served
from shortlist.cascade.live import load_live
from shortlist.data.datasets import load
from shortlist.data.ingested import Ingested, recover
from shortlist.errors import ShortlistError
from shortlist.evaluation.benchmarks import record
from shortlist.evaluation.evidence import machine_lock
from shortlist.store.events import Event, EventStore
from shortlist.store.published import Place
from shortlist.store.snapshot import read_snapshot

RESULT = Path(__file__).parent / "results" / "kills.json"
RUN = """
[surface]
k = 10
[trainer]
epochs = 4
patience = 4
checkpoint_seconds = 0
[learning]
fit_requests = 1500
valid_requests = 200
[update]
margin = 1.0
[stages.retrieval]
systems = ["personal-frequency", "popularity", "two-tower"]
keep = 60
[stages.ranking]
systems = ["dnn"]
keep = 20
[systems.two-tower]
dim = 8
widths = [16]
[systems.dnn]
dim = 8
widths = [16]
"""
BAR_S = 5.0
BATCH = 20
"""Events in one request of the client."""
NEW_DAYS = 21
"""Last days of the log, whose events come in after the training."""
TELLS_TIME = ("manifest.json", "metrics.json")
"""Files in which seconds stand, or a date, or their digest."""
TRIES = 5
"""Moments that are drawn for one kill, where commands end before theirs."""


@dataclass(frozen=True, kw_only=True)
class Shop:
    """What the kinds work on."""

    folder: Path
    seed: int

    @property
    def tables(self) -> tuple[object, ...]:
        """The log and its items, as arguments."""
        return self.folder / "log.parquet", "--items", self.folder / "items.parquet"

    def train(self, out: Path, *settings: str) -> Command:
        """The command that trains a run."""
        words = ("train", *self.tables, "--config", self.folder / "run.toml", "--out", out, "--no-report", "--quiet")
        return Command(arguments=[*words, *(f"--set={one}" for one in settings)], watched=out.parent)

    def lot(self, kind: str) -> np.random.Generator:
        """Draws of one kind."""
        return np.random.default_rng([self.seed, *kind.encode()])


def make_shop(folder: Path, seed: int, share: int) -> Shop:
    """Write the log of every `share`-th customer, without its last weeks, which become the events of a store."""
    log = load("builtin")
    kept = log.events.filter(pl.col("user_id") % share == 0).select("user_id", "item_id", "timestamp", "value")
    is_new = pl.col("timestamp") > pl.col("timestamp").max() - pl.duration(days=NEW_DAYS)
    kept.filter(~is_new).write_parquet(folder / "log.parquet")
    assert log.items is not None
    log.items.write_parquet(folder / "items.parquet")
    (folder / "run.toml").write_text(RUN)
    store = EventStore(folder / "new.db", sync="normal")
    later = kept.filter(is_new).with_columns(second=pl.col("timestamp").dt.epoch("s"))
    store.append(
        [
            Event(user=str(row["user_id"]), item=str(row["item_id"]), timestamp=row["second"], value=row["value"])
            for row in later.iter_rows(named=True)
        ]
    )
    store.close()
    return Shop(folder=folder, seed=seed)


def kill(command: Command, tally: Tally, lot: np.random.Generator, reset: Callable[[], None]) -> None:
    """Kill the command at a moment within its work; `reset` makes the state that it begins with."""
    assert tally.undisturbed_s is not None
    for _ in range(TRIES):
        reset()
        if command.killed(lot.uniform(0, tally.undisturbed_s)):
            tally.kills += 1
            return
        tally.too_late += 1
    raise SystemExit(f"{tally.kind}: ended {TRIES} times before it could be killed; is the machine busy?")


# -- events -----------------------------------------------------------------------------------------------------------


class Client:
    """Sends batches of events one after another until the server is gone; knows which were acknowledged."""

    def __init__(self, port: int, first: int) -> None:
        self.port, self.next = port, first
        self.acknowledged: list[int] = []
        self.thread = threading.Thread(target=self._send, daemon=True)
        self.thread.start()

    def _send(self) -> None:
        try:
            while True:
                number, self.next = self.next, self.next + 1
                status, told = ask(self.port, "/v1/events", events_of(number))
                if status != 200 or told["num_new"] != BATCH:
                    raise SystemExit(f"the server answered {status} {told} to new events")
                self.acknowledged.append(number)
        except (OSError, http.client.HTTPException, ValueError):
            return  # an answer that did not come, or not whole, is no acknowledgement


def events_of(number: int) -> list[dict[str, Any]]:
    """A batch; no two events are alike."""
    now = time.time()
    return [
        {"user": f"visitor-{place}", "item": f"{number}-{place}", "timestamp": now, "event_id": f"{number}-{place}"}
        for place in range(BATCH)
    ]


def kill_servers(shop: Shop, run: Path, kills: int, tally: Tally) -> None:
    """Servers that take events; the first half with one process, the others with two workers."""
    lot, first = shop.lot("events"), 0
    for workers in (1, 2):
        events = shop.folder / f"events-{workers}.db"
        wanted, acknowledged, port = (kills + 1) // 2 if workers == 1 else kills // 2, set[int](), 0
        for turn in range(wanted + 1 if wanted else 0):
            began = time.perf_counter()
            files = ("--events", events, "--request-log", shop.folder / "requests.db", "--workers", workers)
            with served(run, *files, env=ONE_THREAD, first=os.setsid, port=port) as server:
                port = server.port
                status, page = ask(server.port, "/v1/recommend/visitor-0")
                if turn:
                    tally.restart_s.append(time.perf_counter() - began)
                    look_for_events(events, acknowledged, tally)
                if status != 200 or page["degraded"] is not None:
                    tally.half(f"a page after a restart: {status} {page}")
                if turn == wanted:
                    break
                client = Client(server.port, first)
                time.sleep(lot.uniform(0.05, 2.0))
                os.killpg(server.process.pid, signal.SIGKILL)
                client.thread.join()
            tally.kills += 1
            acknowledged |= set(client.acknowledged)
            tally.acknowledged += BATCH * len(client.acknowledged)
            first = client.next


def look_for_events(path: Path, acknowledged: set[int], tally: Tally) -> None:
    """Every acknowledged event is in the store, and of every batch all or nothing."""
    store = EventStore(path)
    kept = {row[1] for part in store.numbered(0, store.last_number()) for row in part}
    store.close()
    lost = {f"{number}-{place}" for number in acknowledged for place in range(BATCH)} - kept
    if lost:
        tally.lost += len(lost)
        tally.problems.append(f"{len(lost)} acknowledged events are gone, {min(lost)} among them")
    if len(kept) % BATCH:
        tally.half(f"{len(kept)} events in batches of {BATCH}: one was kept in part")


# -- ingest -----------------------------------------------------------------------------------------------------------


def kill_ingest(shop: Shop, kills: int, tally: Tally) -> None:
    """Into a new folder, and in every other turn over an older one."""
    lot, home = shop.lot("ingest"), shop.folder / "ingest"
    home.mkdir()
    out = home / "out"
    events = load("builtin").events.select("user_id", "item_id", "timestamp", "value")
    events.write_csv(shop.folder / "whole.csv")
    command = Command(
        arguments=["ingest", shop.folder / "whole.csv", *shop.tables[1:], "--out", out, "--quiet"], watched=home
    )
    tally.undisturbed_s = command.undisturbed()
    whole = contents(out, TELLS_TIME)
    shutil.rmtree(out)
    Command(arguments=["ingest", *shop.tables, "--out", out], watched=home).undisturbed()
    shutil.move(out, shop.folder / "older")
    older = contents(shop.folder / "older", TELLS_TIME)
    for turn in range(kills):

        def reset(with_older: bool = turn % 2 == 1) -> None:
            shutil.rmtree(home)
            shutil.copytree(shop.folder / "older", out) if with_older else home.mkdir()

        kill(command, tally, lot, reset)
        recover(out)
        if out.exists():
            found = contents(out, TELLS_TIME)
            tally.as_before += found == older
            try:
                Ingested.load(out)
                fault = "it is neither" if found not in (older, whole) else None
            except ShortlistError as error:
                fault = str(error)
            if fault is not None:
                tally.half(f"after a kill of ingest: {fault}")
        elif turn % 2:
            tally.half("after a kill of ingest over an older folder there was none")
        else:
            tally.as_before += 1
        fault = command.again()
        if fault or contents(out, TELLS_TIME) != whole or [path.name for path in home.iterdir()] != ["out"]:
            tally.differs(f"ingest again: {fault or 'other files'}")


# -- publish ----------------------------------------------------------------------------------------------------------


class Reader:
    """Asks a server of a place without pause; every page must be whole and of a version that was published."""

    def __init__(self, port: int, versions: set[str], tally: Tally) -> None:
        self.port, self.versions, self.tally = port, versions, tally
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        while not self.done.wait(0.01):
            try:
                status, page = ask(self.port, "/v1/recommend/visitor-0?k=5")
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.tally.half(f"no page beside a publication: {error!r}")
                continue
            self.tally.answers += 1
            whole = status == 200 and page["degraded"] is None and len(page["items"]) == 5
            if not whole or page["snapshot_version"] not in self.versions:
                self.tally.half(f"a page beside a publication: {status} {page}")

    def stop(self) -> None:
        """No further page."""
        self.done.set()
        self.thread.join()


def kill_publish(shop: Shop, runs: list[Path], kills: int, tally: Tally) -> None:
    """Two runs in turn to a place that keeps one version, every other one with its files copied."""
    lot, place = shop.lot("publish"), Place(shop.folder / "publish" / "place")
    place.publish(runs[0])
    versions = [read_snapshot(run).version for run in runs]

    def publishing(run: Path, *more: str) -> Command:
        return Command(arguments=["publish", run, "--to", place.folder, "--keep", 1, *more], watched=place.folder)

    long = [publishing(runs[1], "--copy").undisturbed(), publishing(runs[0]).undisturbed()]
    files = (
        "--events",
        shop.folder / "publish" / "events.db",
        "--request-log",
        shop.folder / "publish" / "requests.db",
    )
    with served(place.folder, *files, env=ONE_THREAD) as server:
        reader = Reader(server.port, set(versions), tally)
        for turn in range(kills):
            old, new = turn % 2, 1 - turn % 2
            command = publishing(runs[new], *(["--copy"] if new else []))
            tally.undisturbed_s = long[0 if new else 1]
            kill(command, tally, lot, lambda old=old: void(place.publish(runs[old], keep=1)))
            check_place(place, versions, tally)
            tally.as_before += place.state().current == versions[old]
            fault = command.again()
            left = {path.name for path in place.folder.iterdir()} - {".lock"}
            if fault or place.state().current != versions[new] or left != {versions[new], "current.json"}:
                tally.differs(f"publish again: {fault or left}")
        follows = follow(server.port, versions[kills % 2])
        reader.stop()
    if not follows:
        tally.differs("the server of the place did not follow to its last version")


def follow(port: int, version: str, within_s: float = 10.0) -> bool:
    """Whether the server answers from the version before long."""
    until = time.monotonic() + within_s
    while ask(port, "/v1/recommend/visitor-0")[1]["snapshot_version"] != version:
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def check_place(place: Place, versions: list[str] | None, tally: Tally) -> None:
    """The current version is whole, answers, and is one of these (None = any)."""
    try:
        live = load_live(place.current_run)
    except ShortlistError as error:
        tally.half(f"after a kill of {tally.kind}: {error}")
        return
    if versions is not None and live.version not in versions:
        tally.half(f"after a kill of {tally.kind} the place has {live.version}")


def void(_: object) -> None:
    """Nothing."""


# -- update and train -------------------------------------------------------------------------------------------------


def kill_update(shop: Shop, run: Path, kills: int, tally: Tally) -> None:
    """A place of one run, with new events."""
    lot, home = shop.lot("update"), shop.folder / "update"
    place = Place(home / "place")
    command = Command(arguments=["update", place.folder, "--events", home / "events.db", "--quiet"], watched=home)

    def reset() -> None:
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        place.publish(run)
        shutil.copy2(shop.folder / "new.db", home / "events.db")

    reset()
    tally.undisturbed_s = command.undisturbed()
    old, new = read_snapshot(run).version, contents(place.current_run, TELLS_TIME)
    for _ in range(kills):
        kill(command, tally, lot, reset)
        check_place(place, None, tally)
        tally.as_before += place.state().current == old
        if place.state().current != old and contents(place.current_run, TELLS_TIME) != new:
            tally.half("after a kill of update the place has neither the old nor the new run")
        fault = command.again()
        if fault or contents(place.current_run, TELLS_TIME) != new or (home / "place.updating").exists():
            tally.differs(f"update again: {fault or 'another run than without a kill'}")


def kill_train(shop: Shop, older: Path, kills: int, tally: Tally) -> None:
    """Into a new folder, and in every other turn over an older run."""
    lot, home = shop.lot("train"), shop.folder / "train"
    home.mkdir()
    out = home / "run"
    command = shop.train(out)
    tally.undisturbed_s = command.undisturbed()
    whole, before = contents(out, TELLS_TIME), contents(older, TELLS_TIME)
    for turn in range(kills):

        def reset(with_older: bool = turn % 2 == 1) -> None:
            shutil.rmtree(home)
            shutil.copytree(older, out) if with_older else home.mkdir()

        kill(command, tally, lot, reset)
        look_at_run(out, turn % 2 == 1, (before, whole), tally)
        fault = command.again()
        if fault or contents(out, TELLS_TIME) != whole or [path.name for path in home.iterdir()] != ["run"]:
            tally.differs(f"train again: {fault or 'another run than without a kill'}")


def look_at_run(out: Path, had_older: bool, known: tuple[dict[str, str], dict[str, str]], tally: Tally) -> None:
    """The run is the old or the new one, whole; whatever else stands there is refused by its name."""
    for path in [out, *out.parent.glob(f"{out.name}.*")]:
        try:
            load_live(path)
        except ShortlistError as error:
            if str(path) not in str(error):
                tally.half(f"refused without the name of {path.name}: {error}")
            continue
        found = contents(path, TELLS_TIME)
        tally.as_before += path == out and found == known[0]
        if found not in known:
            tally.half(f"after a kill of train {path.name} is neither the old nor the new run")
    moved = out.with_name(f"{out.name}.previous").exists()  # between the two renames
    if not out.exists():
        tally.as_before += not had_older
        if had_older and not moved:
            tally.half("after a kill of train over an older run there was none")


# -- all of it --------------------------------------------------------------------------------------------------------


def measure(folder: Path, kills: int, seed: int, share: int, say: Callable[[str], None] = print) -> list[Tally]:
    """All kinds, each with its part of the kills."""
    shop = make_shop(folder, seed, share)
    runs = [folder / "run-a", folder / "run-b"]
    shop.train(runs[0]).undisturbed()
    shop.train(runs[1], "ranking.keep=15", "trainer.epochs=1").undisturbed()
    kinds: dict[str, Callable[[int, Tally], None]] = {
        "events": lambda n, tally: kill_servers(shop, runs[0], n, tally),
        "ingest": lambda n, tally: kill_ingest(shop, n, tally),
        "publish": lambda n, tally: kill_publish(shop, runs, n, tally),
        "update": lambda n, tally: kill_update(shop, runs[0], n, tally),
        "train": lambda n, tally: kill_train(shop, runs[1], n, tally),
    }
    tallies = []
    for number, (kind, work) in enumerate(kinds.items()):
        tally = Tally(kind=kind)
        began = time.perf_counter()
        work(kills // len(kinds) + (number < kills % len(kinds)), tally)
        tallies.append(tally)
        say(f"{kind:8} {tally.kills} kills in {time.perf_counter() - began:.0f} s" + sentence(tally))
    return tallies


def sentence(tally: Tally) -> str:
    """What came of a kind."""
    told = [f"{tally.half_read} half read", f"{tally.differing} other results", f"{tally.as_before} left the old state"]
    if tally.restart_s:
        told = [
            f"{tally.acknowledged:,} events acknowledged, {tally.lost} lost",
            f"restart at most {max(tally.restart_s):.1f} s",
        ]
    return "".join(f", {one}" for one in told) + "".join(f"\n    {problem}" for problem in tally.problems)


def figures(tallies: list[Tally]) -> dict[str, Any]:
    """For the record."""
    restarts = [seconds for tally in tallies for seconds in tally.restart_s]
    found = {
        "kills": sum(tally.kills for tally in tallies),
        "events_acknowledged": sum(tally.acknowledged for tally in tallies),
        "events_lost": sum(tally.lost for tally in tallies),
        "half_snapshots_read": sum(tally.half_read for tally in tallies),
        "other_results": sum(tally.differing for tally in tallies),
        "restart_s": {"p50": round(float(np.median(restarts)), 2), "max": round(max(restarts), 2)},
    }
    met = {
        "no acknowledged event lost": found["events_lost"] == 0,
        "nothing half read": found["half_snapshots_read"] == 0,
        "run again, the same result": found["other_results"] == 0,
        f"restart under {BAR_S:g} s": max(restarts) < BAR_S,
    }
    kinds = [{**asdict(tally), "restart_s": [round(seconds, 2) for seconds in tally.restart_s]} for tally in tallies]
    return {**found, "bars": met, "holds": all(met.values()), "kinds": kinds}


def main() -> None:
    """Measure, print, write; exit code 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument(
        "--quick", action="store_true", help="6 kills on half as many customers; nothing written without --out"
    )
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    kills, share = (6, 12) if given.quick else (given.kills, 6)
    with tempfile.TemporaryDirectory() as folder, nullcontext() if given.quick else machine_lock():
        load_before = os.getloadavg()[0]
        found = figures(measure(Path(folder), kills, given.seed, share))
    for bar, is_met in found["bars"].items():
        print(f"{bar}: {'yes' if is_met else 'NO'}")
    settings = {"kills": kills, "seed": given.seed, "customers": f"one of {share}", "threads": 1}
    record(RESULT, {"settings": settings, **found, "load_average": load_before}, quick=given.quick, out=given.out)
    raise SystemExit(0 if found["holds"] else 1)


if __name__ == "__main__":
    main()
