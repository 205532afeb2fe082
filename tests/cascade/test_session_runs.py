"""A run whose TOML says that GRU4Rec learns from sessions side by side: the cascade trains it so, and serves it."""

from pathlib import Path

import numpy as np
import pytest

from engine_support import NUM_USERS, shop_dataset
from shortlist.cascade import build
from shortlist.cascade.build import train_cascade
from shortlist.cascade.config import RunConfig
from shortlist.cascade.engine import Engine
from shortlist.errors import ConfigError
from shortlist.layers.gru import LANE, SESSION_START
from shortlist.models.retrieval.gru4rec import GRU4Rec

EXAMPLE = Path(__file__).parents[2] / "examples" / "next_item.toml"
LANES, HOURS = 16, 36
RUN = f"""
[surface]
k = 5
[trainer]
epochs = 2
[trainer.gru4rec]
batch_size = {LANES}
[stages.retrieval]
systems = ["gru4rec"]
keep = 20
[stages.ranking]
systems = ["counts"]
[systems.gru4rec]
dim = 8
batches = "sessions"
session_hours = {HOURS}
"""


def example_with_gru4rec() -> RunConfig:
    """The example with its commented lines in force."""
    lines = EXAMPLE.read_text().splitlines()
    start = lines.index("# [systems.gru4rec]")
    text = "\n".join(
        [line.removeprefix("# ") if n >= start and line.startswith("# ") else line for n, line in enumerate(lines)]
    )
    return RunConfig.from_toml(text.replace('systems = ["sasrec", ', 'systems = ["gru4rec", "sasrec", '))


@pytest.fixture
def fed(monkeypatch):
    """The batches that GRU4Rec is given, and the gaps that its source is built with."""
    batches, gaps = [], []
    losses, source = GRU4Rec.losses, build.SessionParallelSource

    def watched(self, batch):
        if self.training:
            batches.append(batch)
        return losses(self, batch)

    def built(view, *, batch_size, gap_hours):
        gaps.append((batch_size, gap_hours))
        return source(view, batch_size=batch_size, gap_hours=gap_hours)

    monkeypatch.setattr(GRU4Rec, "losses", watched)
    monkeypatch.setattr(build, "SessionParallelSource", built)
    return batches, gaps


def test_a_run_trains_on_sessions_side_by_side_and_is_served(tmp_path, fed):
    batches, gaps = fed
    dataset = shop_dataset()
    train_cascade(dataset, RunConfig.from_toml(RUN), tmp_path / "run", progress=False)
    assert gaps == [(LANES, HOURS)]
    assert all(LANE in batch.context for batch in batches)
    assert max(batch.size for batch in batches) == LANES
    # One event a day and a gap of 36 hours: a user is one session, opened once per epoch.
    users = int((np.diff(dataset.view().histories.offsets) >= 2).sum())
    assert users <= NUM_USERS
    assert sum(int(batch.context[SESSION_START].sum()) for batch in batches) == 2 * users
    assert sum(batch.size for batch in batches) == 2 * int(
        (np.diff(dataset.view().histories.offsets) - 1).clip(0).sum()
    )
    with Engine.load(tmp_path / "run") as engine:
        answer = engine.recommend("user-3")
        assert len(answer.items) == 5
        assert answer.degraded is None


def test_users_stay_the_default(tmp_path, fed):
    batches, gaps = fed
    plain = RUN.replace('batches = "sessions"\n', "").replace("epochs = 2", "epochs = 1")
    train_cascade(shop_dataset(), RunConfig.from_toml(plain), tmp_path / "run", progress=False)
    assert batches
    assert not gaps
    assert not any(LANE in batch.context for batch in batches)


def test_the_example_holds_what_its_comment_says():
    config = example_with_gru4rec()
    settings = config.systems["gru4rec"].settings
    assert (settings.batches, settings.session_hours, settings.negatives, settings.loss) == (
        "sessions",
        1,
        "in_batch",
        "bpr_max",
    )


def test_other_words_are_refused():
    with pytest.raises(ConfigError, match="batches"):
        RunConfig.from_toml(RUN.replace('"sessions"', '"lanes"'))
