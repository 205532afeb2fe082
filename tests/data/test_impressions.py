"""Logged impressions: by hand, and against plain Python over the rows of random logs."""

from collections import defaultdict

import numpy as np
import polars as pl
import pytest
import torch

from data_support import HOUR, START, small_log
from shortlist.data.batches import labels_of, request_batch
from shortlist.data.dataset import Dataset, build_dataset
from shortlist.data.log import read
from shortlist.data.splits import WINDOW_NUMBER, DataConfig
from shortlist.errors import DataError, SnapshotError


def impression_frame(seed: int, *, with_request: bool = True, num_pages: int = 240) -> pl.DataFrame:
    """Pages of one to five shown items, rows seconds apart within a page, in shuffled file order; some pages have no request_id."""
    rng = np.random.default_rng(seed)
    rows = []
    for page in range(num_pages):
        user, at = f"u{rng.integers(11)}", START + HOUR * int(rng.integers(3_000)) + 60 * page % HOUR
        request = f"r{page % 90}" if rng.random() < 0.9 else None  # ids are reused by other users
        device = str(rng.choice(["tv", "phone"]))
        for line in range(int(rng.integers(1, 6))):
            later = 7 * line if with_request else 0
            click = int(rng.random() < 0.4 and user != "u7")
            like = None if rng.random() < 0.2 else click * int(rng.integers(0, 2))
            seconds = round(float(rng.exponential(30)), 1) if click else 0.0
            action = str(rng.choice(["view", "buy"]))
            value = float(rng.integers(1, 9))
            rows.append(
                (user, 100 + int(rng.integers(9)), at + later, request, click, like, seconds, action, value, device)
            )
    names = ["user_id", "item_id", "timestamp", "request_id", "click", "like", "playtime", "action", "value", "device"]
    frame = pl.DataFrame(rows, schema=names, orient="row").sample(fraction=1.0, shuffle=True, seed=seed)
    return frame if with_request else frame.drop("request_id")


def in_words(dataset: Dataset, window: str) -> dict:
    """(user, second) -> (past items, shown item -> labels, worth by target, device)."""
    requests, rows, labels = dataset.impressions(window)
    names = dataset.item_ids.decode
    found = {}
    for r in range(len(requests)):
        a, b = rows.offsets[r : r + 2].tolist()
        label = zip(*(column[a:b].double().numpy().round(4).tolist() for column in labels.values()))
        shown = dict(zip(names(rows.values[a:b].numpy()), label))
        assert len(shown) == b - a, "shown items must be distinct"
        c, d = requests.target_offsets[r : r + 2]
        worth = dict(zip(names(requests.target[c:d]), requests.target_value[c:d].tolist()))
        past = names(dataset.histories.item[requests.start[r] : requests.end[r]])
        user = dataset.user_ids.decode([requests.user[r]])[0]
        device = requests.context["device"][r]
        assert (user, int(requests.time[r])) not in found
        found[user, int(requests.time[r])] = (sorted(past), shown, worth, int(device))
    return found


def expected(log, dataset: Dataset, window: str, actions: tuple[str, ...]) -> dict:
    """The same by going through the rows one by one; groups are (user, second) here."""
    by_user, pages = defaultdict(list), defaultdict(list)
    rows = [row | {"at": int(row["timestamp"].timestamp())} for row in log.events.iter_rows(named=True)]
    for row in rows:
        by_user[row["user_id"]].append(row)
        request = row.get("request_id")
        pages[row["user_id"], ("r", request) if request else ("g", row["group_id"])].append(row)
    device = next(f for f in dataset.schema.of("context")).vocabulary
    found = {}
    for (user, _), lines in pages.items():
        first, last = min(line["at"] for line in lines), max(line["at"] for line in lines)
        if dataset.split.protocol == "time":
            number = sum(last >= dataset.plan.now[w] for w in ("fit", "valid", "test"))
        else:
            number = last_group_window(by_user[user], last)
        if number != WINDOW_NUMBER[window]:
            continue
        past = sorted(row["item_id"] for row in by_user[user] if row["at"] < first and row["click"])
        shown, worth = {}, {}
        for line in lines:
            is_target = bool(line["click"]) and (not actions or line["action"] in actions)
            now = (float(is_target), float(line["like"] or 0), line["playtime"])
            before = shown.get(line["item_id"], (0.0, 0.0, 0.0))
            shown[line["item_id"]] = tuple(round(max(x, y), 4) for x, y in zip(before, now))
            if is_target:
                worth[line["item_id"]] = worth.get(line["item_id"], 0.0) + line["value"]
        found[user, first] = (past, shown, worth, int(max(device.encode([line["device"] for line in lines]))))
    return found


def last_group_window(rows: list[dict], upto: int) -> int:
    """Of a user's clicked moments the last is test, the one before valid, the one before that fit; the first always trains."""
    moments = sorted({row["at"] for row in rows if row["click"]})
    part = {at: 3 - back if back < 3 and back < len(moments) - 1 else 0 for back, at in enumerate(reversed(moments))}
    earlier = [at for at in moments if at <= upto]
    return part[earlier[-1]] if earlier else 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("protocol", ["time", "last-group"])
@pytest.mark.parametrize("with_request", [True, False])
@pytest.mark.parametrize("actions", [(), ("buy",)])
def test_impressions_are_those_of_the_rows(seed, protocol, with_request, actions):
    log = read(impression_frame(seed, with_request=with_request))
    config = DataConfig(
        protocol=protocol,
        target_label="click",
        target_actions=actions if protocol == "time" else (),
        context=("device",),
    )
    dataset = build_dataset(log, config)
    total = 0
    for window in ("fit", "valid", "test"):
        found = in_words(dataset, window)
        assert found == expected(log, dataset, window, config.target_actions)
        total += len(found)
    assert 0 < total < len(dataset.logged.window)
    assert len(dataset.logged.requests) == len(dataset.logged.window) == dataset.logged.rows.num_rows
    assert list(dataset.logged.labels) == ["click", "like", "playtime"]


def test_a_page_by_hand_without_a_clock():
    """The history is what was chosen on earlier pages; moments are places among the moments with a choice."""
    pages = [
        ("p1", "a", 1), ("p1", "b", 0), ("p2", "c", 0), ("p3", "d", 1), ("p3", "d", 0), ("p4", "e", 0), ("p4", "f", 1), ("p5", "a", 1),
    ]  # fmt: skip
    frame = pl.DataFrame({
        "user_id": ["u"] * 8, "item_id": [i for _, i, _ in pages], "request_id": [p for p, _, _ in pages],
        "timestamp": [int(p[1]) for p, _, _ in pages], "click": [c for _, _, c in pages],
    })  # fmt: skip
    dataset = build_dataset(read(frame), DataConfig(protocol="last-group", repeats="yes"))
    assert dataset.histories.time.tolist() == [0, 1, 2, 3]
    requests = dataset.logged.requests
    assert requests.time.tolist() == [0, 1, 1, 2, 3]
    assert requests.end.tolist() == [0, 1, 1, 2, 3]
    assert dataset.logged.window.tolist() == [0, 0, 1, 2, 3]
    assert dataset.logged.rows.lengths.tolist() == [2, 1, 1, 2, 1]
    requests, rows, labels = dataset.impressions("valid")
    shown = dict(zip(dataset.item_ids.decode(rows.values.numpy()), labels["click"].tolist()))
    assert shown == {"e": 0.0, "f": 1.0}
    assert torch.equal(labels_of(rows, requests)[0], labels["click"])
    batch = request_batch(dataset.histories, dataset.users, requests, max_history=9)
    assert dataset.item_ids.decode(batch.history.items.values.numpy()) == ["a", "d"]


def test_the_order_of_the_rows_of_a_page_tells_nothing():
    frame = impression_frame(0)
    one = build_dataset(read(frame), DataConfig(target_label="click")).logged
    for seed in range(3):
        page = pl.struct("user_id", "request_id", "timestamp").rank("dense")
        lot = pl.Series(np.random.default_rng(seed).random(frame.height))
        shuffled = frame.with_columns(page=page, lot=lot).sort("page", "lot").drop("page", "lot")
        two = build_dataset(read(shuffled), DataConfig(target_label="click")).logged
        assert torch.equal(one.rows.values, two.rows.values)
        assert all(torch.equal(one.labels[name], two.labels[name]) for name in one.labels)


def test_without_a_label_or_a_window_there_are_none():
    with pytest.raises(DataError, match=r"every row is a choice.*target_label"):
        build_dataset(small_log(0)).impressions()
    dataset = build_dataset(read(impression_frame(0)), DataConfig(target_label="click"))
    with pytest.raises(DataError, match="fit, valid, test; got 'end'"):
        dataset.impressions("end")
    published = build_dataset(
        read(impression_frame(0)), DataConfig(target_label="click", protocol="leave-last-out-as-published")
    )
    with pytest.raises(DataError, match="the fit window has no impression"):
        published.impressions("fit")


def test_impressions_are_saved_with_the_data(tmp_path):
    config = DataConfig(target_label="click", context=("device",))
    dataset = build_dataset(read(impression_frame(0)), config)
    dataset.save(tmp_path / "set")
    again = Dataset.load(tmp_path / "set")
    assert again.config == config
    assert list(again.logged.labels) == ["click", "like", "playtime"]
    for window in ("fit", "valid", "test"):
        assert in_words(again, window) == in_words(dataset, window)
    (tmp_path / "set" / "logged.safetensors").unlink()
    with pytest.raises(SnapshotError, match="logged"):
        Dataset.load(tmp_path / "set")
