"""Generated pages: current, whole, and right about what can be checked independently."""

import json
import re
from pathlib import Path

import pytest

from cli_support import succeeds
from shortlist.cascade.config import RunConfig
from shortlist.cli import _reference as reference
from shortlist.evaluation import docstrings, pages
from shortlist.models.base import RequestShape, System

DOCS = Path(__file__).parents[2] / "docs"
SYSTEMS = pages.own_systems()


@pytest.fixture(scope="module")
def made():
    return pages.pages() | reference.pages()


def test_committed_pages_are_current(made):
    stale = [name for name, text in made.items() if not (DOCS / name).exists() or (DOCS / name).read_text() != text]
    assert not stale, f"run `make docs` (or `shortlist systems --pages docs`): {', '.join(stale)}"
    there = {
        f"{path.parent.name}/{path.name}" for room in ("systems", "reference") for path in (DOCS / room).glob("*.md")
    }
    assert there == set(made)


@pytest.mark.parametrize("entry", SYSTEMS, ids=lambda e: e.name)
def test_a_systems_page_says_all(entry, made):
    page = made[f"systems/{entry.name}.md"]
    for field in entry.cls.Config.__dataclass_fields__:
        row = re.search(rf"^\| `{field}` \| `.+` \| (.+) \|$", page, re.MULTILINE)
        assert row is not None, f"{entry.name}.{field} has no sentence"
    assert entry.paper in page
    assert pages.NUMBERS in page
    for claimed in re.findall(r"\b0\.\d{3,}\b", page.split("## Settings")[0]):
        pytest.fail(f"{entry.name}: {claimed} looks like a measured figure; those belong to the evidence")
    if entry.stage in pages._STAGES:
        run = RunConfig.from_toml(re.search(r"```toml\n(.*?)```", page, re.DOTALL)[1])
        assert entry.name in run.systems
        assert run.default_chain


def test_costs_are_those_of_the_system(made):
    """Popularity reads one number per item and computes nothing else."""
    entry = next(e for e in SYSTEMS if e.name == "popularity")
    cost = entry.cls(entry.config(), pages._view().space).cost(RequestShape(num_items=1_000))
    assert (cost.user_flops, cost.item_flops, cost.bytes) == (0.0, 1.0, 4000.0)
    assert "| 0 FLOP | 1 FLOP | 1 kFLOP | 4 kB |" in made["systems/popularity.md"]
    assert all("## Cost to serve" in made[f"systems/{e.name}.md"] for e in SYSTEMS if issubclass(e.cls, System))


def test_docstrings_become_markdown():
    text = "Says.\n\n    a = b\n\n    c\n\nThen:\n1. one\n   more\n2. two\n\nArgs:\n    x: a number\n        of two lines.\n    y: none."
    assert docstrings.to_markdown(text).split("\n\n") == [
        "Says.",
        "```text\na = b",
        "c\n```",
        "Then:",
        "1. one\n    more\n2. two",
        "*Args*",
        "- `x`: a number\n    of two lines.\n- `y`: none.",
    ]


def test_differences_and_letters_are_taken_out():
    idea, differences, letters = docstrings.parts(
        "Idea. Differences: one;\ntwo.\n\nB requests, D width\nof a vector.\n"
    )
    assert (idea, differences, letters) == ("Idea.", "one;\ntwo.", "B requests, D width of a vector.")
    assert docstrings.parts("A system, and no more.") == ("A system, and no more.", "", "")


def test_signatures_read_as_written():
    def f(a: "int", *, window: "str | None" = "test") -> "list[int]":
        """Do."""

    assert reference.signature("f", f) == "```python\nf(a: int, *, window: str | None = 'test') -> list[int]\n```"


def test_reference_names_every_public_name(made):
    import shortlist

    assert all(f"## [{name}]" in made["reference/settings.md"] for name in ("data", "surface", "learning", "trainer"))
    missing = [
        n
        for n in shortlist.__all__
        if not n.startswith("_") and n not in made["reference/python.md"] + made["reference/settings.md"]
    ]
    assert not missing


def test_pages_of_systems_that_are_gone_are_removed(tmp_path):
    (tmp_path / "systems").mkdir()
    (tmp_path / "systems" / "gone.md").write_text(f"{pages.MADE}\n\n# gone\n")
    (tmp_path / "systems" / "mine.md").write_text("# written by hand\n")
    said = succeeds("systems", "--pages", tmp_path).out
    assert "wrote" in said
    assert not (tmp_path / "systems" / "gone.md").exists()
    assert (tmp_path / "systems" / "mine.md").exists()
    assert (tmp_path / "reference" / "kinds.md").exists()


def test_numbers_come_from_the_records(tmp_path):
    (tmp_path / "results").mkdir()
    record = {
        "name": "it_works", "systems": ["ease"], "claim": "It works.", "verdict": "holds", "reason": "0.5 > 0.4", "bar": "0.4",
        "arms": [{"name": "ease", "metrics": {"ndcg@10": {"mean": 0.5, "low": 0.4, "high": 0.6, "seeds": 3}}, "cost": {"seconds": 2}}],
        "published": {}, "data": "toy", "protocol": "time", "seconds": 60,
        "hardware": {"cores": 2, "cpu": "c", "device": "cpu"}, "date": "2026-01-01", "commit": "0" * 40,
    }  # fmt: skip
    (tmp_path / "results" / "it_works.json").write_text(json.dumps(record))
    shown = pages.numbers("ease", tmp_path)
    assert shown.startswith("### it_works: holds")
    assert "0.5000 (0.4000 to 0.6000)" in shown
    assert "`shortlist prove it_works`" in shown
    assert "No claim" in pages.numbers("din", tmp_path)
