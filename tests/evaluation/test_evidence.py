import json
import subprocess
import sys
import textwrap

import pytest

from shortlist.errors import ConfigError, DataError
from shortlist.evaluation import evidence
from shortlist.evaluation.evidence import Arm, Claim, Lab, hold_if, prove, results_page
from shortlist.metrics import Interval

CLAIM = Claim(
    name="c", systems=("full",), claim="A beats B.", data="none", protocol="none", bar="a > b", published={"a": 0.5}
)

FILE = """
from pathlib import Path
from shortlist.evaluation.evidence import Claim, hold_if
CLAIM = Claim(name="c", systems=("full",), claim="A beats B.", data="none", protocol="none", bar="a > b", published={"a": {"x": 0.5}})
LOG = Path(__file__).with_name("calls.txt")
STOP = Path(__file__).with_name("stop.txt").read_text().split()

def run(lab):
    for seed in lab.seeds:
        for arm, value in (("a", 2.0 + seed), ("b", 1.0)):
            def one():
                with LOG.open("a") as file:
                    file.write(f"{arm}{seed}\\n")
                if STOP == [arm, str(seed)]:
                    raise RuntimeError("power cut")
                return {"x": value, "cost:parameters": 7}
            lab.measure(arm, seed, one)

def judge(arms):
    return hold_if(arms["a"].metrics["x"].mean > arms["b"].metrics["x"].mean, f"a {arms['a'].metrics['x'].mean}")
"""


def quiet(_: str) -> None:
    pass


def folder_with(tmp_path, stop=""):
    (tmp_path / "stop.txt").write_text(stop)
    (tmp_path / "c.py").write_text(FILE)
    return tmp_path / "c.py"


def test_seeds_become_a_mean_with_a_t_interval():
    lab = Lab(CLAIM, kept=None, quick=False, say=quiet)
    for seed, value in zip(lab.seeds, (1.0, 2.0, 3.0)):
        lab.measure("a", seed, lambda value=value: {"x": value})
    interval = lab.arms()["a"].metrics["x"]
    assert interval.mean == pytest.approx(2.0)
    # t(0.975, 2 degrees) = 4.3027; standard error 1 / sqrt(3)
    assert interval.high - 2.0 == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert lab.arms()["a"].per_seed["x"] == (1.0, 2.0, 3.0)


def test_what_a_seed_does_not_have_has_no_mean():
    lab = Lab(CLAIM, kept=None, quick=False, say=quiet)
    for seed, value in zip(lab.seeds, (1.0, float("nan"), 3.0)):
        lab.measure("a", seed, lambda value=value: {"x": value, "y": 2.0})
    arm = lab.arms()["a"]
    assert (set(arm.metrics), arm.metrics["y"].mean) == ({"y"}, 2.0)


def test_an_arm_may_bring_its_own_interval_over_users():
    lab = Lab(CLAIM, kept=None, quick=True, say=quiet)
    lab.measure("a", 0, lambda: {"x": Interval(0.5, 0.4, 0.6)})
    assert lab.arms()["a"].metrics["x"] == Interval(0.5, 0.4, 0.6)


def test_a_full_run_writes_one_object_with_every_key_the_docs_need(tmp_path):
    result = prove(folder_with(tmp_path), say=quiet)
    written = json.loads((tmp_path / "results" / "c.json").read_text())
    assert written == json.loads(json.dumps(result))
    keys = (
        "name systems claim data protocol published arms bar verdict reason quick seconds hardware versions commit date"
    )
    assert set(keys.split()) == set(written)
    assert written["verdict"] == "holds"
    (a, b) = written["arms"]
    assert a["metrics"]["x"]["mean"] == 3.0
    assert a["metrics"]["x"]["seeds"] == 3
    assert a["cost"]["parameters"] == 7
    assert "x" in b["metrics"]


def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    with pytest.raises(RuntimeError, match="power cut"):
        prove(folder_with(tmp_path, stop="a 1"), say=quiet)
    assert not (tmp_path / "results" / "c.json").exists()
    prove(folder_with(tmp_path), say=quiet)
    assert (tmp_path / "calls.txt").read_text().split() == ["a0", "b0", "a1", "a1", "b1", "a2", "b2"]


def test_a_changed_claim_starts_anew_and_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError, match="power cut"):
        prove(folder_with(tmp_path, stop="a 1"), say=quiet)
    (tmp_path / "stop.txt").write_text("")
    (tmp_path / "c.py").write_text(FILE + "\n# another bar\n")
    prove(tmp_path / "c.py", say=quiet)
    assert (tmp_path / "calls.txt").read_text().split() == ["a0", "b0", "a1", "a0", "b0", "a1", "b1", "a2", "b2"]


def test_recorded_measurements_can_be_judged_again(tmp_path):
    first = prove(folder_with(tmp_path), say=quiet)
    (tmp_path / "c.py").write_text(FILE.replace("mean > arms", "mean < arms"))
    again = evidence.judge_again(tmp_path / "c.py")
    assert (first["verdict"], again["verdict"]) == ("holds", "fails")
    assert again["arms"] == json.loads(json.dumps(first["arms"]))
    assert json.loads((tmp_path / "results" / "c.json").read_text()) == again
    assert len((tmp_path / "calls.txt").read_text().split()) == 6


def test_quick_is_marked_and_not_recorded(tmp_path):
    result = prove(folder_with(tmp_path), quick=True, say=quiet)
    assert result["quick"] is True
    assert not (tmp_path / "results").exists()


def test_page_shows_claim_arms_published_figure_and_command(tmp_path):
    prove(folder_with(tmp_path), say=quiet)
    page = results_page(tmp_path)
    for piece in ("## c: holds", "A beats B.", "| a | 3.0000 (", "published: a", "x 0.5", "`shortlist prove c`"):
        assert piece in page


@pytest.mark.parametrize("missing", ["CLAIM", "run", "judge"])
def test_a_claim_file_that_lacks_a_part_is_named(tmp_path, missing):
    text = FILE.replace(f"{missing} =", "OTHER =").replace(f"def {missing}(", "def other(")
    (tmp_path / "stop.txt").write_text("")
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(ConfigError, match=f"c.py has no {missing}"):
        prove(tmp_path / "c.py", say=quiet)


def test_a_claim_carries_the_name_of_its_file(tmp_path):
    folder_with(tmp_path).rename(tmp_path / "d.py")
    with pytest.raises(ConfigError, match="same name"):
        prove(tmp_path / "d.py", say=quiet)


def test_public_data_that_is_not_there_is_said(monkeypatch):
    monkeypatch.delenv("SHORTLIST_DATA", raising=False)
    with pytest.raises(DataError, match="SHORTLIST_DATA"):
        _ = Lab(CLAIM, kept=None, quick=True, say=quiet).data_root


def test_a_damaged_result_is_named(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "c.json").write_text("{")
    with pytest.raises(DataError, match=r"c\.json is not a result"):
        evidence.results(tmp_path)


def test_measurements_wait_for_each_other(tmp_path):
    """A second process that wants to measure waits until the first is done."""
    program = textwrap.dedent(
        """
        import sys
        from shortlist.evaluation.evidence import machine_lock
        with machine_lock(lambda line: print("waiting", flush=True)):
            print("in", flush=True)
            sys.stdin.readline()
            print("out", flush=True)
        """
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    first = subprocess.Popen([sys.executable, "-c", program], **pipes)
    while (line := first.stdout.readline()) == "waiting\n":  # for another measurement on this machine
        pass
    assert line == "in\n"
    second = subprocess.Popen([sys.executable, "-c", program], **pipes)
    assert second.stdout.readline() == "waiting\n"
    assert first.communicate("\n", timeout=60)[0] == "out\n"
    assert second.communicate("\n", timeout=60)[0].split()[-2:] == ["in", "out"]


def test_hold_if_says_fails():
    arms = {"a": Arm(name="a", metrics={"x": Interval(0, 0, 0)}, seeds=(0,))}
    assert hold_if(arms["a"].metrics["x"].mean > 1, "too low").verdict == "fails"
