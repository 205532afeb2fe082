"""Memory and files of a process over time, and whether they grow: samples from /proc, and a slope with an interval that is not fooled by
samples that resemble their neighbours.

n samples.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
KIB = 1 << 10
MIB = 1 << 20
BLOCKS = 6
"""Parts of the time whose means an interval is made of."""
T_975 = 2.776
"""Student's 97.5 % point with BLOCKS - 2 degrees of freedom."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A process at one moment."""

    at_s: float
    """On the clock of `time.perf_counter`."""
    rss: int
    """Bytes resident."""
    pss: int
    """Bytes resident, pages shared with other processes by halves, thirds, ..."""
    uss: int
    """Bytes that no other process has a part in."""
    anonymous: int
    """Bytes that stand for no file: heap and stacks."""
    num_files: int
    """Open file descriptors."""
    num_threads: int
    sizes: Mapping[str, int]
    """Bytes of files on disk with what stands beside them (SQLite's -wal and -shm), by name."""


def sample(pid: int, files: Mapping[str, Path]) -> Sample:
    """What /proc says of a process; ProcessLookupError or FileNotFoundError where it has ended."""
    told: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split(":")
        told[name] = int(value.split()[0]) * KIB
    status = Path(f"/proc/{pid}/status").read_text()
    threads = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("Threads:"))
    return Sample(
        at_s=time.perf_counter(),
        rss=told["Rss"],
        pss=told["Pss"],
        uss=told["Private_Clean"] + told["Private_Dirty"],
        anonymous=told["Anonymous"],
        num_files=len(os.listdir(f"/proc/{pid}/fd")),
        num_threads=threads,
        sizes={name: _size(path) for name, path in files.items()},
    )


class Sampler:
    """Samples of a process every few seconds, in a thread; ends by itself with the process."""

    def __init__(self, pid: int, files: Mapping[str, Path], every_s: float) -> None:
        self.pid, self.files, self.every_s = pid, files, every_s
        self.samples: list[Sample] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._take, daemon=True)
        self._thread.start()

    def _take(self) -> None:
        with suppress(OSError):
            while True:
                self.samples.append(sample(self.pid, self.files))
                if self._done.wait(self.every_s):
                    return

    def stop(self) -> list[Sample]:
        """No further sample; those there are."""
        self._done.set()
        self._thread.join()
        return self.samples


@dataclass(frozen=True, kw_only=True, slots=True)
class Slope:
    """How fast something grows, per unit of the time it was given in."""

    slope: float
    low: float
    high: float
    """Ends of the 95 % interval."""


def slope_of(at_n: Sequence[float] | Float, value_n: Sequence[float] | Float) -> Slope:
    """Least squares through (at, value), and a 95 % interval that holds though samples resemble their neighbours.

    The interval is Student's, of the line through the means of `BLOCKS` stretches of time (batch means, as in Law and Carson, Operations
    Research 1979): means of stretches hardly depend on each other where the samples forget within a stretch. Drawn from x(t) = c x(t - 1) +
    noise, 288 samples without a slope lie within it in 94 % of cases for c = 0 and 0.8, and in 90 % for 0.95.

    Raises ValueError for fewer than two samples in a stretch.
    """
    at, value = np.asarray(at_n, dtype=np.float64), np.asarray(value_n, dtype=np.float64)
    if len(at) < 2 * BLOCKS:
        raise ValueError(f"a slope needs at least {2 * BLOCKS} samples, got {len(at)}; sample more often or longer")
    slope, _ = _line(at, value)
    parts = [
        (stretch.mean(), other.mean())
        for stretch, other in zip(np.array_split(at, BLOCKS), np.array_split(value, BLOCKS))
    ]
    margin = T_975 * _line(*np.array(parts).T)[1]
    return Slope(slope=slope, low=slope - margin, high=slope + margin)


def _line(at: Float, value: Float) -> tuple[float, float]:
    """Slope by least squares, and its standard error where the samples are independent."""
    from_mean = at - at.mean()
    spread = float(from_mean @ from_mean)
    slope = float(from_mean @ value) / spread
    rest = value - value.mean() - slope * from_mean
    return slope, float(np.sqrt(rest @ rest / (len(at) - 2) / spread))


def _size(path: Path) -> int:
    total = 0
    for suffix in ("", "-wal", "-shm"):
        with suppress(OSError):
            total += path.with_name(path.name + suffix).stat().st_size
    return total
