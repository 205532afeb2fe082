"""SASRec: causal self-attention over a user's sequence of items (Kang & McAuley, ICDM 2018), with its later losses.

Full softmax ("SASRec+") and sampled softmax: Klenitskiy & Vasilev, RecSys 2023, and the baselines of HSTU; gBCE ("gSASRec"): Petrov &
Macdonald, RecSys 2023.

B users, total = all history events of the batch end to end, P supervised positions, T their targets end to end, n items (matrices have
n + 1 rows), D width, k negatives.

Differences from the 2018 paper, each a setting or measured:
- the block is pre-layer-norm unless `block="original"`, the loss a full softmax unless `loss="bce"`;
- only positions that end a group are supervised, by all items of the next group, so nothing is learned from the order in a basket;
- item fields, where the log has them, are added to the item's vector, so that items without events can be found;
- bce_k and gbce learn one offset of all scores, without which they can stand still for long: `learn_offset`;
- a user without known history gets the ranking by popularity, through one extra column of the vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from shortlist.data.batches import Batch
from shortlist.data.histories import View
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Space
from shortlist.errors import ConfigError
from shortlist.layers.attention import CausalSelfAttention, LengthClasses, attention_flops
from shortlist.layers.counting import popularity_order
from shortlist.layers.factors import beside_popularity
from shortlist.layers.item_sequences import (
    SequenceConfig,
    item_encoder,
    last_of_rows,
    readable,
    user_vectors,
)
from shortlist.layers.next_item import NextItemLoss
from shortlist.layers.towers import MLP
from shortlist.models.base import Cost, Losses, RequestShape, VectorRetriever
from shortlist.registry import system

Block = Literal["pre-ln", "original"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SASRecConfig(SequenceConfig):
    """Settings of SASRec beside those of the objective; the defaults are those of "SASRec+" in the pre-layer-norm form."""

    dim: int = 64
    """Width D of item vectors and of the whole network."""
    max_history: int = 200
    """Newest events read per user."""
    num_blocks: int = 2
    """Attention blocks."""
    num_heads: int = 1
    """Attention heads; divides dim."""
    dropout: float = 0.2
    """Share dropped of embeddings, block outputs and hidden units, in training; 0.2 for dense logs, 0.5 for sparse ones."""
    attention_dropout: float | None = None
    """Share of attention weights dropped; None = none in the pre-ln block, `dropout` in the original one. Slow on CPU."""
    block: Block = "pre-ln"
    """pre-ln: X + MHA(LN X), then X + FFN(LN X). original: queries and residual normalised, keys and values not, no output map."""
    init_std: float = 0.02
    """Standard deviation of all initial weights; N(0, 1) tables saturate the sigmoid of the BCE losses."""

    def __post_init__(self) -> None:
        self.check(
            "sasrec",
            positive=("dim", "max_history", "num_blocks", "num_heads"),
            shares=(
                "dropout",
                "attention_dropout",
            ),
        )
        if self.dim % self.num_heads:
            raise ConfigError(f"sasrec: num_heads must divide dim, got {self.num_heads} heads and dim {self.dim}")
        if self.init_std <= 0:
            raise ConfigError(f"sasrec: init_std must be above 0, got {self.init_std}")


class PreNormBlock(nn.Module):
    """X = X + MHA(LN X); X = X + FFN(LN X), dropout on both branches."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(config.dim)
        self.attention = CausalSelfAttention(config.dim, config.num_heads, dropout=config.attention_dropout or 0.0)
        self.norm_ffn = nn.LayerNorm(config.dim)
        self.ffn = MLP(config.dim, (config.dim,), config.dim, dropout=config.dropout)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_TD: Tensor, classes: LengthClasses) -> Tensor:
        """float [total, D]."""
        normed_TD = self.norm_attention(x_TD)
        x_TD = x_TD + self.dropout(self.attention(normed_TD, normed_TD, classes))
        return x_TD + self.dropout(self.ffn(self.norm_ffn(x_TD)))


class OriginalBlock(nn.Module):
    """The authors' code: Q = LN X; X' = Q + MHA(query Q, key X, value X), no output map; Y = LN X'; X = Y + FFN(Y)."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        rate = config.dropout if config.attention_dropout is None else config.attention_dropout
        self.norm_query = nn.LayerNorm(config.dim)
        self.attention = CausalSelfAttention(config.dim, config.num_heads, dropout=rate, output_map=False)
        self.norm_ffn = nn.LayerNorm(config.dim)
        self.ffn = MLP(config.dim, (config.dim,), config.dim, dropout=config.dropout)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_TD: Tensor, classes: LengthClasses) -> Tensor:
        """float [total, D]."""
        query_TD = self.norm_query(x_TD)
        y_TD = self.norm_ffn(query_TD + self.attention(query_TD, x_TD, classes))
        return y_TD + self.dropout(self.ffn(y_TD))


@system(
    "sasrec",
    stage="retrieval",
    paper="Kang & McAuley, ICDM 2018",
    needs={"order", "history"},
    cold_users=True,
    cold_items=True,
    tiny={"dim": 8, "max_history": 10, "num_blocks": 1, "dropout": 0.0},
)
class SASRec(VectorRetriever):
    """Self-attention over the user's sequence; the last position's vector asks for the next item."""

    Config = SASRecConfig
    feed = "next_event"
    config: SASRecConfig
    popularity_N: Tensor

    def __init__(self, config: SASRecConfig, space: Space) -> None:
        super().__init__(config, space)
        self.max_history = config.max_history
        self.items = item_encoder(space, config.dim, config)
        self.positions = nn.Embedding(config.max_history, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        block = PreNormBlock if config.block == "pre-ln" else OriginalBlock
        self.blocks = nn.ModuleList(block(config) for _ in range(config.num_blocks))
        self.norm = nn.LayerNorm(config.dim)
        self.objective = NextItemLoss(config, space, has_fields=bool(self.items.num_fields))
        self._initialise()
        self.register_buffer("popularity_N", torch.zeros(space.num_items + 1))

    def _initialise(self) -> None:
        """Normal weights and zero biases; the id table and the fields have set themselves."""
        for module in [self.positions, *self.blocks.modules()]:
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def prepare(self, view: View) -> None:
        """What to show to users without history."""
        self.buffer("popularity_N", popularity_order(view, self.config.window_days).to(self.space_device()))

    def losses(self, batch: Batch) -> Losses:
        """{"next": loss} of a next-event batch; 0 where no position is supervised."""
        targets = batch.targets
        if targets is None:
            raise ValueError("sasrec learns from next-event batches; this one has no targets")
        rows = batch.history.items
        all_items_ND = self.items.all() if self.config.loss == "full_softmax" else None
        item_TD = (
            self.items(rows.values) if all_items_ND is None else nn.functional.embedding(rows.values, all_items_ND)
        )
        query_PD = self._query(rows, item_TD)[targets.position]
        return {"next": self.objective(self.items, query_PD, targets, rows, all_items_ND)}

    def _query(self, rows: Jagged, item_TD: Tensor) -> Tensor:
        """float [total, D]: what each position asks for, from it and the positions before it.

        Positions count from the newest event backwards, so that the last one, which serving reads, always has the same one, and
        so that padding on either side could not matter.
        """
        from_end_T = rows.lengths.repeat_interleave(rows.lengths) - 1 - rows.position_of_value
        place_TD = self.positions(from_end_T.clamp(max=self.max_history - 1))
        x_TD = self.dropout(item_TD * self.config.dim**0.5 + place_TD)
        classes = LengthClasses.of(rows)
        for block in self.blocks:
            x_TD = block(x_TD, classes)
        return self.norm(x_TD)

    def encode_user(self, batch: Batch) -> Tensor:
        """float32 [B, D + 1]: the last position's vector and 0; for users without a known event zeros and 1 (popularity)."""
        history = batch.history.items
        rows = readable(self.items, history, self.max_history)
        query_TD = self.objective.query(self._query(rows, self.items(rows.values)))
        return user_vectors(last_of_rows(query_TD, rows), rows)

    def encode_items(self, rows: Tensor) -> Tensor:
        """float32 [n, D + 1]: the item's vector and its popularity in 0..1, which only users without history read."""
        return beside_popularity(self.objective.vectors(self.items(rows)), self.popularity_N[rows]).float()

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """Blocks over the history once, then one inner product per item; layer norms and look-ups are not counted."""
        config = self.config
        length = min(shape.num_history, config.max_history)
        attention = attention_flops(length, config.dim, output_map=config.block == "pre-ln")
        block = attention + 2 * length * config.dim * config.dim * 2
        fields = 2 * length * self.items.num_fields * config.dim * config.dim
        weights = sum(p.numel() for p in self.blocks.parameters())
        return Cost(
            user_flops=0.0 if cached else config.num_blocks * block + fields,
            item_flops=2.0 * (config.dim + 1),
            bytes=4.0 * (0 if cached else weights + length * config.dim) + 4.0 * shape.num_items * (config.dim + 1),
        )
