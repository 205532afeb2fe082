"""FSCD: a pre-ranker that reads crosses and an MLP, and pays for it with the fields it does without.

"Towards a Better Tradeoff between Effectiveness and Efficiency in Pre-Ranking: A Learnable Feature Selection based Approach", Ma et al.,
SIGIR 2021 (arXiv 2105.07706). Making fields and computing with them take about half of a pre-ranker's time each; a field that is left
out saves in both halves, a narrower network in one:

    select    every field's vector times a gate that is nearly 0 or 1; the loss pays each gate's field cost (layers/selection.py)
    choose    the fields that are wanted most, as many as a budget of cost allows, or a given number
    tune      the same network over the kept fields alone, from the weights of the first phase, without gates

Served is an ordinary MLP over the kept fields: the others are neither gathered nor multiplied, and its first layer is as wide as the kept
ones. Train with some weight decay (`[trainer.fscd] weight_decay`), lest the weights behind a gate grow until the gate means nothing.

Differences from the paper: see layers/selection.py for the cost term; costs are declared by kind and name, or measured, since the paper's
factors are not published; a budget of cost may stand in place of the number of fields; the loss is a softmax over a request's candidates
unless "bce" is chosen; at least one field of the candidate always stays. `gates.cost_aware = false` is Dropout Feature Ranking, and
`choice.epochs = 0` the same network over all fields that are named, without a choice. What was not recovered of the paper (the factors of
the cost, learning rates, the number of fields) has defaults of our own.

B requests, t candidates end to end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from shortlist.data.batches import Batch, Candidates
from shortlist.data.histories import View
from shortlist.data.schema import Space
from shortlist.layers.field_matrix import FieldsConfig
from shortlist.layers.scoring import TowerConfig
from shortlist.layers.selected_fields import PreRankingBody, PreRankingConfig, State
from shortlist.layers.selection import ChoiceConfig, ConcreteGates, GatesConfig
from shortlist.models.base import Cost, Losses, Phase, Ranker, RequestShape, Scores
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True, slots=True)
class FSCDConfig(PreRankingConfig):
    """Settings of FSCD."""

    gates: GatesConfig = GatesConfig()  # noqa: RUF009  (frozen)
    """How fields are chosen."""

    def __post_init__(self) -> None:
        self.check("fscd")


@system(
    "fscd",
    stage="pre-ranking",
    paper="Ma et al., SIGIR 2021",
    cold_users=True,
    cold_items=True,
    tiny={
        "fields": FieldsConfig(dim=8, max_history=10),
        "head": TowerConfig(widths=(16,), activation="relu", dropout=0.0),
        "choice": ChoiceConfig(budget=0.5),
    },
)
class FSCD(Ranker):
    """An MLP over few fields, chosen by gates that weigh what a field tells against what it costs."""

    Config = FSCDConfig

    def __init__(self, config: FSCDConfig, space: Space) -> None:
        super().__init__(config, space)
        self.max_history = config.fields.max_history
        self.body = PreRankingBody(space, config, lambda num_fields, dim: ConcreteGates(num_fields, config.gates))

    def prepare(self, view: View) -> None:
        """Measure what fields cost, where that is asked for."""
        self.body.price(view)

    def take_shape(self, tensors: Mapping[str, Tensor]) -> None:
        """Narrow to the fields of the saved weights."""
        self.body.take_shape(tensors, "body.")

    def phases(self) -> tuple[Phase, ...]:
        """Choosing, then fine-tuning; the second alone where the fields are settled."""
        select = Phase(name="select", feed="candidates", losses=self.losses, epochs=self.config.choice.epochs)
        tune = Phase(name="tune", feed="candidates", losses=self.losses, before=self.body.settle)
        return (tune,) if self.body.gates is None else (select, tune)

    def user_state(self, batch: Batch) -> State:
        """What depends on the request alone: its share of the first layer [B, W], and codes of its past with their shares [B, S]."""
        return self.body.user_state(batch)

    def score_candidates(self, state: State, candidates: Candidates) -> Scores:
        """Logits [t] per task."""
        return self.body.score_candidates(state, candidates)

    def losses(self, batch: Batch) -> Losses:
        """By task as `config.head.loss` says, and in the first phase what the gates pay."""
        return self.body.losses(batch)

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """Of the fields that are kept (before the choice: of all): their maps, their columns of the first layer, the rest of the tower."""
        return Cost(
            user_flops=0.0 if cached else self.body.request_flops(shape.num_history),
            item_flops=self.body.candidate_flops,
            bytes=self.body.bytes_read(shape.num_history, shape.num_candidates, cached=cached),
        )
