import numpy as np
import pytest

from shortlist.errors import ConfigError
from shortlist.models.retrieval.ease import EASE, EASEConfig


def choices(users, num_items, decay=1.0) -> np.ndarray:
    """[users, n]: decay ** (groups since the item was last chosen)."""
    x = np.zeros((len(users), num_items + 1))
    for user, baskets in enumerate(users):
        for age, (_, items) in enumerate(reversed(baskets)):
            for item in items:
                x[user, item] = max(x[user, item], decay**age)
    return x[:, 1:]


@pytest.mark.parametrize("decay", [1.0, 0.7])
@pytest.mark.parametrize(("double", "tolerance"), [(True, 1e-6), (False, 1e-4)])
def test_each_column_is_the_ridge_regression_on_the_others(make_view, random_users, decay, double, tolerance):
    """The constrained optimum by another road: one least-squares problem per item, without its own column."""
    view = make_view(random_users, 20)
    model = EASE(EASEConfig(regularisation=1.5, decay=decay, double=double), view.space)
    model.prepare(view)
    x = choices(random_users, 20, decay)
    for j in range(20):
        others = np.delete(np.arange(20), j)
        ridge = np.vstack([x[:, others], np.sqrt(1.5) * np.eye(19)])
        target = np.concatenate([x[:, j], np.zeros(19)])
        weights = np.linalg.lstsq(ridge, target, rcond=None)[0]
        column = model.B_NN.numpy()[1:, j + 1]
        np.testing.assert_allclose(column[others], weights, atol=tolerance)
        assert column[j] == 0


@pytest.mark.parametrize("decay", [1.0, 0.7])
def test_score_is_the_users_row_times_the_matrix(make_view, make_batch, random_users, decay):
    view = make_view(random_users, 20)
    model = EASE(EASEConfig(regularisation=1.5, decay=decay), view.space)
    model.prepare(view)
    got = model.score_all(make_batch(random_users)).numpy()[:, 1:]
    expected = choices(random_users, 20, decay) @ model.B_NN.numpy()[1:, 1:]
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_unknown_items_are_no_reason(make_view, make_batch):
    view = make_view([[(1, [0, 1, 2])], [(1, [0, 3])]], 3)
    model = EASE(EASEConfig(regularisation=1.0), view.space)
    model.prepare(view)
    assert not model.B_NN[0].any()
    assert not model.B_NN[:, 0].any()
    assert model.B_NN[1, 3] == 0, "1 and 3 share the unknown item only"


def test_a_large_catalogue_is_refused_with_the_remedy(make_view):
    with pytest.raises(ConfigError, match=r"30 items, more than max_items = 20.*item-knn or counts"):
        EASE(EASEConfig(max_items=20), make_view([[(1, [1])]], 30).space)
    with pytest.raises(ConfigError, match="regularisation"):
        EASEConfig(regularisation=0.0)
