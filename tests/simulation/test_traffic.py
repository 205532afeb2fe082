"""Arrivals are Poisson with the rate as told: integrals and bounds of the rates, counts over many seeds, shape within a window."""

import math

import numpy as np
import pytest

from shortlist.errors import ConfigError
from shortlist.simulation import Audience, Constant, Diurnal, Spikes, Steps, Sum, arrive

RATES = {
    "constant": Constant(per_second=0.7),
    "diurnal": Diurnal(per_second=0.5, swing=0.9, peak_at_s=30.0, period_s=80.0),
    "steps": Steps(per_second=0.25, at=(0.0, 40.0, 60.0), factors=(1.0, 8.0, 1.0)),
    "dip": Steps(per_second=1.0, at=(50.0, 100.0), factors=(3.0, 0.0)),
    "spikes": Spikes(per_second=4.0, at=(-5.0, 33.0, 70.0), decay_s=6.0),
    "sum": Sum(
        parts=(Constant(per_second=0.1), Steps(per_second=0.3, at=(0.0, 60.0), factors=(1.0, 3.0)), Spikes(per_second=2.0, at=(20.0,)))
    ),
}  # fmt: skip
EVERYBODY = Audience(segment_U=np.zeros(4, dtype=np.int64), weight_U=np.array([0.0, 1, 1, 2]))


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("window", [(0.0, 120.0), (-20.0, 45.0), (61.0, 62.0)])
def test_integral_and_bound_are_those_of_the_rate(name, window):
    rate, (start, end) = RATES[name], window
    middle = start + (np.arange(400_000) + 0.5) * (end - start) / 400_000
    values = rate.rates(middle)
    assert rate.total(start, end) == pytest.approx(values.mean() * (end - start), rel=1e-3, abs=1e-3)
    assert values.max() <= rate.most(start, end) * (1 + 1e-12)
    assert (values >= 0).all()


def test_rates_at_known_moments():
    assert RATES["steps"].rates(np.array([-9.0, 0, 39.9, 40, 59, 60, 999])).tolist() == [
        0.25,
        0.25,
        0.25,
        2,
        2,
        0.25,
        0.25,
    ]
    assert RATES["steps"].total(0, 120) == pytest.approx(0.25 * (40 + 8 * 20 + 60))
    day = Diurnal(per_second=10.0, swing=0.6, peak_at_s=20 * 3_600)
    assert day.rates(np.array([20 * 3_600.0, 44 * 3_600.0, 8 * 3_600.0, 14 * 3_600.0])) == pytest.approx(
        [16, 16, 4, 10]
    )
    assert day.total(5, 5 + 86_400) == pytest.approx(864_000)
    assert RATES["spikes"].rates(np.array([33.0, 33 + 6.0])) == pytest.approx(
        [4 + 4 * math.exp(-38 / 6), 4 / math.e + 4 * math.exp(-44 / 6)]
    )


@pytest.mark.parametrize("name", RATES)
def test_counts_have_the_mean_and_variance_of_poisson(name):
    """Over 600 seeds: the mean within 4 of its standard errors, variance / mean within 4 of sqrt(2 / 599)."""
    counts = np.array([len(arrive(RATES[name], EVERYBODY, start=0, end=120, seed=s)) for s in range(600)])
    total = RATES[name].total(0, 120)
    assert abs(counts.mean() - total) < 4 * math.sqrt(total / 600)
    assert abs(counts.var(ddof=1) / total - 1) < 4 * math.sqrt(2 / 599 + 1 / total / 600)


@pytest.mark.parametrize("name", RATES)
def test_times_follow_the_rate(name):
    """Chi-square of 24 bins given the number of arrivals; 23 degrees of freedom, p < 0.0002 above 55."""
    rate, num = RATES[name], 30_000
    time = arrive(rate, EVERYBODY, start=0, end=120, seed=3, count=num).time
    assert len(time) == num
    assert (np.diff(time) >= 0).all()
    assert time[0] >= 0
    assert time[-1] < 120
    expected = num * np.array([rate.total(5 * b, 5 * b + 5) for b in range(24)]) / rate.total(0, 120)
    found = np.histogram(time, 24, (0, 120))[0]
    filled = expected > 0
    assert not found[~filled].any()
    assert ((found - expected)[filled] ** 2 / expected[filled]).sum() < 55


def test_gaps_of_a_constant_rate_are_exponential():
    gaps = np.diff(arrive(Constant(per_second=5.0), EVERYBODY, start=0, end=8_000, seed=0).time)
    assert gaps.mean() == pytest.approx(0.2, rel=0.02)
    assert np.quantile(gaps, 0.5) == pytest.approx(0.2 * math.log(2), rel=0.04)
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 4 / math.sqrt(len(gaps))


def test_the_same_seed_gives_the_same_arrivals():
    one, two, three = (arrive(RATES["sum"], EVERYBODY, start=0, end=900, seed=s) for s in (4, 4, 5))
    assert np.array_equal(one.time, two.time)
    assert np.array_equal(one.user, two.user)
    assert len(one) != len(three) or not np.array_equal(one.time, three.time)


def test_users_come_by_weight_within_their_segment():
    audience = Audience(
        segment_U=np.array([0, 1, 0, 1, 0, 1]), weight_U=np.array([0.0, 3, 1, 0, 3, 1]), shares=((0.25, 0.75),)
    )
    users = audience.draw(np.zeros(40_000), np.random.default_rng(0))
    share = np.bincount(users, minlength=6) / 40_000
    wanted = np.array([0, 0.75 * 0.75, 0.25 * 0.25, 0, 0.25 * 0.75, 0.75 * 0.25])
    assert (np.abs(share - wanted) <= 4 * np.sqrt(wanted * (1 - wanted) / 40_000)).all()


def test_the_mix_shifts_in_a_straight_line():
    audience = Audience.by_activity(
        np.array([0, 5, 1, 9, 2]), 2, at=(0.0, 10.0, 20.0), shares=((0.8, 0.2), (0.8, 0.2), (0.2, 0.8))
    )
    assert audience.segment_U[1:].tolist() == [1, 0, 1, 0], "users 2 and 4 are the less active half"
    assert audience.mix(np.array([-5.0, 10, 15, 20, 99]))[:, 1] == pytest.approx([0.2, 0.2, 0.5, 0.8, 0.8])
    arrivals = arrive(Constant(per_second=2_000.0), audience, start=0, end=20, seed=1)
    segment = audience.segment_U[arrivals.user]
    for start, end, share in ((0, 10, 0.2), (10, 20, 0.5), (19, 20, 0.77)):
        inside = segment[(arrivals.time >= start) & (arrivals.time < end)]
        assert abs(inside.mean() - share) < 4 * math.sqrt(share * (1 - share) / len(inside))


def test_by_default_everybody_asks_as_often_as_in_the_log():
    events = np.array([0, 6, 1, 0, 3])
    users = Audience.by_activity(events, 3).draw(np.zeros(40_000), np.random.default_rng(2))
    share, wanted = np.bincount(users, minlength=5) / 40_000, events / events.sum()
    assert (np.abs(share - wanted) <= 4 * np.sqrt(wanted * (1 - wanted) / 40_000)).all()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Constant(per_second=-1.0),
        lambda: Diurnal(per_second=1.0, swing=1.5),
        lambda: Steps(per_second=1.0, at=(0.0, 0.0), factors=(1.0, 2.0)),
        lambda: Steps(per_second=1.0, at=(0.0,), factors=(1.0, 2.0)),
        lambda: Spikes(per_second=1.0, at=(0.0,), decay_s=0.0),
        lambda: Sum(parts=()),
        lambda: Audience(segment_U=np.zeros(2, dtype=np.int64), weight_U=np.ones(2), shares=((0.5, 0.5),)),
        lambda: Audience(segment_U=np.ones(2, dtype=np.int64), weight_U=np.ones(2)),
        lambda: Audience(segment_U=np.zeros(2, dtype=np.int64), weight_U=np.ones(2), shares=((0.5,),)),
        lambda: Audience(segment_U=np.zeros(2, dtype=np.int64), weight_U=-np.ones(2)),
        lambda: arrive(Constant(per_second=1.0), EVERYBODY, start=5, end=5, seed=0),
        lambda: arrive(Constant(per_second=0.0), EVERYBODY, start=0, end=5, seed=0, count=3),
    ],
)
def test_what_makes_no_traffic_is_refused(wrong):
    with pytest.raises(ConfigError):
        wrong()


def test_no_rate_brings_nobody():
    assert len(arrive(Constant(per_second=0.0), EVERYBODY, start=0, end=5, seed=0)) == 0
