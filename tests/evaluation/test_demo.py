"""The demo on an eighth of the customers and articles of its log: what it says, what it writes, and that it does not train twice."""

import json
from dataclasses import replace

import polars as pl
import pytest

from shortlist.data.datasets import load
from shortlist.evaluation import demo

QUICK = ("trainer.epochs=1", "learning.slices=1", "learning.fit_requests=150")


@pytest.fixture
def small_log(monkeypatch):
    """The demo sees an eighth of the customers and of the articles."""
    log = load("builtin")
    kept = [pl.col(name).cast(pl.String).hash(seed=0) % 8 == 0 for name in ("user_id", "item_id")]
    some = log.events.filter(*kept)
    monkeypatch.setattr(demo, "load", lambda name: replace(log, events=some))


@pytest.mark.slow
def test_the_demo_trains_judges_and_tells_the_same_everywhere(small_log, tmp_path):
    said = []
    out = tmp_path / "demo"
    result = demo.run_demo(
        out, settings=QUICK, say=lambda line="": said.append(line), progress=False, command="shortlist demo"
    )
    assert json.loads((tmp_path / "demo-report" / "report.json").read_text()) == result
    assert [judged["window"] for judged in result["judged"]] == ["valid", "test"]
    test = result["judged"][1]
    assert [("filtered" in c["reports"][0]["protocol"]) for c in test["comparisons"]] == [False, True]
    text, page = "\n".join(said), (tmp_path / "demo-report" / "report.html").read_text()
    for sentence in test["verdicts"]:
        assert sentence in text
    for comparison in test["comparisons"]:
        for report in comparison["reports"]:
            interval = report["metrics"]["ndcg@10"]
            assert f"{interval['mean']:.4f} [{interval['low']:.4f}, {interval['high']:.4f}]" in text
            assert f"[{interval['low']:.4f}, {interval['high']:.4f}]" in page
    example = test["examples"][0]
    assert f"Customer {example['user']}, {example['num_past']} past lines" in text
    assert f"User {example['user']}" in page
    assert set(result["curves"]) == {"light", "dnn"}

    said.clear()
    again = demo.run_demo(out, say=lambda line="": said.append(line), progress=False)
    assert any(line.startswith(f"A trained run is in {out}") for line in said)
    assert again["version"] == result["version"]
    assert again["judged"][1]["cascade"]["metrics"] == test["cascade"]["metrics"]
