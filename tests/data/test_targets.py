"""Which rows are choices: by hand on small logs, and a labelled log against the same log with its unchosen rows deleted."""

import numpy as np
import polars as pl
import pytest

from data_support import HOUR, START, small_frame
from shortlist.cascade.config import RunConfig
from shortlist.data.dataset import build_dataset
from shortlist.data.log import read
from shortlist.data.roles import Roles
from shortlist.data.splits import DataConfig
from shortlist.data.targets import target_rule
from shortlist.errors import ConfigError, DataError


def log_of(**labels):
    """Ten rows of two users, an hour apart, with label columns of ten values each."""
    base = {
        "user_id": ["ann", "bob"] * 5,
        "item_id": [f"i{k}" for k in range(10)],
        "timestamp": [START + HOUR * k for k in range(10)],
    }
    return read(pl.DataFrame(base | labels, strict=False), roles=Roles(labels=tuple(labels) or ("",)))


CLICK = [0, 1, 1, 0, None, 0, 1, 0, 0, 1]
STARS = [1, 2, 3, 4, 5, 5.5, None, 2, 3, 4]


@pytest.mark.parametrize(
    ("labels", "settings", "chosen"),
    [
        ({}, {}, range(10)),
        ({"click": CLICK}, {}, [1, 2, 6, 9]),
        ({"click": [bool(c) for c in CLICK]}, {}, [1, 2, 6, 9]),
        ({"click": [None if c is None else float(c) for c in CLICK]}, {}, [1, 2, 6, 9]),
        ({"click": CLICK}, {"target_label": ""}, range(10)),
        ({"click": CLICK}, {"target_min": 0}, [0, 1, 2, 3, 5, 6, 7, 8, 9]),  # a missing label is none
        ({"rating": STARS}, {}, range(10)),
        ({"rating": STARS}, {"target_min": 4}, [3, 4, 5, 9]),
        ({"rating": STARS}, {"target_label": "rating", "target_min": 3.5}, [3, 4, 5, 9]),
        ({"click": CLICK, "rating": STARS}, {}, range(10)),
        ({"click": CLICK, "rating": STARS}, {"target_label": "click"}, [1, 2, 6, 9]),
        ({"click": CLICK, "rating": STARS}, {"target_label": "rating", "target_min": 5}, [4, 5]),
        ({"value": CLICK}, {"target_label": "source_value"}, [1, 2, 6, 9]),
    ],
)
def test_rows_that_are_choices(labels, settings, chosen):
    log = log_of(**labels)
    assert target_rule(log, DataConfig(**settings)).chosen(log.events).arg_true().to_list() == list(chosen)


@pytest.mark.parametrize(
    ("labels", "settings", "words"),
    [
        ({"click": CLICK}, {"target_label": "buy"}, r"'buy' is no label of the log, which has click; `--label COLUMN`"),
        ({"rating": STARS}, {"target_label": "rating"}, r"runs from 1 to 5\.5.*data\.target_min"),
        ({"click": CLICK, "rating": STARS}, {"target_min": 4}, r"which label.*click, rating"),
        ({}, {"target_min": 4}, r"has none; name one"),
        ({"click": [0] * 10}, {}, r"no row has 'click' of 1 or more \(the highest is 0\)"),
        ({"rating": STARS}, {"target_min": 9}, r"no row has 'rating' of 9 or more \(the highest is 5\.5\)"),
        ({"click": ["yes", *["no"] * 9]}, {}, r"'click' holds text such as 'yes'"),
    ],
)
def test_labels_that_say_nothing_are_refused_in_words(labels, settings, words):
    with pytest.raises(DataError, match=words):
        build_dataset(log_of(**labels), DataConfig(**settings))


@pytest.mark.parametrize("settings", [{"target_min": float("nan")}, {"target_min": 1.0, "target_label": ""}])
def test_a_minimum_needs_a_number_and_a_label(settings):
    with pytest.raises(ConfigError, match="target_min"):
        DataConfig(**settings)


def test_settings_are_read_from_the_command_line():
    config = RunConfig().override("data.target_label=", "data.target_min=none").data
    assert (config.target_label, config.target_min) == ("", None)
    config = RunConfig().override("data.target_min=4").data
    assert (config.target_label, config.target_min) == ("auto", 4.0)


def clicked_frame(seed: int, *, share: float = 0.6) -> pl.DataFrame:
    """`small_frame` with a random click, in which one user and one item were never clicked."""
    frame = small_frame(seed, num_events=500)
    click = np.random.default_rng(seed).random(frame.height) < share
    never = (pl.col("user_id") == "u3") | (pl.col("item_id") == 105)
    return frame.with_columns(click=pl.when(never).then(False).otherwise(pl.Series(click)).cast(pl.Int8))


def in_words(dataset):
    """Histories and requests by the log's own ids, so that data sets with other numbers compare."""
    h = dataset.histories
    user = dataset.user_ids.decode(h.user_of_event)
    item = dataset.item_ids.decode(h.item)
    group = np.cumsum(np.diff(h.group, prepend=-1) != 0)
    events = sorted(zip(user, h.time.tolist(), item, h.value.tolist(), dataset.plan.window_of_event.tolist()))
    sizes = sorted(np.bincount(group).tolist())
    asked = {}
    for window in ("fit", "valid", "test"):
        r = getattr(dataset.split, window)
        for i in range(len(r)):
            a, b = r.target_offsets[i : i + 2]
            targets = sorted(zip(dataset.item_ids.decode(r.target[a:b]), r.target_value[a:b].tolist()))
            past = sorted(dataset.item_ids.decode(h.item[r.start[i] : r.end[i]]))
            asked[window, dataset.user_ids.decode([r.user[i]])[0], int(r.time[i])] = (targets, past)
    return events, sizes, asked, dict(dataset.plan.now), dataset.repeats


@pytest.mark.parametrize("protocol", ["time", "last-group", "leave-last-out-as-published"])
@pytest.mark.parametrize("actions", [(), ("buy",)])
@pytest.mark.parametrize("clock", [True, False])
def test_unchosen_rows_count_as_if_they_were_deleted(protocol, actions, clock):
    """But for the catalogue and the list of users, which hold what was only shown."""
    frame = clicked_frame(1).with_columns(pl.col("timestamp").min().over("basket_id"))
    if not clock:  # a counter gives order and no clock
        frame = frame.with_columns(pl.col("timestamp").rank("dense").cast(pl.Int64))
    config = DataConfig(protocol=protocol, target_actions=actions)
    whole = build_dataset(read(frame), config)
    # Without the label column, file order and ids as in the whole log.
    bare = build_dataset(read(frame.filter(click=1).drop("click")), config)
    assert in_words(whole) == in_words(bare)
    assert whole.space.has_clock == clock
    assert whole.split.note.startswith(bare.split.note)
    assert f"click is at least 1: {int(frame['click'].sum())} of {frame.height} rows" in whole.split.note
    assert whole.space.actions == bare.space.actions

    shown_only = int(whole.item_ids.encode([105])[0])
    assert shown_only > 0
    assert not whole.view("end").space.known_items[shown_only]
    stranger = int(whole.user_ids.encode(["u3"])[0])
    assert stranger == len(whole.user_ids) > whole.view("end").space.num_users
    view, other = whole.view("valid"), bare.view("valid")
    assert (np.diff(view.histories.offsets)[1:] > 0).all()
    assert view.space.num_users == other.space.num_users
    assert len(whole.past_requests("valid")) == len(bare.past_requests("valid"))
    past, asked = whole.requests_for(["u3", whole.user_ids.decode([1])[0]])
    assert (asked.end - asked.start).tolist() == [0, int(whole.histories.offsets[2])]
    assert past.num_events == asked.end[1]


def test_ratings_are_all_events_unless_a_minimum_is_given():
    frame = clicked_frame(2).rename({"click": "rating"}).with_columns(rating=pl.col("item_id") % 5 + 1)
    every, high = build_dataset(read(frame)), build_dataset(read(frame), DataConfig(target_min=4))
    assert every.histories.num_events == frame.height
    assert "Every row is a choice, whatever its rating." in every.split.note
    assert every.logged is None
    assert {int(i) % 5 + 1 for i in high.item_ids.decode(high.histories.item)} == {4, 5}
    assert high.histories.num_events == frame.filter(pl.col("rating") >= 4).height


def test_a_k_core_counts_choices_only():
    """u1 and u2 clicked a and b twice in all; c was clicked once and shown often; u3 was shown everything and clicked once."""
    clicks = [("u1", "a"), ("u1", "b"), ("u2", "a"), ("u2", "b"), ("u3", "c")]
    shown = [("u3", "a"), ("u3", "b"), ("u1", "c"), ("u2", "c"), ("u1", "a")]
    rows = [(*pair, START + HOUR * k, int(k < len(clicks))) for k, pair in enumerate(clicks + shown)]
    rows += [(f"v{k}", item, START + k, 1) for k in range(12) for item in "ab"]  # enough users to split
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "click"], orient="row")
    dataset = build_dataset(read(frame), DataConfig(kcore=2, protocol="user"))
    assert sorted(dataset.item_ids.ids) == ["a", "b"]
    assert "u3" not in dataset.user_ids.ids.to_list()
    assert dataset.histories.num_events == 4 + 24
    assert len(dataset.logged.rows.values) == 4 + 24 + 1, "u1 was shown a once more"
