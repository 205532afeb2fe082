"""How sure a figure is: bootstrap intervals over users, paired tests, intervals over seeds, correction for many tests.

A metric is a ratio of sums over requests (a mean is the sum of values over the number of requests). Requests of one
user are not independent, so users are what is drawn: each user brings all requests they made. Same seed, same result.

Shapes: R requests, U users (clusters), S distinct users after those alike are counted together, C draws of one chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shortlist.errors import ConfigError, DataError
from shortlist.metrics._arrays import Array, Floats, chunks, finite, positive, to_numpy


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and the range it may well lie in, all in the unit of the metric."""

    mean: float
    """The figure on all the data."""
    low: float
    """Lower end."""
    high: float
    """Upper end."""


@dataclass(frozen=True, slots=True)
class PairedTest:
    """Difference of two systems on the same requests."""

    difference: float
    """Figure of the first minus figure of the second."""
    low: float
    """Lower end of the bootstrap interval of the difference."""
    high: float
    """Upper end of the bootstrap interval of the difference."""
    p_value: float
    """Two-sided: how often equal systems would differ this much or more; never below 1 / (resamples + 1)."""


def bootstrap_interval(
    values: Array, clusters: Array | None = None, *, seed: int, level: float = 0.95, resamples: int = 2000
) -> Interval:
    """Mean of `values` [R] with its percentile bootstrap interval over users (Efron, 1979; whole users are drawn).

    `clusters` [R]: the user of each request, integers or strings; None says that every request is another user's.
    Raises DataError on NaN, infinities or fewer than two users, ConfigError on a bad level or number of resamples.
    """
    value_R = finite("values", values)
    return bootstrap_ratio(value_R, np.ones(len(value_R)), clusters, seed=seed, level=level, resamples=resamples)


def bootstrap_ratio(
    numerators: Array,
    denominators: Array,
    clusters: Array | None = None,
    *,
    seed: int,
    level: float = 0.95,
    resamples: int = 2000,
) -> Interval:
    """Sum of `numerators` [R] / sum of `denominators` [R] with its bootstrap interval over users.

    For money recovered (`ranking.value_recovered`), click-through rates and GAUC. Denominators are at least 0.
    Arguments and errors as in `bootstrap_interval`; also DataError where a draw of users may have a denominator of 0.
    """
    _check_settings(level, resamples)
    sums_U2 = _sums_per_user(numerators, denominators, clusters)
    ratio_n = _draw_ratios(sums_U2, np.random.default_rng((seed, 0)), resamples)
    low, high = np.quantile(ratio_n, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    numerator, denominator = sums_U2.sum(0)
    return Interval(mean=float(numerator / denominator), low=float(low), high=float(high))


def paired_difference(
    a: Array,
    b: Array,
    clusters: Array | None = None,
    *,
    denominators: Array | None = None,
    seed: int,
    level: float = 0.95,
    resamples: int = 2000,
) -> PairedTest:
    """Compare two systems on the same R requests: is the mean of `a` [R] above that of `b` [R]?

    The interval is the bootstrap's over users. The p-value comes from flipping, user by user, which system is which:
    under equal systems the sign of a user's difference is a coin toss (Fisher's randomisation test). With
    `denominators` [R], the same for both, the figures compared are ratios of sums, such as money recovered. Errors as
    in `bootstrap_ratio`.
    """
    a_R = finite("a", a)
    difference_R = a_R - finite("b", b, length=len(a_R))
    denominator_R = np.ones(len(a_R)) if denominators is None else denominators
    interval = bootstrap_ratio(difference_R, denominator_R, clusters, seed=seed, level=level, resamples=resamples)
    difference_U = _sums_per_user(difference_R, denominator_R, clusters)[:, 0]
    p_value = _sign_flip_p_value(difference_U, np.random.default_rng((seed, 1)), resamples)
    return PairedTest(difference=interval.mean, low=interval.low, high=interval.high, p_value=p_value)


def seed_interval(values: Sequence[float] | Array, *, level: float = 0.95) -> Interval:
    """Mean over training seeds with Student's t-interval; `values` [n] has one figure per seed, at least two."""
    _check_settings(level, 1)
    value_n = finite("values per seed", np.asarray(values) if isinstance(values, Sequence) else values)
    if len(value_n) < 2:
        raise DataError(
            f"an interval over seeds needs at least 2 seeds, got {len(value_n)}; run more, or state one figure."
        )
    mean, spread = float(value_n.mean()), float(value_n.std(ddof=1)) / np.sqrt(len(value_n))
    margin = _t_quantile(level, len(value_n) - 1) * spread
    return Interval(mean=mean, low=float(mean - margin), high=float(mean + margin))


def holm(p_values: Sequence[float] | Array) -> Floats:
    """P-values corrected for testing m times, in the order given; float64 [m] (Holm, 1979).

    Call those below alpha significant: the chance of even one false call is at most alpha.
    """
    p_m = finite("p_values", np.asarray(p_values, dtype=np.float64) if isinstance(p_values, Sequence) else p_values)
    if p_m.size and (p_m.min() < 0 or p_m.max() > 1):
        raise DataError(f"p-values must lie in [0, 1], got {p_m.min():g}..{p_m.max():g}.")
    order_m = np.argsort(p_m, kind="stable")
    adjusted_m = np.empty_like(p_m)
    adjusted_m[order_m] = np.maximum.accumulate(p_m[order_m] * np.arange(len(p_m), 0, -1))
    return np.minimum(adjusted_m, 1.0)


def _sums_per_user(numerators: Array, denominators: Array, clusters: Array | None) -> Floats:
    """Sum of numerators and of denominators of each user, [U, 2]. Raises DataError on input that has no interval."""
    numerator_R = finite("numerators", numerators)
    denominator_R = finite("denominators", denominators, length=len(numerator_R))
    if clusters is not None:
        cluster_R = to_numpy(clusters)
        if cluster_R.shape != numerator_R.shape:
            raise DataError(
                f"clusters has shape {cluster_R.shape}, but there are {len(numerator_R):,} values: one user each."
            )
        known, user_R = np.unique(cluster_R, return_inverse=True)
        num_users = len(known)
        numerator_R = np.bincount(user_R, numerator_R, minlength=num_users).astype(np.float64)
        denominator_R = np.bincount(user_R, denominator_R, minlength=num_users).astype(np.float64)
    if len(numerator_R) < 2:
        raise DataError(
            f"a bootstrap over users needs at least 2 users, got {len(numerator_R)}; evaluate on more users."
        )
    if denominator_R.min() < 0 or not denominator_R.sum() > 0:
        raise DataError("denominators must be at least 0 and not all 0; a ratio of these sums means nothing.")
    return np.stack([numerator_R, denominator_R], axis=1)


def _draw_ratios(sums_U2: Floats, rng: np.random.Generator, resamples: int) -> Floats:
    """Ratio of sums for each of `resamples` draws of U users with replacement; [resamples]."""
    num_users = len(sums_U2)
    # Users with the same two sums are interchangeable: drawing how many of each kind come (a multinomial) is the same
    # experiment, and far cheaper for metrics of few values. A complex number is a pair that sorts fast.
    kind_S, count_S = np.unique(sums_U2[:, 0] + 1j * sums_U2[:, 1], return_counts=True)
    few_kinds = len(kind_S) * 8 <= num_users
    total_n2 = np.empty((resamples, 2))
    for part in chunks(resamples, len(kind_S) if few_kinds else num_users):
        size = part.stop - part.start
        if few_kinds:
            drawn_CS = rng.multinomial(num_users, count_S / num_users, size=size)
            total_n2[part] = drawn_CS @ np.stack([kind_S.real, kind_S.imag], axis=1)
        else:
            drawn_CU = rng.integers(0, num_users, size=(size, num_users))
            for column in (0, 1):
                total_n2[part, column] = sums_U2[:, column][drawn_CU].sum(1)
    if not (total_n2[:, 1] > 0).all():
        raise DataError(
            "some draws of users have a denominator of 0: too few users have one above 0; evaluate on more users."
        )
    return total_n2[:, 0] / total_n2[:, 1]


def _sign_flip_p_value(difference_U: Floats, rng: np.random.Generator, resamples: int) -> float:
    """Share of random sign patterns whose sum is at least as far from 0 as the sum found, the found one included."""
    size_U = np.abs(difference_U)
    size_U = size_U[size_U > 0]
    if len(size_U) == 0:
        return 1.0
    # Sums in another order differ in the last digits; equal sums must count as equal.
    found = abs(difference_U.sum()) - 1e-12 * size_U.sum()
    num_bytes = -(-len(size_U) // 8)
    num_extreme = 0
    for part in chunks(resamples, len(size_U)):
        bytes_CB = np.frombuffer(rng.bytes((part.stop - part.start) * num_bytes), dtype=np.uint8).reshape(-1, num_bytes)
        up_CU = np.unpackbits(bytes_CB, axis=1, count=len(size_U)).astype(np.float64)
        sum_C = 2.0 * (up_CU @ size_U) - size_U.sum()
        num_extreme += int((np.abs(sum_C) >= found).sum())
    return (1 + num_extreme) / (1 + resamples)


def _t_quantile(level: float, freedom: int) -> float:
    """The t with P(|T| < t) = level for `freedom` degrees, by bisection on its angle, atan(t / sqrt(freedom))."""
    low, high = 0.0, np.pi / 2.0
    for _ in range(100):
        middle = (low + high) / 2.0
        low, high = (middle, high) if _t_within(middle, freedom) < level else (low, middle)
    return float(np.sqrt(freedom) * np.tan((low + high) / 2.0))


def _t_within(angle: float, freedom: int) -> float:
    """P(|T| < sqrt(freedom) tan(angle)), a finite series for whole degrees (Abramowitz and Stegun, 26.7.3-4)."""
    sine, cosine = np.sin(angle), np.cos(angle)
    if freedom % 2 == 0:
        j = np.arange(1, freedom // 2)
        return float(sine * (1.0 + np.cumprod((2 * j - 1) / (2 * j) * cosine**2).sum()))
    j = np.arange(1, (freedom - 1) // 2)
    series = sine * cosine * (1.0 + np.cumprod(2 * j / (2 * j + 1) * cosine**2).sum()) if freedom > 1 else 0.0
    return float(2.0 / np.pi * (angle + series))


def _check_settings(level: float, resamples: int) -> None:
    """Raise ConfigError on a level outside (0, 1) or without resamples."""
    if not 0.0 < level < 1.0:
        raise ConfigError(f"level must lie between 0 and 1, such as 0.95, got {level:g}.")
    positive("resamples", resamples)
