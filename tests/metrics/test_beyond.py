"""Reach, novelty, concentration and variety against hand-computed pages and loops over pairs."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shortlist import metrics
from shortlist.errors import DataError
from shortlist.metrics import _arrays


def random_pages(seed, num_requests=15, num_items=20, page=6):
    """Pages of distinct items with 0 to `page` items each."""
    rng = np.random.default_rng(seed)
    rows = np.argsort(rng.random((num_requests, num_items)), axis=1)[:, :page] + 1
    rows[np.arange(page) >= rng.integers(0, page + 1, num_requests)[:, None]] = 0
    return rows


def mean_over_pairs(rows, distance):
    """Mean distance over the pairs of each page, by a loop; NaN below two items."""
    pages = [[distance(i, j) for i, j in itertools.combinations(page[page > 0], 2)] for page in rows]
    return np.array([np.mean(page) if page else np.nan for page in pages])


def test_coverage_exposure_and_gini_by_hand():
    rows = np.array([[1, 2], [1, 0], [1, 0]])
    np.testing.assert_array_equal(metrics.exposure(rows, 4), [3, 1, 0, 0])
    assert metrics.coverage(rows, 4) == 0.5
    # sum of |x_i - x_j| over all ordered pairs / (2 n^2 mean), by hand: (2 x (2 + 3 + 3 + 1 + 1 + 0)) / (2 x 16 x 1)
    assert metrics.gini(rows, 4) == pytest.approx(20 / 32)
    assert metrics.gini(np.array([[1, 2, 3]]), 3) == 0.0
    assert metrics.gini(np.array([[2]]), 5) == pytest.approx(1 - 1 / 5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_gini_equals_its_definition_by_pairs_and_ignores_the_order_of_requests(seed):
    rows = random_pages(seed)
    rows[0, 0] = 3
    shown = np.array([(rows == item).sum() for item in range(1, 21)])
    by_pairs = np.abs(shown[:, None] - shown).sum() / (2 * 20**2 * shown.mean())
    assert metrics.gini(rows, 20) == pytest.approx(by_pairs)
    assert metrics.gini(rows[::-1], 20) == metrics.gini(rows, 20)
    assert metrics.coverage(rows, 20) == len(set(rows.ravel()) - {0}) / 20


def test_novelty_by_hand():
    counts = np.array([999, 8, 4, 4, 0])  # row 0 is never read
    rows = np.array([[1, 2, 0], [3, 4, 1], [0, 0, 0]])
    expected = [(1 + 2) / 2, (2 + 4 + 1) / 3, np.nan]  # bits: 8 of 16, 4 of 16, unseen as 1 of 16
    np.testing.assert_allclose(metrics.novelty(rows, counts), expected)
    np.testing.assert_allclose(metrics.novelty(rows, counts, total=32), np.array(expected) + 1)


def test_cosine_diversity_by_hand():
    vectors = torch.tensor([[9.0, 9.0], [2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [0.0, 0.0]])
    rows = np.array([[1, 2], [1, 3], [1, 1], [1, 4], [1, 0]])
    np.testing.assert_allclose(metrics.intra_list_diversity(rows, vectors), [1, 2, 0, 1, np.nan], atol=1e-15)
    assert metrics.intra_list_diversity(np.array([[1, 2, 3]]), vectors)[0] == pytest.approx((1 + 2 + 1) / 3)


def test_diversities_equal_loops_over_pairs(monkeypatch):
    monkeypatch.setattr(_arrays, "CHUNK_NUMBERS", 100)  # several chunks
    rng = np.random.default_rng(0)
    rows = random_pages(5)
    vectors, codes, genres = rng.normal(size=(21, 4)), rng.integers(0, 3, 21), rng.random((21, 5)) < 0.4
    vectors[0], genres[7] = np.nan, False
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def jaccard(i, j):
        either = (genres[i] | genres[j]).sum()
        return 1 - (genres[i] & genres[j]).sum() / either if either else 0.0

    cosine = mean_over_pairs(rows, lambda i, j: 1 - unit[i] @ unit[j])
    assert np.isnan(cosine).any()
    assert np.isfinite(cosine).sum() > 5
    np.testing.assert_allclose(metrics.intra_list_diversity(rows, vectors), cosine, rtol=1e-10)
    by_code = mean_over_pairs(rows, lambda i, j: float(codes[i] != codes[j]))
    np.testing.assert_allclose(metrics.category_diversity(rows, codes), by_code, rtol=1e-12)
    np.testing.assert_allclose(metrics.genre_diversity(rows, genres), mean_over_pairs(rows, jaccard), rtol=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_diversity_does_not_depend_on_order_and_stays_in_bounds(seed):
    rng = np.random.default_rng(seed)
    rows, codes = random_pages(seed), rng.integers(0, 4, 21)
    one_hot = np.eye(4)[codes]
    by_code = metrics.category_diversity(rows, codes)
    np.testing.assert_allclose(metrics.category_diversity(rows[:, ::-1], codes), by_code)
    # A category is a single genre and a one-hot vector: three ways to one number.
    np.testing.assert_allclose(metrics.genre_diversity(rows, one_hot), by_code, atol=1e-12)
    np.testing.assert_allclose(metrics.intra_list_diversity(rows, one_hot), by_code, atol=1e-12)
    assert np.nanmin(by_code, initial=0) >= 0
    assert np.nanmax(by_code, initial=0) <= 1


def test_bad_input_is_refused():
    rows = np.array([[1, 5]])
    for call, message in [
        (lambda: metrics.coverage(rows, 4), "item row 5, but the catalogue ends at row 4"),
        (lambda: metrics.novelty(rows, np.ones(3)), "counts ends at row 2"),
        (lambda: metrics.intra_list_diversity(rows, np.ones((5, 2))), "vectors ends at row 4"),
        (lambda: metrics.intra_list_diversity(rows, np.full((6, 2), np.nan)), "NaN or infinity"),
        (lambda: metrics.genre_diversity(rows, np.full((6, 2), 2)), "multi-hot"),
        (lambda: metrics.category_diversity(rows, np.ones(6)), "codes must be integers"),
        (lambda: metrics.gini(np.zeros((2, 2), int), 4), "all pages are empty"),
        (lambda: metrics.novelty(rows, np.full(6, 9.0), total=3), "largest count"),
    ]:
        with pytest.raises(DataError, match=message):
            call()
    assert math.isnan(metrics.category_diversity(np.array([[1]]), np.ones(2, int))[0])
