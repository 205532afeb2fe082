"""Memories of users: what is kept, what goes first, what is counted."""

from __future__ import annotations

import pytest
import torch

from shortlist.errors import ConfigError
from shortlist.store.memories import ENTRY_BYTES, Memories


def memory(num_floats: int, value: float = 0.0) -> dict[str, torch.Tensor]:
    return {"keys": torch.full((num_floats,), value)}


def size(num_floats: int) -> int:
    return ENTRY_BYTES + 4 * num_floats


def test_what_was_put_last_is_found_by_system_and_user():
    memories = Memories()
    memories.put("hstu", ("u1", "u2"), [memory(2, 1.0), memory(2, 2.0)])
    memories.put("vista", ("u1",), [memory(2, 3.0)])
    memories.put("hstu", ("u1",), [memory(2, 4.0)])
    found = memories.get("hstu", ("u2", "u9", "u1"))
    assert [None if m is None else m["keys"][0].item() for m in found] == [2.0, None, 4.0]
    status = memories.status()
    assert (status.num_entries, status.num_hits, status.num_misses) == (3, 2, 1)
    assert status.num_bytes == 3 * size(2)


def test_the_least_recently_used_goes_first_and_the_bound_is_never_passed():
    memories = Memories(max_bytes=2 * size(100))
    for user in ("a", "b"):
        memories.put("s", (user,), [memory(100)])
    memories.get("s", ("a",))
    memories.put("s", ("c",), [memory(100)])
    assert [m is not None for m in memories.get("s", ("a", "b", "c"))] == [True, False, True]
    memories.put("s", ("d",), [memory(10_000)])  # alone above the bound
    status = memories.status()
    assert status.num_bytes == 0
    assert status.num_entries == 0


def test_none_forgets_one_system_and_forget_all_of_them():
    memories = Memories()
    for system in ("s", "t"):
        memories.put(system, ("a", "b"), [memory(1), memory(1)])
    memories.put("s", ("a",), [None])
    assert memories.get("s", ("a",)) == [None]
    assert memories.get("t", ("a",)) != [None]
    memories.forget("b")
    assert memories.get("s", ("b",)) == memories.get("t", ("b",)) == [None]
    assert memories.status().num_bytes == size(1)


def test_a_bound_below_nothing_is_refused():
    with pytest.raises(ConfigError, match="bound of 0 bytes or more"):
        Memories(-1)
