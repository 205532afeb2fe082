from itertools import product

import numpy as np
import pytest
import torch

from shortlist.errors import ConfigError
from shortlist.models.retrieval.counts import Counts, CountsConfig


def matrix(view, **settings) -> np.ndarray:
    model = Counts(CountsConfig(**settings), view.space)
    model.prepare(view)
    dense = np.zeros((view.space.items.num_rows,) * 2)
    row = np.repeat(np.arange(len(dense)), np.diff(model.offsets.numpy()))
    np.add.at(dense, (row, model.columns.numpy()), model.weights.numpy())
    return dense


def brute_force(users, num_items, max_gap=3, directed=True, within_group=False, normalise="raw") -> np.ndarray:
    counts, occurs = np.zeros((num_items + 1,) * 2), np.zeros(num_items + 1)
    for baskets in users:
        # Groups without a known item are dropped like the unknown items themselves.
        groups = [g for g in ({i for i in items if i} for _, items in baskets) if g]
        for p, here in enumerate(groups):
            for a in here:
                occurs[a] += 1
            for q, there in enumerate(groups):
                gap = q - p
                if gap == 0 and within_group:
                    for a, b in product(here, there):
                        counts[a, b] += a != b
                elif (0 < gap <= max_gap) or (not directed and 0 < -gap <= max_gap):
                    for a, b in product(here, there):
                        counts[a, b] += 1 / abs(gap)
    with np.errstate(divide="ignore", invalid="ignore"):
        if normalise == "conditional":
            counts = np.where(occurs[:, None] > 0, counts / occurs[:, None], 0)
        if normalise == "cosine":
            counts = np.where(counts > 0, counts / np.sqrt(np.outer(occurs, occurs)), 0)
    return counts


def test_three_baskets_by_hand(make_view, make_batch):
    """1 2 | 3 | 1: from 1 and 2 to 3 at gap 1 and to 1 at gap 2, from 3 to 1 at gap 1."""
    view = make_view([[(1, [1, 2]), (2, [3]), (3, [1])]], 4)
    expected = np.zeros((5, 5))
    expected[1, 3] = expected[2, 3] = expected[3, 1] = 1
    expected[1, 1] = expected[2, 1] = 0.5
    np.testing.assert_allclose(matrix(view), expected)
    model = Counts(CountsConfig(), view.space)
    model.prepare(view)
    score = model.score_all(make_batch([[(5, [2]), (6, [4]), (7, [3, 3])]]))[0]
    # 3 is the newest group (weight 1), 4 the one before (knows nothing), 2 weighs 0.6 squared.
    assert score[1].item() == pytest.approx(1 + 0.36 * 0.5, rel=1e-3)
    assert score[3].item() == pytest.approx(0.36, rel=1e-3)
    assert score[2] < 0
    assert score[4] < 0


@pytest.mark.parametrize("max_gap", [1, 3])
@pytest.mark.parametrize("directed", [True, False])
@pytest.mark.parametrize("within_group", [True, False])
@pytest.mark.parametrize("normalise", ["raw", "conditional", "cosine"])
def test_matrix_is_the_brute_force_one(make_view, random_users, max_gap, directed, within_group, normalise):
    settings = {"max_gap": max_gap, "directed": directed, "within_group": within_group, "normalise": normalise}
    np.testing.assert_allclose(
        matrix(make_view(random_users, 20), **settings), brute_force(random_users, 20, **settings), atol=1e-6
    )


def test_score_is_the_brute_force_one(make_view, make_batch, random_users):
    view = make_view(random_users, 20)
    model = Counts(CountsConfig(num_groups=2, decay=0.5), view.space)
    model.prepare(view)
    counts = brute_force(random_users, 20)
    got = model.score_all(make_batch(random_users)).numpy()
    for user, baskets in enumerate(random_users):
        expected = np.zeros(21)
        for age, (_, items) in enumerate(reversed(baskets[-2:])):
            for item in {i for i in items if i}:
                expected += 0.5**age * counts[item]
        live = expected[1:] > 0
        np.testing.assert_allclose(got[user, 1:][live], expected[1:][live], rtol=2e-4)
        assert (got[user, 1:][~live] <= 0).all()


def test_pairs_never_cross_users(make_view):
    assert not matrix(make_view([[(1, [1])], [(2, [2])], [(3, [3])]], 3)).any()


def test_wrong_settings_are_refused():
    for wrong in ({"max_gap": 0}, {"decay": 0.0}, {"normalise": "l2"}):
        with pytest.raises(ConfigError, match="counts"):
            CountsConfig(**wrong)


def test_saved_weights_come_back(make_view, make_batch, random_users):
    from shortlist.models.base import load_weights

    view = make_view(random_users, 20)
    model, fresh = (Counts(CountsConfig(), view.space) for _ in range(2))
    model.prepare(view)
    load_weights(fresh, model.state_dict())
    batch = make_batch(random_users)
    assert torch.equal(model.score_all(batch), fresh.score_all(batch))
