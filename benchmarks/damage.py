"""Damaged files and dirty logs at random: each refused or set aside by name, no code run, nothing half-written, no wrong answer in silence.

    python benchmarks/damage.py [--mutations 50] [--seed 0] [--only N] [--quick] [--out benchmarks/results/damage.json]

`--mutations` of files: of a trained run, of a place of published runs, of a calibration, of an ingested log. A change (_damage.py) is drawn
with a file that it fits; half of the time the manifest is then written anew so that it agrees, and only the content can give it away.
What was changed is opened as the server or `shortlist train` opens it. Outcomes:

    refused     one sentence of ours, with the name of the file or of what stands in it
    told        a calibration that can not be used: whole pages, each of which says so
    same        not noticed, and every answer is the same as before
    other       whole pages with other answers, which is all that can be asked where the manifest agrees; without that it is a failure

`--mutations` of logs: a piece of the built-in shop log, spoilt (_dirt.py) and given to what `shortlist check` and `shortlist ingest` call.
Each refuses it by the name of the file, or takes it with every row either kept or set aside under a reason, both then with the same counts.
Every tenth mutation goes through the command line as well. A failure is anything else: another exception, code that ran, files changed
or left behind, rows that nobody accounts for.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from _damage import CHANGES, Lot, code_ran, seal
from _dirt import DIRT, shop_rows
from _killing import contents
from _server import ONE_THREAD, environment
from shortlist.cascade.allocation.calibration import allocation_path, calibrate, save_allocation
from shortlist.cascade.build import train_cascade
from shortlist.cascade.config import RunConfig
from shortlist.cascade.engine import Engine
from shortlist.cascade.run import load_run
from shortlist.data.check import check
from shortlist.data.dataset import build_dataset
from shortlist.data.datasets import load
from shortlist.data.histories import Histories
from shortlist.data.ingest import ingest
from shortlist.data.ingested import Ingested, open_log
from shortlist.data.log import read
from shortlist.errors import ShortlistError
from shortlist.evaluation.benchmarks import record
from shortlist.evaluation.evidence import machine_lock
from shortlist.store.published import Place, served_run
from shortlist.store.snapshot import MANIFEST

RESULT = Path(__file__).parent / "results" / "damage.json"
RUN = """
[surface]
k = 4
[data]
valid_share = 0.2
[trainer]
epochs = 1
[learning]
fit_requests = 200
valid_requests = 100
[stages.retrieval]
systems = ["counts", "popularity"]
keep = 20
offers = [{systems = ["popularity"], keep = 10}]
[stages.ranking]
systems = ["dnn"]
keep = 10
offers = [{systems = ["counts"], keep = 10}]
[systems.dnn]
dim = 4
widths = [8]
[allocation]
system = "dcaf"
max_requests = 60
"""
K = 4
"""Items of a page."""
SHARE = 24
"""One of so many customers of the log."""
ROWS = 400
"""Of a log before it is spoilt."""
BY_COMMAND = 10
"""One of so many mutations goes through the command line as well."""


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """Something that Shortlist wrote."""

    name: str
    folder: Path
    """Holds it, and what stands beside it; it is copied as a whole."""
    opened: str
    """Name in the folder of what is opened."""
    changed: str
    """Name in the folder of what is changed."""
    ask: Callable[[Path, Path], Any]
    """Opens the first path, with stores in a folder for them, and says what it finds."""
    command: tuple[str, ...]
    """That opens it."""

    def files(self) -> list[Path]:
        """Files that may be changed, by their path inside the folder."""
        found = sorted(
            path for path in (self.folder / self.changed).rglob("*") if path.is_file() and path.stat().st_size
        )
        return [path.relative_to(self.folder) for path in found if path.name != ".lock"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a mutation."""

    number: int
    what: str
    end: str
    """refused, told, same, other, taken, set aside or failed."""
    said: str = ""


@dataclass(kw_only=True)
class Found:
    """What came of all mutations of one kind."""

    outcomes: list[Outcome] = field(default_factory=list)
    commands: int = 0
    """That also went through the command line."""

    def failures(self) -> list[str]:
        """Each with the number that repeats it."""
        return [f"{o.number}: {o.what}: {o.said}" for o in self.outcomes if o.end == "failed"]

    def as_dict(self) -> dict[str, Any]:
        """For the record."""
        return {
            "mutations": len(self.outcomes),
            "outcomes": dict(sorted(Counter(outcome.end for outcome in self.outcomes).items())),
            "kinds": len({outcome.what.partition(":")[0] for outcome in self.outcomes}),
            "through_the_command_line": self.commands,
            "failures": self.failures(),
        }


# -- what is damaged ----------------------------------------------------------------------------------------------------


def make_artifacts(folder: Path) -> list[Artifact]:
    """A run, a place of two runs, a calibrated run and an ingested log, each in a folder of its own."""
    log = load("builtin")
    kept = log.events.filter(pl.col("user_id") % SHARE == 0).select("user_id", "item_id", "timestamp", "value")
    assert log.items is not None
    events, items = folder / "log.parquet", folder / "items.parquet"
    kept.write_parquet(events)
    log.items.write_parquet(items)
    ingest(events, folder / "ingested" / "log", items=items)
    config = RunConfig.from_toml(RUN)
    run = folder / "calibration" / "run"
    train_cascade(build_dataset(read(events, items=items), config.data_settings), config, run, progress=False)
    shutil.copytree(run, folder / "run" / "run")
    place = Place(folder / "place" / "place")
    train_cascade(
        build_dataset(read(events), config.data_settings),
        config.override("ranking.keep=8"),
        folder / "b",
        progress=False,
    )
    for one in (folder / "b", run):
        place.publish(one, link=False)
    save_allocation(allocation_path(run), calibrate(load_run(run)))
    users = [*kept["user_id"].unique().sort().head(6).to_list(), "nobody"]

    def pages(path: Path, stores: Path) -> Any:
        return pages_of(path, stores, users)

    serve = ("serve", "--port", "0")
    return [
        Artifact(name="run", folder=folder / "run", opened="run", changed="run", ask=pages, command=serve),
        Artifact(name="place", folder=folder / "place", opened="place", changed="place", ask=pages, command=serve),
        Artifact(
            name="calibration",
            folder=folder / "calibration",
            opened="run",
            changed="run.allocation",
            ask=pages,
            command=serve,
        ),
        Artifact(
            name="ingested log",
            folder=folder / "ingested",
            opened="log",
            changed="log",
            ask=dataset_of,
            command=("check",),
        ),
    ]


def pages_of(path: Path, stores: Path, users: list[Any]) -> dict[str, Any]:
    """What a server of the run, or place, would answer: items by user, and what its answers say is wrong."""
    files = {"events": stores / "events.db", "request_log": stores / "requests.db"}
    with Engine.load(served_run(path), **files) as engine:
        made = [engine.recommend(user, k=K) for user in users]
    pages = [[(item.item_id, item.score) for item in page.items] for page in made]
    told = sorted({page.degraded for page in made if page.degraded is not None})
    return {"pages": pages, "whole": all(len({item for item, _ in page}) == K for page in pages), "told": told}


def dataset_of(path: Path, _: Path) -> dict[str, Any]:
    """What `shortlist check` and `shortlist train` would make of the ingested log."""
    log = open_log(path)
    made = build_dataset(log)
    digest = hashlib.sha256()
    for name in (f.name for f in fields(Histories)):
        digest.update(np.ascontiguousarray(getattr(made.histories, name)).tobytes())
    ids = [hashlib.sha256(repr(one.ids.to_list()).encode()).hexdigest() for one in (made.item_ids, made.user_ids)]
    return {"health": repr(check(log).as_dict()), "histories": digest.hexdigest(), "ids": ids, "titles": made.titles}


# -- damaging it --------------------------------------------------------------------------------------------------------


def drawn(artifacts: list[Artifact], number: int, seed: int) -> tuple[str, list[tuple[Artifact, list[Path]]]]:
    """The kind of mutation `number`, and what it fits."""
    kinds = sorted(CHANGES)
    name = kinds[np.random.default_rng(seed).permutation(len(kinds))[number % len(kinds)]]
    fitting = ((one, [file for file in one.files() if CHANGES[name].fits(file)]) for one in artifacts)
    return name, [(one, files) for one, files in fitting if files]


def can_be(artifacts: list[Artifact], number: int, *, seed: int) -> bool:
    """Whether there is a file that mutation `number` fits."""
    return bool(drawn(artifacts, number, seed)[1])


def damage(artifacts: list[Artifact], number: int, seed: int, scratch: Path) -> tuple[Outcome, Artifact, Path]:
    """Mutation `number`: what came of it, of what, and the changed copy."""
    name, fitting = drawn(artifacts, number, seed)
    change, lot = CHANGES[name], np.random.default_rng([seed, number])
    artifact, files = fitting[lot.integers(len(fitting))]
    file = files[lot.integers(len(files))]
    copy = scratch / "copy"
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(artifact.folder, copy)
    change.work(copy / file, lot)
    sealed = file.name not in (MANIFEST, "current.json") and any((copy / artifact.changed).rglob(MANIFEST))
    if sealed and (sealed := bool(lot.integers(2))):
        seal(copy / artifact.changed)
    what = f"{name}: {artifact.name}, {file}" + (", its manifest agrees" if sealed else "")
    end, said = opened(artifact, copy, file, sealed=sealed)
    return Outcome(number=number, what=what, end=end, said=said), artifact, copy


def opened(artifact: Artifact, copy: Path, file: Path, *, sealed: bool) -> tuple[str, str]:
    """How opening the changed copy ends, and what was said."""
    stores, before = copy.with_name("stores"), contents(copy)
    stores.mkdir()
    changed = before != contents(artifact.folder)
    try:
        found = artifact.ask(copy / artifact.opened, stores)
    except ShortlistError as error:
        end = "refused", str(error)
        if not is_named(str(error), copy, artifact, file, sealed=sealed):
            end = "failed", f"refused without the name of the file: {error}"
    except BaseException as error:  # a panic in Rust and the payload's own end are no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        end = "failed", f"{type(error).__name__}: {error}"
    else:
        end = compared(found, artifact.ask(artifact.folder / artifact.opened, stores), changed=changed, sealed=sealed)
    if code_ran():
        return "failed", f"code ran; {end[1]}"
    if contents(copy) != before:
        return "failed", f"files changed; {end[1]}"
    return end


def is_named(said: str, copy: Path, artifact: Artifact, file: Path, *, sealed: bool) -> bool:
    """Whether a refusal is one sentence with the name of the file; where the manifest agrees, what does not fit may be another file."""
    wanted = str(copy / artifact.opened) if sealed else file.name
    neighbour = any(other.name in said for other in (copy / file).parent.glob("*"))  # a swap changes two
    return "\n" not in said and (wanted in said or neighbour or "cascade.toml" in said)


def compared(found: Any, before: Any, *, changed: bool, sealed: bool) -> tuple[str, str]:
    """What was found in the changed copy against what is in the original."""
    if found == before:
        return "same", "" if changed else "the file is as it was"
    if not found.get("whole", True):
        return "failed", f"pages that are not whole: {str(found)[:200]}"
    if found.get("told"):
        return "told", "; ".join(found["told"])
    return ("other", "") if sealed else ("failed", "other answers, unnoticed")


def by_command(artifact: Artifact, copy: Path, outcome: Outcome) -> Outcome:
    """The same through the command line, which must come to the same end."""
    command, *options = artifact.command
    words = [sys.executable, "-m", "shortlist.cli", command, str(copy / artifact.opened), *options]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(ONE_THREAD)
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    if command == "serve":
        process.terminate()
    _, err = process.communicate()
    end = ended(process.returncode, err) if not first else ""
    if code_ran():
        end = "code ran"
    if (outcome.end == "refused") == bool(first) or end:
        said = end or f"it printed {first!r}, and in this process the end was {outcome.end}"
        return Outcome(number=outcome.number, what=f"{outcome.what}, by command", end="failed", said=said)
    return outcome


def ended(code: int, err: str) -> str:
    """What is wrong with the way in which a command refused; empty where it is as it should be."""
    told = [line for line in err.splitlines() if line.startswith("shortlist: ")]
    if code != 2 or len(told) != 1 or "Traceback" in err:
        return f"exit code {code}: {err.strip()[-300:]}"
    return ""


# -- dirty logs ---------------------------------------------------------------------------------------------------------


def spoil(events: pl.DataFrame, number: int, seed: int, scratch: Path) -> Outcome:
    """Dirty log `number`: what came of it; its file stays in `scratch`."""
    kinds = sorted(DIRT)
    name = kinds[np.random.default_rng([seed, 1]).permutation(len(kinds))[number % len(kinds)]]
    lot: Lot = np.random.default_rng([seed, 1, number])
    suffix, made, rows = DIRT[name](shop_rows(events, ROWS, lot), lot)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    path, out = scratch / f"log{suffix}", scratch / "out"
    path.write_bytes(made)
    ends = [taken(lambda: looked_at(path)), taken(lambda: laid_down(path, out))]
    fault = judged(ends, path, out, rows)
    if code_ran():
        fault = "code ran"
    if path.read_bytes() != made:
        fault = "the log itself was changed"
    end, said = ends[0]
    if fault:
        end, said = "failed", f"{fault}; check: {ends[0]}; ingest: {ends[1]}"
    elif ends[0][0] != ends[1][0]:
        end, said = "refused by one", next(said for end, said in ends if end == "refused")
    elif end == "taken" and said["aside"]:
        end = "set aside"
    return Outcome(number=number, what=f"{name}: {path.name}", end=end, said=str(said))


def taken(work: Callable[[], dict[str, Any]]) -> tuple[str, Any]:
    """How reading ends: taken with its counts, refused with a sentence, or failed."""
    try:
        return "taken", work()
    except ShortlistError as error:
        return "refused", str(error)
    except BaseException as error:  # a panic in Rust and the payload's own end are no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return "failed", f"{type(error).__name__}: {error}"


def looked_at(path: Path) -> dict[str, Any]:
    """As `shortlist check` does."""
    log = open_log(path)
    health = check(log)
    return {"rows": health.num_events, "aside": dict(health.quarantined)}


def laid_down(path: Path, out: Path) -> dict[str, Any]:
    """As `shortlist ingest` does."""
    ingest(path, out)
    log = Ingested.load(out)
    return {"rows": log.in_memory().events.height, "aside": dict(log.quarantined.counts)}


def judged(ends: list[tuple[str, Any]], path: Path, out: Path, rows: int | None) -> str:
    """What is wrong with the two ends; empty where nothing is."""
    left = {each.name for each in path.parent.iterdir()} - {path.name, "out.rejected.parquet"}
    refused = [end == "refused" for end, _ in ends]
    if any(end == "failed" for end, _ in ends):
        return "neither taken nor refused"
    if any(end == "refused" and (path.name not in said or "\n" in said) for end, said in ends):
        return "refused without the name of the file"
    counts = [said for end, said in ends if end == "taken"]
    if any(one != counts[0] for one in counts):
        return "they count other rows"
    if rows is not None and any(one["rows"] + sum(one["aside"].values()) != rows for one in counts):
        return f"{rows} rows were there"
    if left != (set() if refused[1] else {"out"}):
        return f"left {', '.join(sorted(left)) or 'nothing'}"
    return ""


def log_by_command(outcome: Outcome, scratch: Path) -> Outcome:
    """The same log through `shortlist check` and `shortlist ingest` as processes."""
    path = next(scratch.glob("log*"))
    for words in (("check", path, "--json"), ("ingest", path, "--out", scratch / "again", "--json", "--quiet")):
        command = [sys.executable, "-m", "shortlist.cli", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(ONE_THREAD))
        fault = "code ran" if code_ran() else ""
        if outcome.end == "refused by one":
            continue
        if outcome.end == "refused":
            fault = fault or ended(done.returncode, done.stderr)
        elif done.returncode or not isinstance(json.loads(done.stdout), dict):
            fault = fault or f"exit code {done.returncode}: {done.stderr.strip()[-300:]}"
        if fault:
            return Outcome(number=outcome.number, what=f"{outcome.what}, by {words[0]}", end="failed", said=fault)
    return outcome


# -- all of it ----------------------------------------------------------------------------------------------------------


def damage_files(folder: Path, numbers: list[int], seed: int) -> Found:
    """Mutations of files."""
    found, artifacts = Found(), make_artifacts(folder)
    for number in numbers:
        outcome, artifact, copy = damage(artifacts, number, seed, folder / "scratch")
        if number % BY_COMMAND == 0 and outcome.end != "failed":
            outcome, found.commands = by_command(artifact, copy, outcome), found.commands + 1
        found.outcomes.append(outcome)
    return found


def spoil_logs(folder: Path, numbers: list[int], seed: int) -> Found:
    """Mutations of logs."""
    found, events = Found(), load("builtin").events
    for number in numbers:
        outcome = spoil(events, number, seed, folder / "scratch")
        if number % BY_COMMAND == 0 and outcome.end != "failed":
            outcome, found.commands = log_by_command(outcome, folder / "scratch"), found.commands + 1
        found.outcomes.append(outcome)
    return found


def main() -> None:
    """Damage, print, write; exit code 1 where there is a failure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=50, help="of files, and as many of logs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="N", help="mutation N alone, for a look; nothing is written")
    parser.add_argument("--quick", action="store_true", help="8 of each; nothing written without --out")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    count = 8 if given.quick else given.mutations
    numbers = list(range(count)) if given.only is None else [given.only]
    with tempfile.TemporaryDirectory() as name, nullcontext() if given.quick else machine_lock():
        load_before = os.getloadavg()[0]
        found = {
            "files": damage_files(Path(name), numbers, given.seed),
            "logs": spoil_logs(Path(name), numbers, given.seed),
        }
    for kind, one in found.items():
        if given.only is not None:
            print("\n".join(f"{outcome.what}: {outcome.end}: {outcome.said}" for outcome in one.outcomes))
        told = ", ".join(f"{count} {end}" for end, count in one.as_dict()["outcomes"].items())
        print(f"{len(one.outcomes)} mutations of {kind}: {told}", *one.failures(), sep="\n    ")
    holds = not any(one.failures() for one in found.values())
    figures = {
        "settings": {"mutations": count, "seed": given.seed, "customers": f"one of {SHARE}", "rows": ROWS},
        **{kind: one.as_dict() for kind, one in found.items()},
        "bar": "each refused or set aside by name, told, or harmless; no code run, nothing left or changed",
        "holds": holds,
        "load_average": load_before,
    }
    if given.only is None:
        record(RESULT, figures, quick=given.quick, out=given.out)
    raise SystemExit(0 if holds else 1)


if __name__ == "__main__":
    main()
