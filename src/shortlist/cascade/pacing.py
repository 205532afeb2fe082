"""How a campaign's spend is kept to its plan: by one number from 0 to 1, worked out anew for every request.

    plan(t)   = budget x traffic(start to t) / traffic(start to end)             the share of the campaign's visitors who have come by t
    factor(t) = 1 + (plan(t) - committed(t)) / (slack x budget), from 0 to 1     1 on or behind plan, 0 when `slack` of the budget ahead
    committed = spent + sum over ads that people still see of price x chance of a click

    hour of the day, UTC      0    1    2  ...  20   21   22   23
    shares of the traffic   .02  .01  .01  ... .07  .07  .06  .04      every day alike; all 1/24 make the plan even over time

An even plan holds a campaign back in the busy hours, and in the quiet ones there are too few visitors to catch up with. So the plan follows
the traffic that is expected, which the run's own log tells.

pacing "bid" multiplies the bid by the factor, so that the cheaper places are still won; the multiplier is that of adaptive pacing (Balseiro
and Gur, "Learning in Repeated Auctions with Budgets", Management Science 2019), here set by the plan and not learned. "throttle" lets the
campaign take part in a share `factor` of the auctions with its whole bid, drawn by request. The rule has no memory of its own: several
servers of one run, and one that was killed, do the same from the same accounts. A campaign that demand left behind its plan takes part
fully until it has caught up.
A campaign without an end has no plan. What can not be overspent is kept by store/campaigns.py, whatever the factor says.

C campaigns, N events, H = 24 hours of the day; money in micros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shortlist.data.histories import Int
from shortlist.data.splits import HOURS, time_context
from shortlist.errors import ConfigError
from shortlist.store.ads import Account, to_micros

Float = NDArray[np.float64]
Plan = Literal["traffic", "even"]
HOUR_S, DAY_S = 3_600, 86_400
MIN_DAYS, MIN_HOURS = 3, 4
"""A log of fewer whole days, or with events in fewer of the hours, tells no traffic: times all at midnight are dates."""
NUM_BLOCKS, BLOCK = 1_000, 1_000
"""Of a longer log, so many stretches of so many events are read."""
EVEN: Float = np.full(HOURS, 1 / HOURS)
"""Traffic that is the same at all hours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PacingConfig:
    """What the plan is, and how closely spend follows it."""

    slack: float = 0.02
    """Share of its budget by which a campaign may be ahead of its plan before it pauses."""
    plan: Plan = "traffic"
    """By what a budget is spread over a campaign's time: "traffic" = the visitors who are expected, by the hours of the day in the run's
    log (even where it has no times of day or is shorter than three days); "even" = time alone."""

    def __post_init__(self) -> None:
        if not 0 < self.slack <= 1:
            raise ConfigError(f"slack is a share of the budget above 0 and at most 1, got {self.slack}")
        if self.plan not in ("traffic", "even"):
            raise ConfigError(f"plan {self.plan!r} is unknown; choose from traffic, even")


def hour_shares(time_N: Int) -> Float:
    """[H] shares of the hours of the day (UTC) in times in seconds; they add up to 1, and an event more in every hour keeps all above 0."""
    count_H = 1.0 + np.bincount(time_context(time_N)["hour"] - 1, minlength=HOURS)
    return count_H / count_H.sum()


def traffic_of(time_N: Int) -> Float:
    """[H] shares of traffic by hour of the day that a log's times in seconds tell, in any order; EVEN where they tell nothing.

    The last whole days count, so that each hour is there equally often. Of more than a million events, a million are read, in stretches
    from all over the log.
    """
    if len(time_N) > NUM_BLOCKS * BLOCK:
        first_B = np.linspace(0, len(time_N) - BLOCK, NUM_BLOCKS).astype(np.int64)
        time_N = time_N[first_B[:, None] + np.arange(BLOCK)].ravel()
    if not len(time_N):
        return EVEN
    newest = int(time_N.max())
    num_days = (newest + 1 - int(time_N.min())) // DAY_S
    counted_N = time_N[time_N > newest - num_days * DAY_S]
    if num_days < MIN_DAYS or len(np.unique(counted_N % DAY_S // HOUR_S)) < MIN_HOURS:
        return EVEN
    return hour_shares(counted_N)


def planned_share(start_C: Float, end_C: Float, now: float, traffic_H: Float) -> Float:
    """[C] share of the budget that the plan has spent by now: 0 at the start and before, 1 at the end and after.

    Args:
        start_C: seconds since 1970 UTC.
        end_C: seconds, above the start; infinite = the campaign has no end and so no plan, which gives 1.
        now: seconds.
        traffic_H: shares of the hours of the day, all above 0.
    """
    stop_C = np.where(np.isfinite(end_C), end_C, start_C)
    midnight_C = start_C // DAY_S * DAY_S  # counted from here, a campaign of seconds keeps its digits
    begun_C, done_C, whole_C = (
        _traffic_since_midnight(at_C - midnight_C, traffic_H)
        for at_C in (start_C, np.clip(now, start_C, stop_C), stop_C)
    )
    total_C = whole_C - begun_C
    return np.divide(done_C - begun_C, total_C, out=np.ones_like(total_C), where=total_C > 0)


def _traffic_since_midnight(since_C: Float, traffic_H: Float) -> Float:
    """[C] traffic of as many seconds from a midnight on, in seconds of mean traffic: a straight line within every hour."""
    pace_H = HOURS * traffic_H
    by_hour = np.concatenate([[0.0], np.cumsum(pace_H * HOUR_S)])
    day_C, rest_C = np.divmod(since_C, DAY_S)
    hour_C = (rest_C // HOUR_S).astype(np.int64)
    return day_C * by_hour[-1] + by_hour[hour_C] + (rest_C - hour_C * HOUR_S) * pace_H[hour_C]


def is_running(account: Account, now: float) -> bool:
    """Whether a campaign's time has come and is not over."""
    start, end = account.campaign.start, account.campaign.end
    return (start is None or now >= start) and (end is None or now < end)


def factors(planned_C: Float, committed_C: Float, budget_C: Float, slack: float) -> Float:
    """[C] from 0 to 1; see the head of this file.

    Args:
        planned_C: shares of the budgets.
        committed_C: money.
        budget_C: money; one of 0 gives 0.
        slack: share of the budget.
    """
    ahead_C = committed_C / np.maximum(budget_C, 1.0) - planned_C
    return np.where(budget_C > 0, np.clip(1.0 - ahead_C / slack, 0.0, 1.0), 0.0)


def factors_of(accounts: Sequence[Account], now: float, config: PacingConfig, traffic_H: Float = EVEN) -> Float:
    """[C] of campaigns at a moment; 1 where a campaign wants no pacing or has no plan.

    Args:
        now: seconds since 1970 UTC.
        traffic_H: shares of traffic by hour of the day, for plans that follow it.
    """
    paced_C = np.array([a.campaign.pacing != "none" and a.campaign.end is not None for a in accounts], dtype=bool)
    start_C = np.array([a.campaign.start or 0.0 for a in accounts], dtype=np.float64)
    end_C = np.array([np.inf if a.campaign.end is None else a.campaign.end for a in accounts], dtype=np.float64)
    committed_C = np.array([a.spent + a.expected for a in accounts], dtype=np.float64)
    budget_C = np.array([to_micros(a.campaign.budget) for a in accounts], dtype=np.float64)
    planned_C = planned_share(start_C, end_C, now, traffic_H if config.plan == "traffic" else EVEN)
    return np.where(paced_C, factors(planned_C, committed_C, budget_C, config.slack), 1.0)
