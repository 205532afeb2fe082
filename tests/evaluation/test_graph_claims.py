"""What the claims of graph rankers stand on: windows that do not overlap, pairs known to be unseen, a log of few clicks, user fields."""

import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "evidence"))

import _pair_rates as rates
import _ranking_lab as lab
import _sparse_clicks as sparse
from shortlist.evaluation.evidence import Arm
from shortlist.metrics import Interval, auc


class Quick:
    quick = True


def events_of(windows):
    h = windows.world.view.histories
    return set(zip(h.user_of_event.tolist(), h.item.tolist()))


def rows_of(examples):
    user = examples.requests.user[examples.rows.row_of_value.numpy()]
    return list(zip(user.tolist(), examples.rows.values.tolist()))


def test_planted_windows_follow_each_other():
    windows = rates.planted(60, 40, 2_000)
    world, h = windows.world, windows.world.view.histories
    assert h.num_events == 2_000
    assert h.time.max() == 1_999
    assert all((np.diff(h.time[a:b]) > 0).all() for a, b in zip(h.offsets[:-1], h.offsets[1:]))
    spans = [(e.requests.time.min(), e.requests.time.max()) for e in (world.train, world.valid, world.test)]
    assert spans == [(2_000, 3_799), (3_800, 3_999), (4_000, 5_999)]
    assert len(windows.whole.requests) == 3_800
    # The same rows as events and as examples: the control sees what the statistics are made of.
    counted = dict(zip(h.time.tolist(), zip(h.user_of_event.tolist(), h.item.tolist(), (h.action == 1).tolist())))
    first = zip(rows_of(windows.whole)[:2_000], windows.whole.label[:2_000].tolist())
    assert [counted[t] for t in range(2_000)] == [(*pair, bool(label)) for pair, label in first]
    assert auc(world.test.label, windows.oracle) > 0.75


@pytest.mark.parametrize("kind", ["planted", "films"])
def test_seen_pairs_by_brute_force(kind):
    windows = rates.planted(60, 40, 2_000) if kind == "planted" else rates.film_windows(Quick(), 0)
    met = events_of(windows)
    seen = rates.seen_in_history(windows)
    assert seen.shape == (len(windows.world.test.label), len(windows.pairs))
    assert seen[:, 0].tolist() == [pair in met for pair in rows_of(windows.world.test)]
    if kind == "films":
        age = windows.world.users.columns["age"].numpy()
        met_age = {(age[u], i) for u, i in met}
        assert seen[:, 1].tolist() == [(age[u], i) in met_age for u, i in rows_of(windows.world.test)]


def test_film_windows_train_after_the_history_of_each_user():
    windows = rates.film_windows(Quick(), 0)
    h, train = windows.world.view.histories, windows.world.train.requests
    newest = {u: h.time[h.offsets[u] : h.offsets[u + 1]].max() for u in set(train.user.tolist())}
    assert len(train) > 0
    assert all(time > newest[user] for user, time in zip(train.user.tolist(), train.time.tolist()))
    assert len(windows.whole.requests) > len(train)
    lengths = np.diff(h.offsets)[1:]
    assert (lengths == 20).all()  # half of the 40 films that everybody has


def test_p_alone_is_nothing_on_unseen_pairs_of_a_table():
    windows = rates.planted(60, 40, 2_000)
    seen = rates.seen_in_history(windows)
    found = rates.measured_alone(windows, seen, 0, (0.0,), statistic="table")
    assert found["item*user, unseen"] == 0.5
    assert found["item*user, seen"] > 0.55
    network = rates.measured_alone(windows, seen, 0, num_layers=0, epochs=2)
    assert network["cost:l2"] in rates.L2


def test_user_fields_follow_the_users():
    world = lab.films(None, user_fields=("age",))
    ids = np.unique(lab.planted_films()[0]["user_id"].to_numpy())
    age = world.users.columns["age"]
    assert age.tolist() == [0, *(1 + ids % 5).tolist()]  # codes of 0..4 in order
    assert world.view.users is world.users
    assert [f.name for f in world.space.user_fields] == ["age"]
    assert not lab.films(None).space.user_fields


def test_people_of_few_clicks_stay_near():
    events, items = sparse.few_clicks(400, 20, 10)
    per_user = events.group_by("user_id", maintain_order=True).agg(pl.len(), pl.col("time"))
    assert per_user["len"].min() == 3
    assert per_user["len"].max() == 10
    assert all((np.diff(times) > 0).all() for times in per_user["time"].to_list())
    assert len(items) == 200
    # Which items stand next to each other: far fewer kinds of pairs than chance would give.
    item, user = events["item_id"].to_numpy(), events["user_id"].to_numpy()
    near = user[1:] == user[:-1]
    pairs = np.unique(np.sort(np.stack([item[1:][near], item[:-1][near]]), 0), axis=1).shape[1]
    shuffled = np.random.default_rng(0).permutation(item)
    by_chance = np.unique(np.sort(np.stack([shuffled[1:][near], shuffled[:-1][near]]), 0), axis=1).shape[1]
    assert pairs < 0.8 * by_chance


def arm_of(name, values):
    metrics = {metric: Interval(np.mean(v), min(v), max(v)) for metric, v in values.items()}
    return Arm(name=name, metrics=metrics, seeds=(0, 1, 2), per_seed=values)


def test_a_lead_must_be_far_enough_and_hold_with_every_seed():
    def arms(gin):
        values = dict.fromkeys(sparse.ARMS, (0.8, 0.8, 0.8)) | {"GIN": gin}
        return {f"log: {n}": arm_of(n, {"auc": v, "auc, last 2": v}) for n, v in values.items()}

    assert sparse.clears(arms((0.804, 0.803, 0.803)), "log")
    assert not sparse.clears(arms((0.802, 0.802, 0.802)), "log")
    assert not sparse.clears(arms((0.82, 0.82, 0.79)), "log")
    lead = sparse.leads(arms((0.81, 0.8, 0.8)), "log", "auc")
    torch.testing.assert_close(torch.from_numpy(lead["DIN"]), torch.tensor([0.01, 0, 0], dtype=torch.float64))
    assert "+0.0033" in sparse.shown(arms((0.81, 0.8, 0.8)), "log")
