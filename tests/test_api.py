import subprocess
import sys

import pytest

import shortlist
from support import shop_frames

SETTINGS = (
    "trainer.epochs=1",
    "learning.slices=1",
    'retrieval.systems=["popularity","item-knn"]',
    'ranking.systems=["light"]',
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    events, items, users = shop_frames()
    log = shortlist.read(events, items=items, users=users)
    return shortlist.train(log, out=tmp_path_factory.mktemp("api") / "shop", settings=SETTINGS, progress=False)


def test_a_dozen_names_go_from_a_log_to_a_page(run):
    assert 0 < shortlist.evaluate(run).metrics["ndcg@10"].mean <= 1
    comparison = shortlist.compare(run.folder, ["popularity"])
    assert [r.name for r in comparison.reports] == ["run", "popularity"]
    with shortlist.Engine.load(run.folder) as engine:
        page = engine.recommend("u17", k=5)
    assert len(page.items) == 5
    assert shortlist.load(run.folder).version == run.version


def test_settings_of_chosen_stages_apply_after_the_choice(run):
    assert run.config.stages[0].actions[0].systems == ("popularity", "item-knn")
    assert run.config.trainer.epochs == 1


def test_every_public_name_is_there():
    for name in shortlist.__all__:
        assert getattr(shortlist, name) is not None
    with pytest.raises(AttributeError, match="offers"):
        _ = shortlist.nothing


def test_the_front_door_is_light():
    """`import shortlist` alone must not import torch or polars."""
    program = "import sys, shortlist; assert not {'torch', 'polars', 'pydantic'} & set(sys.modules), 'heavy'"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
