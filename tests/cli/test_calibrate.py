"""shortlist calibrate on a run of the planted shop, from the log to the allocation beside the run."""

import json
from pathlib import Path

import numpy as np
import pytest

from cli_support import refused, shortlist, succeeds, write_shop
from shortlist.cascade.allocation.calibration import load_allocation
from shortlist.cascade.lessons import make_batch
from shortlist.cascade.run import load_run
from shortlist.cli._bar import bars

OFFERING = """
[surface]
k = 4
[data]
valid_share = 0.2
[stages.retrieval]
systems = ["counts", "popularity"]
keep = 12
offers = [{systems = ["popularity"], keep = 12}, {keep = 8}]
[stages.ranking]
systems = ["counts"]
keep = 6
offers = [{systems = ["popularity"], keep = 6}]
[allocation]
system = "dcaf"
budget_ms = 50.0
max_requests = 60
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = write_shop(tmp_path_factory.mktemp("offering"))
    (folder / "offering.toml").write_text(OFFERING)
    out = folder / "run"
    tables = ("--items", folder / "items.csv", "--users", folder / "users.csv")
    succeeds("train", folder / "events.csv", *tables, "--config", folder / "offering.toml", "--out", out, "--quiet")
    return out


def test_a_run_is_calibrated_and_its_allocation_stands_beside_it(run):
    ended = succeeds("calibrate", run, "--quiet")
    assert "a0-b0 (default)" in ended.out
    assert "dcaf (allocator)" in ended.out
    assert "At a budget of 50.000 ms a request, dcaf takes" in ended.out
    assert "Rank correlation of costs: mflop alone" in ended.out
    beside = run.with_name("run.allocation")
    assert str(beside) in ended.out
    loaded = load_run(run)
    found = load_allocation(beside, version=loaded.version)
    batch = make_batch(loaded.dataset, loaded.dataset.split.test, loaded.cascade.max_history)
    choice = found.allocator.choose(found.contexts(batch))
    names = {chain.name for chain in loaded.config.chains()}
    assert {found.chains.names[j] for j in np.unique(choice.chain_R)} <= names
    assert len(names) == 6


def test_settings_may_be_changed_and_the_summary_printed_as_json(run):
    ended = succeeds(
        "calibrate",
        *(run, "--quiet", "--json", "--system", "fixed", "--budget-mflop", 5, "--max-requests", 40),
        *("--set", "allocation.worth=value", "--set", "allocation.budget_ms=none"),
    )
    summary = ended.json
    assert summary["system"] == "fixed"
    assert summary["worth"] == "value"
    assert summary["budget"] == {"mflop": 5.0, "ms": None}
    assert sum(summary["requests"].values()) <= 40
    assert sum(chain["share"] for chain in summary["chains"]) == pytest.approx(1)
    beside = run.with_name("run.allocation")
    assert json.loads((beside / "summary.json").read_text()) == summary
    about = json.loads((beside / "allocation.json").read_text())
    assert about["config"]["worth"] == "value"
    assert about["version"] == load_run(run).version


def test_tables_come_as_markdown(run):
    ended = succeeds("calibrate", run, "--quiet", "--markdown", "--system", "fixed", "--max-requests", 20)
    heads = [line for line in ended.out.splitlines() if line.startswith("| chain |")]
    assert heads == ["| chain | retrieval | ranking | MFLOP | ms | gain | share |"]


def test_what_can_not_be_done_is_refused_and_leaves_what_was_there(run, shop, tmp_path):
    succeeds("calibrate", run, "--quiet", "--max-requests", 20)
    before = (run.with_name("run.allocation") / "manifest.json").read_text()
    assert "no setting of the allocation" in refused("calibrate", run, "--quiet", "--set", "ranking.keep=5")
    assert "did you mean" in refused("calibrate", run, "--quiet", "--system", "dcaff")
    assert "budget in ms must be above 0" in refused("calibrate", run, "--quiet", "--budget-ms", -1)
    assert "one chain, so there is nothing to choose" in refused("calibrate", shop, "--quiet")
    assert "is not a snapshot" in refused("calibrate", tmp_path, "--quiet")
    assert (run.with_name("run.allocation") / "manifest.json").read_text() == before


def test_a_folder_of_something_else_stays(run):
    beside = run.with_name("run.allocation")
    kept = beside.rename(run.with_name("kept"))
    beside.mkdir()
    (beside / "diary.txt").write_text("mine")
    try:
        assert "is not a snapshot" in refused("calibrate", run, "--quiet")
        assert (beside / "diary.txt").read_text() == "mine"
    finally:
        (beside / "diary.txt").unlink()
        beside.rmdir()
        kept.rename(beside)


def test_help_names_the_folder():
    ended = shortlist("calibrate", "--help")
    assert ended.code == 0
    assert "RUN.allocation" in ended.out


def test_a_bar_on_a_terminal_alone(monkeypatch, capsys):
    with bars(shown=True) as tell:
        tell("replaying", 1, 2)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    for shown, words in ((False, ""), (True, "replaying")):
        with bars(shown=shown) as tell:
            tell("replaying", 1, 2)
            tell("replaying", 2, 2)
        assert words in capsys.readouterr().err
