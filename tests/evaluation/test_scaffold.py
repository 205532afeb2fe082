"""Scaffolded systems are real ones: they pass the contract tests, their own test and the linter, and their claim runs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shortlist.errors import ConfigError
from shortlist.evaluation import pages
from shortlist.evaluation.scaffold import next_steps, plan, write
from shortlist.registry import ENVIRONMENT, systems

ROOT = Path(__file__).parents[2]
KINDS = ("retriever", "ranker", "reranker")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One new system of each kind in a folder of one's own."""
    folder = tmp_path_factory.mktemp("own") / "systems"
    for kind in KINDS:
        write(plan(f"fresh-{kind}", kind, folder=folder))
    return folder


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """What makes a folder a clone, and standing in it."""
    (tmp_path / "src/shortlist/models").mkdir(parents=True)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, ENVIRONMENT: str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)


def test_contract_tests_take_them_up(folder):
    contracts = [str(ROOT / "tests/contracts" / f"test_{kind}s.py") for kind in KINDS]
    options = ("-k", "fresh", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(ROOT))
    done = call(folder, "-m", "pytest", *contracts, *options, "-c", str(ROOT / "pyproject.toml"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        int(done.stdout.split(" passed")[0].split()[-1]) >= 21
    )  # 10 of every retriever, 8 of every ranker, 3 of every re-ranker


def test_their_own_tests_need_no_environment(folder):
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    environment = {name: value for name, value in os.environ.items() if name != ENVIRONMENT}
    done = subprocess.run(words, cwd=folder.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "9 passed" in done.stdout


def test_their_claims_run(folder):
    program = """
import json, sys
from pathlib import Path
from shortlist.evaluation.evidence import prove
print(json.dumps([prove(path, quick=True, say=lambda _: None) for path in sorted(Path("evidence").glob("*.py"))]))
"""
    done = call(folder, "-c", program)
    assert done.returncode == 0, done.stderr
    results = {result["name"]: result for result in json.loads(done.stdout)}
    assert set(results) == {f"fresh_{kind}_page" for kind in KINDS}
    for kind in KINDS:
        result = results[f"fresh_{kind}_page"]
        arm = result["arms"][0]
        assert result["systems"] == [arm["name"]] == [f"fresh-{kind}"]
        assert 0 < arm["metrics"]["ndcg@10"]["mean"] < 1
        gain = next(value for name, value in arm["metrics"].items() if " - " in name)
        assert result["verdict"] == ("holds" if gain["low"] > 0 else "fails")


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_a_clone_stand_with_their_kin_and_please_the_linter(clone, kind):
    scaffold = plan(f"fresh-{kind}", kind)
    paths = [str(path) for path in write(scaffold)]
    room = "retrieval" if kind == "retriever" else "ranking"
    assert paths == [
        f"src/shortlist/models/{room}/fresh_{kind}.py",
        f"tests/models/{room}/test_fresh_{kind}.py",
        f"evidence/fresh_{kind}_page.py",
        f"docs/systems/fresh-{kind}.md",
    ]
    page = Path(paths[3]).read_text()
    assert page.startswith(pages.MADE)
    assert f"Code: `src/shortlist/models/{room}/fresh_{kind}.py`" in page
    assert any("tests/contracts" in step for step in next_steps(scaffold))
    # The rest of the clone is missing here, so that the package must be named as the clone's own.
    own = ("--config", "lint.isort.known-first-party = ['shortlist']")
    for check in (("check", "--no-cache", *own), ("format", "--check", "--no-cache")):
        done = subprocess.run([sys.executable, "-m", "ruff", *check, "."], capture_output=True, text=True, cwd=clone)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_clone_lists_it_and_keeps_it_to_itself(clone):
    """The list of the docs gets its line; the registry of this process, which only wrote the files, knows nothing of it."""
    index = clone / "docs/systems/index.md"
    index.parent.mkdir(parents=True)
    index.write_text("old")
    before = [entry.name for entry in systems()]
    write(plan("fresh-one", "ranker"))
    assert "[fresh-one](fresh-one.md)" in index.read_text()
    assert "[din](din.md)" in index.read_text()
    assert [entry.name for entry in systems()] == before
    assert "shortlist.models.ranking.fresh_one" not in sys.modules


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_of_one_s_own_says_all_and_links_nowhere(folder, kind):
    page = folder / "docs" / "systems" / f"fresh-{kind}.md"
    text = page.read_text()
    assert f"Code: `fresh_{kind}.py`" in text
    for heading in ("## Idea", "## Use it", "## Settings", "## Cost to serve", "## Evidence"):
        assert heading in text
    assert "](../" not in text
    page.write_text("stale")
    done = call(folder, "-m", "shortlist.cli", "systems", f"fresh-{kind}", "--pages", "docs")
    assert done.returncode == 0, done.stderr
    assert page.read_text() == text


def test_a_room_may_be_chosen(clone):
    assert plan("x2", "retriever", room="ranking").texts.keys() >= {Path("src/shortlist/models/ranking/x2.py")}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("My-Model", "lower-case words"),
        ("my_model", "lower-case words"),
        ("9lives", "lower-case words"),
        ("a--b", "lower-case words"),
        ("../evil", "lower-case words"),
        ("", "lower-case words"),
        ("class", "could not be imported"),
        ("test-me", "could not be imported"),
        ("item-knn", "there is a system 'item-knn' already"),
        ("ranker", "the class Ranker means something else"),
        ("cost", "the class Cost means something else"),
    ],
)
def test_names_that_can_not_be(name, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        plan(name, "ranker", folder=tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "evidence").mkdir()
    precious = tmp_path / "evidence" / "mine_page.py"
    precious.write_text("precious")
    with pytest.raises(ConfigError, match=r"mine_page\.py is there already"):
        plan("mine", "ranker", folder=tmp_path)
    scaffold = plan("other", "ranker", folder=tmp_path)
    write(scaffold)
    with pytest.raises(FileExistsError):
        write(scaffold)
    assert precious.read_text() == "precious"


def test_where_there_is_no_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="is no clone of shortlist"):
        plan("mine", "ranker")
    with pytest.raises(ConfigError, match="leave it out with --dir"):
        plan("mine", "ranker", room="ranking", folder=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        plan("mine", "ranker", folder=tmp_path / "file")
