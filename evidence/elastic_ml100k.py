"""ELASTIC against SASRec and mean pooling at equal training, and against itself with an interest memory, on ML-100K.

`shortlist prove elastic_ml100k` (wants SHORTLIST_DATA); three seeds, resumes where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

import _next_item as harness
from shortlist.data.batches import Batch
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Space
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab
from shortlist.layers.fields import ItemEncoder
from shortlist.layers.item_sequences import last_of_rows
from shortlist.layers.next_item import NextItemConfig, NextItemLoss
from shortlist.models.base import Cost, Losses, RequestShape, VectorRetriever
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True, slots=True)
class MeanPoolingConfig(NextItemConfig):
    """Settings of the plain baseline."""

    dim: int = 64
    max_history: int = 200


@system("mean-pooling", stage="retrieval", paper="baseline", needs={"history"})
class MeanPooling(VectorRetriever):
    """The mean of the items so far through one hidden layer, under the same objective: what any attention has to beat."""

    Config = MeanPoolingConfig
    feed = "next_event"

    def __init__(self, config: MeanPoolingConfig, space: Space) -> None:
        super().__init__(config, space)
        self.max_history = config.max_history
        self.items = ItemEncoder(space, config.dim, use_fields=False)
        self.map = nn.Sequential(nn.Linear(config.dim, config.dim), nn.ReLU(), nn.Linear(config.dim, config.dim))
        self.objective = NextItemLoss(config, space, has_fields=False)

    def _query(self, rows: Jagged) -> Tensor:
        item_TD = self.items(rows.values)
        running_TD = nn.functional.pad(item_TD.double().cumsum(0), (0, 0, 1, 0))
        sum_TD = running_TD[1:] - running_TD[rows.offsets[rows.row_of_value]]
        mean_TD = (sum_TD / (1 + rows.position_of_value)[:, None]).float()
        return item_TD + mean_TD + self.map(mean_TD)

    def losses(self, batch: Batch) -> Losses:
        """{"next": loss}."""
        assert batch.targets is not None
        rows = batch.history.items
        query_PD = self._query(rows)[batch.targets.position]
        return {"next": self.objective(self.items, query_PD, batch.targets, rows)}

    def encode_user(self, batch: Batch) -> Tensor:
        """float32 [B, D]."""
        rows = batch.history.items.last(self.max_history)
        return self.objective.query(last_of_rows(self._query(rows), rows))

    def encode_items(self, rows: Tensor) -> Tensor:
        """float32 [n, D]."""
        return self.objective.vectors(self.items(rows))

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """One hidden layer, and an inner product per item."""
        return Cost(user_flops=4.0 * self.config.dim**2, item_flops=2.0 * self.config.dim)


SASREC = "SASRec"
EXPERTS = "ELASTIC, 16 experts"
POOLING = "mean pooling"
SETTINGS = {"dim": 64, "dropout": 0.2, "use_fields": False}
ARMS = {
    SASREC: harness.NextItemArm(system="sasrec", settings=SETTINGS),
    EXPERTS: harness.NextItemArm(system="elastic", settings=SETTINGS),
    "ELASTIC, 4 experts": harness.NextItemArm(system="elastic", settings={**SETTINGS, "num_experts": 4}),
    "ELASTIC, interest memory of 16,384": harness.NextItemArm(
        system="elastic", settings={**SETTINGS, "memory_slots": 16_384}
    ),
    POOLING: harness.NextItemArm(system="mean-pooling", settings={"dim": 64}),
}
SETTING = harness.Setting(
    data="ml-100k", arms=ARMS, seeds=(0, 1, 2), batch_size=32, epochs=60, patience=10, max_history=200
)
SHARE, OVER_POOLING = 0.98, 1.05

CLAIM = Claim(
    name="elastic_ml100k",
    systems=("elastic", "sasrec"),
    claim="A history compressed into 16 interest tokens at linear cost loses no quality against full self-attention.",
    data="MovieLens-100K (943 users, 1,349 items), users and items with at least 5 events",
    protocol=harness.PROTOCOL
    + " The same loss (full softmax, all positions supervised), cut points, width, layers and patience for "
    "SASRec and ELASTIC; the paper is withdrawn and its tables were not read, so there is no published figure.",
    bar=f"Mean NDCG@10 of ELASTIC with 16 experts at least {SHARE} x SASRec and {OVER_POOLING} x mean pooling.",
)


def run(lab: Lab) -> None:
    """Baselines, then every arm."""
    setting = SETTING
    if lab.quick:
        narrow = {name: harness.quick(arm) for name, arm in ARMS.items()}
        setting = replace(
            SETTING, data="walks", arms=narrow, seeds=(0,), batch_size=64, epochs=3, lr=1e-2, max_history=20
        )
    harness.run_setting(lab, setting)


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bar, and every arm's mean."""
    data = next(iter(arms)).split(": ")[0]
    ndcg = {name.removeprefix(f"{data}: "): arm.metrics["ndcg@10"].mean for name, arm in arms.items()}
    ratio = {name: ndcg[EXPERTS] / max(ndcg[name], 1e-9) for name in (SASREC, POOLING)}
    fails = [
        f"ELASTIC is at {ratio[name]:.2f} x {name}, not {bar}"
        for name, bar in ((SASREC, SHARE), (POOLING, OVER_POOLING))
        if ratio[name] < bar
    ]
    shown = ", ".join(f"{name} {value:.4f}" for name, value in ndcg.items())
    said = f"ELASTIC is at {ratio[SASREC]:.2f} x SASRec and {ratio[POOLING]:.2f} x mean pooling"
    return Judgement("fails" if fails else "holds", ". ".join([*fails, said, f"NDCG@10: {shown}"]) + ".")
