"""ELASTIC: a long sequence compressed into a few interest tokens at linear cost, with a sparsely read interest memory.

"ELASTIC: Efficient Linear Attention for Sequential Interest Compression", Deng et al., arXiv 2408.09380, which its authors withdrew. Only
the abstract could be read: linear dispatcher attention (learned interest experts gather the sequence, positions read the experts back)
and interest memory retrieval (a large pool of vectors behind product keys). All equations here are RECONSTRUCTED, and all figures are
our own: this is an implemented idea, not a reproduced paper.

A gather over the whole sequence would show the future to earlier positions. So the sequence is cut into chunks of C, and everything
is causal: for chunk c the experts have gathered what lies in the chunks before it, and a position reads those interest tokens and,
by ordinary causal attention in the same softmax, its own chunk up to itself.

    w[s]     = exp(cap(expert . W_k x[s] / sqrt(d)))              cap(a) = 20 tanh(a / 20)
    z[c]     = expert + W_o (sum of w[s] W_v x[s] / sum of w[s]),  s in chunks before c;  z += FFN(LN z);  z += memory(LN z)
    y[t]     = softmax over [z[c], x[first of c .. t]] of (W_q x[t]) . keys / sqrt(d), times their values
    x        = x + W y;  x = x + FFN(LN x)

Since the experts are parameters, the two sums only grow: they are the user's state, of a size that does not depend on the history, and
a new event costs the same after ten events and after a million. The cap keeps the sums finite without a running maximum.

B users, T events of all users end to end, G chunks of all users end to end, C events of a chunk, k experts, H heads, d = D / H width of a
head, D width, n items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from shortlist.data.batches import Batch
from shortlist.data.histories import View
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Space
from shortlist.errors import ConfigError
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
from shortlist.layers.product_keys import ProductKeyMemory
from shortlist.layers.towers import MLP
from shortlist.models.base import Cost, Losses, Memory, RequestShape, VectorRetriever
from shortlist.registry import system

CAP = 20.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ElasticConfig(SequenceConfig):
    """Settings of ELASTIC beside those of the objective."""

    dim: int = 64
    """Width D of item vectors and of the whole network."""
    max_history: int = 1_000
    """Newest events read per user; the cost grows linearly with it."""
    num_blocks: int = 2
    """Layers."""
    num_heads: int = 1
    """Attention heads; divides dim."""
    num_experts: int = 16
    """Interest tokens k that a history is compressed into, per layer."""
    chunk: int = 16
    """Events C that are attended one by one before they are only seen through the experts."""
    memory_slots: int = 0
    """Vectors M in the interest memory, a square number; 0 = none."""
    memory_reads: int = 16
    """Slots read per interest token."""
    dropout: float = 0.2
    """Share dropped of embeddings, block outputs and hidden units, in training."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""

    def __post_init__(self) -> None:
        self.check(
            "elastic",
            positive=("dim", "max_history", "num_blocks", "num_heads", "num_experts", "chunk", "memory_reads"),
            shares=("dropout",),
        )
        if self.memory_slots < 0:
            raise ConfigError(f"elastic: memory_slots must be at least 0, got {self.memory_slots}")
        if self.dim % self.num_heads:
            raise ConfigError(f"elastic: num_heads must divide dim, got {self.num_heads} heads and dim {self.dim}")


class Chunks(NamedTuple):
    """How the events of a jagged batch are cut into chunks, made once per batch."""

    cell_GC: Tensor
    """int64: event in each cell; cells after a user's last event repeat it."""
    is_real_GC: Tensor
    place_T: Tensor
    """int64 [T]: the cell in which each event stands."""
    user_G: Tensor
    """int64 [G]: whose chunk it is."""
    number_G: Tensor
    """int64 [G]: which of the user's chunks, from 0."""
    num_full_B: Tensor
    """int64 [B]: chunks before the one of the last event; no later event can change them."""

    @classmethod
    def of(cls, rows: Jagged, width: int) -> Chunks:
        """Cut rows, whose values are not read, into chunks of `width` from their first event on."""
        lengths_B, device = rows.lengths, rows.offsets.device
        chunks = Jagged.from_lengths(
            torch.zeros(int((-(-lengths_B // width)).sum()), device=device), -(-lengths_B // width)
        )
        user_G, number_G = chunks.row_of_value, chunks.position_of_value
        column_C = torch.arange(width, device=device)
        place_GC = number_G[:, None] * width + column_C
        is_real_GC = place_GC < lengths_B[user_G, None]
        cell_GC = rows.offsets[user_G, None] + torch.minimum(place_GC, lengths_B[user_G, None] - 1)
        place_T = is_real_GC.flatten().nonzero()[:, 0]
        return cls(cell_GC, is_real_GC, place_T, user_G, number_G, (lengths_B - 1).clamp(min=0) // width)


class Sums(NamedTuple):
    """What the experts of one layer have gathered of each user."""

    value_BHkd: Tensor
    weight_BHk: Tensor


class ElasticBlock(nn.Module):
    """One layer: experts gather, positions read them and their own chunk, feed-forward."""

    def __init__(self, config: ElasticConfig) -> None:
        super().__init__()
        dim, self.num_heads = config.dim, config.num_heads
        self.norm = nn.LayerNorm(dim)
        self.gather = nn.Linear(dim, 2 * dim)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.ffn_norm, self.ffn = nn.LayerNorm(dim), MLP(dim, (dim,), dim, dropout=config.dropout)
        # Experts that start alike would stay alike: unit variance, as the normed events they are compared with.
        self.experts_kD = nn.Parameter(torch.randn(config.num_experts, dim))
        self.experts_out = nn.Linear(dim, dim)
        self.token_norm, self.token_ffn = nn.LayerNorm(dim), MLP(dim, (dim,), dim, dropout=config.dropout)
        self.token_key_norm = nn.LayerNorm(dim)
        self.memory = (
            ProductKeyMemory(dim, num_slots=config.memory_slots, num_read=config.memory_reads)
            if config.memory_slots
            else None
        )
        self.dropout = nn.Dropout(config.dropout)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x_TD: Tensor, chunks: Chunks, before: Sums) -> tuple[Tensor, Sums]:
        """The layer's output [T, D], and what the experts have gathered of the chunks before each user's last one.

        Args:
            x_TD: events; each user's first one opens a chunk.
            chunks: layout of the batch.
            before: what the experts had gathered before the first of these events.
        """
        num_heads, width = self.num_heads, x_TD.shape[1] // self.num_heads
        normed_TD = self.norm(x_TD)
        prior_G, after = self._gathered(normed_TD, chunks, before)
        token_GkD = self.tokens(prior_G)

        token_kv = self.key_value(self.token_key_norm(token_GkD)).unflatten(-1, (2, num_heads, width))
        event_kv = self.key_value(normed_TD)[chunks.cell_GC].unflatten(-1, (2, num_heads, width))
        key_GHsd, value_GHsd = torch.cat([token_kv, event_kv], dim=1).permute(2, 0, 3, 1, 4)
        query_GHCd = self.query(normed_TD)[chunks.cell_GC].unflatten(-1, (num_heads, width)).transpose(1, 2)
        num_tokens, length = token_GkD.shape[1], chunks.cell_GC.shape[1]
        # Cells after a user's last event come after all real ones, so that the causal mask hides them too.
        may_read_Cs = torch.ones(length, num_tokens + length, dtype=torch.bool, device=x_TD.device).tril(num_tokens)
        read_GHCd = scaled_dot_product_attention(query_GHCd, key_GHsd, value_GHsd, attn_mask=may_read_Cs)
        read_TD = read_GHCd.transpose(1, 2).flatten(2).flatten(0, 1)[chunks.place_T]
        x_TD = x_TD + self.dropout(self.out(read_TD))
        return x_TD + self.dropout(self.ffn(self.ffn_norm(x_TD))), after

    def _gathered(self, normed_TD: Tensor, chunks: Chunks, before: Sums) -> tuple[Sums, Sums]:
        """What the experts know before each chunk [G, ...], and before each user's last one [B, ...]."""
        num_heads, width = self.num_heads, normed_TD.shape[1] // self.num_heads
        key_TX, value_TX = self.gather(normed_TD).chunk(2, dim=1)
        expert_Hkd = self.experts_kD.unflatten(1, (num_heads, width)).transpose(0, 1)
        answer_THk = torch.einsum("thd,hkd->thk", key_TX.unflatten(1, (num_heads, width)), expert_Hkd) / width**0.5
        weight_GCHk = (CAP * torch.tanh(answer_THk / CAP)).exp()[chunks.cell_GC] * chunks.is_real_GC[:, :, None, None]
        value_GCHd = value_TX.unflatten(1, (num_heads, width))[chunks.cell_GC]
        own_G = Sums(torch.einsum("gchk,gchd->ghkd", weight_GCHk, value_GCHd), weight_GCHk.sum(1))
        priors, afters = zip(*(_running(own, start, chunks) for own, start in zip(own_G, before)))
        return Sums(*priors), Sums(*afters)

    def tokens(self, gathered: Sums) -> Tensor:
        """Interest tokens [*, k, D] of what was gathered; the experts' own vectors where that is nothing."""
        tiny = torch.finfo(gathered.weight_BHk.dtype).tiny
        mean_BHkd = gathered.value_BHkd / gathered.weight_BHk.clamp(min=tiny)[..., None]
        token_BkD = self.experts_kD + self.experts_out(mean_BHkd.transpose(1, 2).flatten(2))
        normed_BkD = self.token_norm(token_BkD)
        token_BkD = token_BkD + self.token_ffn(normed_BkD)
        if self.memory is not None:
            token_BkD = token_BkD + self.memory(normed_BkD.flatten(0, 1)).view_as(token_BkD)
        return token_BkD


def _running(own_G: Tensor, before_B: Tensor, chunks: Chunks) -> tuple[Tensor, Tensor]:
    """Sums before each chunk [G, ...] and before each user's last one [B, ...], from each chunk's own and what was there before."""
    num_users, most = len(before_B), int(chunks.number_G.max()) + 1 if len(chunks.number_G) else 0
    padded = own_G.new_zeros(num_users, most + 1, *own_G.shape[1:])
    padded = padded.index_put((chunks.user_G, chunks.number_G + 1), own_G)
    running = padded.cumsum(1) + before_B[:, None]
    return running[chunks.user_G, chunks.number_G], running[torch.arange(num_users), chunks.num_full_B]


@system(
    "elastic",
    stage="retrieval",
    paper="Deng et al., arXiv 2024 (withdrawn)",
    needs={"order", "history"},
    cold_users=True,
    cold_items=True,
    tiny={"dim": 8, "max_history": 12, "num_blocks": 2, "num_experts": 2, "chunk": 4, "dropout": 0.0},
)
class Elastic(VectorRetriever):
    """Interest experts compress the past at linear cost; the last position reads them and asks for the next item."""

    Config = ElasticConfig
    feed = "next_event"
    config: ElasticConfig
    popularity_N: Tensor

    def __init__(self, config: ElasticConfig, space: Space) -> None:
        super().__init__(config, space)
        self.max_history = config.max_history
        self.items = item_encoder(space, config.dim, config)
        self.positions = nn.Embedding(config.max_history, config.dim)
        nn.init.normal_(self.positions.weight, std=config.init_std)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(ElasticBlock(config) for _ in range(config.num_blocks))
        self.norm = nn.LayerNorm(config.dim)
        self.objective = NextItemLoss(config, space, has_fields=bool(self.items.num_fields))
        self.register_buffer("popularity_N", torch.zeros(space.num_items + 1))

    def prepare(self, view: View) -> None:
        """What to show to users without history."""
        self.buffer("popularity_N", popularity_order(view, self.config.window_days).to(self.space_device()))

    def losses(self, batch: Batch) -> Losses:
        """{"next": loss} of a next-event batch; 0 where no position is supervised."""
        targets = batch.targets
        if targets is None:
            raise ValueError("elastic learns from next-event batches; this one has no targets")
        rows = batch.history.items
        all_items_ND = self.items.all() if self.config.loss == "full_softmax" else None
        item_TD = (
            self.items(rows.values) if all_items_ND is None else nn.functional.embedding(rows.values, all_items_ND)
        )
        query_TD, _ = self._query(rows, item_TD)
        return {"next": self.objective(self.items, query_TD[targets.position], targets, rows, all_items_ND)}

    def _query(
        self, rows: Jagged, item_TD: Tensor, first_B: Tensor | None = None, before: list[Sums] | None = None
    ) -> tuple[Tensor, list[Sums]]:
        """What each position asks for, [T, D], and each layer's sums over the chunks before the last one.

        Args:
            rows: events; with `first_B` only those from there on.
            item_TD: their vectors.
            first_B: int64 [B], a multiple of the chunk's width: events that `before` has gathered already; None = none.
            before: each layer's sums of those; None = nothing.
        """
        place_T = rows.position_of_value + (0 if first_B is None else first_B[rows.row_of_value])
        x_TD = self.dropout(item_TD * self.config.dim**0.5 + self.positions(place_T.clamp(max=self.max_history - 1)))
        chunks, after = Chunks.of(rows, self.config.chunk), []
        before = before or [self._nothing(rows.num_rows, x_TD)] * len(self.blocks)
        for block, sums in zip(self.blocks, before, strict=True):
            x_TD, gathered = block(x_TD, chunks, sums)
            after.append(gathered)
        return self.norm(x_TD), after

    def _nothing(self, num_rows: int, like: Tensor) -> Sums:
        shape = (num_rows, self.config.num_heads, self.config.num_experts)
        return Sums(like.new_zeros(*shape, self.config.dim // self.config.num_heads), like.new_zeros(shape))

    def encode_user(self, batch: Batch) -> Tensor:
        """float32 [B, D + 1]: the last position's vector and 0; for users without a known event zeros and 1 (popularity)."""
        rows = self._readable(batch)
        return self._vector(self._query(rows, self.items(rows.values))[0], rows)

    def recall(self, batch: Batch, memories: Sequence[Memory | None]) -> tuple[Tensor, list[Memory | None]]:
        """See Remembering: the sums over the chunks before the last one and the items they were made of; only later events are encoded."""
        rows = self._readable(batch)
        known = [_fitting(memory, rows, row) for row, memory in enumerate(memories)]
        first_B = torch.tensor([0 if memory is None else len(memory["items"]) for memory in known])
        later = rows.position_of_value >= first_B[rows.row_of_value]
        new = Jagged.from_lengths(rows.values[later], rows.lengths - first_B)
        nothing = self._nothing(1, self.positions.weight.detach())
        before = [
            Sums(
                *(
                    torch.stack([empty[0] if memory is None else memory[f"{name}_{layer}"] for memory in known])
                    for name, empty in zip(("value", "weight"), nothing)
                )
            )
            for layer in range(len(self.blocks))
        ]
        query_TD, after = self._query(new, self.items(new.values), first_B, before)
        num_kept_B = ((rows.lengths - 1).clamp(min=0) // self.config.chunk * self.config.chunk).tolist()
        kept: list[Memory | None] = []
        for row, num_kept in enumerate(num_kept_B):
            start = int(rows.offsets[row])
            memory = {"items": rows.values[start : start + num_kept].clone()}
            for layer, sums in enumerate(after):
                memory |= {
                    f"value_{layer}": sums.value_BHkd[row].clone(),
                    f"weight_{layer}": sums.weight_BHk[row].clone(),
                }
            kept.append(memory if num_kept else None)
        return self._vector(query_TD, new), kept

    def _readable(self, batch: Batch) -> Jagged:
        history = batch.history.items
        return readable(self.items, history, self.max_history)

    def _vector(self, query_TD: Tensor, rows: Jagged) -> Tensor:
        return user_vectors(last_of_rows(self.objective.query(query_TD), rows), rows)

    def encode_items(self, rows: Tensor) -> Tensor:
        """float32 [n, D + 1]: the item's vector and its popularity in 0..1, which only users without history read."""
        return beside_popularity(self.objective.vectors(self.items(rows)), self.popularity_N[rows]).float()

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """Per event: maps, gathering, reading k tokens and its chunk; per chunk: its k tokens. Cached: one chunk, whatever the history."""
        config = self.config
        length = min(shape.num_history, config.max_history)
        length = min(length, config.chunk) if cached else length
        dim, experts = config.dim, config.num_experts
        per_event = 2 * dim * dim * (2 + 1 + 2 + 1 + 2) + 4 * dim * experts + 4 * dim * (experts + config.chunk / 2)
        first = self.blocks[0]
        assert isinstance(first, ElasticBlock)
        per_token = 2 * dim * dim * (1 + 2 + 2) + (0 if first.memory is None else first.memory.flops_per_row)
        num_chunks = -(-length // config.chunk)
        fields = 2 * length * self.items.num_fields * dim * dim
        weights = sum(p.numel() for name, p in self.blocks.named_parameters() if ".values." not in name)
        return Cost(
            user_flops=config.num_blocks * (length * per_event + num_chunks * experts * per_token) + fields,
            item_flops=2.0 * (dim + 1),
            bytes=4.0 * (weights + length * dim) + 4.0 * shape.num_items * (dim + 1),
        )


def _fitting(memory: Memory | None, rows: Jagged, row: int) -> Memory | None:
    """The memory if the history begins with the very events it was made of and has later ones, else None."""
    if memory is None:
        return None
    start, stop = int(rows.offsets[row]), int(rows.offsets[row + 1])
    items = memory["items"]
    if stop - start <= len(items) or not torch.equal(rows.values[start : start + len(items)], items):
        return None
    return memory
