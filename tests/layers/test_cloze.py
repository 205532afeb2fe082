"""Masked-item training from next-event batches: by hand, against a loop, and what must never show."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from next_item_support import next_events, view_of
from shortlist.data.jagged import Jagged
from shortlist.layers.cloze import (
    draw_masks,
    draw_segments,
    hide,
    random_prefixes,
    whole_sequences,
    with_mask_behind,
)

BASKETS = [[[1], [2], [3, 4]], [[9]], [[5, 6, 6], [7]], []]


def rows_of(jagged: Jagged) -> list[list[int]]:
    return [part.tolist() for part in jagged.values.split(jagged.lengths.tolist())]


def test_sequences_hold_the_last_group_too():
    batch = next_events(view_of(BASKETS, 9))
    whole = whole_sequences(batch.history, batch.targets)
    # Whoever has one group alone has nothing to predict, and the feed leaves it out.
    assert rows_of(whole.rows) == [[1, 2, 3, 4], [], [5, 6, 6, 7], []]
    assert whole.group.tolist() == [0, 1, 2, 2, 3, 3, 3, 4]
    assert whole.opens.tolist() == [True, True, True, False, True, False, False, True]


def test_sequences_are_the_training_events_and_no_more():
    """Nothing that the view holds back can come in, and nothing of it is lost but by the window."""
    rng = np.random.default_rng(0)
    users = [[[int(i)] for i in rng.integers(1, 30, rng.integers(2, 12))] for _ in range(40)]
    batch = next_events(view_of(users, 30), max_history=6)
    whole = whole_sequences(batch.history, batch.targets)
    assert rows_of(whole.rows) == [[g[0] for g in user][-7:] for user in users]  # six of history and the last target


def test_a_hidden_group_becomes_one_mask_with_its_distinct_items():
    batch = next_events(view_of(BASKETS, 9))
    whole = whole_sequences(batch.history, batch.targets)
    cloze = hide(whole, torch.tensor([False, True, True, True, False]))
    assert rows_of(cloze.rows) == [[1, 0, 0], [], [0, 7], []]
    assert cloze.is_mask.tolist() == [False, True, True, True, False]
    assert cloze.targets.position.tolist() == [1, 2, 3]
    assert rows_of(cloze.targets.items) == [[2], [3, 4], [5, 6]]
    assert cloze.targets.weight.tolist() == [1, 0.5, 0.5, 0.5, 0.5]


def test_neither_items_nor_number_of_a_hidden_group_show():
    def holes(last: list[int]) -> list[list[int]]:
        batch = next_events(view_of([[[1], last, [3]]], 9))
        whole = whole_sequences(batch.history, batch.targets)
        return rows_of(hide(whole, torch.tensor([False, True, False])).rows)

    assert holes([2]) == holes([5, 6, 7]) == [[1, 0, 3]]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_number_of_masks_per_user(share):
    torch.manual_seed(0)
    lengths = torch.tensor([2, 3, 5, 10, 40])
    users = [[[1 + i % 9] for i in range(n)] for n in lengths.tolist()]
    batch = next_events(view_of(users, 9))
    whole = whole_sequences(batch.history, batch.targets)
    masked = draw_masks(whole, share, 0.0)
    wanted = [min(max(1, round(share * n)), n - 1) for n in lengths.tolist()]  # never all of them
    assert [int(part.sum()) for part in masked.split(lengths.tolist())] == wanted


def test_every_group_is_hidden_equally_often():
    torch.manual_seed(0)
    batch = next_events(view_of([[[i] for i in range(1, 11)]] * 3, 10))
    whole = whole_sequences(batch.history, batch.targets)
    times = torch.stack([draw_masks(whole, 0.3, 0.0) for _ in range(2000)]).float().mean(0)
    torch.testing.assert_close(times, torch.full((30,), 0.3), atol=0.05, rtol=0)


def test_last_share_hides_the_last_group_alone():
    torch.manual_seed(0)
    batch = next_events(view_of([[[1], [2], [3, 4]], [[5], [6]]], 9))
    whole = whole_sequences(batch.history, batch.targets)
    assert draw_masks(whole, 0.5, 1.0).tolist() == [False, False, True, False, True]
    many = torch.stack([draw_masks(whole, 0.34, 0.25)[:3] for _ in range(4000)])
    only_last = (many == torch.tensor([False, False, True])).all(1).float().mean()
    assert only_last == pytest.approx(0.25 + 0.75 / 3, abs=0.03)  # by rule, or as the one random mask of three


def test_requests_get_one_mask_behind():
    rows, is_mask = with_mask_behind(Jagged.from_rows([[4, 5], [], [6]]))
    assert rows_of(rows) == [[4, 5, 0], [0], [6, 0]]
    assert is_mask.nonzero()[:, 0].tolist() == [2, 3, 5]


def test_nothing_is_fine():
    batch = next_events(view_of([[[1]], []], 9))
    whole = whole_sequences(batch.history, batch.targets)
    cloze = hide(whole, draw_masks(whole, 0.2, 0.1))
    assert len(cloze.rows.values) == len(cloze.targets.position) == 0


# --- prefixes and segments, for S3-Rec ---


def sequences_of(users: list[list[list[int]]]):
    batch = next_events(view_of(users, 30))
    return whole_sequences(batch.history, batch.targets)


def test_prefixes_start_at_the_start_and_end_after_a_group():
    torch.manual_seed(0)
    users = [[[1], [2, 3], [4], [5]], [[9]], [[6], [7, 8]]]
    allowed = {(1,), (1, 2, 3), (1, 2, 3, 4), (1, 2, 3, 4, 5), (6,), (6, 7, 8)}
    seen = set()
    for _ in range(30):
        prefixes = random_prefixes(sequences_of(users), 2, 50)
        assert prefixes.rows.num_rows == 4  # two of each user that has a next event
        rows = [tuple(row) for row in rows_of(prefixes.rows)]
        assert all(row[0] == 1 for row in rows[:2])
        assert all(row[0] == 6 for row in rows[2:])
        seen |= set(rows)
        opens = prefixes.opens.tolist()
        groups = prefixes.group.tolist()
        assert groups == list(np.cumsum(opens) - 1)
    assert seen == allowed


def test_long_prefixes_keep_their_newest_events():
    torch.manual_seed(0)
    prefixes = random_prefixes(sequences_of([[[i] for i in range(1, 11)]]), 40, 3)
    for row in rows_of(prefixes.rows):
        assert len(row) <= 3
        assert row == list(range(row[-1] - len(row) + 1, row[-1] + 1))


def test_segments_are_whole_groups_of_at_most_half():
    torch.manual_seed(0)
    sequences = sequences_of([[[1], [2, 3], [4], [5]], [[6], [7, 8]]])
    seen = set()
    for _ in range(200):
        first, second = draw_segments(sequences).split(sequences.rows.lengths.tolist())
        seen.add(tuple(first.long().tolist()))
        assert tuple(second.long().tolist()) in {(1, 0, 0), (0, 1, 1)}
    assert seen == {
        (1, 0, 0, 0, 0),
        (0, 1, 1, 0, 0),
        (0, 0, 0, 1, 0),
        (0, 0, 0, 0, 1),
        (1, 1, 1, 0, 0),
        (0, 1, 1, 1, 0),
        (0, 0, 0, 1, 1),
    }


def test_one_group_has_no_segment():
    torch.manual_seed(0)
    prefixes = random_prefixes(sequences_of([[[1, 2], [3]]]), 50, 2)
    single = [
        row
        for row, part in zip(rows_of(prefixes.rows), draw_segments(prefixes).split(prefixes.rows.lengths.tolist()))
        if not part.any()
    ]
    assert [1, 2] in single
    assert all(row == [1, 2] for row in single)
