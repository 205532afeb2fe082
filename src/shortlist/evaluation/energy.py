"""Performance, FLOPs, energy and carbon of a served run, at one operating point and per 1,000 requests.

    busy seconds     processor time of this process, all threads: reading the requests' pasts and running the cascade. HTTP is left out.
    FLOPs            as the systems state them, added up by the meter
    energy           CodeCarbon's reading where the processor's power counters can be read, else watts * busy seconds; times PUE
    carbon           energy * intensity of the grid

See `cascade/power.py` for the formulas. All chains, and the allocator, answer the same requests and take turns, so that what else the
machine does falls on all of them. R requests of a part, k items of a page.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from shortlist.cascade.allocation.calibration import Allocation
from shortlist.cascade.cascade import Cascade
from shortlist.cascade.lessons import make_batch
from shortlist.cascade.meter import Meter, Summary
from shortlist.cascade.power import EnergyConfig
from shortlist.cascade.run import Run, as_of
from shortlist.data.batches import Batch
from shortlist.data.histories import Int, Requests
from shortlist.errors import ConfigError, DataError
from shortlist.evaluation.evaluate import Window, held_out, judge_pages, over_users
from shortlist.evaluation.tables import aligned, cell
from shortlist.extras import installed, library
from shortlist.metrics import Interval

BATCH = 16
"""Requests answered at once, as a busy server does."""
WAITING = 8
"""Batches of requests that wait together, so that those whose chains are alike can be grouped."""
ALLOCATED = "allocated"


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """What one way of serving brings, and what it takes, over all its requests."""

    name: str
    """The chain, or "allocated"."""
    num_requests: int
    metric: str
    quality: Interval
    mflop: float
    """1e6 FLOPs of all requests."""
    busy_seconds: float
    """Of one core, all requests."""
    kwh: float
    """Of all requests, the building's share included."""
    kg: float
    """CO2e of all requests."""
    source: str
    """Where the energy is from."""
    config: EnergyConfig
    kwh_of_flops: float | None = None
    """Energy as FLOPs alone tell it, where the settings allow it."""

    def per_thousand(self, amount: float) -> float:
        """An amount of all requests as one of 1,000."""
        return amount / self.num_requests * 1_000

    def as_dict(self) -> dict[str, Any]:
        """For JSON; amounts are per 1,000 requests."""
        of = self.per_thousand
        return {
            "chain": self.name,
            "num_requests": self.num_requests,
            "performance": {"metric": self.metric, **asdict(self.quality)},
            "per_1000_requests": {
                "gflop": of(self.mflop) / 1e3,
                "busy_seconds": of(self.busy_seconds),
                "energy_kwh": of(self.kwh),
                "carbon_kg": of(self.kg),
                "energy_kwh_of_flops": None if self.kwh_of_flops is None else of(self.kwh_of_flops),
            },
            "energy_source": self.source,
            "settings": asdict(self.config),
        }


def footprint(
    summary: Summary,
    *,
    name: str,
    busy_seconds: float,
    metric: str,
    quality: Interval,
    config: EnergyConfig,
    measured_kwh: float | None = None,
) -> Footprint:
    """Performance, FLOPs, energy and carbon of what a meter counted.

    Args:
        summary: the meter's reading.
        name: how tables call it.
        busy_seconds: of one core, for the same requests.
        metric: of `quality`, such as ndcg@10.
        config: watts, PUE and grid.
        measured_kwh: what the machine drew meanwhile, where its power could be read.

    Raises DataError where the meter has counted nothing, or an amount is negative.
    """
    if not summary.num_requests:
        raise DataError("the meter has counted no request, so there is no footprint; serve some first")
    for what, amount in (("busy seconds", busy_seconds), ("measured energy", measured_kwh or 0.0)):
        if not 0 <= amount < np.inf:
            raise DataError(f"{what} must be 0 or above, got {amount}")
    if measured_kwh is None:
        kwh, source = config.kwh(busy_seconds), f"{config.watts:g} W for each busy second of a core"
    else:
        kwh, source = (
            measured_kwh * config.pue,
            "power counters of the processor, the whole machine, read by CodeCarbon",
        )
    return Footprint(
        name=name,
        num_requests=summary.num_requests,
        metric=metric,
        quality=quality,
        mflop=summary.spent_mflop,
        busy_seconds=busy_seconds,
        kwh=kwh,
        kg=config.kg(kwh),
        source=source,
        config=config,
        kwh_of_flops=config.kwh_of_flops(summary.spent_mflop * 1e6),
    )


def measure(
    run: Run,
    chains: Sequence[str] = (),
    *,
    allocation: Allocation | None = None,
    window: Window = "valid",
    max_requests: int = 1_000,
    batch_size: int = BATCH,
    config: EnergyConfig | None = None,
    seed: int = 0,
) -> list[Footprint]:
    """Answer requests of a window with each chain, and say what that brought and took.

    Args:
        run: a trained run.
        chains: names; empty = the default chain.
        allocation: also measured, under the name "allocated": it chooses a chain for each request, and its choosing counts.
        window: whose requests; choose on valid.
        max_requests: a seeded sample of at most so many.
        batch_size: of one chain answered at once, at most.
        config: watts, PUE and grid; None = the run's.
        seed: of the sample, of what an allocator draws, and of intervals.

    Raises ConfigError for a chain that the run does not have, DataError for a window without requests.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    config = config or run.config.energy
    names = [run.config.chain(name).name for name in dict.fromkeys(chains)] or [run.config.default_chain.name]
    k, cascade = run.config.surface.k, as_of(run, window)
    requests = held_out(run.dataset, window, max_requests=max_requests, seed=seed)
    count = -(-len(requests) // (WAITING * batch_size))
    parts = [requests.select(index) for index in np.array_split(np.arange(len(requests)), count)]
    tallies = [_Tally(run, cascade, name, k, batch_size) for name in names]
    if allocation is not None:
        tallies.append(_Tally(run, cascade, ALLOCATED, k, batch_size, allocation, np.random.default_rng(seed)))
    for tally in tallies:
        tally.answer(parts[0])  # what a first call sets up is not the chain's
        tally.forget()
    kwh = _answered(tallies, parts, power_meter(config))
    metric = f"{'value' if run.config.surface.objective == 'value' else 'ndcg'}@{k}"
    found = []
    for tally, measured in zip(tallies, kwh):
        top, bottom = judge_pages(np.concatenate(tally.rows), requests, k)[metric]
        found.append(
            footprint(
                tally.meter.summary(),
                name=tally.name,
                busy_seconds=tally.busy,
                metric=metric,
                quality=over_users(top, bottom, requests.user, seed),
                config=config,
                measured_kwh=measured,
            )
        )
    return found


@dataclass(slots=True)
class _Tally:
    """One way of serving at work."""

    run: Run
    cascade: Cascade
    name: str
    """The chain, where there is no allocation."""
    k: int
    batch_size: int
    allocation: Allocation | None = None
    rng: np.random.Generator | None = None
    meter: Meter = field(default_factory=Meter)
    busy: float = 0.0
    rows: list[Int] = field(default_factory=list)
    """Pages [R, k] of each part."""

    def answer(self, part: Requests) -> None:
        """Requests that wait together: those of one chain are answered together, as many at once as a batch holds."""
        began, rows_Rk, pages = time.process_time(), np.zeros((len(part), self.k), dtype=np.int64), []
        with torch.inference_mode():
            batch = make_batch(self.run.dataset, part, self.cascade.max_history).to(self.cascade.device)
            for chain, index in self._groups(batch):
                for at in range(0, len(index), self.batch_size):
                    some = index[at : at + self.batch_size]
                    page = self.cascade.run(batch.select(torch.from_numpy(some)), k=self.k, chain=chain)
                    rows_Rk[some] = page.rows.cpu().numpy()
                    pages.append(page)
        self.busy += time.process_time() - began
        for page in pages:
            self.meter.add(page.chain, page.reports)
        self.rows.append(rows_Rk)

    def _groups(self, batch: Batch) -> Iterator[tuple[str, Int]]:
        """Chains, and the numbers of the requests that get each."""
        if self.allocation is None:
            yield self.name, np.arange(batch.size)
            return
        made = self.allocation
        chain_R = made.allocator.choose(made.contexts(batch), rng=self.rng).chain_R
        for chain in np.unique(chain_R).tolist():
            yield made.chains.names[chain], np.flatnonzero(chain_R == chain)

    def forget(self) -> None:
        """Count from here."""
        self.meter.reset()
        self.busy = 0.0
        self.rows.clear()


def _answered(
    tallies: Sequence[_Tally], parts: Sequence[Requests], power: Callable[[], Any] | None
) -> list[float | None]:
    """Answer all parts by all tallies; what the machine drew during each, where that can be read."""
    if power is None:
        for part in parts:
            for tally in tallies:
                tally.answer(part)
        return [None] * len(tallies)
    kwh: list[float | None] = []
    for tally in tallies:  # a reading is of the whole machine, so one at a time
        with power() as reading:
            for part in parts:
                tally.answer(part)
        kwh.append(reading[0])
    return kwh


def power_meter(config: EnergyConfig) -> Callable[[], Any] | None:
    """A context manager that yields a list, which holds the machine's kWh when the block has ended; None where power can not be read.

    That takes the extra [energy] and counters that this user may read (RAPL; on Linux: /sys/class/powercap).
    """
    if config.power == "formula" or not installed("codecarbon"):
        return None
    if not library("codecarbon.core.cpu", extra="energy", user="reading power").is_rapl_available():
        return None
    tracker_class = library("codecarbon", extra="energy", user="reading power").OfflineEmissionsTracker

    @contextmanager
    def reading() -> Iterator[list[float]]:
        # The country is asked for and decides on carbon alone, which is reckoned here with `grid`.
        tracker = tracker_class(
            country_iso_code="USA",
            save_to_file=False,
            log_level="error",
            allow_multiple_runs=True,
            measure_power_secs=1,
        )
        found: list[float] = []
        tracker.start()
        try:
            yield found
        finally:
            tracker.stop()
            found.append(float(tracker.final_emissions_data.energy_consumed))

    return reading


def report_dict(footprints: Sequence[Footprint]) -> dict[str, Any]:
    """For JSON: each chain, and what others save against the first."""
    first, *others = footprints
    return {
        "chains": [f.as_dict() for f in footprints],
        "savings": {other.name: savings(first, other) for other in others},
    }


def savings(first: Footprint, other: Footprint) -> dict[str, float | None]:
    """Shares of the first one's FLOPs, busy seconds and energy that the other saves, and how much of the first shows in the second.

    `shown` is the saving in busy seconds over that in FLOPs: below 0.6 or so, fixed overheads dominate. None where no FLOPs are saved.
    """

    def saved(of: Callable[[Footprint], float]) -> float:
        before = first.per_thousand(of(first))
        return 1 - other.per_thousand(of(other)) / before if before else 0.0

    flops, busy = saved(lambda f: f.mflop), saved(lambda f: f.busy_seconds)
    return {
        "flops": flops,
        "busy_seconds": busy,
        "energy": saved(lambda f: f.kwh),
        "shown": busy / flops if flops > 0 else None,
    }


def report_text(footprints: Sequence[Footprint]) -> str:
    """The report for a person, settings included."""
    first, *others = footprints
    rows = [["chain", first.metric, "GFLOP", "busy s", "Wh", "g CO2e"]]
    for f in footprints:
        amounts = (f.mflop / 1e3, f.busy_seconds, f.kwh * 1e3, f.kg * 1e3)
        rows.append([f.name, cell(f.quality), *(f"{f.per_thousand(amount):,.4g}" for amount in amounts)])
    config = first.config
    lines = [
        *aligned(rows),
        "",
        f"Per 1,000 requests, measured on {first.num_requests:,}; busy seconds are of one core.",
    ]
    for other in others:
        by = savings(first, other)
        lines.append(
            f"{other.name} against {first.name}: {by['flops']:+.1%} FLOPs saved, {by['busy_seconds']:+.1%} busy seconds"
            + ("." if by["shown"] is None else f"; {by['shown']:.0%} of the one shows in the other.")
        )
    lines.append(
        f"Energy: {first.source}, times PUE {config.pue:g}. Carbon: energy times {config.grid:g} kg CO2e per kWh."
    )
    if first.kwh_of_flops is not None:
        told = ", ".join(f"{f.name} {f.per_thousand((f.kwh_of_flops or 0.0) * 1e3):,.4g} Wh" for f in footprints)
        lines.append(f"From FLOPs alone, at {config.sustained_gflops:g} GFLOP/s sustained: {told}.")
    return "\n".join(lines)
