"""The harness of tabular click logs: codes, the leaderboards' training rule, rules that learn nothing, planted logs."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "evidence"))

import _ctr as ctr
import _planted_fields as planted
from shortlist.layers.field_matrix import FieldsConfig
from shortlist.layers.scoring import HeadConfig
from shortlist.metrics import auc

FIELDS = FieldsConfig(dim=4, use_history=False, max_history=1)
HEAD = HeadConfig(widths=(8,), activation="relu", dropout=0.0, id_dropout=0.0, use_user_ids=True, loss="bce")
DEEP = {"fields": FIELDS, "head": HEAD}


@pytest.fixture(scope="module")
def world():
    return ctr.world_of(ctr.planted_table(num_rows=1_500))


def test_values_that_training_lacks_are_unknown_and_rare_ones_too():
    train = pl.DataFrame(
        {"label": [1, 0, 1], "user": [7, 7, 9], "item": [3, 5, 3], "hour": [1, 1, 2], "price": [1.0, 3.0, 5.0]}
    )
    test = pl.DataFrame({"label": [1], "user": [8], "item": [5], "hour": [2], "price": [3.0]})
    table = ctr.Table(train=train, valid=train, test=test, numeric=("price",), min_count=2)
    made = ctr.world_of(table)
    assert made.train.requests.user.tolist() == [1, 1, 0]
    assert made.train.rows.values.tolist() == [1, 0, 1]
    assert made.train.requests.context["hour"].tolist() == [1, 1, 0]
    assert (made.test.requests.user[0], made.test.rows.values[0], made.test.requests.context["hour"][0]) == (0, 0, 0)
    torch.testing.assert_close(torch.tensor(made.train.requests.context["price"]), torch.tensor([-1.0, 0.0, 1.0]))
    assert made.space.num_users == made.space.num_items == 1
    assert ctr.batch_of(made, made.train, np.array([2])).labels["target"].tolist() == [1.0]


def test_decay_reaches_rows_that_no_batch_reads(world):
    torch.manual_seed(0)
    system = ctr.find("deepfm").cls(ctr.find("deepfm").config(DEEP), world.space)
    batch = ctr.batch_of(world, world.train, np.arange(2))
    loss = system.losses(batch)["target"] + 0.05 / 2 * ctr.squares_of_tables(system)
    loss.backward()
    table = system.fields.matrix.item_ids.rows.weight
    unread = torch.ones(len(table), dtype=torch.bool)
    unread[batch.candidate_rows.values] = False
    torch.testing.assert_close(table.grad[unread], 0.05 * table[unread].detach())


def test_the_start_is_small_but_keeps_what_begins_at_zero(world):
    from shortlist.layers.gates import GateConfig

    system = ctr.find("can").cls(
        ctr.find("can").config(
            {**DEEP, "pairs": ("item*user",), "head": replace(HEAD, gates=GateConfig(lhuc="user", ppnet=("item",)))}
        ),
        world.space,
    )
    before = system.co_action.induction["item"].rows.weight.clone()
    ctr.start_small(system, 1e-4)
    assert system.fields.matrix.item_ids.rows.weight.abs().max() < 1e-3
    assert torch.equal(system.co_action.induction["item"].rows.weight, before)
    assert not system.deep.tower.gates.ppnet.gates[0].last.weight.any()
    assert not system.deep.tower.priors.groups["lhuc"].user_ids.rows.weight.any()
    assert ctr.num_parameters(system, dense=True) < ctr.num_parameters(system)


def test_training_ends_at_its_best_epoch_and_lowers_the_rate(world, monkeypatch):
    """Validation is made to fail from the third epoch on: two failures end it, each with a tenth of the rate."""
    true_quality, rates, calls = ctr.quality, [], []
    monkeypatch.setattr(
        ctr, "build_optimisers", lambda *a, made=ctr.build_optimisers: rates.append(made(*a)) or rates[-1]
    )

    def quality(system, world, examples):
        calls.append({n: p.clone() for n, p in system.state_dict().items()})
        return {"auc": [0.6, 0.7, 0.65, 0.65][len(calls) - 1], "logloss": 0.5}

    monkeypatch.setattr(ctr, "quality", quality)
    recipe = ctr.Recipe(batch_size=256, table_l2=0.0, lr=1e-2, init_std=None)
    system, course = ctr.trained("deepfm", DEEP, world, recipe, seed=0)
    assert (course.epochs, course.best_epoch) == (4, 2)
    assert course.best_score == pytest.approx(0.2)
    assert rates[0][0].param_groups[0]["lr"] == pytest.approx(1e-4)
    assert all(torch.equal(value, calls[1][name]) for name, value in system.state_dict().items())
    assert true_quality(system, world, world.valid)["auc"] > 0.5


def test_crosses_learn_their_dictionary_before_the_steps(world):
    recipe = ctr.Recipe(batch_size=256, table_l2=0.0, lr=1e-2, init_std=None, epochs=1)
    settings = {**DEEP, "pairs": (), "crosses": ("item*user",), "cross_rows": 5_000, "cross_dim": 2}
    system, _ = ctr.trained("can", settings, world, recipe, seed=0)
    pairs = set(zip(world.train.rows.values.tolist(), world.train.requests.user.tolist()))
    assert len(system.crosses.keys_K) == len(pairs)


def test_rules_against_loops(world):
    scores = ctr.trivial_scores(world)
    train, test = world.train, world.test
    positive = [
        (i, u, c)
        for i, u, c, y in zip(
            train.rows.values.tolist(), train.requests.user, train.requests.context["cost"], train.label
        )
        if y > 0
    ]
    popularity = {i: sum(j == i for j, _, _ in positive) for i in {j for j, _, _ in positive}}
    used = {(i, u) for i, u, _ in positive}
    top = max(popularity.values())
    for r in range(0, len(test.label), 7):
        item, user = int(test.rows.values[r]), int(test.requests.user[r])
        assert scores["popularity"][r] == popularity.get(item, 0)
        assert scores["used before"][r] == ((item, user) in used)
        both = ((item, user) in used) + popularity.get(item, 0) / (top + 1)
        assert scores["used before, then popularity"][r] == pytest.approx(both)
        # In the planted log an item has one cost, and no row contradicts it.
        assert scores["used before, popularity, cost"][r] == pytest.approx(both)


def test_a_cost_that_is_not_the_item_s_goes_last(world):
    cost = world.test.requests.context["cost"].copy()
    cost[:5] = cost[:5] % 3 + 1
    requests = replace(world.test.requests, context={**world.test.requests.context, "cost": cost})
    changed = replace(world, test=replace(world.test, requests=requests))
    scores = ctr.trivial_scores(changed)["used before, popularity, cost"]
    known = ctr.trivial_scores(world)["popularity"][:5] > 0
    assert (scores[:5][known] < 0).all()
    assert (scores[5:] >= 0).all()


def test_hard_rows_know_neither_the_pair_nor_the_popularity(world):
    row, weight = ctr.hard_rows(world)
    scores = ctr.trivial_scores(world)
    assert not scores["used before"][row].any()
    label, bins = world.test.label.numpy()[row], np.log2(1 + scores["popularity"].numpy()[row]).astype(int)
    for each in np.unique(bins):
        inside = bins == each
        assert weight[inside & (label > 0)].sum() == pytest.approx(weight[inside & (label == 0)].sum())
    in_bin = torch.zeros(len(world.test.label))
    in_bin[torch.from_numpy(row)] = torch.from_numpy(bins).float()
    assert ctr.hard_auc(in_bin, world, (row, weight)) == pytest.approx(0.5)


def test_planted_logs_have_the_oracle_that_they_state():
    log = planted.cells(20, 6_000)
    assert log.is_seen.mean() == pytest.approx(0.8, abs=0.1)
    trained = set(zip(log.table.train["user"], log.table.train["item"]))
    test = log.table.test
    met = np.array([pair in trained for pair in zip(test["user"], test["item"])])
    assert not (met & ~log.is_seen).any()
    assert 0.9 < log.oracle["seen"] < 1
    pairs = planted.field_pairs_log(6, 10, 2, 4_000)
    assert pairs.oracle > 0.8
    of_one_field = [auc(pairs.table.test["label"].to_numpy(), pairs.table.test[f"f{f}"].to_numpy()) for f in range(6)]
    assert max(abs(a - 0.5) for a in of_one_field) < 0.2
