"""Near-line updates: a shop whose customers change their ways, so that what has to be learned is known."""

import datetime
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from cli_support import refused, succeeds
from engine_support import DAY, FIRST_ITEM, NUM_ITEMS, NUM_USERS, START, shop_frames, trained_shop
from shortlist.cascade import updating
from shortlist.cascade.config import RunConfig
from shortlist.cascade.engine import Engine
from shortlist.cascade.run import load_run
from shortlist.cascade.schedule import UpdateConfig
from shortlist.cascade.updating import update
from shortlist.cli import main
from shortlist.errors import ConfigError, SnapshotError
from shortlist.store.catalogue import CatalogueStore, ItemUpdate
from shortlist.store.events import Event, EventStore
from shortlist.store.published import Place

CONFIG = """
[surface]
k = 5
repeats = "yes"
[trainer]
epochs = 4
[update]
epochs = 2
valid_share = 0.2
test_share = 0.3
[stages.retrieval]
systems = ["sasrec", "popularity"]
keep = 20
[stages.ranking]
systems = ["dnn"]
keep = 10
[systems.sasrec]
dim = 8
[systems.dnn]
dim = 4
widths = [8]
max_history = 10
"""
STRIDE = 7
"""Customers took the next item; now they take the one so many further."""


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return trained_shop(tmp_path_factory.mktemp("update") / "run", CONFIG)


def later_events(days=12, seed=3, stride=STRIDE):
    """What customers, two new ones among them, did after the log's end; some of it with an item that is new as well."""
    rng = np.random.default_rng(seed)
    found = []
    for user in range(NUM_USERS + 2):
        at = int(rng.integers(NUM_ITEMS))
        for day in range(days):
            then = START + datetime.timedelta(days=40 + day, minutes=user)
            item = str(FIRST_ITEM + at if (user + day) % 9 else 900)
            found.append(Event(user=f"user-{user}", item=item, timestamp=then.timestamp(), action="view"))
            at = (at + stride) % NUM_ITEMS
    return found


@pytest.fixture
def events(tmp_path):
    store = EventStore(tmp_path / "place.events.db", sync="normal")
    store.append(later_events())
    yield store
    store.close()


@pytest.fixture
def place(run, tmp_path):
    place = Place(tmp_path / "place")
    place.publish(run)
    return place


def test_an_update_learns_what_changed_and_is_published(place, events):
    before = place.state().current
    done = update(place.folder, events, progress=False)
    assert done.outcome == "updated"
    assert done.version == place.state().current != before
    assert [one.note for one in place.state().versions] == ["", f"updated from {before}"]
    assert done.num_new == len(later_events())
    assert (done.num_new_users, done.num_new_items) == (2, 1)
    assert done.judged.new_ndcg > done.judged.old_ndcg
    assert done.retrained == {}
    run = load_run(place.current_run)
    assert run.metrics["update"]["from"] == before
    assert run.metrics["update"]["events_upto"] == events.last_number()
    assert run.config.trainer.epochs == 4  # the settings are those of the run, not those of the update
    assert max(system["epochs"] for system in run.metrics["systems"]) <= 2
    assert int(run.dataset.user_ids.encode([f"user-{NUM_USERS}"])[0]) > 0
    with Engine.load(place.current_run, events=events.path) as engine:
        answer = engine.recommend("user-3")
        assert answer.degraded is None
        # The store still has the events that the snapshot now holds: none counts twice.
        mine = [e for e in later_events() if e.user == "user-3"]
        old = load_run(place.run(before)).dataset
        row = int(old.user_ids.encode(["user-3"])[0])
        assert answer.num_history == len(mine) + int(np.diff(old.histories.offsets)[row])
    assert not place.folder.with_name("place.updating").exists()


def test_the_next_update_begins_where_the_last_one_ended(place, events):
    update(place.folder, events, progress=False)
    current = place.state().current
    done = update(place.folder, events, progress=False)
    assert (done.outcome, done.num_new, done.version) == ("too few", 0, current)
    shifted = [
        Event(user=e.user, item=e.item, timestamp=e.timestamp + 20 * DAY, action=e.action) for e in later_events(6)
    ]
    events.append(shifted)
    done = update(place.folder, events, progress=False)
    assert (done.outcome, done.num_new) == ("updated", len(shifted))
    assert done.version == place.state().current != current


def test_a_worse_run_is_not_published(place, events, monkeypatch):
    train = updating.train_unsaved
    before = place.state()

    class Worst:
        """Shows everybody the same item."""

        def __init__(self, cascade):
            self.cascade, self.max_history = cascade, cascade.max_history

        def run(self, batch):
            page = self.cascade.run(batch)
            page.rows[:] = 1
            return page

    def badly(*arguments, **settings):
        run = train(*arguments, **settings)
        return updating.replace(run, cascade=Worst(run.cascade))

    monkeypatch.setattr(updating, "train_unsaved", badly)
    done = update(place.folder, events, progress=False)
    assert done.outcome == "worse"
    assert done.judged.new_ndcg < done.judged.old_ndcg * 0.95
    assert done.judged.difference[1] < 0
    assert place.state() == before
    assert any("not published" in line for line in done.told())
    assert done.version == before.current


@pytest.mark.parametrize("step", ["train_unsaved", "_judged", "save_run", "Place"])
def test_a_stop_at_any_step_leaves_the_old_snapshot(place, events, monkeypatch, step):
    before = place.state()

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(updating, step, stopped)
    with pytest.raises(KeyboardInterrupt):
        update(place.folder, events, progress=False)
    assert place.state() == before
    assert load_run(place.current_run).version == before.current
    taken = json.loads((place.folder.with_name("place.updating") / "taken.json").read_text())
    events.append(later_events(1, seed=9))  # what came in meanwhile is for the update after this one
    monkeypatch.undo()
    done = update(place.folder, events, progress=False)
    assert done.outcome == "updated"
    assert load_run(place.current_run).metrics["update"]["events_upto"] == taken["upto"] < events.last_number()


def test_kill_9_in_the_middle_leaves_the_old_snapshot_and_the_next_one_goes_on(place, events):
    before = place.state().current
    state = place.folder.with_name("place.updating") / "training"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "shortlist.cli", "update", str(place.folder), "--quiet"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    until = time.monotonic() + 60
    while not list(state.glob("sasrec-*/*")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err
    assert place.state().current == before
    assert load_run(place.current_run).version == before
    assert update(place.folder, events, progress=False).outcome == "updated"


def test_a_run_that_is_no_place_is_replaced_or_published(run, events, tmp_path):
    Place(tmp_path / "copy").publish(run)
    source = Place(tmp_path / "copy").current_run.rename(tmp_path / "own")
    before = load_run(source).version
    done = update(source, events, publish=tmp_path / "shelf", progress=False)
    assert Place(tmp_path / "shelf").state().current == done.version
    assert load_run(source).version == before
    done = update(source, events, progress=False)
    assert load_run(source).version == done.version != before


def test_what_is_told_of_items_and_users_counts(place, events):
    """A new item has the fields it was told with; who asked to be forgotten is in no history."""
    catalogue = CatalogueStore(events.path)
    try:
        catalogue.upsert_items(
            [ItemUpdate(item="900", title="Brand new", attributes={"shelf": "shelf-2", "price": 3.0})]
        )
        catalogue.forget_user("user-7")
        events.forget("user-7")
        assert update(place.folder, events, catalogue=catalogue, progress=False).outcome == "updated"
    finally:
        catalogue.close()
    dataset = load_run(place.current_run).dataset
    row, other = dataset.item_ids.encode([900, FIRST_ITEM + 2])
    assert dataset.titles[row] == "Brand new"
    fields = {f.column: f.name for f in dataset.schema.of("item")}
    shelf = dataset.space.items.columns[fields["shelf"]]
    assert shelf[row] == shelf[other] > 0
    lengths = np.diff(dataset.histories.offsets)
    gone, here = dataset.user_ids.encode(["user-7", "user-8"])
    assert lengths[gone] == 0
    assert lengths[here] > 12


def test_systems_that_can_not_go_on_are_trained_anew_and_named(place, events, monkeypatch):
    monkeypatch.setattr(
        updating.FirstWeights, "obstacle", lambda self, name, system: "no reason" if name == "dnn" else None
    )
    done = update(place.folder, events, progress=False)
    assert done.retrained == {"dnn": "no reason"}
    assert "dnn was trained anew: no reason" in done.told()
    epochs = {s["name"]: s["epochs"] for s in load_run(place.current_run).metrics["systems"]}
    assert epochs["sasrec"] <= 2 < epochs["dnn"]


def test_a_damaged_snapshot_is_refused_by_file(place, events):
    file = place.current_run / "systems" / "dnn.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()
    file.write_bytes(content)
    with pytest.raises(SnapshotError, match=r"dnn\.safetensors is damaged"):
        update(place.folder, events, progress=False)


def test_events_that_the_run_has_already_are_not_new(place, events):
    """A store that also holds what the run was trained on: only what came later counts."""
    frame, _ = shop_frames()
    known = [
        Event(user=user, item=str(item), timestamp=then.timestamp(), action=action)
        for user, item, then, action, _ in frame.iter_rows()
    ]
    events.append(known)
    assert update(place.folder, events, config=UpdateConfig(min_events=5_000), progress=False).num_new == len(
        later_events()
    )


def test_two_updates_do_not_mix(place, events):
    at_work = updating._alone(place.folder.with_name("place.updating"))
    with at_work, pytest.raises(SnapshotError, match="another update of this run is at work"):
        update(place.folder, events, progress=False)


def test_a_run_whose_writer_died_between_its_renames_is_updated_all_the_same(place, events, tmp_path):
    source = place.current_run.rename(tmp_path / "own.previous").with_name("own")
    assert update(source, events, progress=False).outcome == "updated"
    assert load_run(source).metrics["update"]["num_new"] == len(later_events())


def test_watching_goes_on_after_a_fault(place, events, monkeypatch, capsys):
    """Every round begins so many hours after the one before; a round that fails is told and is not the last."""
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 1:
            (place.folder / "current.json").rename(place.folder.with_name("aside.json"))
        elif len(waits) == 2:
            place.folder.with_name("aside.json").rename(place.folder / "current.json")
        else:
            raise KeyboardInterrupt

    monkeypatch.setattr("shortlist.cli.update.time.sleep", sleep)
    with pytest.raises(SystemExit, match="130"):
        main(["update", str(place.folder), "--watch", "--quiet", "--set", "min_events=99999", "--set", "every_hours=2"])
    said = capsys.readouterr()
    assert said.out.count("too few to learn from") == 2
    assert said.err.count("place") == 1
    assert all(7_000 < wait <= 7_200 for wait in waits)


def test_too_little_is_left_alone(place, events):
    done = update(place.folder, events, config=UpdateConfig(min_events=10_000), progress=False)
    assert done.outcome == "too few"
    assert "too few to learn from" in done.told()[0]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"every_hours": 0}, "every_hours must be above 0"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"margin": 1.5}, "margin must be from 0 to 1"),
        ({"test_share": 0.0}, "test_share must lie between 0 and 1"),
        ({"test_share": 0.5, "valid_share": 0.5}, "leave new events to train on"),
    ],
)
def test_settings_are_checked(settings, told):
    with pytest.raises(ConfigError, match=told):
        UpdateConfig(**settings)


def test_the_schedule_is_part_of_the_run(run):
    config = load_run(run).config
    assert config.update == UpdateConfig(epochs=2, valid_share=0.2, test_share=0.3)
    assert config.override("update.every_hours=6").update.every_hours == 6
    assert RunConfig.from_toml(config.to_toml()).update == config.update


def test_the_command(place, events, tmp_path):
    current = place.state().current
    told = succeeds("update", place.folder, "--json", "--quiet", "--set", "min_events=99999").json
    assert (told["outcome"], told["version"]) == ("too few", current)
    said = refused("update", place.folder, "--events", tmp_path / "none.db")
    assert "none.db: no such file; give the event store" in str(said)
    said = succeeds("update", place.folder, "--quiet").out
    assert f"{place.state().current} is in place" in said
    assert place.state().current != current
