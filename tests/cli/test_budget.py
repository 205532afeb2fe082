"""`shortlist budget` on a run of the planted shop, from its settings to the page beside it."""

import json
import re

import pytest

from cli_support import refused, shortlist, succeeds, write_shop

OFFERING = """
[surface]
k = 4
[data]
valid_share = 0.2
[stages.retrieval]
systems = ["counts", "popularity"]
keep = 12
offers = [{systems = ["popularity"], keep = 6}]
[stages.ranking]
systems = ["counts"]
keep = 6
[allocation]
system = "dcaf"
budget_ms = 50.0
max_requests = 40
"""
FEW = ("--quiet", "--arm", "fixed", "--arm", "mixture", "--max-requests", "30")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = write_shop(tmp_path_factory.mktemp("budget"))
    (folder / "offering.toml").write_text(OFFERING)
    out = folder / "run"
    tables = ("--items", folder / "items.csv", "--users", folder / "users.csv")
    given = ("--config", folder / "offering.toml", "--out", out, "--quiet", "--no-report")
    succeeds("train", folder / "events.csv", *tables, *given)
    return out


def test_a_page_a_table_and_a_sentence(run):
    ended = succeeds("budget", run, *FEW, "--window", "test")
    lines = ended.out.splitlines()
    assert lines[0].split()[:4] == ["arm", "budget", "ms", "MFLOP"]
    assert [line.split()[0] for line in lines[1:] if line.startswith(("fixed", "mixture"))] == ["fixed"] * 5 + [
        "mixture"
    ] * 5
    page = run.with_name("run-report") / "budget.html"
    assert lines[-1] == f"The page is {page}."
    assert lines[-2].startswith("The default chain (a0-b0) costs ")
    written = json.loads((page.parent / "budget.json").read_text())
    assert lines[-2] == written["sentence"]
    assert written["window"] == "test"
    assert written["frontier"]["num_requests"] <= 30
    html = page.read_text()
    assert "30 test requests" in html
    assert re.search(r"mixture \d", html)
    # Nothing is served by it: the allocation beside a run is made by `calibrate`.
    assert not run.with_name("run.allocation").exists()


def test_json_is_what_is_written(run):
    ended = succeeds("budget", run, *FEW, "--json", "--budget-ms", 7.5)
    written = json.loads((run.with_name("run-report") / "budget.json").read_text())
    assert ended.json == written
    assert written["window"] == "valid"
    assert written["calibration"]["budget"] == {"mflop": None, "ms": 7.5}
    assert {point["arm"] for point in written["frontier"]["points"]} == {"fixed", "mixture"}
    assert written["frontier"]["resource"] == "ms"


def test_budgets_in_flops(run):
    found = succeeds("budget", run, *FEW, "--json", "--resource", "mflop").json
    assert all(point["budget"]["ms"] is None for point in found["frontier"]["points"])
    assert "MFLOP a request" in found["sentence"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--window", "train"), "--window must be valid or test, got 'train'"),
        (("--resource", "watts"), "resource must be one of mflop, ms, got 'watts'"),
        (("--arm", "dcaff"), "no system named 'dcaff'"),
        (("--arm", "mmr"), "mmr is a reranker and can not be an arm"),
        (("--budget-ms", "-1"), "a budget in ms must be above 0"),
        (("--budget-ms", "5", "--resource", "mflop"), "--budget-ms marks a figure in ms"),
        (("--max-requests", "1"), "max_requests must be at least 2"),
    ],
)
def test_wrong_flags_are_one_sentence(run, arguments, said):
    assert said in refused("budget", run, "--quiet", *arguments)


def test_runs_that_have_no_choice(shop, tmp_path):
    assert "one chain, so there is nothing to choose" in refused("budget", shop, "--quiet")
    assert "is not a snapshot" in refused("budget", tmp_path, "--quiet")


def test_help_names_what_it_writes():
    ended = shortlist("budget", "--help")
    assert ended.code == 0
    assert "RUN-report/budget.html" in " ".join(ended.out.split())
