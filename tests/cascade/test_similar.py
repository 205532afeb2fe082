"""Items like an item: by vectors, by what follows it, by its fields; under rules."""

import numpy as np
import pytest
import torch

from engine_support import FIRST_ITEM, NUM_ITEMS, RUN, after, shop_live
from shortlist.cascade.engine import Engine
from shortlist.cascade.rules import Diversity, Filter, Pin, Quota, Rules
from shortlist.cascade.upkeep import Upkeep
from shortlist.errors import ConfigError
from shortlist.store.catalogue import CatalogueStore

torch.set_num_threads(1)
VECTORS = (
    RUN.replace('systems = ["counts", "popularity"]', 'systems = ["als", "counts"]')
    + "[systems.als]\nnum_factors = 8\n"
)


@pytest.fixture(scope="module")
def engine():
    with Engine(shop_live()) as engine:
        yield engine


@pytest.fixture(scope="module")
def with_vectors():
    with Engine(shop_live(text=VECTORS)) as engine:
        yield engine


def ids(told):
    return [item.item_id for item in told.items]


def test_what_follows_an_item_is_like_it(engine):
    told = engine.similar(120, 3)
    assert told.by == "counts, event by event"
    assert ids(told)[0] in (119, after(120))
    assert 120 not in ids(told)
    assert [item.score for item in told.items] == sorted((item.score for item in told.items), reverse=True)
    assert told.items[0].title == f"Item number {ids(told)[0] - FIRST_ITEM}"
    assert (told.ignored, told.removed) == ({}, {})
    assert ids(engine.similar("120", 3)) == ids(told)


def test_vectors_are_compared_by_their_angle(with_vectors):
    told = with_vectors.similar(120, 5)
    assert told.by == "vectors of als"
    live = with_vectors.live
    matrix = live.cascade.systems["als"].item_matrix().numpy()
    row = int(live.items([120])[0])
    with np.errstate(invalid="ignore"):
        cosine = matrix @ matrix[row] / np.linalg.norm(matrix, axis=1) / np.linalg.norm(matrix[row])
    cosine[[0, row]] = -np.inf
    best = np.argsort(-np.nan_to_num(cosine, nan=-np.inf), kind="stable")[:5]
    assert ids(told) == live.ids(best)
    np.testing.assert_allclose([item.score for item in told.items], cosine[best], rtol=1e-5)


@pytest.mark.parametrize("which", ["engine", "with_vectors"])
def test_an_item_nobody_met_is_compared_by_its_fields(which, request):
    """Item 141 has shelf 1, price 6, number 41 and no event."""
    told = request.getfixturevalue(which).similar(FIRST_ITEM + NUM_ITEMS + 1, 4)
    assert told.by == "shared fields"
    assert len(ids(told)) == 4
    best = ids(told)[0] - FIRST_ITEM
    assert (best % 4, best % 7) == (1, 6)  # 13, with both the same


def test_of_an_unknown_item_nothing_is_known(engine):
    told = engine.similar("nowhere", 5)
    assert (told.items, told.by, told.ignored) == ((), None, {"item": 1})


def test_rules_hold(engine):
    rules = Rules(
        deny=[str(after(120))],
        filters=(Filter(field="price", at_most=4),),
        quotas=(Quota(field="shelf", most=2),),
        diversity=Diversity(relevance=0.9),
        pins=(Pin(item="109", position=2), Pin(item="120")),
    )
    told = engine.similar(120, 4, rules=rules)
    assert ids(told)[1] == 109
    assert after(120) not in ids(told)
    assert 120 not in ids(told)
    assert all((i - FIRST_ITEM) % 7 <= 4 for i in ids(told))
    assert max(map([(i - FIRST_ITEM) % 4 for i in ids(told)].count, range(4))) <= 2
    assert told.removed["deny"] == 1
    assert set(told.arranged) == {"pins", "quotas", "diversity"}
    assert ids(engine.similar(120, 3, rules=Rules(allow=[]))) == []
    with pytest.raises(ConfigError, match="k must be"):
        engine.similar(120, 0)
    with pytest.raises(ConfigError, match="no field"):
        engine.similar(120, 3, rules=Rules(filters=(Filter(field="nothing", equals=1),)))


def test_the_surface_s_rules_and_what_is_gone_hold_too(tmp_path):
    live = shop_live(text=RUN + f"[rules]\ndeny = ['{after(120)}']\nseen = 'drop'\n")
    with Engine(live, catalogue=CatalogueStore(tmp_path / "now.db")) as engine:
        assert isinstance(engine.upkeep, Upkeep)
        assert after(120) not in ids(engine.similar(120, 5))
        first = ids(engine.similar(120, 5))[0]
        engine.upkeep.remove_items(engine.live, [str(first)])
        assert first not in ids(engine.similar(120, 5))
