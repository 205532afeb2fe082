"""The frame of benchmarks, on a folder of tiny ones; and that every benchmark of the repository keeps to it."""

import fcntl
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from shortlist.errors import ConfigError, DataError
from shortlist.evaluation import benchmarks
from shortlist.evaluation.evidence import MEASURING, machine_lock

ROOT = Path(__file__).parents[2]
COUNT = '''"""Counts to a number.

More about it.
"""
import argparse
import os
from pathlib import Path
from shortlist.evaluation.benchmarks import record
from shortlist.evaluation.evidence import machine_lock

RESULT = Path(__file__).parent / "results" / "count.json"
parser = argparse.ArgumentParser()
parser.add_argument("--quick", action="store_true")
parser.add_argument("--out", type=Path)
given = parser.parse_args()
with machine_lock(lambda line: print("WAITS")):
    number = 3 if given.quick else 1000
print(f"counted to {number}")
record(RESULT, {"number": number, "holder": int(os.environ["SHORTLIST_MEASURING"])}, quick=given.quick, out=given.out)
'''
FAILS = '"""Fails."""\nRESULT = None\nraise SystemExit(3)\n'


@pytest.fixture
def folder(tmp_path):
    for name, text in {"count": COUNT, "fails": FAILS, "helper": '"""No benchmark."""\nx = {"RESULT": 1}\n'}.items():
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


def test_listing_finds_benchmarks_and_their_results(folder):
    rows = benchmarks.listing(folder)
    assert [row["name"] for row in rows] == ["count", "fails"]
    assert rows[0] == {
        "name": "count", "about": "Counts to a number.", "quick": True, "date": None, "device": None, "cpu": None,
    }  # fmt: skip
    (folder / "results").mkdir()
    (folder / "results" / "count.json").write_text(
        '{"date": "2026-01-02", "hardware": {"device": "cpu", "cpu": "Z80"}}'
    )
    lines = benchmarks.listing_lines(benchmarks.listing(folder))
    assert lines[0] == "count  Counts to a number."
    assert lines[1].strip() == "2026-01-02, cpu, Z80"
    assert lines[3].strip() == "not recorded; no --quick"


def test_a_full_run_is_recorded_under_the_lock(folder):
    done = benchmarks.run(folder, "count", live=False)
    assert "WAITS" not in done["output"]  # the script is part of the measurement that holds the lock
    assert done["output"] == "counted to 1000\n"
    recorded = json.loads((folder / "results" / "count.json").read_text())
    assert done["result"] == recorded
    assert recorded["holder"] == os.getpid()
    assert recorded["name"] == "count"
    assert recorded["command"] == "python benchmarks/count.py"
    assert recorded["quick"] is False
    assert {"hardware", "versions", "commit", "date"} <= set(recorded)
    assert MEASURING not in os.environ


def test_a_quick_run_is_not_recorded_and_does_not_wait(folder):
    with Path(tempfile.gettempdir(), "shortlist-measuring.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # someone measures
        done = benchmarks.run(folder, "count", quick=True, live=False)
    assert done["result"]["number"] == 3
    assert done["result"]["quick"] is True
    assert not (folder / "results").exists()


def test_a_full_run_waits_for_its_turn(folder):
    said: list[str] = []
    with Path(tempfile.gettempdir(), "shortlist-measuring.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        runner = threading.Thread(
            target=benchmarks.run, args=(folder, "count"), kwargs={"say": said.append, "live": False}
        )
        runner.start()
        end = time.monotonic() + 30
        while not said and time.monotonic() < end:
            time.sleep(0.01)
        assert said == ["another measurement runs on this machine; waiting for it to end"]
        assert not (folder / "results").exists()
    runner.join(60)
    assert (folder / "results" / "count.json").exists()


def test_the_lock_lets_its_own_processes_pass():
    program = "from shortlist.evaluation.evidence import machine_lock\nwith machine_lock(): print('in')"
    with machine_lock():
        own = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
        with machine_lock():  # nor does it wait for itself
            pass
        assert os.environ[MEASURING] == str(os.getpid())
    assert own.stdout == "in\n"


def test_refusals(folder):
    with pytest.raises(ConfigError, match=r"no benchmark named 'cuont'.*did you mean count"):
        benchmarks.run(folder, "cuont")
    with pytest.raises(ConfigError, match="no benchmark named 'helper'"):
        benchmarks.run(folder, "helper")
    with pytest.raises(ConfigError, match="no quick form"):
        benchmarks.run(folder, "fails", quick=True)
    with pytest.raises(DataError, match="fails failed with exit code 3"):
        benchmarks.run(folder, "fails")
    with pytest.raises(ConfigError, match="no folder of benchmarks"):
        benchmarks.benchmark_folder(folder / "none")
    (folder / "results").mkdir(exist_ok=True)
    (folder / "results" / "count.json").write_text("{")
    with pytest.raises(DataError, match=r"count\.json is not a result"):
        benchmarks.listing(folder)
    (folder / "broken.py").write_text("def")
    with pytest.raises(DataError, match=r"broken\.py is not Python"):
        benchmarks.listing(folder)


def test_record_writes_where_it_should(tmp_path):
    result = tmp_path / "results" / "x.json"
    assert benchmarks.record(result, {"a": 1}, quick=True) is None
    assert benchmarks.record(result, {"a": 1}, quick=True, out=tmp_path / "o.json") == tmp_path / "o.json"
    assert not result.exists()
    assert benchmarks.record(result, {"a": 1, "name": "other"}, quick=False) == result
    assert (json.loads(result.read_text())["a"], json.loads(result.read_text())["name"]) == (1, "x")


def test_benchmarks_of_the_repository_can_be_listed():
    rows = {row["name"]: row for row in benchmarks.listing(ROOT / "benchmarks")}
    assert {"build_dataset", "sasrec_step", "serving_latency", "sparse_step", "train_5m"} <= set(rows)
    for name, row in rows.items():
        assert len(row["about"]) > 20
        text = (ROOT / "benchmarks" / f"{name}.py").read_text()
        assert re.search(r'"--out"', text), f"{name} takes no --out"


def test_a_real_benchmark_in_its_quick_form():
    """The two kinds of step are timed and compared; nothing of it is recorded."""
    path = ROOT / "benchmarks" / "results" / "sparse_step.json"
    before = path.read_bytes()
    result = benchmarks.run(ROOT / "benchmarks", "sparse_step", quick=True, live=False)["result"]
    arms = {arm["arm"]: arm for arm in result["rows"]["20000"]}
    dense = arms["dense Adam"]
    for arm in arms.values():
        ratio = dense["step_ms"]["low"] / arm["step_ms"]["low"]
        assert arm["times_faster_than_dense_adam"] == pytest.approx(ratio)
    # Adam keeps two numbers per weight and its count of steps; row-wise Adagrad one per row.
    assert dense["state_bytes"] == 2 * 4 * 20_000 * 16 + 4
    assert arms["row-wise Adagrad"]["state_bytes"] == pytest.approx(4 * 20_000, rel=0.01)
    assert path.read_bytes() == before
