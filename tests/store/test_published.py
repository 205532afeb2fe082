"""A place of published runs: whole or not there, whatever happens in the middle; damaged ones are refused by name."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from shortlist.errors import ConfigError, SnapshotError
from shortlist.store import published
from shortlist.store.published import Place, is_place, served_run
from shortlist.store.snapshot import read_snapshot, write_snapshot


def make_run(folder, number, size=100):
    """A snapshot with two files that say which number it has."""

    def write(beside):
        (beside / "inner").mkdir()
        (beside / "number.txt").write_text(str(number))
        np.save(beside / "inner" / "array.npy", np.full(size, number))

    write_snapshot(folder, write)
    return folder


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path / "place")


def number_of(run):
    read_snapshot(run)
    return int((run / "number.txt").read_text())


def names(place):
    return sorted(path.name for path in place.folder.iterdir())


def test_a_published_run_is_the_current_one(tmp_path, place):
    run = make_run(tmp_path / "run", 1)
    made = place.publish(run, note="first")
    assert made.version == read_snapshot(run).version
    assert place.state().current == made.version
    assert place.state().versions == (made,)
    assert number_of(place.current_run) == 1
    assert is_place(place.folder)
    assert not is_place(run)
    assert served_run(place.folder) == place.run(made.version)
    assert served_run(run) == run
    assert names(place) == [".lock", made.version, "current.json"]


def test_what_stands_beside_a_run_comes_along(tmp_path, place):
    run = make_run(tmp_path / "r[1]*", 1)
    make_run(run.with_name(f"{run.name}.allocation"), 7)
    (tmp_path / f"{run.name}.summaries.vista").write_bytes(b"summary")
    (tmp_path / f"{run.name}.clicks.json").write_text("{}")
    make_run(run.with_name(f"{run.name}-report"), 5)
    (tmp_path / f"{run.name}-reports").mkdir()  # of somebody else
    (tmp_path / f"{run.name}.summaries.vista.part").write_bytes(b"being written")
    (tmp_path / f"{run.name}.events.db").write_bytes(b"not of the run")
    (tmp_path / "r1x.allocation").write_bytes(b"of another run, whose name fits the pattern")
    version = place.publish(run).version
    assert names(place) == [
        ".lock",
        version,
        f"{version}-report",
        f"{version}.allocation",
        f"{version}.clicks.json",
        f"{version}.summaries.vista",
        "current.json",
    ]
    assert number_of(place.folder / f"{version}.allocation") == 7
    make_run(run.with_name(f"{run.name}.allocation"), 8)  # calibrated again, the run being the same
    place.publish(run)
    assert number_of(place.folder / f"{version}.allocation") == 8
    place.publish(make_run(tmp_path / "next", 2), keep=1)
    assert names(place) == [".lock", place.state().current, "current.json"]
    assert len(place.state().versions) == 1


def test_files_are_shared_or_copied_and_outlive_the_run(tmp_path, place):
    linked = place.publish(make_run(tmp_path / "run", 1)).version
    inode = (tmp_path / "run" / "number.txt").stat().st_ino
    assert (place.run(linked) / "number.txt").stat().st_ino == inode
    make_run(tmp_path / "run", 2)
    assert number_of(place.run(linked)) == 1
    copied = place.publish(tmp_path / "run", link=False).version
    assert (place.run(copied) / "number.txt").stat().st_ino != (tmp_path / "run" / "number.txt").stat().st_ino
    assert number_of(place.current_run) == 2


def test_where_links_are_not_possible_files_are_copied(tmp_path, place, monkeypatch):
    def refused(*_, **__):
        raise OSError("not across file systems")

    monkeypatch.setattr(os, "link", refused)
    place.publish(make_run(tmp_path / "run", 1))
    assert number_of(place.current_run) == 1


def test_the_newest_stay(tmp_path, place):
    made = [place.publish(make_run(tmp_path / "run", n), keep=3).version for n in range(5)]
    assert [one.version for one in place.state().versions] == made[2:]
    assert names(place) == [".lock", *sorted(made[2:]), "current.json"]
    with pytest.raises(ConfigError, match="keep must be at least 1, got 0"):
        place.publish(tmp_path / "run", keep=0)


def test_rollback_goes_back_one_by_one_and_to_a_named_version(tmp_path, place):
    made = [place.publish(make_run(tmp_path / "run", n)).version for n in range(3)]
    assert place.rollback().version == made[1]
    assert place.rollback().version == made[0] == place.state().current
    with pytest.raises(SnapshotError, match="no version from before the current one"):
        place.rollback()
    assert place.rollback(made[2]).version == made[2]
    with pytest.raises(SnapshotError, match=f"has no version 'cafe'; it has {made[0]}, {made[1]}, {made[2]}"):
        place.rollback("cafe")
    assert number_of(place.current_run) == 2


def test_a_version_published_again_is_the_newest(tmp_path, place):
    made = [place.publish(make_run(tmp_path / f"run-{n}", n)).version for n in range(2)]
    place.publish(tmp_path / "run-0")
    assert [one.version for one in place.state().versions] == made[::-1]
    assert place.state().current == made[0]


# -- damage --------------------------------------------------------------------------------------------------------


def damage(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()  # a new file: the one that other places share stays as it is
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["number.txt", "inner/array.npy", "manifest.json"])
def test_a_damaged_run_is_refused_by_file_and_changes_nothing(tmp_path, place, file):
    first = place.publish(make_run(tmp_path / "good", 1)).version
    before = names(place)
    bad = make_run(tmp_path / "bad", 2)
    if file == "manifest.json":
        (bad / file).write_text("{")
    else:
        damage(bad / file)
    with pytest.raises(SnapshotError, match=Path(file).name):
        place.publish(bad)
    assert place.state().current == first
    assert names(place) == before


def test_a_copy_that_does_not_arrive_whole_is_refused(tmp_path, place, monkeypatch):
    first = place.publish(make_run(tmp_path / "run", 1)).version
    make_run(tmp_path / "run", 2)
    copy = published._link

    def torn(source, target):
        copy(source, target)
        if target.endswith("array.npy"):
            damage(Path(target))

    monkeypatch.setattr(published, "_link", torn)
    with pytest.raises(SnapshotError, match=r"array\.npy is damaged"):
        place.publish(tmp_path / "run")
    assert place.state().current == first
    assert number_of(place.current_run) == 1
    monkeypatch.undo()
    place.publish(tmp_path / "run")  # and what was left of it is no obstacle
    assert number_of(place.current_run) == 2


def test_no_way_back_to_a_damaged_version(tmp_path, place):
    made = [place.publish(make_run(tmp_path / "run", n), link=False).version for n in range(2)]
    damage(place.run(made[0]) / "number.txt")
    with pytest.raises(SnapshotError, match=rf"{made[0]}/number\.txt is damaged"):
        place.rollback()
    assert place.state().current == made[1]


def test_a_damaged_version_is_replaced_when_it_is_published_again(tmp_path, place):
    run = make_run(tmp_path / "run", 1)
    version = place.publish(run, link=False).version
    damage(place.run(version) / "number.txt")
    place.publish(run, link=False)
    assert number_of(place.current_run) == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "is damaged"),
        ('{"format": 9}', "is of format 9"),
        ('{"format": 1, "current": "a", "versions": []}', "'a'"),
        ("[" * 200_000, "is damaged"),
        ('{"format": ' + "9" * 5_000 + "}", "is damaged"),
        ("[1]", "it holds no object"),
        (
            '{"format": 1, "current": "../run", "versions": [{"version": "../run", "published_at": ""}]}',
            "is no version",
        ),
        ('{"format": 1, "current": 7, "versions": [{"version": 7, "published_at": ""}]}', "is no version"),
    ],
)
def test_a_damaged_record_is_said(tmp_path, place, text, told):
    place.publish(make_run(tmp_path / "run", 1))
    (place.folder / "current.json").write_text(text)
    with pytest.raises(SnapshotError, match=told):
        place.state()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    run = make_run(tmp_path / "run", 1)
    other = tmp_path / "photos"
    other.mkdir()
    (other / "me.jpg").write_bytes(b"smile")
    with pytest.raises(SnapshotError, match=r"holds me\.jpg and is no place"):
        Place(other).publish(run)
    with pytest.raises(SnapshotError, match="is no place"):
        Place(run).publish(run)
    assert [path.name for path in other.iterdir()] == ["me.jpg"]
    with pytest.raises(SnapshotError, match="holds no published run; publish one with"):
        Place(tmp_path / "nothing").state()
    with pytest.raises(SnapshotError, match="is not a folder"):
        Place(tmp_path / "nothing").rollback("abc")


# -- in the middle -------------------------------------------------------------------------------------------------

PUBLISHER = """
import sys
from pathlib import Path
from shortlist.store.published import Place
place, runs = Place(sys.argv[1]), [Path(run) for run in sys.argv[2:]]
print("ready", flush=True)
while True:
    for run in runs:
        place.publish(run, keep=1)
"""


def test_kill_9_at_any_moment_leaves_a_readable_current(tmp_path, place):
    """A process that publishes without end is killed at random moments; every time the current version is whole."""
    runs = [make_run(tmp_path / f"run-{n}", n, size=20_000) for n in range(2)]
    place.publish(runs[0])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    lot = np.random.default_rng(0)
    seen = set()
    for _ in range(6):
        arguments = [sys.executable, "-c", PUBLISHER, str(place.folder), *map(str, runs)]
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, env=environment)
        process.stdout.readline()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=lot.uniform(0.005, 0.1))
        assert process.poll() is None, "the publisher failed by itself"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        seen.add(number_of(place.current_run))
    assert seen <= {0, 1}
    place.publish(runs[1], keep=1)  # its remains are no obstacle, and are gone afterwards
    assert names(place) == [".lock", read_snapshot(runs[1]).version, "current.json"]


@pytest.mark.parametrize("step", ["copied", "renamed"])
def test_a_stop_before_the_record_changes_leaves_the_old_version(tmp_path, place, monkeypatch, step):
    first = place.publish(make_run(tmp_path / "run", 1)).version
    make_run(tmp_path / "run", 2)

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(published, "flush", stopped) if step == "copied" else monkeypatch.setattr(
        Place, "_write", stopped
    )
    with pytest.raises(KeyboardInterrupt):
        place.publish(tmp_path / "run")
    monkeypatch.undo()
    assert place.state().current == first
    assert number_of(place.current_run) == 1
    second = place.publish(tmp_path / "run").version
    assert names(place) == [".lock", *sorted([first, second]), "current.json"]


def test_readers_beside_a_busy_publisher_always_find_a_whole_run(tmp_path, place):
    runs = [make_run(tmp_path / f"run-{n}", n) for n in range(3)]
    place.publish(runs[0])
    done = threading.Event()

    def publish():
        for turn in range(30):
            place.publish(runs[turn % 3], keep=3)
        done.set()

    publisher = threading.Thread(target=publish)
    publisher.start()
    reads = 0
    while not done.is_set():
        assert number_of(place.current_run) in (0, 1, 2)
        reads += 1
    publisher.join()
    assert reads > 5


def test_two_publishers_do_not_lose_each_others_version(tmp_path, place):
    runs = [make_run(tmp_path / f"run-{n}", n) for n in range(8)]
    threads = [threading.Thread(target=Place(place.folder).publish, args=(run,), kwargs={"keep": 8}) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {one.version for one in place.state().versions} == {read_snapshot(run).version for run in runs}


def test_the_stamp_changes_with_the_record(tmp_path, place):
    assert place.stamp() is None
    run = make_run(tmp_path / "run", 1)
    stamps = []
    for _ in range(5):
        place.publish(run)
        stamps.append(place.stamp())
    assert all(a != b for a, b in itertools.pairwise(stamps))
    assert json.loads((place.folder / "current.json").read_text())["format"] == 1
