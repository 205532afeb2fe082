"""Public leaderboards from recorded results: who stands where, what is said with it, and what is said when nothing is recorded."""

import json
import math
from pathlib import Path

import pytest

from cli_support import refused, succeeds
from shortlist.errors import ConfigError, DataError
from shortlist.evaluation.evidence import Arm, Claim, Judgement, load_claim, record, write_json
from shortlist.evaluation.leaderboards import BOARDS, leaderboard, leaderboard_markdown, leaderboard_text
from shortlist.metrics import Interval
from shortlist.metrics.intervals import seed_interval

EVIDENCE = Path(__file__).parents[2] / "evidence"
TREES = "LambdaMART, ids as categories"
RULE = "used before, then popularity"
DNN = (0.9820, 0.9830, 0.9834)


def arm(name, auc, *, seeds=(0,), **cost):
    """One value, or one per seed."""
    interval = seed_interval(auc) if len(seeds) > 1 else Interval(auc[0], auc[0], auc[0])
    hard = Interval(0.6, 0.6, 0.6)
    return Arm(
        name=name,
        metrics={"auc": interval, "hard_auc": hard},
        seeds=seeds,
        per_seed={"auc": tuple(auc), "hard_auc": (0.6,) * len(seeds)},
        cost={"seconds": 1.0, **cost},
    )


@pytest.fixture
def folder(tmp_path):
    """A folder of claims with a small result in it, written as `prove` writes one."""
    claim = Claim(
        name="frappe_leaderboard",
        systems=("dnn",),
        claim="We reach them.",
        data="a few rows",
        protocol="tested once",
        bar="above .98",
        published={"DNN": 0.9833, "FM": 0.9671, "FinalMLP (best)": 0.9861},
    )
    arms = [
        arm(RULE, (0.97,)),
        arm(TREES, (0.975,)),
        arm("DNN", DNN, seeds=(0, 1, 2), parameters=1_234_567.0),
        arm("CAN", (0.99,), parameters=99.0),
    ]
    result = record(claim, {a.name: a for a in arms}, Judgement("partly", "CAN leads."), quick=False, seconds=3.0)
    write_json(tmp_path / "results" / "frappe_leaderboard.json", result)
    return tmp_path


def test_published_and_ours_share_a_line_and_the_best_comes_first(folder):
    table = leaderboard("frappe", folder)
    assert [(row.name, row.kind) for row in table.rows] == [
        ("CAN", "ranker"),
        ("FinalMLP (best)", "published"),
        ("DNN", "ranker"),
        (TREES, "trees"),
        (RULE, "rule"),
        ("FM", "published"),
    ]
    dnn = table.rows[2]
    assert dnn.published == 0.9833
    assert dnn.ours.mean == pytest.approx(math.fsum(DNN) / 3)
    assert dnn.ours.low < min(DNN) < max(DNN) < dnn.ours.high  # Student's t with two degrees of freedom
    assert (dnn.num_seeds, dnn.num_parameters) == (3, 1_234_567)
    only_published = table.rows[1]
    assert (only_published.ours, only_published.num_seeds, only_published.also) == (None, 0, {})
    assert table.rows[3].num_parameters is None


def test_text_and_markdown_say_the_same(folder):
    table = leaderboard("frappe", folder)
    text, markdown = leaderboard_text(table), leaderboard_markdown(table)
    for words in (text, markdown):
        for told in (
            "0.9833",
            "-0.0005",
            "1,234,567",
            "Embeddings of 10",
            "a few rows",
            "tested once",
            "Partly: CAN leads.",
        ):
            assert told in words
        assert "`shortlist prove frappe_leaderboard`" in words
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert len(rows) == 2 + len(table.rows)


def test_the_command_prints_and_writes_it(folder, tmp_path):
    out = tmp_path / "board.json"
    asked = ("compare", "--leaderboard", "frappe", "--evidence", folder)
    assert succeeds(*asked).out.rstrip("\n") == leaderboard_text(leaderboard("frappe", folder))
    assert succeeds(*asked, "--markdown").out.rstrip("\n") == leaderboard_markdown(leaderboard("frappe", folder))
    printed = succeeds(*asked, "--json", "--out", out).json
    assert json.loads(out.read_text()) == printed
    assert [row["name"] for row in printed["rows"]][:2] == ["CAN", "FinalMLP (best)"]
    assert printed["rows"][2]["ours"]["mean"] == pytest.approx(math.fsum(DNN) / 3)


def test_without_a_result_one_sentence_names_the_command(tmp_path):
    with pytest.raises(ConfigError, match="`shortlist prove frappe_leaderboard`"):
        leaderboard("frappe", tmp_path)
    assert "`shortlist prove frappe_leaderboard`" in refused(
        "compare", "--leaderboard", "frappe", "--evidence", tmp_path
    )


def test_what_can_not_be_shown_is_refused(folder):
    with pytest.raises(ConfigError, match="frappe"):
        leaderboard("frape", folder)
    assert "runs/shop" in refused("compare", "runs/shop", "--leaderboard", "frappe", "--evidence", folder)
    assert "at least one folder" in refused("compare")
    file = folder / "results" / "frappe_leaderboard.json"
    for broken in (file.read_text()[:-20], '{"arms": []}'):
        file.write_text(broken)
        with pytest.raises(DataError, match=r"frappe_leaderboard\.json is not a result"):
            leaderboard("frappe", folder)


def test_the_board_reads_its_claim_as_the_claim_is_written():
    """Names of arms, and the embedding size that is told, are those of the claim's own file."""
    board = BOARDS["frappe"]
    claim, module = load_claim(EVIDENCE / f"{board.claim}.py")
    assert module.FIELDS.dim == module.DNN["dim"] == board.embedding_size
    world = module.world_of(module.frappe(None))
    assert tuple(name for name, _ in module.measured_trivial(world)) == board.rules
    assert f'"{board.trees[0]}"' in (EVIDENCE / f"{board.claim}.py").read_text()
    assert {"LR", "FM", "DNN", "DeepFM", "DCN V2"} <= set(claim.published) & set(module.ARMS)
