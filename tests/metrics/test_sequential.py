"""Confidence sequences: against the formula worked by hand, and by watching many experiments at every unit."""

import math

import numpy as np
import pytest

from shortlist.errors import ConfigError, DataError
from shortlist.metrics.intervals import bootstrap_interval
from shortlist.metrics.sequential import (
    LEAST_UNITS,
    chi_square_tail,
    confidence_sequence,
    difference,
    difference_terms,
    mismatch,
    radius,
)

DRAWS = 600
AT_MOST = 0.05 + 2.6 * math.sqrt(0.05 * 0.95 / DRAWS)
"""Share of missed courses that a chance of 5 % exceeds in 1 of 200 tests."""


def test_the_radius_by_hand():
    """t = 400, alpha = 0.05, planned for 1,000: every step written out."""
    rho2 = (-2 * math.log(0.05) + math.log(-2 * math.log(0.05) + 1)) / 1_000
    half = math.sqrt(2 * (400 * rho2 + 1) / (400**2 * rho2) * math.log(math.sqrt(400 * rho2 + 1) / 0.05))
    assert radius(np.array([400]), planned=1_000)[0] == pytest.approx(half)


def test_it_is_tightest_where_it_was_planned():
    """Beside the usual interval of 1.96 / sqrt(t), the sequence is narrowest near the planned number."""
    num = np.arange(100, 20_000)
    widening = radius(num, planned=2_000) * np.sqrt(num)
    assert 1_500 < num[widening.argmin()] < 2_500
    assert 2.5 < widening.min() < 3.5
    assert radius(np.array([2_000]), planned=2_000) < radius(np.array([2_000]), planned=200)


def test_means_are_those_of_the_units_so_far():
    values = np.random.default_rng(0).normal(3, 2, 500)
    course = confidence_sequence(values)
    assert course.mean[199] == pytest.approx(values[:200].mean())
    half = values[:200].std() * radius(np.array([200]))[0]
    assert course.high[199] - course.mean[199] == pytest.approx(half)
    assert np.isinf(course.high[: LEAST_UNITS - 1]).all()
    shifted = confidence_sequence(values + 1e6)
    assert shifted.high[-1] - 1e6 == pytest.approx(course.high[-1], abs=1e-4)


def test_no_interval_before_enough_units_differ():
    """3 of 10,000 are no basis, nor are equal values."""
    rare = np.zeros(10_000)
    rare[[5, 4_000, 8_000]] = 1
    assert np.isinf(confidence_sequence(rare).high).all()
    assert np.isinf(confidence_sequence(np.ones(1_000)).high).all()
    often = (np.arange(10_000) % 100 == 0).astype(float)
    assert np.isfinite(confidence_sequence(often).high[-1])


DRAWN = {
    "normal": lambda rng, n: rng.normal(1, 2, n),
    "rare clicks": lambda rng, n: (rng.random(n) < 0.05).astype(float),
    "heavy spend": lambda rng, n: (rng.random(n) < 0.3) * rng.lognormal(0, 1, n),
}
MEANS = {"normal": 1.0, "rare clicks": 0.05, "heavy spend": 0.3 * math.exp(0.5)}


@pytest.mark.parametrize("name", DRAWN)
def test_one_mean_is_held_at_all_times(name):
    """Looked at after every one of 2,000 units, at most about 5 % of courses ever miss the truth."""
    missed = 0
    for seed in range(DRAWS):
        course = confidence_sequence(DRAWN[name](np.random.default_rng(seed), 2_000), planned=1_000)
        missed += bool(((course.low > MEANS[name]) | (course.high < MEANS[name])).any())
    assert missed / DRAWS <= AT_MOST


@pytest.mark.parametrize("share", [0.5, 0.2])
@pytest.mark.parametrize("name", DRAWN)
def test_no_difference_is_seldom_found_however_often_one_looks(name, share):
    """A/A tests under continuous monitoring: false alarms at most about 5 %."""
    alarms = 0
    for seed in range(DRAWS):
        rng = np.random.default_rng(1_000 + seed)
        course = difference(DRAWN[name](rng, 2_000), rng.random(2_000) < share, share=share, planned=1_000)
        alarms += bool(((course.low > 0) | (course.high < 0)).any())
    assert alarms / DRAWS <= AT_MOST


def test_the_usual_interval_would_alarm_far_more_often():
    """What the sequence is for: 1.96 standard errors, looked at after every unit from the 100th on."""
    alarms = 0
    for seed in range(200):
        values = np.random.default_rng(seed).normal(0, 1, 2_000)
        num = np.arange(1, 2_001)
        alarms += bool((np.abs(values.cumsum() / np.sqrt(num))[99:] > 1.96).any())
    assert alarms / 200 > 0.2


def test_a_real_difference_is_found():
    rng = np.random.default_rng(0)
    treated = rng.random(20_000) < 0.3
    values = (rng.random(20_000) < np.where(treated, 0.15, 0.10)).astype(float)
    course = difference(values, treated, share=0.3)
    assert 0 < course.low[-1] < 0.05 < course.high[-1]
    assert course.mean[-1] == pytest.approx(values[treated].mean() - values[~treated].mean(), abs=0.004)


def test_a_steady_metric_far_from_0_is_known_soon():
    """Milliseconds around 100 that hardly vary: the first units, compared with nothing, must not blur all that follows."""
    rng = np.random.default_rng(0)
    treated = rng.random(600) < 0.5
    course = difference(100 + treated + rng.normal(0, 0.5, 600), treated, planned=500)
    assert 0.8 < course.low[-1] < 1 < course.high[-1] < 1.2
    assert len(course) == 600
    assert np.isinf(course.high[:100]).all()


def test_terms_are_unbiased_given_the_past_by_enumeration():
    """Of four units, over all 16 assignments: the mean of the terms is the difference of the two worlds."""
    if_treated, if_not, share = np.array([1.0, 4, 2, 8]), np.array([0.0, 3, 5, 1]), 0.3
    expected = np.zeros(4)
    for number in range(16):
        treated = np.array([number >> unit & 1 for unit in range(4)], dtype=bool)
        chance = np.where(treated, share, 1 - share).prod()
        expected += chance * difference_terms(np.where(treated, if_treated, if_not), treated, share=share)
    np.testing.assert_allclose(expected, if_treated - if_not)


def test_terms_have_the_variance_of_a_difference_of_means():
    rng = np.random.default_rng(3)
    treated = rng.random(50_000) < 0.2
    values = rng.normal(10, np.where(treated, 2, 1), 50_000)
    terms = difference_terms(values, treated, share=0.2)
    assert terms[1_000:].var() == pytest.approx(4 / 0.2 + 1 / 0.8, rel=0.05)
    inside = bootstrap_interval(terms, seed=0, resamples=200)
    assert inside.low < 0 < inside.high


def test_chi_square_against_tables():
    assert chi_square_tail(3.841459, 1) == pytest.approx(0.05, abs=1e-6)
    assert chi_square_tail(9.487729, 4) == pytest.approx(0.05, abs=1e-6)
    assert chi_square_tail(0.0, 2) == pytest.approx(1.0)
    assert chi_square_tail(4.0, 2) == pytest.approx(math.exp(-2))


def test_mismatch_by_hand():
    found = mismatch(np.repeat([0, 1], [480, 520]), [0.5, 0.5])
    assert found.chi_square == pytest.approx(1.6)
    assert found.p_value == pytest.approx(math.erfc(math.sqrt(0.8)))


def test_a_sequential_mismatch_seldom_alarms_and_finds_what_is_there():
    rng = np.random.default_rng(0)
    alarms = sum(mismatch(rng.choice(3, 3_000, p=[0.5, 0.3, 0.2]), [0.5, 0.3, 0.2]).always_p < 0.05 for _ in range(300))
    assert alarms / 300 <= 0.05
    lost = mismatch((rng.random(20_000) < 0.47).astype(int), [0.5, 0.5])
    assert lost.p_value < 1e-6
    assert lost.always_p < 1e-4


def test_the_bayes_factor_by_hand():
    """Two units of one arm: (a)(a + 1) / (A (A + 1)) over 1/4, with a = 50 of A = 100."""
    factor = (50 * 51) / (100 * 101) / 0.25
    assert mismatch(np.array([0, 0]), [0.5, 0.5]).always_p == pytest.approx(1 / factor)
    assert mismatch(np.zeros(0, dtype=int), [0.5, 0.5]).always_p == 1.0


def test_what_can_not_be_is_refused():
    with pytest.raises(ConfigError, match="alpha"):
        radius(np.array([5]), alpha=1.0)
    with pytest.raises(ConfigError, match="planned"):
        confidence_sequence(np.ones(3), planned=0)
    with pytest.raises(ConfigError, match="share"):
        difference_terms(np.ones(3), np.ones(3), share=1.0)
    with pytest.raises(DataError, match="one entry each"):
        difference_terms(np.ones(3), np.ones(2))
    with pytest.raises(ConfigError, match="add up to 1"):
        mismatch(np.array([0]), [0.5, 0.6])
    with pytest.raises(DataError, match="no share"):
        mismatch(np.array([2]), [0.5, 0.5])
    assert len(confidence_sequence(np.zeros(0))) == 0
    assert len(difference(np.zeros(0), np.zeros(0))) == 0
