"""Who takes part: the arrays against a loop that goes campaign by campaign and item by item."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ads_support import campaign
from shortlist.cascade.bidders import enter
from shortlist.cascade.pacing import PacingConfig, factors_of, is_running
from shortlist.store.ads import MICROS, Account

NOON = 1_700_000_000.0


def plainly(wishes, accounts, ended, *, now, reserve, pacing, rng):
    """Candidates (name, row, bid, reserve), reasons and the chance of the draw."""
    entered, removed, draw = [], {}, 1.0
    lots = rng.random(len(wishes))
    for lot, (name, (rows, wished)) in zip(lots, wishes.items()):
        account = accounts.get(name)
        own = 0.0 if account is None else account.campaign.reserve
        least = round(max(own, reserve) * MICROS)
        needed = max(least, 1)
        if name in ended or (account is not None and not is_running(account, now)):
            removed["schedule"] = removed.get("schedule", 0) + 1
            continue
        if account is not None and account.left < needed:
            removed["budget"] = removed.get("budget", 0) + 1
            continue
        factor = 1.0 if account is None else factors_of([account], now, pacing)[0]
        throttled = account is not None and account.campaign.pacing == "throttle"
        takes_part = not throttled or lot < factor
        if throttled:
            draw *= factor if takes_part else 1 - factor
        mine = []
        for row, wish in zip(rows.tolist(), wished.tolist()):
            bid = wish if account is None else min(int(wish * (1 if throttled else factor)), account.left)
            if row > 0 and bid >= needed and takes_part:
                mine.append((name, row, bid, least))
        known = [wish for row, wish in zip(rows.tolist(), wished.tolist()) if row > 0]
        if known and not mine:
            reason = "pacing" if max(known) >= needed else "reserve"
            removed[reason] = removed.get(reason, 0) + 1
        entered += mine
    return entered, removed, draw


one = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["bid", "throttle", "none", "guest", "gone"]),
        "spent": st.sampled_from([0, 1, 5, 49, 51, 52, 99, 100]),
        "reserve": st.sampled_from([0.0, 0.4, 0.9]),
        "time": st.sampled_from([(-100, 100), (-100, -1), (1, 100), (None, None)]),
        "items": st.lists(st.tuples(st.integers(0, 9), st.sampled_from([0, 1, 300_000, 950_000, 2_000_000])), min_size=1, max_size=4),
    }
)  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(st.lists(one, max_size=6), st.sampled_from([0.0, 0.5]), st.integers(0, 99))
def test_arrays_agree_with_a_loop(given_campaigns, reserve, seed):
    wishes, accounts, ended = {}, {}, set()
    for number, about in enumerate(given_campaigns):
        name = f"c{number}"
        rows, bids = zip(*about["items"])
        wishes[name] = (np.array(rows), np.array(bids, dtype=np.int64))
        if about["kind"] == "gone":
            ended.add(name)
        elif about["kind"] != "guest":
            start, end = (None if at is None else NOON + at for at in about["time"])
            made = campaign(name, budget=100.0, start=start, end=end, reserve=about["reserve"], pacing=about["kind"])
            accounts[name] = Account(campaign=made, spent=about["spent"] * MICROS, reserved=0, expected=0)
    told = {"now": NOON, "reserve": reserve, "pacing": PacingConfig()}
    found = enter(wishes, accounts, ended, most=1_000, rng=np.random.default_rng(seed), **told)
    entered, removed, draw = plainly(wishes, accounts, ended, rng=np.random.default_rng(seed), **told)
    candidates = zip(found.campaign_C.tolist(), found.row_C.tolist(), found.bid_C.tolist(), found.reserve_C.tolist())
    assert [(found.names[c], *rest) for c, *rest in candidates] == entered
    assert found.removed == removed
    assert found.draw == pytest.approx(draw)
    assert found.ignored.get("items", 0) == sum(int((rows == 0).sum()) for rows, _ in wishes.values())
    assert set(found.campaign_C.tolist()) == set(range(len(found.names)))
    for name, account in zip(found.names, found.accounts):
        assert account is accounts.get(name)


def test_only_the_highest_bids_stay():
    wishes = {
        name: (np.arange(1, 4), np.array(bids, dtype=np.int64)) for name, bids in (("a", (5, 9, 1)), ("b", (7, 8, 2)))
    }
    told = {"now": NOON, "reserve": 0.0, "pacing": PacingConfig(), "rng": np.random.default_rng(0)}
    found = enter(wishes, {}, set(), most=3, **told)
    assert list(zip(found.campaign_C.tolist(), found.bid_C.tolist())) == [(0, 9), (1, 7), (1, 8)]
    one_left = enter(wishes, {}, set(), most=1, **told)
    assert (one_left.names, one_left.bid_C.tolist(), one_left.campaign_C.tolist()) == (["a"], [9], [0])


def test_who_is_dropped_leaves_with_all_items():
    wishes = {name: (np.arange(1, 3), np.array([4, 5])) for name in ("a", "b")}
    found = enter(wishes, {}, set(), now=NOON, reserve=0.0, pacing=PacingConfig(), most=9, rng=np.random.default_rng(0))
    assert found.drop(frozenset({"a"})).tolist() == [False, False, True, True]
    assert found.campaign_C.tolist() == [1, 1]
    assert found.row_C.tolist() == [1, 2]
