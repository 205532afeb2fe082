import warnings

import numpy as np
import pytest
import scipy.sparse
import torch

from shortlist import extras
from shortlist.errors import ConfigError, DataError
from shortlist.models.retrieval.als import ALS, ALSConfig


def group_counts(users, num_items) -> np.ndarray:
    """[users, n + 1]: in how many baskets of each user an item is; the unknown item 0 is not counted."""
    counts = np.zeros((len(users), num_items + 1))
    for user, baskets in enumerate(users):
        for _, items in baskets:
            for item in set(items) - {0}:
                counts[user, item] += 1
    return counts


def prepared(make_view, users, num_items=20, **settings) -> ALS:
    view = make_view(users, num_items)
    model = ALS(ALSConfig(**{"num_factors": 6, "iterations": 8, **settings}), view.space)
    model.prepare(view)
    return model.eval()


@torch.no_grad()
def test_a_users_vector_is_the_weighted_ridge_regression_on_the_items(make_view, make_batch, random_users):
    """Equation 4 by another road: least squares over all items, each row weighed by the root of its confidence."""
    alpha, ridge = 3.0, 0.7
    model = prepared(make_view, random_users, alpha=alpha, regularisation=ridge)
    got = model.encode_user(make_batch(random_users)).numpy()[:, :-1]
    y = model.item_Nd.numpy().astype(np.float64)
    counts = group_counts(random_users, 20)
    for user, row in enumerate(counts):
        root = np.sqrt(1 + alpha * row)
        left = np.vstack([root[:, None] * y, np.sqrt(ridge) * np.eye(6)])
        right = np.concatenate([root * (row > 0), np.zeros(6)])
        np.testing.assert_allclose(got[user], np.linalg.lstsq(left, right, rcond=None)[0], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_scores_of_training_users_are_the_librarys_own(make_view, make_batch, random_users):
    """`recommend` of the library, with users solved anew as it offers, on a matrix made here by loops."""
    from implicit.cpu.als import AlternatingLeastSquares

    model = prepared(make_view, random_users, alpha=2.0, regularisation=0.5, seed=4)
    counts = group_counts(random_users, 20)
    kept = counts.any(1)
    matrix = scipy.sparse.csr_matrix(np.where(counts > 0, 1 + 2.0 * counts, 0)[kept].astype(np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = AlternatingLeastSquares(6, 0.5, iterations=8, num_threads=1, random_state=4)
        theirs.fit(matrix, show_progress=False)
    ids, scores = theirs.recommend(
        np.arange(kept.sum()), matrix, N=7, filter_already_liked_items=False, recalculate_user=True
    )
    found = model.retrieve(make_batch(random_users), 7)
    np.testing.assert_allclose(found.scores.numpy()[kept], scores, atol=1e-4)
    assert (found.rows.numpy()[kept] == ids).mean() > 0.98, "but for near-ties"


@torch.no_grad()
def test_a_planted_rank_is_found_again(make_view, make_batch):
    """Two tastes that share no item: whoever bought three of five is shown the other two first."""
    draw = np.random.default_rng(0)
    users = [[(1, (5 * (u % 2) + 1 + draw.permutation(5)[:3]).tolist())] for u in range(60)]
    model = prepared(make_view, users, 10, num_factors=2, regularisation=0.1)
    best = model.retrieve(make_batch(users, exclude_history=True), 2).rows.numpy()
    for user, row in enumerate(best):
        assert set(row) == set(range(5 * (user % 2) + 1, 5 * (user % 2) + 6)) - set(users[user][0][1])


@torch.no_grad()
def test_order_inside_a_basket_and_unknown_items_change_nothing(
    make_view, make_batch, random_users, shuffled_in_baskets
):
    a, b = prepared(make_view, random_users), prepared(make_view, shuffled_in_baskets)
    assert torch.equal(a.item_Nd, b.item_Nd)
    assert not a.item_Nd[0].any()
    torch.testing.assert_close(
        a.encode_user(make_batch(random_users)), a.encode_user(make_batch(shuffled_in_baskets)), rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_without_history_the_popular_come_first(make_view, make_batch):
    users = [[(90, [3, 1])], [(91, [3])], [(92, [3, 2, 1])]]
    model = prepared(make_view, users, 5)
    assert model.retrieve(make_batch([[], [(95, [0])]]), 3).rows.tolist() == [[3, 1, 2], [3, 1, 2]]


def test_same_seed_same_factors_another_seed_not(make_view, random_users):
    a, b, c = (prepared(make_view, random_users, seed=seed).item_Nd for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_the_librarys_warning_of_nested_threads_is_not_passed_on_where_there_are_none(make_view, random_users):
    import implicit.utils

    implicit.utils._checked_blas_config = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared(make_view, random_users, num_threads=1)


def test_a_missing_library_is_named_with_the_line_that_installs_it(make_view, random_users, monkeypatch):
    real = extras.import_module

    def missing(name):
        if name.startswith("implicit"):
            raise ImportError("No module named 'implicit'")
        return real(name)

    monkeypatch.setattr(extras, "import_module", missing)
    with pytest.raises(ConfigError, match=r"als needs the library 'implicit'.*pip install 'shortlist\[baselines\]'"):
        prepared(make_view, random_users)


def test_bad_settings_and_empty_logs_are_refused(make_view):
    with pytest.raises(ConfigError, match="num_factors must be at least 1, got 0"):
        ALSConfig(num_factors=0)
    with pytest.raises(ConfigError, match="regularisation must be above 0"):
        ALSConfig(regularisation=0.0)
    with pytest.raises(DataError, match="no user has chosen a known item"):
        prepared(make_view, [[(1, [0])]], 3)


@torch.no_grad()
def test_serving_needs_torch_alone(make_view, make_batch, random_users, monkeypatch):
    model = prepared(make_view, random_users)
    expected = model.retrieve(make_batch(random_users), 5)
    fresh = ALS(model.config, model.space)

    def refuse(name):
        raise ImportError(name)

    monkeypatch.setattr(extras, "import_module", refuse)
    from shortlist.models.base import load_weights

    load_weights(fresh, dict(model.state_dict()))
    assert torch.equal(fresh.eval().retrieve(make_batch(random_users), 5).rows, expected.rows)
