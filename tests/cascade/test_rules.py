"""Rules against sets: what may be seen, and what each rule took away."""

import numpy as np
import polars as pl
import pytest
import torch

from engine_support import FIRST_ITEM, NUM_ITEMS, NUM_NEW, shop_frames
from shortlist.cascade.attributes import Attributes
from shortlist.cascade.config import RunConfig
from shortlist.cascade.rules import Diversity, Filter, Mix, Pin, Quota, Rules
from shortlist.cascade.ruling import Availability, rule, rule_many
from shortlist.data.dataset import build_dataset
from shortlist.data.jagged import Jagged
from shortlist.data.log import read
from shortlist.data.vocabulary import Vocabulary
from shortlist.errors import ConfigError

IDS = [f"i{n}" for n in range(20)]
ITEMS = Vocabulary(pl.Series("id", IDS))


def seen_by(ruling):
    """Ids that the ruling lets through."""
    return set(IDS) if ruling.allowed is None else {IDS[row - 1] for row in ruling.allowed.nonzero()[:, 0].tolist()}


def test_no_rules_cost_nothing():
    ruling = rule(Rules(), ITEMS.encode, 20)
    assert ruling.allowed is None
    assert not ruling.removed
    assert not ruling.ignored


def test_allow_deny_and_seen_are_counted_in_turn():
    seen = ITEMS.encode(["i3", "i4", "i4", "nowhere", "i9"])
    rules = Rules(allow=["i1", "i2", "i3", "i4", "other"], deny=["i2", "i12", "lost", "gone"])
    ruling = rule(rules, ITEMS.encode, 20, seen=seen)
    assert seen_by(ruling) == {"i1", "i3", "i4"}
    assert ruling.removed == {"allow": 16, "deny": 1, "seen": 2}
    assert ruling.ignored == {"allow": 1, "deny": 2}


def test_against_sets():
    rng = np.random.default_rng(0)
    for _ in range(50):
        allow, deny, seen, own = (list(rng.choice([*IDS, "x", "y"], size=rng.integers(1, 12))) for _ in range(4))
        mine = set(own) & set(IDS)
        rows = np.unique(ITEMS.encode(sorted(mine))) if mine else np.zeros(0, dtype=np.int64)
        ruling = rule(Rules(allow=allow, deny=deny), ITEMS.encode, 20, seen=ITEMS.encode(seen), candidates=rows)
        assert seen_by(ruling) == (set(allow) & set(IDS)) - set(deny)
        after_allow = mine & set(allow)
        after_deny = after_allow - set(deny)
        assert ruling.removed == {
            "allow": len(mine - after_allow),
            "deny": len(after_allow - after_deny),
            "seen": len(after_deny & set(seen)),
        }


def test_seen_alone_needs_no_mask():
    seen = ITEMS.encode(["i1", "i1", "i2", "unknown"])
    assert rule(Rules(), ITEMS.encode, 20, seen=seen).removed == {"seen": 2}
    own = rule(Rules(), ITEMS.encode, 20, seen=seen, candidates=ITEMS.encode(["i2", "i7"]))
    assert own.removed == {"seen": 1}
    assert own.allowed is None


def test_an_empty_allow_list_allows_nothing():
    ruling = rule(Rules(allow=[]), ITEMS.encode, 20)
    assert seen_by(ruling) == set()
    assert ruling.removed == {"allow": 20}


def test_numbers_find_text_ids_and_text_finds_numbers():
    numbered = Vocabulary(pl.Series("id", [10, 20, 30]))
    assert rule(Rules(deny=["20", 30]), numbered.encode, 3).allowed.tolist() == [False, True, False, False]


@pytest.mark.parametrize("bad", [{"allow": "i1"}, {"deny": "i1"}, {"seen": "sometimes"}])
def test_bad_rules_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Rules(**bad)


# -- filters, availability and pins on the shop: 43 items on four shelves, prices 0 to 6, each with its own weight -----


@pytest.fixture(scope="module")
def dataset():
    events, items = shop_frames()
    return build_dataset(read(events, items=items.with_columns(weight=(pl.col("item_id") - FIRST_ITEM) * 1.5)))


@pytest.fixture(scope="module")
def attributes(dataset):
    return Attributes(dataset)


def numbers(mask):
    """Numbers 0..42 of the shop's items in a mask of catalogue rows."""
    return mask.nonzero()[0].tolist()


def let_through(dataset, attributes, *filters, **others):
    """Numbers of the items that filters let through, and the ruling."""
    rules = Rules(filters=filters, **others)
    ruling = rule(rules, dataset.item_ids.encode, dataset.num_items, attributes=attributes)
    rows = ruling.allowed.nonzero()[:, 0].numpy()
    return {item - FIRST_ITEM for item in dataset.item_ids.decode(rows)}, ruling


SHOP = set(range(NUM_ITEMS + NUM_NEW))


@pytest.mark.parametrize(
    ("wanted", "passes"),
    [
        (Filter(field="shelf", equals="shelf-1"), lambda n: n % 4 == 1),
        (Filter(field="shelf", any_of=("shelf-1", "shelf-3")), lambda n: n % 4 in (1, 3)),
        (Filter(field="shelf", any_of=["shelf-1"], negate=True), lambda n: n % 4 != 1),
        (Filter(field="price", at_least=5), lambda n: n % 7 >= 5),
        (Filter(field="price", at_most=2), lambda n: n % 7 <= 2),
        (Filter(field="price", at_least=2, at_most=3.5), lambda n: n % 7 in (2, 3)),
        (Filter(field="price", at_least=2, at_most=3.5, negate=True), lambda n: n % 7 not in (2, 3)),
        (Filter(field="price", equals=4), lambda n: n % 7 == 4),
        (Filter(field="price", any_of=(0, 6.0)), lambda n: n % 7 in (0, 6)),
        (Filter(field="weight", at_least=30), lambda n: 1.5 * n >= 30),
        (Filter(field="weight", at_most=30), lambda n: 1.5 * n <= 30),
        (Filter(field="weight", at_least=4.5, at_most=6.1), lambda n: n in (3, 4)),
        (Filter(field="weight", equals=4.5), lambda n: n == 3),
        (Filter(field="weight", at_least=-1e9, at_most=1e9), lambda n: True),
    ],
)
def test_a_filter_is_what_it_says(dataset, attributes, wanted, passes):
    through, ruling = let_through(dataset, attributes, wanted)
    assert through == {n for n in SHOP if passes(n)}
    assert ruling.removed == {f"filters.{wanted.field}": len(SHOP - through)}
    assert not ruling.ignored


def test_filters_add_up_and_are_counted_in_turn(dataset, attributes):
    through, ruling = let_through(
        dataset, attributes, Filter(field="shelf", equals="shelf-0"), Filter(field="price", at_most=3), deny=["100"]
    )
    assert through == {n for n in SHOP if n % 4 == 0 and n % 7 <= 3 and n}
    on_shelf = {n for n in SHOP if n % 4 == 0 and n}
    assert ruling.removed == {
        "deny": 1,
        "filters.shelf": len(SHOP) - 1 - len(on_shelf),
        "filters.price": len(on_shelf - through),
    }


def test_a_value_that_nobody_has_matches_nothing_and_is_counted(dataset, attributes):
    through, ruling = let_through(dataset, attributes, Filter(field="shelf", any_of=("attic", "shelf-2", "cellar")))
    assert through == {n for n in SHOP if n % 4 == 2}
    assert ruling.ignored == {"filters.shelf": 2}
    assert let_through(dataset, attributes, Filter(field="shelf", equals="attic"))[0] == set()
    assert let_through(dataset, attributes, Filter(field="shelf", equals="attic", negate=True))[0] == SHOP


@pytest.mark.parametrize(
    ("rules", "sentence"),
    [
        (Rules(filters=(Filter(field="shelv", equals="x"),)), "no field 'shelv'.*shelf"),
        (Rules(filters=(Filter(field="shelf", at_least=1),)), "holds no numbers"),
        (Rules(filters=(Filter(field="weight", equals="heavy"),)), "holds numbers"),
        (Rules(quotas=(Quota(field="weight", most=1),)), "no quota"),
        (Rules(mix=Mix(field="weight")), "no mix"),
        (Rules(diversity=Diversity(fields=("weight",))), "compared"),
    ],
)
def test_rules_that_items_can_not_follow_are_refused(attributes, rules, sentence):
    with pytest.raises(ConfigError, match=sentence):
        attributes.check(rules)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Filter(field="a"), "needs one of"),
        (lambda: Filter(field="a", equals=1, at_least=2), "needs one of"),
        (lambda: Pin(item="a", position=0), "at least 1"),
        (lambda: Quota(field="a"), "needs most or least"),
        (lambda: Quota(field="a", least=1), "needs the value"),
        (lambda: Rules(allow=["fine", "\ud800"]), "not Unicode"),
        (lambda: Pin(item="\ud800"), "not Unicode"),
        (lambda: Filter(field="a", any_of=("\ud800",)), "not Unicode"),
        (lambda: Quota(field="a", most=-1), "from 0 to"),
        (lambda: Quota(field="a", most=10**30), "from 0 to"),
        (lambda: Filter(field="a", at_least=float("inf")), "finite"),
        (lambda: Quota(field="a", value="x", least=3, most=2), "at least 3 and at most 2"),
        (lambda: Diversity(relevance=1.1), "from 0 to 1"),
        (lambda: Mix(field="a", weight=-0.1), "from 0 to 1"),
        (lambda: Rules(seen="keep", seen_days=2), "not both"),
        (lambda: Rules(seen_days=0), "above 0"),
        (lambda: Rules(pins=(Pin(item="a"), Pin(item="b"))), "same position"),
        (lambda: Rules(pins=(Pin(item="a"), Pin(item="a", position=2))), "same item"),
        (lambda: Rules(filters=(Filter(field="a", equals=1),) * 101), "at most 100"),
    ],
)
def test_rules_that_make_no_sense_are_refused(make, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make()


def test_items_that_are_gone_come_first(dataset, attributes):
    available = torch.ones(dataset.num_items + 1, dtype=torch.bool)
    available[[0, *dataset.item_ids.encode(["100", "101"]).tolist()]] = False
    gone = Availability(available=available, num_gone=2)
    ruling = rule(
        Rules(allow=["101", "102"], pins=(Pin(item="101"), Pin(item="102", position=3), Pin(item="x", position=4))),
        dataset.item_ids.encode,
        dataset.num_items,
        availability=gone,
    )
    assert ruling.removed == {"unavailable": 2, "allow": NUM_ITEMS + NUM_NEW - 3, "pins": 1}
    assert ruling.ignored == {"allow": 0, "pins": 1}
    assert ruling.pins == {2: int(dataset.item_ids.encode(["102"])[0])}


def test_items_that_are_gone_are_ruled_alike_with_and_without_another_rule(dataset):
    """A rule that takes nothing away goes the long way."""
    available = torch.ones(dataset.num_items + 1, dtype=torch.bool)
    available[[0, *dataset.item_ids.encode(["100", "101"]).tolist()]] = False
    gone = Availability(available=available, num_gone=2)
    seen = dataset.item_ids.encode(["101", "102", "102", "103"])
    everything = dataset.item_ids.ids.to_list()
    short, long = (
        rule(rules, dataset.item_ids.encode, dataset.num_items, seen=seen, availability=gone)
        for rules in (Rules(), Rules(allow=everything))
    )
    assert torch.equal(short.allowed, long.allowed)
    assert short.removed == {"unavailable": 2, "seen": 2}
    assert long.removed == {"unavailable": 2, "allow": 0, "seen": 2}


def test_many_are_ruled_as_each_alone(dataset, attributes):
    rng = np.random.default_rng(1)
    seen = [rng.integers(0, dataset.num_items + 1, size=rng.integers(0, 12)) for _ in range(6)]
    excluded = Jagged.from_rows([rows.tolist() for rows in seen])
    own = np.arange(1, 30)
    rule_sets = (
        Rules(),
        Rules(deny=["103"], filters=(Filter(field="price", at_most=4),)),
        Rules(seen_days=3),
    )
    for rules in rule_sets:
        for candidates in (None, own):
            given = {"candidates": candidates, "attributes": attributes}
            many = rule_many(rules, dataset.item_ids.encode, dataset.num_items, 6, excluded=excluded, **given)
            for rows, one in zip(seen, many):
                alone = rule(rules, dataset.item_ids.encode, dataset.num_items, seen=rows, **given)
                assert one.removed == alone.removed
                left = set(own if candidates is not None else range(1, dataset.num_items + 1))
                left &= (
                    set(range(1, dataset.num_items + 1)) if one.allowed is None else set(numbers(one.allowed.numpy()))
                )
                assert one.removed["seen_days" if rules.seen_days else "seen"] == len(left & set(rows.tolist()))


def test_newer_attributes_stand_in_place_of_the_run_s(dataset, attributes):
    rows = dataset.item_ids.encode(["101", "105"])
    patched = attributes.patched(rows, [{"shelf": "shelf-0", "weight": 50}, {"shelf": None}])
    through, _ = let_through(dataset, patched, Filter(field="shelf", equals="shelf-1"))
    assert through == {n for n in SHOP if n % 4 == 1} - {1, 5}
    assert 1 in let_through(dataset, patched, Filter(field="shelf", equals="shelf-0"))[0]
    assert 1 in let_through(dataset, patched, Filter(field="weight", equals=50))[0]
    assert 5 in let_through(dataset, patched, Filter(field="price", equals=5))[0]
    words = attributes.patched(rows[:1], [{"title": "A blue number"}])
    assert 1 in let_through(dataset, words, Filter(field="title_words", equals="Number"))[0]
    assert 1 not in let_through(dataset, words, Filter(field="title_words", equals="item"))[0]


# -- a request's rules over the surface's --------------------------------------------------------------------------------

SURFACE = Rules(deny=["a"], seen="drop", pins=(Pin(item="p"),), filters=(Filter(field="x", equals=1),))


def test_what_forbids_adds_up_and_the_rest_replaces():
    own = Rules(deny=["b"], pins=(), filters=(Filter(field="y", equals=2),), seen_days=3)
    merged = own.over(SURFACE)
    assert merged.deny == ("a", "b")
    assert [f.field for f in merged.filters] == ["x", "y"]
    assert merged.pins == ()
    assert (merged.seen, merged.seen_days) == (None, 3)
    assert Rules(allow=["z"]).over(SURFACE).pins == SURFACE.pins


def test_nothing_of_its_own_is_the_surface_itself():
    assert Rules().over(SURFACE) is SURFACE
    alone = Rules(with_surface=False)
    assert alone.over(SURFACE) is alone


def test_rules_stand_in_the_settings_of_a_run():
    text = """
[rules]
deny = ["p1"]
seen_days = 7
filters = [{field = "price", at_most = 20}]
pins = [{item = "p3", position = 2}]
quotas = [{field = "category", most = 2}]
diversity = {relevance = 0.5}
[rules.mix]
field = "category"
"""
    config = RunConfig.from_toml(text)
    assert config.rules.filters == (Filter(field="price", at_most=20),)
    assert config.rules.quotas == (Quota(field="category", most=2),)
    assert config.rules.mix == Mix(field="category")
    assert RunConfig.from_toml(config.to_toml()) == config
    assert "[rules" not in RunConfig().to_toml()
    assert config.override("rules.seen_days=2").rules.seen_days == 2
    for wrong in (
        "[rules]\nfilters = [{field = 'a', equal = 1}]",
        "[rules]\npins = [{position = 1}]",
        "[rules]\nseeen = 'x'",
    ):
        with pytest.raises(ConfigError, match="rules"):
            RunConfig.from_toml(wrong)
