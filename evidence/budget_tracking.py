"""Spending under traffic of 1x, 3x, 1x and another mix of users: near-line prices against yesterday's.

`shortlist prove budget_tracking`; needs no data. R requests, J chains, C resources, U users.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from shortlist.cascade.allocation.base import Budget, ChainSet, Float, NoSettings, Outcomes
from shortlist.cascade.allocation.dcaf import DCAF, DCAFConfig
from shortlist.cascade.allocation.forecast import Last, Linear, LinearConfig
from shortlist.cascade.allocation.prices import PriceConfig, PriceControl
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab
from shortlist.simulation.traffic import Arrivals, Audience, Constant, Diurnal, Rate, Steps, arrive

CLAIM = Claim(
    name="budget_tracking",
    systems=("dcaf", "greenflow", "last", "linear"),
    claim="Near-line prices hold a server to its budget through traffic of 1x, 3x, 1x, another mix of users and chains that cost more "
    "under load, and use it up; yesterday's price overspends.",
    data="Simulated: 4,000 users in two groups, the second one of a tenth of the traffic worth more and in need of more candidates; values "
    "log-normal with a deviation of 1.4; ten chains of 10 to 640 candidates; what a chain brings saturates with its candidates.",
    protocol="DCAF with its linear value model learns on 4,000 requests of the day before and finds its first price there; the same model "
    "in all arms. Poisson arrivals, 10 a second at 1x, in batches of 16; windows of 60 s; a budget of 60 % of the dearest chain for all at "
    "1x. Steps: 3x at once for 50 of 150 windows. Wave: 1x to 3x and back in two hours, twice. The second group's share goes from 0.1 to "
    "0.6 within ten windows late in each trace; measured costs are 15 % above calibration at 3x. All settings are defaults, "
    "chosen after quick runs with seeds 0 and 7; a full run with seeds 1 to 3 overspent by 2.4 %, after which the margin was halved; "
    "judged here with seeds 4 to 6. Hindsight prices every window on its own requests.",
    bar="With either forecast and on both traces: at most 2 % above budget in any 10 windows in a row, and at least 93 % of the budget "
    "used, in every seed, where yesterday's price overspends by more than 20 %.",
    published={"MaRCA, utilisation": {"predictive": 95.29, "feedback": 92.33}, "MaRCA, overshoot": {"predictive": 0.64, "feedback": 2.91}},
)  # fmt: skip
RATE, WINDOW_S, BATCH = 10.0, 60.0, 16
COUNTS = np.round(10 * 64 ** (np.arange(10) / 9)).astype(np.int64)
CHAINS = ChainSet(
    names=tuple(f"a{j}" for j in range(len(COUNTS))),
    stages=("ranking",),
    model_JK=np.zeros((len(COUNTS), 1), dtype=np.int64),
    count_JK=COUNTS[:, None],
    costs_JC=np.stack([1 + 0.2 * COUNTS, 0.4 + 0.012 * COUNTS], 1),
)
CAPACITY = Budget(ms=RATE * 0.6 * float(CHAINS.costs_JC[-1, 1]))
ARMS = ("yesterday's price", "last window", "linear forecast", "linear forecast, no stop", "hindsight")


@dataclass(frozen=True)
class Crowd:
    """Users: two groups, what can be known of each, and their values and depths."""

    group_U: NDArray[np.int64]
    features_UF: NDArray[np.float32]

    @classmethod
    def drawn(cls, rng: np.random.Generator, num_users: int = 4_000) -> Crowd:
        group_U = (np.arange(num_users + 1) % 2).astype(np.int64)
        features_UF = rng.normal(size=(num_users + 1, 6)) + group_U[:, None] * np.array([1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
        return cls(group_U, features_UF.astype(np.float32))

    def asking(self, rate: Rate, end: float, mix: tuple[tuple[float, float], ...], seed: int) -> Arrivals:
        """Requests up to `end`; `mix` = (time, share of the second group)."""
        audience = Audience(
            segment_U=self.group_U,
            weight_U=np.ones(len(self.group_U)),
            at=tuple(time for time, _ in mix),
            shares=tuple((1 - share, share) for _, share in mix),
        )
        return arrive(rate, audience, start=0.0, end=end, seed=seed)

    def rewards_RJ(self, users_R: NDArray[np.int64], rng: np.random.Generator) -> Float:
        """What every chain would bring."""
        x_RF = self.features_UF[users_R].astype(np.float64)
        value_R = np.exp(0.8 * x_RF[:, 0] + 0.6 * x_RF[:, 1] + rng.normal(size=len(users_R)))
        depth_R = 60 * np.exp(0.6 * x_RF[:, 2] + 0.3 * x_RF[:, 3])
        return value_R[:, None] * (1 - np.exp(-COUNTS / depth_R[:, None]))


@dataclass(frozen=True)
class Day:
    """A trace, window by window."""

    contexts: list[NDArray[np.float32]]
    rewards: list[Float]
    bias_W: Float
    """What chains cost in each window against their calibration."""


def run(lab: Lab) -> None:
    if not lab.quick:
        lab.seeds = (4, 5, 6)  # settings were chosen after runs with seeds 0 to 3
    for seed in lab.seeds:
        rng = np.random.default_rng(seed)
        crowd = Crowd.drawn(rng)
        learned = yesterday(crowd, rng, seed)
        for trace in ("steps", "wave"):
            day = today(crowd, trace, rng, seed, quick=lab.quick)
            for arm in ARMS:
                lab.measure(f"{trace}: {arm}", seed, partial(served, arm, day, learned))


def yesterday(crowd: Crowd, rng: np.random.Generator, seed: int) -> Outcomes:
    """Requests of a calm day, all chains replayed."""
    users_R = crowd.asking(Constant(per_second=RATE), 400.0, ((0.0, 0.1),), 1_000 + seed).user
    return Outcomes(
        contexts_RF=crowd.features_UF[users_R],
        rewards_RJ=crowd.rewards_RJ(users_R, rng),
        users_R=users_R,
        times_R=np.zeros_like(users_R),
    )


def today(crowd: Crowd, trace: str, rng: np.random.Generator, seed: int, *, quick: bool) -> Day:
    """1x, 3x, 1x, then other users."""
    if trace == "steps":
        num_windows = 45 if quick else 150
        begins = (0.0, num_windows / 5 * WINDOW_S, num_windows / 5 * 2.67 * WINDOW_S)
        rate: Rate = Steps(per_second=RATE, at=begins, factors=(1.0, 3.0, 1.0))
    else:
        num_windows = 48 if quick else 240
        period = num_windows / (1 if quick else 2) * WINDOW_S
        rate = Diurnal(per_second=2 * RATE, swing=0.5, period_s=period, peak_at_s=period / 2)
    end, turn = num_windows * WINDOW_S, 0.7 * num_windows * WINDOW_S
    arrivals = crowd.asking(rate, end, ((0.0, 0.1), (turn, 0.1), (turn + 10 * WINDOW_S, 0.6)), seed)
    parts = np.split(np.arange(len(arrivals)), np.searchsorted(arrivals.time, np.arange(1, num_windows) * WINDOW_S))
    middles_W: Float = (np.arange(num_windows) + 0.5) * WINDOW_S
    return Day(
        contexts=[crowd.features_UF[arrivals.user[part]] for part in parts],
        rewards=[crowd.rewards_RJ(arrivals.user[part], rng) for part in parts],
        bias_W=1 + 0.15 * (rate.rates(middles_W) / RATE - 1) / 2,
    )


def served(arm: str, day: Day, learned: Outcomes) -> dict[str, float]:
    """One trace under one way to find prices: overspending, use of the budget, and value."""
    allocator = DCAF(DCAFConfig(floor=0.0), CHAINS, learned.contexts_RF.shape[1])
    allocator.fit(learned)
    forecaster = Last(NoSettings()) if arm == "last window" else Linear(LinearConfig())
    settings = PriceConfig(window_seconds=WINDOW_S, margin=1e9 if "no stop" in arm else PriceConfig().margin)
    control = PriceControl(allocator, CAPACITY, forecaster, settings)
    control.start(learned.contexts_RF, RATE)
    near_line, rng = arm not in ("yesterday's price", "hindsight"), np.random.default_rng(0)
    spent_W, value, stopped = np.zeros(len(day.contexts)), 0.0, 0
    for number, (contexts_RF, rewards_RJ) in enumerate(zip(day.contexts, day.rewards)):
        began = number * WINDOW_S
        if arm == "hindsight":
            limit = float(CAPACITY.limits_C[1]) * WINDOW_S / len(contexts_RF) / day.bias_W[number]
            allocator.aim(Budget(ms=limit), contexts_RF)
        for at in range(0, len(contexts_RF), BATCH):
            part_RF = contexts_RF[at : at + BATCH]
            most_C = control.most_C(began + WINDOW_S * at / len(contexts_RF)) if near_line else None
            chain_R = allocator.choose(part_RF, most_C=most_C, rng=rng).chain_R
            cost_C = CHAINS.costs_JC[chain_R].sum(0) * day.bias_W[number]
            if near_line:
                control.note(part_RF, chain_R, cost_C)
            spent_W[number] += cost_C[1]
            value += float(rewards_RJ[np.arange(at, at + len(part_RF)), chain_R].sum())
        if near_line:
            stopped += control.close(began + WINDOW_S).stopped
    budget = float(CAPACITY.limits_C[1]) * WINDOW_S
    tens = np.convolve(spent_W, np.ones(10), "valid") / (10 * budget)
    return {
        "overspend_10": float(tens.max() - 1),
        "utilisation": float(spent_W.sum() / (budget * len(spent_W))),
        "worst_window": float(spent_W.max() / budget - 1),
        "value_per_request": value / sum(map(len, day.contexts)),
        "stopped": stopped / len(spent_W),
    }


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bar in every seed, and what prices cost in value."""
    met, told = True, []
    for trace in ("steps", "wave"):
        of = {arm: arms[f"{trace}: {arm}"] for arm in ARMS}
        fixed = min(of["yesterday's price"].per_seed["overspend_10"])
        met &= fixed > 0.2
        told.append(f"{trace}: yesterday's price overspends by {fixed:.1%} at least")
        best = of["hindsight"].metrics["value_per_request"].mean
        for arm in ARMS[1:4]:
            over, used = max(of[arm].per_seed["overspend_10"]), min(of[arm].per_seed["utilisation"])
            if "no stop" not in arm:
                met &= over <= 0.02 and used >= 0.93
            kept = of[arm].metrics["value_per_request"].mean / best
            told.append(
                f"{arm} {max(over, 0):.2%} at most with {used:.1%} of the budget used, {kept:.1%} of the value of hindsight and "
                f"{of[arm].metrics['stopped'].mean:.1%} of windows stopped"
            )
    return Judgement("holds" if met else "fails", "; ".join(told) + ".")
