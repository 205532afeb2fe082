"""`shortlist new`: writes, says what to do next, and refuses with a sentence."""

from cli_support import refused, shortlist, succeeds


def test_it_says_what_it_wrote_and_what_to_do(tmp_path):
    folder = tmp_path / "own"
    said = succeeds("new", "brand-new", "--kind", "reranker", "--dir", folder).out
    for path in ("brand_new.py", "test_brand_new.py", "evidence/brand_new_page.py", "docs/systems/brand-new.md"):
        assert f"wrote {folder / path}\n" in said
        assert (folder / path).exists()
    steps = said.split("Next:\n")[1]
    assert f"export SHORTLIST_SYSTEMS={folder}\n" in steps
    assert f"shortlist prove brand_new_page --quick --evidence {folder / 'evidence'}" in steps


def test_json(tmp_path):
    told = succeeds("new", "brand-new", "--kind", "ranker", "--dir", tmp_path, "--json").json
    assert told["name"] == "brand-new"
    assert len(told["written"]) == 4
    assert any(step.startswith("pytest ") for step in told["next"])


def test_refusals(tmp_path):
    assert "lower-case words" in refused("new", "Brand", "--kind", "ranker", "--dir", tmp_path)
    assert "'din' already" in refused("new", "din", "--kind", "ranker", "--dir", tmp_path)
    succeeds("new", "brand-new", "--kind", "ranker", "--dir", tmp_path)
    assert "is there already" in refused("new", "brand-new", "--kind", "ranker", "--dir", tmp_path)
    assert shortlist("new", "brand-new", "--kind", "magic", "--dir", tmp_path).code == 2
    assert "/dev/null/x can not be used" in refused("new", "x1", "--kind", "ranker", "--dir", "/dev/null/x")
