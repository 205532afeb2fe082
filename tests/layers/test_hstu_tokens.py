"""Tokens of HSTU: events by hand, their places and times, what memories have in common with a new history."""

import math

import numpy as np
import pytest
import torch

from shortlist.data.batches import History
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Categorical, Numeric, Sequence, Vector
from shortlist.layers.hstu_memory import longest_common
from shortlist.layers.hstu_tokens import (
    ActionEncoder,
    EventTokens,
    RequestMarks,
    TimeOfDay,
    content_token,
    joined,
    layout_of,
    past_of,
    sequences_of,
    unknown_columns,
)


def history_of(rows: list[list[tuple[int, int, int, int]]]) -> History:
    """Entries (item, action, group, time) per request; each worth 1."""
    flat = torch.tensor([entry for row in rows for entry in row], dtype=torch.int64).reshape(-1, 4)
    lengths = torch.tensor([len(row) for row in rows])
    return History(
        items=Jagged.from_lengths(flat[:, 0], lengths),
        time=flat[:, 3],
        action=flat[:, 1],
        value=torch.ones(len(flat)),
        group=flat[:, 2],
    )


ROWS = [
    # A view of 7, then a view of 5 and a view and a like of 9 in one group, whatever their order; an action nobody knows.
    [(7, 1, 3, 100), (9, 1, 4, 200), (5, 1, 4, 200), (9, 2, 4, 200), (7, 0, 9, 350)],
    [],
    # The same group number belongs to another person here, and 7 comes twice in different groups.
    [(7, 2, 3, 50), (7, 1, 4, 60)],
]
TIMES = torch.tensor([400, 10, 90])


def test_events_by_hand():
    past = past_of(history_of(ROWS), TIMES, 2)
    assert past.items.offsets.tolist() == [0, 4, 4, 6]
    assert past.items.values.tolist() == [7, 5, 9, 7, 7, 7]
    assert past.acted_EA.int().tolist() == [[1, 0], [1, 0], [1, 1], [0, 0], [0, 1], [1, 0]]
    assert past.value_E.tolist() == [1, 1, 2, 1, 1, 1]
    assert past.time_E.tolist() == [100, 200, 200, 350, 50, 60]
    assert past.next_time_E.tolist() == [200, 200, 350, 400, 60, 90]
    assert past.opens_group_E.tolist() == [True, True, False, True, True, True]
    assert past.last_of_group_h.tolist() == [0, 2, 2, 2, 3, 4, 5]


def test_the_order_of_lines_inside_a_group_is_not_read():
    swapped = [[ROWS[0][i] for i in (0, 3, 2, 1, 4)], *ROWS[1:]]
    one, other = past_of(history_of(ROWS), TIMES, 2), past_of(history_of(swapped), TIMES, 2)
    for name in ("acted_EA", "value_E", "time_E", "next_time_E"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert torch.equal(one.items.values, other.items.values)


def test_a_log_without_a_clock_has_no_times_and_empty_histories_no_events():
    past = past_of(history_of(ROWS), TIMES, 2, reads_time=False)
    assert not past.time_E.any()
    assert not past.next_time_E.any()
    nothing = past_of(history_of([[], []]), TIMES[:2], 2)
    assert nothing.items.offsets.tolist() == [0, 0, 0]
    assert nothing.acted_EA.shape == (0, 2)


def test_layout_by_hand():
    """One prefix token, two tokens per event: an item is asked about at its own time, an action at the next event's."""
    past = past_of(history_of(ROWS), TIMES, 2)
    layout = layout_of(past, 2, 1)
    assert layout.offsets_B1.tolist() == [0, 9, 10, 15]
    assert layout.event_T.tolist() == [-1, 0, 0, 1, 1, 2, 2, 3, 3, -1, -1, 4, 4, 5, 5]
    assert layout.position_T.tolist() == [*range(9), 0, *range(5)]
    assert layout.key_time_T.tolist() == [0, 100, 100, 200, 200, 200, 200, 350, 350, 0, 0, 50, 50, 60, 60]
    assert layout.query_time_T.tolist() == [0, 100, 200, 200, 200, 200, 350, 350, 400, 0, 0, 50, 60, 60, 90]
    assert content_token(past, layout, 2, 1).tolist() == [1, 3, 5, 7, 11, 13]
    merged = layout_of(past, 1, 0)
    assert merged.key_time_T.tolist() == past.time_E.tolist()
    assert merged.query_time_T.tolist() == past.next_time_E.tolist()
    assert merged.event_T.tolist() == [0, 1, 2, 3, 4, 5]


def test_sequences_of_new_tokens():
    layout = layout_of(past_of(history_of(ROWS), TIMES, 2), 1, 0)
    sequences = sequences_of(layout, torch.tensor([False, False, True, True, False, True]))
    assert sequences.query_offsets.tolist() == [0, 2, 2, 3]
    assert sequences.query_time.tolist() == [350, 400, 90]
    assert sequences.num_history.tolist() == [4, 0, 2]


def test_joined_rows():
    both = joined(Jagged.from_rows([[1, 2], [], [3]]), Jagged.from_rows([[4], [5, 6], []]))
    assert both.values.tolist() == [1, 2, 4, 5, 6, 3]
    assert both.offsets.tolist() == [0, 3, 5, 6]


@torch.no_grad()
def test_bits_of_actions_by_hand():
    """Two actions whose vectors are their bit and twice it; the maps read the first entry of each."""
    encoder = ActionEncoder(2, 2)
    encoder.bits.zero_()
    encoder.bits[:, 1, 0] = torch.tensor([1.0, 2.0])
    encoder.hidden.weight.zero_()
    encoder.hidden.bias.zero_()
    encoder.hidden.weight[0, 0] = encoder.hidden.weight[1, 8] = 1.0
    encoder.out.weight.copy_(torch.eye(2))
    encoder.out.bias.zero_()
    found = encoder(torch.tensor([[True, False], [True, True], [False, False]]))
    one, two = 1 / (1 + math.exp(-1)), 2 / (1 + math.exp(-2))
    torch.testing.assert_close(found, torch.tensor([[one, 0], [one, two], [0, 0]]))


@torch.no_grad()
@pytest.mark.parametrize("layout", ["merged", "interleaved"])
def test_token_vectors(layout):
    tokens = EventTokens(3, 4, layout, num_value_buckets=3)
    item, acted = torch.randn(2, 4), torch.tensor([[True, False, False], [False, False, True]])
    worth = torch.tensor([0.0, 100.0])  # buckets 0 and, as the last one, 2
    action = tokens.actions(acted) + tokens.values.weight[[0, 2]]
    made = tokens.events(item, acted, worth)
    if layout == "merged":
        torch.testing.assert_close(made, 2 * item + action)
        tokens.unknown.fill_(0.5)
        torch.testing.assert_close(tokens.candidates(item), 2 * item + 0.5)
    else:
        torch.testing.assert_close(made, torch.stack([2 * item[0], action[0], 2 * item[1], action[1]]))
        torch.testing.assert_close(tokens.candidates(item), 2 * item)


@torch.no_grad()
def test_marks_of_the_request():
    """Nine minutes are bucket 3, 100 years the last one; places are their own."""
    marks = RequestMarks(2, 5, reads_time=True)
    found = marks(torch.zeros(2, 2), torch.tensor([0, 4]), torch.tensor([9 * 60, 100 * 366 * 86_400]))
    torch.testing.assert_close(found, marks.places.weight[[0, 4]] + marks.minutes.weight[[3, 2047]])


@torch.no_grad()
def test_time_of_day_by_hand():
    """A quarter of a day and an eighth of a week later than midnight of a Thursday, when 1970 began."""
    late = TimeOfDay(1)
    late.mix.weight.copy_(torch.tensor([[0.0, 1.0, 10.0, 100.0, 1000.0]]))
    late.mix.bias.zero_()
    found = late(torch.ones(2, 1), torch.tensor([86_400 // 4, 7 * 86_400 // 8]))[:, 0]
    quarter = 1 + 100 * math.sin(math.pi / 14) + 1000 * math.cos(math.pi / 14)
    eighth = math.sin(2 * math.pi * 7 / 8) + 10 * math.cos(2 * math.pi * 7 / 8) + 1100 * math.sqrt(0.5)
    assert found.tolist() == pytest.approx([quarter, eighth], rel=1e-4)


def test_longest_common_agrees_with_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(50):
        old = [rng.integers(0, 2, rng.integers(0, 6)).tolist() for _ in range(4)]
        new = [rng.integers(0, 2, rng.integers(0, 6)).tolist() for _ in range(4)]
        old_flags, new_flags = ([[(v + i) % 3 > 0 for i, v in enumerate(r)] for r in rows] for rows in (old, new))
        new_flags = [[f and rng.random() < 0.8 for f in row] for row in new_flags]
        most = rng.integers(-1, 6, 4)
        expected = []
        for a, b, fa, fb, m in zip(old, new, old_flags, new_flags, most):
            n = 0
            while n < min(len(a), len(b), m) and a[n] == b[n] and fa[n] == fb[n]:
                n += 1
            expected.append(n)
        columns = [
            torch.tensor([f for row in flags for f in row], dtype=torch.bool) for flags in (old_flags, new_flags)
        ]
        found = longest_common(
            Jagged.from_rows(old), [columns[0]], Jagged.from_rows(new), [columns[1]], torch.from_numpy(most)
        )
        assert found.tolist() == expected


def test_unknown_columns_of_every_type():
    fields = (
        Categorical(name="c", size=3),
        Numeric(name="n"),
        Sequence(name="s", size=2),
        Vector(name="v", dim=2),
    )
    columns = unknown_columns(fields, 2, torch.device("cpu"))
    assert columns["c"].tolist() == [0, 0]
    assert columns["c"].dtype == torch.int64
    assert columns["n"].tolist() == [0, 0]
    assert columns["s"].num_rows == 2
    assert len(columns["s"].values) == 0
    assert columns["v"].shape == (2, 2)
