"""The pacing rule against its closed form, the plan against a sum over minutes, and a day of traffic whose spend it keeps to the plan."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ads_support import campaign
from shortlist.cascade.pacing import (
    EVEN,
    PacingConfig,
    factors,
    factors_of,
    hour_shares,
    is_running,
    planned_share,
    traffic_of,
)
from shortlist.errors import ConfigError
from shortlist.store.ads import MICROS, Account

NOON = 1_700_000_000.0


def account(spent=0.0, expected=0.0, **more):
    return Account(
        campaign=campaign("c", **more), spent=round(spent * MICROS), reserved=0, expected=round(expected * MICROS)
    )


HOUR, DAY = 3_600, 86_400
MIDNIGHT = 19_676 * DAY
"""Of some day, UTC."""
EVENING = np.array([1.0] * 17 + [5, 8, 9, 9, 6, 3, 2]) / 59.0
"""Shares of an audience that comes after work."""

shares = st.lists(st.floats(0.001, 10.0), min_size=24, max_size=24).map(lambda given: np.array(given) / sum(given))
minutes = st.integers(0, 4 * 24 * 60)
lengths = st.one_of(st.integers(1, 90), st.integers(1, 6 * 24 * 60))


def planned(start, end, now, traffic=EVEN):
    return float(planned_share(np.array([start], float), np.array([end], float), now, traffic)[0])


def test_an_even_plan_is_a_straight_line():
    assert planned(NOON, NOON + 100, NOON + 25) == pytest.approx(0.25)
    assert planned(NOON, NOON + 100, NOON - 5) == 0
    assert planned(NOON, NOON + 100, NOON + 500) == 1
    assert planned(NOON, np.inf, NOON) == 1


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 4e9), st.floats(1, 3e7), st.floats(-0.2, 1.2))
def test_with_the_same_traffic_at_all_hours_the_plan_is_the_share_of_time(start, length, part):
    """The formula of a plan by time alone."""
    end, now = start + length, start + part * length
    expected = min(max((now - start) / (end - start), 0.0), 1.0)
    assert planned(start, end, now) == pytest.approx(expected, abs=1e-11)


def by_minutes(start, end, now, traffic):
    """The plan as a sum over minutes; times in minutes after midnight."""
    each = [traffic[minute // 60 % 24] for minute in range(start, end)]
    return sum(each[: max(now - start, 0)]) / sum(each)


@settings(max_examples=200, deadline=None)
@given(shares, st.lists(st.tuples(minutes, lengths), min_size=1, max_size=5), minutes)
def test_the_plan_is_the_share_of_visitors_who_have_come(traffic, times, now):
    """Campaigns of minutes and of days, over midnights, all at once."""
    start, end = np.array([(start, start + length) for start, length in times]).T
    found = planned_share(MIDNIGHT + start * 60.0, MIDNIGHT + end * 60.0, MIDNIGHT + now * 60.0, traffic)
    expected = [by_minutes(begins, ends, now, traffic) for begins, ends in zip(start.tolist(), end.tolist())]
    assert found == pytest.approx(expected, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(shares, st.floats(0, 4e9), st.floats(30, 3e7))
def test_the_plan_goes_from_nothing_to_all_and_never_back(traffic, start, length):
    end = start + length
    found = [planned(start, end, now, traffic) for now in np.linspace(start, end, 60)]
    assert found[0] == planned(start, end, start - DAY, traffic) == 0
    assert planned(start, end, end, traffic) == planned(start, end, end + DAY, traffic) == 1
    assert np.diff(found).min() >= -1e-12


def test_within_one_hour_the_plan_is_a_straight_line_whatever_the_traffic():
    """Even in an hour in which hardly anybody comes, and in seconds."""
    traffic = hour_shares(np.full(10**6, MIDNIGHT + 20 * HOUR))
    for start, length in ((MIDNIGHT + 3 * HOUR + 600, 1_800), (MIDNIGHT + 20 * HOUR, HOUR), (MIDNIGHT + 3 * HOUR, 5)):
        for part in (0.1, 0.5, 0.9):
            assert planned(start, start + length, start + part * length, traffic) == pytest.approx(part, abs=1e-4)


def test_a_plan_of_months_is_nearly_a_straight_line_with_a_wave_in_it():
    end = MIDNIGHT + 90 * DAY
    for days in (1, 30, 89):
        assert planned(MIDNIGHT, end, MIDNIGHT + days * DAY, EVENING) == pytest.approx(days / 90)
        before_work = planned(MIDNIGHT, end, MIDNIGHT + days * DAY + 17 * HOUR, EVENING)
        assert before_work == pytest.approx((days + 17 / 59) / 90)


def test_hours_of_a_log_become_shares():
    """Three events at one o'clock and one at the end of the day, a day later, with one more in every hour."""
    found = hour_shares(np.array([HOUR, HOUR + 1, 2 * HOUR - 1, 2 * DAY - 1]))
    assert found == pytest.approx(np.array([1, 4, *[1] * 21, 2]) / 28)


def times_of(num_days, shares=EVENING, each=590, start=MIDNIGHT, seed=0):
    """Events of whole days, each hour's number by its share, in no order."""
    rng = np.random.default_rng(seed)
    hour_D = np.repeat(np.arange(24), np.rint(shares * each).astype(int))
    times = start + np.arange(num_days)[:, None] * DAY + hour_D * HOUR
    return rng.permutation((times + rng.integers(0, HOUR, times.shape)).ravel())


def test_a_log_tells_its_traffic_by_its_last_whole_days():
    times = np.append(times_of(5), [MIDNIGHT, MIDNIGHT + 5 * DAY - 1])
    assert traffic_of(times) == pytest.approx(EVENING, abs=0.005)
    mornings = MIDNIGHT - np.arange(1, 10_000) % (12 * HOUR) - 12 * HOUR - 1  # of the half day before
    assert traffic_of(np.append(mornings, times)) == pytest.approx(EVENING, abs=0.005)


def test_stretches_of_a_long_log_tell_what_all_of_it_does():
    """Users one after the other, each with all their times."""
    times = np.concatenate([times_of(6, each=59, seed=seed) for seed in range(6_000)])
    assert len(times) > 2_000_000
    assert traffic_of(times) == pytest.approx(EVENING, abs=0.001)
    assert (traffic_of(times) == traffic_of(times)).all()


@pytest.mark.parametrize(
    "times",
    [
        np.zeros(0, dtype=np.int64),
        times_of(2),
        MIDNIGHT + np.arange(400) * DAY,
        MIDNIGHT + np.arange(400) * DAY - np.arange(400) % 2 * HOUR,
    ],
    ids=["empty", "two days", "dates", "dates with summer time"],
)
def test_a_log_that_tells_no_traffic_gives_the_even_plan(times):
    assert traffic_of(times) is EVEN


def test_the_factor_falls_from_one_to_nothing_over_the_slack():
    """Planned a quarter of 1,000; at 250 it is 1, at 260 half, at 270 and beyond nothing, behind the plan no more than 1."""
    committed = np.array([0.0, 250.0, 260.0, 265.0, 270.0, 900.0])
    found = factors(np.full(6, 0.25), committed, np.full(6, 1_000.0), 0.02)
    assert found == pytest.approx([1, 1, 0.5, 0.25, 0, 0])
    assert factors(np.array([0.5]), np.array([0.0]), np.array([0.0]), 0.02) == 0


def test_expected_clicks_count_as_spent_and_who_has_no_plan_is_not_paced():
    plan = {"budget": 1_000.0, "start": NOON, "end": NOON + 100}
    accounts = [
        account(spent=250, expected=10, **plan),
        account(spent=900, pacing="none", **plan),
        account(spent=900, budget=1_000.0),
    ]
    assert factors_of(accounts, NOON + 25, PacingConfig()) == pytest.approx([0.5, 1, 1])
    assert factors_of([], NOON, PacingConfig()).shape == (0,)


def test_plans_follow_the_traffic_unless_they_are_to_be_even():
    """At noon of its day 12 of 59 visitors have come, where half of the time is over."""
    plan = {"budget": 1_000.0, "start": MIDNIGHT, "end": MIDNIGHT + DAY}
    accounts = [account(spent=1_000 * 12 / 59 + 5, **plan), account(spent=505, **plan)]
    now = MIDNIGHT + 12 * HOUR
    assert factors_of(accounts, now, PacingConfig(), EVENING) == pytest.approx([0.75, 0])
    assert factors_of(accounts, now, PacingConfig(plan="even"), EVENING) == pytest.approx([1, 0.75])
    assert factors_of(accounts, now, PacingConfig()) == pytest.approx([1, 0.75])


def test_a_campaign_runs_from_its_start_to_before_its_end():
    timed = account(start=NOON, end=NOON + 100)
    assert [is_running(timed, NOON + s) for s in (-1, 0, 99, 100)] == [False, True, True, False]
    assert is_running(account(), NOON)


@pytest.mark.parametrize("kind", ["bid", "throttle"])
def test_spend_follows_the_plan_through_a_burst(kind):
    """A day in 2,000 auctions, half of them in its second tenth, against market prices: spend is never more than the slack ahead (and the
    last click), and the budget is used."""
    rng = np.random.default_rng(0)
    times = np.sort(np.concatenate([rng.uniform(0, 1, 1_000), rng.uniform(0.1, 0.2, 1_000)]))
    budget, spent, ahead = 100.0, 0.0, []
    for now, market, lot in zip(times, rng.lognormal(-1, 0.5, 2_000), rng.random(2_000)):
        factor = factors(np.array([now]), np.array([spent]), np.array([budget]), 0.02)[0]
        bid = 1.0 * factor if kind == "bid" else 1.0 * (lot < factor)
        if bid >= market and spent + market <= budget:
            spent += market
            ahead.append(spent / budget - now)
    assert max(ahead) <= 0.02 + 1.0 / budget
    assert spent >= 0.97 * budget


def test_slack_is_a_share():
    for wrong in (0.0, -0.1, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="slack is a share"):
            PacingConfig(slack=wrong)


def test_plans_have_names():
    with pytest.raises(ConfigError, match="plan 'fast' is unknown; choose from traffic, even"):
        PacingConfig(plan="fast")
