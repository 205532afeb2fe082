"""The site builds from the committed pages without a warning, and no page of it fetches anything from another host."""

import re
import shutil
from pathlib import Path

import pytest

from shortlist.evaluation.evidence import results_page

ROOT = Path(__file__).parents[2]
FETCHES = re.compile(
    r"""<(?:script|img|iframe|source|video|audio)\b[^>]*\bsrc="(?:https?:)?//|<link\b[^>]*\bhref="(?:https?:)?//|@import"""
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    shutil.copy(ROOT / "mkdocs.yml", folder)
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copytree(ROOT / "evidence", folder / "evidence", ignore=shutil.ignore_patterns(".partial", "__pycache__"))
    (folder / "docs" / "evidence.md").write_text(results_page(folder / "evidence"))
    build(load_config(str(folder / "mkdocs.yml"), strict=True))
    return folder / "site"


def test_every_page_is_built_and_fetches_nothing(site):
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    for page in pages:
        html = (site / page).read_text()
        assert not FETCHES.search(html), page
        assert 'data-md-component="source"' not in html, "the theme would ask the repository's host for its stars"
    assert not list(site.rglob("build_hooks*"))
    assert (site / "search" / "search_index.json").exists()


def test_systems_stand_in_the_menu_with_their_numbers(site):
    home = (site / "index.html").read_text()
    for page in (ROOT / "docs" / "systems").glob("*.md"):
        if page.stem != "index":
            assert f'href="systems/{page.stem}.html"' in home
            built = (site / "systems" / f"{page.stem}.html").read_text()
            assert "shortlist prove" in built
            assert "<!-- numbers -->" not in built


def test_what_would_be_fetched_is_noticed():
    assert FETCHES.search('<script src="https://example.org/a.js"></script>')
    assert FETCHES.search('<link rel="stylesheet" href="//fonts.example.org/css">')
    assert not FETCHES.search('<a href="https://example.org/">a link is followed by a click</a>')
