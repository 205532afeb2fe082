"""A whole data set: what each side knows and from when, serving, new items, files."""

import json
from dataclasses import fields, replace

import numpy as np
import polars as pl
import pytest
import torch

from data_support import DAY, HOUR, START, baskets_of, small_frame, small_log
from shortlist.data.batches import request_batch
from shortlist.data.dataset import Dataset, build_dataset
from shortlist.data.encode import sort_events
from shortlist.data.histories import Histories
from shortlist.data.jagged import Jagged
from shortlist.data.log import Roles, read
from shortlist.data.schema import Categorical, Numeric, Sequence, Text
from shortlist.data.schema_file import Schema
from shortlist.data.splits import DataConfig
from shortlist.errors import DataError, SnapshotError

KINDS = ("food", "tool", "book")


def shop(seed: int = 0):
    """A log with tables, event columns and a device that is known before the event."""
    frame = small_frame(seed, num_events=500)
    item, user = frame["item_id"], frame["user_id"].str.slice(1).cast(pl.Int64)
    frame = frame.with_columns(
        maker=(item % 4).cast(pl.String) + "m",
        city=(user % 3).cast(pl.String) + "c",
        quantity=pl.Series(np.random.default_rng(seed).integers(1, 9, size=frame.height)),
        device=(frame["timestamp"] % 3 == 0).cast(pl.String),
    )
    ids = list(range(100, 120))
    items = pl.DataFrame({
        "item_id": ids,
        "title": [f"The {KINDS[i % 3]} number {i}" for i in ids],
        "kind": [KINDS[i % 3] for i in ids],
        "tags": [["x", "y"] if i % 2 else ["y"] for i in ids],
        "price": [0.5 + (i * 37 % 11) for i in ids],
    })  # fmt: skip
    users = pl.DataFrame({"user_id": [f"u{u}" for u in range(14)], "age": [20.5 + 3 * u for u in range(14)]})
    return read(frame, items=items, users=users, roles=Roles(value="value", basket="basket_id", action="action"))


CONFIG = DataConfig(context=("device",), repeats="yes")


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return build_dataset(shop(), CONFIG)


# -- fields -------------------------------------------------------------------------------------------------------


def test_every_side_gets_its_fields(dataset):
    items = {f.name: type(f) for f in dataset.space.items}
    assert items == {
        "title_words": Sequence, "title": Text, "kind": Categorical, "tags": Sequence, "price": Numeric, "maker": Categorical,
    }  # fmt: skip
    assert {f.name: type(f) for f in dataset.space.user_fields} == {"age": Numeric, "city": Categorical}
    assert [f.name for f in dataset.space.context_fields] == ["hour", "weekday", "device"]
    reasons = {u.column: u.why for u in dataset.schema.unused}
    assert "outcome" in reasons["quantity"]
    assert set(reasons) == {"quantity"}


def test_rows_carry_the_values_of_their_ids(dataset):
    log = shop()
    kind = next(f for f in dataset.schema.of("item") if f.name == "kind")
    for item, title, name in log.items.select("item_id", "title", "kind").iter_rows():
        row = int(dataset.item_ids.encode([item])[0])
        assert dataset.titles[row] == title
        assert kind.vocabulary.decode([int(dataset.space.items.columns["kind"][row])]) == [name]
    assert dataset.titles[0] == ""
    assert dataset.space.items.columns["kind"][0] == 0
    age = dataset.users.columns["age"]
    known = dataset.user_ids.decode(np.arange(1, dataset.space.num_users + 1))
    raw = np.array([20.5 + 3 * int(u[1:]) for u in known])
    np.testing.assert_allclose(age[1:], (raw - raw.mean()) / raw.std(), rtol=1e-5)


def test_the_catalogue_holds_items_without_events(dataset):
    log = shop()
    assert dataset.num_items == 20
    never = set(log.items["item_id"]) - set(log.events["item_id"])
    assert never
    rows = dataset.item_ids.encode(sorted(never))
    assert (rows > 0).all()
    assert not dataset.space.known_items[rows].any()
    assert (dataset.space.items.columns["kind"][rows] > 0).all()
    assert not dataset.space.known_items[0]


def test_values_that_only_come_later_are_unknown():
    """A country of test users, an action, a word and a number that only the future holds."""
    past = [(f"u{k % 20}", f"i{k % 15}", START + HOUR * k, "home", "view") for k in range(300)]
    future = [(f"n{k % 9}", f"j{k % 5}", START + HOUR * (1_000 + k), "abroad", "gift") for k in range(100)]
    frame = pl.DataFrame([*past, *future], schema=["user_id", "item_id", "timestamp", "place", "action"], orient="row")
    frame = frame.with_columns(place=pl.when(pl.col("user_id") == "u1").then(pl.lit("away")).otherwise("place"))
    ids = [f"i{k}" for k in range(15)] + [f"j{k}" for k in range(5)]
    items = pl.DataFrame({
        "item_id": ids,
        "kind": ["new" if i[0] == "j" else "old" if int(i[1:]) % 2 else "older" for i in ids],
        "weight": [1e9 if i[0] == "j" else 1.5 + int(i[1:]) % 4 for i in ids],
        "title": [f"{'hyper' if i[0] == 'j' else 'plain'} thing {i[1:]}" for i in ids],
    })  # fmt: skip
    log = read(frame, items=items, roles=Roles(action="action"))
    dataset = build_dataset(log, DataConfig(fit_share=0.1, valid_share=0.05, test_share=0.1))
    assert dataset.space.actions == ("view",)
    new = dataset.item_ids.encode([f"j{k}" for k in range(5)])
    columns = dataset.space.items.columns
    assert columns["kind"][new].tolist() == [0] * 5
    assert bool((columns["weight"][new] == 10).all())
    assert abs(float(columns["weight"][dataset.space.known_items].mean())) < 1e-5
    words = next(f for f in dataset.schema.of("item") if f.name == "title_words").vocabulary
    assert words.encode(["plain", "hyper"]).tolist() == [words.encode(["plain"])[0], 0]
    gifts = dataset.histories.action[np.isin(dataset.histories.item, new)]
    assert set(gifts) == {0}
    place = next(f for f in dataset.schema.of("user") if f.name == "place").vocabulary
    assert set(place.ids) == {"home", "away"}
    strangers = dataset.user_ids.encode([f"n{k}" for k in range(9)])
    assert (strangers > dataset.space.num_users).all()
    assert dataset.all_users.columns["place"][strangers].tolist() == [0] * 9


def test_a_column_that_varies_is_a_field_only_where_it_is_declared(dataset):
    undeclared = build_dataset(shop(), DataConfig(repeats="yes"))
    assert [f.name for f in undeclared.space.context_fields] == ["hour", "weekday"]
    assert "device" in {u.column for u in undeclared.schema.unused}
    device = next(f for f in dataset.schema.of("context")).vocabulary
    log, test = shop(), dataset.split.test
    whole = baskets_of(log)
    for r in range(len(test)):
        user = dataset.user_ids.decode([test.user[r]])[0]
        basket = next(b for b in whole[user] if b.at == test.time[r])
        assert test.context["device"][r] == max(device.encode([line["device"] for line in basket.lines]))
        assert test.context["hour"][r] == test.time[r] % DAY // HOUR + 1


def test_wrong_columns_and_actions_are_named():
    with pytest.raises(DataError, match="'phone'"):
        build_dataset(shop(), DataConfig(context=("phone",)))
    with pytest.raises(DataError, match="'item_id'"):
        build_dataset(shop(), DataConfig(context=("item_id",)))
    with pytest.raises(DataError, match=r"'steal'.*buy, view"):
        build_dataset(shop(), DataConfig(target_actions=("steal",)))


def test_k_core_keeps_frequent_users_and_items_and_says_so():
    """By hand: u3 and c have one event each; without c, u2 has one left and goes too; then b has two, a three."""
    pairs = [
        ("u1", "a"),
        ("u1", "b"),
        ("u2", "a"),
        ("u2", "c"),
        ("u3", "b"),
        ("u4", "a"),
        ("u4", "b"),
        ("u1", "a"),
        ("u4", "a"),
        ("u1", "b"),
    ]
    frame = pl.DataFrame({
        "user_id": [u for u, _ in pairs], "item_id": [i for _, i in pairs], "timestamp": [START + HOUR * k for k in range(len(pairs))],
    })  # fmt: skip
    dataset = build_dataset(read(frame), DataConfig(kcore=2, protocol="leave-last-out-as-published", repeats="yes"))
    assert sorted(dataset.user_ids.ids) == ["u1", "u4"]
    assert sorted(dataset.item_ids.ids) == ["a", "b"]
    assert dataset.histories.num_events == 7
    assert "at least 2 events" in dataset.split.note


# -- views --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["time", "last-group", "user"])
def test_a_view_knows_its_own_events_users_and_items_only(protocol):
    dataset = build_dataset(small_log(1), DataConfig(protocol=protocol, repeats="yes"))
    before = 0
    for window in ("fit", "valid", "test", "end"):
        view = dataset.view(window)
        assert view.histories.num_events > before
        before = view.histories.num_events
        counts = np.diff(view.histories.offsets)
        assert counts[0] == 0
        assert (counts[1:] > 0).all()
        assert view.histories.num_users == view.space.num_users == view.users.num_rows - 1
        assert set(np.flatnonzero(view.space.known_items.numpy())) == set(view.histories.item)
        if protocol == "time" and window != "end":
            assert view.histories.time.max() < view.now
        assert view.histories.time.max() <= view.now
    assert before == dataset.histories.num_events
    assert dataset.view().space.num_users == dataset.space.num_users
    assert torch.equal(dataset.view().space.known_items, dataset.space.known_items)
    with pytest.raises(DataError, match="no window 'train'"):
        dataset.view("train")


def test_past_requests_of_a_view_carry_all_its_context(dataset):
    view, requests = dataset.view(), dataset.past_requests()
    batch = request_batch(view.histories, view.users, requests, max_history=20)
    assert set(batch.context) == {"hour", "weekday", "device"}
    assert requests.end.max() < view.histories.num_events
    assert requests.user.max() <= view.space.num_users
    assert requests.context["device"].max() == 2


# -- serving ------------------------------------------------------------------------------------------------------


def test_serving_builds_the_very_batch_of_an_offline_request(dataset):
    """Same user, moment and context: the served history equals the held-out request's."""
    test = dataset.split.test
    device = next(f for f in dataset.schema.of("context")).vocabulary
    users = dataset.user_ids.decode(test.user)
    raw = {"device": device.decode(test.context["device"])}
    past, asked = dataset.requests_for(users, at=test.time - 1, context=raw)
    for r in range(len(test)):
        earlier = dataset.histories.time[test.start[r] : test.end[r]] <= test.time[r] - 1
        items = dataset.histories.item[test.start[r] : test.end[r]][earlier]
        assert past.item[asked.start[r] : asked.end[r]].tolist() == items.tolist()
    assert asked.context["device"].tolist() == test.context["device"].tolist()
    assert asked.context["hour"].tolist() == ((test.time - 1) % DAY // HOUR + 1).tolist()
    assert asked.user.tolist() == test.user.tolist()


def test_strangers_are_served_from_the_history_they_bring(dataset):
    items = dataset.item_ids.encode([101, 103, 101])
    time = np.array([START + 50, START, START + 999])
    past, _ = sort_events(
        np.array([1, 1, 1]), items, time, action=dataset.action_ids(["view", "buy", "steal"]), num_users=2
    )
    got, asked = dataset.requests_for(["nobody", None], at=START + 100, histories=past)
    assert asked.user.tolist() == [0, 0]
    assert got.item[asked.start[0] : asked.end[0]].tolist() == dataset.item_ids.encode([103, 101]).tolist()
    assert (asked.end - asked.start).tolist() == [2, 0]
    assert dataset.space.actions[got.action[0] - 1] == "buy"
    assert got.action[2] == 0
    batch = request_batch(got, dataset.users, asked, max_history=10)
    assert batch.context["device"].tolist() == [0, 0]
    assert len(asked.target) == 0


def test_a_request_without_a_moment_follows_the_last_event(dataset):
    known = dataset.user_ids.decode([1])[0]
    past, asked = dataset.requests_for([known, "nobody"])
    assert asked.time[0] == past.time.max() + 1
    assert asked.end[0] == past.num_events
    assert asked.time[1] == dataset.histories.time.max() + 1


def test_a_past_read_where_it_stands_is_the_past_that_was_copied(dataset):
    """Some users have events after the moment, some none before it, and one is not known."""
    rows = np.array([3, 0, 1, 7, 3])
    log = dataset.histories
    spans = (log.offsets[rows], log.offsets[rows + 1])
    users = [None] * len(rows)
    for at in (None, int(np.median(log.time)), np.array([START, 0, START + 10**9, int(np.median(log.time)), 5])):
        past, copied = dataset.requests_for(users, rows=rows, at=at)
        same, standing = dataset.requests_for(users, rows=rows, at=at, histories=log, spans=spans)
        assert same is log
        assert standing.time.tolist() == copied.time.tolist()
        one = request_batch(past, dataset.users, copied, max_history=4, exclude_history=True)
        other = request_batch(log, dataset.users, standing, max_history=4, exclude_history=True)
        for name in ("time", "action", "value"):
            assert torch.equal(getattr(one.history, name), getattr(other.history, name))
        assert torch.equal(one.history.items.values, other.history.items.values)
        assert torch.equal(one.history.items.offsets, other.history.items.offsets)
        assert torch.equal(one.excluded.values, other.excluded.values)
        assert torch.equal(one.context["hour"], other.context["hour"])
    with pytest.raises(DataError, match="one history per user"):
        dataset.requests_for(users, rows=rows, histories=log)


def test_serving_refuses_what_does_not_fit(dataset):
    with pytest.raises(DataError, match="'phone'"):
        dataset.requests_for(["u1"], context={"phone": ["a"]})
    with pytest.raises(DataError, match="2 values for 1"):
        dataset.requests_for(["u1"], context={"device": ["a", "b"]})
    with pytest.raises(DataError, match="one history per user"):
        dataset.requests_for(["u1"], histories=Histories.empty(2))


def test_new_items_join_the_catalogue_by_their_fields(dataset):
    fresh = pl.DataFrame(
        {"item_id": [500, 105, 501], "kind": ["tool", "book", "unheard"], "title": ["A tool number", None, None]}
    )
    grown = dataset.with_items(fresh)
    assert grown.num_items == 22
    rows = grown.item_ids.encode([500, 501])
    assert sorted(rows) == [21, 22]
    assert grown.space.items.columns["kind"][rows].tolist() == [
        int(dataset.space.items.columns["kind"][tool_row(dataset)]),
        0,
    ]
    assert not grown.space.known_items[rows].any()
    assert grown.titles[rows[0]] == "A tool number"
    assert len(grown.titles) == 23
    assert grown.space.items.columns["title_words"].lengths[rows].tolist() == [3 - int(unknown_word(dataset, "a")), 0]
    assert dataset.num_items == 20
    assert grown.titles[105 - 105 + int(dataset.item_ids.encode([105])[0])].startswith("The")
    assert dataset.with_items(fresh[1:2]) is dataset
    with pytest.raises(DataError, match="'item_id'"):
        dataset.with_items(pl.DataFrame({"id": [1]}))
    with pytest.raises(DataError, match="repeated"):
        dataset.with_items(pl.DataFrame({"item_id": [500, 500]}))


def tool_row(dataset: Dataset) -> int:
    return next(row for row, title in enumerate(dataset.titles) if "tool" in title and dataset.space.known_items[row])


def unknown_word(dataset: Dataset, word: str) -> bool:
    return not next(f for f in dataset.schema.of("item") if f.name == "title_words").vocabulary.encode([word])[0]


# -- files --------------------------------------------------------------------------------------------------------


def equal(a, b) -> bool:
    if isinstance(a, Jagged):
        return torch.equal(a.values, b.values) and torch.equal(a.offsets, b.offsets)
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return set(a) == set(b) and all(equal(a[k], b[k]) for k in a)
    if hasattr(a, "__dataclass_fields__"):
        return all(equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if hasattr(a, "ids"):
        return a.ids.to_list() == b.ids.to_list()
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))
    return bool(a == b)


@pytest.mark.parametrize("which", ["tables", "plain", "no clock"])
def test_a_saved_dataset_comes_back_whole(dataset, tmp_path, which):
    if which == "plain":
        dataset = build_dataset(small_log(3), DataConfig(target_actions=("buy",)))
    if which == "no clock":
        dataset = build_dataset(read(small_frame(3).drop("timestamp")), DataConfig(repeats="yes"))
    dataset.save(tmp_path / "set")
    dataset.save(tmp_path / "set")
    again = Dataset.load(tmp_path / "set")
    for f in fields(Dataset):
        one, two = getattr(dataset, f.name), getattr(again, f.name)
        assert equal(dict(one) if f.name == "event_context" else one, two), f.name
    assert isinstance(again.histories.item, np.memmap)
    assert not (tmp_path / "set.part").exists()
    past, _ = again.requests_for(again.user_ids.decode([1, 2]))
    assert past.num_events > 0


def test_the_schema_is_a_file_to_read(dataset, tmp_path):
    dataset.save(tmp_path / "set")
    text = (tmp_path / "set" / "schema.toml").read_text()
    for words in (
        'name = "kind"',
        'type = "Categorical"',
        "[[fields.user]]",
        'column = "quantity"',
        'user = "user_id"',
    ):
        assert words in text
    again = Schema.load(tmp_path / "set")
    assert again.to_toml() == dataset.schema.to_toml()


@pytest.mark.parametrize("name", ['a "quoted" name', "tab\tand\nline", "back\\slash", "ünï[x]=1", "\x7f"])
def test_odd_column_names_survive_the_file(dataset, tmp_path, name):
    kind = next(f for f in dataset.schema.fields if f.name == "kind")
    odd = replace(
        dataset.schema, fields=(replace(kind, name=name, column=name, why=name),), roles={name: name}, title=name
    )
    odd.save(tmp_path)
    again = Schema.load(tmp_path)
    assert (again.fields[0].name, again.fields[0].why, again.title, again.roles) == (name, name, name, {name: name})


def test_a_mismatch_names_the_field(dataset, tmp_path):
    folder = tmp_path / "set"
    dataset.save(folder)
    path = folder / "schema.toml"
    text = path.read_text()
    path.write_text(text.replace("size = 3", "size = 4", 1))
    with pytest.raises(DataError, match=r"'kind'.*4 known values, its vocabulary has 3"):
        Dataset.load(folder)
    path.write_text(text.replace('name = "price"', 'name = "cost"'))
    with pytest.raises(DataError, match="'cost'"):
        Dataset.load(folder)
    path.write_text(text.replace('type = "Numeric"', 'type = "Vector"', 1))
    with pytest.raises(DataError, match="'price'"):
        Dataset.load(folder)


@pytest.mark.parametrize(
    "name",
    ["schema.toml", "dataset.json", "items.parquet", "users.parquet", "events.safetensors", "item_fields.safetensors",
     "user_fields.safetensors", "test.safetensors", "titles.parquet", "histories/item.npy"],
)  # fmt: skip
@pytest.mark.parametrize("damage", ["absent", "rubbish"])
def test_a_damaged_file_is_named(dataset, tmp_path, name, damage):
    dataset.save(tmp_path)
    path = tmp_path / name
    path.unlink()
    if damage == "rubbish":
        path.write_bytes(b"\xff\x00rubbish")
    with pytest.raises(SnapshotError, match=path.name.replace(".", r"\.")):
        Dataset.load(tmp_path)


def test_json_holds_the_config_as_given(dataset, tmp_path):
    dataset.save(tmp_path / "set")
    about = json.loads((tmp_path / "set" / "dataset.json").read_text())
    assert about["config"]["context"] == ["device"]
    assert Dataset.load(tmp_path / "set").config == CONFIG


def test_the_same_log_and_seed_give_the_same_dataset_and_another_seed_other_rows():
    one, two = build_dataset(shop(), CONFIG), build_dataset(shop(), CONFIG)
    assert equal(one.histories, two.histories)
    assert equal(one.split, two.split)
    other = build_dataset(shop(), replace(CONFIG, seed=1))
    assert other.item_ids.ids.to_list() != one.item_ids.ids.to_list()
    assert sorted(other.item_ids.decode(other.histories.item)) == sorted(one.item_ids.decode(one.histories.item))
