"""FAT: a Transformer over fields whose projections belong to the field and whose attention is gated per ordered pair of fields.

"From Scaling to Structured Expressivity: Rethinking Transformers for CTR Prediction", Yan et al. (arXiv 2511.12081), version 2; the blocks,
and what was reconstructed of them, are in layers/field_attention.py.

    x_f     = vector of field f, mapped to the token width, + b_f
    blocks  over all tokens of a request and a candidate; there are no positions
    logit   = tower(sum_f x_f / sqrt(F))

A plain Transformer of the same code is `field_qkv = field_ffn = pair_scalars = false`; equal parameters are a matter of its widths.
The first block's projections of a request's tokens are made once per request; its attention and all later blocks see the candidate.

Differences from the paper: free matrices per field unless `num_bases` is set and below the number of fields (with as many fields as bases,
composing would cost parameters, not save them); the sum of tokens is divided by sqrt(F); see fm.py for past, pair fields and loss.

B requests, t candidates end to end, F = Fr + Fc fields, E width of a field's vector, D width of a token, T tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from shortlist.data.batches import Batch, Candidates
from shortlist.data.schema import Space
from shortlist.layers.field_attention import QKV, FieldBlockConfig, FieldTransformerBlock
from shortlist.layers.field_matrix import FieldsConfig
from shortlist.layers.field_tower import FieldBlock
from shortlist.layers.scoring import HeadConfig, dense_bytes, make_tower, task_losses
from shortlist.models.base import Cost, Losses, Ranker, RequestShape, Scores
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True, slots=True)
class FATConfig:
    """Settings of FAT."""

    fields: FieldsConfig = FieldsConfig()  # noqa: RUF009  (frozen)
    """Which fields it reads, and how wide their vectors are."""
    blocks: FieldBlockConfig = FieldBlockConfig()  # noqa: RUF009  (frozen)
    """The Transformer."""
    head: HeadConfig = HeadConfig(widths=(), activation="relu", dropout=0.0)  # noqa: RUF009  (frozen)
    """What reads the pooled tokens; without widths a linear map."""

    def __post_init__(self) -> None:
        self.fields.check("fat")
        self.head.check("fat")


class FATState(NamedTuple):
    """The request's side, made once."""

    tokens: QKV
    """Its tokens [B, Fr, D] with the first block's queries, keys and values."""
    tower_BW: Tensor
    """What the tower knows of the request before any candidate."""


@system(
    "fat",
    stage="ranking",
    paper="Yan et al., arXiv 2511.12081",
    cold_users=True,
    cold_items=True,
    tiny={
        "fields": FieldsConfig(dim=8, max_history=10),
        "blocks": FieldBlockConfig(
            width=8, num_heads=2, num_blocks=2, ffn_width=16, num_bases=4, active_bases=2, meta_dim=4
        ),
    },
)
class FAT(Ranker):
    """A Transformer over fields with matrices per field and a weight per ordered pair of fields."""

    Config = FATConfig

    def __init__(self, config: FATConfig, space: Space) -> None:
        super().__init__(config, space)
        self.max_history = config.fields.max_history
        self.fields = FieldBlock(space, config.fields.dim, config.fields, config.head)
        D, F, E = config.blocks.width, self.fields.num_fields, config.fields.dim
        self.widen = nn.Linear(E, D, bias=False) if D != E else None
        self.bias_FD = nn.Parameter(torch.zeros(F, D))
        self.blocks = nn.ModuleList(FieldTransformerBlock(F, config.blocks) for _ in range(config.blocks.num_blocks))
        # Fields share one meta-embedding across blocks; it is only read where matrices are composed.
        composed = any(m.router is not None for m in self._block(0).matrices)
        # Flat, since optimisers decay matrices, and decay would make all fields alike.
        self.meta = nn.Parameter(0.1 * torch.randn(F * config.blocks.meta_dim), requires_grad=composed)
        self.tower = make_tower(space, [], [D], config.head)

    @property
    def meta_Fk(self) -> Tensor:
        """The fields' meta-embeddings."""
        return self.meta.view(self.fields.num_fields, -1)

    def _block(self, number: int) -> FieldTransformerBlock:
        block = self.blocks[number]
        assert isinstance(block, FieldTransformerBlock)
        return block

    def user_state(self, batch: Batch) -> FATState:
        """See FATState."""
        x_BFD = self._tokens(self.fields.request(batch), slice(0, self.fields.num_request))
        tokens = self._block(0).project(x_BFD, self.meta_Fk, slice(0, self.fields.num_request))
        return FATState(tokens, self.tower.request_side(x_BFD.new_zeros(batch.size, 0), batch))

    def _tokens(self, field_rFE: Tensor, tokens: slice) -> Tensor:
        widened = field_rFE if self.widen is None else self.widen(field_rFE)
        return widened + self.bias_FD[tokens]

    def score_candidates(self, state: FATState, candidates: Candidates) -> Scores:
        """Logits [t] per task."""
        rows, own = candidates.rows, slice(self.fields.num_request, None)
        row_t, first = rows.row_of_value, self._block(0)
        mine = first.project(self._tokens(self.fields.candidate(candidates), own), self.meta_Fk, own)
        both = QKV(*(torch.cat([r[row_t], c], dim=1) for r, c in zip(state.tokens, mine, strict=True)))
        x_tFD = first(both, self.meta_Fk)
        for number in range(1, len(self.blocks)):
            block = self._block(number)
            x_tFD = block(block.project(x_tFD, self.meta_Fk, slice(None)), self.meta_Fk)
        pooled_tD = x_tFD.sum(1) / self.fields.num_fields**0.5
        logit_tT = self.tower(state.tower_BW, pooled_tD, row_t, rows.values)
        return dict(zip(self.space.tasks, logit_tT.unbind(1), strict=True))

    def losses(self, batch: Batch) -> Losses:
        """By task, as `config.head.loss` says."""
        return task_losses(self.score(batch), batch, self.config.head.loss)

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """Per token 6 D^2 for projections, 4 F D for attention and 4 D I for the feed-forward part, per block; the first block's
        projections of the request's tokens once."""
        D, F, inner = self.config.blocks.width, self.fields.num_fields, self.config.blocks.ffn_width
        Fr, E = self.fields.num_request, self.config.fields.dim
        widen = 2 * E * D if self.widen is not None else 0
        once = self.fields.request_flops(shape.num_history) + Fr * (widen + 6 * D * D)
        rest = F * (4 * F * D + 4 * D * inner)
        each = (F - Fr) * (widen + 6 * D * D) + rest + (len(self.blocks) - 1) * (F * 6 * D * D + rest)
        read = self.fields.bytes_read(shape.num_history, shape.num_candidates, cached=cached)
        return Cost(
            user_flops=0.0 if cached else float(once),
            item_flops=float(each + self.fields.candidate_flops + self.tower.candidate_flops),
            bytes=dense_bytes(self) + read,
        )
