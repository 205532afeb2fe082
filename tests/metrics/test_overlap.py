"""Likeness of two pages against the definition, summed term by term to a depth where nothing is left."""

import itertools

import numpy as np
import pytest

from shortlist.errors import ConfigError, DataError
from shortlist.metrics.overlap import displacement, jaccard, rank_biased_overlap


def by_definition(first, second, p, depth=3_000):
    """(1 - p) sum p^(d-1) agreement(d), the short ranking going on as it began, and the last agreement for ever."""
    short, long = sorted((first, second), key=len)
    s, n = len(short), len(long)
    agreements = []
    for d in range(1, n + 1):
        shared = len(set(short[:d]) & set(long[:d]))
        if d > s:
            shared += len(set(short) & set(long[:s])) * (d - s) / s
        agreements.append(shared / d)
    agreements += [agreements[-1]] * (depth - n)
    return (1 - p) * sum(p**d * agreement for d, agreement in enumerate(agreements))


@pytest.mark.parametrize("p", [0.5, 0.9, 0.98])
def test_overlap_is_the_sum_of_its_definition(p):
    rng = np.random.default_rng(0)
    for _ in range(40):
        first = rng.permutation(30)[: rng.integers(1, 20)].tolist()
        second = rng.permutation(30)[: rng.integers(1, 20)].tolist()
        found = rank_biased_overlap(first, second, p)
        assert found == pytest.approx(by_definition(first, second, p), abs=1e-9)
        assert found == rank_biased_overlap(second, first, p)


def test_the_same_page_is_one_and_another_is_nothing():
    page = list("abcdef")
    assert rank_biased_overlap(page, page) == pytest.approx(1.0, abs=1e-12)
    assert rank_biased_overlap(page, list("uvwxyz")) == 0.0
    assert rank_biased_overlap([], []) == 1.0
    assert rank_biased_overlap([], page) == rank_biased_overlap(page, []) == 0.0
    # One shared item at the top of two pages of two: agreement 1 at the first place, 1/2 from the second on.
    assert rank_biased_overlap(["a", "b"], ["a", "c"], 0.9) == pytest.approx(0.1 * 1 + 0.9 * 0.5)


def test_what_changes_at_the_top_weighs_more():
    page = list(range(10))
    swapped = {d: [*page[:d], page[d + 1], page[d], *page[d + 2 :]] for d in range(9)}
    found = [rank_biased_overlap(page, other) for other in swapped.values()]
    assert all(before < after for before, after in itertools.pairwise(found))


def test_sets_and_places():
    assert jaccard(list("abcd"), list("cdef")) == pytest.approx(2 / 6)
    assert jaccard([], []) == 1.0
    assert jaccard([], ["a"]) == 0.0
    assert displacement(list("abcd"), list("dxab")) == pytest.approx((2 + 2 + 3) / 3)
    assert displacement(list("ab"), list("cd")) == 0.0


@pytest.mark.parametrize("measure", [rank_biased_overlap, jaccard, displacement])
def test_an_item_twice_is_refused(measure):
    with pytest.raises(DataError, match="'b' stands twice"):
        measure(["a"], ["b", "a", "b"])


@pytest.mark.parametrize("p", [0.0, 1.0, -1.0])
def test_persistence_lies_between(p):
    with pytest.raises(ConfigError, match="persistence"):
        rank_biased_overlap(["a"], ["a"], p)
