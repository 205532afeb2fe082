"""How a campaign's spend is kept to its plan: by one number from 0 to 1, worked out anew for every request.

    plan(t)   = budget x (t - start) / (end - start)                             even over the campaign's time
    factor(t) = 1 + (plan(t) - committed(t)) / (slack x budget), from 0 to 1     1 on or behind plan, 0 when `slack` of the budget ahead
    committed = spent + sum over ads that people still see of price x chance of a click

pacing "bid" multiplies the bid by the factor, so that the cheaper places are still won; the multiplier is that of adaptive pacing (Balseiro
and Gur, "Learning in Repeated Auctions with Budgets", Management Science 2019), here set by the plan and not learned. "throttle" lets the
campaign take part in a share `factor` of the auctions with its whole bid, drawn by request. The rule has no memory of its own: several
servers, and one that was killed, do the same from the same accounts. A campaign that demand left behind its plan takes part fully until it
has caught up.
A campaign without an end has no plan. What can not be overspent is kept by store/campaigns.py, whatever the factor says.

C campaigns; money in micros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shortlist.errors import ConfigError
from shortlist.store.ads import Account, to_micros

Float = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class PacingConfig:
    """How closely spend follows the plan."""

    slack: float = 0.02
    """Share of its budget by which a campaign may be ahead of its plan before it pauses."""

    def __post_init__(self) -> None:
        if not 0 < self.slack <= 1:
            raise ConfigError(f"slack is a share of the budget above 0 and at most 1, got {self.slack}")


def planned_share(start: float | None, end: float | None, now: float) -> float:
    """Share of the budget that the plan has spent by now; 1 for a campaign without an end, which has no plan."""
    if end is None:
        return 1.0
    begins = 0.0 if start is None else start
    return min(max((now - begins) / (end - begins), 0.0), 1.0)


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


def factors_of(accounts: Sequence[Account], now: float, config: PacingConfig) -> Float:
    """[C] of campaigns at a moment; 1 where a campaign wants no pacing or has no plan."""
    paced_C = np.array([a.campaign.pacing != "none" and a.campaign.end is not None for a in accounts], dtype=bool)
    planned_C = np.array([planned_share(a.campaign.start, a.campaign.end, now) for a in accounts], dtype=np.float64)
    committed_C = np.array([a.spent + a.expected for a in accounts], dtype=np.float64)
    budget_C = np.array([to_micros(a.campaign.budget) for a in accounts], dtype=np.float64)
    return np.where(paced_C, factors(planned_C, committed_C, budget_C, config.slack), 1.0)
