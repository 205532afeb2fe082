"""Interaction rankers in a cascade: FM before, CAN with crosses, gates and generated weights after; trained, saved, served."""

import pytest
import torch

from engine_support import shop_frames
from shortlist.cascade.build import load_run, train_cascade
from shortlist.cascade.config import RunConfig
from shortlist.cascade.engine import Engine
from shortlist.data.dataset import build_dataset
from shortlist.data.log import read
from shortlist.models.base import load_weights

RUN = """
[surface]
k = 6
[trainer]
epochs = 3
batch_size = 16
lr = 0.01
[stages.retrieval]
systems = ["popularity"]
keep = 25
[stages.pre-ranking]
systems = ["fm"]
keep = 20
[stages.ranking]
systems = ["can"]
keep = 12
[stages.re-ranking]
systems = ["dcnv2"]
keep = 6
[systems.fm.fields]
dim = 8
[systems.can]
pairs = ["item*history", "item*user"]
crosses = ["item*history"]
cross_rows = 2000
fields = { dim = 8 }
head = { widths = [16], gates = { senet = true, ppnet = ["user", "item"], lhuc = "user" } }
[systems.dcnv2]
fields = { dim = 8 }
head = { widths = [16], apg = { mode = "shared", rank = 2, condition = "group", fields = ["user"], over = 8 } }
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the trained run."""
    torch.set_num_threads(1)
    config = RunConfig.from_toml(RUN)
    events, items = shop_frames()
    out = tmp_path_factory.mktemp("runs") / "interactions"
    train_cascade(build_dataset(read(events, items=items), config.data_settings), config, out, progress=False)
    return out


def test_what_was_learned_is_saved_and_comes_back(folder):
    run = load_run(folder)
    can = run.cascade.systems["can"]
    assert len(can.crosses.keys_K) > 0  # the dictionary is a part of the weights
    fresh = type(can)(can.config, can.space)
    load_weights(fresh, can.state_dict())
    assert torch.equal(fresh.crosses.keys_K, can.crosses.keys_K)


def test_pages_are_served_by_all_stages_and_none_falls_back(folder, tmp_path):
    with Engine.load(folder, events=tmp_path / "events.db") as engine:
        user = str(shop_frames()[0]["user_id"][0])
        answer = engine.recommend(user, k=6)
        assert len(answer.items) == 6
        assert answer.degraded is None
        assert engine.recommend("nobody at all", k=6).items
