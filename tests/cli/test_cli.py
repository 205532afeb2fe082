"""Every command by its outside: exit codes, --json, --help with an example, and that help is quick."""

import json
import re
import subprocess
import sys
import time

import pytest

from cli_support import refused, shortlist, succeeds
from shortlist._version import __version__
from shortlist.cli import COMMANDS

TABLES = ("items", "users")


@pytest.fixture
def tables(shop):
    folder = shop.parents[1]
    return [folder / "events.csv", *(part for name in TABLES for part in (f"--{name}", folder / f"{name}.csv"))]


def test_help_lists_every_command():
    said = succeeds("--help").out
    for name, line in COMMANDS.items():
        assert re.search(rf"^ +{name} +{re.escape(line[:30])}", said, re.MULTILINE), name


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_shows_an_example(name):
    said = succeeds(name, "--help").out
    assert f"Example: shortlist {name}" in said
    assert "--json" in said or name in ("serve", "console")


def test_help_and_version_import_nothing_heavy():
    """Help in under half a second on an idle machine; on a busy one what takes time must at least not be there."""
    code = (
        "import sys, time; began = time.perf_counter()\n"
        "from shortlist.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'polars', 'numpy', 'pydantic', 'fastapi', 'sqlalchemy', 'matplotlib'} & set(sys.modules)\n"
        "print(sorted(heavy), time.process_time(), file=sys.stderr)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy, _, cpu_seconds = ended.stderr.strip().rpartition(" ")
    assert heavy == "[]"
    assert float(cpu_seconds) < 0.5


def test_the_installed_command(tmp_path):
    """`python -m shortlist.cli` is `shortlist`: version, and exit code and stream of an error."""
    call = [sys.executable, "-m", "shortlist.cli"]
    began = time.perf_counter()
    version = subprocess.run([*call, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout == f"{__version__}\n"
    assert time.perf_counter() - began < 10
    refused = subprocess.run([*call, "check", str(tmp_path / "none.csv")], capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert refused.stderr == f"shortlist: {tmp_path}/none.csv: no such file; check the path.\n"


def test_check_in_words_and_as_json(tables):
    words = succeeds("check", *tables).out
    assert "user = user_id (guessed; `--user COLUMN` corrects it)" in words
    assert re.search(r"\d+ events of 60 users on 20 items", words)
    assert "2 of 22 listed items have no events" in words
    health = succeeds("check", *tables, "--json").json
    assert health["num_users"] == 60
    assert health["items_without_events"] == 2
    assert health["surfaces"] == ["recommend"]


def test_check_obeys_roles(tables):
    swapped = succeeds("check", tables[0], "--user", "item_id", "--item", "user_id", "--json").json
    assert (swapped["num_users"], swapped["num_items"]) == (20, 60)
    assert any(line.startswith("user = item_id (given") for line in swapped["roles"])


def test_train_json_is_one_value_and_progress_goes_to_stderr(tables, tmp_path):
    folder = tables[0].parent
    ended = succeeds(
        "train",
        *tables,
        "--config",
        folder / "counted.toml",
        "--out",
        tmp_path / "run",
        "--set",
        "surface.k=3",
        "--json",
    )
    assert ended.json["run"] == str(tmp_path / "run")
    assert set(ended.json["validation"]) >= {"ndcg@3", "recall@3", "hr@3", "lost_at", "cost", "requests"}
    assert "events" in ended.err
    assert "validation ndcg@3" in ended.err
    quiet = succeeds("train", *tables, "--config", folder / "counted.toml", "--out", tmp_path / "run", "--quiet")
    assert quiet.err == ""
    assert "Next: shortlist evaluate" in quiet.out


def test_print_config_is_toml_that_gives_the_same_run(tables, tmp_path):
    printed = succeeds(
        "train", *tables, "--out", tmp_path / "run", "--set", "ranking.keep=15", "--set", "data.seed=7", "--print-config", "--quiet"
    ).out  # fmt: skip
    assert not (tmp_path / "run").exists()
    (tmp_path / "run.toml").write_text(printed)
    again = succeeds(
        "train", *tables, "--out", tmp_path / "run", "--config", tmp_path / "run.toml", "--print-config", "--quiet"
    ).out
    assert again == printed
    assert "seed = 7" in printed
    assert "keep = 15" in printed


def test_evaluate(shop, tmp_path):
    out = tmp_path / "deep" / "report.json"
    words = succeeds("evaluate", shop, "--out", out).out
    for part in ("ndcg@4", "not let through by retrieval", "MFLOP/request", "1-10 events", "time split, test window"):
        assert part in words
    report = succeeds("evaluate", shop, "--json").json
    written = json.loads(out.read_text())
    for changing in ("seconds", "cost"):
        del report[changing], written[changing]
    assert written == report
    low, mean, high = (report["metrics"]["ndcg@4"][key] for key in ("low", "mean", "high"))
    assert 0 <= low <= mean <= high <= 1


def test_evaluate_obeys_its_options(shop):
    base = succeeds("evaluate", shop, "--json").json
    valid = succeeds("evaluate", shop, "--window", "valid", "--k", 2, "--json").json
    assert "valid window" in valid["protocol"]
    assert valid["metrics"]["hr@2"]["mean"] > 0
    fewer = succeeds("evaluate", shop, "--max-requests", 7, "--json").json
    assert fewer["num_requests"] == 7 < base["num_requests"]
    # In the planted shop everybody soon knows all five items of their cluster.
    assert "every target stands in its user's history already" in refused("evaluate", shop, "--no-repeats")


def test_train_ends_in_a_report_unless_told_otherwise(tables, tmp_path):
    out = tmp_path / "run"
    command = ("train", *tables, "--config", tables[0].parent / "counted.toml", "--out", out, "--quiet")
    assert "The report is in" not in succeeds(*command, "--no-report").out
    assert not (tmp_path / "run-report").exists()
    said = succeeds(*command).out
    page = tmp_path / "run-report" / "report.html"
    assert f"The report is in {page}." in said
    text = page.read_text()
    assert f"<dd>shortlist train {tables[0]} --items" in text
    assert "60 users on 20 items" in text
    assert "Validation requests" in text
    assert "Test requests" not in text
    assert succeeds(*command, "--json").json["report"] == str(page)


def test_evaluate_writes_a_report_when_asked(shop):
    page = shop.with_name("shop-report") / "report.html"
    before = page.read_text()
    plain = succeeds("evaluate", shop).out
    assert page.read_text() == before
    said = succeeds("evaluate", shop, "--report").out
    assert f"The report is in {page}." in said
    assert said.splitlines()[1] == plain.splitlines()[1]  # the same numbers
    text = page.read_text()
    assert "Test requests" in text
    assert "Validation requests" in text
    assert "60 users on 20 items" in text  # from the report of the training


def test_compare(shop, tmp_path):
    out = tmp_path / "table.json"
    arguments = ("compare", shop, "popularity", "ease", "--reference", "ease", "--out", out)
    words = succeeds(*arguments).out
    assert [line.split()[0] for line in words.splitlines()[1:4]] == [str(shop), "popularity", "ease"]
    assert "differs from ease beyond chance" in words
    table = succeeds(*arguments, "--json").json
    assert table["reference"] == "ease"
    assert set(table["tests"]) == {str(shop), "popularity"}
    assert len({(r["num_requests"], r["protocol"]) for r in table["reports"]}) == 1
    assert json.loads(out.read_text())["tests"] == table["tests"]


def test_systems():
    rows = succeeds("systems", "--json").json
    assert {"popularity", "two-tower", "sasrec", "din", "mmr"} <= {row["name"] for row in rows}
    assert {row["stage"] for row in succeeds("systems", "--stage", "ranking", "--json").json} == {"ranking"}
    assert "| popularity | retriever |" in succeeds("systems", "--markdown").out
    assert "dim = 64" in succeeds("systems", "two-tower").out


def test_prove_lists_and_runs_claims(tmp_path):
    claims = tmp_path / "evidence"
    claims.mkdir()
    (claims / "one_is_one.py").write_text(
        "from shortlist.evaluation.evidence import Claim, hold_if\n"
        "CLAIM = Claim(name='one_is_one', systems=('popularity',), claim='One is one.', data='none', protocol='none', bar='1')\n"
        "def run(lab):\n    [lab.measure('arm', seed, lambda: {'one': 1.0}) for seed in lab.seeds]\n"
        "def judge(arms):\n    return hold_if(arms['arm'].metrics['one'].mean == 1, 'it is one')\n"
    )
    assert "one_is_one" in succeeds("prove", "--evidence", claims).out
    ran = succeeds("prove", "one_is_one", "--evidence", claims, "--json").json
    assert ran["verdict"] == "holds"
    listed = succeeds("prove", "--evidence", claims, "--json").json
    assert listed[0]["name"] == "one_is_one"
    page = tmp_path / "evidence.md"
    succeeds("prove", "--evidence", claims, "--page", page)
    assert "One is one." in page.read_text()
    row = next(r for r in succeeds("systems", "--json", "--evidence", claims).json if r["name"] == "popularity")
    assert row["proof"] == ["one_is_one holds"]


def test_no_command_shows_help():
    ended = shortlist()
    assert "Commands:" in ended.out + ended.err
    assert ended.code in (0, 2)


def test_roles_may_stand_in_the_settings_and_flags_come_first(tmp_path, capsys):
    (tmp_path / "log.csv").write_text(
        "\n".join(["who;what;when;kind", *(f"u{i % 9};i{i % 7};{1_700_000_000 + i * 5000};x" for i in range(200))])
    )
    (tmp_path / "run.toml").write_text('[roles]\nuser = "who"\nitem = "kind"\ntimestamp = "when"\n')
    from shortlist.cli import main

    words = [
        "train",
        str(tmp_path / "log.csv"),
        "--config",
        str(tmp_path / "run.toml"),
        "--out",
        str(tmp_path / "run"),
        "--print-config",
    ]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--item", "what"])
    said = capsys.readouterr()
    assert ended.value.code in (0, None)
    assert "item = what (given)" in said.err
    assert "user = who (given)" in said.err
    assert '[roles]\nuser = "who"' in said.out.replace("\n\n", "\n") or 'user = "who"' in said.out
