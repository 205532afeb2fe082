"""Target attention end to end: examples/target_attention.toml trained on the planted shop and served, DIEN going on from its memories."""

from pathlib import Path

import pytest

from cli_support import succeeds, write_shop
from shortlist.cascade.engine import Engine
from shortlist.store.events import Event
from support import PER_CLUSTER

EXAMPLE = Path(__file__).parents[2] / "examples" / "target_attention.toml"
SMALL = {
    "trainer.epochs": 8, "trainer.lr": 0.01, "trainer.patience": 8, "surface.k": 4, "retrieval.keep": 16, "pre-ranking.keep": 12,
    "ranking.keep": 6, "re-ranking.keep": 4, "din.dim": 8, "dien.dim": 8, "dien.hidden": 8, "bst.dim": 8, "sasrec.dim": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = write_shop(tmp_path_factory.mktemp("attention"))
    out = folder / "run"
    changes = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    tables = ("--items", folder / "items.csv", "--users", folder / "users.csv")
    succeeds(
        "train", folder / "events.csv", *tables, "--config", EXAMPLE, "--out", out, "--no-report", "--quiet", *changes
    )
    return out


def cluster(item_id: str) -> int:
    return (int(item_id.removeprefix("i")) - 1) // PER_CLUSTER


def test_the_ranking_stage_puts_the_user_s_own_cluster_first(run, tmp_path):
    """User u of the planted shop likes cluster u % 4; candidates of all clusters are given, so that retrieval has no say."""
    offered = [f"i{1 + c * PER_CLUSTER + place}" for place in range(3) for c in range(4)]
    with Engine.load(run, events=tmp_path / "none.db") as engine:
        pages = {u: engine.recommend(f"u{u}", 3, candidates=offered) for u in range(1, 41)}
    assert all(page.degraded is None for page in pages.values())
    own = [cluster(item.item_id) == u % 4 for u, page in pages.items() for item in page.items]
    assert sum(own) / len(own) > 0.7


def test_the_first_gru_steps_through_new_events_alone(run, tmp_path):
    """Counted at the GRU: all of the past at the first request, none of it at the second, one event after one was recorded."""

    def page(engine):
        answer = engine.recommend("u1")
        assert answer.degraded is None
        return answer, [(item.item_id, round(item.score, 4)) for item in answer.items]

    with Engine.load(run, events=tmp_path / "one.db") as engine:
        bought = Event(user="u1", item="i3", timestamp=engine.history("u1", 1)[0].timestamp + 3600)
        steps = []
        extractor = engine.live.cascade.systems["dien"].extractor
        extractor.register_forward_pre_hook(lambda _, inputs: steps.append(len(inputs[0].data)))
        answer, first = page(engine)
        assert steps == [answer.num_history]
        assert page(engine)[1] == first
        assert len(steps) == 1
        engine.record([bought])
        _, after = page(engine)
        assert steps == [answer.num_history, 1]
    with Engine.load(run, events=tmp_path / "other.db") as fresh:
        fresh.record([bought])
        assert page(fresh)[1] == after != first
