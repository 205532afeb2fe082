"""Intervals against closed forms, scipy and full enumeration; their coverage against known truth."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shortlist.errors import ConfigError, DataError
from shortlist.metrics import (
    _arrays,
    bootstrap_interval,
    bootstrap_ratio,
    holm,
    intervals,
    paired_difference,
    seed_interval,
)


def clustered_case(seed, num_users=60):
    """1 to 5 requests per user; the requests of a user resemble each other."""
    rng = np.random.default_rng(seed)
    clusters = np.repeat(np.arange(num_users), rng.integers(1, 6, num_users))
    taste = rng.normal(size=num_users)[clusters]
    return taste + 0.1 * rng.normal(size=len(clusters)), clusters, rng


@pytest.mark.parametrize("kind", ["few values", "many values"])
def test_interval_of_a_mean_equals_the_normal_one(kind):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2, 900).astype(float) if kind == "few values" else rng.normal(size=900)
    interval = bootstrap_interval(values, seed=1, resamples=8000)
    margin = 1.959964 * values.std() / 30
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - margin, abs=0.06 * margin)
    assert interval.high == pytest.approx(values.mean() + margin, abs=0.06 * margin)


def test_users_are_drawn_whole():
    """Ten copies of each request by the same user say nothing new; treated as independent they would."""
    values = np.random.default_rng(0).normal(size=200)
    copies, users = np.repeat(values, 10), np.repeat(np.arange(200), 10)
    alone, together = bootstrap_interval(values, seed=0), bootstrap_interval(copies, users, seed=0)
    naive = bootstrap_interval(copies, seed=0)
    assert together.high - together.low == pytest.approx(alone.high - alone.low, rel=0.02)
    assert naive.high - naive.low < 0.4 * (together.high - together.low)


def test_ratio_interval_equals_the_delta_method():
    values, clusters, rng = clustered_case(3, num_users=800)
    weights = rng.random(len(values)) + 0.5
    interval = bootstrap_ratio(values * weights, weights, clusters, seed=0, resamples=6000)
    numerator, denominator = np.bincount(clusters, values * weights), np.bincount(clusters, weights)
    ratio = numerator.sum() / denominator.sum()
    spread = np.sqrt(((numerator - ratio * denominator) ** 2).sum()) / denominator.sum()
    assert interval.mean == pytest.approx(ratio)
    assert interval.high - interval.low == pytest.approx(2 * 1.959964 * spread, rel=0.06)


def test_intervals_hold_the_truth_as_often_as_they_say():
    held = 0
    for seed in range(200):
        values, clusters, _ = clustered_case(seed)
        interval = bootstrap_interval(values, clusters, seed=seed, level=0.9, resamples=300)
        held += interval.low <= 0.0 <= interval.high
    assert 0.82 <= held / 200 <= 0.95  # 0.9 less the bootstrap's small-sample loss, four standard errors at most


@pytest.mark.parametrize("few", [True, False])
def test_chunks_change_only_memory(monkeypatch, few):
    values = np.arange(64.0) % (3 if few else 64)
    whole = bootstrap_interval(values, seed=5, resamples=400)
    monkeypatch.setattr(_arrays, "CHUNK_NUMBERS", 1000)
    assert len(_arrays.chunks(400, 64)) > 20
    assert bootstrap_interval(values, seed=5, resamples=400) == whole


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_order_of_requests_and_names_of_users_do_not_matter(seed):
    values, clusters, rng = clustered_case(seed, num_users=12)
    order = rng.permutation(len(values))
    first = bootstrap_interval(values, clusters, seed=7, resamples=50)
    second = bootstrap_interval(
        values[order], np.char.add("u", np.char.zfill(clusters.astype(str), 2))[order], seed=7, resamples=50
    )
    assert (second.mean, second.low, second.high) == pytest.approx((first.mean, first.low, first.high))
    assert first.low <= first.high


def test_same_seed_same_result_and_tensors_are_accepted():
    values, clusters, _ = clustered_case(0)
    first = bootstrap_interval(values, clusters, seed=1)
    assert bootstrap_interval(torch.from_numpy(values), torch.from_numpy(clusters), seed=1) == first
    assert bootstrap_interval(values, clusters, seed=2) != first


def exact_p_value(differences):
    """Share of all 2^U sign patterns at least as extreme as the one found."""
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((-1, 1), repeat=len(differences))]
    return np.mean(np.array(sums) >= abs(np.sum(differences)) - 1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_p_value_equals_full_enumeration(seed):
    rng = np.random.default_rng(seed)
    users = np.repeat(np.arange(10), 3)
    b = rng.integers(0, 4, 30) / 4  # many ties and zero differences
    a = rng.integers(0, 4, 30) / 4 + 0.15 * seed
    test = paired_difference(a, b, users, seed=seed, resamples=20_000)
    exact = exact_p_value(np.bincount(users, a - b))
    assert test.p_value == pytest.approx(exact, abs=4 * np.sqrt(0.25 / 20_000))
    assert test.difference == pytest.approx(np.mean(a - b))


def test_pairing_sees_a_small_gain_that_two_intervals_hide():
    rng = np.random.default_rng(0)
    b = rng.normal(size=300)
    a = b + 0.05 + 0.1 * rng.normal(size=300)
    test = paired_difference(a, b, seed=0)
    assert test.low > 0
    assert test.p_value == 1 / 2001  # the least that 2000 patterns can show
    assert bootstrap_interval(a, seed=0).low < b.mean()
    mirrored = paired_difference(b, a, seed=0)
    assert (mirrored.difference, mirrored.p_value) == pytest.approx((-test.difference, test.p_value))


def test_equal_systems_have_p_value_one_and_false_alarms_are_as_rare_as_stated():
    values = np.arange(20.0)
    assert paired_difference(values, values, seed=0).p_value == 1.0
    p_values = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        p_values.append(paired_difference(rng.normal(size=30), rng.normal(size=30), seed=seed, resamples=199).p_value)
    assert np.mean(np.array(p_values) <= 0.1) == pytest.approx(0.1, abs=0.055)  # three standard errors


def test_paired_difference_of_ratios_by_hand():
    a, b, money = np.array([3.0, 0.0, 2.0]), np.array([1.0, 0.0, 1.0]), np.array([4.0, 2.0, 4.0])
    test = paired_difference(a, b, denominators=money, seed=0, resamples=500)
    assert test.difference == pytest.approx((5 - 2) / 10)
    assert 0 <= test.low <= test.difference <= test.high <= 0.5
    assert test.p_value == pytest.approx(0.5, abs=0.1)  # two differences of one sign: 2 of 4 patterns


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 30, 999])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_t_quantile_equals_scipy(freedom, level):
    from scipy.stats import t

    assert intervals._t_quantile(level, freedom) == pytest.approx(t.ppf((1 + level) / 2, freedom), rel=1e-9)


def test_seed_interval_by_hand():
    interval = seed_interval([1.0, 2.0, 3.0])
    assert interval.mean == 2.0
    assert interval.high - 2.0 == pytest.approx(4.302653 / np.sqrt(3), rel=1e-6)  # t table: 2 degrees, 95 %
    assert 2.0 - interval.low == pytest.approx(interval.high - 2.0)
    assert seed_interval(np.array([0.3, 0.3])).high == 0.3


def test_holm_by_hand_and_order():
    # sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1 is 0.04, 0.06, 0.06, 0.04; running maximum from the left
    np.testing.assert_allclose(holm([0.04, 0.01, 0.03, 0.02]), [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(holm(np.array([0.5, 0.9])), [1.0, 1.0])
    assert holm([]).shape == (0,)


def test_bad_input_is_refused():
    values = np.ones(3)
    for call, message in [
        (lambda: bootstrap_interval(np.array([1.0, np.nan]), seed=0), "1 NaN in 2"),
        (lambda: bootstrap_interval(np.array([1.0, np.inf]), seed=0), "1 infinite"),
        (lambda: bootstrap_interval(values, np.zeros(3), seed=0), "at least 2 users, got 1"),
        (lambda: bootstrap_interval(values, np.zeros(2), seed=0), "one user each"),
        (lambda: bootstrap_ratio(values, -values, seed=0), "denominators must be at least 0"),
        (lambda: bootstrap_ratio(values, np.array([1.0, 0.0, 0.0]), seed=0), "some draws of users"),
        (lambda: paired_difference(values, np.ones(2), seed=0), "b has 2 entries, but 3"),
        (lambda: seed_interval([0.5]), "at least 2 seeds, got 1"),
        (lambda: holm([0.5, 1.5]), "p-values must lie"),
    ]:
        with pytest.raises(DataError, match=message):
            call()
    with pytest.raises(ConfigError, match="level must lie"):
        bootstrap_interval(values, seed=0, level=95)
    with pytest.raises(ConfigError, match="resamples must be at least 1"):
        bootstrap_interval(values, seed=0, resamples=0)
