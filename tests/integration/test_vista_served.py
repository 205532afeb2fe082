"""Long histories end to end: examples/vista.toml trained on the planted shop, refreshed, and served over HTTP from the cache alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient

from cli_support import refused, succeeds, write_shop
from shortlist.cascade.engine import Engine
from shortlist.cascade.live import load_live
from shortlist.cascade.summaries import summary_path
from shortlist.serving.app import create_app
from shortlist.store import summaries as files
from shortlist.store.summaries import SummaryStore

EXAMPLE = Path(__file__).parents[2] / "examples" / "vista.toml"
SMALL = {
    "surface.k": 4, "trainer.epochs": 6, "trainer.lr": 0.01, "retrieval.keep": 12, "pre-ranking.keep": 10, "ranking.keep": 8,
    "re-ranking.keep": 4, "vista.dim": 8, "vista.num_seeds": 4, "vista.max_history": 10, "vista.num_recent": 2,
    "vista.max_stale_events": 2, "vista.num_reconstructed": 4, "two-tower.dim": 8, "sasrec.dim": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained and refreshed run; what the commands said is beside it."""
    folder = write_shop(tmp_path_factory.mktemp("vista"))
    out = folder / "run"
    settings = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    tables = ("--items", folder / "items.csv", "--users", folder / "users.csv")
    log = ("train", folder / "events.csv", *tables, "--config", EXAMPLE, "--out", out, "--no-report", "--quiet")
    succeeds(*log, *settings)
    told = succeeds("refresh", out)
    (folder / "told.txt").write_text(told.out)
    return out


@pytest.fixture
def engine(run, monkeypatch):
    monkeypatch.setattr(files, "LOOK_S", 0.0)
    beside = run.with_name(f"{run.name}.events.db")
    beside.unlink(missing_ok=True)
    with Engine.load(run, events=beside) as loaded:
        yield loaded


def forbid_encoding(engine):
    """From here on whoever encodes a history fails, which the answer would say."""

    def encoded(*_):
        raise AssertionError("a history was encoded")

    vista = engine.live.cascade.systems["vista"]
    vista.encoder.stream = vista.encoder.forward = encoded
    return vista


def test_refresh_says_what_it_did(run):
    told = (run.parent / "told.txt").read_text()
    assert "vista: summaries of 60 users (0 were there already)" in told
    assert "events/s" in told
    (row,) = succeeds("refresh", run, "--json").json
    assert row["num_users"] == 60
    assert row["bytes_per_user"] == 32 + 4 * 4 + 4 * 8 + 16
    assert Path(row["path"]) == summary_path(run, "vista")
    assert refused("refresh", run, "--events", run / "no.db").endswith("leave --events out")


def test_serving_reads_the_cache_and_never_encodes(run, engine):
    vista = forbid_encoding(engine)
    client = TestClient(create_app(engine))
    answer = client.get("/v1/recommend/u7?k=4").json()
    assert answer["degraded"] is None
    assert answer["snapshot_version"] == engine.snapshot_version
    assert len(answer["items"]) == 4
    assert engine.live.cascade.memories.status().num_read == 1

    # The ranking's scores are those of the summary in the file, computed here from its bytes.
    (memory,) = SummaryStore.open(summary_path(run, "vista"), version=engine.snapshot_version).get(["u7"])
    traced = engine.traced("u7", 4)
    batch, trace = traced.batch, next(t for t in traced.page.traces if t.name == "ranking")
    before = engine.live.cascade.until(batch, "ranking")
    z = (memory["code"].float() * memory["scale"][:, None])[None]
    with torch.no_grad():
        scores = vista.score_candidates(vista.state(z, batch), before.candidates)["target"]
    by_row = dict(zip(before.candidate_rows.values.tolist(), scores.tolist()))
    for row, score in zip(trace.rows.values.tolist(), trace.system_scores["vista"].tolist()):
        assert score == pytest.approx(by_row[row], abs=1e-5)


def test_another_summary_in_the_cache_is_another_answer(engine):
    """What a user has done stays as it is; only the bytes in the cache change, and the scores follow them."""
    forbid_encoding(engine)
    memories = engine.live.cascade.memories

    def scores():
        trace = next(t for t in engine.traced("u7", 4).page.traces if t.name == "ranking")
        return dict(zip(trace.rows.values.tolist(), trace.system_scores["vista"].tolist()))

    own = scores()
    real = memories.backings["vista"].get
    memories.backings["vista"].get = lambda keys: real(["u8"] * len(keys))
    other = scores()
    assert max(abs(own[row] - other[row]) for row in own.keys() & other.keys()) > 1e-3


def test_events_make_a_summary_stale_and_a_refresh_heals_it_while_serving(run, engine):
    client = TestClient(create_app(engine))
    now = engine.live.log_end + 1_000
    events = [{"user": "u7", "item": f"i{i}", "timestamp": now + i} for i in range(1, 4)]
    assert client.post("/v1/events", json=events).json()["num_new"] == 3
    said = client.get("/v1/recommend/u7").json()["degraded"]
    assert "ranking: vista read a summary that lacks more than 2 events" in said
    assert client.get("/v1/recommend/u8").json()["degraded"] is None
    succeeds("refresh", run)
    assert client.get("/v1/recommend/u7").json()["degraded"] is None
    store = SummaryStore.open(summary_path(run, "vista"), version=engine.snapshot_version)
    live = load_live(run)
    row = int(live.users(["u7"])[0])
    known = int(live.dataset.histories.offsets[row + 1] - live.dataset.histories.offsets[row])
    assert int(store.get(["u7"])[0]["num_events"]) == known + 3


def test_strangers_are_answered_too(engine):
    answer = TestClient(create_app(engine)).get("/v1/recommend/nobody-knows-me").json()
    assert answer["degraded"] is None
    assert len(answer["items"]) == 4
