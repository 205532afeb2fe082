"""The pacing rule against its closed form, and a day of traffic whose spend it keeps to the plan."""

import numpy as np
import pytest

from ads_support import campaign
from shortlist.cascade.pacing import PacingConfig, factors, factors_of, is_running, planned_share
from shortlist.errors import ConfigError
from shortlist.store.ads import MICROS, Account

NOON = 1_700_000_000.0


def account(spent=0.0, expected=0.0, **more):
    return Account(
        campaign=campaign("c", **more), spent=round(spent * MICROS), reserved=0, expected=round(expected * MICROS)
    )


def test_the_plan_is_even_over_the_campaigns_time():
    assert planned_share(NOON, NOON + 100, NOON + 25) == pytest.approx(0.25)
    assert planned_share(NOON, NOON + 100, NOON - 5) == 0
    assert planned_share(NOON, NOON + 100, NOON + 500) == 1
    assert planned_share(NOON, None, NOON) == 1


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
