"""The generated log is what it says, and the command finds in it what was planted."""

import numpy as np
import polars as pl
import pytest

from cli_support import PLAIN, generated_log, succeeds

made = generated_log()
SHAPE = made.LogShape(events=6_000, users=500, items=300, new_items=10, categories=15, seed=3)


@pytest.fixture(scope="module")
def truth():
    return made.draw(SHAPE)


def test_every_event_is_what_it_is_said_to_be(truth):
    user, item, session, time = (v.tolist() for v in (truth.user, truth.item, truth.session, truth.time_s))
    assert len(user) == SHAPE.events
    owned = set()
    for n in range(1, SHAPE.events):
        if user[n] != user[n - 1]:
            assert user[n] > user[n - 1]
            owned = set()
        else:
            owned.add(item[n - 1])
            assert time[n] > time[n - 1]
        if truth.followed[n]:
            assert session[n] == session[n - 1]
            category, ring = item[n] % SHAPE.categories, SHAPE.items // SHAPE.categories
            assert item[n - 1] % SHAPE.categories == category
            assert item[n] // SHAPE.categories == (item[n - 1] // SHAPE.categories + 1) % ring
        if truth.repeated[n]:
            assert item[n] in owned
    assert max(item) < SHAPE.items
    assert max(np.bincount(user)) < 0.05 * SHAPE.events


def test_chains_are_traced_back_as_one_would_by_hand(truth):
    rng = np.random.default_rng(0)
    source = np.minimum(np.arange(200), (np.arange(200) * rng.random(200) ** 0.2).astype(np.int64))
    add = rng.integers(0, 5, 200)
    root, steps = made.trace_back(source, add)
    for n in range(200):
        at, total = n, 0
        while source[at] != at:
            total, at = total + add[at], source[at]
        assert (root[n], steps[n]) == (at, total)


def test_shares_and_tables():
    events, items, users = made.frames(SHAPE)
    assert events.height == SHAPE.events
    assert events["timestamp"].is_sorted()
    assert items.height == SHAPE.items + SHAPE.new_items
    assert set(events["item_id"]) <= set(items["item_id"])
    assert len(set(items["item_id"]) - set(events["item_id"])) >= SHAPE.new_items
    assert set(events["user_id"]) <= set(users["user_id"])
    assert events.group_by("session").agg(pl.col("user_id").n_unique())["user_id"].max() == 1
    per_action = dict(events["action"].value_counts().iter_rows())
    assert per_action["view"] / SHAPE.events == pytest.approx(0.8, abs=0.03)
    top = events["item_id"].value_counts(sort=True)["count"]
    assert top[:30].sum() > 3 * top[-100:].sum()
    again, _, _ = made.frames(SHAPE)
    assert again.equals(events)


def test_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match="follow and repeat"):
        made.LogShape(follow=0.9, repeat=0.2)
    with pytest.raises(ValueError, match="items at least categories"):
        made.LogShape(items=3, categories=4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generated")
    made.write(made.frames(SHAPE), folder, "csv.gz")
    (folder / "plain.toml").write_text(PLAIN)
    tables = [part for name in ("items", "users") for part in (f"--{name}", folder / f"{name}.csv.gz")]
    succeeds(
        "train",
        folder / "events.csv.gz",
        *tables,
        "--config",
        folder / "plain.toml",
        "--out",
        folder / "run",
        "--quiet",
    )
    return folder / "run"


def test_what_was_planted_is_found(run):
    """Counts know what follows and personal frequency what is repeated: both beat popularity beyond chance, and so does the cascade."""
    arms = ("personal-frequency", "counts")
    table = succeeds("compare", run, *arms, "popularity", "--reference", "popularity", "--json").json
    for name in (*arms, str(run)):
        test = table["tests"][name]["ndcg@4"]
        assert test["difference"] < -0.05, name
        assert test["p_value"] < 0.01, name


def test_a_stranger_sees_what_is_popular(run):
    """Nothing is known of them, so what is shown has more events than most of the catalogue."""
    events, _, _ = made.frames(SHAPE)
    counts = dict(events["item_id"].value_counts().iter_rows())
    page = succeeds("recommend", run, "--user", "nobody-knows-me", "--json").json
    shown = [counts.get(item["item_id"], 0) for item in page["items"]]
    assert np.mean(shown) > np.quantile(list(counts.values()), 0.9)
