"""The check finds planted faults, counts as plain Python counts, and stays silent on a log without faults."""

import json
from collections import defaultdict
from datetime import datetime, timedelta

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

from shortlist.data.check import Health, check
from shortlist.data.leaks import find_leaks
from shortlist.data.log import read
from shortlist.data.roles import Roles

START = datetime(2021, 5, 31)
HAND = pl.DataFrame(
    {
        "user_id": ["ann", "ann", "ann", "ann", "bob", "bob", "cy"],
        "item_id": [1, 2, 1, 3, 2, 2, 3],
        # ann: groups {1, 2}, {1}, {3}; bob: one group that holds item 2 twice; cy: one event
        "timestamp": [START + timedelta(hours=hour) for hour in (1, 1, 3, 2, 5, 5, 9)],
    }
)


def random_log(num_rows: int = 5000, seed: int = 0) -> pl.DataFrame:
    """No faults: ids, times, labels and columns are independent; small groups of equal time."""
    rng = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "user_id": rng.integers(0, 200, num_rows),
            "item_id": rng.permutation(300)[rng.integers(0, 300, num_rows)],
            "timestamp": [START + timedelta(minutes=int(minute)) for minute in np.sort(rng.integers(0, 200, num_rows))],
            "heat": rng.normal(size=num_rows),
            "colour": rng.choice(np.array(["red", "green"]), num_rows),
            "code": [f"c{number}" for number in rng.integers(0, 10**9, num_rows)],
            "click": rng.integers(0, 2, num_rows),
        }
    )


def words(health: Health) -> str:
    return "\n".join(health.sentences())


def test_counts_of_a_log_small_enough_to_count() -> None:
    health = check(read(HAND))
    assert (health.num_events, health.num_users, health.num_items, health.num_groups) == (7, 3, 3, 5)
    assert (health.first_at, health.last_at) == (START + timedelta(hours=1), START + timedelta(hours=9))
    assert (health.events_per_user_median, health.events_per_user_p90) == (2.0, pytest.approx(3.6))
    assert health.num_single_group_users == 2
    assert health.density == pytest.approx(5 / 9)  # ann 1 2 3, bob 2, cy 3
    assert health.repeat_share == pytest.approx(
        1 / 6
    )  # of ann's four (item, group), item 1 comes again; bob's 2 is in one group
    assert health.exact_duplicates == 1
    assert health.tied_events == 4
    assert health.ascending_share == 1.0  # the one pair of neighbours that differ: 1, 2
    assert health.out_of_order == 1
    assert health.first_appearance_correlation is None
    assert health.may_repeat
    assert health.surfaces == ("recommend",)
    assert health.actions == {"event": 7}


def test_random_log_agrees_with_plain_counting_and_raises_no_alarm() -> None:
    source = random_log()
    health = check(read(source))
    met: dict[tuple[int, int], set[datetime]] = defaultdict(set)
    for user, item, at in source.filter(click=1).select("user_id", "item_id", "timestamp").iter_rows():
        met[user, item].add(at)
    visits = sum(len(times) for times in met.values())
    assert health.repeat_share == pytest.approx((visits - len(met)) / visits)
    assert health.density == pytest.approx(len({*source.select("user_id", "item_id").iter_rows()}) / (200 * 300))
    assert health.out_of_order == 0
    assert health.ascending_share is not None
    assert abs(health.ascending_share - 0.5) < 0.1
    assert health.first_appearance_correlation is not None
    assert abs(health.first_appearance_correlation) < 0.2
    assert health.leaks == ()
    assert "away" not in words(health)
    assert "not sorted by id" in words(health)


@pytest.mark.parametrize(
    ("descending", "text"), [(False, "100% of neighbours ascend"), (True, "0% of neighbours ascend")]
)
@pytest.mark.parametrize("ids", [pl.Int64, pl.String])
def test_sorted_ties_are_seen(descending: bool, text: str, ids: type[pl.DataType]) -> None:
    source = random_log().sort("timestamp", "user_id", "item_id", descending=[False, False, descending])
    health = check(read(source.cast({"item_id": ids})))
    assert f"sorted by id ({text}" in words(health)


def test_ids_by_first_appearance_are_seen() -> None:
    source = random_log()
    numbers = {item: number for number, item in enumerate(source["item_id"].unique(maintain_order=True))}
    health = check(read(source.with_columns(pl.col("item_id").replace_strict(numbers))))
    assert health.first_appearance_correlation == pytest.approx(1.0)
    assert "they tell the future" in words(health)


LABEL = pl.col("click")
NOISE = pl.Series(np.random.default_rng(1).normal(size=5000))


@pytest.mark.parametrize(
    ("planted", "kind"),
    [
        (LABEL + 0.3 * NOISE, "values"),
        (-(LABEL + 0.3 * NOISE), "values"),
        ((LABEL * 2 - 1) ** 2 * (1 - LABEL) * NOISE, "values"),  # zero means clicked: no monotone relation
        (pl.when(LABEL == 1).then(pl.lit("paid")).otherwise(pl.lit("left")), "values"),
        (pl.when(LABEL == 1).then(NOISE), "missing"),
        (pl.when(LABEL == 0).then(pl.lit("x")), "missing"),
    ],
)
def test_a_column_that_gives_the_label_away_is_named(planted: pl.Expr, kind: str) -> None:
    health = check(read(random_log().with_columns(planted=planted)))
    assert [(leak.column, leak.label, leak.kind) for leak in health.leaks] == [("planted", "click", kind)]
    assert "planted" in words(health)
    assert "gives click away" in words(health)


def test_auc_of_a_leak_agrees_with_scikit_learn() -> None:
    source = random_log(20_000, seed=4).with_columns(
        planted=LABEL + 0.45 * pl.Series(np.random.default_rng(2).normal(size=20_000))
    )
    expected = roc_auc_score(source["click"].to_numpy(), source["planted"].to_numpy())
    assert expected == pytest.approx(0.942, abs=0.005)
    assert find_leaks(read(source).events, ("click",)) == ()
    strong = source.with_columns(planted=LABEL + 0.4 * pl.Series(np.random.default_rng(2).normal(size=20_000)))
    expected = roc_auc_score(strong["click"].to_numpy(), strong["planted"].to_numpy())
    (leak,) = find_leaks(read(strong).events, ("click",))
    assert leak.auc == pytest.approx(expected, abs=0.01)


def test_a_column_that_tells_one_rare_action_is_named() -> None:
    rng = np.random.default_rng(5)
    action = rng.choice(np.array(["view", "cart", "buy"]), 5000, p=[0.9, 0.06, 0.04])
    source = random_log().with_columns(event=pl.Series(action), receipt=pl.Series(action == "buy"))
    health = check(read(source, roles=Roles(labels=("",))))
    assert [(leak.column, leak.label) for leak in health.leaks] == [("receipt", "action")]
    assert list(health.actions) == ["view", "cart", "buy"]


def test_a_constant_or_tiny_label_is_no_alarm() -> None:
    constant = read(random_log().with_columns(click=pl.lit(1)))
    assert check(constant).leaks == ()
    tiny = random_log(30).with_columns(planted=LABEL)
    assert find_leaks(read(tiny).events, ("click",)) == ()


def test_what_is_missing_is_said() -> None:
    untimed = check(read(HAND.drop("timestamp")))
    assert not untimed.can_order
    assert untimed.out_of_order is None
    assert "sequence systems cannot" in words(untimed)
    counter = check(read(HAND.with_columns(timestamp=pl.int_range(pl.len()))))
    assert counter.can_order
    assert counter.first_at is None
    assert "no clock" in words(counter)
    assert "search needs a query column (`--query COLUMN`)" in words(untimed)


def test_what_counts_as_a_choice_is_said_with_the_flag_that_changes_it() -> None:
    source = random_log()
    clicked = source["click"].sum()
    said = words(check(read(source)))
    assert f"A row is a choice where click is at least 1: {clicked:,} of 5,000 rows." in said
    assert "`--set data.target_label=` makes every row a choice" in said
    said = words(check(read(source.with_columns(like=pl.lit(0)))))
    assert "Every row is a choice, whatever its click or like. `--set data.target_label=click` makes" in said
    rated = source.drop("click").with_columns(rating=pl.int_range(pl.len()) % 5 + 1)
    said = words(check(read(rated)))
    assert "Every row is a choice, whatever its rating. `--set data.target_min=VALUE` leaves" in said
    assert "not clear: no row has 'click' of 1 or more" in words(check(read(source.with_columns(click=pl.lit(0)))))
    assert check(read(source.drop("click"))).target == ""


def test_surfaces_follow_the_columns() -> None:
    health = check(read(HAND.with_columns(query=pl.lit("red"), bid=pl.lit(0.5))))
    assert health.surfaces == ("recommend", "search", "ads")


def test_tables_are_compared_with_the_events() -> None:
    items = pl.DataFrame({"item_id": [1, 2, 8, 9]})
    health = check(read(HAND, items=items, users=pl.DataFrame({"user_id": ["ann"]})))
    assert (health.num_listed_items, health.items_without_events) == (4, 2)
    assert (health.events_without_item, health.events_without_user) == (2, 3)
    assert "2 of 4 listed items have no events" in words(health)


def test_bad_rows_are_reported_and_the_dictionary_is_plain() -> None:
    log = read(HAND.with_columns(user_id=pl.Series(["ann", *[None], *["ann"] * 5])), max_bad_share=0.5)
    health = check(log)
    assert "1 bad rows were kept aside (1 missing user)" in words(health)
    plain = json.loads(json.dumps(health.as_dict()))
    assert plain["num_events"] == 6
    assert plain["first_at"] == "2021-05-31T01:00:00"
    assert plain["quarantined"] == {"missing user": 1}
