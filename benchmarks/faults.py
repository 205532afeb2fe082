"""Every part of the cascade and every store breaks under load and is mended again: a page every time, marked degraded, in time.

    python benchmarks/faults.py [--rate 25] [--limit-ms 250] [--seconds 4] [--only NAME] [--quick] [--out benchmarks/results/faults.json]

Runs of the built-in shop log are served over HTTP by a process of its own. In each arm an open loop asks for pages of known users, with an
event in between now and then, for 2 seconds before a fault, `--seconds` with it, and 4 after it; at no more than a quarter of what the
server bears, so that what fails fails by the fault:

    STAGE FAULT           retrieval, pre-ranking, ranking and re-ranking raise, hang for as long as the fault lasts, or give NaN: their only
                          system is a copy of the package's own that breaks while a file says so (_faulty_systems.py)
    index removed         the file of the index that is served goes away
    index damaged         the place that is served is turned to a version whose index is cut short
    sqlite removed        the file of events is renamed, and renamed back
    sqlite locked         somebody else holds the file of events for writing
    postgres gone, hangs  the server of events is killed and started again, or stopped and let go on
    redis gone, hangs     the same with the server of memories, behind an HSTU ranker

The bars: every request gets a whole page; every page asked for while the fault lasts says `degraded`, but in arms marked `whole`, where
nothing of a page is lost; p99 of the whole arm is below the time limit of a page and `MARGIN_MS`; within 4 s of the fault's end no page is
degraded; and no acknowledged event is lost. PostgreSQL and Redis are those of tests/services.py; where they can not be had, their arms
say so.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sqlite3
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from _server import ONE_THREAD, Served, on_core, served
from _services import services, started
from shortlist.cascade.build import train_cascade
from shortlist.cascade.config import RunConfig
from shortlist.data.dataset import Dataset, build_dataset
from shortlist.data.datasets import load
from shortlist.evaluation.benchmarks import record
from shortlist.evaluation.evidence import machine_lock
from shortlist.evaluation.load import Ask, Post, Replies, closed_loop, open_loop
from shortlist.store.events import EventStore
from shortlist.store.published import Place

HERE = Path(__file__).parent
RESULT = HERE / "results" / "faults.json"
SYSTEMS = HERE / "_faulty_systems.py"
FAULT_FILE = "SHORTLIST_BENCHMARK_FAULT"
K = 10
STAGED = f"""
[surface]
k = {K}
[stages.retrieval]
systems = ["faulty-popularity"]
keep = 200
[stages.pre-ranking]
systems = ["faulty-frequency"]
keep = 100
[stages.ranking]
systems = ["faulty-counts"]
keep = 50
[stages.re-ranking]
systems = ["faulty-mmr"]
"""
INDEXED = f"""
[surface]
k = {K}
[trainer]
epochs = 1
[index]
kind = "flat"
when_short = "warn"
[stages.retrieval]
systems = ["two-tower"]
keep = 100
[stages.ranking]
systems = ["counts"]
keep = 50
[systems.two-tower]
dim = 16
widths = [32]
"""
REMEMBERING = f"""
[surface]
k = {K}
[trainer]
epochs = 1
[stages.retrieval]
systems = ["counts", "popularity"]
keep = 100
[stages.ranking]
systems = ["hstu-ranker"]
keep = 30
[systems.hstu-ranker]
dim = 16
max_history = 50
[systems.hstu-ranker.layers]
num_blocks = 1
num_heads = 1
"""
STAGES = ("retrieval", "pre-ranking", "ranking", "re-ranking")
FAULTS = ("exception", "hang", "nan")
MARGIN_MS = 50.0
"""What the network, the event loop and the making of the last resort's page may add to the time limit of a page."""
BEFORE_S, AFTER_S = 2.0, 4.0
SETTLE_S = 0.3
"""After a store goes, pages under way may still have read it."""
EVENT_SHARE = 0.1
"""Of the requests."""
TELLER = "teller"
"""The user of all events."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A fault."""

    name: str
    on: Callable[[], None]
    off: Callable[[], None]
    whole: bool = False
    """Whether pages lose nothing by it."""


@dataclass(frozen=True, kw_only=True)
class Times:
    """Of one arm, in seconds since the load began."""

    on: float
    """The fault is there from then on."""
    off: float
    """It begins to go."""
    mended: float
    """It is gone."""


class Actor:
    """Breaks and mends at its times, beside the load, in a thread that outlives every arm: what that thread starts ends with it."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)

    def act(self, arm: Arm, fault_s: float) -> Future[Times]:
        """When what will have happened; the load begins now."""
        return self._pool.submit(self._act, arm, fault_s, time.perf_counter())

    @staticmethod
    def _act(arm: Arm, fault_s: float, began: float) -> Times:
        def wait_until(at_s: float) -> None:
            time.sleep(max(began + at_s - time.perf_counter(), 0))

        wait_until(BEFORE_S)
        arm.on()
        on = time.perf_counter() - began
        wait_until(BEFORE_S + fault_s)
        off = time.perf_counter() - began
        arm.off()
        return Times(on=on, off=off, mended=time.perf_counter() - began)


class Load:
    """Requests of all arms: pages of known users, each within `limit_ms`, and numbered events of one user."""

    def __init__(self, users: list[str], rate: float, limit_ms: float) -> None:
        self.users, self.most, self.limit_ms = users, rate, limit_ms
        self.rate = rate
        self.lot = np.random.default_rng(0)
        self.num_told = 0

    def warm(self, port: int) -> None:
        """Wake a server up, and set the rate by what it bears."""
        paths = [f"/v1/recommend/{user}" for user in self.lot.choice(self.users, 60).tolist()]
        closed_loop(port, paths[:20], concurrency=2)
        began = time.perf_counter()
        closed_loop(port, paths[20:], concurrency=4)
        self.rate = min(self.most, 0.25 * 40 / (time.perf_counter() - began))

    def draw(self, seconds: float) -> tuple[np.ndarray, list[Ask], list[str | None]]:
        """Arrivals, requests, and per request the id of its event; None = it is for a page."""
        count = round(self.rate * seconds)
        arrivals = np.sort(self.lot.uniform(0, seconds, count))
        asks: list[Ask] = []
        told: list[str | None] = []
        for is_event in (self.lot.random(count) < EVENT_SHARE).tolist():
            if is_event:
                self.num_told += 1
                event = {"user": TELLER, "item": f"told-{self.num_told}", "timestamp": time.time()}
                asks.append(Post("/v1/events", json.dumps({**event, "event_id": event["item"]}).encode()))
                told.append(str(event["item"]))
            else:
                asks.append(f"/v1/recommend/{self.lot.choice(self.users)}")
                told.append(None)
        return arrivals, asks, told


def run_arm(arm: Arm, server: Served, load: Load, actor: Actor, fault_s: float, events: Path | str) -> dict[str, Any]:
    """One arm from before the fault to after it."""
    arrivals, asks, told = load.draw(BEFORE_S + fault_s + AFTER_S)
    before = replaced(server)
    acting = actor.act(arm, fault_s)
    replies = open_loop(server.port, arrivals, asks, timeout_s=15.0)
    times = acting.result()
    is_page = np.array([one is None for one in told])
    found = {
        "arm": arm.name,
        **pages(replies, is_page, times, arm.whole, load.limit_ms),
        "replaced": replaced(server) - before,
    }
    kept = [item for item, status in zip(told, replies.status.tolist()) if item is not None and status == 200]
    refused = Counter(str(status) for status in replies.status[~is_page].tolist() if status != 200)
    with closing(EventStore(events)) as store:
        there = set(store.history([TELLER]).item)
    lost = [item for item in kept if item not in there]
    found["events"] = {"kept": len(kept), "not_kept": dict(refused), "lost": len(lost)}
    return {**found, "holds": found["holds"] and not lost}


def pages(replies: Replies, is_page: np.ndarray, times: Times, whole: bool, limit_ms: float) -> dict[str, Any]:
    """What became of the requests for pages, and whether the bars hold."""
    due, latency = replies.due_s[is_page], replies.latency_ms[is_page]
    bodies = [body for body, mine in zip(replies.bodies, is_page.tolist()) if mine]
    answers = [
        json.loads(body) if status == 200 and body else None for body, status in zip(bodies, replies.status[is_page])
    ]
    fine = np.array([one is not None and len({item["item_id"] for item in one["items"]}) == K for one in answers])
    degraded = np.array([one is not None and one["degraded"] is not None for one in answers])
    during = (due > times.on + SETTLE_S) & (due < times.off - limit_ms / 1e3)
    bad_after = due[degraded & (due >= times.mended)]
    back = 0.0 if not len(bad_after) else float(bad_after.max() - times.mended)
    quiet_s = float(due.max() - times.mended) - back
    reasons = Counter(_short(answers[place]["degraded"]) for place in np.flatnonzero(degraded & during).tolist())
    failures = Counter(int(status) for status in replies.status[is_page][~fine].tolist())
    marked = bool(degraded[during].all()) if not whole else not degraded[during].any()
    p99 = float(np.percentile(latency, 99))
    return {
        "requests": int(is_page.sum()),
        "pages": int(fine.sum()),
        "failures": {str(status): count for status, count in failures.items()},
        "during": int(during.sum()),
        "degraded_during": int(degraded[during].sum()),
        "degraded_before": int(degraded[due < times.on - limit_ms / 1e3].sum()),
        "expects": "whole" if whole else "degraded",
        "p50_ms": round(float(np.percentile(latency, 50)), 1),
        "p99_ms": round(p99, 1),
        "max_ms": round(float(latency.max()), 1),
        "during_p99_ms": round(float(np.percentile(latency[during], 99)), 1) if during.any() else None,
        "back_after_s": round(back, 2) if quiet_s > 0.5 else None,
        "said": dict(reasons.most_common(3)),
        "holds": bool(fine.all() and marked and p99 <= limit_ms + MARGIN_MS and quiet_s > 0.5),
    }


def _short(reason: str) -> str:
    """A reason without what differs from answer to answer."""
    return re.sub(r"\d+(\.\d+)?", "N", reason)[:160]


def replaced(server: Served) -> int:
    """Workers that the server has replaced since it started."""
    with urllib.request.urlopen(f"{server.address}/metrics") as answer:
        found = re.search(r"^shortlist_workers_replaced_total (\S+)$", answer.read().decode(), re.MULTILINE)
    return 0 if found is None else int(float(found[1]))


# -- the arms ------------------------------------------------------------------------------------------------------------


def stage_arms(file: Path) -> list[Arm]:
    """Every stage with every fault."""

    def put(part: str, fault: str) -> None:
        fresh = file.with_suffix(".new")
        fresh.write_text(json.dumps({"part": part, "fault": fault}))
        fresh.replace(file)

    return [
        Arm(name=f"{stage} {fault}", on=partial(put, stage, fault), off=file.unlink)
        for stage in STAGES
        for fault in FAULTS
    ]


def sqlite_arms(path: Path) -> list[Arm]:
    """The file of events goes and comes back, and is locked by somebody else."""
    away = path.with_name("away.db")
    locks = ExitStack()

    def lock() -> None:
        other = locks.enter_context(closing(sqlite3.connect(path, check_same_thread=False)))
        other.execute("BEGIN EXCLUSIVE")

    return [
        Arm(name="sqlite removed", on=lambda: path.rename(away) and None, off=lambda: away.rename(path) and None),
        Arm(name="sqlite locked", on=lock, off=locks.close, whole=True),
    ]


def service_arms(service: Any, name: str) -> list[Arm]:
    """A server is killed and started again, and hangs for a while."""
    return [
        Arm(name=f"{name} gone", on=service.kill, off=service.start),
        Arm(name=f"{name} hangs", on=partial(service.pause, True), off=partial(service.pause, False)),
    ]


def index_arms(place: Place, served_version: str, damaged: str) -> list[Arm]:
    """The index that is served goes away; a version with a damaged one becomes the current one."""
    file = place.run(served_version) / "indexes" / "two-tower.faiss"
    away = file.with_suffix(".away")

    def turn(version: str) -> None:
        # As if the damage came after the version was published: the place itself would refuse it.
        state = place.folder / "current.json"
        fresh = state.with_suffix(".new")
        fresh.write_text(json.dumps({**json.loads(state.read_text()), "current": version}))
        fresh.replace(state)

    return [
        Arm(
            name="index removed",
            on=lambda: file.rename(away) and None,
            off=lambda: away.rename(file) and None,
            whole=True,
        ),
        Arm(name="index damaged", on=partial(turn, damaged), off=partial(turn, served_version), whole=True),
    ]


@dataclass(frozen=True, kw_only=True)
class Lab:
    """What all arms share."""

    folder: Path
    dataset: Dataset
    load: Load
    actor: Actor
    fault_s: float
    only: str
    """Arms whose names hold this."""

    def wants(self, *words: str) -> bool:
        """Whether any arm is asked for in whose name one of the words stands."""
        return any(word in self.only or self.only in word for word in words)

    def train(self, name: str, text: str) -> Path:
        """A run of settings in TOML."""
        folder = self.folder / name
        train_cascade(self.dataset, RunConfig.from_toml(text), folder, progress=False)
        return folder

    def measure(self, run: Path, arms: list[Arm], events: Path | str, *options: object) -> list[dict[str, Any]]:
        """Arms one after the other against one server."""
        arms = [arm for arm in arms if self.only in arm.name]
        if not arms:
            return []
        log = self.folder / f"{run.name}-{len(os.listdir(self.folder))}.requests.db"
        own = ("--events", events, "--request-log", log, "--time-limit-ms", self.load.limit_ms)
        done = []
        with served(run, *own, *options, env=ONE_THREAD, first=partial(on_core, 1)) as server:
            self.load.warm(server.port)
            for arm in arms:
                done.append(run_arm(arm, server, self.load, self.actor, self.fault_s, events))
                print("  ".join(f"{name} {value}" for name, value in done[-1].items()), flush=True)
        return done


def all_arms(lab: Lab) -> list[dict[str, Any]]:
    """Run by run."""
    done: list[dict[str, Any]] = []
    events = lab.folder / "events.db"
    if lab.wants(*STAGES, *FAULTS, "sqlite removed", "sqlite locked", "postgres hangs gone"):
        staged = lab.train("staged", STAGED)
        done += lab.measure(staged, stage_arms(Path(os.environ[FAULT_FILE])) + sqlite_arms(events), events)
    if lab.wants("index removed", "index damaged"):
        place = Place(lab.folder / "place")
        bad = place.publish(lab.train("bad", INDEXED.replace("keep = 50", "keep = 40"))).version
        good = place.publish(lab.train("good", INDEXED)).version
        file = place.run(bad) / "indexes" / "two-tower.faiss"
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content[:-100])
        done += lab.measure(place.folder, index_arms(place, good, bad), lab.folder / "indexed.db")
    if lab.wants("postgres hangs gone", "redis hangs gone"):
        done += service_measured(lab)
    return done


def service_measured(lab: Lab) -> list[dict[str, Any]]:
    """Arms of PostgreSQL and Redis, or why there are none."""
    module = services()
    try:
        module.install()
    except module.CanNotBeHad as error:
        return [{"arm": name, "not_available": str(error)} for name in ("postgres", "redis")]
    done: list[dict[str, Any]] = []
    if lab.wants("postgres hangs gone"):
        with started(module.Postgres) as postgres:
            done += lab.measure(lab.folder / "staged", service_arms(postgres, "postgres"), postgres.schema())
    if lab.wants("redis hangs gone"):
        run = lab.train("remembering", REMEMBERING)
        with started(module.Redis) as redis:
            events = lab.folder / "remembering.db"
            done += lab.measure(run, service_arms(redis, "redis"), events, "--memories", redis.url())
    return done


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, default=25.0, help="requests a second")
    parser.add_argument("--limit-ms", type=float, default=250.0, help="time within which a page must come")
    parser.add_argument("--seconds", type=float, default=4.0, help="that a fault lasts")
    parser.add_argument("--only", default="", help="arms whose names hold this")
    parser.add_argument("--quick", action="store_true", help="a few arms; nothing written unless --out is given")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # A machine that is in use is slow: the same requests per time limit, only slower.
    limit_ms, rate = (1_000.0, arguments.rate / 4) if arguments.quick else (arguments.limit_ms, arguments.rate)
    only = arguments.only or ("ranking" if arguments.quick else "")
    with tempfile.TemporaryDirectory() as temporary, nullcontext() if arguments.quick else machine_lock():
        folder = Path(temporary)
        (folder / "systems").mkdir()
        shutil.copy(SYSTEMS, folder / "systems" / "faulty_systems.py")
        os.environ |= {"SHORTLIST_SYSTEMS": str(folder / "systems"), FAULT_FILE: str(folder / "fault.json")}
        dataset = build_dataset(load("builtin"), RunConfig.from_toml(STAGED).data_settings)
        on_core(0)
        began = time.perf_counter()
        lab = Lab(
            folder=folder,
            dataset=dataset,
            load=Load([str(user) for user in dataset.user_ids.ids.to_list()], rate, limit_ms),
            actor=Actor(),
            fault_s=arguments.seconds,
            only=only,
        )
        arms = all_arms(lab)
    figures = {
        "settings": {
            "rate": rate,
            "before_s": BEFORE_S,
            "fault_s": lab.fault_s,
            "after_s": AFTER_S,
            "time_limit_ms": limit_ms,
            "margin_ms": MARGIN_MS,
            "seconds": round(time.perf_counter() - began),
        },
        "arms": arms,
        "bar": "a whole page every time, marked degraded, p99 within the limit and its margin, well within 4 s, no event lost",
        "holds": all(arm["holds"] for arm in arms if "holds" in arm),
    }
    failed = [arm["arm"] for arm in arms if not arm.get("holds", True)]
    print(f"{len(arms)} arms, {', '.join(failed) or 'none'} failed")
    record(RESULT, figures, quick=arguments.quick, out=arguments.out)


if __name__ == "__main__":
    main()
