"""Batches against loops over users and events; histories include users without events and with one group."""

import itertools
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from data_support import random_histories
from shortlist.data.batches import (
    Batch,
    labels_of,
    next_event_batch,
    request_batch,
    split_batch,
    target_candidates,
)
from shortlist.data.histories import Histories, Requests
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Categorical, FieldTable
from shortlist.data.schema import Sequence as SequenceField
from shortlist.data.splits import past_requests

SEEDS = range(8)


def users_table(num_users: int) -> FieldTable:
    return FieldTable(
        num_users + 1, (Categorical(name="country", size=num_users),), {"country": torch.arange(num_users + 1)}
    )


def groups_of(histories: Histories, user: int, stop: int | None = None) -> list[list[int]]:
    """Event indices per group of one user, up to event `stop`."""
    a, b = histories.offsets[user : user + 2]
    found: list[list[int]] = []
    for event in range(a, b if stop is None else stop):
        if found and histories.group[found[-1][0]] == histories.group[event]:
            found[-1].append(event)
        else:
            found.append([event])
    return found


def rows_of(jagged: Jagged) -> list[list[int]]:
    return [jagged.values[a:b].tolist() for a, b in zip(jagged.offsets[:-1].tolist(), jagged.offsets[1:].tolist())]


# -- requests -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("max_history", [1, 3, 100])
def test_a_request_holds_its_newest_past_events(seed, max_history):
    histories = random_histories(seed)
    requests = past_requests(histories)
    batch = request_batch(histories, users_table(4), requests, max_history=max_history, exclude_history=True)
    assert batch.size == len(requests)
    for r, (user, start, end) in enumerate(zip(requests.user, requests.start, requests.end)):
        kept = list(range(start, end))[-max_history:]
        a, b = batch.history.items.offsets[r : r + 2].tolist()
        for name, column in (
            ("time", batch.history.time),
            ("action", batch.history.action),
            ("group", batch.history.group),
        ):
            assert column[a:b].tolist() == [getattr(histories, name)[i] for i in kept]
        assert batch.history.items.values[a:b].tolist() == [histories.item[i] for i in kept]
        assert batch.history.value[a:b].tolist() == [histories.value[i] for i in kept]
        # Excluded is the whole past, however short the history is cut.
        assert rows_of(batch.excluded)[r] == [histories.item[i] for i in range(start, end)]
        assert batch.user[r] == (user if user <= 4 else 0)
        assert batch.user_fields["country"][r] == batch.user[r]
        assert batch.time[r] == histories.time[end]


def test_targets_as_candidates_are_all_positive_and_worth_their_value():
    histories = random_histories(5)
    requests = past_requests(histories)
    candidates = target_candidates(requests)
    label, worth = labels_of(candidates, requests)
    assert bool((label == 1).all())
    assert worth.tolist() == requests.target_value.tolist()


@pytest.mark.parametrize("seed", SEEDS)
def test_labels_mark_the_chosen_ones(seed):
    histories = random_histories(seed)
    requests = past_requests(histories)
    rng = np.random.default_rng(seed)
    candidates = [rng.integers(1, 9, size=rng.integers(0, 8)).tolist() for _ in range(len(requests))]
    label, worth = labels_of(Jagged.from_rows(candidates), requests)
    wanted_label, wanted_worth = [], []
    for r, row in enumerate(candidates):
        a, b = requests.target_offsets[r : r + 2]
        chosen = dict(zip(requests.target[a:b].tolist(), requests.target_value[a:b].tolist()))
        wanted_label += [float(item in chosen) for item in row]
        wanted_worth += [chosen.get(item, 0.0) for item in row]
    assert label.tolist() == wanted_label
    assert worth.tolist() == wanted_worth


def test_labels_without_targets_or_candidates():
    none = np.zeros(0, dtype=np.int64)
    requests = Requests(
        user=np.ones(2, dtype=np.int64), time=none[:0], start=none, end=none, target_offsets=np.zeros(3, dtype=np.int64),
        target=none, target_value=np.zeros(0, dtype=np.float32),
    )  # fmt: skip
    label, _ = labels_of(Jagged.from_rows([[1, 2], [3]]), requests)
    assert label.tolist() == [0, 0, 0]
    assert labels_of(Jagged.from_rows([[], []]), requests)[0].shape == (0,)


# -- next events --------------------------------------------------------------------------------------------------


def expected_next(
    histories: Histories, user: int, stop: int, max_history: int
) -> tuple[list[int], list[tuple[int, list[int]]]]:
    """Input events, and (event that ends a group, distinct items of the next group) within them."""
    groups = groups_of(histories, user, stop)
    inputs = [event for group in groups[:-1] for event in group][-max_history:]
    steps = []
    for before, after in itertools.pairwise(groups):
        if before[-1] in inputs:
            steps.append((before[-1], sorted({int(histories.item[e]) for e in after})))
    return inputs, steps


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("max_history", [1, 4, 100])
@pytest.mark.parametrize("windows", [False, True])
def test_every_group_end_is_supervised_by_the_next_group(seed, max_history, windows):
    histories = random_histories(seed)
    rng = np.random.default_rng(seed)
    user_rows = rng.permutation(np.arange(histories.num_users + 1))
    ends = None
    if windows:
        ends = np.array([rng.integers(histories.offsets[u], histories.offsets[u + 1] + 1) for u in user_rows])
    batch = next_event_batch(histories, users_table(histories.num_users), user_rows, max_history=max_history, ends=ends)
    targets = rows_of(batch.targets.items)
    weights = [row.tolist() for row in batch.targets.weight.split(batch.targets.items.lengths.tolist())]
    step = 0
    for r, user in enumerate(user_rows):
        stop = histories.offsets[user + 1] if ends is None else ends[r]
        inputs, steps = expected_next(histories, user, stop, max_history)
        assert rows_of(batch.history.items)[r] == [histories.item[e] for e in inputs]
        offset = int(batch.history.items.offsets[r])
        for event, items in steps:
            assert int(batch.targets.position[step]) == offset + inputs.index(event)
            assert targets[step] == items
            assert weights[step] == pytest.approx([1 / len(items)] * len(items))
            step += 1
    assert step == len(batch.targets.position)


def test_nothing_is_predicted_from_its_own_group():
    histories = random_histories(2)
    users = np.arange(1, histories.num_users + 1)
    batch = next_event_batch(histories, users_table(len(users)), users, max_history=100)
    group = batch.history.group
    owner = batch.history.items.row_of_value
    for position in batch.targets.position.tolist():
        last_of_row = position + 1 == len(group) or owner[position + 1] != owner[position]
        assert last_of_row or group[position + 1] != group[position]


def test_the_order_inside_groups_changes_no_target():
    histories = random_histories(6)
    order = np.arange(histories.num_events)
    rng = np.random.default_rng(0)
    for user in range(1, histories.num_users + 1):
        for group in groups_of(histories, user):
            order[group] = rng.permutation(group)
    moved = replace(histories, item=histories.item[order], action=histories.action[order], value=histories.value[order])
    users = np.arange(1, histories.num_users + 1)
    assert (moved.item != histories.item).any()
    one, two = (next_event_batch(h, users_table(len(users)), users, max_history=100) for h in (histories, moved))
    assert one.targets.position.tolist() == two.targets.position.tolist()
    assert rows_of(one.targets.items) == rows_of(two.targets.items)


@pytest.mark.parametrize("histories", [Histories.empty(2), random_histories(0, num_users=2, most_groups=1)])
def test_users_with_nothing_to_predict_give_an_empty_batch(histories):
    batch = next_event_batch(histories, users_table(2), np.array([1, 2]), max_history=5)
    assert batch.size == 2
    assert len(batch.targets.position) == len(batch.targets.weight) == 0
    assert batch.targets.items.num_rows == 0


# -- parts --------------------------------------------------------------------------------------------------------


def batch_of(seed: int = 1) -> Batch:
    histories = random_histories(seed)
    return request_batch(histories, users_table(histories.num_users), past_requests(histories), max_history=100)


@pytest.mark.parametrize("count", [1, 2, 50])
def test_the_newest_events_of_a_history(count):
    history = batch_of().history
    short = history.last(count)
    assert rows_of(short.items) == [row[-count:] for row in rows_of(history.items)]
    owner = history.items.row_of_value
    kept = [int(i) for r in range(history.items.num_rows) for i in torch.nonzero(owner == r)[:, 0][-count:]]
    for name in ("time", "action", "value", "group"):
        assert getattr(short, name).tolist() == getattr(history, name)[kept].tolist()


def test_other_candidates_drop_old_labels_and_weights():
    batch = replace(batch_of(), weight=torch.ones(3), labels={"target": torch.ones(3)})
    rows = Jagged.from_rows([[1]] * batch.size)
    again = batch.with_candidates(rows)
    assert again.weight is None
    assert again.labels == {}
    assert again.candidate_rows is rows
    with pytest.raises(ValueError, match="no candidates"):
        _ = batch.candidate_rows


def test_other_candidates_leave_all_of_the_requests():
    batch = batch_of()
    batch = replace(batch, excluded=batch.history.items, context={"hour": batch.time}, key=("who",) * batch.size)
    again = batch.with_candidates(Jagged.from_rows([[1]] * batch.size))
    of_candidates = {"candidates", "labels", "weight", "sample_kind", "emitted_at", "criteria"}
    for name in {f.name for f in fields(batch)} - of_candidates:
        assert getattr(again, name) is getattr(batch, name), name


def test_a_batch_moves_as_a_whole():
    batch = batch_of().with_candidates(Jagged.from_rows([[1]] * batch_of().size), {"p": torch.zeros(batch_of().size)})
    moved = batch.to("meta")
    assert {
        t.device.type for t in (moved.user, moved.history.items.values, moved.history.time, moved.candidates.pair["p"])
    } == {"meta"}
    assert moved.targets is None


def test_batches_read_memory_mapped_histories(tmp_path):
    whole = random_histories(4)
    whole.save(tmp_path)
    mapped = Histories.load(tmp_path)
    one, two = (request_batch(h, users_table(9), past_requests(h), max_history=5) for h in (whole, mapped))
    assert one.history.items.values.tolist() == two.history.items.values.tolist()
    assert one.history.time.tolist() == two.history.time.tolist()


@pytest.mark.parametrize("seed", range(4))
def test_a_cut_batch_is_the_batches_of_its_parts(seed):
    """With histories, candidates, pair fields, labels, weights, excluded rows, and ragged user fields."""
    histories = random_histories(seed)
    requests = past_requests(histories)
    lists = Jagged.from_rows([[u] * (u % 3) for u in range(histories.num_users + 1)])
    table = users_table(histories.num_users)
    fields = (*table.fields, SequenceField(name="tags", size=histories.num_users))
    users = FieldTable(table.num_rows, fields, {**table.columns, "tags": lists})

    def built(part: Requests) -> Batch:
        batch = request_batch(histories, users, part, max_history=3, exclude_history=True)
        rows = target_candidates(part)
        number = rows.values.float()
        return replace(batch.with_candidates(rows, {"pair": number + 1}, {"label": number + 2}), weight=number + 3)

    sizes = [3, 0, 1, len(requests) - 4]
    ends = np.cumsum(sizes)
    parts = list(split_batch(built(requests), sizes))
    assert [part.size for part in parts] == sizes
    for part, end, size in zip(parts, ends, sizes):
        wanted = built(requests.select(np.arange(end - size, end)))
        assert flat(part) == flat(wanted)
    with pytest.raises(ValueError, match="sizes"):
        next(split_batch(built(requests), sizes[:-1]))


@pytest.mark.parametrize("seed", range(4))
def test_a_cut_batch_of_next_events_is_the_batches_of_its_users(seed):
    """Also users with one group, who have neither inputs nor targets, and a part without anybody."""
    histories = random_histories(seed)
    users = np.random.default_rng(seed).permutation(np.arange(1, histories.num_users + 1))
    table = users_table(histories.num_users)
    sizes = [2, 0, 1, len(users) - 3]
    whole = next_event_batch(histories, table, users, max_history=4)
    parts = list(split_batch(whole, sizes))
    assert sum(len(part.targets.position) for part in parts) == len(whole.targets.position) > 0
    for part, chosen in zip(parts, np.split(users, np.cumsum(sizes)[:-1]), strict=True):
        assert flat(part) == flat(next_event_batch(histories, table, chosen, max_history=4))


def flat(thing: object) -> object:
    """A batch as plain Python: what two must share to be the same."""
    if isinstance(thing, torch.Tensor):
        return str(thing.dtype), thing.tolist()
    if isinstance(thing, dict):
        return {name: flat(value) for name, value in thing.items()}
    if hasattr(thing, "__dataclass_fields__"):
        return {name: flat(getattr(thing, name)) for name in thing.__dataclass_fields__}
    return thing
