"""LambdaMART beside a run: the same candidates, requests and re-ranking, and nothing but the ranker another."""

import pytest
import torch

from shortlist.cascade import build
from shortlist.cascade.build import train_cascade
from shortlist.cascade.config import RunConfig
from shortlist.cascade.lessons import make_batch
from shortlist.cascade.run import load_run
from shortlist.cascade.sharing import Shared
from shortlist.errors import ConfigError
from shortlist.evaluation import demo, trees
from shortlist.evaluation.report import judge
from shortlist.evaluation.trees import TREES, beside, missing_rows, train_trees, trees_config
from support import shop_dataset

SETTINGS = """
[surface]
k = 5
[trainer]
epochs = 2
batch_size = 32
seed = 3
[learning]
slices = 2
[stages.retrieval]
systems = ["personal-frequency", "item-knn", "popularity"]
keep = 15
[stages.pre-ranking]
systems = ["light"]
keep = 12
[stages.ranking]
systems = ["dnn", "light"]
keep = 8
[stages.re-ranking]
systems = ["mmr"]
[systems.light]
system = "dnn"
widths = []
[systems.dnn]
dim = 4
widths = [8]
[systems.mmr]
relevance = 0.9
[trainer.light]
lr = 5e-3
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("trees"), Shared()


@pytest.fixture(scope="module")
def run(work):
    folder, shared = work
    config = RunConfig.from_toml(SETTINGS)
    return train_cascade(shop_dataset(), config, folder / "shop", progress=False, shared=shared)


@pytest.fixture(scope="module")
def rival(work, run):
    pytest.importorskip("lightgbm")
    return train_trees(run, beside(run.folder), shared=work[1], progress=False)


def test_only_the_rankers_are_others(run):
    config = trees_config(run.config, num_negatives=7)
    assert {stage.name: stage.systems for stage in config.stages} == {
        "retrieval": ("personal-frequency", "item-knn", "popularity"),
        "ranking": (TREES,),
        "re-ranking": ("mmr",),
    }
    assert [stage.actions[0].keep for stage in config.stages] == [15, 8, None]
    assert config.systems["mmr"] == run.config.systems["mmr"]
    assert config.systems[TREES].settings == config.systems[TREES].entry.config(None)
    assert config.learning.num_negatives == 7
    assert (config.data, config.surface, config.trainer) == (run.config.data, run.config.surface, run.config.trainer)
    assert not config.trainers
    only = RunConfig.from_toml('[stages.retrieval]\nsystems = ["popularity"]\n')
    with pytest.raises(ConfigError, match="no stage of the run ranks"):
        trees_config(only)


def test_it_ranks_what_the_run_retrieves(run, rival):
    batch = make_batch(run.dataset, run.dataset.split.test, 500)
    mine, theirs = run.cascade.run(batch), rival.cascade.run(batch)
    assert torch.equal(mine.traces[0].rows.values, theirs.traces[0].rows.values)
    assert [trace.name for trace in theirs.traces] == ["retrieval", "ranking", "re-ranking"]
    assert not torch.equal(mine.rows, theirs.rows)
    assert not any(trace.problems for trace in theirs.traces)


def test_nothing_is_collected_twice(work, run, rival, monkeypatch, tmp_path):
    """What the run's training has made is enough: only the trees are grown, and they are those of a training of their own."""
    alone = train_trees(run, tmp_path / "alone", progress=False)
    assert alone.metrics["validation"]["ndcg@5"] == rival.metrics["validation"]["ndcg@5"]
    assert torch.equal(alone.cascade.systems[TREES].trees_0, rival.cascade.systems[TREES].trees_0)
    collected, made = build.collect, []
    monkeypatch.setattr(build, "collect", lambda *a, **k: made.append(a[3]) or collected(*a, **k))
    train_trees(run, tmp_path / "again", shared=work[1], progress=False)
    assert "ranking" not in made


def test_one_that_stands_there_is_read(run, rival, monkeypatch):
    monkeypatch.setattr(trees, "train_cascade", lambda *given, **rest: pytest.fail("trained again"))
    assert train_trees(run, beside(run.folder)).version == rival.version
    with pytest.raises(pytest.fail.Exception):
        train_trees(run, beside(run.folder), fresh=True)


def test_one_of_another_run_is_not_taken_for_it(run, rival, monkeypatch):
    trained = []
    monkeypatch.setattr(trees, "train_cascade", lambda *given, **rest: trained.append(given) or rival)
    other = load_run(run.folder)
    object.__setattr__(other, "config", other.config.override("item-knn.num_neighbours=3"))
    train_trees(other, beside(run.folder))
    assert trained


def test_it_stands_in_the_table_on_the_same_requests(run, rival):
    judged = judge(run, "test", names=("popularity",), rivals={TREES: rival})
    for comparison in judged.comparisons:
        assert [report.name for report in comparison.reports] == ["cascade", "popularity", TREES]
        assert len({report.num_requests for report in comparison.reports}) == 1
        assert 0 < comparison.reports[2].metrics["ndcg@5"].mean < 1
    assert "all others" in judged.verdicts[0] or "does not beat" in judged.verdicts[0]


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (("implicit", "lightgbm"), None),
        (("implicit",), "LambdaMART stands"),
        (("lightgbm",), "ALS stands"),
        ((), "ALS and LambdaMART stand"),
    ],
)
def test_what_is_missing_is_said_with_its_remedy(there, said, monkeypatch):
    monkeypatch.setattr(trees, "installed", lambda name: name in there)
    line = missing_rows()
    assert (line is None) == (said is None)
    if line is not None:
        assert line.startswith(said)
        assert line.endswith("pip install 'shortlist[baselines]'")


def test_the_demo_goes_without(run, monkeypatch):
    monkeypatch.setattr(demo, "has_trees", lambda: False)
    assert demo._rivals(run, Shared(), False, False) == {}
