"""Pages that are made from the registry and the recorded results must be current, and what the README says must work."""

import re
from pathlib import Path

import pytest

from shortlist.cascade.config import RunConfig
from shortlist.evaluation.evidence import results_page
from shortlist.evaluation.systems_table import markdown_table, rows

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def own_systems() -> list[dict]:
    return [row for row in rows(evidence=ROOT / "evidence") if not row["name"].startswith("tiny-")]


def test_evidence_page_is_current():
    assert (ROOT / "docs" / "evidence.md").read_text() == results_page(ROOT / "evidence"), (
        "run `shortlist prove --page docs/evidence.md`"
    )


def test_systems_table_is_current():
    table = markdown_table(own_systems())
    assert table in README, "put the output of `shortlist systems --markdown` into README.md"


@pytest.mark.parametrize(
    "page", [*sorted(ROOT.glob("docs/*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_toml_in_the_readme_is_a_valid_run():
    blocks = re.findall(r"```toml\n(.*?)```", README, re.S)
    assert blocks
    for block in blocks:
        assert RunConfig.from_toml(block).stages


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*.toml")), ids=lambda p: p.stem)
def test_examples_are_valid_runs(path):
    assert RunConfig.from_toml(path).stages


def test_commands_in_the_readme_exist():
    from shortlist.cli import COMMANDS

    for command in re.findall(r"^\s*shortlist (\w[\w-]*)", README, re.M):
        assert command in COMMANDS, command
