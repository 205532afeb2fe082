"""`shortlist simulate`: a log, its truth and a summary; a trained run as the policy."""

import numpy as np
import polars as pl
import pytest

from cli_support import refused, succeeds
from shortlist.cascade.engine import Engine
from shortlist.cascade.policy import policy_of
from shortlist.cascade.run import load_run
from shortlist.data.log import read
from shortlist.errors import DataError
from shortlist.simulation import World, popular
from support import shop_frames


@pytest.fixture(scope="module")
def log(shop):
    return shop.parents[1] / "events.csv"


def test_a_log_with_its_truth(log, tmp_path):
    out, truth = tmp_path / "new" / "log.parquet", tmp_path / "truth.parquet"
    call = ("simulate", log, "--out", out, "--requests", 500, "--k", 4, "--seed", 3, "--truth", truth)
    said = succeeds(*call).out
    assert said.startswith("Simulated: 500 requests answered by popularity")
    assert [line.split()[:2] for line in said.splitlines()[3:7]] == [[str(p), "500"] for p in range(1, 5)]
    events, told = read(out).events, pl.read_parquet(truth)
    assert told.height == 2_000
    assert events.height == 2_000 + events["bought"].sum()
    assert set(events["source"]) == set(told["source"]) == {"simulated"}
    first = events
    assert said == succeeds(*call).out
    assert read(out).events.equals(first)


def test_the_same_as_json(log, tmp_path):
    call = ("simulate", log, "--out", tmp_path / "log.parquet", "--requests", 400, "--k", 3, "--json")
    told = succeeds(*call, "--policy", "random", "--set", "attraction=0.5", "--set", "values=pareto").json
    assert told["source"] == "simulated"
    assert told["impressions"] == 1_200
    assert [p["position"] for p in told["places"]] == [1, 2, 3]
    rates = [p["true_ctr"] for p in told["places"]]
    assert rates[1] == pytest.approx(rates[0] / 2, rel=0.1)
    best = succeeds(*call, "--policy", "best", "--explore", 0, "--set", "attraction=0.5", "--set", "values=pareto").json
    assert best["expected_value_per_request"] > 1.5 * told["expected_value_per_request"]


def test_a_run_plays(shop, log, tmp_path):
    call = ("simulate", log, "--out", tmp_path / "log.parquet", "--requests", 300, "--k", 4, "--json")
    mine = succeeds(*call, "--policy", shop).json
    crowd = succeeds(*call, "--policy", "popularity").json
    assert mine["expected_clicks"] > crowd["expected_clicks"], "it knows who likes what"


def test_a_run_shows_what_it_would_serve(shop):
    """In the world's numbers, for users in any order, in chunks."""
    events, items, _ = shop_frames(60)
    world, run = World.from_log(read(events, items=items)), load_run(shop)
    users = np.random.default_rng(0).permutation(np.arange(0, world.num_users + 1))
    pages = policy_of(run, world, k=4).pages_of(users, np.full(len(users), world.start))
    with Engine.load(shop) as engine:
        for row, page in zip(users[:12], pages):
            (user,) = world.user_ids.decode([row])
            answer = engine.recommend(user, 4)
            assert world.item_ids.decode(page) == [item.item_id for item in answer.items], user


def test_items_that_only_the_run_knows_are_left_out(shop):
    events, _, _ = shop_frames(60)
    few = World.from_log(read(events.filter(pl.col("item_id").is_in([f"i{i}" for i in range(1, 8)]))))
    pages = policy_of(load_run(shop), few, k=4).pages_of(np.arange(1, 9), np.full(8, few.start))
    assert pages.max() <= 7
    assert (pages > 0).all()
    strangers = World.from_log(read(events.with_columns(item_id=pl.col("item_id") + "x")))
    assert popular(strangers, 2).pages_of(np.array([1]), np.array([0])).all()
    with pytest.raises(DataError, match="knows no item"):
        policy_of(load_run(shop), strangers)


def test_what_is_trained_on_it_says_so(shop, log, tmp_path):
    world, run = tmp_path / "world.parquet", tmp_path / "run"
    succeeds("simulate", log, "--out", world, "--requests", 1_500, "--k", 5, "--policy", "best")
    config = shop.parents[1] / "counted.toml"
    said = succeeds("train", world, "--config", config, "--out", run, "--quiet").out
    assert "simulated requests" in said
    assert "Note: Simulated:" in succeeds("evaluate", run).out
    assert "Simulated: a world with known truth" in (tmp_path / "run-report" / "report.html").read_text()


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (("--policy", "nobody"), "nobody"),
        (("--set", "atraction=0.1"), "did you mean 'attraction'"),
        (("--set", "attraction"), "has no value"),
        (("--set", "attraction=2"), "chance"),
        (("--k", "99"), "as many items"),
        (("--explore", "2"), "explore"),
        (("--days", "0"), "days"),
        (("--truth", "truth.csv"), "truth.csv"),
    ],
)
def test_what_can_not_be_simulated_is_one_sentence(log, tmp_path, more, word):
    assert word in refused("simulate", log, "--out", tmp_path / "log.parquet", *more)
    assert not list(tmp_path.iterdir()), "nothing half-written"
