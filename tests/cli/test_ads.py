"""`shortlist ads`: a run is calibrated, told about, and then has ads."""

import json
from functools import partial

import pytest

from cli_support import outcome
from engine_support import FIRST_ITEM, trained_shop
from shortlist.cascade.ads import AdCandidate
from shortlist.cascade.engine import Engine


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained_shop(tmp_path_factory.mktemp("runs") / "shop")


output = partial(outcome, "ads")


def test_a_run_is_calibrated_and_then_has_ads(run):
    candidates = [AdCandidate(campaign=f"c{n}", item=FIRST_ITEM + n, bid=1.0) for n in range(20)]
    with Engine.load(run) as engine:
        with pytest.raises(Exception, match="run `shortlist ads` on it"):
            engine.ads("user-3", candidates=candidates)
        code, out, _ = output(run)
        assert code == 0
        assert "candidates (the log has no impressions)" in out
        assert out.splitlines()[-1] == f"The calibration is in {run.with_name('shop.clicks.json')}."
        answer = engine.ads("user-3", 3, candidates=candidates)
    following = engine.recommend("user-3", 1, candidates=[c.item for c in candidates]).items[0].item_id
    assert answer.ads[0].item_id == following  # equal bids: the best for this user wins
    assert answer.ads[0].probability > 3 * answer.ads[2].probability
    assert 0 < answer.ads[0].price < 1


def test_json_and_again(run):
    code, out, _ = output(run, "--method", "isotonic", "--max-requests", 30, "--json")
    assert code == 0
    told = json.loads(out)
    assert told["method"] == "isotonic"
    assert sum(b["num_judged"] for b in told["bins"]) < told["num_judged"]
    assert json.loads((run.with_name("shop.clicks.json")).read_text())["num_judged"] == told["num_judged"]


def test_what_can_not_be_done_is_said_in_a_sentence(run, tmp_path):
    for arguments, said in (
        ((run, "--method", "magic"), "choose platt or isotonic"),
        ((run, "--max-requests", 1), "max_requests must be at least 2"),
        ((tmp_path / "nothing",), "nothing"),
    ):
        code, _, err = output(*arguments)
        assert code == 2
        assert said in err
