"""Rules against sets: what may be seen, and what each rule took away."""

import numpy as np
import polars as pl
import pytest

from shortlist.cascade.rules import Rules, rule
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


@pytest.mark.parametrize("bad", [{"allow": "i1"}, {"deny": "i1"}, {"seen": "sometimes"}], ids=str)
def test_bad_rules_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Rules(**bad)
