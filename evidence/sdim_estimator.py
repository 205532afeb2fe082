"""SDIM's estimate of attention against its closed form: how often signatures agree, and how the error falls with their number.

`shortlist prove sdim_estimator`; needs no data.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import acos, pi, sqrt

import torch

from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab
from shortlist.layers.search import planes, signatures

COSINES = (-0.9, -0.6, -0.3, 0.0, 0.3, 0.6, 0.8, 0.9, 0.99)
TAUS = (1, 2, 3, 5)
NUM_SIGNATURES = (4, 16, 64)
FOR_BIAS = 1_024
"""Signatures per draw for the bias, whose standard error is then .001."""
MOST_BIAS, TOLERANCE = 0.005, 0.2

CLAIM = Claim(
    name="sdim_estimator",
    systems=("sdim",),
    claim="The share of signatures that agree is an unbiased estimate of (1 - arccos(cos) / pi) ** tau, and its error falls with the root "
    "of their number as a binomial share's does.",
    data="pairs of vectors of 32 dimensions with cosines from -0.9 to 0.99",
    protocol="200 draws of the planes per number of signatures (60 quick); bias over all draws of 1,024 signatures, mean absolute error "
    "per draw of 4, 16 and 64, both per cosine and tau",
    bar=f"bias at most {MOST_BIAS} everywhere; mean absolute error within {TOLERANCE:.0%} of 0.8 sqrt(p (1 - p) / G), averaged over the "
    "cosines with p from .1 to .9, for every tau and G",
    published={"error is small from G = 16 on, best tau 3 (Cao et al. 2022)": "48 signs, tau 3"},
)


def run(lab: Lab) -> None:
    """One arm per tau."""
    for tau in TAUS:
        lab.measure(f"tau {tau}", 0, partial(measured, tau, 60 if lab.quick else 200))


def measured(tau: int, draws: int) -> dict[str, float]:
    """Largest bias, and per number of signatures the mean absolute error beside the binomial one."""
    generator = torch.Generator().manual_seed(tau)
    first, other = torch.linalg.qr(torch.randn(32, 2, generator=generator))[0].T
    cosine_C = torch.tensor(COSINES)
    pair_CD = cosine_C[:, None] * first + (1 - cosine_C**2).sqrt()[:, None] * other
    expected_C = torch.tensor([(1 - acos(c) / pi) ** tau for c in COSINES])
    middle_C = (expected_C > 0.1) & (expected_C < 0.9)
    figures = {}
    for number in (*NUM_SIGNATURES, FOR_BIAS):
        shares = []
        for draw in range(draws):
            normals = planes(32, number * tau, 1_000 * number + draw)
            shares.append((signatures(pair_CD, normals, tau) == signatures(first[None], normals, tau)).float().mean(1))
        share_RC = torch.stack(shares)
        if number == FOR_BIAS:
            figures["largest bias"] = float((share_RC.mean(0) - expected_C).abs().max())
            figures["largest standard error of the bias"] = 0.5 / sqrt(number * draws)
            continue
        error_C = (share_RC - expected_C).abs().mean(0)[middle_C]
        binomial_C = 0.8 * (expected_C * (1 - expected_C) / number).sqrt()[middle_C]
        figures[f"error at {number}"] = float(error_C.mean())
        figures[f"binomial error at {number}"] = float(binomial_C.mean())
    return figures


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bar for every tau."""
    failures, told = [], []
    for name, arm in arms.items():
        figures = {metric: interval.mean for metric, interval in arm.metrics.items()}
        if figures["largest bias"] > MOST_BIAS:
            failures.append(f"{name}: bias {figures['largest bias']:.4f}")
        ratios = [figures[f"error at {n}"] / figures[f"binomial error at {n}"] for n in NUM_SIGNATURES]
        failures += [
            f"{name}, G {n}: error {r:.2f} x the binomial one"
            for n, r in zip(NUM_SIGNATURES, ratios)
            if abs(r - 1) > TOLERANCE
        ]
        told.append(
            f"{name}: bias {figures['largest bias']:.4f}, error at {max(NUM_SIGNATURES)} signatures "
            f"{figures[f'error at {max(NUM_SIGNATURES)}']:.3f}"
        )
    return Judgement("fails" if failures else "holds", ". ".join([*failures, *told]) + ".")
