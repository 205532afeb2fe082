"""Off-policy estimates on the Open Bandit data: one policy's click rate from the other's log, against what it really had.

`shortlist prove off_policy_bandit` (wants SHORTLIST_DATA); seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import numpy as np
import polars as pl

from _off_policy import Float, Int, estimates, rates
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab, hold_if
from shortlist.metrics import Interval
from shortlist.metrics.off_policy import logged, on_policy

CAMPAIGNS, PLACES = ("all", "men", "women"), 3
ESTIMATORS = ("ips", "clipped", "snips", "dr", "switch")
OTHER = {"random": "bts", "bts": "random"}

CLAIM = Claim(
    name="off_policy_bandit",
    systems=(),
    claim="Estimates of one policy's click rate from the other policy's log agree with the rate that it really had, within what the few "
    "clicks allow.",
    data="Open Bandit small: 10,000 impressions per campaign and policy, 38 to 69 clicks each, so a weak test; no user ids, so impressions "
    "count as independent",
    protocol="As Saito et al. 2021: from the log of one policy (uniform, or Bernoulli Thompson sampling) the click rate of the other, held "
    "against the mean of the other's own log, per campaign. The chance of an impression is that of its item at its place: uniform is 1 / "
    "items; Thompson sampling's, as the judged policy, is its share of impressions at the place in its own log. Reward model: click rates "
    "by item and place of the logging policy's other half. Weights clipped, or left to the model, above 50",
    bar="For every estimator, at least 5 of 6 differences from the on-policy mean lie within 1.96 standard errors of both together",
    published={"Saito et al. 2021": "relative errors of 0.03 to 0.3 on 1,000 times the data, dr and snips mostly below ips"},
)  # fmt: skip


def run(lab: Lab) -> None:
    """Both directions of every campaign."""
    rows = planted() if lab.quick else pl.read_parquet(lab.data_root / "open-bandit-small" / "impressions.parquet")
    for campaign in CAMPAIGNS:
        for policy in OTHER:
            mine = rows.filter((pl.col("campaign") == campaign) & (pl.col("policy") == policy))
            found = estimated(rows.filter(pl.col("campaign") == campaign), policy)
            lab.measure(f"{campaign}: {policy}, on policy", 0, partial(own_rate, mine))
            for name in ESTIMATORS:
                lab.measure(f"{campaign}: {policy} from {OTHER[policy]}, {name}", 0, partial(found.__getitem__, name))


def own_rate(rows: pl.DataFrame) -> dict[str, float | Interval]:
    """Click rate of a policy in its own log."""
    ones = np.ones(rows.height)
    found = on_policy(logged(rows["click"].to_numpy().astype(np.float64), ones, ones))
    return {"click_rate": Interval(found.value, found.low, found.high)}


def estimated(rows: pl.DataFrame, policy: str) -> dict[str, dict[str, float | Interval]]:
    """Every estimator's click rate of `policy` from the other's log of one campaign."""
    log_rows = rows.filter(pl.col("policy") == OTHER[policy])
    num_items = int(rows["item_id"].cast(pl.Int64).max() or 0) + 1  # type: ignore[arg-type]
    present = rows["item_id"].n_unique()
    click, propensity = (log_rows[name].to_numpy().astype(np.float64) for name in ("click", "propensity_score"))
    item_N, place_N = (
        log_rows["item_id"].to_numpy().astype(np.int64),
        log_rows["position"].to_numpy().astype(np.int64) - 1,
    )
    if policy == "random":
        chance_PI = np.full((PLACES, num_items), 1.0 / present)
    else:
        own = rows.filter(pl.col("policy") == policy)
        cell = (own["position"].to_numpy().astype(np.int64) - 1) * num_items + own["item_id"].to_numpy().astype(
            np.int64
        )
        count_PI = np.bincount(cell, minlength=PLACES * num_items).reshape(PLACES, num_items)
        chance_PI = count_PI / count_PI.sum(1, keepdims=True)
    # Each impression is a request of its own, with its place as a part of what is known of it.
    log = logged(click, propensity, chance_PI[place_N, item_N])
    predicted_N, expected_N = modelled(click, place_N, item_N, chance_PI)
    found = estimates(log, predicted_N, expected_N, seed=0, resamples=500)
    return {
        name: {"click_rate": Interval(e.value, e.low, e.high), "effective": e.effective, "most_weight": e.most_weight}
        for name, e in found.items()
    }


def modelled(click: Float, place_N: Int, item_N: Int, chance_PI: Float) -> tuple[Float, Float]:
    """Predicted reward of what was shown, and expected reward of the judged policy, each from the other half of the log."""
    half_N = np.random.default_rng(0).integers(0, 2, len(click))
    predicted_N, expected_N = np.zeros(len(click)), np.zeros(len(click))
    for half in (0, 1):
        mine, other = half_N == half, half_N != half
        rate_PI = rates(click[other], place_N[other], item_N[other], PLACES, chance_PI.shape[1])
        predicted_N[mine] = rate_PI[place_N, item_N][mine]
        expected_N[mine] = (chance_PI * rate_PI).sum(1)[place_N][mine]
    return predicted_N, expected_N


def planted() -> pl.DataFrame:
    """A log in the same form: 10 items with known click rates, one policy uniform, one not."""
    rng = np.random.default_rng(0)
    tables = []
    for campaign in CAMPAIGNS:
        rate_I, prefers_I = rng.uniform(0.02, 0.2, 10), rng.dirichlet(np.full(10, 2.0))
        for policy, chance_I in (("random", np.full(10, 0.1)), ("bts", 0.2 / 10 + 0.8 * prefers_I)):
            item, place = rng.choice(10, 3_000, p=chance_I), rng.integers(1, PLACES + 1, 3_000)
            click = (rng.random(3_000) < rate_I[item] / place).astype(np.int64)
            made = {"item_id": item, "position": place, "click": click, "propensity_score": chance_I[item]}
            tables.append(pl.DataFrame(made).with_columns(policy=pl.lit(policy), campaign=pl.lit(campaign)))
    return pl.concat(tables)


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """How often each estimator agrees with the on-policy mean, and how far it is off."""
    agreed = dict.fromkeys(ESTIMATORS, 0)
    off: dict[str, list[float]] = {name: [] for name in ESTIMATORS}
    for campaign in CAMPAIGNS:
        for policy, other in OTHER.items():
            true = arms[f"{campaign}: {policy}, on policy"].metrics["click_rate"]
            for name in ESTIMATORS:
                guess = arms[f"{campaign}: {policy} from {other}, {name}"].metrics["click_rate"]
                both = math.hypot(guess.high - guess.low, true.high - true.low) / 2
                agreed[name] += abs(guess.mean - true.mean) <= both
                off[name].append(abs(guess.mean - true.mean) / true.mean)
    mean_off = {name: float(np.mean(values)) for name, values in off.items()}
    shown = "; ".join(f"{name} {agreed[name]} of 6 agree, off by {mean_off[name]:.0%}" for name in ESTIMATORS)
    return hold_if(min(agreed.values()) >= 5, f"Means over six: {shown}.")
