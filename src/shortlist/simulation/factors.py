"""Tastes from a log: what users choose beyond what popularity alone explains.

With x_ui = log(1 + times u chose i), row sums a_u, column sums b_i and total T, the table of residuals from independence

    S_ui = (x_ui - a_u b_i / T) / sqrt((a_u + mean a) (b_i + mean b))

is what correspondence analysis decomposes (Greenacre, "Theory and Applications of Correspondence Analysis", 1984); the means in the
denominator keep users and items with few events from ruling it, as in regularised spectral clustering (Amini et al., Annals of
Statistics 2013). Its leading singular vectors come from subspace iteration (Halko, Martinsson and Tropp, SIAM Review 2011, algorithm
4.4), seeded. Users' and items' vectors are scaled by the roots of the singular values and then to length 1.

U users, n items, row 0 of each is the unknown one and stays 0; D directions, C cells.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shortlist.data.histories import Histories
from shortlist.errors import DataError
from shortlist.layers.counting import user_items

_OVERSAMPLED, _ITERATIONS = 8, 8
_NOTHING = 1e-6
"""Vectors shorter than this are rounding, not taste: singular values of S lie between 0 and 1."""

Float = NDArray[np.float64]


class Tastes(NamedTuple):
    """Unit vectors whose inner product is the affinity of a user and an item, between -1 and 1."""

    users: Float
    """[U + 1, D]; 0 where nothing is known."""
    items: Float
    """[n + 1, D]."""


def tastes(histories: Histories, num_items: int, *, dim: int, seed: int) -> Tastes:
    """Fit vectors on all events of the histories; D = min(dim, U, n).

    Raises DataError where no user has chosen anything.
    """
    cells = user_items(histories, num_items + 1)
    if not len(cells.item):
        raise DataError("the log has no choices, so there are no tastes to learn from it")
    shape = (histories.num_users + 1, num_items + 1)
    index = torch.from_numpy(np.stack([cells.user, cells.item]))
    worth = torch.from_numpy(np.log1p(cells.num_groups.astype(np.float64)))
    table = torch.sparse_coo_tensor(index, worth, shape, check_invariants=False).coalesce()
    of_user, of_item = table.sum(1).to_dense(), table.sum(0).to_dense()
    user_scale = (of_user + of_user.sum() / histories.num_users).rsqrt()
    item_scale = (of_item + of_item.sum() / num_items).rsqrt()
    scaled = torch.sparse_coo_tensor(
        index, worth * user_scale[index[0]] * item_scale[index[1]], shape, check_invariants=False
    ).coalesce()
    expected_U, expected_I = of_user * user_scale / of_user.sum(), of_item * item_scale

    def times(right: Tensor) -> Tensor:
        return torch.sparse.mm(scaled, right) - torch.outer(expected_U, expected_I @ right)

    turned = scaled.t().coalesce()

    def times_turned(left: Tensor) -> Tensor:
        return torch.sparse.mm(turned, left) - torch.outer(expected_I, expected_U @ left)

    rank = min(dim, histories.num_users, num_items)
    width = min(rank + _OVERSAMPLED, histories.num_users, num_items)
    start = torch.from_numpy(np.random.default_rng([seed, 1]).standard_normal((shape[1], width)))
    left = torch.linalg.qr(times(start)).Q
    for _ in range(_ITERATIONS):
        left = torch.linalg.qr(times(torch.linalg.qr(times_turned(left)).Q)).Q
    small_U, singular, small_V = torch.linalg.svd(times_turned(left).T, full_matrices=False)
    root = singular[:rank].sqrt()
    users, items = (left @ small_U[:, :rank]) * root, small_V[:rank].T * root
    return Tastes(_unit(users.numpy()), _unit(items.numpy()))


def _unit(vectors: Float) -> Float:
    """Rows of length 1; those that are next to nothing become 0, and row 0, the unknown one, is 0."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    there = length > _NOTHING
    there[0] = False
    return np.where(there, vectors / np.where(there, length, 1.0), 0.0)
