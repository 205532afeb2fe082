"""What another policy would have brought, from the log of one that drew by chance and wrote its chances down.

    ips      mean over requests of  sum_k w_k r_k,   w_k = target chance / logged chance of the item shown at place k
    snips    sum_k [ sum_i w_ik r_ik / sum_i w_ik ]:  the weights of a place divided by their sum in place of their expectation
    dr       mean over requests of  sum_k [ E_target q_k + w_k (r_k - q_k) ],   q a model of the reward
    clipped  as ips, with min(w, most): less variance, a bias towards 0
    switch   as dr, with w = 0 above a threshold: where the log says little, the model alone speaks

A row is one item that was shown at one place. For pages the chances are those of *this item at this place*, whatever stands around it:
the item-position assumption, under which the reward of a place depends on the request, the item and the place alone. A single action
is a page of one place. Target and logging policy fill the same places of a request.

Sources: Horvitz and Thompson (1952) for ips; Swaminathan and Joachims, "The Self-Normalized Estimator for Counterfactual Learning"
(NeurIPS 2015); Dudik, Langford and Li, "Doubly Robust Policy Evaluation and Learning" (ICML 2011); Wang, Agarwal and Dudik, "Optimal and
Adaptive Off-policy Evaluation in Contextual Bandits" (ICML 2017) for switch; Li et al., "Offline Evaluation of Ranking Policies with
Click Models" (KDD 2018) for the item-position assumption; Kish (1965) for the effective sample size.

N rows, R requests, U users, P places, C draws of a chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from shortlist.errors import ConfigError, DataError
from shortlist.metrics._arrays import Array, Floats, Integers, chunks, finite, positive, to_numpy

_NORMAL_95 = 1.959963984540054


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What the target policy would bring per request, as far as the log can say."""

    value: float
    """Rewards per request."""
    error: float
    """Standard error by the closed form, over users."""
    low: float
    """Lower end of the 95 % interval value +- 1.96 errors."""
    high: float
    """Upper end."""
    drawn_low: float
    """Lower end of the 95 % percentile interval of the bootstrap over users."""
    drawn_high: float
    """Upper end."""
    effective: float
    """Rows that the log is worth for this policy: (sum w)^2 / sum w^2, at most N."""
    most_weight: float
    """Largest weight of a row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Logged:
    """Checked rows of a log, [N] each; made by `logged`."""

    reward: Floats
    weight: Floats
    """Target chance / logged chance."""
    request: Integers
    """0..R-1."""
    place: Integers
    """0..P-1."""
    user_R: Integers
    """[R] 0..U-1."""

    @property
    def num_requests(self) -> int:
        """R."""
        return len(self.user_R)


def logged(
    reward: Array,
    propensity: Array,
    target: Array,
    *,
    requests: Array | None = None,
    places: Array | None = None,
    users: Array | None = None,
) -> Logged:
    """Rows of a log, checked.

    Args:
        reward: [N] what came of each row.
        propensity: [N] chance with which the logging policy showed this item at this place; above 0, at most 1.
        target: [N] the same chance under the policy to be judged; 0 to 1.
        requests: [N] which request each row belongs to, numbers or text; None = each is a request of its own.
        places: [N] the place on the page; None = pages have one place.
        users: [N] who asked; requests of one user are not independent. None = each request is another user's.

    Raises DataError for chances that are none, arrays of other lengths, or a request with two users.
    """
    reward_N = finite("reward", reward)
    num_rows = len(reward_N)
    if not num_rows:
        raise DataError("the log has no rows, so it says nothing of any policy")
    propensity_N = finite("propensity", propensity, length=num_rows)
    target_N = finite("target", target, length=num_rows)
    if not ((propensity_N > 0) & (propensity_N <= 1)).all():
        raise DataError(
            f"propensities must be above 0 and at most 1, got {propensity_N.min():g} to {propensity_N.max():g}: what was shown can not "
            "have had no chance; check how they were logged"
        )
    if not ((target_N >= 0) & (target_N <= 1)).all():
        raise DataError(f"chances of the target policy must be from 0 to 1, got {target_N.min():g}..{target_N.max():g}")
    request_N = np.arange(num_rows) if requests is None else _numbered("requests", requests, num_rows)
    place_N = np.zeros(num_rows, dtype=np.int64) if places is None else _numbered("places", places, num_rows)
    num_requests = int(request_N.max()) + 1
    user_R = np.arange(num_requests)
    if users is not None:
        user_N = _numbered("users", users, num_rows)
        user_R[request_N] = user_N
        if (user_R[request_N] != user_N).any():
            raise DataError("a request has rows of two users; number requests so that each is one page for one user")
    return Logged(
        reward=reward_N, weight=target_N / propensity_N, request=request_N, place=place_N, user_R=user_R.astype(np.int64)
    )  # fmt: skip


def ips(log: Logged, *, most_weight: float | None = None, seed: int = 0, resamples: int = 1_000) -> Estimate:
    """Inverse propensity score: unbiased where the target never does what the log could not; high variance where the two differ much.

    Args:
        log: the rows.
        most_weight: weights above are cut to it (the clipped estimator); None = none is.
        seed: of the bootstrap's draws.
        resamples: of the bootstrap.

    Raises ConfigError where most_weight is not above 0.
    """
    weight_N = log.weight if most_weight is None else np.minimum(log.weight, _above_0("most_weight", most_weight))
    return _per_request(log, weight_N * log.reward, weight_N, seed, resamples)


def snips(log: Logged, *, seed: int = 0, resamples: int = 1_000) -> Estimate:
    """Self-normalised ips: never outside the range of the rewards, no bias in the limit, mostly far less variance.

    Every page has every place, so that the weights of a place have the mean 1. Raises DataError where all weights of a place are 0.
    """
    num_users, num_places = int(log.user_R.max()) + 1, int(log.place.max()) + 1
    cell_N = log.user_R[log.request] * num_places + log.place

    def by_user(values_N: Floats) -> Floats:
        summed = np.bincount(cell_N, values_N, minlength=num_users * num_places)
        return summed.astype(np.float64).reshape(num_users, num_places)

    return _ratio(by_user(log.weight * log.reward), by_user(log.weight), log.weight, seed, resamples)


def doubly_robust(
    log: Logged,
    predicted: Array,
    expected: Array,
    *,
    switch: float | None = None,
    seed: int = 0,
    resamples: int = 1_000,
) -> Estimate:
    """A model's opinion, corrected by what the log shows of its errors: right if either the model or the propensities are.

    Args:
        log: the rows.
        predicted: [N] the model's reward of the item shown at its place. The model is fitted on other rows than these.
        expected: [N] its mean reward at that place of that request over the target policy's own choice.
        switch: rows with a larger weight are left to the model; None = none is.
        seed: of the bootstrap's draws.
        resamples: of the bootstrap.

    Raises ConfigError where switch is not above 0.
    """
    predicted_N = finite("predicted", predicted, length=len(log.reward))
    expected_N = finite("expected", expected, length=len(log.reward))
    weight_N = log.weight
    if switch is not None:
        weight_N = np.where(weight_N <= _above_0("switch", switch), weight_N, 0.0)
    return _per_request(log, expected_N + weight_N * (log.reward - predicted_N), weight_N, seed, resamples)


def on_policy(log: Logged, *, seed: int = 0, resamples: int = 1_000) -> Estimate:
    """What the logging policy itself brought per request."""
    return _per_request(log, log.reward, np.ones(len(log.reward)), seed, resamples)


def effective_sample_size(weights: Array) -> float:
    """(sum w)^2 / sum w^2 of weights [N]: so many rows of equal weight say as much (Kish, 1965); 0 where all are 0."""
    weight_N = finite("weights", weights)
    squares = float((weight_N**2).sum())
    return float(weight_N.sum()) ** 2 / squares if squares > 0 else 0.0


# -- parts --------------------------------------------------------------------------------------------------------


def _per_request(log: Logged, terms_N: Floats, weight_N: Floats, seed: int, resamples: int) -> Estimate:
    """Sum of the terms over requests: a ratio with one place whose denominator counts requests."""
    user_N, num_users = log.user_R[log.request], int(log.user_R.max()) + 1
    total_U = np.bincount(user_N, terms_N, minlength=num_users).astype(np.float64)
    requests_U = np.bincount(log.user_R, minlength=num_users).astype(np.float64)
    return _ratio(total_U[:, None], requests_U[:, None], weight_N, seed, resamples)


def _ratio(top_UP: Floats, bottom_UP: Floats, weight_N: Floats, seed: int, resamples: int) -> Estimate:
    """sum over places of sum_U top / sum_U bottom, with its error over users.

    Closed form by linearisation: a user moves the estimate by e_u = sum_p (top_up - V_p bottom_up) / sum_u bottom_up, and the variance is
    U / (U - 1) sum e_u^2. With one request per user and one place this is the usual variance of a mean, s^2 / R.
    """
    positive("resamples", resamples)
    num_users = len(top_UP)
    if num_users < 2:
        raise DataError(f"an interval over users needs at least 2 users, got {num_users}; use a longer log")
    bottom_P = bottom_UP.sum(0)
    if not (bottom_P > 0).all():
        raise DataError("the target policy never does what was logged at some place, so the log says nothing of it")
    value_P = top_UP.sum(0) / bottom_P
    moved_U = ((top_UP - value_P * bottom_UP) / bottom_P).sum(1)
    value = float(value_P.sum())
    error = math.sqrt(num_users / (num_users - 1) * float((moved_U**2).sum()))
    drawn = _drawn(top_UP, bottom_UP, np.random.default_rng(seed), resamples)
    drawn_low, drawn_high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(
        value=value,
        error=error,
        low=value - _NORMAL_95 * error,
        high=value + _NORMAL_95 * error,
        drawn_low=float(drawn_low),
        drawn_high=float(drawn_high),
        effective=effective_sample_size(weight_N),
        most_weight=float(weight_N.max()),
    )


def _drawn(top_UP: Floats, bottom_UP: Floats, rng: np.random.Generator, resamples: int) -> Floats:
    """The estimate for each draw of U users with replacement; [resamples]. Draws in which a place has no weight count as 0 there."""
    num_users, num_places = top_UP.shape
    both_UQ = np.concatenate([top_UP, bottom_UP], axis=1)
    found = np.empty(resamples)
    for part in chunks(resamples, num_users):
        size = part.stop - part.start
        drawn_CU = rng.integers(0, num_users, size=(size, num_users)) + np.arange(size)[:, None] * num_users
        times_CU = np.bincount(drawn_CU.ravel(), minlength=size * num_users).reshape(size, num_users)
        sums_CQ = times_CU.astype(np.float64) @ both_UQ
        top_CP, bottom_CP = sums_CQ[:, :num_places], sums_CQ[:, num_places:]
        found[part] = np.divide(top_CP, bottom_CP, out=np.zeros_like(top_CP), where=bottom_CP > 0).sum(1)
    return found


def _numbered(name: str, values: Array, length: int) -> Integers:
    """Numbers from 0 in place of ids, numbers or text; DataError on another length."""
    array = to_numpy(values)
    if array.shape != (length,):
        raise DataError(f"{name} has shape {array.shape}, but there are {length:,} rows: one entry each")
    number_N: Integers = np.unique(array, return_inverse=True)[1].astype(np.int64)
    return number_N


def _above_0(name: str, value: float) -> float:
    if not value > 0:
        raise ConfigError(f"{name} must be above 0, got {value}")
    return value
