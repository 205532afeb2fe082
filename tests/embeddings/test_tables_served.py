"""From a run's TOML to its page: every table inside trained systems, and every system with every table."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest
import torch

from shortlist.cascade.build import load_run, train_cascade
from shortlist.cascade.config import RunConfig
from shortlist.cascade.lessons import make_batch
from shortlist.cascade.settings import build, plain
from shortlist.data.dataset import build_dataset
from shortlist.data.log import read
from shortlist.embeddings.base import finish_tables, prepare_tables, tables_of
from shortlist.registry import systems
from support import planted_histories, planted_view, training_batch

FUNNEL = """
[surface]
k = 4
[trainer]
epochs = 1
batch_size = 32
[stages.retrieval]
systems = ["two-tower"]
keep = 14
[stages.ranking]
systems = ["dnn"]
[systems.two-tower]
dim = 4
table = {name = "quotient-remainder", compression = 2.0}
[systems.dnn]
dim = 8
widths = [8]
use_user_ids = true
[systems.dnn.table]
name = "amtl"
hidden = 4
size_weight = 5.0
"""


def test_a_run_with_small_tables_is_trained_written_and_served_alike(tmp_path):
    histories = planted_histories(60, seed=1)
    log = pl.DataFrame(
        {"user_id": histories.user_of_event, "item_id": histories.item, "timestamp": histories.time + 1_600_000_000}
    )
    dataset = build_dataset(read(log))
    run = train_cascade(dataset, RunConfig.from_toml(FUNNEL), tmp_path / "run", progress=False)
    told = {s["name"]: s["tables"] for s in run.metrics["systems"]}
    assert set(told["dnn"]) == {"items.ids", "request.user_ids"}
    dnn = run.cascade.systems["dnn"]
    for place, table in (("items.ids", dnn.items.ids), ("request.user_ids", dnn.request.user_ids)):
        lengths = table.lengths()
        assert told["dnn"][place] == 4 * int(lengths.sum()) + 4 * (len(lengths) + 1) + 8 * 8
    # 20 items in 10 rows: 7 remainders and 3 quotients, one of each more for the unknown item; rows of 4 floats.
    assert told["two-tower"]["items.ids"] == 16 * (7 + 3 + 2)
    again = load_run(run.folder)
    assert again.config == run.config
    batch = make_batch(dataset, dataset.split.test, run.cascade.max_history)
    old, new = run.cascade.run(batch), again.cascade.run(batch)
    assert torch.equal(old.rows, new.rows)
    assert torch.equal(old.scores, new.scores)


def with_table(settings: dict[str, Any], table: dict[str, Any]) -> dict[str, Any]:
    """The settings with that table wherever they choose one, also in inner settings."""
    return {
        name: table if name == "table" else with_table(value, table) if isinstance(value, dict) else value
        for name, value in settings.items()
    }


def chooses(settings: dict[str, Any]) -> bool:
    return with_table(settings, {}) != settings


@pytest.mark.parametrize("table", systems(kind="table"), ids=lambda entry: entry.name)
@pytest.mark.parametrize("entry", [e for e in systems() if chooses(plain(e.config(e.tiny)))], ids=lambda e: e.name)
def test_every_system_trains_with_every_table(entry, table):
    """One step with finite gradients that reach the table, from settings as TOML gives them."""
    view = planted_view()
    choice = {"name": table.name, **table.tiny, "min_field_size": 4}
    settings = with_table(plain(entry.config(entry.tiny)), choice)
    torch.manual_seed(0)
    model = entry.cls(build(entry.cls.Config, settings, entry.name), view.space)
    prepare_tables(model, view)
    model.prepare(view)
    chosen = [inner for inner in tables_of(model) if isinstance(inner, table.cls)]
    assert chosen
    phase = model.phases()[-1]
    if phase.before is not None:
        phase.before(view)
    loss = torch.stack(list(phase.losses(training_batch(phase.feed, view)).values())).sum()
    loss.backward()
    gradients = [p.grad for inner in chosen for p in inner.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    finish_tables(model)
    assert torch.isfinite(torch.stack(list(phase.losses(training_batch(phase.feed, view)).values()))).all()
