"""Hashed tables: codes against closed forms and plain-Python hashes, vectors against the formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shortlist.embeddings.bh import BHConfig, BHTable, block_rows, chosen_blocks, decimal, layouts
from shortlist.embeddings.hashed import HashedConfig, HashedTable
from shortlist.embeddings.hashing import GOLDEN, mixed
from shortlist.embeddings.multi_hash import MultiHashConfig, MultiHashTable
from shortlist.embeddings.quotient_remainder import QuotientRemainderConfig, QuotientRemainderTable, remainders
from shortlist.errors import ConfigError

MASK = (1 << 64) - 1


def num_distinct(codes: torch.Tensor) -> int:
    return len(codes.reshape(len(codes), -1).unique(dim=0))


def murmur_finaliser(x: int) -> int:
    """MurmurHash3's 64-bit finaliser in unsigned Python integers."""
    x ^= x >> 33
    x = x * 0xFF51AFD7ED558CCD & MASK
    x ^= x >> 33
    x = x * 0xC4CEB9FE1A85EC53 & MASK
    return x ^ x >> 33


@given(st.integers(0, (1 << 63) - 1), st.integers(0, 50))
def test_the_hash_is_murmur_s(code, seed):
    assert GOLDEN & MASK == 0x9E3779B97F4A7C15
    expected = murmur_finaliser((code + (seed + 1) * GOLDEN % (1 << 63)) & MASK) & ((1 << 63) - 1)
    assert int(mixed(torch.tensor([code]), seed)) == expected


def test_running_numbers_meet_evenly():
    """n - R of n ids meet another's row; no row holds more than ceil(n / R)."""
    table = HashedTable(1001, 2, HashedConfig(compression=1000 / 300, scramble=False))
    codes = table.codes(torch.arange(1001))
    assert codes[0] == 0
    assert (codes[1:] >= 1).all()
    assert 1000 - num_distinct(codes[1:]) == 700
    assert codes[1:].bincount().max() == 4
    assert table.rows.weight.shape == (301, 2)


@pytest.mark.parametrize("compression", [1.0, 4.0, 100.0])
def test_hashed_rows_in_use_follow_the_closed_form(compression):
    """Of R rows, R (1 - (1 - 1/R)^n) are used, give or take a few standard deviations of the occupancy problem."""
    n = 40_000
    table = HashedTable(n + 1, 1, HashedConfig(compression=compression, seed=3))
    rows = table.num_hashed
    assert rows == round(n / compression)
    empty, both = (1 - 1 / rows) ** n, (1 - 2 / rows) ** n
    variance = rows * (rows - 1) * both + rows * empty - (rows * empty) ** 2
    used = num_distinct(table.codes(torch.arange(1, n + 1)))
    assert abs(used - rows * (1 - empty)) <= 4 * math.sqrt(max(variance, 0)) + 1e-6


def test_another_seed_is_another_hash():
    codes = [
        HashedTable(5001, 1, HashedConfig(seed=seed, compression=5.0)).codes(torch.arange(1, 5001)) for seed in (0, 1)
    ]
    # Two independent hashes into 1000 rows agree on about one id in 1000.
    assert (codes[0] == codes[1]).sum() < 30


def test_several_hashes_separate_what_one_does_not():
    """With k = 2 about n^2 / R^2 pairs of ids share both rows in order, against n^2 / (2R) that share one."""
    n = 20_000
    ids = torch.arange(1, n + 1)
    one = HashedTable(n + 1, 1, HashedConfig(compression=10.0))
    two = MultiHashTable(n + 1, 1, MultiHashConfig(compression=10.0))
    codes = two.codes(ids)
    assert one.rows.weight.shape[0] + 1 == two.rows.weight.shape[0]
    assert n - num_distinct(one.codes(ids)) > 17_000
    expected = n * (n - 1) / 2 / 2000**2
    assert abs((n - num_distinct(codes)) - expected) < 4 * math.sqrt(expected)


def test_multi_hash_by_hand():
    table = MultiHashTable(50, 3, MultiHashConfig(compression=5.0, num_hashes=3, importance=1.0))
    with torch.no_grad():
        table.importance.weight.copy_(torch.randn(50, 3))
    ids = torch.tensor([[4, 0], [49, 7]])
    codes = table.codes(ids)
    assert codes[0, 1].tolist() == [0, 1, 2]  # the unknown id's own rows
    assert (table.codes(torch.arange(1, 50)) >= 3).all()
    assert table.importance.weight.shape == (50, 3)
    for i in range(2):
        for j in range(2):
            weight = table.importance.weight[ids[i, j]]
            expected = sum(weight[k] * table.rows.weight[codes[i, j, k]] for k in range(3))
            torch.testing.assert_close(table(ids)[i, j], expected)


def test_hashed_importance_shares_weights():
    table = MultiHashTable(101, 2, MultiHashConfig(importance=10.0))
    codes = table.weight_codes(torch.arange(101))
    assert codes[0] == 0
    assert set(codes[1:].tolist()) <= set(range(1, 11))
    assert table.importance.weight.shape == (11, 2)


@given(st.integers(1, 5000), st.floats(1, 3000))
@settings(max_examples=60, deadline=None)
def test_quotient_and_remainder_name_one_id(n, compression):
    table = QuotientRemainderTable(n + 1, 1, QuotientRemainderConfig(compression=compression))
    quotient, remainder = table.codes(torch.arange(n + 1))
    assert num_distinct(torch.stack([quotient, remainder], 1)) == n + 1
    assert (quotient[0], remainder[0]) == (0, 0)
    assert (quotient[1:] > 0).all()
    assert quotient.max() < len(table.quotient.weight)
    assert remainder.max() < len(table.remainder.weight)


@pytest.mark.parametrize(("n", "budget"), [(100, 20), (100, 25), (101, 50), (7, 6), (1000, 64), (1, 2), (2, 3)])
def test_most_remainders_within_the_budget(n, budget):
    fitting = [m for m in range(1, n + 1) if m + math.ceil(n / m) <= budget]
    fewest = min(m + math.ceil(n / m) for m in range(1, n + 1))
    m = remainders(n, budget)
    assert m == max(fitting) if fitting else m + math.ceil(n / m) == fewest


def test_a_quotient_remainder_table_too_small_takes_the_smallest():
    """2 sqrt(n): 100 + 100 rows for 10,000 ids, and one of each for the unknown id."""
    table = QuotientRemainderTable(10_001, 4, QuotientRemainderConfig(compression=1000.0))
    assert table.num_floats == 2 * 101 * 4


@pytest.mark.parametrize("op", ["multiply", "add"])
def test_quotient_remainder_by_hand(op):
    """11 ids in 4 + 3 rows: id 10 is number 9 = 2 * 4 + 1."""
    table = QuotientRemainderTable(12, 3, QuotientRemainderConfig(compression=11 / 7, op=op))
    assert table.num_remainders == 4
    one, other = table.quotient.weight[3], table.remainder.weight[2]
    torch.testing.assert_close(table(torch.tensor(10)), one * other if op == "multiply" else one + other)


@given(st.integers(1, 3000), st.floats(1, 3000), st.sampled_from(["succession", "skip"]), st.booleans())
@settings(max_examples=120, deadline=None)
def test_binary_codes_are_unique_at_every_size(n, compression, strategy, scramble):
    table = BHTable(n + 1, 1, BHConfig(compression=compression, strategy=strategy, scramble=scramble))
    codes = table.codes(torch.arange(n + 1))
    assert num_distinct(codes) == n + 1
    assert codes.min() >= 0
    assert codes.max() < len(table.rows.weight)
    # No row belongs to two blocks, and the unknown id's rows are its own.
    owners = [set(codes[:, j].tolist()) for j in range(codes.shape[1])]
    assert sum(map(len, owners)) == len(set().union(*owners))
    assert not set(codes[0].tolist()) & set(codes[1:].reshape(-1).tolist())


def test_binary_codes_by_hand():
    """Number 0b1101101 in blocks of 3 neighbours: 101, 101, 1; in 3 blocks by skipping: bits 0 3 6, 1 4, 2 5."""
    number = torch.tensor([0b1101101])
    succession = [((0, 1, 2), 0b101), ((3, 4, 5), 0b101), ((6,), 1)]
    skip = [((0, 3, 6), 0b111), ((1, 4), 0b00), ((2, 5), 0b11)]
    assert tuple(block for block, _ in succession) in list(layouts(7, "succession"))
    assert tuple(block for block, _ in skip) in list(layouts(7, "skip"))
    for block, expected in succession + skip:
        assert decimal(number, block).item() == expected
    high = torch.tensor([(1 << 40) | 1])
    assert decimal(high, (0, 40)).item() == 3  # blocks far apart, beyond 32 bits


@pytest.mark.parametrize(("compression", "sizes"), [(1, [1 << 20]), (512, [1024] * 2), (2730, [128, 128, 64])])
def test_table_sizes_of_a_million_ids(compression, sizes):
    """B = 1, 2, 3 of the paper's arithmetic at S = 20."""
    blocks = chosen_blocks((1 << 20) - 1, 20, round((1 << 20) / compression), "succession", shared=False)
    assert block_rows(blocks, (1 << 20) - 1) == sizes


def test_the_largest_layout_within_the_budget_is_taken():
    """n = 1000 ids, all sizes by brute force; where none fits, the smallest."""
    for strategy in ("succession", "skip"):
        sizes = [sum(block_rows(blocks, 999)) for blocks in layouts(10, strategy)]
        for budget in (1000, 999, 200, 64, 30, 20, 1):
            chosen = sum(block_rows(chosen_blocks(999, 10, budget, strategy, shared=False), 999))
            assert chosen == max([size for size in sizes if size <= budget], default=min(sizes))


def test_a_block_needs_no_rows_for_numbers_that_do_not_occur():
    """Numbers 0..999 in 5 + 5 bits: the high block ends at 999 >> 5 = 31; 0..767 at 23."""
    assert block_rows(((0, 1, 2, 3, 4), (5, 6, 7, 8, 9)), 767) == [32, 24]


def test_sharing_one_table_makes_ids_the_same():
    """Codes (a, b) and (b, a) have the same sum: of 2^16 pairs of bytes, 256 * 257 / 2 sums are left."""
    n = 1 << 16
    table = BHTable(n + 1, 1, BHConfig(compression=n / 256, shared=True))
    assert table.blocks == (tuple(range(8)), tuple(range(8, 16)))
    codes = table.codes(torch.arange(1, n + 1)).sort(1).values
    assert num_distinct(codes) == 256 * 257 // 2
    assert len(table.rows.weight) == 257


def test_the_vector_is_the_sum_of_the_blocks_rows():
    table = BHTable(1001, 4, BHConfig(compression=20.0))
    ids = torch.tensor([[0, 1], [1000, 513]])
    codes = table.codes(ids)
    expected = torch.stack([table.rows.weight[code].sum(0) for code in codes.reshape(4, -1)]).view(2, 2, 4)
    torch.testing.assert_close(table(ids), expected)


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (BHTable, BHConfig),
        (MultiHashTable, MultiHashConfig),
        (HashedTable, HashedConfig),
        (QuotientRemainderTable, QuotientRemainderConfig),
    ],
)
@pytest.mark.parametrize("compression", [2.0, 20.0])
def test_vectors_start_at_the_same_scale_at_every_size(cls, config, compression):
    torch.manual_seed(0)
    table = cls(20_001, 16, config(compression=compression, init_std=0.1))
    assert table.weight()[1:].std().item() == pytest.approx(0.1, rel=0.15)


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (BHConfig, {"compression": 0.5}, "compression must be at least 1"),
        (BHConfig, {"strategy": "jump"}, "succession or skip"),
        (HashedConfig, {"compression": math.nan}, "compression must be at least 1"),
        (HashedConfig, {"init_std": 0.0}, "init_std must be above 0"),
        (MultiHashConfig, {"num_hashes": 0}, "num_hashes must be at least 1"),
        (MultiHashConfig, {"importance": 0.1}, "importance must be at least 1"),
        (QuotientRemainderConfig, {"op": "concat"}, "multiply or add"),
    ],
)
def test_unusable_settings_are_refused(config, values, message):
    with pytest.raises(ConfigError, match=message):
        config(**values)
