"""The parts of the doctor's report that can go wrong."""

import sqlite3

import pytest
import torch

from shortlist.evaluation import doctor


def test_packages_are_read_from_requirements_of_any_form():
    base, extras = doctor._packages(
        [
            "numpy<3,>=2.0",
            "no-such-package-here>=1",
            "shortlist[ann,tune]; extra == 'all'",
            "torch >=2.9",
            "nowhere-faiss<2,>=1.9; extra == 'ann'",
            'pytest>=8; python_version > "3" and extra == "dev"',
            'numpy>=1; extra == "tune"',
        ]
    )
    assert list(base) == ["numpy", "no-such-package-here", "torch"]
    assert base["no-such-package-here"] is None
    assert base["torch"] is not None
    assert extras == {
        "ann": {"packages": {"nowhere-faiss": None}, "install": "pip install 'shortlist[ann]'"},
        "tune": {"packages": {"numpy": base["numpy"]}, "install": "pip install 'shortlist[tune]'"},
    }


def test_a_missing_extra_shows_its_line():
    report = doctor.examine()
    report["extras"] = {"ann": {"packages": {"faiss-cpu": None}, "install": "pip install 'shortlist[ann]'"}}
    assert "extra     ann: lacks faiss-cpu; pip install 'shortlist[ann]'" in list(doctor.lines(report))


def test_steps_are_timed_by_threads_and_the_number_is_put_back():
    before = torch.get_num_threads()
    measured = doctor.step_ms([1, 2], steps=5)
    assert set(measured) == {1, 2}
    assert all(0 < ms < 10_000 for ms in measured.values())
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("measured", "advice"), [({1: 0.4, 4: 0.2}, None), ({1: 0.4, 4: 3.0}, "--threads 1"), ({1: 0.4}, None)]
)
def test_threads_that_only_cost_are_told(measured, advice):
    told = doctor._steps_words(measured)
    assert "0.40 ms with 1 thread" in told
    assert ("--threads" in told) == (advice is not None)
    assert advice is None or advice in told


@pytest.mark.parametrize(
    ("text", "home", "told"),
    [
        ("/home/jane/data", "/home/jane", "~/data"),
        ("at /home/jane, and /home/janet/x", "/home/jane", "at ~, and /home/janet/x"),
        ("/usr/lib", "/", "/usr/lib"),
    ],
)
def test_without_home(text, home, told):
    assert doctor.without_home({"a": [text, 3]}, home) == {"a": [told, 3]}


def test_failed_checks_are_told_not_raised(monkeypatch):
    class Connection:
        def execute(self, _):
            return self

        def fetchone(self):
            return ("delete",)

        def close(self):
            pass

    monkeypatch.setattr(sqlite3, "connect", lambda _: Connection())
    monkeypatch.setattr(torch, "arange", lambda *_, **__: torch.zeros(4))
    told = doctor._checks()
    assert "journal mode delete" in told["SQLite in WAL mode"]
    assert "wrong result" in told["tensor on cpu"]
    assert told["write, fsync, rename"] == "ok"
