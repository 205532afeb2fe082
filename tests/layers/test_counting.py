import os
from pathlib import Path

import numpy as np
import pytest
import torch

from shortlist.data.batches import History
from shortlist.data.histories import Histories
from shortlist.data.jagged import Jagged
from shortlist.layers.counting import (
    PairSums,
    SparseRows,
    add_sparse_rows,
    distinct_events,
    group_runs,
    groups_ago,
    pair_sums,
    plain_add_sparse_rows,
    sparse_rows,
    sum_by_key,
    then_popular,
    user_items,
)


def history(rows: list[list[int]], groups: list[int]) -> History:
    items = Jagged.from_rows(rows)
    total = len(items.values)
    zero = torch.zeros(total, dtype=torch.int64)
    return History(items=items, time=zero, action=zero, value=zero.float(), group=torch.tensor(groups))


def test_groups_ago_counts_back_from_each_requests_newest_group():
    # Two requests whose border lies between events of the same group number, and an empty one.
    h = history([[1, 2, 3, 3], [], [4, 5]], [7, 7, 8, 9, 9, 11])
    assert groups_ago(h).tolist() == [2, 2, 1, 0, 1, 0]
    assert groups_ago(history([[], []], [])).tolist() == []


def test_distinct_events_keeps_the_newest_known_one():
    h = history([[1, 1, 0, 2, 1], [1, 1]], [1, 1, 1, 2, 2, 1, 2])
    assert distinct_events(h, per_group=True).tolist() == [False, True, False, True, True, True, True]
    assert distinct_events(h, per_group=False).tolist() == [False, False, False, True, True, False, True]


def test_group_runs_and_user_items_by_hand():
    zero = np.zeros(7, dtype=np.int64)
    log = Histories(
        offsets=np.array([0, 0, 4, 4, 7]),
        item=np.array([3, 3, 0, 2, 2, 3, 2]),
        time=zero,
        group=np.array([5, 5, 6, 9, 9, 10, 11]),
        action=zero,
        value=zero.astype(np.float32),
    )
    assert group_runs(log).tolist() == [0, 0, 1, 2, 3, 4, 5]
    cells = user_items(log, 4)
    assert cells.offsets.tolist() == [0, 0, 2, 2, 4]
    assert cells.user.tolist() == [1, 1, 3, 3]
    assert cells.item.tolist() == [2, 3, 2, 3]
    assert cells.num_groups.tolist() == [1, 1, 2, 1]
    assert cells.groups_ago.tolist() == [0, 2, 0, 1]


@pytest.mark.parametrize("pairs_at_once", [1, 7, 10**6])
def test_pair_sums_do_not_depend_on_the_blocks(pairs_at_once):
    random = np.random.default_rng(0)
    source, partner = random.integers(1, 9, 40), random.integers(1, 9, 30)
    start = random.integers(0, 30, 40)
    stop = np.minimum(start + random.integers(0, 6, 40), 30)
    weight, partner_weight = random.random(40), random.random(30)
    expected = np.zeros((9, 9))
    for e in range(40):
        for p in range(start[e], stop[e]):
            expected[source[e], partner[p]] += weight[e] * partner_weight[p]
    blocks = list(pair_sums(source, start, stop, weight, partner, partner_weight, 9, pairs_at_once))
    got = np.zeros((9, 9))
    for block in blocks:
        got[block.row, block.column] = block.weight
    np.testing.assert_allclose(got, expected)
    rows = np.concatenate([block.row for block in blocks])
    assert (np.diff(rows) >= 0).all()
    matrix = sparse_rows(blocks, 9)
    assert matrix.offsets.tolist() == np.searchsorted(rows, np.arange(10)).tolist()


@pytest.mark.parametrize("num_keys", [10, 10**9])
def test_sums_by_key_dense_and_sorted(num_keys):
    keys, sums = sum_by_key(np.array([7, 2, 7, 0, 2]), np.array([1.0, 2, 3, 4, 5]), num_keys)
    assert keys.tolist() == [0, 2, 7]
    assert sums.tolist() == [4, 7, 4]


@pytest.mark.parametrize("entries_at_once", [1, 4, 10**6])
def test_add_sparse_rows_is_a_matrix_product(entries_at_once):
    random = np.random.default_rng(0)
    dense = random.random((6, 6)) * (random.random((6, 6)) < 0.5)
    dense[0] = dense[2] = 0
    row, column = dense.nonzero()
    matrix = sparse_rows([PairSums(row, column, dense[row, column])], 6)
    request, item, weight = random.integers(0, 3, 20), random.integers(0, 6, 20), random.random(20)
    users = np.zeros((3, 6))
    np.add.at(users, (request, item), weight)
    tensors = (torch.from_numpy(request), torch.from_numpy(item), torch.from_numpy(weight).float())
    got = plain_add_sparse_rows(torch.zeros(3, 6), *tensors, matrix, entries_at_once)
    torch.testing.assert_close(got, torch.from_numpy(users @ dense).float())


@pytest.mark.parametrize(("num_requests", "num_rows", "density"), [(1, 40, 0.5), (17, 300, 0.3), (30, 2_000, 0.001)])
def test_the_product_agrees_with_the_plain_form(num_requests, num_rows, density):
    """Repeated items of a request, requests without events, items without a row, and scores that are there already."""
    random = np.random.default_rng(num_requests)
    dense = np.where(random.random((num_rows, num_rows)) < density, random.random((num_rows, num_rows)) * 9, 0)
    dense[:, 0] = dense[3] = 0
    row, column = dense.nonzero()
    matrix = sparse_rows([PairSums(row, column, dense[row, column])], num_rows)
    request = np.sort(random.choice(np.arange(num_requests)[:: 2 if num_requests > 1 else 1], 200))
    item, weight = random.integers(0, num_rows, 200), random.random(200).astype(np.float32)
    given = [torch.from_numpy(x) for x in (request, item, weight)]
    before = torch.from_numpy(random.random((num_requests, num_rows)).astype(np.float32))
    fast, plain = (add(before.clone(), *given, matrix) for add in (add_sparse_rows, plain_add_sparse_rows))
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)
    if num_requests > 1:
        assert torch.equal(fast[1], before[1])
    expected = before.double().numpy()
    np.add.at(expected, request, weight[:, None].astype(np.float64) * dense[item])
    np.testing.assert_allclose(fast.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_products_leave_no_memory_behind():
    """A product of sparse matrices into a sparse one leaks in MKL, by some 40 KB a call: 400 calls would leave 15 MB."""
    step = torch.arange(1, 50)
    matrix = SparseRows(offsets=torch.arange(51).clamp(max=49), columns=step.int(), weights=step.float())
    scores, event = torch.zeros(4, 50), torch.arange(4)

    def resident_bytes():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def add(times):
        for _ in range(times):
            add_sparse_rows(scores, event, 3 + event, torch.ones(4), matrix)
        return resident_bytes()

    before = add(100)
    assert add(400) - before < 4 << 20
    assert scores.nonzero().tolist() == [[request, request + 4] for request in range(4)]


def test_nothing_to_add_adds_nothing():
    empty, scores = sparse_rows([], 5), torch.ones(2, 5)
    one = torch.tensor([1])
    assert torch.equal(add_sparse_rows(scores.clone(), one, one, one.float(), empty), scores)
    assert torch.equal(add_sparse_rows(scores.clone(), one[:0], one[:0], one[:0].float(), empty), scores)


def test_the_rest_follows_by_popularity():
    scores = torch.tensor([[0.0, 0.0, 2.0, 1.0, 1.0, 0.0]])
    popular = torch.tensor([0.0, 5.0, 1.0, 2.0, 9.0, 8.0])
    assert then_popular(scores, popular)[0].argsort(descending=True)[:5].tolist() == [2, 4, 3, 5, 1]


GOOD = {"offsets": [0, 2, 2, 3], "columns": [0, 2, 1], "weights": [1.0, 2.0, 3.0]}


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("offsets", [0, 2, 1, 3]),
        ("offsets", [1, 2, 2, 3]),
        ("offsets", [0, 2, 2, 4]),
        ("offsets", []),
        ("offsets", [0.0, 2.0, 2.0, 3.0]),
        ("columns", [0, 3, 1]),
        ("columns", [0, -1, 1]),
        ("columns", [0, 2]),
        ("columns", [0.0, 2.0, 1.0]),
        ("weights", [1.0]),
    ],
)
def test_a_matrix_that_points_outside_is_refused(part, value):
    """MKL would read there."""
    SparseRows(*(torch.tensor(given) for given in GOOD.values())).check()
    with pytest.raises(ValueError, match="sparse matrix"):
        SparseRows(*(torch.tensor(given) for given in (GOOD | {part: value}).values())).check()


def test_a_matrix_of_another_catalogue_is_refused():
    matrix = SparseRows(*(torch.tensor(given) for given in GOOD.values()))
    one = torch.tensor([0])
    with pytest.raises(ValueError, match="3 rows where there are scores of 9 items"):
        add_sparse_rows(torch.zeros(1, 9), one, one, torch.ones(1), matrix)
