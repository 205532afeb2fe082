"""Page metrics against ranx, brute force and hand-computed pages; ranks against a full sort."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shortlist import metrics
from shortlist.errors import ConfigError, DataError
from shortlist.metrics import PAGE_METRICS, judge, ranks_from_scores

# Request 0 finds both of its targets (2 at place 2, 5 at place 3); request 1 finds one of three, on top; request 2 none.
ROWS = np.array([[9, 2, 5, 8], [4, 0, 0, 0], [1, 2, 3, 4]])
TARGETS = np.array([5, 2, 4, 7, 9, 8])
OFFSETS = np.array([0, 2, 5, 6])
LOG3 = 1 / math.log2(3)


def random_case(seed, num_requests=40, num_items=30, page=12):
    """Pages of distinct items, some cut short by empty places, and 1 to 6 targets each."""
    rng = np.random.default_rng(seed)
    rows = np.argsort(rng.random((num_requests, num_items)), axis=1)[:, :page] + 1
    rows[np.arange(page) >= rng.integers(1, page + 1, num_requests)[:, None]] = 0
    target_lists = [rng.permutation(num_items)[: rng.integers(1, 7)] + 1 for _ in range(num_requests)]
    offsets = np.cumsum([0, *map(len, target_lists)])
    return rows, np.concatenate(target_lists), offsets


def plain_metrics(page, wanted, k):
    """Every metric of one page, written as a loop over places."""
    found = [place for place, item in enumerate(page[:k], start=1) if item in wanted]
    ideal = sum(1 / math.log2(1 + place) for place in range(1, min(k, len(wanted)) + 1))
    return {
        "hit_rate": float(bool(found)),
        "recall": len(found) / len(wanted),
        "capped_recall": len(found) / min(k, len(wanted)),
        "precision": len(found) / k,
        "ndcg": sum(1 / math.log2(1 + place) for place in found) / ideal,
        "mrr": 1 / found[0] if found else 0.0,
        "average_precision": sum((n + 1) / place for n, place in enumerate(found)) / min(k, len(wanted)),
    }


def test_hits_of_a_page_made_by_hand():
    expected = [[False, True, True, False], [True, False, False, False], [False] * 4]
    np.testing.assert_array_equal(metrics.hits(ROWS, TARGETS, OFFSETS), expected)
    np.testing.assert_array_equal(judge(ROWS, TARGETS, OFFSETS).target_RK, [[-1, 1, 0, -1], [2, -1, -1, -1], [-1] * 4])
    np.testing.assert_array_equal(metrics.first_hit_rank(judge(ROWS, TARGETS, OFFSETS)), [2, 1, 0])


@pytest.mark.parametrize(
    ("name", "k", "expected"),
    [
        ("hit_rate", 1, [0, 1, 0]),
        ("hit_rate", 2, [1, 1, 0]),
        ("recall", 2, [1 / 2, 1 / 3, 0]),
        ("capped_recall", 2, [1 / 2, 1 / 2, 0]),
        ("precision", 4, [2 / 4, 1 / 4, 0]),
        ("mrr", 4, [1 / 2, 1, 0]),
        ("mrr", 1, [0, 1, 0]),
        ("ndcg", 3, [(LOG3 + 1 / 2) / (1 + LOG3), 1 / (1 + LOG3 + 1 / 2), 0]),
        ("ndcg", 1, [0, 1, 0]),
        ("average_precision", 3, [(1 / 2 + 2 / 3) / 2, 1 / 3, 0]),
        ("average_precision", 1, [0, 1, 0]),
    ],
)
def test_metrics_of_a_page_made_by_hand(name, k, expected):
    values = PAGE_METRICS[name](judge(ROWS, TARGETS, OFFSETS), k)
    assert values.dtype == np.float64
    np.testing.assert_allclose(values, expected, rtol=1e-15)


@pytest.mark.parametrize("k", [1, 5, 12])
def test_metrics_equal_a_plain_loop(k):
    rows, targets, offsets = random_case(seed=k)
    judged = judge(torch.from_numpy(rows), torch.from_numpy(targets), torch.from_numpy(offsets))
    plain = [plain_metrics(page, set(targets[a:b]), k) for page, a, b in zip(rows, offsets, offsets[1:])]
    for name, metric in PAGE_METRICS.items():
        np.testing.assert_allclose(metric(judged, k), [one[name] for one in plain], rtol=1e-12, err_msg=name)


def test_metrics_equal_ranx(monkeypatch):
    from numba import config

    # Compiling takes half a minute, a dozen requests in plain Python take none.
    monkeypatch.setattr(config, "DISABLE_JIT", True)
    import ranx

    rows, targets, offsets = random_case(seed=1, num_requests=12)
    qrels = {f"{r:02d}": {str(t): 1 for t in targets[offsets[r] : offsets[r + 1]]} for r in range(len(rows))}
    run = {f"{r:02d}": {str(i): 1.0 - p / 100 for p, i in enumerate(page) if i} for r, page in enumerate(rows)}
    theirs = {"hit_rate": "hit_rate@6", "recall": "recall@6", "precision": "precision@6", "ndcg": "ndcg@6"}
    theirs |= {"mrr": "mrr@6", "average_precision": "map@6"}  # at most 6 targets, so min(k, targets) is targets
    scores = ranx.evaluate(ranx.Qrels(qrels), ranx.Run(run), list(theirs.values()), return_mean=False)
    judged = judge(rows, targets, offsets)
    for ours, name in theirs.items():
        np.testing.assert_allclose(PAGE_METRICS[ours](judged, 6), scores[name], rtol=1e-12, err_msg=name)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 12))
def test_bounds_order_of_requests_and_order_of_targets(seed, k):
    rows, targets, offsets = random_case(seed, num_requests=8)
    judged = judge(rows, targets, offsets)
    order = np.random.default_rng(seed).permutation(8)
    parts = [np.random.default_rng(seed).permutation(targets[offsets[r] : offsets[r + 1]]) for r in order]
    shuffled = judge(rows[order], np.concatenate(parts), np.cumsum([0, *map(len, parts)]))
    for metric in PAGE_METRICS.values():
        values = metric(judged, k)
        assert (values >= 0).all()
        assert (values <= 1).all()
        np.testing.assert_array_equal(metric(shuffled, k), values[order])


def test_a_perfect_page_gets_exactly_one_and_an_item_shown_twice_counts_once():
    targets, offsets = np.arange(1, 8), np.array([0, 7])
    for k in range(1, 8):
        judged = judge(targets[None], targets, offsets)
        assert metrics.ndcg(judged, k)[0] == metrics.capped_recall(judged, k)[0] == 1.0
        assert metrics.average_precision(judged, k)[0] == pytest.approx(1.0, abs=1e-15)
    twice = metrics.hits(np.array([[3, 5, 3, 3]]), np.array([3, 4]), np.array([0, 2]))
    np.testing.assert_array_equal(twice, [[True, False, False, False]])


def test_same_item_in_other_requests_is_no_hit_and_no_requests_give_no_values():
    rows, targets = np.array([[7, 1], [2, 7]]), np.array([2, 9])
    assert not metrics.hits(rows, targets, np.array([0, 1, 2])).any()
    empty = judge(np.zeros((0, 3), np.int64), np.zeros(0, np.int64), np.zeros(1, np.int64))
    assert all(metric(empty, 3).shape == (0,) for metric in PAGE_METRICS.values())
    assert metrics.value_recall(empty, np.zeros(0), 3).shape == (0,)


def test_value_recall_by_hand():
    judged = judge(ROWS, TARGETS, OFFSETS)
    values = np.array([10.0, 30.0, 5.0, 45.0, 0.0, 0.0])  # request 0: 5 is worth 10, 2 is worth 30; request 2: nothing
    recovered, total = metrics.value_recovered(judged, values, 2)
    np.testing.assert_array_equal(recovered, [30, 5, 0])
    np.testing.assert_array_equal(total, [40, 50, 0])
    np.testing.assert_array_equal(metrics.value_recall(judged, values, 2), [0.75, 0.1, np.nan])
    assert metrics.value_recall_total(judged, values, 2) == 35 / 90
    np.testing.assert_allclose(metrics.value_recall(judged, np.ones(6), 3), metrics.recall(judged, 3))
    with pytest.raises(DataError, match="all targets are worth 0"):
        metrics.value_recall_total(judged, np.zeros(6), 2)
    with pytest.raises(DataError, match="at least 0"):
        metrics.value_recovered(judged, -values, 2)


@pytest.mark.parametrize(
    ("rows", "targets", "offsets", "message"),
    [
        ([[1, 2]], [3], [0, 2], "offsets must have 2 entries"),
        ([[1], [2]], [3, 4], [0, 2, 2], "request 1 .* no target"),
        ([[1, 2]], [3, 3], [0, 2], "item row 3 twice in request 0"),
        ([[1, 2]], [0], [0, 1], "row 0"),
        ([[1, -2]], [1], [0, 1], "negative entry -2"),
        ([[1.0, 2.0]], [1], [0, 1], "rows must be integers"),
        ([1, 2], [1], [0, 1], "2 dimension"),
        ([[2**62], [1], [1]], [1, 1, 1], [0, 1, 2, 3], "dense catalogue rows"),
    ],
)
def test_bad_pages_are_refused(rows, targets, offsets, message):
    with pytest.raises(DataError, match=message):
        judge(np.array(rows), np.array(targets), np.array(offsets))


@pytest.mark.parametrize("k", [0, 5])
def test_k_must_fit_the_page(k):
    with pytest.raises(ConfigError, match="k must be between 1 and 4"):
        metrics.ndcg(judge(ROWS, TARGETS, OFFSETS), k)


def test_a_constant_scorer_does_not_win():
    scores, target = torch.zeros(3, 101), torch.tensor([0, 50, 100])
    np.testing.assert_array_equal(ranks_from_scores(scores, target), [101, 101, 101])
    averaged = ranks_from_scores(scores, target, ties="averaged")
    np.testing.assert_array_equal(averaged, [51, 51, 51])
    assert metrics.hit_rate_from_ranks(averaged, 10).sum() == 0


def test_ranks_by_hand_with_ties_and_exclusions():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.5, 0.5], [0.1, 0.9, 0.5, 0.5, -torch.inf]])
    target = torch.tensor([2, 3])
    np.testing.assert_array_equal(ranks_from_scores(scores, target), [4, 3])
    np.testing.assert_array_equal(ranks_from_scores(scores, target, ties="averaged"), [3, 2.5])
    no_best = torch.tensor([False, True, False, False, False])
    np.testing.assert_array_equal(ranks_from_scores(scores, target, no_best), [3, 2])
    per_row = torch.zeros(2, 5, dtype=torch.bool)
    per_row[0, 2] = True
    np.testing.assert_array_equal(ranks_from_scores(scores, target, per_row), [0, 3])


def test_ranks_equal_a_full_sort_and_agree_with_the_page():
    rng = np.random.default_rng(0)
    scores = rng.permuted(np.tile(np.arange(50.0), (20, 1)), axis=1)
    target = rng.integers(0, 50, 20)
    order = np.argsort(-scores, axis=1)
    ranks = ranks_from_scores(torch.from_numpy(scores), torch.from_numpy(target))
    np.testing.assert_array_equal(ranks, [list(row).index(t) + 1 for row, t in zip(order, target)])
    judged = judge(order + 1, target + 1, np.arange(21))
    for k in (1, 10, 50):
        np.testing.assert_allclose(metrics.hit_rate_from_ranks(ranks, k), metrics.hit_rate(judged, k))
        np.testing.assert_allclose(metrics.ndcg_from_ranks(ranks, k), metrics.ndcg(judged, k))
        np.testing.assert_allclose(metrics.mrr_from_ranks(ranks, k), metrics.average_precision(judged, k))


def test_rank_zero_and_infinity_mean_not_found():
    ranks = np.array([0.0, 1.0, 3.0, np.inf])
    np.testing.assert_array_equal(metrics.hit_rate_from_ranks(ranks, 3), [0, 1, 1, 0])
    np.testing.assert_allclose(metrics.ndcg_from_ranks(ranks, 3), [0, 1, 0.5, 0])
    np.testing.assert_allclose(metrics.mrr_from_ranks(ranks, 2), [0, 1, 0, 0])
    with pytest.raises(DataError, match="count from 1"):
        metrics.mrr_from_ranks(np.array([-1]), 3)


def test_bad_scores_are_refused():
    scores, target = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(DataError, match="NaN"):
        ranks_from_scores(torch.tensor([[0.0, torch.nan, 1.0]]), torch.tensor([1]))
    with pytest.raises(DataError, match=r"columns 0\.\.2, got 0\.\.3"):
        ranks_from_scores(scores, torch.tensor([0, 3]))
    with pytest.raises(DataError, match="scores must be"):
        ranks_from_scores(scores, torch.tensor([0]))
    with pytest.raises(DataError, match="excluded must be bool"):
        ranks_from_scores(scores, target, torch.zeros(3))
