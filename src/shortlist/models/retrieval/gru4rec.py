"""GRU4Rec: a recurrent network over a session's items (Hidasi et al., ICLR 2016), with its later losses and samples (CIKM 2018).

B users or lanes, total = all events of the batch end to end, P supervised positions, n items (matrices have n + 1 rows), D width, N layers.

    r = s(W_r x + U_r h);  z = s(W_z x + U_z h);  c = tanh(W_h x + r * U_h h);  h' = (1 - z) c + z h        a GRU layer
    score of item i = h . e_i + b_i, e_i the input's own row ("constrained embedding")
    loss: full or sampled softmax, TOP1, BPR, TOP1-max, BPR-max against the other targets of the batch (negatives = "in_batch") and
    `num_negatives` extra items drawn with a chance proportional to count ** popularity_alpha          losses.py, next_item.py

Two ways to train, on the same weights:
- batches = "users": next-event batches, one sequence per user: the gradient reaches back over the whole sequence. The default;
- batches = "sessions": session-parallel ones (training/session_parallel.py), as published; the trainer's batch_size is the number of
  lanes: one event per lane and step, no gradient into earlier steps; the lanes' states are kept here between steps and start from zeros
  with each new session.

The state of one request is all that the next one needs: with `recall` a user's further event costs one step of the network.

Differences from the papers: the reset gate acts behind the matrix product (torch's GRU, as the authors' own port); own targets are
hidden among the negatives; the correction of a sampled softmax makes it an unbiased estimate of the full one, where the authors also take
the log of the target's count off its score; dropout of the state is not carried to the next step; baskets, item fields, the bias's start
and users without history as in the other next-item systems.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from shortlist.data.batches import Batch, NextTargets
from shortlist.data.histories import View
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Space
from shortlist.errors import ConfigError
from shortlist.layers.counting import popularity_order
from shortlist.layers.factors import beside_popularity
from shortlist.layers.gru import LANE, SESSION_START, gru_flops, run_gru
from shortlist.layers.item_sequences import (
    SequenceConfig,
    item_encoder,
    readable_rows,
    user_vectors,
)
from shortlist.layers.next_item import NextItemLoss
from shortlist.layers.output_bias import BiasedItems, OutputBias
from shortlist.models.base import Cost, Losses, Memory, Phase, RequestShape, VectorRetriever
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True, slots=True)
class GRU4RecConfig(SequenceConfig):
    """Settings of GRU4Rec beside those of the objective. As published: negatives = "in_batch", num_negatives = 2048, and either
    loss = "sampled_softmax" for large logs or loss = "bpr_max" with elu = 1 for small ones."""

    dim: int = 64
    """Width D of item vectors and of the state."""
    max_history: int = 200
    """Newest events read per user; a longer history is read from its window's start at each request."""
    num_layers: int = 1
    """Recurrent layers N."""
    dropout: float = 0.2
    """Share dropped of what the network reads, in training."""
    hidden_dropout: float = 0.0
    """Share dropped of its output, in training."""
    inputs: Literal["shared", "separate"] = "shared"
    """shared: an item's input and output vector are one; separate: two tables, which the authors find worse."""
    session_hours: float | None = None
    """A gap of more than so many hours ends a session, and what was before is not read; None = a user's history is one session."""
    batches: Literal["users", "sessions"] = "users"
    """What a step of training reads: users' whole sequences, or one event of each of `batch_size` sessions side by side, as published."""
    output_bias: bool = True
    """One learned number per item beside the inner product. Cosine scores (normalise) exclude it."""

    def __post_init__(self) -> None:
        self.check(
            "gru4rec",
            positive=("dim", "max_history", "num_layers"),
            shares=(
                "dropout",
                "hidden_dropout",
            ),
            in_batch=True,
        )
        if self.normalise and self.output_bias:
            raise ConfigError("gru4rec: cosine scores have no room for an output bias; set output_bias = false")
        if self.batches not in ("users", "sessions"):
            raise ConfigError(f'gru4rec: batches must be "users" or "sessions", got {self.batches!r}')
        if self.session_hours is not None and self.session_hours <= 0:
            raise ConfigError(f"gru4rec: session_hours must be above 0 or absent, got {self.session_hours}")


@system(
    "gru4rec",
    stage="retrieval",
    paper="Hidasi et al., ICLR 2016",
    needs={"order", "history"},
    cold_users=True,
    cold_items=True,
    tiny={"dim": 8, "max_history": 10, "dropout": 0.0},
)
class GRU4Rec(VectorRetriever):
    """A recurrent state reads the session event by event and asks for the next item."""

    Config = GRU4RecConfig
    feed = "next_event"
    config: GRU4RecConfig
    popularity_N: Tensor
    lanes_NBD: Tensor

    def __init__(self, config: GRU4RecConfig, space: Space) -> None:
        super().__init__(config, space)
        if config.session_hours is not None and not space.has_clock:
            raise ConfigError("gru4rec: session_hours needs times, which this log lacks; leave it out")
        self.max_history = config.max_history
        self.items = item_encoder(space, config.dim, config)
        self.separate = item_encoder(space, config.dim, config) if config.inputs == "separate" else None
        between = config.hidden_dropout if config.num_layers > 1 else 0.0
        self.gru = nn.GRU(config.dim, config.dim, config.num_layers, dropout=between)
        self.dropout, self.hidden_dropout = nn.Dropout(config.dropout), nn.Dropout(config.hidden_dropout)
        self.bias = OutputBias(space.num_items) if config.output_bias else None
        self.objective = NextItemLoss(config, space, has_fields=bool(self.items.num_fields))
        self._initialise()
        self.register_buffer("popularity_N", torch.zeros(space.num_items + 1))
        self.register_buffer("lanes_NBD", torch.zeros(config.num_layers, 0, config.dim))

    def _initialise(self) -> None:
        """Each gate's matrix uniform within sqrt(6 / (rows + columns)), biases 0, as in the reference code."""
        for name, weight in self.gru.named_parameters():
            if "weight" in name:
                for gate in weight.detach().chunk(3):
                    nn.init.xavier_uniform_(gate)
            else:
                nn.init.zeros_(weight)

    def train(self, mode: bool = True) -> GRU4Rec:
        """As nn.Module; the states of training's lanes end with it."""
        if not mode:
            self.lanes_NBD = self.lanes_NBD[:, :0]
        super().train(mode)
        return self

    def prepare(self, view: View) -> None:
        """What to show to users without history, where the output biases start, and how often negatives are drawn."""
        self.buffer("popularity_N", popularity_order(view, self.config.window_days).to(self.space_device()))
        self.objective.prepare(view)
        if self.bias is not None:
            self.bias.prepare(view, has_fields=bool(self.items.num_fields))

    def phases(self) -> tuple[Phase, ...]:
        """One, fed as `config.batches` says."""
        if self.config.batches == "users":
            return super().phases()
        return (Phase(name="train", feed="sessions", losses=self.losses, gap_hours=self.config.session_hours),)

    def losses(self, batch: Batch) -> Losses:
        """{"next": loss} of a next-event or session-parallel batch; 0 where no position is supervised."""
        if batch.targets is None:
            raise ValueError("gru4rec learns from next-event batches; this one has no targets")
        items, in_lanes = BiasedItems(self.items, self.bias), LANE in batch.context
        rows, targets = (batch.history.items, batch.targets) if in_lanes else self._in_sessions(batch, batch.targets)
        all_items_ND = self.items.all() if self.config.loss == "full_softmax" else None
        read_TD = self.dropout(self._read(rows.values, all_items_ND))
        out_TD, last_NBD = run_gru(self.gru, read_TD, rows, self._take_lanes(batch) if in_lanes else None)
        if in_lanes:
            self.lanes_NBD[:, _column(batch, LANE)] = last_NBD.detach().to(self.lanes_NBD.dtype)
        query_PD = items.asking(self.hidden_dropout(out_TD[targets.position]))
        if all_items_ND is not None:
            all_items_ND = items.beside_all(all_items_ND)
        return {"next": self.objective(items, query_PD, targets, batch.history.items, all_items_ND)}

    def _read(self, rows: Tensor, all_items_ND: Tensor | None = None) -> Tensor:
        """float [total, D]: what the network reads of catalogue rows [total]."""
        if self.separate is not None:
            return self.separate(rows)
        return self.items(rows) if all_items_ND is None else nn.functional.embedding(rows, all_items_ND)

    def _take_lanes(self, batch: Batch) -> Tensor:
        """float [N, B, D]: the states in which the rows of a session-parallel batch start; zeros where a session does."""
        lane_B, starts_B = _column(batch, LANE), _column(batch, SESSION_START)
        missing = int(lane_B.max()) + 1 - self.lanes_NBD.shape[1] if len(lane_B) else 0
        if missing > 0:
            self.lanes_NBD = nn.functional.pad(self.lanes_NBD, (0, 0, 0, missing))
        return self.lanes_NBD[:, lane_B].masked_fill(starts_B[None, :, None], 0.0)

    def _session_ends(self, batch: Batch) -> Tensor:
        """bool [total]: events after which, before the next one or the request, a session ends."""
        history = batch.history
        if self.config.session_hours is None or not len(history.time):
            return torch.zeros_like(history.time, dtype=torch.bool)
        next_T = history.time.roll(-1)
        filled_B = history.items.lengths > 0
        next_T[history.items.offsets[1:][filled_B] - 1] = batch.time[filled_B]
        return next_T - history.time > self.config.session_hours * 3600

    def _in_sessions(self, batch: Batch, targets: NextTargets) -> tuple[Jagged, NextTargets]:
        """The events as one row per session, and targets of which those of another session weigh nothing."""
        items = batch.history.items
        if self.config.session_hours is None:
            return items, targets
        ends = self._session_ends(batch)
        starts = items.position_of_value == 0
        starts[1:] |= ends[:-1]
        offsets = torch.cat([starts.nonzero()[:, 0], items.offsets[-1:]])
        is_near_P = ~ends[targets.position]
        return Jagged(items.values, offsets), replace(
            targets, weight=targets.weight * is_near_P[targets.items.row_of_value]
        )

    def encode_user(self, batch: Batch) -> Tensor:
        """float32 [B, W + 1]: the state and 0; for users without a known event zeros and 1 (popularity). W = D or D + 1."""
        rows = self._readable(batch)
        _, last_NBD = run_gru(self.gru, self._read(rows.values), rows)
        return self._asking(last_NBD[-1], rows)

    def recall(self, batch: Batch, memories: Sequence[Memory | None]) -> tuple[Tensor, list[Memory | None]]:
        """See Remembering: only events after the remembered ones are run. Exact to rounding.

        A memory is a user's state and the items that led to it. It fits when the history begins with these items, so not once the
        window of `max_history` has slid or a session has ended.
        """
        rows = self._readable(batch)
        start_NBD, num_known_B = self._remembered(rows, memories)
        is_new = rows.position_of_value >= num_known_B[rows.row_of_value]
        rest = Jagged.from_lengths(rows.values[is_new], rows.lengths - num_known_B)
        _, last_NBD = run_gru(self.gru, self._read(rest.values), rest, start_NBD)
        kept: list[Memory | None] = [
            {"items": items.clone(), "state": last_NBD[:, r].detach().clone()} if len(items) else None
            for r, items in enumerate(rows.values.split(rows.lengths.tolist()))
        ]
        return self._asking(last_NBD[-1], rows), kept

    def _remembered(self, rows: Jagged, memories: Sequence[Memory | None]) -> tuple[Tensor, Tensor]:
        """States [N, B, D] to go on from, and how many of each row's events they cover [B]; zeros where no memory fits."""
        device, num_layers, width = rows.values.device, self.config.num_layers, self.config.dim
        none = torch.zeros(0, dtype=torch.int64, device=device)
        past = [none if memory is None else memory["items"].to(device) for memory in memories]
        zeros = torch.zeros(num_layers, width, device=device)
        states = [zeros if memory is None else memory["state"].to(device) for memory in memories]
        if not states:
            return zeros.new_zeros(num_layers, 0, width), none
        old = Jagged.from_lengths(torch.cat(past), torch.tensor([len(items) for items in past], device=device))
        place = old.position_of_value
        inside = place < rows.lengths[old.row_of_value]
        at = (rows.offsets[:-1][old.row_of_value] + place).clamp(max=max(len(rows.values) - 1, 0))
        differs = ~inside
        if len(rows.values):
            differs |= rows.values[at] != old.values
        fits_B = old.count(differs) == 0
        start_NBD = torch.stack(states, dim=1).masked_fill(~fits_B[None, :, None], 0.0)
        return start_NBD, old.lengths * fits_B

    def _readable(self, batch: Batch) -> Jagged:
        """The newest known events of each request; with sessions, those of the one that is still open at the request."""
        items = batch.history.items
        keep = readable_rows(self.items, items)
        if self.config.session_hours is not None:
            ends_before = nn.functional.pad(self._session_ends(batch).long().cumsum(0), (1, 0))
            keep = keep & (ends_before[items.offsets[1:]][items.row_of_value] == ends_before[:-1])
        return items.keep(keep).last(self.max_history)

    def _asking(self, state_BD: Tensor, rows: Jagged) -> Tensor:
        """float32 [B, W + 1] from states; rows without events ask for popular items."""
        query_BD = self.objective.query(BiasedItems(self.items, self.bias).asking(state_BD))
        return user_vectors(query_BD, rows)

    def encode_items(self, rows: Tensor) -> Tensor:
        """float32 [n, W + 1]: the item's vector, its bias, and its popularity in 0..1, which only users without history read."""
        vectors = self.objective.vectors(BiasedItems(self.items, self.bias)(rows))
        return beside_popularity(vectors, self.popularity_N[rows]).float()

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """The network over the history once, then one inner product per item; activations and look-ups are not counted."""
        config = self.config
        length = min(shape.num_history, config.max_history)
        fields = 2 * self.items.num_fields * config.dim * config.dim
        event = gru_flops(config.dim, config.dim, config.num_layers) + fields
        width = config.dim + (self.bias is not None) + 1
        weights = sum(p.numel() for p in self.gru.parameters())
        return Cost(
            user_flops=0.0 if cached else length * event,
            item_flops=2.0 * width,
            bytes=4.0 * (0 if cached else weights + length * config.dim) + 4.0 * shape.num_items * width,
        )


def _column(batch: Batch, name: str) -> Tensor:
    """A context column of a session-parallel batch, [B]."""
    column = batch.context[name]
    assert isinstance(column, Tensor)
    return column
