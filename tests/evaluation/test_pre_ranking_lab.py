"""What the claims about pre-ranking rest on: the planted log, the vector product, measured costs, one choice rule for all gates."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "evidence"))

import _ctr as ctr
import _planted_fields as planted
import _pre_ranking as lab
import _ranking_lab as ranking
import fscd_cascade
from shortlist.layers.field_matrix import FieldsConfig
from shortlist.layers.selection import ChoiceConfig
from shortlist.training.config import TrainerConfig

PLAN = lab.Plan(trainer=TrainerConfig(epochs=1, batch_size=256, lr=1e-2, patience=1), select_epochs=1)


@pytest.fixture(scope="module")
def log():
    made = planted.priced_log(2_000, num_signals=2, num_noise=2, num_values=5)
    work = {f"context.{name}": cost for name, cost in made.cost.items()}
    return lab.Log(ctr.world_of(made.table), lab.names_of(made.table), work, dim=4)


def test_dear_copies_hold_what_the_cheap_ones_hold_and_noise_does_not():
    made = planted.priced_log(4_000, num_signals=3, num_noise=4, num_values=5)
    rows = made.table.train
    for s in range(3):
        assert rows[f"cheap{s}"].equals(rows[f"dear{s}"].alias(f"cheap{s}"))
    assert [made.cost[f"{kind}_noise{n}"] for n, kind in enumerate(["cheap", "cheap", "dear", "dear"])] == [
        0.5,
        0.5,
        3,
        3,
    ]

    def spread(column):
        return float(rows.group_by(column).agg(ctr.pl.col("label").mean())["label"].std())

    assert spread("cheap0") > 3 * max(spread(f"cheap_noise{n}") for n in (0, 1))
    assert 0.7 < made.oracle < 0.95


def test_arms_of_chosen_fields_report_what_they_read(log):
    system, weight = lab.best_by_weight(log, PLAN, 0, ChoiceConfig(epochs=1, keep=2), cost_aware=True)
    assert weight in lab.WEIGHTS
    found = lab.told(system, log)
    assert found["fields"] == 2
    assert found["cost"] == sum(log.work[name] for name in system.body.fields.names)
    assert found["table_bytes"] == 4 * 4 * 2 * 6
    few = lab.over(log, system.body.fields.names)
    assert lab.pre_ranker(few, PLAN, 0, choice=ChoiceConfig(epochs=0)).body.fields.names == few.names
    every = lab.pre_ranker(log, PLAN, 0, choice=ChoiceConfig(epochs=0))
    assert lab.told(every, log)["cost"] == sum(log.work.values())
    assert set(lab.microseconds(log.world, log.names, 4)) == set(log.names)


def test_vector_product_is_a_product_and_keeps_its_items():
    world = ranking.films(None)
    config = lab.VectorProductConfig(fields=FieldsConfig(dim=4, max_history=10), head=lab.HEAD, match=False, out=6)
    system = lab.seeded(lab.VectorProduct, config, world.space, 0).eval()
    batch = world.test.batch(world, ctr.np.arange(5), 10)
    with torch.no_grad():
        plain = system.score(batch)["target"]
        user, row_t = system.user_state(batch).user_Bd, batch.candidate_rows.row_of_value
        own = system.item_tower(system.fields.matrix.candidate(batch.candidate_rows.values).flatten(1))
        torch.testing.assert_close(plain, (user[row_t] * own).sum(1))
        system.cache()
        torch.testing.assert_close(system.score(batch)["target"], plain)


def test_a_log_without_items_gives_the_item_s_tower_its_share_of_the_request(log):
    side = log.names[::2]
    config = lab.VectorProductConfig(
        fields=FieldsConfig(dim=4, names=log.names, use_history=False, max_history=1),
        head=lab.HEAD,
        match=False,
        item_side=side,
    )
    system = lab.seeded(lab.VectorProduct, config, log.world.space, 0).eval()
    assert system.user_tower.in_width == system.item_tower.in_width == 4 * len(side)
    batch = lab.thousand(log.world)
    name = side[0].removeprefix("context.")
    other = replace(batch, context={**batch.context, name: torch.zeros_like(batch.context[name])})
    assert torch.equal(system.user_state(other).user_Bd, system.user_state(batch).user_Bd)
    assert not torch.equal(system.score(other)["target"], system.score(batch)["target"])


def test_few_requests_score_as_they_do_among_all():
    world = ranking.films(None)
    batch = world.test.batch(world, ctr.np.arange(6), 10)
    config = lab.VectorProductConfig(fields=FieldsConfig(dim=4, max_history=10), head=lab.HEAD, match=False)
    system = lab.seeded(lab.VectorProduct, config, world.space, 0).eval()
    index = torch.tensor([1, 4])
    with torch.no_grad():
        whole = batch.candidate_rows.with_values(system.score(batch)["target"]).select(index).values
        torch.testing.assert_close(system.score(fscd_cascade.few(batch, index))["target"], whole)
