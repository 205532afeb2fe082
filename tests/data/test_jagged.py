"""Jagged rows against plain Python lists."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from shortlist.data.jagged import Jagged, segment_mean, segment_sum


def rows_of(jagged: Jagged) -> list[list[int]]:
    return [jagged.values[a:b].tolist() for a, b in zip(jagged.offsets[:-1].tolist(), jagged.offsets[1:].tolist())]


@pytest.fixture(params=range(6))
def rows(request) -> list[list[int]]:
    rng = np.random.default_rng(request.param)
    return [rng.integers(1, 50, size=rng.integers(0, 6)).tolist() for _ in range(rng.integers(0, 8))]


def test_rows_survive(rows):
    jagged = Jagged.from_rows(rows)
    assert rows_of(jagged) == rows
    assert jagged.num_rows == len(rows)
    assert jagged.lengths.tolist() == [len(row) for row in rows]
    assert jagged.row_of_value.tolist() == [r for r, row in enumerate(rows) for _ in row]
    assert jagged.position_of_value.tolist() == [p for row in rows for p in range(len(row))]


@pytest.mark.parametrize("length", [None, 1, 3, 9])
def test_padding_is_left_aligned_and_keeps_the_newest(rows, length):
    dense, mask = Jagged.from_rows(rows).padded(length, fill=-7)
    width = length or max([len(row) for row in rows] + [1])
    kept = [row[-width:] for row in rows]
    assert dense.tolist() == [row + [-7] * (width - len(row)) for row in kept]
    assert mask.tolist() == [[True] * len(row) + [False] * (width - len(row)) for row in kept]
    assert rows_of(Jagged.from_padded(dense, mask)) == kept


def test_padding_of_vectors_pads_whole_vectors():
    jagged = Jagged(torch.arange(6.0).view(3, 2), torch.tensor([0, 1, 3]))
    dense, _ = jagged.padded()
    assert dense.tolist() == [[[0, 1], [0, 0]], [[2, 3], [4, 5]]]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_last(rows, count):
    assert rows_of(Jagged.from_rows(rows).last(count)) == [row[-count:] for row in rows]


def test_select_takes_rows_in_any_order_and_again(rows):
    if rows:
        chosen = np.random.default_rng(1).integers(0, len(rows), size=10)
        jagged = Jagged.from_rows(rows)
        assert rows_of(jagged.select(torch.from_numpy(chosen))) == [rows[i] for i in chosen]
        where = jagged.value_index(torch.from_numpy(chosen))
        assert jagged.values[where].tolist() == [value for i in chosen for value in rows[i]]
    assert Jagged.from_rows(rows).select(torch.zeros(0, dtype=torch.int64)).num_rows == 0


def test_nested_tensors_are_the_same_rows():
    rows = [[1, 2], [3], [4, 5, 6]]
    jagged = Jagged.from_rows(rows)
    nested = jagged.to_nested()
    assert [row.tolist() for row in nested.unbind()] == rows
    assert rows_of(Jagged.from_nested(nested)) == rows


def test_other_values_on_the_same_rows():
    jagged = Jagged.from_rows([[1, 2], [3]])
    assert rows_of(jagged.with_values(jagged.values * 10)) == [[10, 20], [30]]
    assert rows_of(jagged.to("cpu")) == [[1, 2], [3]]


def test_sums_and_means_of_segments_including_empty_ones():
    values = torch.tensor([[1.0, 10.0], [2.0, 20.0], [5.0, 50.0]])
    row = torch.tensor([0, 0, 2])
    assert segment_sum(values, row, 4).tolist() == [[3, 30], [0, 0], [5, 50], [0, 0]]
    assert segment_mean(values, row, 4).tolist() == [[1.5, 15], [0, 0], [5, 50], [0, 0]]
    assert segment_mean(values[:, 0], row, 3).tolist() == [1.5, 0, 5]


def test_lengths_of_some_rows_are_those_of_all_rows():
    rows = Jagged.from_rows([[1, 2, 3], [], [4], [5, 6]])
    wanted = torch.tensor([3, 0, 0, 2, 1, -1])
    assert rows.lengths_of(wanted).tolist() == rows.lengths[wanted].tolist() == [2, 3, 3, 1, 0, 2]
    assert rows.select(wanted[:5]).values.tolist() == [5, 6, 1, 2, 3, 1, 2, 3, 4]


def test_keeping_some_values_keeps_the_rows():
    rows = Jagged.from_rows([[1, 2, 3], [], [4], [5, 6]])
    mask = torch.tensor([True, False, True, False, True, True])
    kept = rows.keep(mask)
    assert kept.values.tolist() == [1, 3, 5, 6]
    assert kept.offsets.tolist() == [0, 2, 2, 2, 4]
    assert rows.count(mask).tolist() == [2, 0, 0, 2]
    assert rows.count(~mask).tolist() == [1, 0, 1, 0]
    nothing = Jagged.from_rows([])
    assert nothing.keep(torch.zeros(0, dtype=torch.bool)).num_rows == 0


def test_what_follows_from_offsets_is_worked_out_once(rows):
    jagged = Jagged.from_rows(rows)
    for name in ("lengths", "row_of_value", "position_of_value"):
        assert getattr(jagged, name) is getattr(jagged, name)


def test_rows_made_from_others_know_their_own_lengths(rows):
    """Whatever was asked of the whole before, its parts answer for themselves."""
    whole = Jagged.from_rows(rows)
    assert len(whole.position_of_value) == len(whole.row_of_value)
    turned = torch.arange(len(rows)).flip(0)
    made = {
        "keep": (whole.keep(whole.values % 2 == 0), [[v for v in row if v % 2 == 0] for row in rows]),
        "select": (whole.select(turned), rows[::-1]),
        "last": (whole.last(2), [row[-2:] for row in rows]),
        "with_values": (whole.with_values(-whole.values), [[-v for v in row] for row in rows]),
        "replace": (replace(whole, offsets=whole.offsets[:1], values=whole.values[:0]), []),
        "to": (whole.to("cpu"), rows),
    }
    for part, expected in made.values():
        assert rows_of(part) == expected
        assert part.lengths.tolist() == [len(row) for row in expected]
        assert part.row_of_value.tolist() == [r for r, row in enumerate(expected) for _ in row]
        assert part.position_of_value.tolist() == [p for row in expected for p in range(len(row))]


def test_what_was_asked_while_evaluating_serves_training_too():
    jagged = Jagged.from_rows([[3, 1], [2]])
    with torch.inference_mode():
        assert jagged.row_of_value.tolist() == [0, 0, 1]
    weight = torch.ones(2, requires_grad=True)
    (weight[jagged.row_of_value] ** 2).sum().backward()  # an inference tensor could not be kept for this
    assert weight.grad is not None
    assert weight.grad.tolist() == [4.0, 2.0]


def test_rows_made_while_evaluating_keep_what_follows_from_them():
    with torch.inference_mode():
        jagged = Jagged.from_rows([[3, 1], [2]])
        assert jagged.row_of_value is jagged.row_of_value
