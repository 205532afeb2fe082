"""Every registered ranker, table, gate, gradient rule and feedback rule, reached from a run's TOML: trained as a stage, saved, asked once.

A part of the built-in shop's log, with an action that follows some purchases after hours or days. Rankers are actions of one ranking stage,
so one run trains them all on the same candidates, and each has a chain to be asked by. Each is asked for users by the engine, and its stage
must have acted: a stage that fails falls back to the order before it, and says so.
"""

import numpy as np
import polars as pl
import pytest
import torch

from shortlist.cascade.build import train_cascade
from shortlist.cascade.config import RunConfig
from shortlist.cascade.engine import Engine
from shortlist.cascade.run import load_run
from shortlist.cascade.settings import plain, toml
from shortlist.data.dataset import build_dataset
from shortlist.data.datasets import load
from shortlist.data.log import read
from shortlist.embeddings.base import table_sizes
from shortlist.errors import ConfigError
from shortlist.registry import systems

HOUR_MS = 3_600_000
GATES = {
    "senet": {"gates": {"senet": True}},
    "epnet": {"gates": {"epnet": ["user"]}},
    "ppnet": {"gates": {"ppnet": ["user", "item"]}},
    "lhuc": {"gates": {"lhuc": "user"}},
    "apg": {"apg": {"mode": "shared", "rank": 2, "condition": "mix", "fields": ["user", "item"]}},
}
STREAM_ALONE = {"fnc", "dfm", "bi-defuse", "label-oracle"}
"""Feedback rules whose scores are no chances by themselves, or whose labels are not there in time: a cascade refuses them, as they say."""
RUN = {
    "data": {"target_actions": ["buy"], "fit_share": 0.4},
    "surface": {"k": 4, "repeats": "yes"},
    "learning": {"tasks": ["buy", "again"], "task_hours": 200.0, "fit_requests": 40, "valid_requests": 10, "slices": 1},
    "trainer": {"epochs": 1, "batch_size": 32, "device": "cpu"},
}
RETRIEVAL = {"systems": ["popularity"], "keep": 16}


def instances() -> dict[str, dict]:
    """Settings as TOML has them, by the name that a system has in the run."""
    made = {e.name: {"system": e.name, **plain(e.config(e.tiny))} for e in systems(kind="ranker")}
    dnn = {"system": "dnn", "dim": 8, "widths": [8], "use_user_ids": True}
    for entry in systems(kind="table"):
        made[f"dnn-{entry.name}"] = {**dnn, "table": {"name": entry.name, **entry.tiny}}
    for entry in systems(kind="layer"):
        made[f"gated-{entry.name}"] = {
            "system": "deepfm",
            "fields": {"dim": 8},
            "head": {"widths": [8], **GATES[entry.name]},
        }
    for entry in systems(kind="gradient-rule"):
        made[f"shared-{entry.name}"] = {"system": "shared-bottom", "widths": [8], "tower_widths": [4]}
    return made


INSTANCES = instances()


@pytest.fixture(scope="module")
def log():
    """Baskets of the shop's busiest customers, at most six lines of each, and what came of every third line."""
    events = load("builtin").events
    assert isinstance(events, pl.DataFrame)
    busiest = events.group_by("user_id").agg(pl.col("timestamp").n_unique().alias("n")).sort("n", "user_id").tail(60)
    lines = events.join(busiest, on="user_id", how="semi").filter(
        pl.int_range(pl.len()).over("user_id", "timestamp") < 6
    )
    lines = lines.select("user_id", "item_id", "timestamp", "value", action=pl.lit("buy"))
    some = lines.filter(pl.col("item_id") % 3 == 0)
    hours = np.random.default_rng(0).choice([1, 20, 150], len(some))
    later = some.with_columns(
        pl.col("timestamp") + pl.Series(hours * HOUR_MS).cast(pl.Duration("ms")), action=pl.lit("again")
    )
    return read(pl.concat([lines, later]).sort("timestamp", maintain_order=True))


def trained(log, out, **sections: dict) -> RunConfig:
    """Trains the run; its settings come from TOML text."""
    config = RunConfig.from_toml(toml({**RUN, **sections}))
    train_cascade(build_dataset(log, config.data_settings), config, out, progress=False)
    return config


@pytest.fixture(scope="module")
def everything(log, tmp_path_factory):
    """Folder of a run whose ranking stage offers every instance, and its chains by instance."""
    torch.set_num_threads(1)
    first, *others = INSTANCES
    out = tmp_path_factory.mktemp("every") / "run"
    rules = {f"shared-{e.name}": {"gradients": {"rule": e.name}} for e in systems(kind="gradient-rule")}
    trained(
        log,
        out,
        trainer={**RUN["trainer"], **rules},
        stages={
            "retrieval": RETRIEVAL,
            "ranking": {"systems": [first], "keep": 4, "offers": [{"systems": [name], "keep": 4} for name in others]},
        },
        systems=INSTANCES,
    )
    return out, {name: f"a0-b{number}" for number, name in enumerate(INSTANCES)}


@pytest.fixture(scope="module")
def engine(everything, tmp_path_factory):
    with Engine.load(everything[0], events=tmp_path_factory.mktemp("served") / "events.db") as engine:
        yield engine


@pytest.mark.parametrize("name", INSTANCES)
def test_it_is_trained_saved_and_asked(engine, everything, name):
    answer = engine.recommend("17841", k=4, chain=everything[1][name])
    assert answer.degraded is None
    assert len({item.item_id for item in answer.items}) == 4
    assert answer.stages[-1].systems == (name,)
    assert answer.num_history > 10


def test_parts_are_those_that_were_asked_for(everything):
    run = load_run(everything[0])
    for entry in systems(kind="table"):
        tables = [t for t in run.cascade.systems[f"dnn-{entry.name}"].modules() if type(t) is entry.cls]
        assert tables, entry.name
        assert table_sizes(run.cascade.systems[f"dnn-{entry.name}"])
    for entry in systems(kind="layer"):
        assert any(isinstance(m, entry.cls) for m in run.cascade.systems[f"gated-{entry.name}"].modules()), entry.name
    for entry in systems(kind="gradient-rule"):
        assert run.config.trainer_of(f"shared-{entry.name}").gradients.rule == entry.name
    assert all(
        system.space.tasks == ("buy", "again") for name, system in run.cascade.systems.items() if name in INSTANCES
    )


@pytest.mark.parametrize("rule", [e.name for e in systems(kind="feedback-rule")])
def test_every_feedback_rule_is_served_or_refused_by_name(log, tmp_path, rule):
    feedback = {"rule": rule, "task": "again", "auxiliary_epochs": 1}
    if rule == "fsiw":
        feedback["settings"] = {"deadline_hours": 200.0}
    sections = {
        "learning": {**RUN["learning"], "feedback": feedback},
        "stages": {"retrieval": RETRIEVAL, "ranking": {"systems": ["shared-bottom"], "keep": 4}},
        "systems": {"shared-bottom": INSTANCES["shared-bottom"]},
    }
    if rule in STREAM_ALONE:
        with pytest.raises(ConfigError, match=rule):
            RunConfig.from_toml(toml({**RUN, **sections}))
        return
    trained(log, tmp_path / "run", **sections)
    with Engine.load(tmp_path / "run", events=tmp_path / "events.db") as engine:
        answer = engine.recommend("17841", k=4)
    assert answer.degraded is None
    assert len(answer.items) == 4
