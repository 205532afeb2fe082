"""Samplers: the draws follow the stated chances, and the chances are those of the draws."""

import math

import pytest
import torch

from shortlist.data.jagged import Jagged
from shortlist.data.samplers import (
    InBatchSampler,
    PopularitySampler,
    UniformSampler,
    draw_outside,
    mixed_log_expected,
    update_streaming_interval,
)
from shortlist.errors import ConfigError, DataError

COUNTS = torch.tensor([50, 8, 0, 1, 4, 27])  # row 0 has a count here to show that it is never drawn


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def chi_square(drawn: torch.Tensor, chance: torch.Tensor) -> float:
    expected = chance * drawn.numel()
    seen = torch.bincount(drawn.flatten(), minlength=len(chance))
    assert not seen[chance == 0].any()
    live = chance > 0
    return (((seen - expected) ** 2)[live] / expected[live]).sum().item()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.75, 1.0])
def test_popularity_draws_follow_counts_to_the_power(alpha):
    sampler = PopularitySampler.of_counts(COUNTS, alpha)
    mass = torch.tensor([0, 8**alpha, 0, 1, 4**alpha, 27**alpha], dtype=torch.float64)
    chance = mass / mass.sum()
    assert (
        chi_square(sampler.draw((400, 500), seeded()), chance) < 16.3
    )  # 0.1 % point of chi-square, 3 degrees of freedom
    torch.testing.assert_close(sampler.log_q(torch.arange(6)).exp(), chance.float())


def test_uniform_draws_known_items_alike():
    sampler = UniformSampler.of_mask(torch.tensor([True, True, False, True, True, True]))
    drawn = sampler.draw((400, 500), seeded())
    chance = torch.tensor([0, 0.25, 0, 0.25, 0.25, 0.25], dtype=torch.float64)
    assert chi_square(drawn, chance) < 16.3
    torch.testing.assert_close(sampler.log_q(drawn[:2]), torch.full((2, 500), math.log(0.25)))
    assert sorted(sampler.draw_distinct(9, seeded()).tolist()) == [1, 3, 4, 5]
    assert len(set(sampler.draw_distinct(3, seeded()).tolist())) == 3


def test_same_seed_same_draws():
    sampler = PopularitySampler.of_counts(COUNTS)
    assert torch.equal(sampler.draw((50,), seeded(1)), sampler.draw((50,), seeded(1)))
    assert not torch.equal(sampler.draw((50,), seeded(1)), sampler.draw((50,), seeded(2)))


def test_in_batch_chance_is_the_share_of_targets():
    log_q = InBatchSampler.of_counts(COUNTS, smoothing=1e-9).log_q(torch.tensor([1, 3, 4, 5]))
    torch.testing.assert_close(log_q.exp(), torch.tensor([8, 1, 4, 27]) / 40)
    assert InBatchSampler.of_counts(COUNTS).log_q(torch.tensor([2])).item() == pytest.approx(math.log(1 / 45))


def test_mixture_counts_what_a_pool_holds():
    """40 draws by popularity and 20 uniform ones: the expected number of each row, against the average of many pools."""
    popular = PopularitySampler.of_counts(COUNTS)
    uniform = UniformSampler(torch.arange(1, 6))
    rows = torch.arange(1, 6)
    expected = mixed_log_expected([(40, popular.log_q(rows)), (20, uniform.log_q(rows))]).exp()
    pools = torch.cat([popular.draw((2000, 40), seeded()), uniform.draw((2000, 20), seeded())], 1)
    seen = torch.bincount(pools.flatten(), minlength=6)[1:] / 2000
    torch.testing.assert_close(expected, seen, rtol=0.03, atol=0.0)
    assert torch.equal(mixed_log_expected([(1, uniform.log_q(rows)), (0, popular.log_q(rows))]), uniform.log_q(rows))


def test_draws_avoid_each_users_own_items():
    sampler = UniformSampler(torch.arange(1, 6))
    forbidden = Jagged.from_rows([[1, 2, 3], [], [5, 5]])
    owner = torch.tensor([0, 2, 1, 0])
    drawn = draw_outside(sampler, forbidden, owner, 4000, seeded(), rounds=30)
    allowed = [{4, 5}, {1, 2, 3, 4}, {1, 2, 3, 4, 5}, {4, 5}]
    for line, items in zip(drawn, allowed):
        assert set(line.tolist()) == items
        share = torch.bincount(line, minlength=6)[sorted(items)] / 4000
        assert (share - 1 / len(items)).abs().max() < 0.04, "what is left must stay uniform"


def test_draws_give_row_zero_where_nothing_is_allowed():
    sampler = UniformSampler(torch.tensor([1, 2]))
    drawn = draw_outside(sampler, Jagged.from_rows([[1, 2], [1]]), torch.tensor([0, 1]), 5, seeded(), rounds=40)
    assert drawn.tolist() == [[0] * 5, [2] * 5]


def test_streaming_interval_finds_the_chance_of_an_item():
    """Row 1 comes every 4th batch, row 2 in every batch, row 3 never."""
    last, interval = torch.zeros(4, dtype=torch.int64), torch.full((4,), 50.0)
    for step in range(1, 201):
        rows = torch.tensor([2, 2, 1]) if step % 4 == 0 else torch.tensor([2])
        update_streaming_interval(last, interval, rows, step, rate=0.1)
    torch.testing.assert_close(interval[1:], torch.tensor([4.0, 1.0, 50.0]), atol=0.3, rtol=0)


def test_wrong_settings_are_refused():
    with pytest.raises(DataError, match="at least one item"):
        PopularitySampler.of_counts(torch.zeros(4))
    with pytest.raises(DataError, match="at least one item"):
        UniformSampler(torch.tensor([], dtype=torch.int64))
    with pytest.raises(ConfigError, match="alpha"):
        PopularitySampler.of_counts(COUNTS, -1.0)
    with pytest.raises(ConfigError, match="negative"):
        mixed_log_expected([])
