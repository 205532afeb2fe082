"""What the claims about gates compute beside training: equal sizes, spreads over users, domains, halves of users by activity."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "evidence"))

import _gates as gates
import _ranking_lab as ranking_lab
import epnet_domains
import ppnet_personal
from _ctr import num_parameters
from shortlist.data.jagged import Jagged
from shortlist.layers.gates import LHUC, GateConfig
from shortlist.metrics import gauc

GATED = {"use_user_ids": True, "dim": 4, "widths": (8, 4), "loss": "bce", "gates": GateConfig(lhuc="user")}
PLAIN = {**GATED, "gates": GateConfig()}


@pytest.fixture(scope="module")
def world():
    return ranking_lab.films(None)


def test_the_plain_network_is_the_smallest_that_is_as_large(world):
    wanted = num_parameters(gates.built(GATED, world))
    settings = gates.as_large(PLAIN, GATED, world)
    wide, narrow = settings["widths"]
    assert wide == 2 * narrow
    assert num_parameters(gates.built(settings, world)) >= wanted
    smaller = {**settings, "widths": (wide - 2, narrow - 1)}
    assert num_parameters(gates.built(smaller, world)) < wanted


def test_spread_is_that_of_users_means(world):
    """Two units, users 3, 3, 8: means (1, 0) and (3, 0) of the first unit spread by sqrt(2), of the second by nothing."""
    examples = replace(
        world.test,
        requests=world.test.requests.select(np.arange(2)),
        rows=Jagged.from_rows([[1, 2], [5]]),
        label=torch.zeros(3),
    )
    examples = replace(examples, requests=replace(examples.requests, user=np.array([3, 8])))
    gate_tW = torch.tensor([[0.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    assert gates.spread_over_users(gate_tW, examples) == pytest.approx(2**0.5 / 2)


def test_gates_are_seen_row_by_row(world):
    system = gates.built(GATED, world).eval()
    with gates.watched(system, LHUC) as seen:
        ranking_lab.scores(system, world, world.test)
    assert seen().shape == (len(world.test.label), 12)
    assert torch.equal(seen(), torch.ones_like(seen()))  # the start is the identity
    assert gates.spread_over_users(seen(), world.test) == 0.0
    with pytest.raises(AssertionError, match="LHUC"), gates.watched(gates.built(PLAIN, world), LHUC):
        pass


def test_domains_are_first_genres_and_rare_ones_share_one(world):
    """Every genre is in a domain of its own or in domain 1, which holds all those below the share and none above."""
    share = 0.05
    made = epnet_domains.with_domains(world, share)
    listed, domain_N = world.space.items.columns["attributes"], made.space.items.columns["domain"]
    assert made.space.items.fields[0].size == int(domain_N.max())
    assert domain_N[0] == 0
    genre_N = torch.cat([torch.zeros(1, dtype=torch.int64), listed.values])  # planted films have one genre each
    rows = world.train.rows.values
    for genre in genre_N[1:].unique().tolist():
        (domain,) = domain_N[genre_N == genre].unique().tolist()
        of_genre = float((genre_N[rows] == genre).float().mean())
        assert (domain == 1) is (of_genre < share)
        if domain > 1:
            assert set(genre_N[domain_N == domain].tolist()) == {genre}


def test_auc_by_domain_is_the_mean_inside_domains(world):
    """A score that is the label gives 1 inside every domain; one number per domain gives a half, however well it tells domains apart."""
    made = epnet_domains.with_domains(world, 0.05)
    found = epnet_domains.by_domain(made.test.label, made)
    assert found["auc_small"] == found["auc_large"] == 1.0
    domain_N = made.space.items.columns["domain"]
    found = epnet_domains.by_domain(domain_N[made.test.rows.values].float(), made)
    assert found["auc_small"] == found["auc_large"] == 0.5


def test_halves_of_users_by_training_rows(world):
    """With a score that is right for active users alone, the active half has 1 and the other 0."""
    user_t = world.test.user_of_row
    users = np.unique(user_t)
    few = users[: len(users) // 2]  # planted users have as many rows: equals keep their order
    score = torch.where(torch.from_numpy(np.isin(user_t, few)), -world.test.label, world.test.label)
    found = ppnet_personal.by_activity(score, world)
    assert found == {"gauc_few": 0.0, "gauc_many": 1.0}
    assert 0 < gauc(world.test.label, score, user_t) < 1
