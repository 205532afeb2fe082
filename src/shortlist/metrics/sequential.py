"""Intervals that stay true however often one looks, for experiments that are watched while they run.

A usual 95 % interval is wrong one time in twenty *each* time it is looked at; who looks daily and stops at the first difference is
misled far more often. A confidence sequence C_1, C_2, ... holds the truth at all times at once with chance 1 - alpha, so it may be
looked at, and the experiment stopped, at any time for any reason.

    asymptotic confidence sequence (Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas, "Time-uniform central limit theory and asymptotic
    confidence sequences", Annals of Statistics 2024, theorem 2.2), which is a normal-mixture sequential test turned round:

        mean_t +- sd_t sqrt( 2 (t rho^2 + 1) / (t^2 rho^2) * log( sqrt(t rho^2 + 1) / alpha ) )
        rho^2  =  (-2 log alpha + log(-2 log alpha + 1)) / t*        tightest near t* observations (their appendix B.2)

    difference of two arms: with p_a the known share of arm a, and m_a the mean of arm a over EARLIER units (their section 3, doubly robust
    terms without covariates), each unit's term

        psi = m_1 - m_0 + 1{arm 1} (y - m_1) / p_1 - 1{arm 0} (y - m_0) / p_0

    has exactly the difference as its expectation given the past, and in the long run the variance var_1 / p_1 + var_0 / p_0.

    shares of arms: a test martingale of counts against their shares (Lindon and Malek, "Anytime-Valid Inference for Multinomial Count
    Data", NeurIPS 2022): the Bayes factor of a Dirichlet(100 * shares) mixture; p = 1 / the largest factor so far.

n units in the order in which they came, A arms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from shortlist.errors import ConfigError, DataError
from shortlist.metrics._arrays import Array, Floats, Integers, finite, integers, to_numpy

LEAST_UNITS = 100
"""Before so many units there is no interval: the sequence holds in the limit, and stops that come too early are not it."""
LEAST_PER_ARM = 10
"""Units of each arm whose outcomes only give the first means that later ones are held against."""
LEAST_DEVIATIONS = 25.0
"""Nor before so many of them really differ; of 10,000 units of which 3 bought, 3 do. It is (sum d^2)^2 / sum d^4, d from the mean."""
_CONCENTRATION = 100.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """A mean as it was known after each unit; all [n]."""

    mean: Floats
    low: Floats
    """-inf while too little is known."""
    high: Floats
    """inf while too little is known."""

    def __len__(self) -> int:
        return len(self.mean)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mismatch:
    """Whether arms came in their shares."""

    chi_square: float
    """sum (count - expected)^2 / expected."""
    p_value: float
    """Of the chi-square test, for a look at one moment that was fixed before."""
    always_p: float
    """Of the sequential test: below alpha at any time with chance alpha at most, however often one looks."""


def confidence_sequence(values: Array, *, alpha: float = 0.05, planned: int = 10_000) -> Course:
    """The mean of independent values [n] with its asymptotic confidence sequence.

    Args:
        values: in the order in which they came.
        alpha: chance that the truth is ever outside.
        planned: t*, after how many values the interval is to be tightest; it is valid at any.

    Raises ConfigError for an alpha that is no chance or a plan below 1; DataError on NaN or infinities.
    """
    _check(alpha, planned)
    value_n = finite("values", values)
    num = np.arange(1, len(value_n) + 1, dtype=np.float64)
    around = float(value_n.mean()) if len(value_n) else 0.0  # a shift changes no central moment, but keeps its digits
    first, second, third, fourth = (np.cumsum((value_n - around) ** power) / num for power in (1, 2, 3, 4))
    variance = np.maximum(second - first**2, 0.0)
    kurtic = np.maximum(fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4, 0.0)
    deviations = np.divide(num * variance**2, kurtic, out=np.zeros_like(num), where=kurtic > 0)
    known = (num >= LEAST_UNITS) & (deviations >= LEAST_DEVIATIONS)
    half = np.where(known, np.sqrt(variance) * radius(num, alpha=alpha, planned=planned), np.inf)
    mean = around + first
    return Course(mean=mean, low=mean - half, high=mean + half)


def radius(num: Array, *, alpha: float = 0.05, planned: int = 10_000) -> Floats:
    """Half width [n] of the sequence after so many values [n] of standard deviation 1."""
    _check(alpha, planned)
    t = to_numpy(num).astype(np.float64)
    wide = -2.0 * np.log(alpha)
    rho2 = (wide + np.log1p(wide)) / planned
    grown = t * rho2 + 1.0
    found: Floats = np.sqrt(2.0 * grown / (t**2 * rho2) * np.log(np.sqrt(grown) / alpha))
    return found


def difference_terms(values: Array, treated: Array, *, share: float = 0.5) -> Floats:
    """Terms psi [n] whose mean is the treated arm's mean minus the other's; see above.

    Args:
        values: [n] one per unit, in the order in which units came.
        treated: [n] bool, which of the two arms each is in.
        share: chance of a unit of the two to be treated.

    Raises ConfigError for a share that is none; DataError on other lengths.
    """
    if not 0 < share < 1:
        raise ConfigError(f"share must be above 0 and below 1, got {share}")
    value_n = finite("values", values)
    in_n: NDArray[np.bool_] = to_numpy(treated).astype(bool)
    if in_n.shape != value_n.shape:
        raise DataError(f"treated has shape {in_n.shape}, but there are {len(value_n):,} values: one entry each")
    term_n = np.zeros(len(value_n))
    for mine, part, sign in ((in_n, share, 1.0), (~in_n, 1.0 - share, -1.0)):
        before = np.concatenate([[0.0], np.cumsum(value_n * mine)[:-1]]) if len(value_n) else value_n
        count = np.concatenate([[0], np.cumsum(mine)[:-1]]) if len(value_n) else value_n
        mean_n = before / np.maximum(count, 1)
        term_n += sign * (mean_n + mine * (value_n - mean_n) / part)
    return term_n


def difference(
    values: Array, treated: Array, *, share: float = 0.5, alpha: float = 0.05, planned: int = 10_000
) -> Course:
    """Treated arm's mean minus the other's with its confidence sequence; arguments as of the two above.

    The sequence begins once both arms have `LEAST_PER_ARM` units: terms of units before, whose m_a are means of hardly anything, are far
    off and would widen it for long. When that is depends on the assignment alone, so the terms after stay unbiased.
    """
    term_n = difference_terms(values, treated, share=share)
    in_n = to_numpy(treated).astype(bool)
    fewest_n = np.minimum(np.cumsum(in_n), np.cumsum(~in_n))
    start = int(np.searchsorted(fewest_n, LEAST_PER_ARM, side="left")) + 1
    early_n = term_n[:start].cumsum() / np.arange(1, len(term_n[:start]) + 1)
    after = confidence_sequence(term_n[start:], alpha=alpha, planned=planned)
    nothing_n = np.full(len(early_n), np.inf)
    return Course(
        mean=np.concatenate([early_n, after.mean]),
        low=np.concatenate([-nothing_n, after.low]),
        high=np.concatenate([nothing_n, after.high]),
    )


def mismatch(arms: Array, shares: Sequence[float]) -> Mismatch:
    """Whether units came to arms in the shares that were set (sample ratio mismatch).

    Args:
        arms: int [n] arm of each unit, 0..A-1, in the order in which they came.
        shares: [A] chances, adding up to 1.

    Raises ConfigError where the shares are none, DataError where an arm has no share.
    """
    share_A = np.asarray(shares, dtype=np.float64)
    if len(share_A) < 2 or not (share_A > 0).all() or not np.isclose(share_A.sum(), 1.0):
        raise ConfigError(f"shares of arms must be above 0 and add up to 1, got {list(shares)}")
    arm_n = integers("arms", arms, ndim=1)
    if len(arm_n) and arm_n.max() >= len(share_A):
        raise DataError(f"arm {arm_n.max()} has no share; there are {len(share_A)} arms")
    count_A = np.bincount(arm_n, minlength=len(share_A))
    wanted_A = len(arm_n) * share_A
    chi_square = float(((count_A - wanted_A) ** 2 / np.maximum(wanted_A, 1e-300)).sum())
    return Mismatch(
        chi_square=chi_square,
        p_value=chi_square_tail(chi_square, len(share_A) - 1),
        always_p=_always_p(arm_n, share_A),
    )


def chi_square_tail(value: float, freedom: int) -> float:
    """P(X >= value) of a chi-square variable: the upper regularised incomplete gamma function Q(freedom / 2, value / 2)."""
    half = torch.tensor([freedom / 2.0, value / 2.0], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def _always_p(arm_n: Integers, share_A: Floats) -> float:
    """1 / the largest Bayes factor of a Dirichlet mixture over the shares, at any time so far."""
    prior_A = _CONCENTRATION * share_A
    total_n = np.arange(1, len(arm_n) + 1, dtype=np.float64)
    factor_n = _lgamma(np.array([_CONCENTRATION])) - _lgamma(_CONCENTRATION + total_n)
    for arm, (prior, share) in enumerate(zip(prior_A.tolist(), share_A.tolist())):
        count_n = np.cumsum(arm_n == arm).astype(np.float64)
        factor_n += _lgamma(prior + count_n) - _lgamma(np.array([prior])) - count_n * np.log(share)
    return float(min(1.0, np.exp(-factor_n.max()))) if len(arm_n) else 1.0


def _lgamma(x: Floats) -> Floats:
    found: Floats = torch.lgamma(torch.from_numpy(x)).numpy()
    return found


def _check(alpha: float, planned: int) -> None:
    if not 0 < alpha < 1:
        raise ConfigError(f"alpha must be above 0 and below 1, got {alpha}")
    if planned < 1:
        raise ConfigError(f"planned must be at least 1, got {planned}")
