"""Runs whose retriever searches by an index: from settings to snapshot and back."""

import json
import logging
import shutil

import numpy as np
import polars as pl
import pytest
import torch

from shortlist.cascade import indexing
from shortlist.cascade.build import load_run, train_cascade
from shortlist.cascade.config import RunConfig
from shortlist.cascade.lessons import make_batch, sample
from shortlist.cascade.run import as_of
from shortlist.data.dataset import build_dataset
from shortlist.data.log import read
from shortlist.errors import ConfigError, SnapshotError

ITEMS, USERS, KEEP = 900, 150, 20
RUN = """
[surface]
k = 5
[trainer]
epochs = 1
batch_size = 64
[index]
kind = "ivf"
recall = 0.6
lists = 30
[stages.retrieval]
systems = ["tiny-two-phases"]
keep = 20
[stages.ranking]
systems = ["tiny-pairs"]
"""


@pytest.fixture(scope="module")
def dataset():
    """People who wander among 900 items; what they have had is not shown again."""
    rng = np.random.default_rng(0)
    at, rows = rng.integers(ITEMS, size=USERS), []
    for day in range(30):
        at = (at + rng.integers(1, 30, size=USERS)) % ITEMS
        rows += [(f"u{u}", f"i{i}", 1_600_000_000 + 86_400 * day + u) for u, i in enumerate(at.tolist())]
    events = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    return build_dataset(read(events), RunConfig.from_toml('[surface]\nrepeats = "no"').data_settings)


def train(dataset, out, *overrides):
    return train_cascade(dataset, RunConfig.from_toml(RUN).override(*overrides), out, progress=False)


@pytest.fixture(scope="module")
def trained(own_systems, dataset, tmp_path_factory):
    return train(dataset, tmp_path_factory.mktemp("indexed") / "run")


def found(cascade, dataset, requests):
    page = cascade.run(make_batch(dataset, requests, cascade.max_history))
    assert not any(trace.problems for trace in page.traces)
    return page, page.traces[0].rows.padded()[0]


def shares(rows, truth):
    return [len(set(a) & set(b) - {0}) / len(set(b) - {0}) for a, b in zip(rows.tolist(), truth.tolist())]


def test_recall_in_the_snapshot_is_recall_of_the_first_stage(dataset, trained):
    about = json.loads((trained.folder / "metrics.json").read_text())["indexes"]["tiny-two-phases"]
    requests = sample(dataset.split.valid, 500, trained.config.trainer.seed)
    assert (about["kind"], about["in_use"], about["k"], about["num_items"]) == ("ivf", True, KEEP, dataset.num_items)
    assert about["num_queries"] == len(requests)
    _, by_index = found(trained.cascade, dataset, requests)
    indexes, trained.cascade.indexes = trained.cascade.indexes, {}
    _, exact = found(trained.cascade, dataset, requests)
    trained.cascade.indexes = indexes
    assert about["recall"] == pytest.approx(np.mean(shares(by_index, exact)))
    assert 0.6 <= about["recall"] < 1.0
    excluded = make_batch(dataset, requests, 500).excluded
    for r, row in enumerate(by_index.tolist()):
        assert not set(row) & set(excluded.values[excluded.offsets[r] : excluded.offsets[r + 1]].tolist())


def test_a_stage_with_an_index_costs_what_the_index_scores(dataset, trained):
    requests = dataset.split.test
    indexed, _ = found(trained.cascade, dataset, requests)
    indexes, trained.cascade.indexes = trained.cascade.indexes, {}
    exact, _ = found(trained.cascade, dataset, requests)
    trained.cascade.indexes = indexes
    saved = dataset.num_items - indexes["tiny-two-phases"].num_scored
    assert saved > 0
    assert exact.traces[0].flops - indexed.traces[0].flops == pytest.approx(2 * 8 * saved)


def test_read_back_it_answers_alike(dataset, trained):
    again = load_run(trained.folder)
    assert again.cascade.indexes["tiny-two-phases"].kind == "ivf"
    old, new = (found(run.cascade, dataset, dataset.split.test)[0] for run in (trained, again))
    assert torch.equal(old.rows, new.rows)
    assert torch.equal(old.scores, new.scores)
    assert as_of(again, "valid").indexes.keys() == {"tiny-two-phases"}  # its weights do not change with the window


def test_a_damaged_index_is_refused_by_name(trained, tmp_path):
    shutil.copytree(trained.folder, tmp_path / "run")
    path = tmp_path / "run" / "indexes" / "tiny-two-phases.faiss"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(SnapshotError, match=r"tiny-two-phases\.faiss is damaged"):
        load_run(tmp_path / "run")


def test_settings_decide(dataset, trained, tmp_path, caplog, monkeypatch):
    exact = train(dataset, tmp_path / "exact", "index.kind=auto")
    assert exact.metrics["indexes"] == {}
    assert not exact.cascade.indexes
    assert not (exact.folder / "indexes").exists()
    per_system = train(dataset, tmp_path / "own", "index.kind=exact", "index.tiny-two-phases.kind=flat")
    assert per_system.metrics["indexes"]["tiny-two-phases"]["recall"] == 1.0
    large = train(dataset, tmp_path / "large", "index.kind=auto", "index.min_items=800")
    assert large.cascade.indexes
    for run in (per_system, large):
        assert load_run(run.folder).config == run.config
    monkeypatch.setattr(indexing, "installed", lambda _: False)
    with caplog.at_level(logging.WARNING, "shortlist"):
        assert not train(dataset, tmp_path / "missing").cascade.indexes
    assert caplog.messages == [f"tiny-two-phases: {indexing.MISSING}"]


def test_an_index_that_finds_too_little(dataset, trained, tmp_path, caplog):
    poor = ("index.recall=0.99", "index.effort=1")
    with caplog.at_level(logging.WARNING, "shortlist"):
        unused = train(dataset, tmp_path / "exact", *poor)
        used = train(dataset, tmp_path / "warn", *poor, "index.when_short=warn")
    assert [message.rpartition("; ")[2] for message in caplog.messages] == [
        "every item is searched",
        "it is used all the same",
    ]
    assert not unused.cascade.indexes
    assert used.cascade.indexes
    assert unused.metrics["indexes"]["tiny-two-phases"]["recall"] < 0.99
    assert not unused.metrics["indexes"]["tiny-two-phases"]["in_use"]
    with pytest.raises(ConfigError, match=r"the ivf index of tiny-two-phases finds 0\.\d+ of what an exact search"):
        train(dataset, tmp_path / "refuse", *poor, "index.when_short=refuse")
    assert not (tmp_path / "refuse").exists()


def test_an_index_of_what_searches_no_vectors_is_refused(own_systems):
    with pytest.raises(ConfigError, match=r"\[index\.tiny-pairs\] is set"):
        RunConfig.from_toml(RUN).override("index.tiny-pairs.kind=hnsw")
    with pytest.raises(ConfigError, match=r"\[index\.other\] is set, but no stage uses"):
        RunConfig.from_toml(RUN + "[index.other]\nkind = 'hnsw'\n")
