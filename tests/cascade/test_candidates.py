"""Each function against a slow, plain one."""

import numpy as np
import pytest
import torch

from shortlist.cascade.candidates import (
    Blocked,
    best_first,
    contained,
    finite,
    first_permitted,
    merge,
    standardise,
    take,
)
from shortlist.data.jagged import Jagged
from shortlist.models.base import Retrieved

NUM_ITEMS = 12


def random_lists(seed: int, num_requests: int = 7, longest: int = 9) -> Jagged:
    rng = np.random.default_rng(seed)
    return Jagged.from_rows(
        [(1 + rng.permutation(NUM_ITEMS)[: rng.integers(0, longest + 1)]).tolist() for _ in range(num_requests)]
    )


def as_lists(rows: Jagged) -> list[list]:
    return [rows.values[a:b].tolist() for a, b in zip(rows.offsets.tolist(), rows.offsets[1:].tolist())]


def found(rows: Jagged) -> Retrieved:
    padded, mask = rows.padded()
    return Retrieved(padded, torch.where(mask, -torch.arange(padded.shape[1]).float(), -torch.inf))


@pytest.mark.parametrize("keep", [1, 4, 50])
def test_merge_is_reciprocal_rank_fusion(keep):
    lists = [random_lists(seed, longest=longest) for seed, longest in ((0, 9), (1, 4), (2, 7))]
    rows, scores = merge([found(part) for part in lists], keep)
    at = 0
    for request in range(7):
        total, first = {}, {}
        for number, part in enumerate(lists):
            for place, item in enumerate(as_lists(part)[request]):
                total[item] = total.get(item, 0.0) + 1 / (61 + place)
                first[item] = min(first.get(item, (99, 99)), (place, number))
        expected = sorted(total, key=lambda item: (-round(total[item], 12), first[item]))[:keep]
        assert as_lists(rows)[request] == expected
        np.testing.assert_allclose(scores[at : at + len(expected)].numpy(), [total[i] for i in expected], rtol=1e-6)
        at += len(expected)
    assert at == len(scores)


@pytest.mark.parametrize("keep", [1, 4, 20])
def test_merge_of_one_list_is_the_same_with_an_empty_one_beside_it(keep):
    """A single list takes a shorter way; gaps and items named twice are as in any other."""
    part = random_lists(3)
    assert as_lists(merge([found(part)], 20)[0]) == as_lists(part)
    rng = np.random.default_rng(3)
    with_gaps = torch.from_numpy(rng.permuted(np.tile(np.arange(NUM_ITEMS + 1), (6, 1)), axis=1) % NUM_ITEMS)
    with_gaps[with_gaps == 1] = 0
    for rows in (found(part).rows, with_gaps, torch.from_numpy(rng.integers(0, 5, (6, 9)))):
        alone = merge([Retrieved(rows, rows.float())], keep)
        beside = merge([Retrieved(each, each.float()) for each in (rows, torch.zeros_like(rows))], keep)
        assert as_lists(alone[0]) == as_lists(beside[0])
        assert torch.equal(alone[1], beside[1])


@pytest.mark.parametrize("num_requests", [1, 7])
@pytest.mark.parametrize("keep", [None, 0, 2, 100])
def test_best_first_sorts_each_request_and_keeps_equals_in_order(keep, num_requests):
    rows = random_lists(4, num_requests=num_requests)
    scores = torch.from_numpy(np.random.default_rng(0).integers(0, 3, len(rows.values))).float()
    index = best_first(rows, scores, keep)
    expected = []
    for a, b in zip(rows.offsets.tolist(), rows.offsets[1:].tolist()):
        expected += sorted(range(a, b), key=lambda i: -scores[i])[:keep]
    assert index.tolist() == expected
    kept = take(rows, index)
    assert kept.values.tolist() == rows.values[expected].tolist()
    assert kept.lengths.tolist() == [min(n, 99 if keep is None else keep) for n in rows.lengths.tolist()]


def test_standardise_by_hand():
    rows = Jagged.from_rows([[1, 2, 3, 4], [], [5], [6, 7]])
    scores = torch.tensor([[1.0, 3.0, 3.0, 9.0, 7.0, 2.0, 2.0], [0.0, -1.0, -2.0, -3.0, 0.0, 5.0, 6.0]])
    value, place = standardise(rows, scores)
    deviation = np.std([1, 3, 3, 9])
    np.testing.assert_allclose(value[0, :4], (np.array([1, 3, 3, 9]) - 4) / (3 * deviation), rtol=1e-6)
    # Of four: below 1 nothing, below 3 one and the other equal counts half, below 9 three; the item itself counts half too.
    np.testing.assert_allclose(place[0, :4], [2 * 0.5 / 4 - 1, 0, 0, 2 * 3.5 / 4 - 1])
    assert value[0, 4:].tolist() == [0, 0, 0]
    assert place[0, 4:].tolist() == [0, 0, 0]
    np.testing.assert_allclose(value[1, 5:], [-1 / 3, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(place[1, 5:], [-0.5, 0.5])
    assert place[1, :4].tolist() == [0.75, 0.25, -0.25, -0.75]


def test_standardised_scores_do_not_see_shift_scale_or_neighbours():
    rows = random_lists(5)
    scores = torch.randn(2, len(rows.values), generator=torch.Generator().manual_seed(0))
    value, place = standardise(rows, scores)
    moved_value, moved_place = standardise(rows, scores * 100 + 1e4)
    torch.testing.assert_close(moved_value, value, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(moved_place, place, rtol=1e-3, atol=1e-3)
    for request in range(rows.num_rows):
        a, b = rows.offsets[request : request + 2].tolist()
        alone = Jagged.from_lengths(rows.values[a:b], torch.tensor([b - a]))
        torch.testing.assert_close(standardise(alone, scores[1:, a:b])[0], value[1:, a:b])
        torch.testing.assert_close(standardise(alone, scores[1:, a:b])[1], place[1:, a:b])


def test_places_of_many_equal_scores_by_brute_force():
    rows = random_lists(10, num_requests=30)
    scores = torch.from_numpy(np.random.default_rng(0).integers(-2, 2, (3, len(rows.values)))).float()
    _, place = standardise(rows, scores)
    for a, b in zip(rows.offsets.tolist(), rows.offsets[1:].tolist()):
        below = (scores[:, a:b, None] > scores[:, None, a:b]).sum(2)
        equal = (scores[:, a:b, None] == scores[:, None, a:b]).sum(2)
        torch.testing.assert_close(place[:, a:b], (2 * below + equal) / max(b - a, 1) - 1)


def test_large_equal_scores_have_no_spread():
    rows = Jagged.from_rows([[1, 2, 3]])
    value, place = standardise(rows, torch.full((1, 3), 1.1e7))
    assert not value.any()
    assert not place.any()


def test_finite_replaces_what_can_be_and_names_what_can_not():
    rows = Jagged.from_rows([[1, 2, 3], [4, 5], [], [6], [7, 8]])
    inf, nan = torch.inf, torch.nan
    scores, bad = finite(rows, torch.tensor([2.0, -inf, 1.0, nan, 3.0, -inf, inf, 0.0]))
    assert bad.tolist() == [False, True, False, True, True]
    assert scores.tolist() == [2.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_finite_leaves_finite_scores_as_they_are_even_where_their_sum_is_none():
    rows = Jagged.from_rows([[1, 2], [3]])
    given = torch.tensor([3e38, 3e38, -0.0])
    scores, bad = finite(rows, given)
    assert torch.equal(scores, given)
    assert not bad.any()


def test_first_permitted_by_brute_force():
    rng = np.random.default_rng(6)
    rows = torch.from_numpy(rng.integers(0, NUM_ITEMS + 1, (20, 15)))
    excluded = random_lists(7, num_requests=20, longest=4)
    allowed = torch.ones(NUM_ITEMS + 1, dtype=torch.bool)
    allowed[[3, 8]] = False
    for k in (1, 5, 30):
        picked = first_permitted(rows, Blocked(NUM_ITEMS, excluded, allowed), k)
        for r, row in enumerate(rows.tolist()):
            fine = [i for i in dict.fromkeys(row) if i not in (0, 3, 8) and i not in as_lists(excluded)[r]][:k]
            assert picked[r].tolist() == fine + [0] * (k - len(fine))


def test_contained_by_brute_force():
    one, other = random_lists(8), random_lists(9)
    flat = [item in as_lists(other)[r] for r, row in enumerate(as_lists(one)) for item in row]
    assert contained(one, other).tolist() == flat
    assert not contained(one, Jagged.from_rows([[]] * 7)).any()
