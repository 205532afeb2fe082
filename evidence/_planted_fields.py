"""Planted click logs in which pairs of fields decide, with the best reachable AUC known.

R rows, F fields, V values of a field, P planted pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from _ctr import Table
from shortlist.metrics import auc

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Cells:
    """A log of two fields of ids whose every pair has its own rate, and a part of the pairs kept from training."""

    table: Table
    """`test` holds seen and unseen pairs."""
    is_seen: NDArray[np.bool_]
    """[R of test]: the pair may stand in training."""
    oracle: dict[str, float]
    """AUC of the true rates on test, for "seen" and "unseen"."""


def cells(
    num_values: int, num_rows: int, *, rank: int = 8, unseen: float = 0.2, noise: float = 0.05, seed: int = 0
) -> Cells:
    """Clicks by the sign of a rank-8 matrix with 5 % of the labels turned; a fifth of the cells never trains nor validates.

    Values are drawn uniformly, so neither field alone says much.
    """
    rng = np.random.default_rng(seed)
    of_user, of_item = rng.standard_normal((2, num_values, rank))
    sign_VV = np.sign(of_user @ of_item.T)
    hidden_VV = rng.random((num_values, num_values)) < unseen
    user, item = rng.integers(0, num_values, (2, num_rows))
    rate = np.where(sign_VV[user, item] > 0, 1 - noise, noise)
    label = (rng.random(num_rows) < rate).astype(np.int64)
    rows = pl.DataFrame({"label": label, "user": user, "item": item, "constant": np.zeros(num_rows, dtype=np.int64)})
    part = np.digitize(rng.random(num_rows), [0.8, 0.9])
    is_seen = ~hidden_VV[user, item]
    train, valid = (rows.filter(pl.Series((part == p) & is_seen)) for p in (0, 1))
    test = part == 2
    chosen = {"seen": test & is_seen, "unseen": test & ~is_seen}
    oracle = {name: auc(label[mask], rate[mask]) for name, mask in chosen.items()}
    return Cells(Table(train=train, valid=valid, test=rows.filter(pl.Series(test))), is_seen[test], oracle)


@dataclass(frozen=True, slots=True)
class FieldPairs:
    """A log of many fields in which some ordered pairs decide."""

    table: Table
    oracle: float
    """AUC of the true rates on test."""


def field_pairs_log(
    num_fields: int, num_values: int, num_pairs: int, num_rows: int, *, rank: int = 4, scale: float = 2.5, seed: int = 0
) -> FieldPairs:
    """Clicks by the sum over planted ordered pairs (f, g) of a(f)' B_fg a(g): hidden vectors of values, a matrix of its own per pair.

    A field stands in one pair at most, half of them as first and half as second; the other fields say nothing.
    """
    rng = np.random.default_rng(seed)
    hidden_FVK = rng.standard_normal((num_fields, num_values, rank))
    value_RF = rng.integers(0, num_values, (num_rows, num_fields))
    order = rng.permutation(num_fields)
    logit_R = np.zeros(num_rows)
    for first, second in order[: 2 * num_pairs].reshape(num_pairs, 2):
        form_KK = rng.standard_normal((rank, rank)) / rank
        a_RK, b_RK = hidden_FVK[first, value_RF[:, first]], hidden_FVK[second, value_RF[:, second]]
        logit_R += np.einsum("rk,kl,rl->r", a_RK, form_KK, b_RK)
    logit_R *= scale / logit_R.std()
    label = (rng.random(num_rows) < 1 / (1 + np.exp(-logit_R))).astype(np.int64)
    columns = {"label": label, **{f"f{f}": value_RF[:, f] for f in range(num_fields)}}
    rows = pl.DataFrame(columns)
    first_cut, second_cut = int(0.8 * num_rows), int(0.9 * num_rows)
    table = Table(
        train=rows[:first_cut], valid=rows[first_cut:second_cut], test=rows[second_cut:], user=None, item=None
    )
    return FieldPairs(table, auc(label[second_cut:], logit_R[second_cut:]))


@dataclass(frozen=True, slots=True)
class PricedFields:
    """A log whose signals stand in a cheap and in a dear field each, beside fields that say nothing."""

    table: Table
    cost: dict[str, float]
    """By column: 0.5 for cheap ones, 3 for dear ones."""
    oracle: float
    """AUC of the true rates on test."""


def priced_log(
    num_rows: int, *, num_signals: int = 8, num_noise: int = 8, num_values: int = 50, seed: int = 0
) -> PricedFields:
    """Clicks by the sum of one number per value of each signal, of falling strength, and the product of the first two signals' numbers.

    Columns: cheap0, dear0 (the same values), cheap1, ...; then the noise, half of it cheap.
    """
    rng = np.random.default_rng(seed)
    strength_S = np.linspace(1.2, 0.3, num_signals)
    number_SV = rng.standard_normal((num_signals, num_values))
    value_RS = rng.integers(0, num_values, (num_rows, num_signals))
    number_RS = number_SV[np.arange(num_signals), value_RS]
    logit_R = number_RS @ strength_S + 0.8 * number_RS[:, 0] * number_RS[:, 1]
    rate_R = 1 / (1 + np.exp(-logit_R))
    label = (rng.random(num_rows) < rate_R).astype(np.int64)
    columns = {"label": label}
    for s in range(num_signals):
        columns |= {f"cheap{s}": value_RS[:, s], f"dear{s}": value_RS[:, s]}
    for n in range(num_noise):
        kind = "cheap" if n < num_noise // 2 else "dear"
        columns[f"{kind}_noise{n}"] = rng.integers(0, num_values, num_rows)
    rows = pl.DataFrame(columns)
    first, second = int(0.8 * num_rows), int(0.9 * num_rows)
    table = Table(train=rows[:first], valid=rows[first:second], test=rows[second:], user=None, item=None)
    cost = {name: 0.5 if name.startswith("cheap") else 3.0 for name in table.columns}
    return PricedFields(table, cost, auc(label[second:], rate_R[second:]))
