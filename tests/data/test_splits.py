"""Splits against plain Python over the log's own rows: what trains, what is asked, from which history, with which targets."""

from datetime import UTC, datetime

import numpy as np
import polars as pl
import pytest

from data_support import (
    HOUR,
    START,
    Basket,
    baskets_of,
    plain_log,
    random_histories,
    shuffled_inside_groups,
    small_frame,
    small_log,
)
from shortlist.data.dataset import Dataset, build_dataset
from shortlist.data.histories import Histories, Requests
from shortlist.data.log import EventLog, read
from shortlist.data.splits import DataConfig, past_requests, repeat_share, time_context
from shortlist.errors import ConfigError, DataError

Asked = dict[tuple[str, int], tuple[list[list[str]], dict[str, float]]]
"""(user, second) -> history as items of each group in order, and worth by target."""


def asked_in(dataset: Dataset, requests: Requests) -> Asked:
    """Requests in the log's own words."""
    found: Asked = {}
    histories = dataset.histories
    for r in range(len(requests)):
        user = str(dataset.user_ids.decode([requests.user[r]])[0])
        past: list[list[str]] = []
        for event in range(requests.start[r], requests.end[r]):
            if event == requests.start[r] or histories.group[event] != histories.group[event - 1]:
                past.append([])
            past[-1].append(dataset.item_ids.decode([histories.item[event]])[0])
        a, b = requests.target_offsets[r : r + 2]
        worth = dict(zip(dataset.item_ids.decode(requests.target[a:b]), requests.target_value[a:b].tolist()))
        assert len(worth) == b - a, "targets must be distinct"
        assert (user, int(requests.time[r])) not in found
        found[user, int(requests.time[r])] = (past, worth)
    return found


def ask(baskets: list[Basket], place: int, actions: tuple[str, ...] = (), repeats: bool = True):
    """What a request for one of a user's baskets must look like; None without a target."""
    past = [[line["item_id"] for line in basket.lines] for basket in baskets[:place]]
    seen = {item for group in past for item in group}
    worth: dict[str, float] = {}
    for line in baskets[place].lines:
        if (not actions or line["action"] in actions) and (repeats or line["item_id"] not in seen):
            worth[line["item_id"]] = worth.get(line["item_id"], 0.0) + (line.get("value") or 1.0)
    return (past, pytest.approx(worth)) if worth else None


def expected(log: EventLog, wanted, **kwargs) -> dict:
    """Requests for every basket that `wanted(baskets, place)` accepts."""
    found = {}
    for user, baskets in baskets_of(log).items():
        for place, basket in enumerate(baskets):
            request = ask(baskets, place, **kwargs) if wanted(baskets, place) else None
            if request:
                found[str(user), basket.at] = request
    return found


def seconds_of(log: EventLog) -> np.ndarray:
    return np.sort([basket.at for baskets in baskets_of(log).values() for basket in baskets for _ in basket.lines])


# -- by time ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("repeats", ["yes", "no"])
@pytest.mark.parametrize("actions", [(), ("buy",)])
def test_time_windows_ask_for_whole_baskets_from_everything_before(seed, repeats, actions):
    log = small_log(seed)
    dataset = build_dataset(log, DataConfig(repeats=repeats, target_actions=actions))
    at = seconds_of(log)
    cuts = [int(at[int(len(at) * (1 - share))]) for share in (0.40, 0.15, 0.10)]
    for window, low, high in zip(("fit", "valid", "test"), cuts, [*cuts[1:], 10**12]):
        got = asked_in(dataset, getattr(dataset.split, window))
        wanted = lambda baskets, place, low=low, high=high: low <= baskets[place].at < high  # noqa: E731
        assert got == expected(log, wanted, actions=actions, repeats=repeats == "yes")
        assert dataset.view(window).now == low
        assert dataset.view(window).histories.num_events == sum(at < low)


def test_shares_of_the_events_fall_into_the_windows():
    log = small_log(3, num_events=2_000)
    dataset = build_dataset(log, DataConfig(fit_share=0.2, valid_share=0.1, test_share=0.15))
    sizes = [
        dataset.view(window).histories.num_events / log.events.height for window in ("fit", "valid", "test", "end")
    ]
    assert sizes == pytest.approx([0.55, 0.75, 0.85, 1.0], abs=0.01)


def test_only_the_first_request_of_a_user_and_at_most_so_many():
    log = small_log(2, num_events=600)
    every = build_dataset(log).split.test
    first = build_dataset(log, DataConfig(requests_per_user="first")).split.test
    assert len(first) == len(np.unique(every.user)) < len(every)
    for user in first.user:
        assert first.time[first.user == user] == every.time[every.user == user].min()
    few = build_dataset(log, DataConfig(max_requests=5, seed=1)).split.test
    assert len(few) == 5
    assert {*zip(few.user, few.time)} < {*zip(every.user, every.time)} or few.user.max() <= every.user.max()


def test_users_without_a_past_are_asked_and_counted():
    rows = [("old", f"i{k % 4}", HOUR * k) for k in range(40)] + [("new", "i1", HOUR * 39), ("new", "i2", HOUR * 41)]
    dataset = build_dataset(plain_log(rows))
    test = dataset.split.test
    cold = test.user == dataset.user_ids.encode(["new"])[0]
    assert (test.end - test.start)[cold].tolist() == [0, 1]
    assert f"{1 / len(test):.1%} of the test requests have no history" in dataset.split.note
    assert dataset.user_ids.encode(["new"])[0] > dataset.space.num_users


# -- by user, by last group ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_last_groups_per_user(seed):
    log = small_log(seed, num_users=40)
    dataset = build_dataset(log, DataConfig(protocol="last-group", repeats="yes"))
    for back, window in ((1, "test"), (2, "valid"), (3, "fit")):
        wanted = lambda baskets, place, back=back: place == len(baskets) - back and place > 0  # noqa: E731
        assert asked_in(dataset, getattr(dataset.split, window)) == expected(log, wanted)
        kept = sum(
            len(b.lines) for bs in baskets_of(log).values() for p, b in enumerate(bs) if p == 0 or p < len(bs) - back
        )
        assert dataset.view(window).histories.num_events == kept


def test_events_after_the_last_target_are_hidden_too():
    """With views and purchases, a view after the last purchase must not train."""
    rows = [("u", "a", 1), ("u", "b", 2), ("u", "c", 3), ("u", "d", 4), ("u", "e", 5), ("v", "a", 1)]
    frame = plain_log(rows).events.drop("action", "group_id")
    log = read(frame.with_columns(action=pl.Series(["buy", "buy", "buy", "buy", "view", "buy"])))
    dataset = build_dataset(log, DataConfig(protocol="last-group", target_actions=("buy",)))
    assert list(asked_in(dataset, dataset.split.test).values()) == [([["a"], ["b"], ["c"]], {"d": 1.0})]
    assert dataset.view("test").histories.num_events == 4
    assert dataset.view("fit").histories.num_events == 2


@pytest.mark.parametrize("seed", range(3))
def test_held_out_users_are_entirely_absent_from_training(seed):
    log = small_log(seed, num_users=40, num_events=900)
    dataset = build_dataset(
        log, DataConfig(protocol="user", fit_share=0.2, valid_share=0.1, test_share=0.25, repeats="yes")
    )
    parts = {w: {user for user, _ in asked_in(dataset, getattr(dataset.split, w))} for w in ("fit", "valid", "test")}
    assert [len(parts[w]) for w in ("fit", "valid", "test")] == [8, 4, 10]
    training = set(dataset.user_ids.decode(np.arange(1, dataset.space.num_users + 1)))
    assert not training & (parts["fit"] | parts["valid"] | parts["test"])
    assert len(training) == 40 - 22
    whole = baskets_of(log)
    wanted = lambda baskets, place: place == len(baskets) - 1 and baskets[0].user in parts["test"]  # noqa: E731
    assert asked_in(dataset, dataset.split.test) == expected(log, wanted)
    assert dataset.view().histories.num_events == sum(len(b.lines) for u in training for b in whole[u])
    assert dataset.view("valid").histories.num_events == sum(
        len(b.lines) for u in training | parts["fit"] for b in whole[u]
    )


def test_leave_last_out_as_published_by_hand():
    """Ties in file order, baskets cut, users with fewer than three events only train."""
    log = plain_log([
        ("u", "d", 9), ("u", "a", 1), ("u", "b", 5), ("u", "c", 5), ("u", "e", 9),
        ("v", "x", 1), ("v", "y", 2),
        ("w", "x", 3), ("w", "y", 3), ("w", "z", 3),
    ])  # fmt: skip
    dataset = build_dataset(log, DataConfig(protocol="leave-last-out-as-published"))
    got = {w: asked_in(dataset, getattr(dataset.split, w)) for w in ("fit", "valid", "test")}
    assert got["test"] == {
        ("u", START + 9): ([["a"], ["b"], ["c"], ["d"]], {"e": 1.0}),
        ("w", START + 3): ([["x"], ["y"]], {"z": 1.0}),
    }
    assert got["valid"] == {
        ("u", START + 9): ([["a"], ["b"], ["c"]], {"d": 1.0}),
        ("w", START + 3): ([["x"]], {"y": 1.0}),
    }
    assert got["fit"] == {("u", START + 5): ([["a"], ["b"]], {"c": 1.0})}
    view = dataset.view()
    trained = {}
    for row in range(1, view.space.num_users + 1):
        a, b = view.histories.offsets[row : row + 2]
        trained[dataset.user_ids.decode([row])[0]] = dataset.item_ids.decode(view.histories.item[a:b])
    assert trained == {"u": ["a", "b", "c"], "v": ["x", "y"], "w": ["x"]}
    assert "as published" in dataset.split.note
    assert "retrieval has seen" in dataset.split.note


def test_without_a_clock_the_last_group_is_held_out_and_the_note_says_so():
    frame = small_frame(0, num_events=300)
    none = build_dataset(read(frame.drop("timestamp")))
    assert none.split.protocol == "last-group"
    assert "no clock" in none.split.note
    assert "random order" in none.split.note
    assert not none.space.has_clock
    assert none.space.context_fields == ()
    # A file sorted by item: the held-out items must not be those at its end.
    by_item = read(frame.drop("timestamp", "basket_id").sort("user_id", "item_id"))
    test = build_dataset(by_item).split.test
    rank = by_item.events["item_id"].rank("dense").max()
    targets = np.array(build_dataset(by_item).item_ids.decode(test.target), dtype=float) - 100
    assert targets.mean() < 0.8 * rank


# -- leaks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["time", "last-group", "user", "leave-last-out-as-published"])
def test_a_planted_future_item_reaches_neither_training_nor_any_earlier_history(protocol):
    rows = [(f"u{u}", f"i{(u + k) % 7}", HOUR * (10 * k + u)) for u in range(12) for k in range(10)]
    rows += [(f"u{u}", "leak", HOUR * (200 + u)) for u in range(12)]
    dataset = build_dataset(plain_log(rows), DataConfig(protocol=protocol))
    leak = dataset.item_ids.encode(["leak"])[0]
    if protocol != "user":
        assert leak not in dataset.view("fit").histories.item
        assert not dataset.space.known_items[leak]
    for window in ("fit", "valid", "test"):
        for past, _ in asked_in(dataset, getattr(dataset.split, window)).values():
            assert ["leak"] not in past


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("protocol", ["time", "last-group", "user"])
def test_no_request_sees_its_own_group_or_anything_later(seed, protocol):
    frame = small_frame(seed).sort("timestamp", "basket_id", "item_id")
    dataset = build_dataset(read(frame), DataConfig(protocol=protocol))
    histories = dataset.histories
    for window in ("fit", "valid", "test"):
        requests = getattr(dataset.split, window)
        for r in range(len(requests)):
            past = slice(requests.start[r], requests.end[r])
            own = histories.group[requests.end[r]]
            assert own not in histories.group[past]
            assert (histories.time[past] <= requests.time[r]).all()
            assert requests.start[r] == histories.offsets[requests.user[r]]


@pytest.mark.parametrize("protocol", ["time", "last-group", "user"])
def test_permuting_inside_groups_changes_no_request(protocol):
    frame = small_frame(4)
    config = DataConfig(protocol=protocol)
    one, two = build_dataset(read(frame), config), build_dataset(read(shuffled_inside_groups(frame)), config)
    assert one.histories.item.tolist() != two.histories.item.tolist()
    for window in ("fit", "valid", "test"):
        a, b = (asked_in(d, getattr(d.split, window)) for d in (one, two))
        sort = lambda asked: {k: ([sorted(g) for g in past], worth) for k, (past, worth) in asked.items()}  # noqa: E731
        assert sort(a) == sort(b)


# -- repeats, past requests, context ------------------------------------------------------------------------------


def test_repeats_are_guessed_from_their_share():
    again = [(f"u{u}", f"i{k % 3}", HOUR * (10 * k + u)) for u in range(9) for k in range(12)]
    never = [(f"u{u}", f"i{k}", HOUR * (10 * k + u)) for u in range(9) for k in range(12)]
    assert build_dataset(plain_log(again)).repeats
    dataset = build_dataset(plain_log(never))
    assert not dataset.repeats
    assert build_dataset(plain_log(never), DataConfig(repeats="yes")).repeats
    with pytest.raises(DataError, match="no request left"):
        build_dataset(plain_log(again), DataConfig(repeats="no"))


def test_share_of_repeats_by_hand():
    rows = [("u", "a", 1), ("u", "b", 1), ("u", "a", 2), ("u", "c", 2), ("u", "c", 2), ("u", "b", 3), ("v", "a", 9)]
    log = plain_log([*rows, ("v", "d", 10), ("v", "d", 11), ("v", "e", 12)])
    histories = build_dataset(log, DataConfig(protocol="last-group", repeats="yes")).histories
    # Later groups: u has a* c c, b*; v has d, d*, e. The starred ones stood in an earlier group.
    assert repeat_share(histories) == 3 / 7
    assert repeat_share(Histories.empty(3)) == 0.0


@pytest.mark.parametrize("seed", range(4))
def test_every_past_group_becomes_a_request(seed):
    histories = random_histories(seed)
    requests = past_requests(histories, min_history=2)
    wanted = []
    for user in range(1, histories.num_users + 1):
        a, b = histories.offsets[user : user + 2]
        for group in dict.fromkeys(histories.group[a:b]):
            events = [e for e in range(a, b) if histories.group[e] == group]
            if events[0] - a >= 2:
                worth = {}
                for e in events:
                    worth[histories.item[e]] = worth.get(histories.item[e], 0) + histories.value[e]
                wanted.append((user, a, events[0], histories.time[events[0]], worth))
    got = [
        (u, s, e, t, dict(zip(requests.target[x:y], requests.target_value[x:y])))
        for u, s, e, t, x, y in zip(
            requests.user,
            requests.start,
            requests.end,
            requests.time,
            requests.target_offsets[:-1],
            requests.target_offsets[1:],
        )
    ]
    assert got == wanted


def test_past_requests_can_be_capped_per_user_and_in_time():
    histories = random_histories(3, num_users=30)
    every = past_requests(histories)
    few = past_requests(histories, max_per_user=2, seed=4)
    counts = np.bincount(every.user)
    assert np.bincount(few.user, minlength=len(counts)).tolist() == np.minimum(counts, 2).tolist()
    assert few.end.tolist() == past_requests(histories, max_per_user=2, seed=4).end.tolist()
    assert few.end.tolist() != past_requests(histories, max_per_user=2, seed=5).end.tolist()
    ends = histories.offsets[:-1] + np.diff(histories.offsets) // 2
    early = past_requests(histories, ends=ends)
    wanted = [(u, e) for u, e, n in zip(every.user, every.end, group_ends(histories, every)) if n <= ends[u]]
    assert list(zip(early.user, early.end)) == wanted


def group_ends(histories: Histories, requests: Requests) -> list[int]:
    return [int(np.flatnonzero(histories.group == histories.group[e])[-1]) + 1 for e in requests.end]


def test_past_requests_without_repeats_ask_for_new_items_only():
    histories = random_histories(1, num_items=4)
    requests = past_requests(histories, repeats=False)
    assert len(requests) < len(past_requests(histories))
    for r in range(len(requests)):
        seen = histories.item[requests.start[r] : requests.end[r]]
        a, b = requests.target_offsets[r : r + 2]
        assert b > a
        assert not np.isin(requests.target[a:b], seen).any()


def test_hours_and_weekdays_are_those_of_the_calendar():
    seconds = np.random.default_rng(0).integers(-(10**9), 2 * 10**9, size=300)
    context = time_context(seconds)
    for t, hour, weekday in zip(seconds, context["hour"], context["weekday"]):
        moment = datetime.fromtimestamp(int(t), tz=UTC)
        assert (hour, weekday) == (moment.hour + 1, moment.weekday() + 1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"protocol": "random"}, "choose from"),
        ({"test_share": 0.0}, "test_share"),
        ({"fit_share": 0.5, "test_share": 0.5}, "add up"),
        ({"requests_per_user": "last"}, "'first' or 'all'"),
        ({"repeats": "maybe"}, "'auto'"),
        ({"max_requests": 0}, "at least 1"),
        ({"kcore": -1}, "kcore"),
    ],
)
def test_wrong_settings_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        DataConfig(**settings)


def test_a_log_too_small_to_split_is_refused_in_words():
    with pytest.raises(DataError, match="part empty"):
        build_dataset(plain_log([("u", "a", 1), ("u", "b", 1)]))
    with pytest.raises(DataError, match="part empty"):
        build_dataset(plain_log([("u", "a", 1), ("u", "b", 2)]), DataConfig(protocol="last-group"))
