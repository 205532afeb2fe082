"""Energy and carbon of computing, from seconds or from FLOPs, by stated formulas.

    energy [kWh] = watts * busy seconds / 3.6e6 * PUE            carbon [kg CO2e] = energy * grid intensity
    busy seconds = FLOPs / sustained FLOP/s                      where nobody measured them

Performance, FLOPs, energy and carbon belong together in one report at one operating point (PFEC): "GreenFlow", Lu et al., IJCAI 2023,
with the formulas as they are reconstructed in this project.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from shortlist.errors import ConfigError

JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True, kw_only=True, slots=True)
class EnergyConfig:
    """What energy and carbon are reckoned with; every report prints it."""

    watts: float = 10.0
    """Mean power of one busy core, with its share of memory and board: the rated power of the processor over its cores comes near."""
    pue: float = 1.3
    """Power usage effectiveness: what the whole building draws for each watt of the machines. New halls have 1.1, old ones 1.5 and more."""
    grid: float = 0.5
    """Kilograms of CO2e per kilowatt-hour where the machine stands; grids range from below 0.05 to above 0.8."""
    sustained_gflops: float | None = None
    """1e9 FLOPs a second that a core keeps up. Where it is given, energy is told from FLOPs alone too; none = from busy seconds only."""
    power: Literal["auto", "formula"] = "auto"
    """auto = power as CodeCarbon reads it from the processor's own counters, where that is installed and they can be read; else, and with
    formula, watts times busy seconds."""

    def __post_init__(self) -> None:
        if not 0 < self.watts < np.inf:
            raise ConfigError(f"watts must be above 0, got {self.watts}")
        if not 1 <= self.pue < np.inf:
            raise ConfigError(
                f"pue must be at least 1, got {self.pue}: a building draws what its machines draw, and more"
            )
        if not 0 <= self.grid < np.inf:
            raise ConfigError(f"grid must be 0 or above, in kg CO2e per kWh, got {self.grid}")
        if self.sustained_gflops is not None and not 0 < self.sustained_gflops < np.inf:
            raise ConfigError(
                f"sustained_gflops must be above 0, got {self.sustained_gflops}; leave it out where not known"
            )

    def kwh(self, busy_seconds: float) -> float:
        """Energy of so many seconds of one busy core, the building's share included."""
        return self.watts * busy_seconds / JOULES_PER_KWH * self.pue

    def kwh_of_flops(self, flops: float) -> float | None:
        """Energy of so many FLOPs, the building's share included; None where `sustained_gflops` is not known."""
        return None if self.sustained_gflops is None else self.kwh(flops / (self.sustained_gflops * 1e9))

    def kg(self, kwh: float) -> float:
        """CO2e of so much energy."""
        return kwh * self.grid
