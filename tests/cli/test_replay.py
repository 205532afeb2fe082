"""`shortlist replay` on the log of a served run: nothing changed, something changed, and what it refuses."""

import json
import time
from datetime import UTC, datetime, timedelta

import pytest

from cli_support import refused, shortlist, succeeds
from shortlist.cascade.engine import Engine
from shortlist.store.events import Event


@pytest.fixture(scope="module")
def served(shop):
    """The run, with the files that a server leaves beside it."""
    now = time.time()
    with Engine.load(
        shop, events=shop.with_name("shop.events.db"), request_log=shop.with_name("shop.requests.db")
    ) as engine:
        engine.record([Event(user="u7", item="i3", timestamp=now - 3_600)])
        for user in ("u7", "u8", "u9", "nobody known"):
            page = engine.recommend(user)
        engine.record([Event(user="u8", item=str(page.items[0].item_id), timestamp=now + 3_600)])
    yield shop
    for path in shop.parent.glob("shop.*.db*"):
        path.unlink()


@pytest.fixture(autouse=True, scope="module")
def quiet_shop(shop):
    """Nothing is left beside the run for other tests."""
    yield
    for path in shop.with_name("shop-report").glob("replay.*"):
        path.unlink()


def test_nothing_changed_comes_back_as_it_was(served):
    ended = succeeds("replay", served, "--quiet")
    assert "4 requests with nothing changed: 100.0% of the pages are as they were" in ended.out
    page = served.with_name("shop-report") / "replay.html"
    assert f"The page is {page}." in ended.out
    assert page.read_text().startswith("<!DOCTYPE html>")
    written = json.loads((page.parent / "replay.json").read_text())
    assert [request["same_scores"] for request in written["requests"]] == [True] * 4
    assert [request["why"] for request in written["requests"]] == [[]] * 4


def test_items_denied_on_the_command_line_and_in_a_file(served, tmp_path):
    plain = succeeds("replay", served, "--quiet", "--json").json
    first, second = plain["requests"][0]["page_then"][:2]
    (tmp_path / "rules.toml").write_text(f'[rules]\ndeny = ["{first}"]\n')
    found = succeeds("replay", served, "--quiet", "--json", "--rules", tmp_path / "rules.toml", "--deny", second).json
    assert found["change"]["words"] == "other rules"
    assert set(found["change"]["rules"]["deny"]) == {first, second}
    for request in found["requests"]:
        assert not {first, second} & set(request["page_now"])
    assert {first, second} <= set(found["requests"][0]["out"])
    assert found["summary"]["same_pages"] < 1


def test_only_some_items_are_allowed(served):
    found = succeeds("replay", served, "--quiet", "--json", "--allow", "i1", "--allow", "i2").json
    assert all(set(request["page_now"]) <= {"i1", "i2"} for request in found["requests"])


def test_windows(served):
    today = datetime.now(UTC)
    assert succeeds("replay", served, "--quiet", "--json", "--day", f"{today:%Y-%m-%d}").json["num_requests"] == 4
    hour = today - timedelta(hours=1)
    one = succeeds("replay", served, "--quiet", "--json", "--from", f"{hour:%Y-%m-%dT%H:%M}").json
    two = succeeds(
        "replay", served, "--quiet", "--json", "--from", hour.timestamp(), "--to", today.timestamp() + 60
    ).json
    assert one["num_requests"] == two["num_requests"] == 4
    assert two["window"]["since_ms"] == round(hour.timestamp() * 1000)
    limited = succeeds("replay", served, "--quiet", "--json", "--limit", 2).json
    assert [r["request_id"] for r in limited["requests"]] == [r["request_id"] for r in one["requests"][-2:]]


def test_another_run_answers_and_the_report_stands_beside_the_first(served, tmp_path):
    from cli_support import train_shop

    other = train_shop(tmp_path, "counted")
    found = succeeds("replay", served, "--quiet", "--json", "--run", other).json
    assert (found["run"], found["change"]["words"]) == ("shop", "run shop")
    assert found["summary"]["why"].get("snapshot") is None
    assert not other.with_name("shop-report").joinpath("replay.json").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--log", "none.db"), "none.db: no such file; give the request log that the server wrote with --log"),
        (("--events", "none.db"), "none.db: no such file; give the event store"),
        (("--day", "yesterday"), "--day must be a day such as 2024-05-31, got 'yesterday'"),
        (("--from", "noon"), "--from must be a moment such as"),
        (("--to", "1e300"), "--to must be a moment such as"),
        (("--from", "20", "--to", "10"), "--to must be after --from"),
        (("--day", "2024-05-31", "--from", "10"), "give either --day, or --from and --to"),
        (("--day", "1999-05-31"), "holds no request from 1999-05-31 00:00:00 to 1999-06-01 00:00:00; it has 4 from"),
        (("--chain", "z9"), "no chain 'z9'"),
        (("--chain", "a0", "--budget-ms", "1"), "give either --chain or a budget"),
        (("--budget-ms", "1"), "is not calibrated"),
        (("--budget-ms", "-1"), "a budget in ms must be above 0"),
        (("--rules", "none.toml"), "none.toml can not be used"),
        (("--limit", "0"), "limit must be at least 1"),
        (("--hours", "-1"), "hours above 0"),
        (("--run", "nowhere"), "nowhere is not a snapshot"),
    ],
)
def test_what_can_not_be_done_is_one_sentence(served, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in refused("replay", served, "--quiet", *arguments)


def test_rules_that_are_none(served, tmp_path):
    path = tmp_path / "rules.toml"
    path.write_text("deny = 3")
    assert "rules.deny is 3" in refused("replay", served, "--quiet", "--rules", path)
    path.write_text("denied = ['i1']")
    assert "did you mean 'deny'" in refused("replay", served, "--quiet", "--rules", path)
    path.write_text("deny = [")
    assert "is not TOML" in refused("replay", served, "--quiet", "--rules", path)
    path.write_text("[[filters]]\nfield = 'colour'\nequals = 'red'\n")
    assert "colour" in refused("replay", served, "--quiet", "--rules", path)


def test_a_folder_that_is_no_run(tmp_path):
    assert "is not a snapshot" in refused("replay", tmp_path, "--quiet")


def test_help_names_what_it_writes():
    ended = shortlist("replay", "--help")
    assert ended.code == 0
    assert "RUN-report/replay.html" in " ".join(ended.out.split())
