"""Samples of a process and the slope through them, as benchmarks/soak.py uses them (benchmarks/_memory.py, which is no package)."""

import mmap
import os

import numpy as np
import pytest

from cli_support import benchmark

MIB = 1 << 20


@pytest.fixture(scope="module")
def memory():
    return benchmark("_memory")


def wandering(lot, n, keep):
    """Values each of which has a share of the one before."""
    value = np.zeros(n)
    for place in range(1, n):
        value[place] = keep * value[place - 1] + lot.normal()
    return value


@pytest.mark.parametrize("keep", [0.0, 0.8])
@pytest.mark.parametrize("slope", [0.0, 0.3])
def test_the_interval_holds_the_slope_though_neighbours_resemble_each_other(memory, keep, slope):
    lot, at, hits = np.random.default_rng(0), np.arange(288.0), 0
    for _ in range(300):
        found = memory.slope_of(at, slope * at + wandering(lot, len(at), keep))
        assert found.slope == pytest.approx(slope, abs=0.06)
        hits += found.low <= slope <= found.high
    assert 0.91 < hits / 300 < 0.98


def test_a_straight_line_is_found_exactly_and_too_few_samples_are_refused(memory):
    found = memory.slope_of(np.arange(50.0), 7 + 2.5 * np.arange(50.0))
    assert (found.slope, found.low, found.high) == pytest.approx((2.5, 2.5, 2.5))
    with pytest.raises(ValueError, match="at least 12 samples, got 9"):
        memory.slope_of(np.arange(9.0), np.arange(9.0))


def test_a_sample_sees_memory_files_and_sizes_of_a_process(memory, tmp_path):
    (tmp_path / "a.db").write_bytes(bytes(300))
    (tmp_path / "a.db-wal").write_bytes(bytes(40))
    before = memory.sample(os.getpid(), {"a": tmp_path / "a.db", "b": tmp_path / "none.db"})
    # A mapping of its own: what an array takes may be memory that the process has let go of and still holds.
    held = mmap.mmap(-1, 30 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    held.write(b"1" * len(held))
    with (tmp_path / "a.db").open():
        after = memory.sample(os.getpid(), {})
    assert before.sizes == {"a": 340, "b": 0}
    assert after.num_files == before.num_files + 1
    for name in ("rss", "uss", "anonymous"):
        assert 25 * MIB < getattr(after, name) - getattr(before, name) < 40 * MIB
    held.close()
