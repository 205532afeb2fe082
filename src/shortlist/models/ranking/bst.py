"""BST: one transformer layer over the past and the candidate, its outputs end to end into a tower.

"Behavior Sequence Transformer for E-commerce Recommendation in Alibaba", Chen et al., DLP-KDD 2019. For tokens x_1..x_n (past, oldest
first) and x_{n+1} (the candidate), each an item's vector plus that of its time before the request:

    S  = softmax(Q K' / sqrt(d)) V W_O, heads side by side, every token sees every token         equations 2 and 3
    S' = LayerNorm(x + Dropout(S)),  F = LayerNorm(S' + Dropout(LeakyReLU(S' W_1 + b_1) W_2 + b_2))   equations 4 to 6
    score = tower([F_1; ..; F_{n+1}; user; context])

The candidate changes every token, so a plain pass costs n^2 per candidate. But it adds one key to a softmax that is otherwise the
request's own: with m_i the mix of token i over the past alone and Z_i the logarithm of its sum of exponentials,

    mix_i = m_i + g (v_c - m_i),  g = s(q_i k_c / sqrt(d) - Z_i)

m and Z are made once per request; a candidate then costs n, exactly. Pairs (candidate, event) lie end to end without padding.

Rebuilt from the paper's description and open implementations; no code of the authors is public. Differences and what is not known:
1. One layer, the paper's best; it is what the formula above needs.
2. The time vector is added to the item's, where the paper concatenates embeddings of item, category and position to the width d. Times
   are bucketed by powers of two of the hours (`recency="gap"`); a log without a clock takes places from the end. The candidate's time
   is 0, a vector of its own. Head count and inner width are not given in full in the paper.
3. `pooling` "mean" and "target" (the candidate's token alone, the cheapest) are those of open implementations; both add the
   candidate's own vector. `candidate_inside=False` leaves the candidate out of the layer, as some implementations do: an ablation.
4. The tower reads pair fields, has the widths of the other rankers here (1024-512-256 with LeakyReLU in the paper), and the loss is a
   softmax over a request's candidates unless "bce", the paper's, is chosen.

B requests, L longest history, E history events end to end, t candidates end to end, p (candidate, event) pairs end to end, n max_history,
D width, h heads, d = D / h, F inner width, W of the tower's first layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from shortlist.data.batches import Batch, Candidates
from shortlist.data.jagged import Jagged, segment_sum
from shortlist.data.schema import Space
from shortlist.embeddings.base import TableChoice
from shortlist.errors import ConfigError
from shortlist.layers.fields import ItemEncoder
from shortlist.layers.scoring import CandidateHead, EventMarks, HeadConfig, Recency, dense_bytes, linear_flops
from shortlist.models.base import Cost, Losses, Ranker, RequestShape, Scores
from shortlist.registry import system

Pooling = Literal["flatten", "mean", "target"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BSTConfig:
    """Settings of BST."""

    dim: int = 32
    """Width of one embedding and of a token."""
    num_heads: int = 2
    """Of the attention; must divide dim."""
    ffn_width: int = 64
    """Inner width of the feed-forward part."""
    dropout: float = 0.1
    """Of what attention and feed-forward add, in training."""
    pooling: Pooling = "flatten"
    """What the tower reads: all tokens end to end (the paper), their mean, or the candidate's token."""
    candidate_inside: bool = True
    """The candidate is a token of the layer; False = an ablation."""
    recency: Recency | None = None
    """Marks of past events: gap = hours before the request (the paper), position = place from the end, none; None = gap where the log
    has a clock, else position."""
    head: HeadConfig = HeadConfig()  # noqa: RUF009  (frozen)
    """The tower."""
    max_history: int = 20
    """Newest events read per request; flattened tokens make the tower's first layer this long."""
    use_ids: bool = True
    """Read the items' own id rows; False leaves only their fields."""
    id_dropout: float = 0.05
    """Share of item id rows replaced by the unknown row in training, so that new items have one that is trained."""
    pairs_at_once: int = 200_000
    """(candidate, event) pairs in memory at a time when scoring; training holds all of a batch's for its gradient."""
    table: TableChoice = TableChoice()  # noqa: RUF009  (frozen)
    """Which table holds the id rows."""

    def __post_init__(self) -> None:
        for name in ("dim", "num_heads", "ffn_width", "max_history", "pairs_at_once"):
            if getattr(self, name) < 1:
                raise ConfigError(f"bst: {name} must be at least 1, got {getattr(self, name)}")
        if self.dim % self.num_heads:
            raise ConfigError(f"bst: num_heads must divide dim, got {self.num_heads} and {self.dim}")
        if self.pooling not in ("flatten", "mean", "target"):
            raise ConfigError(f"bst: pooling must be flatten, mean or target, got {self.pooling!r}")
        if self.recency not in (None, "gap", "position", "none"):
            raise ConfigError(f"bst: recency must be gap, position or none, got {self.recency!r}")
        for name in ("dropout", "id_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"bst: {name} must be from 0 to below 1, got {getattr(self, name)}")
        self.head.check("bst")


class BSTState(NamedTuple):
    """The request's side, made once."""

    token_ED: Tensor
    """Item and mark of each event."""
    query_ED: Tensor
    key_ED: Tensor
    value_ED: Tensor
    mix_ED: Tensor
    """Each event's attention over the past alone."""
    log_sum_Eh: Tensor
    """Logarithm of the sum of exponentials behind it."""
    offsets: Tensor
    """int64 [B + 1]: whose events they are."""
    request_BW: Tensor
    """The request's part of the tower's first layer."""


@system(
    "bst",
    stage="ranking",
    paper="Chen et al., DLP-KDD 2019",
    needs={"history", "order"},
    cold_users=True,
    cold_items=True,
    tiny={"dim": 8, "ffn_width": 8, "dropout": 0.0, "max_history": 6, "head": HeadConfig(widths=(16,), dropout=0.0)},
)
class BST(Ranker):
    """A transformer layer over past and candidate together; what does not depend on the candidate is computed once."""

    Config = BSTConfig

    def __init__(self, config: BSTConfig, space: Space) -> None:
        super().__init__(config, space)
        self.max_history = config.max_history
        D = config.dim
        readable = space if config.use_ids else replace(space, known_items=torch.zeros_like(space.known_items))
        self.items = ItemEncoder(readable, D, id_dropout=config.id_dropout, table=config.table)
        self.marks = EventMarks(space, D, config.recency or ("gap" if space.has_clock else "position"))
        self.now = nn.Parameter(torch.zeros(D))
        self.query, self.key, self.value = (nn.Linear(D, D, bias=False) for _ in range(3))
        self.out = nn.Linear(D, D, bias=False)
        self.ffn = nn.Sequential(nn.Linear(D, config.ffn_width), nn.LeakyReLU(), nn.Linear(config.ffn_width, D))
        self.norm_attention, self.norm_ffn = nn.LayerNorm(D), nn.LayerNorm(D)
        self.dropout = nn.Dropout(config.dropout)
        width = (config.max_history + 1) * D if config.pooling == "flatten" else 2 * D
        self.head = CandidateHead(space, D, width, config.head, table=config.table)

    def user_state(self, batch: Batch) -> BSTState:
        """See BSTState."""
        history = batch.history.last(self.max_history)
        token_ED = self.marks(self.items(history.items.values), history, batch.time)
        query_ED, key_ED, value_ED = self.query(token_ED), self.key(token_ED), self.value(token_ED)
        padded = [history.items.with_values(x_ED).padded() for x_ED in (query_ED, key_ED, value_ED)]
        is_real_BL = padded[0][1]
        q_BhLd, k_BhLd, v_BhLd = (self._heads(x_BLD).transpose(1, 2) for x_BLD, _ in padded)
        lowest = torch.finfo(q_BhLd.dtype).min
        logit_BhLL = (q_BhLd @ k_BhLd.transpose(2, 3)) / self._head_width**0.5
        logit_BhLL = logit_BhLL.masked_fill(~is_real_BL[:, None, None, :], lowest)
        mix_BLD = (logit_BhLL.softmax(3) @ v_BhLd).transpose(1, 2).flatten(2)
        log_sum_BLh = logit_BhLL.logsumexp(3).transpose(1, 2)
        return BSTState(
            token_ED,
            query_ED,
            key_ED,
            value_ED,
            mix_BLD[is_real_BL],
            log_sum_BLh[is_real_BL],
            history.items.offsets,
            self.head.request_side(batch),
        )

    @property
    def _head_width(self) -> int:
        """d."""
        return self.config.dim // self.config.num_heads

    def _heads(self, x: Tensor) -> Tensor:
        """[..., D] cut into [..., h, d]."""
        return x.unflatten(-1, (self.config.num_heads, self._head_width))

    def score_candidates(self, state: BSTState, candidates: Candidates) -> Scores:
        """Logits [t] per task."""
        rows = candidates.rows
        outputs_tV = self.outputs(state, rows.with_values(self.items(rows.values)))
        return self.head(state.request_BW, candidates, outputs_tV)

    def outputs(self, state: BSTState, items: Jagged) -> Tensor:
        """What the tower reads of each candidate and its past, float32 [t, V].

        Scoring takes the candidates in slices of at most `pairs_at_once` pairs (and at least one candidate).
        """
        longest = int(state.offsets.diff().max()) if len(state.offsets) > 1 else 0
        step = max(self.config.pairs_at_once // max(longest, 1), 1)
        if self.training or len(items.values) <= step:
            return self._outputs(state, items.values, items.row_of_value)
        slices = zip(items.values.split(step), items.row_of_value.split(step))
        return torch.cat([self._outputs(state, *each) for each in slices])

    def _outputs(self, state: BSTState, item_tD: Tensor, row_t: Tensor) -> Tensor:
        """[t, V] for candidates of the requests row_t [t]."""
        event_p, length_t = Jagged(state.token_ED, state.offsets).where(row_t)
        pairs = Jagged.from_lengths(event_p, length_t)
        candidate_p = pairs.row_of_value
        own_tD = item_tD + self.now
        q_tD, k_tD, v_tD = self.query(own_tD), self.key(own_tD), self.value(own_tD)
        if not self.config.candidate_inside:
            target_tD = own_tD
        else:
            mix_tD = self._candidate_mix(state, q_tD, k_tD, v_tD, event_p, candidate_p)
            target_tD = self._rest(own_tD, mix_tD)
        if self.config.pooling == "target":
            return torch.cat([target_tD, item_tD], dim=1)
        mix_pD = state.mix_ED[event_p]
        if self.config.candidate_inside:
            logit_ph = self._dot(state.query_ED[event_p], k_tD[candidate_p])
            gate_ph1 = torch.sigmoid(logit_ph - state.log_sum_Eh[event_p])[:, :, None]
            mix_pD = torch.lerp(self._heads(mix_pD), self._heads(v_tD[candidate_p]), gate_ph1).flatten(1)
        token_pD = self._rest(state.token_ED[event_p], mix_pD)
        if self.config.pooling == "mean":
            total_tD = segment_sum(token_pD, candidate_p, len(item_tD)) + target_tD
            return torch.cat([total_tD / (length_t + 1)[:, None], item_tD], dim=1)
        n = self.max_history
        cell_p = candidate_p * (n + 1) + n - length_t[candidate_p] + pairs.position_of_value
        flat = token_pD.new_zeros(len(item_tD) * (n + 1), self.config.dim).index_copy(0, cell_p, token_pD)
        cell_t = torch.arange(len(item_tD), device=cell_p.device) * (n + 1) + n
        return flat.index_copy(0, cell_t, target_tD).view(len(item_tD), (n + 1) * self.config.dim)

    def _candidate_mix(
        self, state: BSTState, q_tD: Tensor, k_tD: Tensor, v_tD: Tensor, event_p: Tensor, candidate_p: Tensor
    ) -> Tensor:
        """[t, D]: the candidate's own attention over its past and itself."""
        logit_ph = self._dot(q_tD[candidate_p], state.key_ED[event_p])
        self_th = self._dot(q_tD, k_tD)
        index_ph = candidate_p[:, None].expand_as(logit_ph)
        top_th = self_th.detach().scatter_reduce(0, index_ph, logit_ph.detach(), "amax")
        share_ph, share_th = (logit_ph - top_th[candidate_p]).exp(), (self_th - top_th).exp()
        value_phd = self._heads(state.value_ED[event_p]) * share_ph[:, :, None]
        mix_thd = segment_sum(value_phd, candidate_p, len(q_tD)) + self._heads(v_tD) * share_th[:, :, None]
        return (mix_thd / (segment_sum(share_ph, candidate_p, len(q_tD)) + share_th)[:, :, None]).flatten(1)

    def _dot(self, x: Tensor, y: Tensor) -> Tensor:
        """Scaled inner products of rows [n, D] head by head: [n, h]."""
        return self._heads(x * y).sum(2) / self._head_width**0.5

    def _rest(self, token: Tensor, mix: Tensor) -> Tensor:
        """The layer after the attention's mix, token by token [..., D]."""
        x = self.norm_attention(token + self.dropout(self.out(mix)))
        return self.norm_ffn(x + self.dropout(self.ffn(x)))

    def plain_outputs(self, state: BSTState, items: Jagged) -> Tensor:
        """As `outputs`, candidate by candidate with the whole attention matrix: the reference of tests and benchmarks."""
        outputs, n = [], self.max_history
        for item_D, row in zip(items.values, items.row_of_value.tolist()):
            past_LD = state.token_ED[state.offsets[row] : state.offsets[row + 1]]
            own_D = item_D + self.now
            x = torch.cat([past_LD, own_D[None]]) if self.config.candidate_inside else past_LD
            q, k, v = (self._heads(map_(x)).transpose(0, 1) for map_ in (self.query, self.key, self.value))
            mix = ((q @ k.transpose(1, 2) / self._head_width**0.5).softmax(2) @ v).transpose(0, 1).flatten(1)
            y = self._rest(x, mix)
            if not self.config.candidate_inside:
                y = torch.cat([y, own_D[None]])
            match self.config.pooling:
                case "flatten":
                    outputs.append(torch.cat([y.new_zeros(n + 1 - len(y), y.shape[1]), y]).flatten())
                case "mean":
                    outputs.append(torch.cat([y.mean(0), item_D]))
                case _:
                    outputs.append(torch.cat([y[-1], item_D]))
        return torch.stack(outputs)

    def losses(self, batch: Batch) -> Losses:
        """By task, as the head's settings say."""
        return self.head.losses(self.score(batch), batch)

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """Once: maps and attention of the past. Per candidate: its maps, then one token per event through the rest of the layer."""
        D, num_past = self.config.dim, min(shape.num_history, self.max_history)
        item, rest = linear_flops(self.items), linear_flops(self.out, self.ffn)
        user = num_past * (item + 6 * D * D) + 4 * D * num_past**2 + self.head.request_flops
        num_tokens = 1 if self.config.pooling == "target" else num_past + 1
        attend = 4 * D * num_past * (1 if self.config.pooling == "target" else 2)
        per_item = item + 6 * D * D + attend + num_tokens * rest + self.head.candidate_flops
        return Cost(
            user_flops=0.0 if cached else float(user),
            item_flops=float(per_item),
            bytes=dense_bytes(self) + 4.0 * D * (shape.num_candidates + num_past),
        )
