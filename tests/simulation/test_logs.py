"""A simulated log says what happened in the world, says that it is simulated, and is a log like any other."""

import math

import numpy as np
import polars as pl
import pytest

from cli_support import COUNTED
from shortlist.cascade.build import train_cascade
from shortlist.cascade.config import RunConfig
from shortlist.data.check import check
from shortlist.data.dataset import Dataset, build_dataset
from shortlist.data.ingest import ingest
from shortlist.data.ingested import is_simulated
from shortlist.data.log import read
from shortlist.data.splits import DataConfig
from shortlist.errors import DataError
from shortlist.evaluation.runs import evaluate_run
from shortlist.simulation import Arrivals, Audience, Diurnal, Policy, arrive, best, popular, simulate, uniform

DAYS = 30


@pytest.fixture(scope="module")
def arrivals(drifting):
    start, end = drifting.start, drifting.start + DAYS * 86_400
    return arrive(
        Diurnal(per_second=1.0), Audience.by_activity(drifting.events_U), start=start, end=end, seed=1, count=3_000
    )


@pytest.fixture(scope="module")
def made(drifting, arrivals, shop_log):
    return simulate(drifting, popular(drifting, 5, explore=0.3), arrivals, seed=2, items=shop_log.items)


def test_rows_are_what_happened(made, arrivals, drifting):
    events, truth = made.log.events, made.truth
    shown = events.filter(pl.col("action") != "purchase").sort("request_id", "position")
    told = truth.sort("request_id", "position")
    assert truth.height == 5 * len(arrivals)
    for name in ("user_id", "item_id", "position", "propensity", "click"):
        assert shown[name].to_list() == told[name].to_list(), name
    assert (shown["action"] == "click").to_list() == (told["click"] == 1).to_list()
    assert truth["user_id"].to_list()[::5] == drifting.user_ids.decode(arrivals.user)
    assert truth["timestamp"].dt.epoch("ms").to_list()[::5] == (arrivals.time * 1_000).astype(int).tolist()
    assert events["timestamp"].is_sorted()
    assert truth.group_by("request_id").agg(pl.col("item_id").n_unique())["item_id"].unique().to_list() == [5]


def test_purchases_come_later_and_only_those_that_were_seen(made, arrivals):
    key = ["request_id", "position", "item_id", "user_id"]
    bought = made.truth.filter(pl.col("purchase") == 1)
    logged = made.log.events.filter(pl.col("action") == "purchase").join(
        bought.select(*key, "delay_s", "timestamp", money="value"), on=key, suffix="_click"
    )
    waited = (logged["timestamp"] - logged["timestamp_click"].dt.replace_time_zone(None)).dt.total_milliseconds() / 1e3
    assert (waited - logged["delay_s"]).abs().max() < 0.002
    assert logged["value"].to_list() == logged["money"].to_list()
    in_time = bought["timestamp"].dt.epoch("ms") + bought["delay_s"] * 1e3 <= arrivals.end * 1e3
    assert logged.height == in_time.sum()
    assert 0 < logged.height < bought.height, "some have not come yet"
    assert made.log.events.filter(pl.col("action") != "purchase")["value"].sum() == 0
    assert made.log.events["bought"].sum() == logged.height


def test_the_summary_agrees_with_the_truth(made):
    places = made.summary()
    assert places["impressions"].to_list() == [3_000] * 5
    assert places["z"].abs().max() < 4
    first = made.truth.filter(pl.col("position") == 1)
    chance = first["click_chance"].to_numpy()
    gap = (first["click"].sum() - chance.sum()) / math.sqrt((chance * (1 - chance)).sum())
    assert places["z"][0] == pytest.approx(gap)
    told = made.totals()
    assert told["clicks"] == made.truth["click"].sum()
    assert told["expected_purchases"] == pytest.approx(
        (made.truth["click_chance"] * made.truth["conversion_chance"]).sum()
    )
    assert told["expected_value_per_request"] == pytest.approx(made.truth["expected_value"].sum() / 3_000)


def test_another_policys_worth_can_be_told_from_the_log(made, drifting, arrivals):
    """Weights 1 / propensity where the other policy shows the same item at the same place: unbiased, within 4 standard errors."""
    other = best(drifting, 5, aim="clicks")
    wanted = other.pages_of(arrivals.user, arrivals.time)
    row = drifting.item_ids.encode(made.truth["item_id"]).reshape(-1, 5)
    click = made.truth["click"].to_numpy().reshape(-1, 5)
    weight = (row == wanted) / made.truth["propensity"].to_numpy().reshape(-1, 5)
    estimates = (weight * click).sum(1)
    truth = drifting.value_of(other, arrivals.user, arrivals.time, "clicks")
    gap, error = (estimates - truth).mean(), (estimates - truth).std() / math.sqrt(len(estimates))
    assert abs(gap) < 4 * error
    assert truth.mean() > 1.5 * drifting.value_of(popular(drifting, 5), arrivals.user, arrivals.time, "clicks").mean()


def test_everything_made_from_it_says_simulated(made, shop_log, tmp_path):
    assert made.log.events["source"].unique().to_list() == ["simulated"]
    for table in (made.truth, made.summary()):
        assert table["source"].unique().to_list() == ["simulated"]
    assert made.totals()["source"] == "simulated"
    assert is_simulated(made.log)
    assert not is_simulated(shop_log)
    assert any(line.startswith("Simulated:") for line in check(made.log).sentences())
    assert not any("imulated" in line for line in check(shop_log).sentences())
    assert "imulated" not in build_dataset(shop_log).split.note
    dataset = build_dataset(made.log)
    dataset.save(tmp_path / "dataset")
    again = Dataset.load(tmp_path / "dataset")
    assert again.split.note.startswith("Simulated:")
    assert again.simulated
    assert not build_dataset(shop_log).simulated
    path = tmp_path / "log.parquet"
    made.log.events.drop("group_id").write_parquet(path)
    stored = ingest(path, tmp_path / "big")
    assert is_simulated(stored)
    assert build_dataset(stored).split.note == build_dataset(read(path)).split.note


def test_a_column_called_source_is_not_enough():
    rows = {"user_id": ["a", "a"], "item_id": ["x", "y"], "timestamp": [1_700_000_000, 1_700_000_100]}
    assert not is_simulated(read(pl.DataFrame({**rows, "source": ["mail", "ads"]})))
    assert not is_simulated(read(pl.DataFrame({**rows, "source": [1, 2]})))


def test_the_file_reads_back_as_the_same_log(made, tmp_path):
    path = tmp_path / "log.parquet"
    made.log.events.drop("group_id").write_parquet(path)
    again = read(path)
    assert again.roles == made.log.roles.__class__(
        **{
            name: getattr(made.log.roles, name) or None for name in again.roles.__dataclass_fields__ if name != "labels"
        },
        labels=("click",),
    )
    assert again.events.equals(made.log.events)


def test_choices_are_clicks_and_purchases_and_pages_are_impressions(made):
    dataset = build_dataset(made.log)
    counts = made.log.events["action"].value_counts()
    by_action = dict(counts.iter_rows())
    assert dataset.histories.num_events == by_action["click"] + by_action["purchase"]
    assert set(dataset.space.actions) == {"click", "purchase"}
    requests, rows, labels = dataset.impressions("test")
    assert (np.diff(rows.offsets.numpy()) == 5).all()
    assert labels["click"].sum() == len(requests.target)
    only = build_dataset(made.log, DataConfig(target_actions=("click",)))
    names = np.array(["", *only.space.actions])
    for r in range(len(only.split.test)):
        request = only.split.test
        asked = request.target[request.target_offsets[r] : request.target_offsets[r + 1]]
        at = np.flatnonzero(
            (only.histories.time == request.time[r]) & (only.histories.user_of_event == request.user[r])
        )
        chosen = only.histories.item[at][names[only.histories.action[at]] == "click"]
        assert set(asked.tolist()) <= set(chosen.tolist())


def test_a_cascade_trains_on_it_and_its_report_says_so(made, tmp_path):
    config = RunConfig.from_toml(COUNTED)
    run = train_cascade(build_dataset(made.log, config.data), config, tmp_path / "run", progress=False)
    told = evaluate_run(run)
    assert told.report.note.startswith("Simulated:")
    assert told.as_dict()["note"].startswith("Simulated:")
    assert run.metrics["split"]["note"].startswith("Simulated:")
    assert told.metrics["ndcg@4"].mean > 0.3


def test_the_same_seed_gives_the_same_log(drifting, arrivals, made, shop_log):
    policy = popular(drifting, 5, explore=0.3)
    again = simulate(drifting, policy, arrivals, seed=2, items=shop_log.items)
    assert again.log.events.equals(made.log.events)
    assert again.truth.equals(made.truth)
    assert not simulate(drifting, policy, arrivals, seed=3).truth["click"].equals(made.truth["click"])


def test_empty_places_are_not_logged(drifting, arrivals):
    made = simulate(drifting, popular(drifting, drifting.num_items + 3), arrivals, seed=0)
    assert made.truth.height == len(arrivals) * drifting.num_items
    assert made.truth["position"].max() == drifting.num_items


def test_what_leaves_nothing_to_log_is_refused(drifting, arrivals):
    nobody = Arrivals(time=np.zeros(0), user=np.zeros(0, dtype=np.int64), start=0.0, end=1.0)
    with pytest.raises(DataError, match="no request"):
        simulate(drifting, uniform(3), nobody, seed=0)
    empty = Policy(pages=lambda users, times: np.zeros((len(users), 3), dtype=np.int64), k=3)
    with pytest.raises(DataError, match="every page empty"):
        simulate(drifting, empty, arrivals, seed=0)
    unknown = Arrivals(time=np.ones(1), user=np.zeros(1, dtype=np.int64), start=0.0, end=1.0)
    with pytest.raises(DataError, match="names every user"):
        simulate(drifting, uniform(3), unknown, seed=0)
