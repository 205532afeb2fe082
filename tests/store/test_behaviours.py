"""Pasts by attribute on disk: equal to a scan, before and after later events, through memory maps."""

import json

import numpy as np
import pytest
import torch

from shortlist.data.histories import Histories
from shortlist.errors import DataError, SnapshotError
from shortlist.store.behaviours import Behaviours

ATTRIBUTE = torch.tensor([0, 1, 2, 1, 2, 3, 0])  # of items 0 to 6


def log_of(pasts: list[list[int]]) -> Histories:
    item = np.array([i for past in pasts for i in past], dtype=np.int64)
    offsets = np.cumsum([0, 0, *map(len, pasts)]).astype(np.int64)
    clock = np.arange(len(item))
    return Histories(
        offsets=offsets, item=item, time=clock, group=clock, action=clock * 0 + 1, value=clock.astype(np.float32)
    )


def drawn(num_users: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 7, rng.integers(0, 60)).tolist() for _ in range(num_users)]


def scan(places: list[int], items: list[int], attribute: int, k: int) -> list[int]:
    same = [p for p, i in zip(places, items) if ATTRIBUTE[i] == attribute and attribute]
    return same[::-1][:k]


@pytest.mark.parametrize("k", [1, 5, 100])
@pytest.mark.parametrize("saved", [False, True])
def test_a_look_up_equals_a_scan(k, saved, tmp_path):
    pasts = drawn(30, 0)
    log = log_of(pasts)
    store = Behaviours.of(log, ATTRIBUTE, 4)
    if saved:
        store.save(tmp_path / "behaviours")
        store = Behaviours.load(tmp_path / "behaviours", verify=True)
    wanted = torch.tensor([2, 1, 3, 2, 0, 1])
    for user in range(1, 31):
        found = store.newest(user, wanted, k)
        places = list(range(log.offsets[user], log.offsets[user + 1]))
        for t, attribute in enumerate(wanted.tolist()):
            assert found.event[t][found.is_real[t]].tolist() == scan(places, pasts[user - 1], attribute, k)
    assert not store.newest(0, wanted, k).is_real.any()


@pytest.mark.parametrize("k", [2, 50])
def test_later_events_stand_before_those_of_the_log(k):
    pasts, later = drawn(6, 1), [(1, 3), (4, 2), (1, 1), (1, 6), (6, 5), (1, 5)]
    log = log_of(pasts)
    store = Behaviours.of(log, ATTRIBUTE, 4)
    for user, item in later[:4]:
        store.append([user], [int(ATTRIBUTE[item])])
    store.newest(1, torch.tensor([1]), k)
    store.append([user for user, _ in later[4:]], ATTRIBUTE[[item for _, item in later[4:]]])
    for user in range(1, 7):
        news = [(log.num_events + n, item) for n, (who, item) in enumerate(later) if who == user]
        places = [*range(log.offsets[user], log.offsets[user + 1]), *[place for place, _ in news]]
        items = [*pasts[user - 1], *[item for _, item in news]]
        found = store.newest(user, torch.tensor([1, 2, 3]), k)
        for t, attribute in enumerate((1, 2, 3)):
            assert found.event[t][found.is_real[t]].tolist() == scan(places, items, attribute, k)


def test_what_is_damaged_or_unfit_is_refused(tmp_path):
    store = Behaviours.of(log_of(drawn(3, 2)), ATTRIBUTE, 4)
    store.save(tmp_path / "b")
    (tmp_path / "b" / "key.npy").unlink()
    with pytest.raises(SnapshotError, match=r"key\.npy"):
        Behaviours.load(tmp_path / "b")
    store.append([1], [2])
    with pytest.raises(DataError, match="later events"):
        store.save(tmp_path / "c")
    with pytest.raises(DataError, match="2 users and 1 attributes"):
        store.append([1, 2], [1])


def test_files_hold_numbers_alone(tmp_path):
    store = Behaviours.of(log_of(drawn(3, 2)), ATTRIBUTE, 4)
    store.save(tmp_path / "b")
    assert sorted(json.loads((tmp_path / "b" / "manifest.json").read_text())["files"]) == [
        "event.npy",
        "key.npy",
        "numbers.npy",
    ]
    loaded = Behaviours.load(tmp_path / "b")
    assert loaded.num_bytes == store.num_bytes == 16 * len(store.index.key)
    assert loaded.num_events == store.num_events
