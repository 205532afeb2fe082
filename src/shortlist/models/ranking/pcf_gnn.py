"""PCF-GNN: statistics of pairs of field values, such as a user's click rate on an item, told by a pre-trained graph network, not stored.

"Explicit Semantic Cross Feature Learning via Pre-trained Graph Neural Networks for CTR Prediction", Li et al., SIGIR 2021 (arXiv
2105.07752). Nodes are the values of the crossed fields; an edge of relation r joins the two values of pair r that met in the history
window, n times with the statistic a: the share of these events that were clicks, or log(1 + n) where the log has nothing but clicks.

    m_r = mean of the neighbours h_j under relation r, weighted by n_ij
    h <- h + tanh(W [h; m_1; ...; m_R])                           K layers; K = 0 is a factorisation without a graph
    p_uv = sigmoid(prior_r + MLP_r([h_u; h_v; h_u * h_v]) + h_u . h_v)        CrossNet; without sigmoid for counts
    loss = sum over observed edges of w(n) (p - a)^2              in a phase of its own; then frozen, vectors of all nodes exported
    logit = tower([all field vectors; logit(p) of each pair, standardised])

A pair that never met still has a p, and what is stored grows with the values, not with their pairs. `statistic="table"` stores the pairs
instead, prior for the others: what the paper sets out from, and what to compare with.

Differences from the paper; aggregator, loss weight and CrossNet's form are reconstructed from readers' notes:
1. The history window is the view's events, or the first `history_share` of them. Requests no later than it teach the ranker nothing: a pair
   seen once would carry its label. So that no label reaches the statistics by another way, edges come from the view alone.
2. w(n) = n by default, the inverse variance of a rate; rates are drawn towards the relation's mean by `smoothing` events.
3. Training draws at most `most_neighbours` per node and relation, by weight; the exported vectors are made from all.
4. A pair one of whose values is not in the history has the relation's prior. No edge is made up for pairs that did not meet.
5. Vectors of nodes do not start the ranker's embeddings, and the network is not tuned by the ranker's loss.
6. A view has no contexts, so pairs are of candidates with users; fields with several values are left out.

B requests, t candidates end to end, P pairs = R relations, N nodes, E edges, n nodes and e neighbours at hand, D width of a node's vector,
W first layer of the tower.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from shortlist.data.batches import Batch, Candidates
from shortlist.data.histories import Histories, View
from shortlist.data.schema import Space
from shortlist.errors import ConfigError, DataError
from shortlist.layers.counting import SparseRows
from shortlist.layers.field_matrix import FieldsConfig
from shortlist.layers.field_tower import DeepPart, FieldBlock
from shortlist.layers.graphs import Neighbours, from_edges, hops, neighbour_mean, neighbours, newest_times
from shortlist.layers.pair_statistics import Edges, PairNodes, as_logit, count_pairs, looked_up
from shortlist.layers.scoring import HeadConfig, dense_bytes, task_losses
from shortlist.layers.towers import MLP
from shortlist.models.base import Cost, Losses, Phase, Ranker, RequestShape, Scores
from shortlist.registry import nearest, system

Weight = Literal["one", "log", "count"]
NODES_AT_ONCE = 4_096
"""Nodes whose neighbours are expanded together when all vectors are made."""
MOST = 5.0
"""Standard deviations beyond which a standardised statistic is cut."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PCFGNNConfig:
    """Settings of PCF-GNN."""

    pairs: tuple[str, ...] = ("item*user",)
    """Crossed pairs, CANDIDATE*USER, such as item*user.age or item.genre*user; which ones is a choice of effect against cost."""
    clicks: tuple[str, ...] = ()
    """Actions that count as clicks: the statistic is their share among the events of a pair. Empty = every event is one, and the statistic
    is log(1 + number of events)."""
    statistic: Literal["network", "table"] = "network"
    """Told by the pre-trained network, or looked up in a table of all pairs of the history."""
    num_layers: int = 1
    """K, layers of the graph; 0 = none, the cheap form."""
    dim: int = 16
    """Width of a node's vector."""
    cross_widths: tuple[int, ...] = (32,)
    """Hidden widths of CrossNet's MLP; empty = the inner product alone."""
    weight: Weight = "count"
    """w(n), how much an edge of n events counts in pre-training: 1, log(1 + n) or n."""
    smoothing: float = 1.0
    """Events at the relation's mean rate that are added to every pair's own."""
    history_share: float = 1.0
    """Part of the view's events, oldest first, that are counted; below 1 where the requests to learn from lie inside the view."""
    most_neighbours: int = 20
    """Neighbours drawn per node and relation in pre-training."""
    epochs: int = 12
    """Of pre-training, over the edges."""
    batch_size: int = 1_024
    """Edges per step of pre-training."""
    lr: float = 5e-3
    """Of pre-training, by Adam."""
    l2: float = 0.0
    """Strength of an L2 on the node vectors that a step of pre-training reads."""
    fields: FieldsConfig = FieldsConfig()  # noqa: RUF009  (frozen)
    """Which fields the tower reads, and how wide their vectors are."""
    head: HeadConfig = HeadConfig(activation="relu")  # noqa: RUF009  (frozen)
    """The tower."""

    def __post_init__(self) -> None:
        self.fields.check("pcf-gnn")
        self.head.check("pcf-gnn")
        least = {"num_layers": 0, "dim": 1, "smoothing": 0, "most_neighbours": 1, "epochs": 1, "batch_size": 1, "l2": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ConfigError(f"pcf-gnn: {name} must be at least {bound}, got {getattr(self, name)}")
        if not self.pairs or len(set(self.pairs)) < len(self.pairs):
            raise ConfigError(f"pcf-gnn: pairs must list at least one pair, each once, got {list(self.pairs)}")
        if self.weight not in ("one", "log", "count") or self.statistic not in ("network", "table"):
            raise ConfigError(
                "pcf-gnn: weight must be one, log or count and statistic network or table, "
                f"got weight={self.weight!r}, statistic={self.statistic!r}"
            )
        if not 0 < self.history_share <= 1 or self.lr <= 0:
            raise ConfigError(
                "pcf-gnn: history_share must be above 0 and at most 1 and lr above 0, "
                f"got {self.history_share} and {self.lr}"
            )


class CrossNet(nn.Module):
    """What two nodes' vectors say of their edge, beyond the relation's prior: an MLP and the inner product, or that alone."""

    def __init__(self, dim: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.mlp = MLP(3 * dim, widths, 1) if widths else None
        self.flops = 2 * dim + (self.mlp.flops_per_row if self.mlp is not None else 0)

    def forward(self, one_eD: Tensor, other_eD: Tensor) -> Tensor:
        """float32 [e]."""
        product_eD = one_eD * other_eD
        told_e = product_eD.sum(1)
        if self.mlp is not None:
            told_e = told_e + self.mlp(torch.cat([one_eD, other_eD, product_eD], dim=1))[:, 0]
        return told_e


class EdgeNetwork(nn.Module):
    """Tells an edge's statistic from its two nodes: node vectors, layers over the graph, and a CrossNet per relation.

    Args:
        num_nodes: N.
        num_relations: R.
        config: widths and layers.
    """

    def __init__(self, num_nodes: int, num_relations: int, config: PCFGNNConfig) -> None:
        super().__init__()
        D, self.num_nodes, self.num_relations = config.dim, num_nodes, num_relations
        self.most = config.most_neighbours
        self.nodes = nn.Embedding(num_nodes, D, sparse=True)
        nn.init.normal_(self.nodes.weight, std=0.1)
        self.layers = nn.ModuleList(nn.Linear((1 + num_relations) * D, D) for _ in range(config.num_layers))
        self.cross = nn.ModuleList(CrossNet(D, config.cross_widths) for _ in range(num_relations))

    def step(self, graph: SparseRows, most: int | None, nodes_n: Tensor) -> Neighbours:
        """Neighbours of nodes under every relation; the place of a neighbour is relation * n + node."""
        shift_R1 = self.num_nodes * torch.arange(self.num_relations, device=nodes_n.device)[:, None]
        return neighbours(graph, (shift_R1 + nodes_n).flatten(), most)

    def _layer(
        self, layer: nn.Module, own_nD: Tensor, neighbour_eD: Tensor, weight_e: Tensor, place_e: Tensor
    ) -> Tensor:
        num_nodes = len(own_nD)
        mean_xD = neighbour_mean(neighbour_eD, weight_e, place_e, self.num_relations * num_nodes)
        mean_nX = mean_xD.view(self.num_relations, num_nodes, -1).transpose(0, 1).flatten(1)
        output_nD: Tensor = layer(torch.cat([own_nD, mean_nX], dim=1))
        return own_nD + output_nD.tanh()

    def encode(self, nodes_n: Tensor, graph: SparseRows) -> Tensor:
        """float32 [n, D]: h^K of distinct nodes, from at most `most_neighbours` drawn per node and relation."""
        leaf_m, steps = hops(nodes_n, len(self.layers), partial(self.step, graph, self.most))
        vector = self.nodes(leaf_m)
        for layer, hop in zip(self.layers, steps, strict=True):
            own, near = vector[hop.own_n], vector[hop.neighbour_e]
            vector = self._layer(layer, own, near, hop.weight_e, hop.place_e)
        return vector

    def encode_all(self, graph: SparseRows) -> Tensor:
        """float32 [N, D]: h^K of all nodes, from all their neighbours; layer by layer, so that nothing is made twice."""
        vector_ND = self.nodes.weight
        for layer in self.layers:
            made = []
            for part in torch.arange(self.num_nodes, device=vector_ND.device).split(NODES_AT_ONCE):
                found = self.step(graph, None, part)
                made.append(self._layer(layer, vector_ND[part], vector_ND[found.node_e], found.weight_e, found.place_e))
            vector_ND = torch.cat(made)
        return vector_ND


class PCFGNNState(NamedTuple):
    """The request's side, made once."""

    request_BW: Tensor
    """Its part of the tower's first layer."""
    node_BP: Tensor
    """int64: its node in each pair."""
    is_met_BP: Tensor
    """bool: the value is known and stands in the history."""


@system(
    "pcf-gnn",
    stage="ranking",
    paper="Li et al., SIGIR 2021",
    cold_users=True,
    cold_items=True,
    tiny={
        "dim": 4,
        "cross_widths": (8,),
        "epochs": 4,
        "batch_size": 128,
        "fields": FieldsConfig(dim=8, max_history=10),
        "head": HeadConfig(widths=(16,), activation="relu", dropout=0.0),
    },
)
class PCFGNN(Ranker):
    """Statistics of crossed pairs, told by a frozen network over the graph of field values, beside all fields in a tower."""

    Config = PCFGNNConfig

    edge_key: Tensor
    edge_relation: Tensor
    edge_events: Tensor
    edge_target: Tensor
    prior_P: Tensor
    node_ND: Tensor
    is_met_N: Tensor
    until_U: Tensor
    centre_P: Tensor
    spread_P: Tensor

    def __init__(self, config: PCFGNNConfig, space: Space) -> None:
        super().__init__(config, space)
        unknown = [name for name in config.clicks if name not in space.actions]
        if unknown:
            raise ConfigError(
                f"pcf-gnn: the log has no action {unknown[0]!r} to count as a click: {nearest(unknown[0], list(space.actions))}"
            )
        self.max_history, P = config.fields.max_history, len(config.pairs)
        self.pair_nodes = PairNodes(space, config.pairs)
        self.network = EdgeNetwork(self.pair_nodes.num_nodes, P, config) if config.statistic == "network" else None
        self.fields = FieldBlock(space, config.fields.dim, config.fields, config.head)
        self.deep = DeepPart(space, self.fields, config.head, (P,))
        none = torch.zeros(0)
        self._keep(Edges(none.long(), none.long(), none, none))
        self.buffer("prior_P", torch.zeros(P))
        self.buffer("node_ND", torch.zeros(self.pair_nodes.num_nodes if self.network else 0, config.dim))
        self.buffer("is_met_N", torch.zeros(self.pair_nodes.num_nodes, dtype=torch.bool))
        self.buffer("until_U", newest_times(Histories.empty(), space.num_users))
        self.buffer("centre_P", torch.zeros(P))
        self.buffer("spread_P", torch.ones(P))

    def _keep(self, edges: Edges) -> None:
        for name, tensor in edges._asdict().items():
            self.buffer(f"edge_{name}", tensor)

    @property
    def edges(self) -> Edges:
        """Those of the history; only a table keeps them after pre-training."""
        return Edges(self.edge_key, self.edge_relation, self.edge_events, self.edge_target)

    # -- history ------------------------------------------------------------------------------------------------------------------------

    def prepare(self, view: View) -> None:
        """Count the pairs of the history window."""
        device, config = self.prior_P.device, self.config
        nodes = self.pair_nodes.to("cpu")
        counted = count_pairs(view, nodes, config.clicks, config.smoothing, config.history_share)
        nodes.to(device)
        edges = Edges(*(column.to(device) for column in counted.edges))
        is_met_N = torch.zeros(nodes.num_nodes, dtype=torch.bool, device=device)
        is_met_N[torch.cat(nodes.ends(edges.key))] = True
        self._keep(edges)
        self.buffer("is_met_N", is_met_N)
        self.buffer("prior_P", counted.prior_P.to(device))
        self.buffer("until_U", counted.until_U.to(device))

    def graph(self) -> SparseRows:
        """The edges as R graphs of N nodes, one under the other, both ways; weights are numbers of events."""
        edges, num_nodes = self.edges, self.pair_nodes.num_nodes
        one_E, other_E = self.pair_nodes.ends(edges.key)
        base_E = edges.relation * num_nodes
        return from_edges(
            torch.cat([base_E + one_E, base_E + other_E]),
            torch.cat([other_E, one_E]),
            torch.cat([edges.events, edges.events]),
            num_nodes * len(self.config.pairs),
        )

    # -- pre-training -------------------------------------------------------------------------------------------------------------------

    def phases(self) -> tuple[Phase, ...]:
        """The statistics, then the ranker on top of them."""
        own = {id(p) for p in self.network.parameters()} if self.network is not None else set()
        rest = [p for p in self.parameters() if id(p) not in own]
        return (
            Phase(name="statistics", feed="candidates", losses=self.losses, learn=self.learn),
            Phase(name="train", feed="candidates", losses=self.losses, parameters=lambda: rest),
        )

    def learn(self, batches: Iterable[Batch]) -> Losses:
        """Pre-train on the history's edges, export the node vectors, and learn the scale of the statistics on the ranker's own rows.

        A network that was trained before goes on from its weights, on the edges that `prepare` counted now."""
        loss = torch.zeros((), device=self.prior_P.device)
        if self.network is not None and len(self.edge_key):
            graph = self.graph()
            with torch.enable_grad():
                loss = self._pretrained(self.network, graph)
            with torch.no_grad():
                self.buffer("node_ND", self.network.encode_all(graph).clone())
            self._keep(Edges(*(column[:0] for column in self.edges)))
        with torch.no_grad():
            self._learn_scale(batches)
        return dict.fromkeys(self.space.tasks, loss)

    def _pretrained(self, network: EdgeNetwork, graph: SparseRows) -> Tensor:
        """Epochs over the edges by Adam; the last epoch's mean loss. Rows of nodes that a step does not read are left as they are."""
        config, edges = self.config, self.edges
        dense = [p for p in network.parameters() if p is not network.nodes.weight]
        optimisers: list[torch.optim.Optimizer] = [torch.optim.SparseAdam([network.nodes.weight], lr=config.lr)]
        if dense:  # an inner product without a graph has none
            optimisers.append(torch.optim.Adam(dense, lr=config.lr))
        weight_E = edge_weights(edges.events, config.weight)
        total = edges.events.new_zeros(())
        for _ in range(config.epochs):
            total = edges.events.new_zeros(())
            for part in torch.randperm(len(edges.key), device=edges.key.device).split(config.batch_size):
                loss = self._edge_loss(network, graph, Edges(*(column[part] for column in edges)), weight_E[part])
                for optimiser in optimisers:
                    optimiser.zero_grad()
                loss.backward()
                for optimiser in optimisers:
                    optimiser.step()
                total += loss.detach() * len(part)
        network.zero_grad(set_to_none=True)
        return total / len(edges.key)

    def _edge_loss(self, network: EdgeNetwork, graph: SparseRows, edges: Edges, weight_E: Tensor) -> Tensor:
        """L_pre of some edges, and the L2 of the nodes at their ends."""
        node_n, place = torch.cat(self.pair_nodes.ends(edges.key)).unique(return_inverse=True)
        vector_nD = network.encode(node_n, graph)
        one_ED, other_ED = vector_nD[place].chunk(2)
        error_E = torch.zeros_like(edges.target)
        for relation in range(network.num_relations):
            mine = (edges.relation == relation).nonzero()[:, 0]
            raw = self.prior_P[relation] + network.cross[relation](one_ED[mine], other_ED[mine])
            told = raw.sigmoid() if self.config.clicks else raw
            error_E = error_E.index_add(0, mine, told - edges.target[mine])
        loss = (weight_E * error_E.square()).mean()
        if self.config.l2:
            loss = loss + self.config.l2 * network.nodes(node_n).square().sum(1).mean()
        return loss

    def _learn_scale(self, batches: Iterable[Batch]) -> None:
        """Mean and deviation of each raw statistic over candidates of requests after the history; DataError where there are none."""
        count, total_P, squares_P = 0, torch.zeros_like(self.prior_P).double(), torch.zeros_like(self.prior_P).double()
        for batch in batches:
            rows = batch.candidate_rows
            raw_tP = self.raw(*self._ids(batch), rows.row_of_value, rows.values)
            raw_tP = raw_tP[self._is_late(batch)[rows.row_of_value]].double()
            count, total_P, squares_P = count + len(raw_tP), total_P + raw_tP.sum(0), squares_P + raw_tP.square().sum(0)
        if not count:
            raise DataError(
                "pcf-gnn: no request to learn from lies after the events that its statistics were counted on, so every label would be "
                f"among them; give it a view that ends before them, or a history_share below {self.config.history_share:g}"
            )
        mean_P = total_P / count
        self.buffer("centre_P", mean_P.float())
        self.buffer("spread_P", (squares_P / count - mean_P.square()).clamp(min=0).sqrt().clamp(min=1e-3).float())

    def _is_late(self, batch: Batch) -> Tensor:
        """bool [B]: requests later than all that was counted of their user."""
        return batch.time > self.until_U[batch.user]

    # -- ranking ------------------------------------------------------------------------------------------------------------------------

    def _ids(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Nodes of the requests [B, P], and which of them the history knows."""
        node_BP, known_BP = self.pair_nodes.of_requests(batch)
        return node_BP, known_BP & self.is_met_N[node_BP]

    def raw(self, node_BP: Tensor, is_met_BP: Tensor, row_t: Tensor, item_t: Tensor) -> Tensor:
        """float32 [t, P]: the statistics as the network gives them, before the sigmoid; the prior where it knows nothing."""
        node_tP, known_tP = self.pair_nodes.of_items(item_t)
        other_tP, told_tP = node_BP[row_t], is_met_BP[row_t] & known_tP & self.is_met_N[node_tP]
        if self.network is None:
            key_tP, edges = self.pair_nodes.keys(node_tP, other_tP), self.edges
            if self.config.clicks:
                edges = edges._replace(target=as_logit(edges.target))
            return looked_up(edges, key_tP, self.prior_P.expand(key_tP.shape))
        columns = [
            self.network.cross[pair](self.node_ND[node_tP[:, pair]], self.node_ND[other_tP[:, pair]])
            for pair in range(node_tP.shape[1])
        ]
        return self.prior_P + torch.stack(columns, dim=1) * told_tP

    def statistics(self, batch: Batch) -> Tensor:
        """float32 [t, P]: p of each pair of the batch's candidates, as a rate, or as log(1 + n) where there is nothing but clicks."""
        rows = batch.candidate_rows
        raw_tP = self.raw(*self._ids(batch), rows.row_of_value, rows.values)
        return raw_tP.sigmoid() if self.config.clicks else raw_tP

    def stored_bytes(self) -> int:
        """Bytes that serving reads for the statistics: node vectors and CrossNet, or the table's keys and statistics."""
        if self.network is None:
            return sum(t.numel() * t.element_size() for t in (self.edge_key, self.edge_target))
        cross = sum(p.numel() * p.element_size() for p in self.network.cross.parameters())
        return cross + self.node_ND.numel() * self.node_ND.element_size()

    def user_state(self, batch: Batch) -> PCFGNNState:
        """See PCFGNNState: the tower's share of the request (B, W) and its nodes (B, P)."""
        return PCFGNNState(self.deep.request(self.fields.request(batch), batch), *self._ids(batch))

    def score_candidates(self, state: PCFGNNState, candidates: Candidates) -> Scores:
        """Logits [t] per task."""
        rows = candidates.rows
        raw_tP = self.raw(state.node_BP, state.is_met_BP, rows.row_of_value, rows.values).detach()  # frozen
        number_tP = ((raw_tP - self.centre_P) / self.spread_P).clamp(-MOST, MOST)
        logit_tT = self.deep(state.request_BW, self.fields.candidate(candidates), candidates, number_tP)
        return dict(zip(self.space.tasks, logit_tT.unbind(1), strict=True))

    def losses(self, batch: Batch) -> Losses:
        """By task, as `config.head.loss` says; labels of requests no later than the history are not known."""
        late_t = self._is_late(batch)[batch.candidate_rows.row_of_value]
        labels = {task: label.masked_fill(~late_t, torch.nan) for task, label in batch.labels.items()}
        return task_losses(self.score(batch), replace(batch, labels=labels), self.config.head.loss)

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """Per candidate: two look-ups and a CrossNet per pair, its fields, the tower; the graph is gone."""
        fields, P = self.fields, len(self.config.pairs)
        net = self.network
        cross = sum(one.flops for one in net.cross if isinstance(one, CrossNet)) if net is not None else 0
        once = fields.request_flops(shape.num_history) + self.deep.request_flops
        read = fields.bytes_read(shape.num_history, shape.num_candidates, cached=cached)
        read += 4.0 * self.config.dim * P * (shape.num_candidates + 1) if net is not None else 0.0
        layers = dense_bytes(net.layers) if net is not None else 0.0
        return Cost(
            user_flops=0.0 if cached else float(once),
            item_flops=float(fields.candidate_flops + cross + self.deep.candidate_flops),
            bytes=dense_bytes(self) - layers + read,
        )


def edge_weights(events_E: Tensor, weight: Weight) -> Tensor:
    """w(n) of edges with so many events [E], 1 on average."""
    match weight:
        case "one":
            weight_E = torch.ones_like(events_E)
        case "log":
            weight_E = events_E.log1p()
        case _:
            weight_E = events_E
    return weight_E / weight_E.mean()
