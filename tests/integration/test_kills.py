"""The short form of benchmarks/kills.py: its parts on a small log, and that it would notice what it looks for."""

import shutil
from dataclasses import replace

import pytest

from cli_support import benchmark, train_shop, write_shop
from shortlist.data.ingest import ingest
from shortlist.store.events import Event, EventStore
from shortlist.store.published import Place

killing, kills = benchmark("_killing"), benchmark("kills")


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Folder of a run of counting systems."""
    return train_shop(tmp_path_factory.mktemp("kills"), "counted")


def test_a_command_is_killed_in_its_work_and_ends_the_same_when_run_again(tmp_path):
    folder, home = write_shop(tmp_path / "shop"), tmp_path / "home"
    home.mkdir()
    command = killing.Command(arguments=["ingest", folder / "events.csv", "--out", home / "log"], watched=home)
    assert command.killed(0.0)
    assert [path.name for path in home.iterdir()] == ["log.part"]  # it had begun, and there is no half log
    assert not command.killed(120.0)  # this time it had ended by then
    assert [path.name for path in home.iterdir()] == ["log"]
    ingest(folder / "events.csv", tmp_path / "undisturbed")
    whole = killing.contents(tmp_path / "undisturbed", kills.TELLS_TIME)
    assert killing.contents(home / "log", kills.TELLS_TIME) == whole


def test_lost_events_and_half_batches_are_noticed(tmp_path):
    def kept(*numbers, places=kills.BATCH):
        path = tmp_path / "events.db"
        path.unlink(missing_ok=True)
        store, tally = EventStore(path), killing.Tally(kind="events")
        store.append([Event(user="u", item=f"{n}-{p}", timestamp=1.7e9) for n in numbers for p in range(places)])
        store.close()
        kills.look_for_events(path, {0, 1}, tally)
        return tally.lost, tally.half_read

    assert kept(0, 1) == (0, 0)
    assert kept(0, 1, 2) == (0, 0)  # kept, and the answer did not arrive
    assert kept(0) == (kills.BATCH, 0)
    assert kept(0, 1, places=kills.BATCH - 1) == (2, 1)


def test_half_runs_and_strange_versions_are_noticed(shop, tmp_path):
    run, tally = tmp_path / "run", killing.Tally(kind="train")
    shutil.copytree(shop, run)
    known = (killing.contents(run, kills.TELLS_TIME),) * 2
    (tmp_path / "run.writing").mkdir()
    kills.look_at_run(run, True, known, tally)
    assert (tally.half_read, tally.as_before) == (0, 1)
    kills.look_at_run(run, True, ({}, {}), tally)
    assert tally.half_read == 1
    place = Place(tmp_path / "place")
    version = place.publish(run, link=False).version
    kills.check_place(place, [version], tally)
    assert tally.half_read == 1
    kills.check_place(place, ["another"], tally)
    (place.current_run / "popular.safetensors").write_bytes(b"torn")
    kills.check_place(place, [version], tally)
    assert tally.half_read == 3
    shutil.rmtree(run)
    kills.look_at_run(run, True, known, tally)
    assert tally.half_read == 4


@pytest.mark.parametrize("bad", [{"lost": 1}, {"half_read": 1}, {"differing": 1}, {"restart_s": [1.0, 5.5]}], ids=str)
def test_each_bar_can_be_missed(bad):
    good = killing.Tally(kind="events", kills=2, acknowledged=40, restart_s=[1.0, 2.0])
    assert kills.figures([good])["holds"]
    found = kills.figures([replace(good, **bad)])
    assert not found["holds"]
    assert sum(not met for met in found["bars"].values()) == 1
