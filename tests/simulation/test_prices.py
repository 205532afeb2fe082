"""Heavy tails are as heavy as was asked for; a histogram's sums are those of a loop."""

import json
import math

import numpy as np
import pytest

from shortlist.errors import DataError
from shortlist.simulation import PriceHistogram, lognormal, pareto

COUNTS = np.array([0, 3, 0, 5, 1, 0, 11])


def hill(draws, share=0.05):
    """Hill's estimate of the tail exponent from the largest draws, and its standard error (Hill, Annals of Statistics 1975)."""
    top = np.sort(draws)[::-1][: int(share * len(draws)) + 1]
    exponent = 1 / np.log(top[:-1] / top[-1]).mean()
    return exponent, exponent / math.sqrt(len(top) - 1)


@pytest.mark.parametrize("tail", [1.2, 1.5, 3.0])
def test_pareto_draws_have_the_tail_and_the_median(tail):
    draws = pareto(np.random.default_rng(0), 200_000, median=20.0, tail=tail)
    exponent, error = hill(draws)
    assert abs(exponent - tail) < 4 * error
    assert np.median(draws) == pytest.approx(20.0, rel=0.02)
    assert draws.min() >= 20.0 / 2 ** (1 / tail)


def test_lognormal_draws_have_the_quantiles_and_no_power_tail():
    draws = lognormal(np.random.default_rng(0), 200_000, median=20.0, spread=1.3)
    low, median, high = np.quantile(draws, [0.01, 0.5, 0.99])
    assert median == pytest.approx(20.0, rel=0.02)
    assert math.log(high / median) == pytest.approx(2.3263 * 1.3, rel=0.02)
    assert math.log(median / low) == pytest.approx(2.3263 * 1.3, rel=0.02)
    assert hill(draws, 0.001)[0] > hill(draws, 0.1)[0] + 1, "the farther out, the lighter"


def test_a_histogram_says_who_wins_and_pays_what():
    prices = PriceHistogram(counts=COUNTS.astype(float))
    total = COUNTS.sum()
    bids = np.array([-1.0, 0.0, 0.5, 1.0, 2.9, 3.0, 6.0, 99.0])
    wins = [sum(n for p, n in enumerate(COUNTS) if p <= bid) / total for bid in bids]
    pays = [sum(p * n for p, n in enumerate(COUNTS) if p <= bid) / total for bid in bids]
    assert np.allclose(prices.win_chance(bids), wins)
    assert np.allclose(prices.payment(bids), pays)
    assert prices.median == 6, "9 of 20 auctions cost 4 or less"


def test_samples_follow_the_counts():
    drawn = PriceHistogram(counts=COUNTS.astype(float)).sample(np.random.default_rng(1), 40_000)
    share = np.bincount(drawn.astype(int), minlength=7) / 40_000
    wanted = COUNTS / COUNTS.sum()
    assert (np.abs(share - wanted) <= 4 * np.sqrt(wanted * (1 - wanted) / 40_000)).all()


def test_files_of_prices(tmp_path):
    for told in (COUNTS.tolist(), {"price_counter_train": COUNTS.tolist(), "clk_train": 3}):
        (tmp_path / "prices.json").write_text(json.dumps(told))
        assert np.array_equal(PriceHistogram.load(tmp_path / "prices.json").counts, COUNTS)
    for text in ("{}", "[]", "[1, -1]", '["a"]', "nonsense", "[0, 0]", "3"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(DataError):
            PriceHistogram.load(tmp_path / "bad.json")
    with pytest.raises(DataError, match="no such file"):
        PriceHistogram.load(tmp_path / "none.json")
