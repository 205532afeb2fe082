import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from shortlist.data.batches import Batch
from shortlist.data.histories import View
from shortlist.data.jagged import Jagged
from shortlist.data.samplers import UniformSampler
from shortlist.data.schema import Categorical, FieldTable
from shortlist.errors import ConfigError
from shortlist.layers.losses import in_batch_softmax_loss
from shortlist.models.retrieval.two_tower import TwoTower, TwoTowerConfig

SMALL = {"dim": 16, "widths": (32,), "num_uniform": 32, "dropout": 0.0}
NUM_ITEMS, NUM_CLUSTERS = 40, 4  # items 1..36 occur in the log, 37..40 are new; cluster of item i is i % 4


@pytest.fixture
def planted(make_view) -> tuple[View, list]:
    """80 users who choose from one cluster of 9 items each, some items far more popular than others; the field tells the cluster."""
    random = np.random.default_rng(0)
    users = []
    for user in range(80):
        own = np.arange(1, 37)[np.arange(1, 37) % NUM_CLUSTERS == user % NUM_CLUSTERS]
        chance = 1.0 / np.arange(1, 10)
        users.append([(day, [int(random.choice(own, p=chance / chance.sum()))]) for day in range(8)])
    field = Categorical(name="cluster", size=NUM_CLUSTERS)
    column = torch.arange(NUM_ITEMS + 1) % NUM_CLUSTERS + 1
    column[0] = 0
    return make_view(users, NUM_ITEMS, items=FieldTable(NUM_ITEMS + 1, (field,), {"cluster": column})), users


def trained(view: View, users: list, make_batch, steps: int = 60, **settings) -> TwoTower:
    torch.manual_seed(0)
    model = TwoTower(TwoTowerConfig(**{**SMALL, **settings}), view.space)
    model.prepare(view)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    random = np.random.default_rng(1)
    model.train()
    for _ in range(steps):
        cut = random.integers(0, 8, len(users))
        batch = make_batch([user[:c] for user, c in zip(users, cut)])
        batch = batch.with_candidates(Jagged.from_rows([user[c][1] for user, c in zip(users, cut)]))
        loss = model.losses(batch)["retrieval"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


@pytest.mark.parametrize("frequency", ["counts", "streaming"])
def test_recovers_planted_clusters_and_new_items(planted, make_batch, frequency):
    view, users = planted
    model = trained(view, users, make_batch, frequency=frequency)
    batch = make_batch(users)
    found = model.retrieve(batch, 10).rows  # ten items share a cluster: nine known ones and a new one
    hits = (found % NUM_CLUSTERS == (torch.arange(80) % NUM_CLUSTERS)[:, None]).float().mean().item()
    assert hits > 0.9, f"{hits:.2f} of the retrieved items are of the user's cluster; popularity reaches 0.25"
    new = batch.with_candidates(Jagged.from_rows([[37, 38, 39, 40]] * 80))
    best = 37 + model.score(new)["score"].view(80, 4).argmax(1)
    right = (best % NUM_CLUSTERS == torch.arange(80) % NUM_CLUSTERS).float().mean().item()
    assert right > 0.9, f"the new item of the user's cluster came first for {right:.2f} of the users; chance is 0.25"


def test_correction_lifts_rare_items(planted, make_batch, monkeypatch):
    """Uncorrected, popular items are pushed down as negatives; corrected scores follow how often items are chosen."""
    view, users = planted
    counts = torch.bincount(torch.from_numpy(view.histories.item), minlength=NUM_ITEMS + 1).float()
    own = torch.arange(4, 37, 4)

    def agreement(model: TwoTower) -> float:
        with torch.no_grad():
            score = (model.encode_user(make_batch(users[0::4])) @ model.item_matrix()[own].T).mean(0)
        return float(np.corrcoef(score.numpy(), counts[own].log().numpy())[0, 1])

    with_correction = agreement(trained(view, users, make_batch, num_uniform=0))
    monkeypatch.setattr(TwoTower, "_log_expected", lambda self, pool, targets, uniform: torch.zeros(len(pool)))
    without = agreement(trained(view, users, make_batch, num_uniform=0))
    assert with_correction > 0.6
    assert with_correction > without + 0.2


def batch_of(make_batch) -> Batch:
    batch = make_batch([[(1, [1, 2]), (3, [2, 0])], [], [(2, [5])]])
    return batch.with_candidates(Jagged.from_rows([[3, 4], [6], [3]]))


def test_user_vector_by_hand(planted, make_batch):
    """Two groups {1, 2} and {2, unknown}: mean (1 + 2 + 2) / 3, decayed (0.7 * 1 + 0.7 * 2 + 2) / 2.4; nothing for the unknown."""
    view, _ = planted
    torch.manual_seed(0)
    model = TwoTower(TwoTowerConfig(**SMALL), view.space).eval()
    one, two = model.items(torch.tensor([1, 2]))
    past = torch.cat([(one + 2 * two) / 3, (0.7 * one + 1.7 * two) / 2.4])
    expected = model.user_tower(past)
    vector = model.encode_user(batch_of(make_batch))
    torch.testing.assert_close(vector[0], expected / expected.norm())
    nothing = model.user_tower(torch.zeros(32))
    torch.testing.assert_close(vector[1], nothing / nothing.norm())


def test_loss_is_the_corrected_softmax_over_the_pool(planted, make_batch, monkeypatch):
    view, _ = planted
    torch.manual_seed(0)
    model = TwoTower(TwoTowerConfig(**{**SMALL, "num_uniform": 3, "id_dropout": 0.0}), view.space)
    model.prepare(view)
    drawn = torch.tensor([7, 3, 9])
    monkeypatch.setattr(UniformSampler, "draw", lambda self, shape, generator=None: drawn)
    batch = batch_of(make_batch)
    pool = torch.tensor([3, 4, 6, 3, 7, 3, 9])
    counts = torch.bincount(torch.from_numpy(view.histories.item), minlength=NUM_ITEMS + 1).double() + 1
    expected_number = 4 * counts[pool] / counts[1:].sum() + 3 / 36
    query, vectors = model.encode_user(batch).double(), model.encode_items(pool).double()
    logits = (query @ vectors.T / 0.05 - expected_number.log()).detach().numpy()
    losses = []
    for target, row, weight in ((0, 0, 0.5), (1, 0, 0.5), (2, 1, 1.0), (3, 2, 1.0)):
        own = {0: {3, 4}, 1: {6}, 2: {3}}[row]
        rest = sum(math.exp(logits[row, m]) for m in range(7) if int(pool[m]) not in own)
        losses.append(-weight * math.log(math.exp(logits[row, target]) / (math.exp(logits[row, target]) + rest)))
    assert model.losses(batch)["retrieval"].item() == pytest.approx(sum(losses) / 3, rel=1e-4)


def test_order_inside_baskets_means_nothing(planted, make_batch, random_users, shuffled_in_baskets):
    model = TwoTower(TwoTowerConfig(**SMALL), planted[0].space).eval()
    torch.testing.assert_close(
        model.encode_user(make_batch(random_users)), model.encode_user(make_batch(shuffled_in_baskets))
    )


def test_streaming_state_only_moves_in_training(planted, make_batch):
    model = TwoTower(TwoTowerConfig(**SMALL, frequency="streaming"), planted[0].space)
    batch = batch_of(make_batch)
    model.losses(batch)
    assert int(model.step) == 1
    assert model.last_step_N[[3, 4, 6]].tolist() == [1, 1, 1]
    model.eval().losses(batch)
    assert int(model.step) == 1


def test_targets_weigh_as_the_batch_says(planted, make_batch):
    torch.manual_seed(0)
    model = TwoTower(TwoTowerConfig(**{**SMALL, "num_uniform": 0, "id_dropout": 0.0}), planted[0].space)
    model.prepare(planted[0])
    batch = batch_of(make_batch)
    weighed = replace(batch, weight=torch.tensor([0.0, 0.0, 1.0, 0.0]))
    query, pool = model.encode_user(batch) / 0.05, batch.candidate_rows.values
    share = model._log_expected(pool, pool, UniformSampler.of_mask(model.items.known_items))
    alone = in_batch_softmax_loss(query, model.encode_items(pool), pool, batch.candidate_rows, share, weighed.weight)
    torch.testing.assert_close(model.losses(weighed)["retrieval"], alone)
    assert not torch.isclose(model.losses(weighed)["retrieval"], model.losses(batch)["retrieval"])


def test_wrong_settings_are_refused():
    for wrong in ({"dim": 0}, {"temperature": 0.0}, {"decay": 2.0}, {"id_dropout": 1.0}, {"frequency": "hash"}):
        with pytest.raises(ConfigError, match="two-tower"):
            TwoTowerConfig(**wrong)
