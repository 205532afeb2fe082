"""What retrievers by factors share: the choices as a sparse matrix for the `implicit` library, and vectors that fall back to popularity.

U users with choices, N = n + 1 catalogue rows, d factors, C distinct (user, item) pairs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shortlist.data.histories import Int, View
from shortlist.errors import DataError
from shortlist.extras import library
from shortlist.layers.counting import user_items

POPULARITY_SHARE = 1e-6  # breaks ties, and orders everything where a user's factors are 0


class Choices(NamedTuple):
    """The log as the library wants it."""

    matrix: Any
    """scipy CSR float32 [U, N]: how much each choice counts; users without known items are left out."""
    users: Int
    """[U] user rows, rising."""


class Factors(NamedTuple):
    """What the library learned."""

    users: NDArray[np.float32]
    """[U, d]."""
    items: NDArray[np.float32]
    """[N, d]."""


def choices(view: View, worth: Callable[[Int], NDArray[Any]], user: str) -> Choices:
    """The matrix of users and items.

    Args:
        worth: from the number of groups that hold the item [C] to what the choice counts, above 0.
        user: the system's name, for messages.

    Raises ConfigError where the library is missing; DataError where no user has chosen a known item.
    """
    sparse = library("scipy.sparse", extra="baselines", user=user)
    num_rows = view.space.items.num_rows
    cells = user_items(view.histories, num_rows)
    if not len(cells.item):
        raise DataError(f"{user}: no user has chosen a known item before the cut, so there are no factors to learn")
    users, place = np.unique(cells.user, return_inverse=True)
    values = worth(cells.num_groups).astype(np.float32)
    return Choices(sparse.csr_matrix((values, (place, cells.item)), shape=(len(users), num_rows)), users)


def learn_factors(make: Callable[[], Any], matrix: Any, num_threads: int) -> Factors:
    """Make the library's model and fit it to the matrix, without its progress bar.

    When made, a model looks at the BLAS of the whole process and warns of pools inside pools. With one thread of its own there is no
    such thing, so the warning would be noise; with more it is passed on.
    """
    with warnings.catch_warnings():
        if num_threads == 1:
            warnings.filterwarnings("ignore", message=".*is configured to use.*threads", category=RuntimeWarning)
        model = make()
        model.fit(matrix, show_progress=False)
    return Factors(np.asarray(model.user_factors, np.float32), np.asarray(model.item_factors, np.float32))


def beside_popularity(vector: Tensor, popular: Tensor) -> Tensor:
    """Vectors [..., d] with one component more, so that an inner product falls back to popularity: [..., d + 1].

    Args:
        popular: [...]; for items their popularity in 0..1, for users POPULARITY_SHARE.
    """
    return torch.cat([vector, popular[..., None]], dim=-1)
