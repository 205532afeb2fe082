"""A run of the ring shop with offers, for tests of allocation: nothing in it is trained, most systems learn no weights."""

from __future__ import annotations

from pathlib import Path

from engine_support import prepared_cascade, shop_dataset
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
