"""Product-key memory against brute force, its gradients, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from shortlist.embeddings.base import TableChoice
from shortlist.errors import ConfigError
from shortlist.layers.product_keys import ProductKeyMemory


def make(**settings) -> ProductKeyMemory:
    torch.manual_seed(0)
    return ProductKeyMemory(8, **{"num_slots": 144, "num_read": 5, "key_dim": 6, **settings})


def test_the_best_of_the_halves_hold_the_best_of_all_slots():
    memory, query = make(), torch.randn(200, 6)
    answer, slot = memory.best(query)
    expected_answer, expected_slot = memory.best_reference(query)
    torch.testing.assert_close(answer, expected_answer)
    assert torch.equal(slot, expected_slot)


def test_what_is_read_is_the_softmax_of_the_answers_over_the_values():
    memory, x = make(), torch.randn(3, 8)
    answer, slot = memory.best_reference(memory.norm(memory.query(x)))
    expected = torch.stack([(a.softmax(0)[:, None] * memory.values.weight()[s]).sum(0) for a, s in zip(answer, slot)])
    torch.testing.assert_close(memory(x), expected)


def test_only_slots_that_were_read_get_a_gradient_and_keys_do_too():
    memory, x = make(), torch.randn(2, 8)
    memory(x).sum().backward()
    _, slot = memory.best(memory.norm(memory.query(x)))
    gradient = memory.values.rows.weight.grad
    assert gradient.is_sparse
    assert set(gradient.coalesce().indices()[0].tolist()) == set(slot.flatten().tolist())
    assert memory.keys.grad.abs().sum() > 0


@pytest.mark.parametrize("settings", [{"num_slots": 143}, {"key_dim": 5}, {"num_read": 13}, {"num_read": 0}])
def test_numbers_that_do_not_fit_are_refused(settings):
    with pytest.raises(ConfigError, match="square number of slots"):
        make(**settings)


def test_a_dense_table_of_values_can_be_chosen():
    memory = make(table=TableChoice(sparse=False))
    memory(torch.randn(2, 8)).sum().backward()
    assert not memory.values.rows.weight.grad.is_sparse
