"""The cascade's tests use the tiny systems of the contract tests, and two of their own that no other test sees."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from shortlist import registry
from shortlist.cascade.cascade import Cascade, stage_space
from shortlist.cascade.config import RunConfig
from shortlist.data.batches import Batch
from shortlist.models.base import Cost, ItemScorer, RequestShape, Reranker, top_k_of_candidates
from shortlist.registry import ENVIRONMENT, system
from support import planted_view

torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other
_TINY = str(Path(__file__).parent.parent / "contracts" / "systems")
if _TINY not in os.environ.get(ENVIRONMENT, "").split(os.pathsep):
    os.environ[ENVIRONMENT] = os.pathsep.join(filter(None, [os.environ.get(ENVIRONMENT), _TINY]))


@dataclass(frozen=True, kw_only=True)
class ReverseConfig:
    pass


class Reverse(Reranker):
    """Shows the best k candidates, worst first: an order that nothing else makes."""

    Config = ReverseConfig

    def rerank(self, batch, scores, k):
        best = top_k_of_candidates(batch.candidate_rows, scores, k)
        return type(best)(best.rows.flip(1), best.scores.flip(1))

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        return Cost(item_flops=1.0, bytes=1.0)


@dataclass(frozen=True, kw_only=True)
class CountingConfig:
    sign: float = 1.0
    """-1 puts the rarest item first."""


class Counting(ItemScorer):
    """Items by their number of training events."""

    Config = CountingConfig

    def prepare(self, view):
        counts = torch.bincount(torch.from_numpy(view.histories.item), minlength=self.space.num_items + 1)
        self.buffer("counts_N", self.config.sign * counts.float())

    def score_all(self, batch: Batch):
        return self.counts_N.expand(batch.size, -1).clone()

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        return Cost(item_flops=1.0, bytes=4.0 * shape.num_items)


@pytest.fixture(scope="module", autouse=True)
def own_systems():
    registry.discover()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
        system("tiny-reverse", stage="re-ranking", paper="baseline")(Reverse)
        system("tiny-counting", stage="retrieval", paper="baseline", cold_users=True)(Counting)
        yield


@pytest.fixture
def make_cascade():
    """Build a cascade over the planted shop from TOML: every system prepared, none trained."""

    def make(text: str) -> Cascade:
        config, view = RunConfig.from_toml(text), planted_view()
        systems = {}
        for stage in config.stages:
            for name in stage.systems:
                torch.manual_seed(0)
                choice = config.systems[name]
                systems[name] = choice.entry.cls(choice.settings, stage_space(config, view.space, stage.name))
                systems[name].prepare(view)
        return Cascade(config, view.space, systems)

    return make
