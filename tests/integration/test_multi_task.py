"""Click and conversion end to end: examples/multi_task.toml on a planted log of two actions, trained, served and judged by task."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from cli_support import succeeds
from shortlist.cascade.engine import Engine
from shortlist.cascade.lessons import make_batch
from shortlist.cascade.run import load_run

EXAMPLE = Path(__file__).parents[2] / "examples" / "multi_task.toml"
NUM_USERS, NUM_ITEMS, HOUR = 60, 24, 3_600
SMALL = {
    "surface.k": 4, "retrieval.keep": 24, "pre-ranking.keep": 16, "ranking.keep": 4, "trainer.epochs": 8, "trainer.lr": 0.02,
    "trainer.patience": 8, "light.widths": "[8]", "mmoe.num_experts": 3, "mmoe.expert_widths": "[8]", "mmoe.tower_widths": "[]",
    "mmoe.input.dim": 8, "light.input.dim": 4, "trainer.batch_size": 16,
}  # fmt: skip


def planted(seed: int = 0) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Events and items. A user clicks items of the own half of the catalogue; what is clicked is bought an hour later if it is cheap.

    Everybody clicks cheap and dear items alike, so clicks say nothing of the price and purchases everything.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(NUM_USERS):
        at = 1_600_000_000 + int(rng.integers(0, 10 * 24)) * HOUR
        for _ in range(int(rng.integers(14, 20))):
            at += int(rng.integers(24, 60)) * HOUR
            item = 2 * int(rng.integers(NUM_ITEMS // 2)) + user % 2
            rows.append((f"u{user}", f"i{item}", at, "click"))
            if is_cheap(item) and rng.random() < 0.9:
                rows.append((f"u{user}", f"i{item}", at + HOUR, "purchase"))
    events = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "action"], orient="row")
    items = pl.DataFrame(
        {
            "item_id": [f"i{i}" for i in range(NUM_ITEMS)],
            "price_band": ["cheap" if is_cheap(i) else "dear" for i in range(NUM_ITEMS)],
        }
    )
    return events, items


def is_cheap(item: int) -> bool:
    return item // 2 % 2 == 0


def trained(folder: Path, name: str, **changes: object) -> Path:
    out = folder / name
    words = [word for key, value in {**SMALL, **changes}.items() for word in ("--set", f"{key}={value}")]
    told = succeeds(
        "train", folder / "events.csv", "--items", folder / "items.csv", "--config", EXAMPLE, "--set", "surface.repeats=yes",
        "--out", out, "--no-report", "--quiet", *words,
    )  # fmt: skip
    assert "gauc" in told.out
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("tasks")
    for name, frame in zip(("events", "items"), planted()):
        frame.write_csv(where / f"{name}.csv")
    return where


@pytest.fixture(scope="module")
def run(folder):
    return trained(folder, "run")


def shares(run: Path, tmp_path: Path) -> tuple[float, float]:
    """Of what the served pages hold: items of the user's own half, and cheap ones."""
    offered = [f"i{i}" for i in range(NUM_ITEMS)]
    with Engine.load(run, events=tmp_path / "none.db") as engine:
        pages = {u: engine.recommend(f"u{u}", 4, candidates=offered) for u in range(40)}
    assert all(page.degraded is None for page in pages.values())
    shown = [(u, int(item.item_id.removeprefix("i"))) for u, page in pages.items() for item in page.items]
    return float(np.mean([i % 2 == u % 2 for u, i in shown])), float(np.mean([is_cheap(i) for _, i in shown]))


def test_both_tasks_are_told_and_reported(run):
    metrics = json.loads((run / "metrics.json").read_text())
    told = next(s["tasks"] for s in metrics["systems"] if s["name"] == "mmoe")
    assert told["click"]["auc"] > 0.55
    assert told["purchase"]["auc"] > 0.75
    assert (
        told["purchase"]["candidates"] == told["click"]["positives"]
    )  # a purchase is learned on clicked candidates alone
    assert "conflicts" not in next(s["tasks"] for s in metrics["systems"] if s["name"] == "popularity")
    loaded = load_run(run)
    assert loaded.cascade.systems["mmoe"].space.tasks == ("click", "purchase")


def test_pages_follow_the_product(run, folder, tmp_path):
    """By click times purchase pages are of the own half and cheap; by clicks alone cheap items are ahead only as what was bought before."""
    own, cheap = shares(run, tmp_path)
    assert own > 0.8
    assert cheap > 0.8
    by_clicks = trained(folder, "clicks", **{"surface.task_weights": "{}"})
    own, by_chance = shares(by_clicks, tmp_path)
    assert own > 0.8
    assert by_chance < cheap - 0.1


def test_the_test_window_is_judged_by_task(run, tmp_path):
    """The table of `shortlist evaluate`, and its figures from the pages' own scores."""
    told = succeeds("evaluate", run, "--out", tmp_path / "found.json")
    assert "purchase" in told.out
    found = json.loads((tmp_path / "found.json").read_text())["tasks"]
    assert set(found) == {"light", "mmoe"}
    assert found["mmoe"]["purchase"]["auc"] > 0.6
    loaded = load_run(run)
    requests = loaded.dataset.split.test
    batch = make_batch(loaded.dataset, requests, loaded.cascade.max_history)
    rows = loaded.cascade.until(batch, "ranking").candidate_rows
    clicked = {
        (r, i)
        for r in range(len(requests))
        for i in requests.target[requests.target_offsets[r] : requests.target_offsets[r + 1]]
    }
    pairs = set(zip(rows.row_of_value.tolist(), rows.values.tolist()))
    assert found["mmoe"]["click"]["candidates"] == len(pairs)
    assert found["mmoe"]["click"]["positives"] >= len(pairs & clicked) > 0
