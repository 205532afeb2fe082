"""Auctions against a hand-made case and against loops; what second prices promise holds."""

import numpy as np
import pytest

from shortlist.errors import ConfigError, DataError
from shortlist.simulation import generalised_second_price, market_auction, spend


def by_hand(bids, quality, num_places, reserve):
    """One auction, one candidate at a time."""
    left = [(-b * q, i) for i, (b, q) in enumerate(zip(bids, quality)) if b > 0 and b >= reserve]
    ranked = [i for _, i in sorted(left)]
    winners, prices = [], []
    for place in range(num_places):
        if place >= len(ranked):
            winners, prices = [*winners, -1], [*prices, 0.0]
            continue
        i = ranked[place]
        behind = ranked[place + 1] if place + 1 < len(ranked) else None
        least = 0.0 if behind is None else bids[behind] * quality[behind] / quality[i]
        winners, prices = [*winners, i], [*prices, max(reserve, least)]
    return winners, prices


def test_a_worked_example():
    """Scores 0.8, 1.2, 0.9: the lowest bidder wins, since it is clicked most, and pays 0.9 / 0.6 = 1.5 per click."""
    made = generalised_second_price(np.array([[8.0, 2.0, 3.0]]), np.array([[0.1, 0.6, 0.3]]), num_places=2, reserve=1.0)
    assert made.winner.tolist() == [[1, 2]]
    assert made.price[0] == pytest.approx([1.5, 0.8 / 0.3])


@pytest.mark.parametrize("reserve", [0.0, 0.8])
def test_auctions_agree_with_a_loop(reserve):
    rng = np.random.default_rng(0)
    bids = np.round(rng.lognormal(0, 1, (200, 5)), 1) * (rng.random((200, 5)) < 0.8)
    quality = rng.choice([0.1, 0.2, 0.4], (200, 5))
    made = generalised_second_price(bids, quality, num_places=3, reserve=reserve)
    for r in range(200):
        winners, prices = by_hand(bids[r], quality[r], 3, reserve)
        assert made.winner[r].tolist() == winners
        assert made.price[r] == pytest.approx(prices)


def test_one_place_is_the_second_price_auction():
    rng = np.random.default_rng(1)
    bids = rng.lognormal(0, 1, (300, 6))
    made = generalised_second_price(bids)
    assert np.array_equal(made.winner[:, 0], bids.argmax(1))
    assert np.allclose(made.price[:, 0], np.sort(bids, 1)[:, -2])


def test_nobody_pays_more_than_the_bid_and_lying_does_not_pay():
    """With one place the truth is a best answer: no other bid brings more than value - price where it wins."""
    rng = np.random.default_rng(2)
    bids, quality = rng.lognormal(0, 1, (400, 4)), rng.uniform(0.1, 0.5, (400, 4))
    made = generalised_second_price(bids, quality, num_places=4, reserve=0.2)
    paid = np.take_along_axis(bids, np.maximum(made.winner, 0), 1)
    assert (made.price <= np.where(made.winner >= 0, paid, 0) + 1e-12).all()
    assert ((made.price == 0) == (made.winner < 0)).all()
    value = bids[:, 0]

    def gain(bid):
        told = generalised_second_price(np.column_stack([bid, bids[:, 1:]]), quality, reserve=0.2)
        return np.where(told.winner[:, 0] == 0, (value - told.price[:, 0]) * quality[:, 0], 0.0)

    honest = gain(value)
    for factor in (0.3, 0.7, 0.95, 1.05, 1.5, 4.0):
        assert (gain(value * factor) <= honest + 1e-12).all()


def test_fewer_candidates_than_places():
    made = generalised_second_price(np.array([[2.0], [0.0]]), num_places=3)
    assert made.winner.tolist() == [[0, -1, -1], [-1, -1, -1]]
    assert not made.price.any()


def test_a_bid_meets_the_market():
    won, paid = market_auction(np.array([5.0, 5.0, 5.0, 1.0]), np.array([3.0, 5.0, 6.0, 0.0]), reserve=2.0)
    assert won.tolist() == [True, True, False, False]
    assert paid.tolist() == [3, 5, 0, 0]


def test_campaigns_stop_when_their_money_is_spent():
    rng = np.random.default_rng(3)
    charges, campaign, budgets = rng.lognormal(0, 1, 500), rng.integers(0, 4, 500), np.array([10.0, 0.0, 1e9, 60.0])
    left, expected = budgets.copy(), []
    for charge, owner in zip(charges, campaign):
        paid = min(charge, left[owner])
        left[owner] -= paid
        expected.append(paid)
    paid = spend(charges, campaign, budgets)
    assert np.allclose(paid, expected)
    total = np.bincount(campaign, paid, minlength=4)
    assert np.allclose(total, np.minimum(budgets, np.bincount(campaign, charges, minlength=4)))
    assert len(spend(np.zeros(0), np.zeros(0, dtype=np.int64), budgets)) == 0


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (lambda: generalised_second_price(np.ones((2, 3)), np.ones((2, 2))), DataError),
        (lambda: generalised_second_price(np.ones((2, 3)), np.zeros((2, 3))), DataError),
        (lambda: generalised_second_price(np.full((1, 2), np.nan)), DataError),
        (lambda: generalised_second_price(np.ones((2, 3)), num_places=0), ConfigError),
        (lambda: generalised_second_price(np.ones((2, 3)), reserve=-1.0), ConfigError),
        (lambda: spend(np.ones(2), np.array([0, 3]), np.ones(2)), DataError),
        (lambda: spend(-np.ones(2), np.array([0, 1]), np.ones(2)), DataError),
        (lambda: spend(np.ones(2), np.array([0]), np.ones(2)), DataError),
    ],
)
def test_what_is_no_auction_is_refused(wrong, error):
    with pytest.raises(error):
        wrong()
