"""Campaigns' money: one contract on SQLite and on a real PostgreSQL; never overspent by threads, servers or kill -9, and no charge lost."""

import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from shortlist.errors import ConfigError, DataError
from shortlist.store.ads import MICROS, Campaign, Showing
from shortlist.store.campaigns import CHARGED, KEEP_MS, OPEN, SHOWN, CampaignStore
from shortlist.store.events import EventStore

NOON = 1_700_000_000.0
SPRING = Campaign(campaign="spring", budget=10.0, bid=1.5, items=("a", "b"))


@pytest.fixture(params=["sqlite", "postgresql"])
def opened(request, tmp_path):
    """Opens stores on the same database and closes them all."""
    where = str(tmp_path / "e.db") if request.param == "sqlite" else request.getfixturevalue("postgres").schema()
    events = []

    def another():
        events.append(EventStore(where))
        return CampaignStore(events[-1].database)

    yield another
    for store in events:
        store.close()


def showing(campaign="spring", price=1.0, slot=1, chance=0.1, **more):
    micros = round(price * MICROS)
    return Showing(
        slot=slot,
        campaign=campaign,
        item="a",
        price=micros,
        expected=round(micros * chance),
        bid=micros,
        chance=chance,
        **more,
    )


def money(store, campaign="spring"):
    """Spent, reserved and left."""
    account = store.account(campaign)
    return account.spent / MICROS, account.reserved / MICROS, account.left / MICROS


def ledger(store):
    """What the single ads say: money set aside and charged by campaign."""
    rows = store._database.read(lambda c: c.execute(select(SHOWN)).all())
    aside, charged = Counter(), Counter()
    for row in rows:
        aside[row.campaign] += row.price if row.state == OPEN else 0
        charged[row.campaign] += row.charged
    return aside, charged


def test_a_click_is_set_aside_charged_once_and_told_again(opened):
    store = opened()
    store.put(SPRING)
    assert store.reserve("r1", [showing(price=1.25)], window_s=60, now=NOON) is None
    assert money(store) == (0.0, 1.25, 8.75)
    assert store.account("spring").expected == 125_000
    charge = store.click("r1", 1, now=NOON + 5)
    assert (charge.campaign, charge.item_id, charge.charged, charge.repeated, charge.late) == (
        "spring",
        "a",
        1.25,
        False,
        False,
    )
    assert money(store) == (1.25, 0.0, 8.75)
    again = store.click("r1", 1, now=NOON + 9)
    assert (again.charged, again.repeated) == (1.25, True)
    assert money(store) == (1.25, 0.0, 8.75)
    assert store.account("spring").expected == 0
    for request_id, slot in (("r1", 2), ("r2", 1)):
        with pytest.raises(DataError, match="no ad is known at slot"):
            store.click(request_id, slot, now=NOON)


def test_what_nobody_clicks_is_given_back_and_a_late_click_pays_while_there_is_money(opened):
    store = opened()
    store.put(replace(SPRING, budget=2.0))
    for n in range(2):
        assert store.reserve(f"old{n}", [showing()], window_s=60, now=NOON) is None
    assert store.reserve("none left", [showing()], window_s=60, now=NOON + 59).budget == {"spring"}
    assert store.reserve("after the window", [showing(price=0.5)], window_s=60, now=NOON + 60) is None
    assert money(store) == (0.0, 0.5, 1.5)
    late = store.click("old0", 1, now=NOON + 70)
    assert (late.charged, late.late, late.repeated) == (1.0, True, False)
    assert money(store) == (1.0, 0.5, 0.5)
    free = store.click("old1", 1, now=NOON + 71)
    assert (free.price, free.charged, free.late) == (1.0, 0.0, True)
    assert store.click("old1", 1, now=NOON + 72).repeated
    assert money(store) == (1.0, 0.5, 0.5)
    # The click that was set aside is charged whatever came between.
    assert store.click("after the window", 1, now=NOON + 80).charged == 0.5


def test_all_ads_of_a_page_are_set_aside_or_none(opened):
    store = opened()
    store.put(SPRING, replace(SPRING, campaign="poor", budget=0.5))
    refused = store.reserve("r", [showing(), showing("poor", slot=2)], window_s=60, now=NOON)
    assert (refused.budget, refused.cap) == ({"poor"}, frozenset())
    assert money(store) == (0.0, 0.0, 10.0)
    with pytest.raises(DataError):
        store.click("r", 1, now=NOON)


def test_an_unregistered_campaign_has_no_budget_but_its_clicks_are_kept(opened):
    store = opened()
    assert store.reserve("r", [showing("nobody", price=5.0, registered=False)], window_s=60, now=NOON) is None
    assert store.click("r", 1, now=NOON + 1_000).charged == 5.0
    assert store.click("r", 1, now=NOON + 1_001).repeated
    assert store.account("nobody") is None


def test_names_that_no_database_takes_are_refused(opened):
    store = opened()
    for ask in (store.account, store.remove, lambda name: store.click(name, 1)):
        for name in ("", "a\0b", "\ud800", "x" * 600):
            with pytest.raises(ConfigError):
                ask(name)


def test_the_last_micro_can_be_spent_and_no_more(opened):
    store = opened()
    store.put(replace(SPRING, budget=0.3))
    assert store.reserve("r1", [showing(price=0.1)], window_s=60, now=NOON) is None
    assert store.reserve("r2", [showing(price=0.200001)], window_s=60, now=NOON).budget == {"spring"}
    assert store.reserve("r3", [showing(price=0.2)], window_s=60, now=NOON) is None
    store.click("r1", 1, now=NOON)
    store.click("r3", 1, now=NOON)
    assert store.account("spring").spent == 300_000
    assert store.account("spring").left == 0


def test_campaigns_change_in_place_and_keep_what_they_spent(opened):
    first, second = opened(), opened()
    first.put(SPRING)
    assert second.accounts()[0].campaign == SPRING
    second.reserve("r", [showing(price=4.0)], window_s=60, now=NOON)
    second.click("r", 1, now=NOON)
    with pytest.raises(ConfigError, match=r"budget of 'spring' can not be 3: 4 is spent"):
        first.put(replace(SPRING, campaign="other"), replace(SPRING, budget=3.0))
    assert [account.campaign.campaign for account in first.accounts()] == ["spring"]  # all or none
    assert first.put(replace(SPRING, budget=5.0, items=("c",), max_per_day=2))[0].spent == 4_000_000
    assert second.accounts()[0].campaign.items == ("c",)
    assert money(second) == (4.0, 0.0, 1.0)
    second.reserve("r2", [showing(price=0.5)], window_s=60, now=NOON)
    assert first.remove("spring")
    assert not first.remove("spring")
    assert second.accounts() == []
    assert second.reserve("r3", [showing()], window_s=60, now=NOON).budget == {"spring"}
    assert second.click("r2", 1, now=NOON).charged == 0.5
    assert first.put(replace(SPRING, budget=5.0))[0].spent == 4_500_000


def test_ads_per_user_and_day_are_capped(opened):
    store = opened()
    store.put(SPRING)
    for n in range(2):
        assert store.reserve(f"r{n}", [showing(max_per_day=2)], window_s=9, viewer="u", now=NOON + n) is None
    assert store.reserve("r2", [showing(max_per_day=2)], window_s=9, viewer="u", now=NOON + 5).cap == {"spring"}
    assert store.reserve("r3", [showing(max_per_day=2)], window_s=9, viewer="v", now=NOON + 5) is None
    assert store.reserve("r4", [showing(max_per_day=2)], window_s=9, now=NOON + 5) is None  # nobody in particular
    assert store.reserve("r5", [showing(max_per_day=2)], window_s=9, viewer="u", now=NOON + 86_401) is None
    store.forget("v")
    assert store.reserve("r6", [showing(max_per_day=1)], window_s=9, viewer="v", now=NOON + 6) is None


def test_what_was_never_clicked_is_forgotten_and_charges_are_not(opened):
    store = opened()
    store.put(SPRING)
    store.reserve("clicked", [showing()], window_s=60, now=NOON)
    store.reserve("ignored", [showing()], window_s=60, now=NOON)
    store.click("clicked", 1, now=NOON + 1)
    later = NOON + 61 + KEEP_MS / 1e3
    store.give_back(now=NOON + 61)
    store.give_back(now=later)
    assert store.click("clicked", 1, now=later).repeated
    with pytest.raises(DataError, match="forgotten after a day"):
        store.click("ignored", 1, now=later)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"budget": -1.0}, "budget of a campaign is money"),
        ({"budget": float("nan")}, "budget of a campaign is money"),
        ({"bid": 0.0}, "at least one millionth"),
        ({"bid": 2e9}, "bid of a campaign is money"),
        ({"reserve": 2.0}, "its bid 1.5 is below its reserve 2"),
        ({"start": NOON * 1_000}, "seconds since 1970"),
        ({"start": NOON, "end": NOON}, "ends after it starts"),
        ({"items": ()}, "from 1 to 10,000 items"),
        ({"items": ("",)}, "item must be 1 to"),
        ({"campaign": "x" * 600}, "campaign must be 1 to"),
        ({"campaign": "a\0"}, "no character of text"),
        ({"pacing": "fast"}, "choose from bid, throttle, none"),
        ({"max_per_day": 0}, "max_per_day must be at least 1"),
    ],
    ids=str,
)
def test_a_campaign_that_makes_no_sense_is_refused(wrong, said):
    with pytest.raises(ConfigError, match=said):
        replace(SPRING, **wrong)


def test_eight_threads_and_two_servers_never_overspend(opened):
    """Bursts from all sides at a budget that is far too small, with windows that end while they run."""
    stores = [opened(), opened()]
    stores[0].put(replace(SPRING, budget=7.0), replace(SPRING, campaign="autumn", budget=3.0))
    paid, overspent = Counter(), []

    def serve(number):
        rng = np.random.default_rng(number)
        store = stores[number % 2]
        for n in range(15):
            now = NOON + n
            names = rng.permutation(["spring", "autumn"])[: rng.integers(1, 3)]
            ads = [showing(str(name), float(rng.uniform(0.05, 0.6)), slot) for slot, name in enumerate(names, 1)]
            if store.reserve(f"{number}-{n}", ads, window_s=3, now=now) is None and rng.random() < 0.7:
                for ad in ads:
                    charge = store.click(f"{number}-{n}", ad.slot, now=now + float(rng.choice([0, 5])))
                    paid[charge.campaign] += round(charge.charged * MICROS)
            overspent.extend(account for account in store.accounts() if account.left < 0)

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not overspent
    aside, charged = ledger(stores[0])
    for account in stores[1].accounts():
        name = account.campaign.campaign
        assert account.spent == charged[name] == paid[name]
        assert account.reserved == aside[name]
        assert account.spent + account.reserved <= account.campaign.budget * MICROS
    assert stores[0].account("autumn").spent > 1.5 * MICROS  # the budget was worth fighting for


def test_a_click_told_by_many_at_once_is_charged_once(opened):
    stores = [opened(), opened()]
    stores[0].put(SPRING)
    stores[0].reserve("r", [showing(price=2.0)], window_s=60, now=NOON)
    told = []
    threads = [
        threading.Thread(target=lambda n=n: told.append(stores[n % 2].click("r", 1, now=NOON))) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(charge.repeated for charge in told) == [False, *[True] * 7]
    assert money(stores[1]) == (2.0, 0.0, 8.0)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_order_of_what_may_happen_keeps_the_books(tmp_path_factory, data):
    """A plain model of one account, told the same, agrees after every step."""
    events = EventStore(tmp_path_factory.mktemp("books") / "e.db", sync="normal")
    store = CampaignStore(events.database)
    budget = data.draw(st.integers(1, 40)) * 100_000
    store.put(replace(SPRING, budget=budget / MICROS))
    now, spent, ads = 0, 0, {}
    for step in range(data.draw(st.integers(1, 12))):
        now += data.draw(st.integers(0, 40))
        if data.draw(st.booleans()):
            price = data.draw(st.integers(1, 15)) * 100_000
            due = {
                key: ("gone" if state == "open" and until <= now else state, until, p)
                for key, (state, until, p) in ads.items()
            }
            reserved = sum(p for state, _, p in due.values() if state == "open")
            refused = store.reserve(f"r{step}", [showing(price=price / MICROS)], window_s=60, now=NOON + now)
            assert (refused is None) == (spent + reserved + price <= budget)
            if refused is None:  # a refusal leaves everything as it was, what could be given back too
                ads = due | {f"r{step}": ("open", now + 60, price)}
        elif ads:
            key = data.draw(st.sampled_from(sorted(ads)))
            state, until, price = ads[key]
            reserved = sum(p for s, _, p in ads.values() if s == "open")
            charge = store.click(key, 1, now=NOON + now)
            pays = state == "open" or (state == "gone" and spent + reserved + price <= budget)
            assert charge.repeated == (state in ("paid", "unpaid"))
            if not charge.repeated:
                assert charge.charged == pytest.approx(price / MICROS if pays else 0)
                spent += price if pays else 0
                ads[key] = ("paid" if pays else "unpaid", until, price)
        account = store.account("spring")
        assert account.spent == spent
        assert account.reserved == sum(p for state, _, p in ads.values() if state == "open")
        assert account.left >= 0
    events.close()


CHILD = """
import sys, threading
from shortlist.store.ads import Showing
from shortlist.store.campaigns import CampaignStore
from shortlist.store.events import EventStore
store = CampaignStore(EventStore(sys.argv[1]).database)
lock = threading.Lock()
def serve(number):
    for n in range(10**6):
        name = f"{sys.argv[2]}-{number}-{n}"
        ad = Showing(slot=1, campaign="spring", item="a", price=1_000 + n, expected=100, bid=2_000, chance=0.1)
        if store.reserve(name, [ad], window_s=3600) is None and n % 3:
            charge = store.click(name, 1)
            with lock:
                print(name, round(charge.charged * 1e6), flush=True)
threads = [threading.Thread(target=serve, args=(n,)) for n in range(3)]
[thread.start() for thread in threads]
"""


def test_kill_9_loses_no_charge_and_leaves_the_books_in_order(tmp_path):
    path = tmp_path / "events.db"
    events = EventStore(path)
    store = CampaignStore(events.database)
    store.put(replace(SPRING, budget=0.4))
    rng, told = np.random.default_rng(0), {}
    for life in range(2):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(path), str(life)], stdout=subprocess.PIPE, text=True)
        lines = [child.stdout.readline() for _ in range(int(rng.integers(10, 25)))]
        os.kill(child.pid, signal.SIGKILL)
        lines += child.communicate()[0].splitlines()
        told.update((line.split()[0], int(line.split()[1])) for line in lines if len(line.split()) == 2)
        account = store.account("spring")
        aside, charged = ledger(store)
        assert account.spent == charged["spring"]
        assert account.reserved == aside["spring"]
        assert account.spent + account.reserved <= 400_000
        assert account.spent >= sum(told.values())
    assert len(told) > 15
    spent = store.account("spring").spent
    for name, micros in told.items():
        again = store.click(name, 1)
        assert again.repeated
        assert round(again.charged * MICROS) == micros
    assert store.account("spring").spent == spent
    rows = store._database.read(lambda c: c.execute(select(SHOWN.c.state)).scalars().all())
    assert set(rows) <= {OPEN, CHARGED}
    events.close()


def test_tables_stand_beside_the_events(tmp_path):
    events = EventStore(Path(tmp_path) / "events.db")
    CampaignStore(events.database).put(SPRING)
    events.close()
    again = EventStore(tmp_path / "events.db")
    assert CampaignStore(again.database).accounts()[0].campaign == SPRING
    again.close()
