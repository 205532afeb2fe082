"""Batches are a function of (seed, epoch, step), cover what they should, and keep what they must."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import Tensor
from training_toys import chain_view, histories_of, view_of

from shortlist.data.batches import Batch, Candidates
from shortlist.data.histories import Requests
from shortlist.data.jagged import Jagged
from shortlist.errors import ConfigError, DataError
from shortlist.training.sources import BatchSource, CandidateSource, NextEventSource, TargetSource

NUM_REQUESTS = 23


def requests_of(view, targets: list[list[int]]) -> Requests:
    """Request r: user r + 1 with their whole history, and the given targets."""
    users = np.arange(1, len(targets) + 1)
    flat = np.array([t for row in targets for t in row], dtype=np.int64)
    return Requests(
        user=users,
        time=np.full(len(users), 10**6),
        start=view.histories.offsets[users],
        end=view.histories.offsets[users + 1],
        target_offsets=np.cumsum([0, *map(len, targets)]).astype(np.int64),
        target=flat,
        target_value=np.ones(len(flat), dtype=np.float32),
    )


def next_events(**options) -> NextEventSource:
    return NextEventSource(chain_view(), batch_size=8, max_history=5, **{"seed": 1, **options})


def targets(**options) -> TargetSource:
    view = chain_view()
    chosen = [list(range(1, 1 + r % 5)) for r in range(NUM_REQUESTS)]
    return TargetSource(view, requests_of(view, chosen), batch_size=4, max_history=5, **{"seed": 1, **options})


def candidates(**options) -> CandidateSource:
    """Request r has 6 + r % 8 candidates r * 100 + 0, 1, ..., the first r % 3 of them positive; the pair field repeats the candidate."""
    view = chain_view()
    rows = Jagged.from_rows([[r * 100 + c for c in range(6 + r % 8)] for r in range(NUM_REQUESTS)])
    label = (rows.position_of_value < rows.row_of_value % 3).float()
    return CandidateSource(
        view.histories,
        view.users,
        requests_of(view, [[] for _ in range(NUM_REQUESTS)]),
        Candidates(rows=rows, pair={"echo": rows.values.float()}),
        {"click": label, "order": torch.zeros_like(label)},
        batch_size=4,
        max_history=5,
        **{"seed": 1, **options},
    )


SOURCES = {
    "next": next_events,
    "next-window": lambda **o: next_events(random_window=True, **o),
    "next-buckets": lambda **o: next_events(bucket_by_length=True, random_window=True, **o),
    "targets": lambda **o: targets(max_targets=2, **o),
    "targets-buckets": lambda **o: targets(bucket_by_length=True, **o),
    "candidates": lambda **o: candidates(num_negatives=3, **o),
}


def tensors(thing: object) -> list[Tensor]:
    """Every tensor in a batch, in a fixed order."""
    if isinstance(thing, Tensor):
        return [thing]
    if isinstance(thing, dict):
        return [t for key in sorted(thing) for t in tensors(thing[key])]
    if hasattr(thing, "__dataclass_fields__"):
        return [t for f in fields(thing) for t in tensors(getattr(thing, f.name))]
    return []


def same(a: Batch, b: Batch) -> bool:
    left, right = tensors(a), tensors(b)
    assert len(left) == len(right) >= 5
    return all(torch.equal(x, y) for x, y in zip(left, right))


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
class TestEverySource:
    def test_resumes_at_any_step(self, make):
        source = make()
        assert isinstance(source, BatchSource)
        steps = source.steps_per_epoch()
        whole = list(source.batches(2))
        assert len(whole) == steps > 2
        list(source.batches(1))  # what was read before must not matter
        for start in (1, steps - 1, steps):
            rest = list(make().batches(2, start))
            assert len(rest) == steps - start
            assert all(same(a, b) for a, b in zip(rest, whole[start:]))

    def test_built_together_or_one_by_one(self, make, monkeypatch):
        together = list(make().batches(1))
        monkeypatch.setattr("shortlist.training.sources.REQUESTS_AT_ONCE", 1)
        assert all(same(a, b) for a, b in zip(make().batches(1), together, strict=True))

    def test_every_row_once_per_epoch_in_an_order_of_its_own(self, make):
        source = make()
        orders = [torch.cat([batch.user for batch in source.batches(epoch)]).tolist() for epoch in (0, 1)]
        other_seed = torch.cat([batch.user for batch in make(seed=2).batches(0)]).tolist()
        assert sorted(orders[0]) == sorted(orders[1]) == sorted(other_seed) == sorted(set(orders[0]))
        assert orders[0] != orders[1]
        assert orders[0] != other_seed

    def test_earlier_batches_are_not_built(self, make, monkeypatch):
        built = []
        for name in ("next_event_batch", "request_batch"):
            original = getattr(__import__("shortlist.training.sources", fromlist=[name]), name)

            def counted(*args, original=original, **kwargs):
                built.append(1)
                return original(*args, **kwargs)

            monkeypatch.setattr(f"shortlist.training.sources.{name}", counted)
        source = make()
        next(source.batches(0, source.steps_per_epoch() - 1))
        assert len(built) == 1


def test_users_with_one_group_are_left_out():
    """User 1 bought two things at once, user 2 one thing; only user 3 has a next event."""
    view = view_of(histories_of([[(1, 5), (2, 5)], [(3, 1)], [(1, 1), (2, 1), (3, 2)], []]))
    source = NextEventSource(view, batch_size=2, max_history=5)
    (batch,) = source.batches(0)
    assert batch.user.tolist() == [3]
    assert batch.targets.items.values.tolist() == [3]


def test_a_log_of_single_events_has_nothing_to_learn_from():
    with pytest.raises(DataError, match="no user of 2 has events at two different times"):
        NextEventSource(view_of(histories_of([[(1, 1)], [(2, 1)]])), batch_size=2, max_history=5)


@pytest.mark.parametrize("name", ["batch_size", "max_history"])
def test_sizes_are_checked(name):
    with pytest.raises(ConfigError, match="at least 1"):
        NextEventSource(chain_view(), **{"batch_size": 1, "max_history": 1, name: 0})


def test_windows_end_at_groups_and_reach_every_stretch():
    """One user of 20 groups of two events: over many epochs each next group is a target, and always as a whole."""
    events = [(2 * g + offset, g + 1) for g in range(20) for offset in (1, 2)]
    source = NextEventSource(view_of(histories_of([events]), 50), batch_size=1, max_history=6, random_window=True)
    last = set()
    for epoch in range(120):
        (batch,) = source.batches(epoch)
        assert batch.history.items.lengths.tolist() == [6], "a window is full"
        rows = batch.targets.items.padded()[0]
        assert batch.targets.items.lengths.tolist() == [2] * batch.targets.items.num_rows
        assert (rows[:, 1] == rows[:, 0] + 1).all()
        last.add(int(rows[-1, 0] - 1) // 2)
    assert last == set(range(3, 20))


def test_a_window_holds_more_than_the_first_group():
    """A first group larger than the window would leave nothing to predict; the window must reach the second."""
    events = [(1, 1)] * 30 + [(2, 2), (3, 3)]
    source = NextEventSource(view_of(histories_of([events])), batch_size=1, max_history=4, random_window=True)
    for epoch in range(30):
        (batch,) = source.batches(epoch)
        assert batch.targets.items.num_rows >= 1


def test_short_users_show_all_they_have():
    view = view_of(histories_of([[(1, 1), (2, 2), (3, 3)], [(i % 9 + 1, i) for i in range(30)]]))
    source = NextEventSource(view, batch_size=2, max_history=10, random_window=True)
    for epoch in range(5):
        (batch,) = source.batches(epoch)
        row = batch.user.tolist().index(1)
        assert batch.history.items.lengths[row] == 2


def test_buckets_hold_similar_lengths():
    spread = {}
    for bucket in (False, True):
        source = NextEventSource(chain_view(400), batch_size=8, max_history=50, bucket_by_length=bucket)
        lengths = [batch.history.items.lengths for batch in source.batches(0)]
        spread[bucket] = sum(int(x.max() - x.min()) for x in lengths) / len(lengths)
    assert spread[True] < 0.3 * spread[False]
    firsts = [next(source.batches(epoch)).history.items.lengths.float().mean() for epoch in range(20)]
    assert max(firsts) - min(firsts) > 4, "short and long batches must come in random order"


def test_targets_are_a_random_subset_of_the_chosen():
    source = targets(max_targets=2)
    seen: dict[int, set[int]] = {}
    for epoch in range(30):
        for batch in source.batches(epoch):
            rows = batch.candidate_rows
            for user, start, end in zip(batch.user.tolist(), rows.offsets[:-1].tolist(), rows.offsets[1:].tolist()):
                kept = rows.values[start:end].tolist()
                chosen = (user - 1) % 5
                assert len(kept) == min(chosen, 2)
                assert kept == sorted(set(kept)), "kept in order, none twice"
                seen.setdefault(user, set()).update(kept)
    for user, kept in seen.items():
        assert kept == set(range(1, 1 + (user - 1) % 5)), "every target has its turn"
    assert all((user - 1) % 5 for user in seen), "requests without a target are left out"


def test_all_targets_by_default():
    for batch in targets().batches(0):
        assert batch.candidate_rows.lengths.tolist() == [(user - 1) % 5 for user in batch.user.tolist()]


def test_positives_are_kept_and_negatives_drawn_anew():
    source = candidates(num_negatives=3)
    negatives: dict[int, set[int]] = {}
    for epoch in range(45):
        for batch in source.batches(epoch):
            rows, label = batch.candidate_rows, batch.labels["click"]
            assert torch.equal(batch.candidates.pair["echo"], rows.values.float())
            for r, start, end in zip((batch.user - 1).tolist(), rows.offsets[:-1].tolist(), rows.offsets[1:].tolist()):
                kept = rows.values[start:end]
                assert (kept // 100 == r).all()
                positive = label[start:end] > 0
                assert kept[positive].tolist() == [r * 100 + c for c in range(r % 3)]
                assert int((~positive).sum()) == 3
                negatives.setdefault(r, set()).update(kept[~positive].tolist())
    assert set(negatives) == {r for r in range(NUM_REQUESTS) if r % 3}, "requests without a positive are left out"
    for r, seen in negatives.items():
        assert seen == {r * 100 + c for c in range(r % 3, 6 + r % 8)}, "every negative has its turn"


def test_shown_pages_teach_also_where_nothing_was_chosen():
    for negatives in (None, 3):
        source = candidates(num_negatives=negatives, only_chosen=False)
        sizes = {}
        for batch in source.batches(0):
            sizes |= dict(zip((batch.user - 1).tolist(), batch.candidate_rows.lengths.tolist()))
        assert sizes == {r: 6 + r % 8 if negatives is None else r % 3 + 3 for r in range(NUM_REQUESTS)}


def test_all_candidates_by_default():
    for batch in candidates().batches(0):
        assert batch.candidate_rows.lengths.tolist() == [6 + (user - 1) % 8 for user in batch.user.tolist()]
        assert batch.labels.keys() == {"click", "order"}


def test_extra_columns_follow_their_candidates_and_make_none_positive():
    """With and without them the same candidates are drawn."""
    total = sum(6 + r % 8 for r in range(NUM_REQUESTS))
    marked = candidates(num_negatives=2).with_columns({"number": torch.arange(1, total + 1)})
    all_rows = torch.cat([torch.arange(6 + r % 8) + r * 100 for r in range(NUM_REQUESTS)])
    for plain, batch in zip(candidates(num_negatives=2).batches(1), marked.batches(1), strict=True):
        assert torch.equal(plain.candidate_rows.values, batch.candidate_rows.values)
        assert batch.labels.keys() == {"click", "order", "number"}
        assert torch.equal(all_rows[batch.labels["number"] - 1], batch.candidate_rows.values)
    with pytest.raises(DataError, match="'number' has 3 values"):
        candidates().with_columns({"number": torch.ones(3)})


def test_candidates_are_checked():
    view = chain_view()
    requests = requests_of(view, [[], []])
    rows = Jagged.from_rows([[1], [2, 3]])
    sizes = {"batch_size": 2, "max_history": 5}

    def build(rows=rows, pair=None, labels=None, **options):
        labels = {"click": torch.ones(3)} if labels is None else labels
        return CandidateSource(
            view.histories, view.users, requests, Candidates(rows=rows, pair=pair or {}), labels, **sizes, **options
        )

    build()
    with pytest.raises(DataError, match="1 rows of candidates for 2 requests"):
        build(rows=Jagged.from_rows([[1]]))
    with pytest.raises(DataError, match="'seen' has 2 values for 3 candidates"):
        build(pair={"seen": torch.ones(2)})
    with pytest.raises(DataError, match="at least one label"):
        build(labels={})
    with pytest.raises(DataError, match="none of 2 requests has a positive candidate"):
        build(labels={"click": torch.zeros(3)})
    with pytest.raises(ConfigError, match="num_negatives"):
        build(num_negatives=0)


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_batches_built_together_are_those_built_alone(make, monkeypatch):
    together = list(make().batches(3))
    monkeypatch.setattr("shortlist.training.sources.REQUESTS_AT_ONCE", 1)
    alone = list(make().batches(3))
    assert len(together) == len(alone) > 2
    for ours, theirs in zip(together, alone):
        assert same(ours, theirs)
        assert [t.dtype for t in tensors(ours)] == [t.dtype for t in tensors(theirs)]
