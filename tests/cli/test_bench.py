"""`shortlist bench`: lists, runs, refuses."""

from pathlib import Path

import pytest

from cli_support import refused, succeeds

ROOT = Path(__file__).parents[2]
SLEEP = '''"""Sleeps a while."""
import argparse, json
from pathlib import Path
RESULT = Path(__file__).parent / "results" / "sleep.json"
parser = argparse.ArgumentParser()
parser.add_argument("--quick", action="store_true")
parser.add_argument("--out", type=Path, default=RESULT)
given = parser.parse_args()
given.out.parent.mkdir(exist_ok=True)
given.out.write_text(json.dumps({"name": "sleep", "quick": given.quick}))
print("slept")
'''


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sleep.py").write_text(SLEEP)
    return tmp_path


def test_without_a_name_all_are_listed(folder, monkeypatch):
    assert succeeds("bench", "--benchmarks", folder).out.startswith("sleep  Sleeps a while.\n")
    monkeypatch.chdir(ROOT)
    assert "sparse_step" in [row["name"] for row in succeeds("bench", "--json").json]


def test_quick_and_full(folder):
    quick = succeeds("bench", "sleep", "--quick", "--json", "--benchmarks", folder).json
    assert (quick["result"], quick["output"]) == ({"name": "sleep", "quick": True}, "slept\n")
    assert not (folder / "results").exists()
    said = succeeds("bench", "sleep", "--benchmarks", folder).out
    assert f"recorded in {folder / 'results' / 'sleep.json'}" in said
    assert (folder / "results" / "sleep.json").exists()


def test_refusals(folder, tmp_path, monkeypatch):
    assert "did you mean sleep" in refused("bench", "slep", "--benchmarks", folder)
    assert "needs the name of a benchmark" in refused("bench", "--quick", "--benchmarks", folder)
    monkeypatch.chdir(tmp_path)
    assert "run inside a clone, or give --benchmarks DIR" in refused("bench")
