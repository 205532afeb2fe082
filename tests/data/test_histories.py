"""Histories and requests: cutting, saving, choosing, against loops."""

import numpy as np
import pytest

from data_support import random_histories
from shortlist.data.histories import Histories, Requests
from shortlist.errors import DataError, SnapshotError


@pytest.mark.parametrize("seed", range(4))
def test_keep_is_a_filter_per_user(seed):
    whole = random_histories(seed)
    mask = np.random.default_rng(seed).random(whole.num_events) < 0.5
    kept = whole.keep(mask)
    assert kept.num_users == whole.num_users
    for user in range(whole.num_users + 1):
        a, b = whole.offsets[user : user + 2]
        c, d = kept.offsets[user : user + 2]
        wanted = [whole.item[i] for i in range(a, b) if mask[i]]
        assert kept.item[c:d].tolist() == wanted
        assert kept.time[c:d].tolist() == [whole.time[i] for i in range(a, b) if mask[i]]
    assert kept.value.dtype == np.float32


def test_user_of_event_is_the_row_whose_range_holds_it():
    whole = random_histories(3)
    for event, user in enumerate(whole.user_of_event):
        assert whole.offsets[user] <= event < whole.offsets[user + 1]


def test_saved_histories_come_back_as_memory_maps(tmp_path):
    whole = random_histories(1)
    whole.save(tmp_path / "h")
    again = Histories.load(tmp_path / "h")
    assert isinstance(again.item, np.memmap)
    for name in ("offsets", "item", "time", "group", "action", "value"):
        np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))
    (tmp_path / "h" / "group.npy").write_bytes(b"rubbish")
    with pytest.raises(SnapshotError, match=r"group\.npy"):
        Histories.load(tmp_path / "h")


def test_arrays_that_do_not_fit_are_refused():
    whole = random_histories(1)
    arrays = {name: getattr(whole, name) for name in ("offsets", "item", "time", "group", "action", "value")}
    with pytest.raises(DataError, match="time has"):
        Histories(**{**arrays, "time": whole.time[:-1]})
    with pytest.raises(DataError, match="offsets must run"):
        Histories(**{**arrays, "offsets": whole.offsets + 1})


def test_empty_histories_have_users_without_events():
    empty = Histories.empty(3)
    assert (empty.num_users, empty.num_events, len(empty.user_of_event)) == (3, 0, 0)


def test_select_takes_whole_requests_in_any_order():
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 4, size=6)
    offsets = np.concatenate([[0, *np.cumsum(lengths)]]).astype(np.int64)
    target = np.arange(offsets[-1]) + 100
    requests = Requests(
        user=np.arange(6), time=np.arange(6) * 10, start=np.arange(6), end=np.arange(6) + 1, target_offsets=offsets,
        target=target, target_value=target.astype(np.float32) / 2, context={"hour": np.arange(6) + 1},
    )  # fmt: skip
    chosen = np.array([4, 0, 4, 2])
    picked = requests.select(chosen)
    assert picked.user.tolist() == [4, 0, 4, 2]
    assert picked.context["hour"].tolist() == [5, 1, 5, 3]
    for place, r in enumerate(chosen):
        a, b = picked.target_offsets[place : place + 2]
        assert picked.target[a:b].tolist() == target[offsets[r] : offsets[r + 1]].tolist()
        assert (picked.target_value[a:b] * 2).tolist() == picked.target[a:b].tolist()
    assert len(requests.select(np.zeros(0, dtype=np.int64))) == 0
