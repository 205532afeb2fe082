"""Pre-ranking by chosen fields end to end: examples/pre_ranking.toml trained on the planted shop, saved, loaded and served, and metered."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cli_support import succeeds, write_shop
from shortlist.cascade.build import load_run
from shortlist.cascade.cascade import Cascade
from shortlist.cascade.engine import Engine
from shortlist.cascade.lessons import make_batch
from shortlist.cascade.run import make_system
from shortlist.layers.selection import ChoiceConfig
from shortlist.models.base import RequestShape
from shortlist.store.snapshot import load_tensors
from support import PER_CLUSTER

EXAMPLE = Path(__file__).parents[2] / "examples" / "pre_ranking.toml"
SMALL = {
    "trainer.epochs": 8, "trainer.lr": 0.01, "trainer.patience": 8, "surface.k": 4, "retrieval.keep": 20, "pre-ranking.keep": 8,
    "ranking.keep": 6, "din.dim": 8, "fscd.fields.dim": 8, "fscd.head.widths": [16], "trainer.fscd.lr": 0.02,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    shop = write_shop(tmp_path_factory.mktemp("pre-ranking"))
    out = shop / "run"
    changes = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    tables = ("--items", shop / "items.csv", "--users", shop / "users.csv")
    succeeds(
        "train", shop / "events.csv", *tables, "--config", EXAMPLE, "--out", out, "--no-report", "--quiet", *changes
    )
    return out


def cluster(item_id: str) -> int:
    return (int(item_id.removeprefix("i")) - 1) // PER_CLUSTER


def test_the_choice_is_saved_with_the_weights_and_the_first_layer_is_as_wide_as_it(folder):
    saved = load_tensors(folder / "systems" / "fscd.safetensors")
    body = load_run(folder).cascade.systems["fscd"].body
    kept = saved["body.choice.kept_M"]
    assert 0 < int(kept.sum()) < len(kept)
    assert body.gates is None
    assert body.fields.names == body.choice.kept_names()
    assert saved["body.tower.mlp.layers.0.weight"].shape[1] == 8 * int(kept.sum())
    assert body.choice.kept_share() <= 0.25
    assert not any("gates" in name for name in saved)


def test_the_meter_shows_that_the_pre_ranker_does_less_than_with_all_fields(folder):
    """The same requests through the same stages, the pre-ranker once as served and once over all fields."""
    run = load_run(folder)
    settings = run.config.systems["fscd"]
    every = replace(settings.settings, choice=ChoiceConfig(epochs=0))
    config = replace(run.config, systems={**run.config.systems, "fscd": replace(settings, settings=every)})
    kept = run.cascade.systems["fscd"]
    whole = make_system(config, "fscd", run.dataset.view("fit").space)
    assert whole.body.fields.names == kept.body.choice.names
    other = Cascade(config, run.dataset.space, {**run.cascade.systems, "fscd": whole}, popular=run.cascade.popular)
    batch = make_batch(run.dataset, run.dataset.split.test, run.cascade.max_history)
    spent = []
    for cascade in (run.cascade, other):
        report = cascade.run(batch).reports[0]
        assert [stage.degraded for stage in report] == [None] * 3
        spent.append({stage.stage: stage.spent_mflop for stage in report})
    assert spent[0]["pre-ranking"] < 0.6 * spent[1]["pre-ranking"]
    assert spent[0]["ranking"] == spent[1]["ranking"]
    shape = RequestShape(num_history=20, num_candidates=1_000)
    assert kept.cost(shape).bytes < 0.5 * whole.cost(shape).bytes


def test_what_passes_pre_ranking_is_of_the_user_s_cluster_and_every_stage_answers(folder, tmp_path):
    offered = [f"i{1 + c * PER_CLUSTER + place}" for place in range(5) for c in range(4)]
    with Engine.load(folder, events=tmp_path / "none.db") as engine:
        pages = {u: engine.recommend(f"u{u}", 4, candidates=offered) for u in range(1, 41)}
        assert engine.recommend("a stranger", 4).items
    assert all(page.degraded is None for page in pages.values())
    own = [cluster(item.item_id) == u % 4 for u, page in pages.items() for item in page.items]
    assert sum(own) / len(own) > 0.7


def test_the_same_run_scores_the_same_after_loading_again(folder):
    first, second = load_run(folder), load_run(folder)
    batch = make_batch(first.dataset, first.dataset.split.test, first.cascade.max_history)
    assert torch.equal(first.cascade.run(batch).rows, second.cascade.run(batch).rows)


def test_cold_and_two_towers_share_a_pre_ranking_stage(tmp_path):
    shop = write_shop(tmp_path)
    (shop / "both.toml").write_text(
        "surface = { k = 4 }\ntrainer = { epochs = 2, batch_size = 16, lr = 0.02 }\n"
        "[stages.retrieval]\nsystems = ['popularity']\nkeep = 20\n"
        "[stages.pre-ranking]\nsystems = ['cold', 'two-tower']\nkeep = 8\n"
        "[stages.ranking]\nsystems = ['dnn']\n"
        "[systems.cold]\nfields = { dim = 8 }\nhead = { widths = [16] }\nchoice = { epochs = 2, keep = 5 }\n"
        "costs = { measured = true }\n[systems.two-tower]\ndim = 8\nwidths = [16]\nnum_uniform = 8\n"
        "[systems.dnn]\ndim = 8\nwidths = [16]\n"
    )
    tables = ("--items", shop / "items.csv", "--users", shop / "users.csv")
    succeeds(
        "train",
        shop / "events.csv",
        *tables,
        "--config",
        shop / "both.toml",
        "--out",
        shop / "run",
        "--no-report",
        "--quiet",
    )
    cascade = load_run(shop / "run").cascade
    assert len(cascade.systems["cold"].body.fields.names) == 5
    with Engine.load(shop / "run", events=tmp_path / "none.db") as engine:
        page = engine.recommend("u1", 4)
    assert len(page.items) == 4
    assert page.degraded is None
