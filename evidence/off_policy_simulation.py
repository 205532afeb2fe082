"""Off-policy estimates where the truth is known: bias, error and coverage of their intervals over many simulated logs.

`shortlist prove off_policy_simulation`; needs no data; three to four minutes on one core. R requests, K places, n items, U users.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import polars as pl

from _off_policy import Float, Int, estimates, rates
from shortlist.data.datasets import load
from shortlist.data.log import read
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab, hold_if
from shortlist.metrics.off_policy import logged, on_policy
from shortlist.simulation import Policy, World, WorldConfig, best, popular

NUM_ITEMS, PLACES, REQUESTS, LOGS = 40, 5, 4_000, 250
WANTED = 0.2
"""Share of random pages of the policy that is judged."""
EXPLORED = (0.5, 0.1)
"""Shares of random pages of the logging policy: much in common with the other, and little."""
JUDGED = ("ips", "snips", "dr")

CLAIM = Claim(
    name="off_policy_simulation",
    systems=(),
    claim="From a log with propensities, IPS and doubly robust estimates of another policy's clicks are unbiased and their 95 % intervals "
    "hold the truth, as do SNIPS'; doubly robust errs no more than IPS; the log's own click rate is no answer.",
    data="simulated: worlds over the 40 most frequent items of the built-in demo log, position-based clicks at 5 places, one per seed",
    protocol=f"Logging: the most popular items, with a share of random pages of {EXPLORED[0]} or {EXPLORED[1]}. Judged: the world's best "
    f"pages by clicks, with {WANTED} random pages. Truth: World.value_of over all users, exact. {LOGS} logs of {REQUESTS:,} requests by "
    "users drawn as often as they occur; intervals over users, by closed form and by bootstrap (200 draws). Reward model of dr and "
    "switch: click rates by item and place of the other half of the users. Three seeds, each another world",
    bar=f"At a share of {EXPLORED[0]}: bias of ips and dr within 3.5 standard errors of the simulation; closed-form 95 % intervals of ips, "
    "snips and dr hold the truth in at least 92 % of logs in every world; root mean squared error of dr at most that of ips; the "
    "log's own mean is off by at least three times dr's error",
)  # fmt: skip


def run(lab: Lab) -> None:
    """Every share of exploration in every world."""
    requests, logs = (500, 30) if lab.quick else (REQUESTS, LOGS)
    for seed in lab.seeds:
        world = made_world(seed)
        for explore in EXPLORED:
            found = Repeated(world, explore, requests=requests, logs=logs, seed=seed)
            for name in ("on-policy", "ips", "clipped", "snips", "dr", "switch"):
                lab.measure(f"simulated, {explore:g} explored: {name}", seed, partial(found.metrics, name))


def made_world(seed: int) -> World:
    """A world over the most frequent items."""
    log = load("builtin")
    top = log.events["item_id"].value_counts(sort=True).head(NUM_ITEMS)["item_id"]
    events = log.events.filter(pl.col("item_id").is_in(top.implode())).select("user_id", "item_id", "timestamp")
    return World.from_log(read(events), WorldConfig(seed=seed, attraction=0.15))


class Repeated:
    """Many logs of one policy, and what every estimator makes of each; worked out once, when first asked for."""

    def __init__(self, world: World, explore: float, *, requests: int, logs: int, seed: int) -> None:
        self.world, self.requests, self.logs, self.seed = world, requests, logs, seed
        self.logging = popular(world, PLACES, explore=explore)
        self.target = best(world, PLACES, aim="clicks", explore=WANTED)
        everyone = np.arange(world.num_users + 1)
        times = np.full(len(everyone), float(world.start))
        self.share_U = world.events_U / world.events_U.sum()
        self.truth = float(self.share_U @ world.value_of(self.target, everyone, times, "clicks"))
        self.wanted_UK = self.target.pages_of(everyone, times)
        self._found: dict[str, list[tuple[float, bool, bool, float]]] = {}

    def metrics(self, name: str) -> dict[str, float]:
        """Bias, error and coverage of one estimator over the logs; bias and error as shares of the truth."""
        if not self._found:
            for number in range(self.logs):
                self._one(np.random.default_rng([self.seed, number]))
        value, held, drawn_held, effective = np.array(self._found[name], dtype=np.float64).T
        wrong = (value - self.truth) / self.truth
        return {
            "bias": float(wrong.mean()),
            "bias_in_errors": float(wrong.mean() / (wrong.std(ddof=1) / np.sqrt(len(wrong)))),
            "rmse": float(np.sqrt((wrong**2).mean())),
            "coverage": float(held.mean()),
            "coverage_bootstrap": float(drawn_held.mean()),
            "effective_share": float(effective.mean()) / (self.requests * PLACES),
        }

    def _one(self, rng: np.random.Generator) -> None:
        """One log, and every estimate from it."""
        users = rng.choice(len(self.share_U), self.requests, p=self.share_U)
        times = np.full(len(users), float(self.world.start))
        shown = self.logging.show(users, times, self.world.num_items, rng)
        clicks = self.world.respond(users, shown.pages, times, rng).clicks.astype(np.float64).ravel()
        item_N, place_N = shown.pages.ravel(), np.tile(np.arange(PLACES), len(users))
        wanted_RK = self.wanted_UK[users]
        chance_N = chances(self.target, shown.pages, wanted_RK, self.world.num_items).ravel()
        request_N = np.arange(len(users)).repeat(PLACES)
        log = logged(
            clicks, shown.propensity.ravel(), chance_N, requests=request_N, places=place_N, users=users[request_N]
        )
        predicted_N, expected_N = self._model(clicks, place_N, item_N, wanted_RK, users[request_N] % 2)
        found = dict(estimates(log, predicted_N, expected_N, seed=0, resamples=200))
        found["on-policy"] = on_policy(log, resamples=200)
        for name, e in found.items():
            row = (e.value, e.low <= self.truth <= e.high, e.drawn_low <= self.truth <= e.drawn_high, e.effective)
            self._found.setdefault(name, []).append(row)

    def _model(self, clicks: Float, place_N: Int, item_N: Int, wanted_RK: Int, half_N: Int) -> tuple[Float, Float]:
        """Predicted reward of what was shown, and expected reward of the judged policy, each from the other half of the users."""
        predicted_N, expected_N = np.zeros(len(clicks)), np.zeros(len(clicks))
        for half in (0, 1):
            mine, other = half_N == half, half_N != half
            rate_PI = rates(clicks[other], place_N[other], item_N[other] - 1, PLACES, self.world.num_items)
            own = rate_PI[place_N, wanted_RK.ravel() - 1]
            expected = (1 - WANTED) * own + WANTED * rate_PI.mean(1)[place_N]
            predicted_N[mine], expected_N[mine] = rate_PI[place_N, item_N - 1][mine], expected[mine]
        return predicted_N, expected_N


def chances(policy: Policy, shown_RK: Int, own_RK: Int, num_items: int) -> Float:
    """[R, K] chance with which a policy shows just these items at just these places."""
    found: Float = policy.explore / num_items + (1 - policy.explore) * (shown_RK == own_RK)
    return found


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bar where there is overlap; what happens with little of it is told."""

    def of(explore: float, name: str, metric: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.array(arms[f"simulated, {explore:g} explored: {name}"].per_seed[metric])

    much, little = EXPLORED
    unbiased = max(np.abs(of(much, name, "bias_in_errors")).max() for name in ("ips", "dr"))
    covered = min(of(much, name, "coverage").min() for name in JUDGED)
    rmse = {name: float(of(much, name, "rmse").mean()) for name in (*JUDGED, "clipped", "switch")}
    own = float(np.abs(of(much, "on-policy", "bias")).min())
    holds = unbiased <= 3.5 and covered >= 0.92 and rmse["dr"] <= rmse["ips"] and own >= 3 * rmse["dr"]
    errors = ", ".join(f"{name} {value:.1%}" for name, value in rmse.items())
    thin = ", ".join(
        f"{name} {of(little, name, 'rmse').mean():.0%} error, {of(little, name, 'coverage').mean():.0%} covered"
        for name in JUDGED
    )
    return hold_if(
        bool(holds),
        f"Simulated. {much:g} explored: largest bias of ips and dr {unbiased:.1f} standard errors; least coverage {covered:.1%}; errors "
        f"{errors}; the log's own mean is off by {own:.0%} or more. {little:g} explored, effective share "
        f"{of(little, 'ips', 'effective_share').mean():.1%}: {thin}.",
    )
