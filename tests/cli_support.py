"""The command line called as a stranger would, in this process, and light settings that train in a blink."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import polars as pl

from shortlist.cli import main
from support import shop_frames

PLAIN = """
[surface]
k = 4
[trainer]
epochs = 2
batch_size = 64
lr = 0.01
[stages.retrieval]
systems = ["popularity", "counts", "two-tower"]
keep = 12
[stages.ranking]
systems = ["dnn"]
keep = 8
[systems.two-tower]
dim = 8
widths = [16]
num_uniform = 8
[systems.dnn]
dim = 8
widths = [16]
"""
"""Runs on every log that has an order."""
LIGHT = f"{PLAIN}[stages.re-ranking]\nsystems = ['mmr']\n"
"""Needs item fields besides."""
COUNTED = """
[surface]
k = 4
[stages.retrieval]
systems = ["popularity", "counts"]
keep = 10
[stages.ranking]
systems = ["counts"]
"""


@dataclass(frozen=True)
class Ended:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be one JSON value."""
        return json.loads(self.out)


def shortlist(*arguments: object) -> Ended:
    """Call the command; anything but a clean exit is the test's failure."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(a) for a in arguments])
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
    return Ended(code, out.getvalue(), err.getvalue())


def succeeds(*arguments: object) -> Ended:
    """The same, and it must succeed."""
    ended = shortlist(*arguments)
    assert ended.code == 0, ended.err
    return ended


def outcome(*arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    ended = shortlist(*arguments)
    return ended.code, ended.out, ended.err


def refused(*arguments: object) -> str:
    """The one sentence with which the command refuses."""
    ended = shortlist(*arguments)
    assert ended.code == 2, (ended.code, ended.out, ended.err)
    assert "Traceback" not in ended.err
    assert ended.out == ""
    lines = [line for line in ended.err.splitlines() if line.startswith("shortlist: ")]
    assert len(lines) == 1, ended.err
    return lines[0].removeprefix("shortlist: ")


def started(*arguments: object) -> subprocess.Popen[str]:
    """The command in a process of its own, its output waiting to be read."""
    return subprocess.Popen(
        [sys.executable, "-m", "shortlist.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
    )


def write_shop(folder: Path, num_users: int = 60) -> Path:
    """The planted shop as events.csv, items.csv, users.csv and light.toml in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in zip(("events", "items", "users"), shop_frames(num_users)):
        frame.write_csv(folder / f"{name}.csv")
    (folder / "light.toml").write_text(LIGHT)
    (folder / "counted.toml").write_text(COUNTED)
    return folder


def train_shop(folder: Path, config: str = "light", *more: object) -> Path:
    """Write the shop and train it, as a stranger would; the run's folder."""
    write_shop(folder)
    tables = ("--items", folder / "items.csv", "--users", folder / "users.csv")
    out = folder / "runs" / "shop"
    succeeds(
        "train", folder / "events.csv", *tables, "--config", folder / f"{config}.toml", "--out", out, "--quiet", *more
    )
    return out


def benchmark(name: str) -> ModuleType:
    """A file of benchmarks/, which is no package; those that it imports are found beside it."""
    folder = str(Path(__file__).parents[1] / "benchmarks")
    if folder not in sys.path:
        sys.path.append(folder)  # last: names such as `events` stay whose they were
    return importlib.import_module(name)


def generated_log() -> ModuleType:
    """benchmarks/generated_log.py."""
    return benchmark("generated_log")


def some_user(events: pl.DataFrame, column: str) -> Any:
    """The user with most events."""
    return events[column].value_counts(sort=True)[column][0]
