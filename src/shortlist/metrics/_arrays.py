"""Checks and conversions that all metrics share: arrays or tensors in, checked numpy arrays out."""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, bfloat16

from shortlist.errors import ConfigError, DataError

Array: TypeAlias = NDArray[Any] | Tensor
Floats: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]
Booleans: TypeAlias = NDArray[np.bool_]

CHUNK_NUMBERS = 4_000_000
"""Most float64 numbers (32 MB) that a chunked loop holds at once in one temporary array."""


def to_numpy(values: Array) -> NDArray[Any]:
    """The same numbers as a numpy array on the CPU; bfloat16, which numpy lacks, becomes float32."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return np.asarray((values.float() if values.dtype == bfloat16 else values).numpy())
    return np.asarray(values)


def floats(name: str, values: Array, *, length: int | None = None) -> Floats:
    """`values` as float64 [n]. Raises DataError on another shape, another length than asked, text or NaN."""
    array = to_numpy(values)
    if array.ndim != 1 or array.dtype.kind not in "biuf":
        raise DataError(f"{name} must be one-dimensional numbers, got shape {array.shape} of {array.dtype}.")
    if length is not None and len(array) != length:
        raise DataError(f"{name} has {len(array):,} entries, but {length:,} are needed: one per row.")
    array = array.astype(np.float64)
    if num_nan := int(np.isnan(array).sum()):
        raise DataError(
            f"{name} has {num_nan:,} NaN in {len(array):,} entries; leave those rows out, or find their cause."
        )
    return array


def finite(name: str, values: Array, *, length: int | None = None) -> Floats:
    """Like `floats`, and raises DataError on infinities as well."""
    array = floats(name, values, length=length)
    if num_infinite := int(np.isinf(array).sum()):
        raise DataError(
            f"{name} has {num_infinite:,} infinite entries in {len(array):,}; this metric needs finite numbers."
        )
    return array


def integers(name: str, values: Array, *, ndim: int) -> Integers:
    """`values` as int64 with `ndim` dimensions, none negative. Raises DataError otherwise."""
    array = to_numpy(values)
    if array.ndim != ndim or array.dtype.kind not in "iu":
        raise DataError(f"{name} must be integers with {ndim} dimension(s), got shape {array.shape} of {array.dtype}.")
    array = array.astype(np.int64, copy=False)
    if array.size and array.min() < 0:
        raise DataError(f"{name} has the negative entry {array.min()}; item rows start at 1, and 0 means nothing.")
    return array


def positive(name: str, value: int, *, most: int | None = None) -> int:
    """`value` if it lies in 1..most. Raises ConfigError otherwise."""
    if value < 1 or (most is not None and value > most):
        limit = "at least 1" if most is None else f"between 1 and {most:,}"
        raise ConfigError(f"{name} must be {limit}, got {value}.")
    return value


def chunks(total: int, numbers_per_row: int) -> list[slice]:
    """Slices that cut `total` rows so that one slice holds at most `CHUNK_NUMBERS` numbers (but at least one row)."""
    step = max(1, CHUNK_NUMBERS // max(1, numbers_per_row))
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]
