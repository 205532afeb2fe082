"""S3-Rec: a sequence encoder pre-trained on items, their attributes and segments, then trained as SASRec (Zhou et al., CIKM 2020).

B users, total = all tokens end to end, P masks, T items behind them, U visible positions, R prefixes, A attributes, n items, D width.

    H0 = dropout(LN(item + position)); L blocks X = LN(X + MHA(X)); X = LN(X + FFN(X)); F the last one's output     encoder_block.py
    phase 1, both directions, on random prefixes of the training sequences, F of a sequence with hidden items:
      AAP  attributes of a visible item:  s = (F W1) . e_a;  binary cross-entropy over all attributes a             weight 0.2
      MIP  the hidden item:               -log s(f+ - f-), f = (F W2) . e_i of the item and of one not in the prefix         1.0
      MAP  attributes of the hidden item: as AAP with W3                                                                     1.0
      SP   a hidden segment:              -log s(q+ - q-), q = (c W4) . z; c, z+, z- the last positions of the sequence
           without the segment, of the segment alone, and of a stretch of other sequences in its place                       0.5
    phase 2, causal: the next item, score F_t . e_i, by any objective of the next-item systems

Losses of phase 1 are sums over positions and attributes, as published, here per prefix. Serving is SASRec's: no attribute is read.

Attributes are the ids of the item's categorical and sequence fields. AAP reads the encoder's output, as the authors' code does; their
paper scores the item's own vector.

Differences from the authors' code:
- the negatives of MIP and of SP come from training events alone (theirs avoid or use the held-out items); SP's are cut from the batch;
- f and q enter the logarithm as they are; `double_sigmoid` puts a sigmoid on each first, below which the loss cannot fall to 0 (.313);
- `num_prefixes` random prefixes per user and epoch in place of all of them; prefixes of one group have no segment;
- baskets are hidden, and cut into segments, as a whole; the default objective of phase 2 is a full softmax, theirs loss = "bce";
- no dropout on attention weights unless `attention_dropout` is set; users without known history get the popular items.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from shortlist.data.batches import Batch
from shortlist.data.histories import View
from shortlist.data.jagged import Jagged
from shortlist.data.samplers import UniformSampler, draw_outside
from shortlist.data.schema import Categorical, Space
from shortlist.data.schema import Sequence as SequenceField
from shortlist.errors import ConfigError
from shortlist.layers.attention import LengthClasses
from shortlist.layers.cloze import Cloze, Sequences, draw_segments, hide, random_prefixes, whole_sequences
from shortlist.layers.counting import popularity_order
from shortlist.layers.encoder_block import EncoderBlock, encoder_flops
from shortlist.layers.factors import beside_popularity
from shortlist.layers.item_sequences import (
    SequenceConfig,
    item_encoder,
    readable,
    user_vectors,
)
from shortlist.layers.next_item import NextItemLoss
from shortlist.models.base import Cost, Losses, Phase, RequestShape, VectorRetriever
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True, slots=True)
class S3RecConfig(SequenceConfig):
    """Settings of S3-Rec beside those of the objective of its second phase; the defaults are the paper's, but for the objective."""

    dim: int = 64
    """Width D of item and attribute vectors and of the whole network."""
    max_history: int = 50
    """Newest events read per user."""
    num_blocks: int = 2
    """Transformer blocks L."""
    num_heads: int = 2
    """Attention heads; divides dim."""
    dropout: float = 0.5
    """Share dropped of embeddings and block outputs in training; 0.5 for sparse logs, 0.2 for dense ones."""
    attention_dropout: float = 0.0
    """Share of attention weights dropped in training; the paper's is 0.5. Slow on CPU."""
    pretrain_epochs: int = 20
    """Epochs of phase 1; 0 trains from scratch. The paper's 100 to 150 are over all prefixes."""
    num_prefixes: int = 3
    """Random prefixes per user and epoch in phase 1."""
    mask_share: float = 0.2
    """Chance of a group to be hidden in phase 1; a prefix's last group always is."""
    aap_weight: float = 0.2
    """Weight of associated attribute prediction; 0 leaves it out, as for the other three."""
    mip_weight: float = 1.0
    """Weight of masked item prediction."""
    map_weight: float = 1.0
    """Weight of masked attribute prediction."""
    sp_weight: float = 0.5
    """Weight of segment prediction."""
    double_sigmoid: bool = False
    """Take sigmoids of the scores of MIP and SP before their difference, as the authors' code does."""
    attributes: tuple[str, ...] = ()
    """Item fields whose ids are attributes, categorical or sequence; empty = all such fields."""
    use_fields: bool = False
    """Add item fields to the item's vector, so that serving reads them too; False is the paper's model."""
    init_std: float = 0.02
    """Standard deviation of all initial weights."""

    def __post_init__(self) -> None:
        self.check(
            "s3rec",
            positive=("dim", "max_history", "num_blocks", "num_heads", "num_prefixes"),
            shares=(
                "dropout",
                "attention_dropout",
                "mask_share",
            ),
        )
        for name in ("pretrain_epochs", "aap_weight", "mip_weight", "map_weight", "sp_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"s3rec: {name} must not be negative, got {getattr(self, name)}")
        if self.pretrain_epochs and not self.aap_weight + self.mip_weight + self.map_weight + self.sp_weight:
            raise ConfigError("s3rec: pre-training needs an objective; raise a weight or set pretrain_epochs = 0")
        if self.dim % self.num_heads:
            raise ConfigError(f"s3rec: num_heads must divide dim, got {self.num_heads} heads and dim {self.dim}")
        if self.init_std <= 0:
            raise ConfigError(f"s3rec: init_std must be above 0, got {self.init_std}")

    @property
    def reads_attributes(self) -> bool:
        """Phase 1 has an objective of attributes."""
        return bool(self.pretrain_epochs) and self.aap_weight + self.map_weight > 0


class Attributes(nn.Module):
    """What is known of items as ids, and a vector for each: fields one after the other, so that an id says field and value.

    Raises ConfigError where a named field is missing or has no ids, or no field has.
    """

    offsets: Tensor
    values: Tensor

    def __init__(self, space: Space, names: tuple[str, ...], dim: int, init_std: float) -> None:
        super().__init__()
        usable = {f.name: f for f in space.items.fields if isinstance(f, Categorical | SequenceField)}
        wrong = [name for name in names if name not in usable]
        if wrong:
            raise ConfigError(
                f"s3rec: attributes {wrong} are no categorical or sequence fields of items: {sorted(usable)}"
            )
        fields = [usable[name] for name in names or usable]
        if not fields:
            raise ConfigError(
                "s3rec: no item field has ids to predict; give the items categorical or sequence fields, or set "
                "aap_weight = 0 and map_weight = 0"
            )
        pairs, num_attributes, first = [], sum(f.size for f in fields), 0
        for f in fields:
            column = space.items.columns[f.name]
            value = column.values if isinstance(column, Jagged) else column
            owner = (
                column.row_of_value if isinstance(column, Jagged) else torch.arange(len(column), device=value.device)
            )
            known = value > 0
            pairs.append(owner[known] * num_attributes + value[known] - 1 + first)
            first += f.size
        pair = torch.cat(pairs).unique()  # an item has an attribute once, however often it is named
        lengths = torch.bincount(pair // num_attributes, minlength=space.items.num_rows)
        whole = Jagged.from_lengths(pair % num_attributes, lengths)
        self.register_buffer("offsets", whole.offsets, persistent=False)
        self.register_buffer("values", whole.values, persistent=False)
        self.vectors = nn.Embedding(num_attributes, dim)
        nn.init.normal_(self.vectors.weight, std=init_std)

    def have(self, items: Jagged) -> Tensor:
        """float32 [rows, A]: the mean of the items' attributes as 0 and 1, for items in rows."""
        index, lengths = Jagged(self.values, self.offsets).where(items.values)
        row = items.row_of_value.repeat_interleave(lengths)
        share = 1.0 / items.lengths.clamp(min=1)
        num_attributes = len(self.vectors.weight)
        have = torch.zeros(items.num_rows * num_attributes, device=self.values.device)
        have.index_add_(0, row * num_attributes + self.values[index], share[row])
        return have.view(items.num_rows, num_attributes)

    def loss(self, asked: Tensor, items: Jagged) -> Tensor:
        """Sum of the binary cross-entropies of all attributes, for vectors [rows, D] that ask for those of the rows' items."""
        return binary_cross_entropy_with_logits(asked @ self.vectors.weight.T, self.have(items), reduction="sum")


@system(
    "s3rec",
    stage="retrieval",
    paper="Zhou et al., CIKM 2020",
    needs={"order", "history", "item_fields"},
    cold_users=True,
    tiny={"dim": 8, "max_history": 10, "num_blocks": 1, "dropout": 0.0, "pretrain_epochs": 2},
)
class S3Rec(VectorRetriever):
    """Self-attention pre-trained on items, attributes and segments in both directions, then trained to ask for the next item."""

    Config = S3RecConfig
    feed = "next_event"
    config: S3RecConfig
    popularity_N: Tensor

    def __init__(self, config: S3RecConfig, space: Space) -> None:
        super().__init__(config, space)
        self.max_history = config.max_history
        self.items = item_encoder(space, config.dim, config)
        self.positions = nn.Embedding(config.max_history, config.dim)
        self.norm_input = nn.LayerNorm(config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            EncoderBlock(
                config.dim, config.num_heads, dropout=config.dropout, attention_dropout=config.attention_dropout
            )
            for _ in range(config.num_blocks)
        )
        self.objective = NextItemLoss(config, space, has_fields=bool(self.items.num_fields))
        self.mask = nn.Parameter(torch.empty(config.dim)) if config.pretrain_epochs else None
        self.scorers = nn.ModuleDict({name: nn.Linear(config.dim, config.dim) for name in self._objectives()})
        self.attributes = None
        if config.reads_attributes:
            self.attributes = Attributes(space, config.attributes, config.dim, config.init_std)
        self._initialise()
        self.register_buffer("popularity_N", torch.zeros(space.num_items + 1))

    def _objectives(self) -> tuple[str, ...]:
        """Names of the objectives of phase 1 that have a weight."""
        names = ("aap", "mip", "map", "sp") if self.config.pretrain_epochs else ()
        return tuple(name for name in names if self._weight(name))

    def _weight(self, name: str) -> float:
        config = self.config
        weights = {
            "aap": config.aap_weight,
            "mip": config.mip_weight,
            "map": config.map_weight,
            "sp": config.sp_weight,
        }
        return float(weights[name])

    def _initialise(self) -> None:
        """Normal weights and zero biases; the tables of items and attributes have set themselves."""
        for module in [self.positions, *self.blocks.modules(), *self.scorers.modules()]:
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.init_std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        if self.mask is not None:
            nn.init.normal_(self.mask, std=self.config.init_std)

    def prepare(self, view: View) -> None:
        """What to show to users without history."""
        self.buffer("popularity_N", popularity_order(view, self.config.window_days).to(self.space_device()))

    def phases(self) -> tuple[Phase, ...]:
        """Pre-training, unless it has no epochs, then the next item."""
        fine_tuning = Phase(name="fine-tuning", feed="next_event", losses=self.losses)
        if not self.config.pretrain_epochs:
            return (fine_tuning,)
        epochs = self.config.pretrain_epochs
        pretraining = Phase(name="pre-training", feed="next_event", losses=self.pretraining_losses, epochs=epochs)
        return pretraining, fine_tuning

    # --- phase 1 ---

    def pretraining_losses(self, batch: Batch) -> Losses:
        """The weighted objectives of phase 1, by name, per prefix; new prefixes, masks and segments at each call."""
        if batch.targets is None:
            raise ValueError("s3rec learns from next-event batches; this one has no targets")
        whole = whole_sequences(batch.history, batch.targets)
        prefixes = random_prefixes(whole, self.config.num_prefixes, self.max_history)
        sums = {**self._on_masked(hide(prefixes, self._draw_masks(prefixes)), prefixes)}
        if "sp" in self.scorers:
            sums["sp"] = self._on_segments(prefixes, draw_segments(prefixes), whole.rows.values)
        return {name: self._weight(name) * value / max(prefixes.rows.num_rows, 1) for name, value in sums.items()}

    def _draw_masks(self, prefixes: Sequences) -> Tensor:
        """bool [groups]: hidden by chance, and the last of each row always."""
        last_R = prefixes.group[prefixes.rows.offsets[1:] - 1]
        num_groups = int(prefixes.opens.sum())
        masked_G = torch.rand(num_groups, device=last_R.device) < self.config.mask_share
        masked_G[last_R] = True
        return masked_G

    def _on_masked(self, cloze: Cloze, prefixes: Sequences) -> Losses:
        """Sums of AAP, MIP and MAP, those that have a weight."""
        sums: Losses = {}
        if not {"aap", "mip", "map"} & set(self.scorers):
            return sums
        rows, targets = cloze.rows, cloze.targets
        out_TD = self._encode(rows, self.items(rows.values), cloze.is_mask, LengthClasses.of(rows), causal=False)
        hidden_PD = out_TD[targets.position]
        if "aap" in self.scorers and self.attributes is not None:
            visible = rows.values[~cloze.is_mask]
            single = Jagged(visible, torch.arange(len(visible) + 1, device=visible.device))
            sums["aap"] = self.attributes.loss(self.scorers["aap"](out_TD[~cloze.is_mask]), single)
        if "mip" in self.scorers:
            owner_T = rows.row_of_value[targets.position][targets.items.row_of_value]
            sampler = UniformSampler.of_mask(self.objective.candidates_N)
            negative_T = draw_outside(sampler, prefixes.rows, owner_T, 1)[:, 0]
            asked_TD = self.scorers["mip"](hidden_PD)[targets.items.row_of_value]
            better_T = (asked_TD * self.items(targets.items.values)).sum(-1)
            worse_T = (asked_TD * self.items(negative_T)).sum(-1)
            weight_T = targets.weight * (negative_T > 0)
            sums["mip"] = (weight_T * self._margin(better_T, worse_T)).sum()
        if "map" in self.scorers and self.attributes is not None:
            sums["map"] = self.attributes.loss(self.scorers["map"](hidden_PD), targets.items)
        return sums

    def _on_segments(self, prefixes: Sequences, is_segment: Tensor, others: Tensor) -> Tensor:
        """Sum of SP over the prefixes that have a segment.

        Args:
            is_segment: bool [total].
            others: int64, items of training sequences end to end, of which stretches serve as negatives.
        """
        rows, row_T = prefixes.rows, prefixes.rows.row_of_value
        length_R = torch.zeros(rows.num_rows, dtype=torch.int64, device=row_T.device).index_add_(
            0, row_T, is_segment.long()
        )
        chance_R = torch.rand(rows.num_rows, dtype=torch.float64, device=row_T.device)
        start_R = (chance_R * (len(others) - length_R + 1)).long()
        seg_row = row_T[is_segment]
        segments = Jagged.from_lengths(seg_row, length_R)
        stretch = others[start_R[seg_row] + segments.position_of_value]
        negative = rows.values.clone()
        negative[is_segment] = stretch
        classes, last = LengthClasses.of(rows), rows.offsets[1:] - 1
        context_RD, better_RD, worse_RD = (
            self._encode(rows, self.items(tokens), is_mask, classes, causal=False, at=last)
            for tokens, is_mask in ((rows.values, is_segment), (rows.values, ~is_segment), (negative, ~is_segment))
        )
        asked_RD = self.scorers["sp"](context_RD)
        loss_R = self._margin((asked_RD * better_RD).sum(-1), (asked_RD * worse_RD).sum(-1))
        return (loss_R * (length_R > 0)).sum()

    def _margin(self, better: Tensor, worse: Tensor) -> Tensor:
        """-log s(better - worse), elementwise."""
        if self.config.double_sigmoid:
            better, worse = better.sigmoid(), worse.sigmoid()
        return softplus(worse - better)

    # --- phase 2 and serving ---

    def losses(self, batch: Batch) -> Losses:
        """{"next": loss} of a next-event batch; 0 where no position is supervised."""
        targets = batch.targets
        if targets is None:
            raise ValueError("s3rec learns from next-event batches; this one has no targets")
        rows = batch.history.items
        all_items_ND = self.items.all() if self.config.loss == "full_softmax" else None
        item_TD = (
            self.items(rows.values) if all_items_ND is None else nn.functional.embedding(rows.values, all_items_ND)
        )
        query_PD = self._encode(rows, item_TD, None, LengthClasses.of(rows), causal=True, at=targets.position)
        return {"next": self.objective(self.items, query_PD, targets, rows, all_items_ND)}

    def _encode(
        self,
        rows: Jagged,
        item_TD: Tensor,
        is_mask: Tensor | None,
        classes: LengthClasses,
        *,
        causal: bool,
        at: Tensor | None = None,
    ) -> Tensor:
        """float [total, D], or [P, D] at the positions `at`. Positions count from the newest event backwards."""
        if is_mask is not None and self.mask is not None:
            item_TD = torch.where(is_mask[:, None], self.mask.to(item_TD.dtype), item_TD)
        from_end_T = rows.lengths.repeat_interleave(rows.lengths) - 1 - rows.position_of_value
        x_TD = self.dropout(self.norm_input(item_TD + self.positions(from_end_T.clamp(max=self.max_history - 1))))
        for block in self.blocks[:-1]:
            x_TD = block(x_TD, classes, causal=causal)
        out: Tensor = self.blocks[-1](x_TD, classes, causal=causal, at=at)
        return out

    def encode_user(self, batch: Batch) -> Tensor:
        """float32 [B, D + 1]: the last position's vector and 0; for users without a known event zeros and 1 (popularity)."""
        history = batch.history.items
        rows = readable(self.items, history, self.max_history)
        has_history_B = rows.lengths > 0
        last = rows.offsets[1:][has_history_B] - 1
        out_bD = self._encode(rows, self.items(rows.values), None, LengthClasses.of(rows), causal=True, at=last)
        user_BD = out_bD.new_zeros(rows.num_rows, self.config.dim)
        user_BD[has_history_B] = self.objective.query(out_bD)
        return user_vectors(user_BD, rows)

    def encode_items(self, rows: Tensor) -> Tensor:
        """float32 [n, D + 1]: the item's vector and its popularity in 0..1, which only users without history read."""
        return beside_popularity(self.objective.vectors(self.items(rows)), self.popularity_N[rows]).float()

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """Blocks over the history once, then one inner product per item; layer norms and look-ups are not counted."""
        config = self.config
        length = min(shape.num_history, config.max_history)
        blocks = encoder_flops(length, config.dim, config.num_blocks, causal=True, num_asked=1)
        fields = 2 * length * self.items.num_fields * config.dim * config.dim
        weights = sum(p.numel() for p in self.blocks.parameters())
        return Cost(
            user_flops=0.0 if cached else blocks + fields,
            item_flops=2.0 * (config.dim + 1),
            bytes=4.0 * (0 if cached else weights + length * config.dim) + 4.0 * shape.num_items * (config.dim + 1),
        )
