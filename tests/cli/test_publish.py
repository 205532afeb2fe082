"""`shortlist publish` by its outside."""

import pytest

from cli_support import refused, succeeds
from shortlist.store.published import Place
from shortlist.store.snapshot import read_snapshot, write_snapshot


@pytest.fixture
def runs(tmp_path):
    """Three snapshots, of nothing in particular."""
    found = [tmp_path / f"run-{n}" for n in range(3)]
    for n, folder in enumerate(found):
        write_snapshot(folder, lambda beside, n=n: (beside / "number.txt").write_text(str(n)) and None)
    return found


def test_publish_list_and_roll_back(runs, tmp_path):
    place = tmp_path / "place"
    versions = [read_snapshot(run).version for run in runs]
    for n, run in enumerate(runs):
        said = succeeds("publish", run, "--to", place, "--note", f"number {n}").out
    lines = said.splitlines()
    assert [line.split()[-3:] for line in lines] == [[lines[n].split()[-3], "number", str(n)] for n in range(3)]
    assert [line[:14] for line in lines] == [f"  {versions[0]}", f"  {versions[1]}", f"* {versions[2]}"]
    assert succeeds("publish", "--rollback", place, "--json").json["current"] == versions[1]
    assert succeeds("publish", "--rollback", place, "--version", versions[2], "--json").json["current"] == versions[2]
    told = succeeds("publish", "--list", place, "--json").json
    assert [one["version"] for one in told["versions"]] == versions
    succeeds("publish", runs[0], "--to", place, "--keep", "1", "--copy")
    assert [one.version for one in Place(place).state().versions] == [versions[0]]


@pytest.mark.parametrize(
    "arguments", [[], ["RUN"], ["--to", "P"], ["RUN", "--list", "P"], ["--list", "P", "--rollback", "P"]]
)
def test_half_a_command_is_refused_with_the_whole_ones(arguments, runs, tmp_path):
    named = [str({"RUN": runs[0], "P": tmp_path / "place"}.get(word, word)) for word in arguments]
    assert "say one thing: `shortlist publish RUN --to PLACE`" in str(refused("publish", *named))


def test_damage_is_refused_by_file(runs, tmp_path):
    (runs[0] / "number.txt").write_text("7")
    assert "number.txt is damaged" in str(refused("publish", runs[0], "--to", tmp_path / "place"))
    assert not (tmp_path / "place").exists()
    assert "holds no published run" in str(refused("publish", "--list", tmp_path / "place"))
    assert "--version says where to go back to" in str(
        refused("publish", runs[1], "--to", tmp_path / "place", "--version", "abc")
    )


def test_commands_that_open_a_run_open_a_place(shop, tmp_path):
    """`recommend` on a place gives the page of its current run."""
    place = tmp_path / "place"
    succeeds("publish", shop, "--to", place)
    there, here = (succeeds("recommend", folder, "--user", "1", "--json").json for folder in (place, shop))
    assert [item["item_id"] for item in there["items"]] == [item["item_id"] for item in here["items"]]
    assert there["snapshot_version"] == here["snapshot_version"]
