"""The example of long histories, made small: trained by the one command, served by the one engine, users' tables kept between requests."""

from pathlib import Path

import numpy as np
import pytest

from engine_support import FIRST_ITEM, shop_dataset
from shortlist.cascade.build import train_cascade
from shortlist.cascade.config import RunConfig
from shortlist.cascade.engine import Engine
from shortlist.store.events import Event

EXAMPLE = Path(__file__).parents[2] / "examples" / "long_history.toml"
SMALL = ("retrieval.keep=40", "pre-ranking.keep=30", "surface.k=5", "trainer.epochs=1", "sdim.dim=8", "twin.dim=8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "long"
    train_cascade(shop_dataset(), RunConfig.from_toml(EXAMPLE).override(*SMALL), out, progress=False)
    return out


@pytest.fixture
def engine(folder, tmp_path):
    with Engine.load(folder, events=tmp_path / "events.db") as engine:
        yield engine


def scores(answer):
    return {item.item_id: item.score for item in answer.items}


def test_the_stage_s_default_and_its_other_offer_are_trained(engine):
    systems = engine._live.cascade.systems
    assert {"sdim", "twin"} <= set(systems)
    answer = engine.recommend("user-3")
    assert len(answer.items) == 5
    (ranking,) = [stage for stage in answer.stages if stage.stage == "ranking"]
    assert ranking.systems == ("sdim",)
    assert not ranking.degraded


def test_a_user_s_table_goes_on_with_what_is_recorded(engine):
    """The second answer comes from the kept table and one new event; it is the one that a fresh engine gives from the whole past."""
    memories = engine._live.cascade.memories
    engine.recommend("user-3")
    assert memories.status().num_hits == 0
    last = float(engine._live.dataset.histories.time.max() + 3_600)
    engine.record([Event(user="user-3", item=str(FIRST_ITEM + 7), timestamp=last, action="buy")])
    kept = engine.recommend("user-3")
    assert memories.status().num_hits == 1
    memories.forget("user-3")
    fresh = engine.recommend("user-3")
    assert memories.status().num_hits == 1
    assert scores(kept).keys() == scores(fresh).keys()
    np.testing.assert_allclose(list(scores(kept).values()), list(scores(fresh).values()), rtol=1e-4, atol=1e-5)


def test_someone_new_gets_a_page(engine):
    answer = engine.recommend("nobody")
    assert len(answer.items) == 5
    assert all(not stage.degraded for stage in answer.stages)
