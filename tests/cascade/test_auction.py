"""Auctions of the engine: by hand, against brute force, and what must hold of every one of them."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shortlist.cascade.auction import AuctionConfig, best_of_each, hold
from shortlist.errors import ConfigError, DataError
from shortlist.simulation.auctions import generalised_second_price


def held(bids, chances, reserves=None, campaigns=None, slots=1):
    """Winners and prices of one auction, in micros."""
    num = len(bids)
    outcome = hold(
        np.array(bids, dtype=np.int64),
        np.array(chances, dtype=np.float64),
        np.zeros(num, dtype=np.int64) if reserves is None else np.array(reserves, dtype=np.int64),
        np.arange(num) if campaigns is None else np.array(campaigns),
        slots,
    )
    return outcome.candidate.tolist(), outcome.price.tolist()


def brute_force(bids, chances, reserves, campaigns, slots):
    """The page among all orders of all choices that is sorted by bid x chance with one candidate per campaign; prices by search: the
    least whole bid, from the reserve up, with which the winner still stands before the next campaign.
    """
    able = [i for i in range(len(bids)) if bids[i] > 0 and bids[i] >= reserves[i]]
    # The best of a campaign: nothing of the same campaign is above it, or is as good and earlier.
    best = [
        i
        for i in able
        if not any(
            campaigns[j] == campaigns[i] and (-bids[j] * chances[j], j) < (-bids[i] * chances[i], i) for j in able
        )
    ]
    for page in itertools.permutations(best, len(best)):
        keys = [(-bids[i] * chances[i], i) for i in page]
        if keys == sorted(keys):
            break
    winners, prices = list(page)[:slots], []
    for place, i in enumerate(winners):
        behind = page[place + 1] if place + 1 < len(page) else None
        rival = 0.0 if behind is None else bids[behind] * chances[behind]
        prices.append(
            next(bid for bid in range(reserves[i], bids[i] + 1) if bid == bids[i] or bid * chances[i] >= rival - 1e-9)
        )
    return winners, prices


def test_a_worked_example():
    """Scores 8 x 0.1 = 0.8, 2 x 0.6 = 1.2, 3 x 0.3 = 0.9: the lowest bidder wins and pays 0.9 / 0.6; the next one 0.8 / 0.3."""
    assert held([8_000_000, 2_000_000, 3_000_000], [0.1, 0.6, 0.3], slots=2) == ([1, 2], [1_500_000, 2_666_667])


def test_the_reserve_is_the_price_where_nobody_is_behind():
    assert held([500, 900], [0.5, 0.5], [100, 100], slots=3) == ([1, 0], [500, 100])
    assert held([500, 900], [0.5, 0.5], [600, 700], slots=3) == ([1], [700])  # one bids below its own reserve
    assert held([500], [0.5], [501]) == ([], [])
    assert held([0], [0.5]) == ([], [])
    assert held([], []) == ([], [])


def test_a_campaign_does_not_bid_against_itself():
    """Two items of one campaign score 9 and 8, another campaign 3: one place each, and the price is the rival's."""
    assert held([90, 80, 30], [0.1, 0.1, 0.1], campaigns=[0, 0, 1], slots=3) == ([0, 2], [30, 0])


def test_ties_go_to_who_is_named_first():
    assert held([50, 50, 50], [0.2, 0.2, 0.2], slots=2) == ([0, 1], [50, 50])
    assert held([50, 100], [0.2, 0.1]) == ([0], [50])
    assert best_of_each(np.array([1.0, 2.0, 2.0, 0.5]), np.array([7, 7, 7, 3])).tolist() == [1, 3]


auctions = st.integers(1, 5).flatmap(
    lambda num: st.tuples(
        st.lists(st.integers(0, 60), min_size=num, max_size=num),
        st.lists(st.sampled_from([0.05, 0.125, 0.25, 0.5, 1.0]), min_size=num, max_size=num),
        st.lists(st.integers(0, 30), min_size=num, max_size=num),
        st.lists(st.integers(0, 3), min_size=num, max_size=num),
        st.integers(1, 6),
    )
)


@settings(max_examples=150, deadline=None)
@given(auctions)
def test_brute_force_finds_the_same_page_and_prices(auction):
    bids, chances, reserves, campaigns, slots = auction
    winners, prices = held(*auction)
    expected, least = brute_force(bids, chances, reserves, campaigns, slots)
    assert winners == expected
    # The search goes by whole units, the auction to the nearest one.
    assert all(abs(price - wanted) <= 1 for price, wanted in zip(prices, least))


@settings(max_examples=200, deadline=None)
@given(auctions, st.integers(1, 40))
def test_what_holds_of_every_auction(auction, more):
    bids, chances, reserves, campaigns, slots = auction
    winners, prices = held(*auction)
    assert held(*auction) == (winners, prices)
    assert len(winners) <= slots
    assert len({campaigns[i] for i in winners}) == len(winners)
    for i, price in zip(winners, prices):
        assert reserves[i] <= price <= bids[i]
    scores = [bids[i] * chances[i] for i in winners]
    assert scores == sorted(scores, reverse=True)
    if len(winners) > 1:
        # A higher bid of the next one makes the one above pay no less, as long as it keeps its place.
        top, behind = winners[0], winners[1]
        dearer = list(bids)
        dearer[behind] += more
        others, paid = held(dearer, *auction[1:])
        if others[0] == top:
            assert paid[0] >= prices[0]


@settings(max_examples=100, deadline=None)
@given(auctions, st.integers(1, 40))
def test_a_winner_pays_the_same_whatever_it_bids_in_its_place(auction, more):
    winners, prices = held(*auction)
    if winners:
        raised = list(auction[0])
        raised[winners[0]] += more
        again, paid = held(raised, *auction[1:])
        assert again[0] == winners[0]
        assert 0 <= paid[0] - prices[0] <= 1  # a price that was cut to the old bid may be rounded up now


def test_each_candidate_may_have_its_own_reserve():
    made = generalised_second_price(np.array([[5.0, 4.0, 3.0]]), num_places=3, reserve=np.array([[1.0, 4.5, 2.0]]))
    assert made.winner.tolist() == [[0, 2, -1]]
    assert made.price.tolist() == [[3.0, 2.0, 0.0]]
    with pytest.raises(DataError, match=r"one number or \[R, C\]"):
        generalised_second_price(np.ones((2, 3)), reserve=np.ones(3))
    with pytest.raises(ConfigError, match="reserve of 0 or above"):
        generalised_second_price(np.ones((1, 1)), reserve=np.array([[-1.0]]))


def test_position_factors():
    assert AuctionConfig().factors(3).tolist() == [1, 1, 1]
    assert AuctionConfig(position_factors=(1.0, 0.5)).factors(4).tolist() == [1, 0.5, 0.5, 0.5]
    assert AuctionConfig(position_factors=(1.0, 0.5, 0.2)).factors(2).tolist() == [1, 0.5]
    for wrong in ((0.5, 1.0), (0.0,), (1.5,)):
        with pytest.raises(ConfigError, match="do not rise"):
            AuctionConfig(position_factors=wrong)
    with pytest.raises(ConfigError, match="reserve is money"):
        AuctionConfig(reserve=-1.0)
