"""GIN: every past click is read together with the items that others clicked next to it, by a graph trained with the ranker.

"Graph Intention Network for Click-through Rate Prediction in Sponsored Search", Li et al., SIGIR 2019 (arXiv 2103.16164). The graph has an
edge between items that somebody clicked one after the other; each item keeps its strongest neighbours (layers/graphs.py).

    s_ij = LeakyReLU(a' [W h_j; W h_i] + b log c_ij)        for the neighbours j of item i; h at the leaves = the item's own vector
    alpha_ij = softmax_j s_ij
    h_i' = h_i + relu(U [h_i; sum_j alpha_ij h_j])          once per layer, outermost hop first
    interest = sum_t beta_t h_t,  beta_t = softmax_t of an activation unit on candidate and h_t

What the clicks of other users say about a person's few own ones comes in through h; only real clicks are attended to. h depends on no
candidate: a serving model computes it once for the whole catalogue and then costs what DIN costs.

Differences from the paper, whose formulas we know from its abstract, figures and readers' notes; the graph attention is reconstructed:
1. Neighbours are the strongest ones, not sampled, so that scores repeat; by default by c_ij / sqrt(d_i d_j), since what everybody clicks
   would else be everybody's neighbour. b starts at 0.
2. Each layer adds to its input, which trains far more stably than replacing it; U starts as [0, identity], so that a layer first
   adds the positive part of what the neighbours say.
3. Aggregation runs once for each distinct item that a batch's pasts reach, so no tensor of requests x clicks x neighbours is made.
4. A training request whose own outcome is among the clicks that were counted reads a graph counted without its user: else the edge from
   its last click to its target tells the label, and is missing when it matters. `folds` such graphs are kept beside the whole one. Where
   the log is cut by time before the requests to learn from, as in a cascade, none is read: folds = 0 then saves their room.
5. There is no query; the activation unit is DIN's; the tower reads candidate, interest and their product, user, context and pair fields,
   and the loss is a softmax over a request's candidates unless "bce", the paper's, is chosen.
6. `graph` gives what to compare with: every item its own neighbour, or a random graph of the same degrees. `training = "two-stage"` is what
   the paper trains jointly in place of: item vectors learned from the graph's edges alone (item2vec's skip-gram with negative samples, each
   edge as often as it is strong), then frozen while all else learns to rank. With num_layers = 0 that is DIN over such vectors. They are
   learned from the whole graph, own clicks included, where the log is not cut before the requests.

B requests, C most candidates of a request, t candidates end to end, L longest history, D width of a vector, N catalogue rows, n distinct
nodes, e neighbours end to end, W first layer of the tower, P drawn edges, K negatives of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, softplus

from shortlist.data.batches import Batch, Candidates
from shortlist.data.histories import Histories, View
from shortlist.data.jagged import Jagged, segment_sum
from shortlist.data.schema import Space
from shortlist.embeddings.base import TableChoice
from shortlist.errors import ConfigError, DataError
from shortlist.layers.activation_unit import ActivationUnit, mixed_past
from shortlist.layers.counting import SparseRows
from shortlist.layers.fields import ItemEncoder
from shortlist.layers.graphs import (
    Hop,
    Neighbours,
    Strength,
    co_clicks,
    drawn_edges,
    hops,
    neighbours,
    newest_times,
    rewiring,
    segment_softmax,
    self_loops,
    stacked,
    strongest,
)
from shortlist.layers.scoring import CandidateHead, EventMarks, HeadConfig, Recency, dense_bytes, linear_flops
from shortlist.layers.search import KeptRows, crossed, crossed_width, masked_softmax
from shortlist.models.base import Cost, Losses, Phase, Ranker, RequestShape, Scores
from shortlist.registry import system

GRAPHS = ("co-click", "self-loop", "random")


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeVectors:
    """How item vectors are learned from edges alone, where training is two-stage."""

    epochs: int = 5
    """Passes before the ranker; each has as many steps as one of the ranker."""
    num_edges: int = 4_096
    """Edges drawn per step."""
    num_negatives: int = 5
    """Items per edge that are told apart from its end; neighbours of other edges, so drawn by how strongly the graph holds them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GINConfig:
    """Settings of GIN."""

    dim: int = 32
    """Width of one embedding."""
    num_layers: int = 1
    """Hops of the diffusion: 1 reads neighbours, 2 their neighbours too; 0 is DIN."""
    num_neighbours: int = 10
    """Strongest neighbours kept per item."""
    window: int = 1
    """Clicks that stand at most so many groups of events apart in a user's order are neighbours."""
    strength: Strength = "cosine"
    """Which neighbours are strongest: count = most co-clicks; cosine = co-clicks over the root of both items' degrees."""
    graph: Literal["co-click", "self-loop", "random"] = "co-click"
    """The graph; self-loop (no neighbour but itself) and random (the same degrees) have the same parameters and are there to compare."""
    training: Literal["joint", "two-stage"] = "joint"
    """joint: one loss trains all; two-stage: item vectors from the graph alone first, then frozen, there to compare."""
    edge_vectors: EdgeVectors = EdgeVectors()
    """The first stage of two."""
    folds: int = 5
    """Graphs without a part of the users each, for training requests whose outcome was counted; 0 = the whole graph for all."""
    seed: int = 0
    """Of the folds and of the random graph."""
    enrich_candidates: bool = False
    """Read the candidate's neighbours as well; the paper reads those of clicks alone."""
    unit_widths: tuple[int, ...] = (16,)
    """Hidden widths of the activation unit, which weighs one past click against the candidate."""
    recency: Recency = "none"
    """Mark past events by hours since (gap) or place from the end (position); none as in the paper."""
    max_history: int = 50
    """Newest events read per request."""
    use_ids: bool = True
    """Read the items' own id rows; False leaves only their fields."""
    id_dropout: float = 0.05
    """Share of item id rows replaced by the unknown row in training, so that new items have one that is trained."""
    pairs_at_once: int = 1_000_000
    """(candidate, event) pairs, padding included, in memory at a time when scoring; training holds all of a batch's for its gradient."""
    head: HeadConfig = HeadConfig()  # noqa: RUF009  (frozen)
    """The tower; its activation is the activation unit's too."""
    table: TableChoice = TableChoice()  # noqa: RUF009  (frozen)
    """Which table holds the id rows."""

    def __post_init__(self) -> None:
        least = {"dim": 1, "num_layers": 0, "num_neighbours": 1, "window": 1, "max_history": 1, "pairs_at_once": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ConfigError(f"gin: {name} must be at least {bound}, got {getattr(self, name)}")
        if self.folds < 0 or self.folds == 1:
            raise ConfigError(f"gin: folds must be 0 (none) or at least 2, got {self.folds}")
        if self.graph not in GRAPHS or self.strength not in ("count", "cosine"):
            raise ConfigError(
                f"gin: graph must be one of {', '.join(GRAPHS)} and strength count or cosine, "
                f"got graph={self.graph!r}, strength={self.strength!r}"
            )
        if self.training not in ("joint", "two-stage"):
            raise ConfigError(f"gin: training must be joint or two-stage, got {self.training!r}")
        if self.training == "two-stage" and self.graph == "self-loop":
            raise ConfigError('gin: training = "two-stage" learns from neighbours; graph = "self-loop" has none')
        if min(self.edge_vectors.epochs, self.edge_vectors.num_edges, self.edge_vectors.num_negatives) < 1:
            raise ConfigError(f"gin: edge_vectors must all be at least 1, got {self.edge_vectors}")
        if not self.unit_widths:
            raise ConfigError("gin: unit_widths must name at least one hidden width")
        if not 0 <= self.id_dropout < 1:
            raise ConfigError(f"gin: id_dropout must be from 0 to below 1, got {self.id_dropout}")
        self.head.check("gin")


class IntentionLayer(nn.Module):
    """One hop: each node's vector gains what its neighbours say, weighted by attention."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, dim, bias=False)
        self.of_neighbour = nn.Linear(dim, 1, bias=False)
        self.of_self = nn.Linear(dim, 1, bias=False)
        self.of_strength = nn.Parameter(torch.zeros(1))
        self.mix = nn.Linear(2 * dim, dim)
        # Begins as what the neighbours say: a random map would have to be learned before any neighbour helped, and a bias of the usual size
        # would drown embeddings, which start small.
        with torch.no_grad():
            self.mix.weight.copy_(torch.eye(dim, 2 * dim).roll(dim, dims=1))
            self.mix.bias.zero_()

    def forward(self, below_mD: Tensor, hop: Hop) -> Tensor:
        """float32 [n, D] from the vectors [m, D] one hop below; a node without neighbours hears 0 of them."""
        num_nodes, projected_mD = len(hop.own_n), self.project(below_mD)
        # a' [W h_j; W h_i] is a sum of two numbers, each made once per node rather than once per edge.
        asked_m, asking_n = self.of_neighbour(projected_mD)[:, 0], self.of_self(projected_mD)[:, 0][hop.own_n]
        logit_e = leaky_relu(asked_m[hop.neighbour_e] + asking_n[hop.place_e], 0.2)
        logit_e = logit_e + self.of_strength * hop.weight_e.log()
        alpha_e = segment_softmax(logit_e, hop.place_e, num_nodes)
        heard_nD = segment_sum(alpha_e[:, None] * below_mD[hop.neighbour_e], hop.place_e, num_nodes)
        own_nD = below_mD[hop.own_n]
        return own_nD + torch.relu(self.mix(torch.cat([own_nD, heard_nD], dim=1)))

    def plain(self, own_D: Tensor, neighbour_kD: Tensor, weight_k: Tensor) -> Tensor:
        """One node by the formulas as they stand: the reference of tests."""
        heard_D = torch.zeros_like(own_D)
        if len(neighbour_kD):
            a = torch.cat([self.of_neighbour.weight[0], self.of_self.weight[0]])
            pair_kX = torch.cat([self.project(neighbour_kD), self.project(own_D).expand_as(neighbour_kD)], dim=1)
            logit_k = leaky_relu(pair_kX @ a, 0.2) + self.of_strength * weight_k.log()
            heard_D = logit_k.softmax(0) @ neighbour_kD
        return own_D + torch.relu(self.mix(torch.cat([own_D, heard_D])))


class GINState(NamedTuple):
    """The request's side, made once."""

    past_BLD: Tensor
    """Intentions of the past events with their marks, oldest first, then 0."""
    is_real_BL: Tensor
    """True where there is an event."""
    graph_B: Tensor
    """int64: the graph that the request reads; 0 = the whole one, always so outside training."""
    request_BW: Tensor
    """The request's part of the tower's first layer."""


@system(
    "gin",
    stage="ranking",
    paper="Li et al., SIGIR 2019",
    needs={"history", "order"},
    cold_users=True,
    cold_items=True,
    tiny={"dim": 8, "num_layers": 2, "num_neighbours": 3, "unit_widths": (8,), "max_history": 10}
    | {"head": HeadConfig(widths=(16,), dropout=0.0)},
)
class GIN(Ranker):
    """Past clicks enriched by their neighbours in the graph of co-clicks, then attention from each candidate and a tower."""

    Config = GINConfig

    offsets: Tensor
    columns: Tensor
    weights: Tensor
    newest_U: Tensor
    fold_U: Tensor

    def __init__(self, config: GINConfig, space: Space) -> None:
        super().__init__(config, space)
        self.max_history, self.num_rows = config.max_history, space.num_items + 1
        readable = space if config.use_ids else replace(space, known_items=torch.zeros_like(space.known_items))
        self.items = ItemEncoder(readable, config.dim, id_dropout=config.id_dropout, table=config.table)
        self.marks = EventMarks(space, config.dim, config.recency)
        self.layers = nn.ModuleList(IntentionLayer(config.dim) for _ in range(config.num_layers))
        self.unit = ActivationUnit(config.dim, config.unit_widths, config.head.activation)
        width = crossed_width(config.dim, config.dim)
        self.head = CandidateHead(space, config.dim, width, config.head, table=config.table)
        self.contexts = nn.Embedding(self.num_rows, config.dim) if config.training == "two-stage" else None
        if self.contexts is not None:
            nn.init.zeros_(self.contexts.weight)
        self.kept = KeptRows(self.num_rows)
        self._keep(self_loops(self.num_rows))
        self.buffer("fold_U", torch.zeros(space.num_users + 1, dtype=torch.int64))
        self.buffer("newest_U", newest_times(Histories.empty(), space.num_users))

    def _keep(self, graph: SparseRows) -> None:
        device = next(self.parameters()).device
        for name, tensor in graph._asdict().items():
            self.buffer(name, tensor.to(device))
        self.kept.train(self.kept.training)  # what was diffused over another graph is dropped

    def prepare(self, view: View) -> None:
        """Make the graph from the view's events: the whole one, and below it one without each fold of the users."""
        device, config, histories = self.offsets.device, self.config, view.histories
        num_folds = 0 if config.graph == "self-loop" else config.folds
        fold_U = np.zeros(self.space.num_users + 1, dtype=np.int64)
        if num_folds:
            fold_U[1:] = 1 + np.random.default_rng(config.seed).permutation(len(fold_U) - 1) % num_folds
        self.buffer("fold_U", torch.from_numpy(fold_U).to(device))
        self.buffer("newest_U", newest_times(histories, self.space.num_users).to(device))
        self._keep(stacked(list(self._graphs(histories, fold_U, num_folds))))

    def _graphs(self, histories: Histories, fold_U: np.ndarray, num_folds: int) -> Iterator[SparseRows]:
        config, num_rows = self.config, self.num_rows
        if config.graph == "self-loop":
            yield self_loops(num_rows)
            return
        whole = co_clicks(histories, num_rows, config.window)
        change = rewiring(whole, num_rows, config.seed) if config.graph == "random" else None
        fold_N = fold_U[histories.user_of_event]
        for fold in range(num_folds + 1):
            edges = co_clicks(histories.keep(fold_N != fold), num_rows, config.window) if fold else whole
            edges = edges if change is None else change(edges)
            yield strongest(edges, num_rows, config.num_neighbours, config.strength)

    def phases(self) -> tuple[Phase, ...]:
        """All at once, or item vectors from the graph and then, while they stand, the rest."""
        train = Phase(name="train", feed="candidates", losses=self.losses)
        if self.contexts is None:
            return (train,)
        vectors = [*self.items.parameters(), *self.contexts.parameters()]
        of_vectors = {id(p) for p in vectors}
        rest = [p for p in self.parameters() if id(p) not in of_vectors]
        edges = Phase(name="edges", feed="candidates", losses=self.edge_losses, epochs=self.config.edge_vectors.epochs)
        return replace(edges, parameters=lambda: vectors), replace(train, parameters=lambda: rest)

    def edge_losses(self, batch: Batch) -> Losses:
        """Skip-gram with negative samples on edges drawn from the whole graph; of the batch only the number of the step counts.

        DataError for a graph without an edge.
        """
        graph, config = SparseRows(self.offsets, self.columns, self.weights), self.config.edge_vectors
        assert self.contexts is not None
        if not int(self.offsets[self.num_rows]):
            raise DataError(
                'gin: no two items were clicked next to each other, so training = "two-stage" has no graph to learn from; '
                'widen `window`, or set training = "joint"'
            )
        row_P, column_P = drawn_edges(graph, self.num_rows, config.num_edges)
        other_PK = column_P[torch.randint(len(column_P), (len(column_P), config.num_negatives), device=row_P.device)]
        item_PD = self.items(row_P)
        near_P = (item_PD * self.contexts(column_P)).sum(1)
        far_PK = (item_PD[:, None] * self.contexts(other_PK)).sum(2)
        return {"edges": (softplus(-near_P) + softplus(far_PK).sum(1)).mean()}

    def graph_of(self, batch: Batch) -> Tensor:
        """int64 [B]: which graph each request reads. In training a request that is no later than its user's newest counted event reads one
        without that user; every other request, and all outside training, the whole one."""
        if not self.training:
            return torch.zeros_like(batch.user)
        counted_B = batch.time <= self.newest_U[batch.user]
        return self.fold_U[batch.user].masked_fill(~counted_B, 0)

    def intentions(self, nodes: Tensor) -> Tensor:
        """float32 [x, D] for nodes [x] int64 (graph * N + catalogue row), each distinct one computed once."""
        node_n, place = nodes.unique(return_inverse=True)
        leaf_m, steps = hops(node_n, len(self.layers), self._step)
        vector = self.items(leaf_m % self.num_rows)
        for layer, hop in zip(self.layers, steps, strict=True):
            vector = layer(vector, hop)
        return vector.index_select(0, place)

    def _step(self, nodes_n: Tensor) -> Neighbours:
        """Neighbours in the same graph."""
        found = neighbours(SparseRows(self.offsets, self.columns, self.weights), nodes_n)
        base_n = nodes_n - nodes_n % self.num_rows
        return found._replace(node_e=found.node_e + base_n[found.place_e])

    def user_state(self, batch: Batch) -> GINState:
        """See GINState."""
        history = batch.history.last(self.max_history)
        graph_B = self.graph_of(batch)
        node_E = history.items.values + self.num_rows * graph_B[history.items.row_of_value]
        past_ED = self.marks(self.kept(node_E, self.intentions), history, batch.time)
        past_BLD, is_real_BL = history.items.with_values(past_ED).padded()
        return GINState(past_BLD, is_real_BL, graph_B, self.head.request_side(batch))

    def score_candidates(self, state: GINState, candidates: Candidates) -> Scores:
        """Logits [t] per task."""
        rows = candidates.rows
        if self.config.enrich_candidates:
            node_t = rows.values + self.num_rows * state.graph_B[rows.row_of_value]
            item_tD = self.kept(node_t, self.intentions)
        else:
            item_tD = self.items(rows.values)
        interest_tD = self.interest(state, rows.with_values(item_tD))
        return self.head(state.request_BW, candidates, crossed(item_tD, interest_tD))

    def interest(self, state: GINState, items: Jagged) -> Tensor:
        """Intention attention: the enriched past as each candidate sees it, float32 [t, D]; 0 where there is no history."""
        pairs = None if self.training else self.config.pairs_at_once
        return mixed_past(self._weigh, items, state.past_BLD, state.is_real_BL, pairs)

    def _weigh(self, item_BCD: Tensor, past_BLD: Tensor, is_pair_BLC: Tensor) -> Tensor:
        output_BLC = self.unit(item_BCD, past_BLD, is_pair_BLC) / self.config.dim**0.5
        return masked_softmax(output_BLC.transpose(1, 2), is_pair_BLC.transpose(1, 2)).transpose(1, 2)

    def losses(self, batch: Batch) -> Losses:
        """By task, as `config.head.loss` says."""
        return self.head.losses(self.score(batch), batch)

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """Once: the request's layer; intentions of all items are kept and only looked up. Per candidate: its vector, one activation unit
        per event, the tower."""
        num_past = min(shape.num_history, self.max_history)
        attend = 2 * self.config.dim * num_past + 2 * self.unit.query_flops + num_past * self.unit.pair_flops
        item = 0 if self.config.enrich_candidates else linear_flops(self.items)
        return Cost(
            user_flops=0.0 if cached else float(self.head.request_flops),
            item_flops=float(item + attend + self.head.candidate_flops),
            bytes=dense_bytes(self)
            - dense_bytes(self.layers)
            + 4.0 * self.config.dim * (shape.num_candidates + num_past),
        )
