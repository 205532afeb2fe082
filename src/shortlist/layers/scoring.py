"""What rankers of given candidates share: the request's side computed once, pair fields, and losses per task.

B requests, t candidates of all requests end to end, E history events of the batch end to end, D width of a vector, R width of the
request's side, V of a candidate's side, W of the first hidden layer, F fields, T tasks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from shortlist.data.batches import Batch, Candidates, History
from shortlist.data.histories import View
from shortlist.data.schema import Numeric, Space
from shortlist.embeddings.base import Table, TableChoice, dropped_ids, make_table, tables_of
from shortlist.errors import ConfigError, DataError
from shortlist.layers.adaptive import APGConfig
from shortlist.layers.fields import FieldEmbeddings
from shortlist.layers.gates import GateConfig, PriorFields, TowerGates, prior_groups, start_at_one
from shortlist.layers.losses import binary_loss, softmax_ranking_loss
from shortlist.layers.towers import MLP, Activation, Norm

RankingLoss = Literal["softmax", "bce"]
Recency = Literal["none", "gap", "position"]
NUM_RECENCY_BUCKETS = 16  # powers of two: up to 2^15 hours (3.7 years), or 32,768 places from the end


class SplitMLP(nn.Module):
    """An MLP over [request side; candidate side] that does the request's share of its first layer once per request.

    W [r; c] + b = (W_r r + b) + W_c c: the bracket is the same for all candidates of a request and can be kept between calls.
    """

    def __init__(
        self,
        request_width: int,
        candidate_width: int,
        widths: Sequence[int],
        out_width: int,
        *,
        activation: Activation = "relu",
        dropout: float = 0.0,
        norm: Norm = "none",
    ) -> None:
        super().__init__()
        self.request_width = request_width
        self.mlp = MLP(
            request_width + candidate_width, widths, out_width, activation=activation, dropout=dropout, norm=norm
        )
        first = self._first
        self.request_flops = 2 * request_width * first.out_features
        self.candidate_flops = self.mlp.flops_per_row - self.request_flops

    @property
    def _first(self) -> nn.Linear:
        first = self.mlp.layers[0]
        assert isinstance(first, nn.Linear)
        return first

    def keep(self, columns: Tensor, request_width: int) -> None:
        """Read only these columns of the input [n] int64, ascending, of which the first `request_width` are the request's; the weights of
        the kept ones stay as they are."""
        first = self._first
        self.mlp.flops_per_row -= 2 * first.weight.numel()
        first.weight = nn.Parameter(first.weight.detach()[:, columns].clone())
        first.in_features = self.mlp.in_width = len(columns)
        self.mlp.flops_per_row += 2 * first.weight.numel()
        self.request_width = request_width
        self.request_flops = 2 * request_width * first.out_features
        self.candidate_flops = self.mlp.flops_per_row - self.request_flops

    def request_side(self, request_BR: Tensor, batch: Batch | None = None) -> Tensor:
        """float32 [B, W]: the request's share of the first layer, bias included; `batch` is not read."""
        return nn.functional.linear(request_BR, self._first.weight[:, : self.request_width], self._first.bias)

    def forward(
        self, request_BW: Tensor, candidate_tV: Tensor, row_of_t: Tensor, items_t: Tensor | None = None
    ) -> Tensor:
        """float32 [t, out_width] for what `request_side` gave, candidates [t, V], and the request of each [t] int64.

        `items_t` is not read."""
        hidden_tW = nn.functional.linear(candidate_tV, self._first.weight[:, self.request_width :])
        hidden_tW = hidden_tW + request_BW[row_of_t]
        return self.mlp.layers[1:](hidden_tW)


class GatedMLP(nn.Module):
    """A SplitMLP with gates (layers/gates.py), generated weights (layers/adaptive.py), or both.

    What depends on the request alone is looked up once per request; the tower itself runs per candidate, its first layer included, since
    gates and generated weights see the candidate.
    """

    def __init__(
        self, space: Space, request_width: int, blocks: Sequence[int], out_width: int, config: HeadConfig
    ) -> None:
        super().__init__()
        self.request_width = request_width
        groups = prior_groups(config.gates, config.widths)
        if config.apg.fields and config.apg.mode != "off":
            groups["apg"] = (config.apg.fields, config.apg.dim)
        self.priors = PriorFields(space, groups, id_dropout=config.gates.id_dropout)
        self.gates = TowerGates(blocks, config.widths, config.gates, self.priors)
        start_at_one(self.priors)
        self.mlp = MLP(
            sum(blocks),
            config.widths,
            out_width,
            activation=config.activation,
            dropout=config.dropout,
            norm=config.norm,
            apg=config.apg,
            condition_width=self.priors.width("apg") if "apg" in groups else 0,
        )
        self.request_flops = 0
        self.candidate_flops = self.mlp.flops_per_row + linear_flops(self.gates)

    def request_side(self, request_BR: Tensor, batch: Batch | None = None) -> Tensor:
        """float32 [B, R + ...]: the request's side of the input, then what the gates know of the request."""
        assert batch is not None
        return torch.cat([request_BR, self.priors.request(batch)], dim=1)

    def forward(
        self, request_BX: Tensor, candidate_tV: Tensor, row_of_t: Tensor, items_t: Tensor | None = None
    ) -> Tensor:
        """float32 [t, out_width]; as SplitMLP, with the candidates' catalogue rows [t] int64."""
        assert items_t is not None
        request_tX = request_BX[row_of_t]
        priors = self.priors(request_tX[:, self.request_width :], items_t)
        x_tX = self.gates.input(torch.cat([request_tX[:, : self.request_width], candidate_tV], dim=1), priors)
        return self.mlp.gated(x_tX, self.gates.hidden(x_tX, priors), priors.get("apg"))


def make_tower(
    space: Space, request_blocks: Sequence[int], candidate_blocks: Sequence[int], config: HeadConfig
) -> SplitMLP | GatedMLP:
    """The tower that a head's settings ask for, with one output per task.

    Args:
        request_blocks: widths of the fields of the request's side; empty blocks are left out.
        candidate_blocks: the same of the candidate's side.
    """
    blocks = [width for width in (*request_blocks, *candidate_blocks) if width]
    if config.gates.any or config.apg.mode != "off":
        return GatedMLP(space, sum(request_blocks), blocks, len(space.tasks), config)
    return SplitMLP(
        sum(request_blocks),
        sum(candidate_blocks),
        config.widths,
        len(space.tasks),
        activation=config.activation,
        dropout=config.dropout,
        norm=config.norm,
    )


def blocks_of(width: int, dim: int) -> list[int]:
    """A width as fields of `dim` columns where it divides, else as one field."""
    return [dim] * (width // dim) if width % dim == 0 else [width]


class RequestEncoder(nn.Module):
    """User fields, context fields and, if wanted, the user's own id row, end to end: [B, (F + 1) D] at most.

    Unknown users (row 0) read the unknown row, which `id_dropout` trains.
    """

    def __init__(
        self,
        space: Space,
        dim: int,
        *,
        use_user_ids: bool = False,
        id_dropout: float = 0.0,
        table: TableChoice | None = None,
    ) -> None:
        super().__init__()
        self.id_dropout = id_dropout
        self.user_fields = FieldEmbeddings(space.user_fields, dim, table=table)
        self.context_fields = FieldEmbeddings(space.context_fields, dim, table=table)
        self.user_ids = make_table(space.num_users + 1, dim, table) if use_user_ids else None
        num_vectors = len(self.user_fields.fields) + len(self.context_fields.fields) + int(use_user_ids)
        self.width = num_vectors * dim

    def count_ids(self, view: View) -> None:
        """See Counted: events of each user, and of each value of the users' fields; those of a context are not in a view."""
        users = view.users.num_rows
        count = torch.from_numpy(np.diff(view.histories.offsets)[:users].astype(np.int64))
        count = nn.functional.pad(count, (0, users - len(count)))
        if self.user_ids is not None:
            self.user_ids.prepare(count)
        self.user_fields.prepare(view.users.columns, count)

    def forward(self, batch: Batch) -> Tensor:
        """float32 [B, width]."""
        parts = [
            self.user_fields(batch.user_fields, batch.size).flatten(1),
            self.context_fields(batch.context, batch.size).flatten(1),
        ]
        if self.user_ids is not None:
            parts.append(self.user_ids(dropped_ids(batch.user, self.id_dropout if self.training else 0.0)))
        return torch.cat(parts, dim=1)


class PairFeatures(nn.Module):
    """Numbers about (request, candidate) as features: each number itself and `num_bins` ramps over -1..1.

    A ramp is 0 left of its bin, 1 right of it and linear inside, so that a linear map over them is any piecewise-linear curve
    of the number, flat outside -1..1 but for the number's own slope (Gorishniy et al., NeurIPS 2022, equation 1, here with
    fixed equal bins, since pair fields come scaled to about unit range).
    """

    left_K: Tensor

    def __init__(self, fields: Sequence[Numeric], num_bins: int) -> None:
        super().__init__()
        self.names = tuple(f.name for f in fields)
        self.num_bins = num_bins
        self.width = len(self.names) * (1 + num_bins)
        self.register_buffer("left_K", torch.linspace(-1, 1, num_bins + 1)[:-1], persistent=False)

    def keep(self, names: Collection[str]) -> None:
        """Read only the fields of these names from now on."""
        self.names = tuple(name for name in self.names if name in names)
        self.width = len(self.names) * (1 + self.num_bins)

    def forward(self, pair: Mapping[str, Tensor], num_rows: int) -> Tensor:
        """float32 [t, width] from columns [t]; DataError names a field that is missing."""
        missing = [name for name in self.names if name not in pair]
        if missing:
            raise DataError(
                f"the candidates lack pair fields {missing}, which this ranker was built to read; "
                "make them with pair_fields(batch, rows)"
            )
        if not self.names:
            return self.left_K.new_zeros(num_rows, 0)
        number_tF = torch.stack([pair[name] for name in self.names], dim=1)
        if not self.num_bins:
            return number_tF
        ramp_tFK = ((number_tF[:, :, None] - self.left_K) * (self.num_bins / 2)).clamp(0, 1)
        return torch.cat([number_tF, ramp_tFK.flatten(1)], dim=1)


class EventMarks(nn.Module):
    """What is known of a past event beside its item, as a vector to add to the item's: its action, and how long ago it was.

    Args:
        space: a log with one action adds nothing for it.
        dim: D.
        recency: "gap" buckets the hours between event and request by powers of two, "position" the place from the end.

    Raises ConfigError for "gap" on a log without a clock.
    """

    def __init__(self, space: Space, dim: int, recency: Recency = "none") -> None:
        super().__init__()
        if recency == "gap" and not space.has_clock:
            raise ConfigError("recency='gap' needs times, which this log lacks; use recency='position'")
        self.dim = dim
        self.recency = recency
        self.actions = nn.Embedding(len(space.actions) + 1, dim) if len(space.actions) > 1 else None
        self.ages = nn.Embedding(NUM_RECENCY_BUCKETS, dim) if recency != "none" else None
        for table in filter(None, (self.actions, self.ages)):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, item_ED: Tensor, history: History, time_B: Tensor) -> Tensor:
        """float32 [E, D]: item vectors of the history's events plus their marks; `time_B` int64 [B] seconds of the requests."""
        return self.add(item_ED, history.action, self.buckets(history, time_B))

    def add(self, item: Tensor, action: Tensor, bucket: Tensor | None) -> Tensor:
        """float32 [..., D]: item vectors [..., D] plus marks, for actions [...] and what `buckets` gave of the same events."""
        if self.actions is not None:
            item = item + self.actions(action)
        if self.ages is not None:
            assert bucket is not None
            item = item + self.ages(bucket)
        return item

    def buckets(self, history: History, time_B: Tensor) -> Tensor | None:
        """int64 [E]: age of each event at `time_B` [B] seconds, or place from the end, by powers of two; None where neither is marked."""
        if self.ages is None:
            return None
        row_E = history.items.row_of_value
        if self.recency == "gap":
            age_E = (time_B[row_E] - history.time).clamp(min=0) / 3600
        else:
            age_E = (history.items.lengths[row_E] - 1 - history.items.position_of_value).float()
        return torch.log2(1 + age_E).long().clamp(max=NUM_RECENCY_BUCKETS - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerConfig:
    """Settings of a plain tower over fields, the same for all rankers that end in one."""

    widths: tuple[int, ...] = (128, 64)
    """Hidden widths of the tower."""
    activation: Activation = "dice"
    """Of the tower's hidden layers."""
    dropout: float = 0.1
    """Share of hidden units set to 0 in training."""
    norm: Norm = "none"
    """Of the tower's hidden layers."""
    use_user_ids: bool = False
    """Read the user's own id row; unknown users read the unknown row."""
    id_dropout: float = 0.05
    """Share of user id rows replaced by the unknown row in training."""
    pair_bins: int = 8
    """Bins of the piecewise-linear curve that each pair field may take; 0 = linear."""
    loss: RankingLoss = "softmax"
    """softmax over a request's candidates; bce gives scores that are logits of a probability. Rows with one candidate use bce."""

    def check(self, system: str) -> None:
        """Raises ConfigError, in the name of `system`, where a number is out of range."""
        if self.pair_bins < 0:
            raise ConfigError(f"{system}: head.pair_bins must be at least 0, got {self.pair_bins}")
        for name in ("dropout", "id_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{system}: head.{name} must be from 0 to below 1, got {getattr(self, name)}")
        if self.loss not in ("softmax", "bce"):
            raise ConfigError(f"{system}: head.loss must be softmax or bce, got {self.loss!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadConfig(TowerConfig):
    """Settings of a tower that may have gates and generated weights."""

    gates: GateConfig = GateConfig()  # noqa: RUF009  (frozen)
    """Gates on the tower's input and hidden units: SENet, EPNet, PPNet, LHUC."""
    apg: APGConfig = APGConfig()  # noqa: RUF009  (frozen)
    """Hidden layers with weights made per row."""


class CandidateHead(nn.Module):
    """The end of a ranker: a tower over user, context, pair fields and what the model found out about each candidate.

    Args:
        space: user, context and pair fields, tasks.
        dim: D, width of a field's vector.
        width: V of what the model gives per candidate.
        config: settings.
        table: of the users' id rows.
    """

    def __init__(
        self, space: Space, dim: int, width: int, config: HeadConfig, *, table: TableChoice | None = None
    ) -> None:
        super().__init__()
        self.tasks = space.tasks
        self.loss = config.loss
        self.request = RequestEncoder(
            space, dim, use_user_ids=config.use_user_ids, id_dropout=config.id_dropout, table=table
        )
        self.pair = PairFeatures(space.pair_fields, config.pair_bins)
        self.tower = make_tower(
            space, blocks_of(self.request.width, dim), [*blocks_of(width, dim), self.pair.width], config
        )
        self.request_flops = linear_flops(self.request) + self.tower.request_flops
        self.candidate_flops = self.tower.candidate_flops

    def request_side(self, batch: Batch) -> Tensor:
        """float32 [B, W]: the request's share of the tower's first layer (with gates: of its input), made once per request."""
        return self.tower.request_side(self.request(batch), batch)

    def forward(self, request_BW: Tensor, candidates: Candidates, candidate_tV: Tensor) -> dict[str, Tensor]:
        """Logits [t] per task for what the model found out about the candidates, [t, V]."""
        side_tV = torch.cat([candidate_tV, self.pair(candidates.pair, len(candidate_tV))], dim=1)
        logit_tT = self.tower(request_BW, side_tV, candidates.rows.row_of_value, candidates.rows.values)
        return dict(zip(self.tasks, logit_tT.unbind(1), strict=True))

    def losses(self, scores: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """One loss per task from logits [t]; see `task_losses`."""
        return task_losses(scores, batch, self.loss)


def task_losses(scores: Mapping[str, Tensor], batch: Batch, loss: RankingLoss) -> dict[str, Tensor]:
    """One loss per task from logits [t]: "softmax" over each request's candidates, or "bce" per candidate.

    In a tabular batch, where no request has two candidates, a softmax has nothing to compare: such a batch takes "bce". A label that is
    NaN is not known: the task's loss is the mean over the candidates whose label is. Tasks of a criterion of the batch have one loss, the
    criterion's, under the name of its first task. DataError names a task without labels.
    """
    rows = batch.candidate_rows
    criteria = {criterion.tasks[0]: criterion for criterion in batch.criteria}
    others = {task for criterion in batch.criteria for task in criterion.tasks[1:]}
    missing = [task for task in scores if task not in batch.labels and task not in criteria and task not in others]
    if missing:
        raise DataError(
            f"the batch has no labels for {missing}; label every task of the space or drop it from the tasks"
        )
    binary = loss == "bce" or int(rows.lengths.max() if rows.num_rows else 0) < 2
    losses = {}
    for task, score in scores.items():
        if task in criteria:
            losses[task] = criteria[task](scores, batch.weight)
        if task in criteria or task in others:
            continue
        label, weight, listed = batch.labels[task], batch.weight, rows
        known = ~label.isnan()
        if not known.all():
            listed = rows.keep(known)
            score, label, weight = score[known], label[known], None if weight is None else weight[known]
        losses[task] = (
            binary_loss(score, label, weight) if binary else softmax_ranking_loss(score, label, listed, weight)
        )
    return losses


def linear_flops(*modules: nn.Module) -> int:
    """FLOPs of all linear maps in the modules, each applied to one row; look-ups, with all that a table does, and activations are not
    counted."""
    of_tables = {m for module in modules for table in tables_of(module) for m in table.modules()}
    return sum(
        2 * m.weight.numel()
        for module in modules
        for m in module.modules()
        if isinstance(m, nn.Linear) and m not in of_tables
    )


def dense_bytes(module: nn.Module) -> float:
    """Bytes of all parameters that a request reads whole: those of linear maps, norms and activations, not of tables."""
    tables = {
        p for m in module.modules() if isinstance(m, Table | nn.Embedding | nn.EmbeddingBag) for p in m.parameters()
    }
    return float(sum(p.numel() * p.element_size() for p in module.parameters() if p not in tables))
