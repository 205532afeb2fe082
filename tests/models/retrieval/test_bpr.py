import numpy as np
import pytest
import torch

from shortlist import extras
from shortlist.errors import ConfigError
from shortlist.models.retrieval.bpr import BPR, BPRConfig


def prepared(make_view, users, num_items=20, **settings) -> BPR:
    view = make_view(users, num_items)
    model = BPR(BPRConfig(**{"num_factors": 6, "iterations": 20, **settings}), view.space)
    model.prepare(view)
    return model.eval()


@pytest.mark.parametrize("decay", [1.0, 0.7])
@torch.no_grad()
def test_the_map_is_the_ridge_regression_on_the_librarys_users(make_view, make_batch, random_users, decay):
    """Users' vectors of a second model with the same seed, and means by loops; then least squares by numpy."""
    from shortlist.layers.factors import choices, learn_factors

    model = prepared(make_view, random_users, decay=decay, ridge=0.3, seed=2)
    from implicit.cpu.bpr import BayesianPersonalizedRanking

    chosen = choices(make_view(random_users, 20), np.ones_like, "test")
    learned = learn_factors(
        lambda: BayesianPersonalizedRanking(6, 0.05, 0.01, iterations=20, num_threads=1, random_state=2),
        chosen.matrix,
        num_threads=1,
    )
    means = []
    for baskets in random_users:
        newest = {}
        for age, (_, items) in enumerate(reversed(baskets)):
            for item in set(items) - {0}:
                newest.setdefault(item, decay**age)
        weights = np.array(list(newest.values()))
        past = model.item_Nd.numpy()[list(newest), :-1]
        means.append([1.0, *(weights @ past / weights.sum())] if newest else [0.0] * 7)
    known = np.array([bool(m[0]) for m in means])
    x = np.array(means)[known]
    left = np.vstack([x, np.sqrt(0.3 * len(x)) * np.eye(7)])
    right = np.vstack([learned.users, np.zeros((7, 7))])
    expected = np.array(means) @ np.linalg.lstsq(left, right, rcond=None)[0]
    got = model.encode_user(make_batch(random_users)).numpy()[:, :-1]
    np.testing.assert_allclose(got, expected, atol=2e-4)


@torch.no_grad()
def test_two_tastes_are_told_apart_for_people_it_never_saw(make_view, make_batch):
    draw = np.random.default_rng(0)

    def drawn(count):
        return [[(1, (5 * (u % 2) + 1 + draw.permutation(5)[:3]).tolist())] for u in range(count)]

    model = prepared(make_view, drawn(200), 10, iterations=60)
    strangers = drawn(40)
    best = model.retrieve(make_batch(strangers, exclude_history=True), 2).rows.numpy()
    own = [(row - 1) // 5 == user % 2 for user, row in enumerate(best)]
    assert np.mean(own) > 0.9


@torch.no_grad()
def test_items_nobody_chose_do_not_profit_from_their_random_start(make_view, make_batch, random_users):
    model = prepared(make_view, random_users, 40)
    never = torch.arange(21, 41)
    assert not model.item_Nd[never, :-1].any()
    assert (model.item_Nd[never, -1] == model.item_Nd[:, -1].min()).all()


@torch.no_grad()
def test_without_history_the_popular_come_first(make_view, make_batch):
    users = [[(90, [3, 1])], [(91, [3])], [(92, [3, 2, 1])]]
    model = prepared(make_view, users, 5)
    assert model.retrieve(make_batch([[], [(95, [0])]]), 3).rows.tolist() == [[3, 1, 2], [3, 1, 2]]


def test_same_seed_same_factors_another_seed_not(make_view, random_users):
    a, b, c = (prepared(make_view, random_users, seed=seed).item_Nd for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_a_missing_library_and_bad_settings_are_refused(make_view, random_users, monkeypatch):
    with pytest.raises(ConfigError, match="decay above 0"):
        BPRConfig(decay=0.0)

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(extras, "import_module", missing)
    with pytest.raises(ConfigError, match=r"bpr needs the library 'implicit'.*shortlist\[baselines\]"):
        prepared(make_view, random_users)
