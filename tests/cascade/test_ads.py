"""Ads of an engine: who wins for what, by hand; pacing, rules and failures; bursts from many threads."""

import threading
import time
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from ads_support import ITEMS, ads_engine, by_hand, campaign
from engine_support import FIRST_ITEM, NUM_ITEMS, break_system, prepared_cascade, raising, shop_frames, shop_live
from shortlist.cascade.ads import AdCandidate, AdsConfig
from shortlist.cascade.auction import AuctionConfig
from shortlist.cascade.click_chance import judged_systems
from shortlist.cascade.engine import Engine
from shortlist.cascade.live import Live
from shortlist.cascade.pacing import EVEN, PacingConfig
from shortlist.cascade.rules import Rules
from shortlist.data.dataset import build_dataset
from shortlist.data.log import read
from shortlist.errors import ConfigError, DataError
from shortlist.store.ads import Campaign
from shortlist.store.events import StoreUnavailable

NEW = FIRST_ITEM + NUM_ITEMS
"""An item that nobody has seen."""
FLAT = 1 / (1 + np.exp(2.0))
"""Chance of a click where the calibration has no weight."""


@pytest.fixture
def engine(tmp_path):
    with ads_engine(tmp_path) as engine:
        yield engine


@pytest.fixture
def taste(tmp_path):
    """An engine whose chances follow the ranker's scores."""
    with ads_engine(tmp_path, weight=0.5) as engine:
        yield engine


def won(answer):
    return [(ad.campaign, ad.price) for ad in answer.ads]


def test_everybody_alike_is_a_second_price_auction(engine):
    engine.ads.kept.put(campaign("a", bid=0.5), campaign("b", bid=1.5), campaign("c", bid=0.9, reserve=0.6))
    answer = engine.ads("user-3", 3)
    assert won(answer) == [("b", 0.9), ("c", 0.6), ("a", 0.0)]  # c's reserve is above what a would pay
    first = answer.ads[0]
    assert first.probability == pytest.approx(FLAT)
    assert first.ecpm == pytest.approx(1_000 * 1.5 * FLAT)
    assert (first.bid, first.slot, first.propensity, answer.propensity) == (1.5, 1, 1.0, 1.0)
    assert first.item_id == FIRST_ITEM  # of equals the first
    assert first.title == "Item number 0"
    assert answer.degraded is None
    assert answer.num_candidates == 12
    assert [stage.stage for stage in answer.stages] == ["retrieval", "ranking", "re-ranking"]


def test_chances_weigh_the_bids(taste):
    """By hand from the raw scores that the ranker gives: eCPM orders, and the price is the next one's over one's own chance."""
    scores = {}
    traced = taste.traced("user-3", 40)
    trace = next(trace for trace in traced.page.traces if trace.name == "ranking")
    for row, score in zip(trace.rows.values.tolist(), trace.system_scores["counts"].tolist()):
        scores[taste.live.id(row)] = score
    liked, disliked = max(scores, key=scores.get), min(scores, key=scores.get)
    assert scores[liked] > scores[disliked] + 0.5
    chance = {item: 1 / (1 + np.exp(2 - 0.5 * scores[item])) for item in (liked, disliked)}
    bids = {liked: 1.0, disliked: chance[liked] / chance[disliked] * 0.9}
    candidates = [AdCandidate(campaign=str(item), item=item, bid=bids[item]) for item in (disliked, liked)]
    answer = taste.ads("user-3", 2, candidates=candidates)
    assert [ad.item_id for ad in answer.ads] == [liked, disliked]
    assert bids[disliked] > bids[liked]
    assert answer.ads[0].probability == pytest.approx(chance[liked], rel=1e-5)
    assert answer.ads[0].price == pytest.approx(0.9, abs=1e-5)
    assert answer.ads[1].price == 0.0
    assert won(taste.ads("user-3", 2, candidates=candidates[::-1])) == won(answer)


def test_places_that_are_seen_less_are_clicked_less_and_cost_the_same(tmp_path):
    config = AdsConfig(auction=AuctionConfig(reserve=0.2, position_factors=(1.0, 0.5)))
    with ads_engine(tmp_path, config=config) as engine:
        engine.ads.kept.put(campaign("a", bid=2.0), campaign("b", bid=1.0), campaign("c", bid=0.1))
        answer = engine.ads(None, 3)
        assert won(answer) == [("a", 1.0), ("b", 0.2)]
        assert [ad.probability for ad in answer.ads] == pytest.approx([FLAT, FLAT / 2])
        assert answer.removed == {"reserve": 1}
        assert engine.ads.kept.account("b").expected == pytest.approx(200_000 * FLAT / 2, abs=1)


def test_a_click_is_charged_once(engine):
    engine.ads.kept.put(campaign("a", bid=2.0), campaign("b", bid=1.0))
    answer = engine.ads("user-3", 1)
    assert engine.ads.kept.account("a").reserved == 1_000_000
    assert engine.ads.click(answer.request_id, 1).charged == 1.0
    assert engine.ads.click(answer.request_id, 1).repeated
    assert engine.ads.kept.account("a").spent == 1_000_000
    assert engine.ads.kept.account("b").spent == 0


def test_schedule_budget_and_plan_keep_campaigns_out_and_are_counted(engine):
    now = time.time()
    engine.ads.kept.put(
        campaign("over", start=now - 100, end=now - 1),
        campaign("to come", start=now + 100),
        campaign("spent", budget=0.0),
        campaign("ahead", budget=100.0, bid=30.0, start=now - 1, end=now + 1e6, pacing="none"),
        campaign("fine"),
    )
    answer = engine.ads("user-3", 2)
    assert [ad.campaign for ad in answer.ads] == ["ahead", "fine"]
    engine.ads.click(answer.request_id, 1)
    assert answer.removed == {"schedule": 2, "budget": 1}
    engine.ads.kept.put(replace(engine.ads.kept.account("ahead").campaign, pacing="bid", budget=2.0))
    again = engine.ads("user-3", 2)
    assert [ad.campaign for ad in again.ads] == ["fine"]
    assert again.removed == {"schedule": 2, "budget": 1, "pacing": 1}


def test_a_campaign_bids_no_more_than_it_has_left(engine):
    engine.ads.kept.put(campaign("rich", bid=0.5, budget=100.0), campaign("poor", bid=9.0, budget=0.7))
    answer = engine.ads("user-3", 1)
    assert won(answer) == [("poor", 0.5)]
    assert answer.ads[0].bid == 0.7
    assert won(engine.ads("user-3", 2)) == [("rich", 0.2), ("poor", 0.0)]


def test_throttled_campaigns_take_part_by_lot(tmp_path):
    """Half the slack ahead of its plan a campaign takes part in half of the auctions, and says so."""
    with ads_engine(tmp_path) as engine:
        now = time.time()
        half = campaign("half", budget=1_000.0, bid=10.0, start=now - 100_000, end=now + 100_000, pacing="throttle")
        other = campaign("other", bid=0.01, budget=1e6)
        engine.ads.kept.put(half, other)
        # 510 of 1,000 at the middle of its time: 0.01 ahead of the plan, of a slack of 0.02.
        engine.ads.kept._database.write(
            lambda c: c.exec_driver_sql("UPDATE ad_campaigns SET spent = 510000000 WHERE campaign = 'half'")
        )
        answers = [engine.ads("user-3", 1) for _ in range(60)]
        took_part = [answer.ads[0].campaign == "half" for answer in answers]
        assert 15 < sum(took_part) < 45
        for answer, took in zip(answers, took_part):
            assert answer.propensity == pytest.approx(0.5, abs=0.01)
            assert answer.removed == ({} if took else {"pacing": 1})
            assert answer.ads[0].propensity == pytest.approx(0.5 if took else 1.0, abs=0.01)


def evening_shop():
    """The shop with two of three events after 18:00 UTC, the others before 6:00; and how many events every hour has."""
    events, items = shop_frames()
    rng = np.random.default_rng(0)
    hours = np.where(rng.random(len(events)) < 2 / 3, 18, 0) + rng.integers(0, 6, len(events))
    days = events["timestamp"].dt.truncate("1d")
    moved = events.with_columns(timestamp=days + pl.duration(hours=pl.Series(hours), minutes=7))
    dataset = build_dataset(read(moved, items=items))
    return Live(dataset, prepared_cascade(dataset), "evenings"), np.bincount(hours, minlength=24)


@pytest.mark.parametrize(("plan", "spent", "wins"), [("traffic", 40, False), ("even", 40, True), ("traffic", 30, True)])
def test_plans_follow_the_hours_of_the_runs_log(tmp_path, monkeypatch, plan, spent, wins):
    """At 18:00 a third of the day's visitors have come, and three quarters of the day are over."""
    live, count_H = evening_shop()
    midnight = 20_000 * 86_400.0
    monkeypatch.setattr(time, "time", lambda: midnight + 18 * 3_600)
    with ads_engine(tmp_path, config=AdsConfig(pacing=PacingConfig(plan=plan)), live=live) as engine:
        told = live.traffic_H
        assert told == pytest.approx(count_H / count_H.sum(), abs=0.01)
        assert told[:18].sum() == pytest.approx(1 / 3, abs=0.05)
        assert told.min() > 0
        engine.ads.kept.put(campaign("day", budget=100.0, start=midnight, end=midnight + 86_400), campaign("other"))
        engine.ads.kept._database.write(
            lambda c: c.exec_driver_sql(f"UPDATE ad_campaigns SET spent = {spent * 1_000_000} WHERE campaign = 'day'")
        )
        answer = engine.ads("user-3", 2)
        assert ("day" in {ad.campaign for ad in answer.ads}) == wins
        assert answer.removed == ({} if wins else {"pacing": 1})


def test_a_log_of_dates_has_even_plans(engine):
    """All events of the shop are between 0:00 and 1:00."""
    assert engine.live.traffic_H is EVEN


def test_a_log_without_times_has_even_plans():
    events, items = shop_frames()
    dataset = build_dataset(read(events.drop("timestamp"), items=items))
    assert not dataset.space.has_clock
    assert Live(dataset, prepared_cascade(dataset), "order").traffic_H is EVEN


def test_ads_of_a_campaign_per_user_and_day(engine):
    engine.ads.kept.put(campaign("capped", bid=2.0, max_per_day=1), campaign("other"))
    assert won(engine.ads("user-3", 1)) == [("capped", 1.0)]
    answer = engine.ads("user-3", 1)
    assert won(answer) == [("other", 0.0)]  # the auction was held again without it
    assert answer.removed == {"frequency": 1}
    assert engine.ads("user-4", 1).ads[0].campaign == "capped"


def test_candidates_of_a_request(engine):
    engine.ads.kept.put(campaign("known", bid=1.0), campaign("not asked", bid=5.0))
    candidates = [
        AdCandidate(campaign="known", item=ITEMS[2]),
        AdCandidate(campaign="known", item=ITEMS[1], bid=1.2),
        AdCandidate(campaign="new", item=int(ITEMS[1]), bid=0.7),
        AdCandidate(campaign="new", item="no such item", bid=9.0),
    ]
    answer = engine.ads("somebody new", 2, candidates=candidates)
    assert won(answer) == [("known", 0.7), ("new", 0.0)]
    assert str(answer.ads[0].item_id) == ITEMS[1]
    assert answer.ignored == {"items": 1}
    assert engine.ads.click(answer.request_id, 2).charged == 0.0
    with pytest.raises(DataError, match="candidate 0: no campaign 'x' is registered"):
        engine.ads(None, candidates=[AdCandidate(campaign="x", item=1)])
    for bid in (-1.0, float("nan"), 1e12):
        with pytest.raises(DataError, match="candidate 0: bid must be money"):
            engine.ads(None, candidates=[AdCandidate(campaign="x", item=1, bid=bid)])


def test_a_deleted_campaign_is_not_brought_back_by_a_bid(engine):
    engine.ads.kept.put(
        campaign("gone"), campaign("poor", budget=0.5, reserve=0.6), campaign("strange", items=("no such item",))
    )
    engine.ads.kept.remove("gone")
    candidates = [AdCandidate(campaign=name, item=ITEMS[0], bid=5.0) for name in ("gone", "new")]
    answer = engine.ads("user-3", 2, candidates=candidates)
    assert [ad.campaign for ad in answer.ads] == ["new"]
    assert answer.removed == {"schedule": 1}
    everybody = engine.ads("user-3", 2)
    assert everybody.ads == ()
    assert everybody.removed == {"budget": 1}
    assert everybody.ignored == {"items": 1}


def test_the_engines_deadline_holds_for_ads(tmp_path):
    with ads_engine(tmp_path) as engine:
        engine.config = replace(engine.config, deadline_ms=1e-6)
        engine.ads.kept.put(campaign("a"), campaign("b", bid=0.5))
        answer = engine.ads("user-3", 1)
        assert won(answer) == [("a", 0.5)]
        assert answer.ads[0].probability == 0.1
        assert answer.degraded


def test_rules_hold_for_ads(engine):
    engine.ads.kept.put(campaign("a", bid=2.0), Campaign(campaign="b", budget=9, bid=1.0, items=(str(NEW),)))
    seen = engine.history("user-3")[0].item_id
    engine.ads.kept.put(Campaign(campaign="seen", budget=9, bid=9.0, items=(str(seen),)))
    assert engine.ads("user-3", 1).ads[0].campaign == "seen"  # what somebody knows may be advertised
    answer = engine.ads("user-3", 3, rules=Rules(deny=[*ITEMS], seen="drop"))
    assert [ad.campaign for ad in answer.ads] == ["b"]
    assert answer.removed["deny"] == 4
    assert answer.removed["seen"] >= 1


def test_of_many_candidates_those_with_the_highest_bids_are_scored(tmp_path):
    with ads_engine(tmp_path, config=AdsConfig(max_candidates=2)) as engine:
        answer = engine.ads(
            None, 3, candidates=[AdCandidate(campaign=f"c{n}", item=FIRST_ITEM + n, bid=1.0 + n) for n in range(5)]
        )
        assert [ad.campaign for ad in answer.ads] == ["c4", "c3"]
        assert answer.num_candidates == 2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda engine: engine.ads("u", 0), "slots must be from 1 to 20, got 0"),
        (lambda engine: engine.ads("u", 21), "slots must be from 1 to 20"),
        (lambda engine: AdsConfig(click_window_s=0), "click_window_s must be above 0"),
        (lambda engine: AdsConfig(max_slots=0), "max_slots must be at least 1"),
        (lambda engine: Engine(shop_live()).ads("u"), "are not calibrated: run `shortlist ads`"),
        (lambda engine: Engine(shop_live()).ads.click("r", 1), "keeps no campaigns"),
    ],
)
def test_what_can_not_be_done_is_said(engine, wrong, said):
    with pytest.raises(ConfigError, match=said):
        wrong(engine)


def test_an_engine_that_keeps_nothing_tells_prices():
    live = shop_live()
    engine = Engine(live)
    engine.ads.use(by_hand(live.version, judged_systems(live.cascade)[1]))
    with pytest.raises(ConfigError, match="name the candidates"):
        engine.ads("user-3")
    answer = engine.ads("user-3", candidates=[AdCandidate(campaign="x", item=110, bid=1.0)])
    assert won(answer) == [("x", 0.0)]


def test_a_broken_ranker_leaves_the_mean_rate(engine):
    engine.ads.kept.put(campaign("a", bid=2.0), campaign("b", bid=1.0))
    break_system(engine.live, "counts", raising)
    answer = engine.ads("user-3", 2)
    assert won(answer) == [("a", 1.0), ("b", 0.0)]
    assert [ad.probability for ad in answer.ads] == [0.1, 0.1]
    assert "out of order" in answer.degraded


def test_a_cascade_that_fails_as_a_whole_leaves_the_mean_rate_and_the_rules(engine, monkeypatch):
    engine.ads.kept.put(campaign("a", bid=2.0), campaign("b", bid=1.0))
    monkeypatch.setattr(engine.live.cascade, "run", raising)
    answer = engine.ads("user-3", 2, rules=Rules(deny=[ITEMS[0]]))
    assert [ad.probability for ad in answer.ads] == [0.1, 0.1]
    assert {str(ad.item_id) for ad in answer.ads} <= set(ITEMS[1:])
    assert "the cascade failed" in answer.degraded


@pytest.mark.parametrize("method", ["accounts", "reserve"])
def test_without_the_store_there_are_no_ads_and_no_error(engine, monkeypatch, method):
    engine.ads.kept.put(campaign("a"))

    def gone(*_, **__):
        raise StoreUnavailable("disk full")

    monkeypatch.setattr(engine.ads.store, method, gone)
    answer = engine.ads("user-3", 2)
    assert answer.ads == ()
    assert "there are no ads: disk full" in answer.degraded


def test_money_that_is_free_again_is_found_although_nobody_else_asks(tmp_path):
    """A lonely campaign whose whole budget was set aside takes part again when the window is over."""
    with ads_engine(tmp_path, config=AdsConfig(click_window_s=0.05, auction=AuctionConfig(reserve=1.0))) as engine:
        engine.ads.kept.put(campaign("only", budget=1.0))
        assert won(engine.ads("user-3")) == [("only", 1.0)]
        assert engine.ads("user-3").removed == {"budget": 1}
        time.sleep(0.06)
        engine.ads._looked = 0.0
        assert won(engine.ads("user-3")) == [("only", 1.0)]


def test_a_burst_from_eight_threads_never_overspends(tmp_path):
    """Two engines over one store, more bidders than money, clicks on most ads."""
    engines = [ads_engine(tmp_path), ads_engine(tmp_path)]
    now = time.time()
    engines[0].ads.kept.put(
        campaign("paced", budget=4.0, bid=1.0, start=now - 50, end=now + 50),
        campaign("drawn", budget=4.0, bid=0.9, start=now - 50, end=now + 50, pacing="throttle"),
        campaign("free", budget=2.0, bid=0.8, reserve=0.5),
    )
    charged: dict[str, float] = {}
    lock = threading.Lock()

    def serve(number):
        for n in range(6):
            answer = engines[number % 2].ads(f"user-{n}", 2)
            for ad in answer.ads:
                assert ad.price <= ad.bid
                charge = engines[1 - number % 2].ads.click(answer.request_id, ad.slot)
                with lock:
                    charged[ad.campaign] = charged.get(ad.campaign, 0) + charge.charged

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for account in engines[0].ads.kept.accounts():
        assert account.spent <= account.campaign.budget * 1e6
        assert account.reserved == account.expected == 0  # everything was clicked
        assert account.spent / 1e6 == pytest.approx(charged.get(account.campaign.campaign, 0))
    assert charged["free"] > 1.0
    for engine in engines:
        engine.close()
