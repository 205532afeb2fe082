"""New events join a dataset: where what it should give can be told in advance, it is what building anew on the whole log gives."""

import datetime

import numpy as np
import polars as pl
import pytest

from shortlist.data.dataset import Dataset, build_dataset
from shortlist.data.extending import NewEvents, extended
from shortlist.data.log import read
from shortlist.data.splits import DataConfig
from shortlist.errors import ConfigError, DataError

START = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)
OLD, NEW = 600, 200


def frames(seed=0, num=OLD + NEW, users=30, items=40):
    rng = np.random.default_rng(seed)
    moments = np.sort(rng.choice(90 * 86_400, num, replace=False))
    events = pl.DataFrame({
        "user_id": [f"u{n}" for n in rng.integers(users, size=num)],
        "item_id": rng.integers(100, 100 + items, num),
        "timestamp": [START + datetime.timedelta(seconds=int(s)) for s in moments],
        "action": rng.choice(["buy", "view"], num),
        "value": rng.integers(1, 9, num).astype(float),
        "device": rng.choice(["phone", "desk"], num),
    })  # fmt: skip
    table = pl.DataFrame({
        "item_id": range(100, 100 + items), "shelf": [f"s{n % 4}" for n in range(items)],
        "title": [f"Item {n}" for n in range(items)],
    })  # fmt: skip
    people = pl.DataFrame({"user_id": [f"u{n}" for n in range(users)], "town": [f"t{n % 5}" for n in range(users)]})
    return events, table, people


def new_events(frame):
    return NewEvents(
        user=frame["user_id"],
        item=frame["item_id"].cast(pl.String),
        time_ms=frame["timestamp"].dt.timestamp("ms").to_numpy(),
        action=frame["action"].to_list(),
        value=frame["value"].to_numpy().astype(np.float32),
    )


@pytest.fixture
def log():
    return frames()


@pytest.fixture
def old(log):
    events, items, users = log
    return build_dataset(read(events.head(OLD), items=items, users=users), DataConfig(context=("device",)))


def grow(old, frame, **settings):
    return extended(old, new_events(frame), valid_share=0.25, test_share=0.25, **settings)


def past_of(dataset, user):
    """What a dataset says of a user, in words."""
    row = int(dataset.user_ids.encode([user])[0])
    where = slice(int(dataset.histories.offsets[row]), int(dataset.histories.offsets[row + 1]))
    histories = dataset.histories
    return [
        (item, int(time), dataset.space.actions[action - 1], float(value))
        for item, time, action, value in zip(
            dataset.item_ids.decode(histories.item[where]),
            histories.time[where],
            histories.action[where],
            histories.value[where],
        )
    ]


def test_histories_are_those_of_the_whole_log(log, old):
    events, items, users = log
    found = grow(old, events.tail(NEW).sample(fraction=1, shuffle=True, seed=1))
    anew = build_dataset(read(events, items=items, users=users), DataConfig())
    assert found.num_new == NEW
    for user in users["user_id"]:
        assert past_of(found.dataset, user) == past_of(anew, user), user


def test_rows_of_items_stay_and_rows_of_users_are_told(log, old):
    events, _, _ = log
    late = events.tail(NEW)
    late = pl.concat([late, late.head(3).with_columns(user_id=pl.lit("newcomer"), item_id=pl.Series([900, 901, 900]))])
    found = grow(old, late)
    made = found.dataset
    assert made.item_ids.ids[: len(old.item_ids)].equals(old.item_ids.ids)
    assert sorted(made.item_ids.decode([len(old.item_ids) + 1, len(old.item_ids) + 2])) == [900, 901]
    assert (found.num_new_users, found.num_new_items) == (1, 2)
    names = made.user_ids.decode(np.arange(1, len(made.user_ids) + 1))
    assert found.user_before[1:].tolist() == old.user_ids.encode(names).tolist()
    known = found.user_before[1 : old.space.num_users + 1]
    assert known.tolist() == list(range(1, old.space.num_users + 1))  # who was trained on keeps the row
    (field,) = (f.name for f in old.schema.of("user"))
    towns, before = (dataset.all_users.columns[field] for dataset in (made, old))
    assert towns[found.user_before > 0].tolist() == before[found.user_before[found.user_before > 0]].tolist()
    assert len(set(towns.tolist())) > 4


def test_windows_move_on_and_the_newest_events_are_held_out(log, old):
    events, _, _ = log
    made = grow(old, events.tail(NEW)).dataset
    times = np.sort(events.tail(NEW)["timestamp"].dt.timestamp("ms").to_numpy() // 1000)
    assert made.plan.now["valid"] == times[NEW // 2]
    assert made.plan.now["test"] == times[3 * NEW // 4]
    assert made.plan.now["end"] == times[-1] + 1
    assert made.plan.now["fit"] > old.plan.now["fit"]
    window = made.plan.window_of_event
    shares = np.bincount(window, minlength=4)
    assert shares[3] == NEW // 4
    assert shares[2] == NEW // 4
    assert shares[1] == int(0.25 * (OLD + NEW))
    for number, name in ((1, "fit"), (2, "valid"), (3, "test")):
        requests = getattr(made.split, name)
        assert (requests.time >= made.plan.now[name]).all()
        assert set(made.plan.request_of_event[requests.end]) == {number}
    view = made.view("test")
    assert (view.histories.time < made.plan.now["test"]).all()
    assert made.space.num_users == len(np.unique(made.histories.user_of_event[window == 0]))
    known = set(np.flatnonzero(made.space.known_items.numpy()))
    assert known == set(made.histories.item[window == 0].tolist())


def test_requests_are_those_of_histories_before_them(log, old):
    events, _, _ = log
    made = grow(old, events.tail(NEW)).dataset
    requests = made.split.test
    for number in range(0, len(requests), 7):
        name = made.user_ids.decode([int(requests.user[number])])[0]
        moment = int(requests.time[number])
        mine = events.filter(pl.col("user_id") == name).with_columns(s=pl.col("timestamp").dt.epoch("s"))
        asked = made.histories.item[requests.start[number] : requests.end[number]]
        assert made.item_ids.decode(asked) == mine.filter(pl.col("s") < moment)["item_id"].to_list()
        target = requests.target[requests.target_offsets[number] : requests.target_offsets[number + 1]]
        assert made.item_ids.decode(target) == mine.filter(pl.col("s") == moment)["item_id"].to_list()


def test_what_is_there_already_is_not_counted_twice(log, old):
    events, _, _ = log
    found = grow(old, events.tail(NEW + 50))
    assert (found.num_new, found.num_repeated) == (NEW, 50)
    assert found.dataset.histories.num_events == OLD + NEW
    with pytest.raises(DataError, match="no new events"):
        grow(found.dataset, events.tail(NEW))


def test_updates_one_after_the_other_end_where_one_does(log, old):
    events, _, users = log
    late = events.tail(NEW)
    once = grow(old, late).dataset
    twice = grow(grow(old, late.head(NEW // 2)).dataset, late.tail(NEW // 2)).dataset
    for user in users["user_id"]:
        assert past_of(once, user) == past_of(twice, user)


def test_context_of_new_events_is_unknown_and_of_old_ones_stays(log, old):
    events, _, _ = log
    made = grow(old, events.tail(NEW)).dataset
    column = made.event_context["device"]
    is_new = made.histories.time > int(events["timestamp"][OLD - 1].timestamp())
    assert set(column[is_new]) == {0}
    words = {(u, s): d for u, s, d in events.select("user_id", pl.col("timestamp").dt.epoch("s"), "device").iter_rows()}
    name = made.user_ids.decode(made.histories.user_of_event)
    code = {"phone": set(), "desk": set()}
    for n in np.flatnonzero(~is_new):
        code[words[name[n], int(made.histories.time[n])]].add(int(column[n]))
    assert [len(found) for found in code.values()] == [1, 1]
    assert code["phone"] != code["desk"]


def test_new_items_have_the_fields_that_are_told(log, old):
    events, _, _ = log
    late = pl.concat(
        [events.tail(NEW), events.tail(2).with_columns(item_id=pl.Series([900, 901]), user_id=pl.lit("u1"))]
    )
    told = pl.DataFrame({"item_id": ["900"], "shelf": ["s2"], "title": ["A new one"]})
    made = grow(old, late, items=told).dataset
    rows = made.item_ids.encode([900, 901, 102])
    shelf = made.space.items.columns["shelf"]
    assert shelf[rows[0]] == shelf[rows[2]] > 0  # item 102 stands on s2 too
    assert shelf[rows[1]] == 0
    assert [made.titles[row] for row in rows] == ["A new one", "", "Item 2"]


def test_events_of_those_who_asked_are_left_out(log, old):
    events, _, _ = log
    gone = old.user_ids.encode(["u3"])
    made = grow(old, events.tail(NEW).filter(pl.col("user_id") != "u3"), without=gone).dataset
    assert past_of(made, "u3") == []
    assert past_of(made, "u4") != []
    assert made.histories.num_events == events.filter(pl.col("user_id") != "u3").height


def test_what_can_not_be_numbered_is_counted(log, old):
    events, _, _ = log
    late = new_events(events.tail(NEW))
    odd = NewEvents(
        user=pl.concat([late.user, pl.Series(["u1"])]),
        item=pl.concat([late.item, pl.Series(["a word where numbers are"])]),
        time_ms=np.append(late.time_ms, late.time_ms[-1] + 1000),
        action=[*late.action, None],
        value=np.append(late.value, np.float32(1)),
    )
    found = extended(old, odd, valid_share=0.25, test_share=0.25)
    assert (found.num_new, found.num_unusable) == (NEW, 1)


def test_it_can_be_saved_and_read(log, old, tmp_path):
    events, _, _ = log
    made = grow(old, events.tail(NEW)).dataset
    made.save(tmp_path / "dataset")
    read_back = Dataset.load(tmp_path / "dataset")
    assert past_of(read_back, "u3") == past_of(made, "u3")
    assert read_back.plan.now == made.plan.now
    assert len(read_back.split.test) == len(made.split.test)


def test_what_has_no_newest_part_is_refused(log):
    events, items, users = log
    by_place = build_dataset(read(events.head(OLD), items=items, users=users), DataConfig(protocol="last-group"))
    with pytest.raises(ConfigError, match="cut by 'last-group' and can not be updated"):
        grow(by_place, events.tail(NEW))


def test_too_few_new_events_are_said(log, old):
    events, _, _ = log
    with pytest.raises(DataError, match="too few new events"):
        grow(old, events.tail(NEW).head(1))
