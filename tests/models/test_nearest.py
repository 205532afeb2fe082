"""Exact search in blocks of the catalogue, against sorting all products."""

import numpy as np
import pytest
import torch

from shortlist.data.jagged import Jagged
from shortlist.models import base
from shortlist.models.base import nearest, top_k

N, D, B = 203, 7, 9


@pytest.fixture(params=[1, 3 * B, 50 * B, 1 << 25])
def block(request, monkeypatch):
    """Widths of 1, 3, 50 and all items."""
    monkeypatch.setattr(base, "PRODUCTS_AT_ONCE", request.param)


def vectors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, D, generator=generator), torch.randn(N + 1, D, generator=generator)


def by_hand(user, item, k, excluded=None, allowed=None):
    products = (user.double() @ item.double().T).numpy()
    rows = np.zeros((len(user), k), dtype=np.int64)
    for r, scores in enumerate(products):
        barred = (
            set() if excluded is None else set(excluded.values[excluded.offsets[r] : excluded.offsets[r + 1]].tolist())
        )
        fine = [n for n in np.argsort(-scores) if n and n not in barred and (allowed is None or allowed[n])][:k]
        rows[r, : len(fine)] = fine
    return rows


@pytest.mark.parametrize("k", [1, 10, N, N + 20])
def test_blocks_find_what_sorting_finds(block, k):
    user, item = vectors()
    best, bad_B = nearest(user, item, k)
    assert np.array_equal(best.rows.numpy(), by_hand(user, item, k))
    assert best.rows.shape == best.scores.shape == (B, k)
    assert torch.equal(best.scores == -torch.inf, best.rows == 0)
    assert not bad_B.any()
    real = best.rows > 0
    assert torch.allclose(best.scores[real], (user[:, None] * item[best.rows]).sum(-1)[real], atol=1e-5)


def test_excluded_and_forbidden_items_are_never_found(block):
    user, item = vectors(1)
    nearest_40 = by_hand(user, item, 40)
    excluded = Jagged.from_rows([row[: 4 * r].tolist() for r, row in enumerate(nearest_40)])
    allowed = torch.rand(N + 1, generator=torch.Generator().manual_seed(2)) < 0.3
    best, _ = nearest(user, item, 30, excluded, allowed)
    assert np.array_equal(best.rows.numpy(), by_hand(user, item, 30, excluded, allowed))


def test_a_request_whose_vector_is_no_number_is_named_and_the_others_are_served(block):
    user, item = vectors(3)
    user[4] = torch.nan
    best, bad_B = nearest(user, item, 5)
    assert bad_B.tolist() == [r == 4 for r in range(B)]
    assert not best.rows[4].any()
    fine = [r for r in range(B) if r != 4]
    assert np.array_equal(best.rows[fine].numpy(), by_hand(user[fine], item, 5))


def test_top_k_of_a_part_of_the_catalogue_gives_catalogue_rows():
    scores = torch.tensor([[3.0, 9.0, 1.0, 5.0]])
    found = top_k(scores, 3, Jagged.from_rows([[2, 11, 40]]), first=10)
    assert found.rows.tolist() == [[13, 10, 12]]  # row 11 is excluded; rows 2 and 40 lie outside
