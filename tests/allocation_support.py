"""A run of the ring shop with offers, for tests of allocation: nothing in it is trained, most systems learn no weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from engine_support import prepared_cascade, shop_dataset
from shortlist.cascade.allocation.costs import ChainCosts
from shortlist.cascade.run import Run

OFFERING = """
[surface]
k = 4
[data]
valid_share = 0.2
[stages.retrieval]
systems = ["counts", "popularity"]
keep = 18
offers = [{keep = 12}, {systems = ["popularity"], keep = 12}]
[stages.ranking]
systems = ["counts"]
keep = 8
offers = [{systems = ["dnn"], keep = 8}]
[stages.re-ranking]
systems = ["mmr"]
[systems.dnn]
dim = 4
widths = [8]
"""
"""Six chains: counts know what follows on the ring, popularity does not, and dnn, which was never trained, costs most."""


def offering_run(folder: Path = Path("shop"), text: str = OFFERING, version: str = "version-1") -> Run:
    """The run as `load_run` gives it."""
    dataset = shop_dataset()
    cascade = prepared_cascade(dataset, text)
    return Run(folder=folder, dataset=dataset, config=cascade.config, cascade=cascade, version=version)


def told_costs(costs: Mapping[str, float]) -> Callable[..., ChainCosts]:
    """Stands in for `measure_costs`: so many milliseconds by chain, half of them in a batch, and ten times as many MFLOP."""

    def measure(cascade, dataset, requests, chains, *, seed, tell):
        ms_J = np.array([costs[chain.name] for chain in chains])
        return ChainCosts(
            names=tuple(chain.name for chain in chains),
            mflop_J=10 * ms_J,
            alone_J=ms_J,
            batched_J=ms_J / 2,
            measured_alone_J=ms_J,
            measured_batched_J=ms_J / 2,
            agreement={"mflop_alone": 1.0, "again_alone": float("nan")},
            num_requests=1,
            machine={},
        )

    return measure
