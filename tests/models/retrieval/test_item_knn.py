import math

import numpy as np
import pytest

from shortlist.errors import ConfigError
from shortlist.models.retrieval.item_knn import ItemKNN, ItemKNNConfig


def matrix(view, **settings) -> np.ndarray:
    model = ItemKNN(ItemKNNConfig(**settings), view.space)
    model.prepare(view)
    dense = np.zeros((view.space.items.num_rows,) * 2)
    row = np.repeat(np.arange(len(dense)), np.diff(model.offsets.numpy()))
    dense[row, model.columns.numpy()] = model.weights.numpy()
    return dense


def counts_of(users, num_items) -> np.ndarray:
    """[users, n + 1]: in how many baskets a user chose an item."""
    counts = np.zeros((len(users), num_items + 1))
    for user, baskets in enumerate(users):
        for _, items in baskets:
            for item in {i for i in items if i}:
                counts[user, item] += 1
    return counts


def brute_force(users, num_items, weighting, shrinkage) -> np.ndarray:
    counts = counts_of(users, num_items)
    live = counts.sum(1) > 0
    rarity = np.log((1 + live.sum()) / (1 + (counts > 0).sum(0)))
    total = counts.sum(1, keepdims=True)
    if weighting == "cosine":
        x = (counts > 0).astype(float)
    elif weighting == "tf-idf":
        x = np.sqrt(counts) * rarity
    else:
        x = rarity * counts * 2.2 / (counts + 1.2 * (0.25 + 0.75 * total / total[live].mean()))
    length = np.linalg.norm(x, axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(x.T @ x / (np.outer(length, length) + shrinkage))


@pytest.mark.parametrize("weighting", ["cosine", "tf-idf", "bm25"])
@pytest.mark.parametrize("keep_self", [True, False])
def test_similarities_are_the_brute_force_ones(make_view, random_users, weighting, keep_self):
    got = matrix(
        make_view(random_users, 20), weighting=weighting, shrinkage=2.0, num_neighbours=21, keep_self=keep_self
    )
    expected = brute_force(random_users, 20, weighting, 2.0)
    if not keep_self:
        np.fill_diagonal(expected, 0)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_keeps_the_nearest_of_each_item(make_view, random_users):
    got = matrix(make_view(random_users, 20), num_neighbours=3, shrinkage=0.5, weighting="cosine", keep_self=False)
    expected = brute_force(random_users, 20, "cosine", 0.5)
    np.fill_diagonal(expected, 0)
    for item in range(1, 21):
        third = np.sort(expected[item])[-3]
        kept = got[item] > 0
        assert kept.sum() == 3
        assert (expected[item][kept] >= third - 1e-9).all()
        np.testing.assert_allclose(got[item][kept], expected[item][kept], rtol=1e-5)


def test_three_items_by_hand(make_view, make_batch):
    """1 and 2 share two of three users, 1 and 3 one; 4 is alone."""
    view = make_view([[(1, [1, 2])], [(1, [1]), (2, [2])], [(1, [1, 3])], [(1, [4])]], 4)
    model = ItemKNN(ItemKNNConfig(weighting="cosine", shrinkage=0.0, keep_self=False, decay=0.5), view.space)
    model.prepare(view)
    score = model.score_all(make_batch([[(1, [2, 2]), (2, [3])]]))[0]
    expected = 0.5 * 2 / math.sqrt(3 * 2) + 1 / math.sqrt(3)
    assert score[1].item() == pytest.approx(expected, rel=1e-3)
    assert (score[2:] <= 0).all()


def test_wrong_settings_are_refused():
    for wrong in ({"num_neighbours": 0}, {"decay": 1.5}, {"weighting": "jaccard"}, {"shrinkage": -1.0}):
        with pytest.raises(ConfigError, match="item-knn"):
            ItemKNNConfig(**wrong)
