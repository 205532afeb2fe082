"""COLD: a pre-ranker with a full MLP over the fields that squeeze-and-excitation scores name as the most telling.

"COLD: Towards the Next Generation of Pre-Ranking System", Wang et al., DLP-KDD 2020 (arXiv 2007.16122). Every field's vector is weighed by
a score that all fields together decide, s = sigmoid(W [v_1; ...; v_M] + b); after training the fields with the highest mean score are kept
and the network is trained on with them alone. The scores know nothing of cost: several numbers of fields are tried by hand, and the best
that is fast enough is taken; so `choice.keep` is the setting to vary. Of its system work two parts are here: fields that compare user and
item are computed column by column for all candidates at once, and `linear_log` squashes what enters the tower.

    linear_log(x) = x from -1 to 1, sign(x) (log|x| + 1) beyond

Differences from the paper, of which only the abstract and summaries were read: training goes on from the weights of the first phase,
where the paper trains anew; half-precision inference is left out, since a CPU gains nothing by it; the loss is a softmax over a request's
candidates unless "bce" is chosen. The body is FSCD's (layers/selected_fields.py).

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
from shortlist.layers.selection import ChoiceConfig, ExcitationGates
from shortlist.models.base import Cost, Losses, Phase, Ranker, RequestShape, Scores
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True, slots=True)
class COLDConfig(PreRankingConfig):
    """Settings of COLD."""

    choice: ChoiceConfig = ChoiceConfig(keep=8)  # noqa: RUF009  (frozen)
    """How many fields stay."""
    linear_log: bool = True
    """Squash all numbers that enter the tower."""

    def __post_init__(self) -> None:
        self.check("cold")


@system(
    "cold",
    stage="pre-ranking",
    paper="Wang et al., DLP-KDD 2020",
    cold_users=True,
    cold_items=True,
    tiny={
        "fields": FieldsConfig(dim=8, max_history=10),
        "head": TowerConfig(widths=(16,), activation="relu", dropout=0.0),
    },
)
class COLD(Ranker):
    """An MLP over the fields with the highest mean squeeze-and-excitation scores."""

    Config = COLDConfig

    def __init__(self, config: COLDConfig, space: Space) -> None:
        super().__init__(config, space)
        self.max_history = config.fields.max_history
        self.body = PreRankingBody(space, config, ExcitationGates, squash=config.linear_log)

    def prepare(self, view: View) -> None:
        """Measure what fields cost, where that is asked for: for the report, and for a budget."""
        self.body.price(view)

    def take_shape(self, tensors: Mapping[str, Tensor]) -> None:
        """Narrow to the fields of the saved weights."""
        self.body.take_shape(tensors, "body.")

    def phases(self) -> tuple[Phase, ...]:
        """Scores are learned, then fields chosen, then the rest trained on; the last alone where the fields are settled."""
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
        """By task, as `config.head.loss` says."""
        return self.body.losses(batch)

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """Of the fields that are kept (before the choice: of all): their maps, their columns of the first layer, the rest of the tower."""
        return Cost(
            user_flops=0.0 if cached else self.body.request_flops(shape.num_history),
            item_flops=self.body.candidate_flops,
            bytes=self.body.bytes_read(shape.num_history, shape.num_candidates, cached=cached),
        )
