"""What the hashed tables share: a hash of ids in torch, and the number of rows that a compression leaves.

Row 0, the unknown id, is outside of every scheme: it has rows of its own, which no other id reads. The others are hashed as the
running numbers id - 1.
"""

from __future__ import annotations

from torch import Tensor

from shortlist.errors import ConfigError

GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio as a signed number; odd, so multiplying by it loses nothing
_FIRST = -0x00AE502812AA7333  # 0xff51afd7ed558ccd
_SECOND = -0x3B314601E57A13AD  # 0xc4ceb9fe1a85ec53


def mixed(codes: Tensor, seed: int = 0) -> Tensor:
    """A hash of int64 codes of any shape, at least 0: the 64-bit finaliser of MurmurHash3, its top bit dropped.

    Different seeds give hashes that have nothing to do with each other. Products wrap around as unsigned ones do.
    """
    x = codes + (seed + 1) * GOLDEN % (1 << 63)
    for factor in (_FIRST, _SECOND):
        x = (x ^ _shifted(x)) * factor
    return (x ^ _shifted(x)) & ((1 << 63) - 1)


def _shifted(x: Tensor) -> Tensor:
    """x >> 33 as of an unsigned number."""
    return (x >> 33) & ((1 << 31) - 1)


def rows_left(num_rows: int, compression: float) -> int:
    """Rows for the ids of a table of `num_rows` (unknown row included) that is to shrink `compression` times; at least 1."""
    return max(1, round((num_rows - 1) / compression))


def check_compression(compression: float) -> None:
    """Raises ConfigError below 1."""
    if not compression >= 1:
        raise ConfigError(f"compression must be at least 1 (ids per row), got {compression}")
