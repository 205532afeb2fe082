"""`shortlist doctor`: runs anywhere, tells the truth, and keeps a person's name to itself."""

import platform
from pathlib import Path

import numpy
import torch

from cli_support import succeeds
from shortlist._version import __version__
from shortlist.registry import ENVIRONMENT, systems


def test_json_agrees_with_what_can_be_asked_directly(monkeypatch, tmp_path):
    (tmp_path / "ml-1m").mkdir()
    (tmp_path / "ml-1m" / "ratings.dat").write_text("")
    monkeypatch.setenv("SHORTLIST_DATA", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    report = succeeds("doctor", "--json").json
    assert report["shortlist"]["version"] == __version__
    assert report["python"]["version"] == platform.python_version()
    assert report["packages"]["numpy"] == numpy.__version__
    assert report["torch"]["version"] == torch.__version__
    assert report["threads"]["torch"] == torch.get_num_threads()
    assert report["threads"]["environment"]["OMP_NUM_THREADS"] == "3"
    assert len(report["devices"]) == 1 + torch.cuda.device_count()
    assert report["data"]["found"] == ["builtin", "ml-1m"]
    named = {(kind, name) for kind, names in report["systems"]["by_kind"].items() for name in names}
    assert named == {(entry.kind, entry.name) for entry in systems()}
    assert set(report["checks"].values()) == {"ok"}
    assert report["machine"]["free_disk_gib"] > 0


def test_text_is_one_paste():
    lines = succeeds("doctor").out.splitlines()
    assert lines[0].startswith(f"shortlist {__version__} (")
    words = {line.split()[0] for line in lines}
    assert {"machine", "torch", "device", "threads", "packages", "data", "systems", "check"} <= words
    assert "check     SQLite in WAL mode: ok" in lines


def test_the_home_folder_is_not_told(monkeypatch, tmp_path):
    home = tmp_path / "home" / "jane"
    (home / "data").mkdir(parents=True)
    (home / "broken").mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("SHORTLIST_DATA", str(home / "data"))
    monkeypatch.setattr("shortlist.registry._DISCOVERED", set())
    monkeypatch.setenv(ENVIRONMENT, str(home / "missing"))
    ended = succeeds("doctor", "--json")
    assert "jane" not in ended.out
    assert ended.json["data"]["folder"] == "~/data"
    assert "~/missing" in ended.json["systems"]["problem"]
    text = succeeds("doctor").out
    assert "jane" not in text
    assert "PROBLEM: ConfigError" in text
    assert Path.home() == home
