"""BERT4Rec: a bidirectional encoder that learns to fill in hidden items (Sun et al., CIKM 2019).

B users, total = all tokens of the batch end to end, P masked positions, n items (matrices have n + 1 rows), D width.

    H0 = dropout(LN(item + position)), the item being [mask] where it is hidden               input; norm = "post-ln"
    X  = LN(X + MHA(X)); X = LN(X + FFN(X)), all positions read all others, L blocks          encoder_block.py, norm = "post-ln"
    Z  = LN(gelu(W H + b)) at masked positions; score of item i = Z . e_i + b_i, e_i the input's own table     head
    loss = cross-entropy over all items, mean over the masked positions                       next_item.py

A request is its history with [mask] behind it; the scores are those at the mask. In training a share `mask_share` of each sequence is
hidden, and with chance `last_share` the last item alone, which is what a request looks like: without it the model never sees a mask at
the end with all before it in sight. Its last position has the same number in training and serving.

Published figures are mostly of models trained too little: with the authors' settings NDCG@10 on ML-1M is .076 and, trained thirty times
as long, .158 (Petrov & Macdonald, RecSys 2022). What makes a step cheap here: no padding; the last block, the head and the softmax are
computed at masked positions alone.

Differences from the paper:
- unless norm = "post-ln", a block normalises what it reads, since training has no warm-up, and H0 = sqrt(D) (item + position) without a
  layer norm, which leaves what the blocks add some weight beside it;
- a group of events (a basket) is hidden as a whole and one mask stands for it, whose targets are all its items, so that none is
  predicted from the others;
- new masks are drawn at every step in place of ten copies drawn once; hidden items are always [mask], as in the authors' code;
- positions count from the end; the output bias starts at the log of the item's count instead of 0;
- item fields are added where the log has them; users without known history get the popular items, through an extra column.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shortlist.data.batches import Batch
from shortlist.data.histories import View
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Space
from shortlist.errors import ConfigError
from shortlist.layers.attention import LengthClasses
from shortlist.layers.cloze import draw_masks, hide, whole_sequences, with_mask_behind
from shortlist.layers.counting import popularity_order
from shortlist.layers.encoder_block import EncoderBlock, NormPlace, encoder_flops
from shortlist.layers.factors import beside_popularity
from shortlist.layers.item_sequences import (
    SequenceConfig,
    item_encoder,
    readable,
    user_vectors,
)
from shortlist.layers.next_item import NextItemLoss
from shortlist.layers.output_bias import BiasedItems, OutputBias
from shortlist.models.base import Cost, Losses, RequestShape, VectorRetriever
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True, slots=True)
class BERT4RecConfig(SequenceConfig):
    """Settings of BERT4Rec beside those of the objective; the defaults are the paper's for long histories (ML-1M)."""

    dim: int = 64
    """Width D of item vectors and of the whole network."""
    max_history: int = 200
    """Newest events read per user; the mask is one token more."""
    num_blocks: int = 2
    """Transformer blocks L."""
    num_heads: int = 2
    """Attention heads; divides dim."""
    mask_share: float = 0.2
    """Share of a sequence's groups that are hidden in training; 0.2 for long histories, 0.6 for short ones (below ten events)."""
    last_share: float = 0.1
    """Share of training sequences of which the last group alone is hidden, as in a request."""
    dropout: float = 0.2
    """Share dropped of embeddings and block outputs in training; 0.2 for dense logs, 0.5 for sparse ones."""
    attention_dropout: float = 0.0
    """Share of attention weights dropped in training; the paper's is 0.2. Slow on CPU."""
    norm: NormPlace = "pre-ln"
    """post-ln as in BERT and the paper; pre-ln normalises what a block reads instead of what it gives, and bears learning rates of
    2e-3 and more, at which post-ln without a warm-up stands still."""
    output_bias: bool = True
    """One learned number per item beside the inner product; it carries popularity. Cosine scores (normalise) exclude it."""
    init_std: float = 0.02
    """Standard deviation of all initial weights."""

    def __post_init__(self) -> None:
        self.check(
            "bert4rec",
            positive=("dim", "max_history", "num_blocks", "num_heads"),
            shares=(
                "dropout",
                "attention_dropout",
            ),
        )
        if not 0 < self.mask_share < 1 or not 0 <= self.last_share <= 1:
            raise ConfigError(
                "bert4rec: mask_share must lie between 0 and 1 and last_share from 0 to 1, "
                f"got {self.mask_share} and {self.last_share}"
            )
        if self.dim % self.num_heads:
            raise ConfigError(f"bert4rec: num_heads must divide dim, got {self.num_heads} heads and dim {self.dim}")
        if self.normalise and self.output_bias:
            raise ConfigError("bert4rec: cosine scores have no room for an output bias; set output_bias = false")
        if self.init_std <= 0:
            raise ConfigError(f"bert4rec: init_std must be above 0, got {self.init_std}")


@system(
    "bert4rec",
    stage="retrieval",
    paper="Sun et al., CIKM 2019",
    needs={"order", "history"},
    cold_users=True,
    cold_items=True,
    tiny={"dim": 8, "max_history": 10, "num_blocks": 1, "dropout": 0.0},
)
class BERT4Rec(VectorRetriever):
    """Self-attention in both directions, trained to fill in hidden items; a mask behind the history asks for the next one."""

    Config = BERT4RecConfig
    feed = "next_event"
    config: BERT4RecConfig
    popularity_N: Tensor

    def __init__(self, config: BERT4RecConfig, space: Space) -> None:
        super().__init__(config, space)
        self.max_history = config.max_history
        self.items = item_encoder(space, config.dim, config)
        self.mask = nn.Parameter(torch.empty(config.dim))
        self.positions = nn.Embedding(config.max_history + 1, config.dim)
        self.norm_input = nn.LayerNorm(config.dim) if config.norm == "post-ln" else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            EncoderBlock(
                config.dim,
                config.num_heads,
                dropout=config.dropout,
                attention_dropout=config.attention_dropout,
                norm=config.norm,
            )
            for _ in range(config.num_blocks)
        )
        self.norm = nn.LayerNorm(config.dim) if config.norm == "pre-ln" else nn.Identity()
        self.head = nn.Sequential(nn.Linear(config.dim, config.dim), nn.GELU(), nn.LayerNorm(config.dim))
        self.bias = OutputBias(space.num_items) if config.output_bias else None
        self.objective = NextItemLoss(config, space, has_fields=bool(self.items.num_fields))
        self._initialise()
        self.register_buffer("popularity_N", torch.zeros(space.num_items + 1))

    def _initialise(self) -> None:
        """Normal weights, cut at two deviations as in BERT, and zero biases; the id table and the fields have set themselves."""
        std = self.config.init_std
        for module in [self.positions, *self.blocks.modules(), *self.head]:
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.mask, std=std, a=-2 * std, b=2 * std)

    def prepare(self, view: View) -> None:
        """What to show to users without history, and where the output biases start."""
        self.buffer("popularity_N", popularity_order(view, self.config.window_days).to(self.space_device()))
        if self.bias is not None:
            self.bias.prepare(view, has_fields=bool(self.items.num_fields))

    def losses(self, batch: Batch) -> Losses:
        """{"masked": loss} of a next-event batch: its sequences with the last group, and new masks at each call."""
        if batch.targets is None:
            raise ValueError("bert4rec learns from next-event batches; this one has no targets")
        sequences = whole_sequences(batch.history, batch.targets)
        cloze = hide(sequences, draw_masks(sequences, self.config.mask_share, self.config.last_share))
        all_items_ND = self.items.all() if self.config.loss == "full_softmax" else None
        tokens = cloze.rows.values
        item_TD = self.items(tokens) if all_items_ND is None else nn.functional.embedding(tokens, all_items_ND)
        query_PD = self._query(cloze.rows, item_TD, cloze.is_mask, cloze.targets.position)
        items = BiasedItems(self.items, self.bias)
        if all_items_ND is not None:
            all_items_ND = items.beside_all(all_items_ND)
        return {"masked": self.objective(items, query_PD, cloze.targets, cloze.rows, all_items_ND)}

    def _query(self, rows: Jagged, item_TD: Tensor, is_mask: Tensor, at: Tensor) -> Tensor:
        """float [P, D], with the bias's 1 behind [P, D + 1]: what the positions `at` int64 [P] ask for, reading all of their row."""
        from_end_T = rows.lengths.repeat_interleave(rows.lengths) - 1 - rows.position_of_value
        place_TD = self.positions(from_end_T.clamp(max=self.max_history))
        x_TD = torch.where(is_mask[:, None], self.mask.to(item_TD.dtype), item_TD)
        x_TD = x_TD + place_TD
        x_TD = self.dropout(x_TD * self.config.dim**0.5 if self.norm_input is None else self.norm_input(x_TD))
        classes = LengthClasses.of(rows)
        for block in self.blocks[:-1]:
            x_TD = block(x_TD, classes, causal=False)
        query_PD = self.head(self.norm(self.blocks[-1](x_TD, classes, causal=False, at=at)))
        return BiasedItems(self.items, self.bias).asking(query_PD)

    def encode_user(self, batch: Batch) -> Tensor:
        """float32 [B, W + 1]: the mask's vector and 0; for users without a known event zeros and 1 (popularity). W = D or D + 1."""
        history = batch.history.items
        known = readable(self.items, history, self.max_history)
        rows, is_mask = with_mask_behind(known)
        query_BD = self.objective.query(self._query(rows, self.items(rows.values), is_mask, rows.offsets[1:] - 1))
        return user_vectors(query_BD, known)

    def encode_items(self, rows: Tensor) -> Tensor:
        """float32 [n, W + 1]: the item's vector, its bias, and its popularity in 0..1, which only users without history read."""
        vectors = self.objective.vectors(BiasedItems(self.items, self.bias)(rows))
        return beside_popularity(vectors, self.popularity_N[rows]).float()

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """Blocks over history and mask once, then one inner product per item; layer norms and look-ups are not counted."""
        config = self.config
        length = min(shape.num_history, config.max_history) + 1
        blocks = encoder_flops(length, config.dim, config.num_blocks, causal=False, num_asked=1)
        fields = 2 * length * self.items.num_fields * config.dim * config.dim
        width = config.dim + (self.bias is not None) + 1
        weights = sum(p.numel() for p in [*self.blocks.parameters(), *self.head.parameters()])
        return Cost(
            user_flops=0.0 if cached else blocks + 2 * config.dim * config.dim + fields,
            item_flops=2.0 * width,
            bytes=4.0 * (0 if cached else weights + 2 * length * config.dim) + 4.0 * shape.num_items * width,
        )
