"""Peak memory of evaluating many items, measured in a process of its own: score matrices must not grow with the catalogue."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory where Linux keeps it")
ITEMS, REQUESTS = 150_000, 256
UNCUT_MIB = REQUESTS * ITEMS * 4 / 2**20
"""One float32 score for every request and item."""

MEASURE = """
import json, sys
from pathlib import Path
import numpy as np, polars as pl, torch
from shortlist.cascade import lessons
from shortlist.data.dataset import build_dataset
from shortlist.data.log import read
from shortlist.evaluation.evaluate import held_out, make_pages, pager_of
from shortlist.models import base
from shortlist.registry import find

torch.set_num_threads(1)


def peak_kib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


items, requests, budget = (int(a) for a in sys.argv[1:4])
lessons.SCORES_AT_ONCE = base.PRODUCTS_AT_ONCE = budget
rng = np.random.default_rng(0)
events = pl.DataFrame({
    "user_id": np.repeat(np.arange(requests), 12),
    "item_id": rng.integers(items, size=12 * requests),
    "timestamp": 1_600_000_000 + 86_400 * np.tile(np.arange(12), requests) + np.repeat(np.arange(requests), 12),
})
dataset = build_dataset(read(events, items=pl.DataFrame({"item_id": np.arange(items)})))
asked = held_out(dataset, "test").select(np.arange(requests) % len(held_out(dataset, "test")))
models = {}
for name, settings in {"popularity": {}, "item-knn": {}, "two-tower": {"dim": 8}}.items():
    entry = find(name)
    torch.manual_seed(0)
    models[name] = entry.cls(entry.config(settings), dataset.view("test").space).eval()
    models[name].prepare(dataset.view("test"))
    make_pages(pager_of(models[name], 10), dataset, asked.select(np.arange(1)), repeats=True)  # loads what is loaded once
grown = {}
for name, model in models.items():
    before = peak_kib()
    pages = make_pages(pager_of(model, 10), dataset, asked, repeats=False)
    assert pages.shape == (requests, 10) and (pages > 0).all(), name
    grown[name] = (peak_kib() - before) / 1024
print(json.dumps(grown))
"""


def growth(budget: int) -> dict[str, float]:
    """MiB by which the peak grew in evaluating each system, with so many scores held at once."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(ITEMS), str(REQUESTS), str(budget)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_peak_memory_stays_near_the_budget():
    grown = growth(budget=1 << 21)  # 8 MiB
    assert sum(grown.values()) < UNCUT_MIB / 2, grown


def test_without_a_budget_the_same_work_needs_whole_matrices():
    """So that the test above can fail: what it measures is there."""
    grown = growth(budget=1 << 40)
    assert sum(grown.values()) > UNCUT_MIB, grown
