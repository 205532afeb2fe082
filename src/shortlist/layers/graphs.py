"""Graphs as sparse rows: items clicked one after the other, random controls, neighbours of many nodes at once, sums over them.

A graph of N nodes is a SparseRows (layers/counting.py): row i holds the neighbours of node i and their weights. Several graphs of the
same nodes stand one under the other (`stacked`): row s N + i is node i in graph s. No tensor is padded: neighbours of all nodes asked for
lie end to end, e of them, each with the place of its node.

N nodes (of items: row 0 is the unknown one, without neighbours), n nodes asked for, e neighbours end to end, D width of a vector.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from shortlist.data.histories import Histories, Int
from shortlist.data.jagged import Jagged, segment_sum
from shortlist.layers.counting import PairSums, SparseRows, distinct_in_groups, group_runs, pair_sums, sum_by_key

Strength = Literal["count", "cosine"]
NEVER = torch.iinfo(torch.int64).min
"""Newest time of a user without events."""


# -- making -------------------------------------------------------------------------------------------------------------------------------


def co_clicks(histories: Histories, num_rows: int, window: int = 1) -> PairSums:
    """How often two different items were chosen near each other by the same user: entries (i, j) and (j, i), by row, then column.

    Near is: in the same group, or in groups that stand at most `window` apart in the user's order. Within a group the order says nothing,
    so all its items are near each other; where every event is a group of its own, this counts clicks at a distance of at most `window`.

    Args:
        num_rows: N.
    """
    log = distinct_in_groups(histories, num_rows)
    run = group_runs(log)
    opens = np.append(np.flatnonzero(np.diff(run, prepend=-1)), len(run))
    user = log.user_of_event
    first, last = run[log.offsets[user]] if len(run) else run, run[log.offsets[user + 1] - 1] if len(run) else run
    ones = np.ones(len(run))
    blocks = pair_sums(
        source=log.item,
        start=opens[np.maximum(run - window, first)],
        stop=opens[np.minimum(run + window, last) + 1],
        weight=ones,
        partner=log.item,
        partner_weight=ones,
        num_rows=num_rows,
    )
    kept = [PairSums(*(column[b.row != b.column] for column in b)) for b in blocks]
    empty = PairSums(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    return PairSums(*(np.concatenate(parts) for parts in zip(empty, *kept)))


def rewiring(edges: PairSums, num_rows: int, seed: int) -> Callable[[PairSums], PairSums]:
    """A random graph with the degrees of this one: one end of every pair of neighbours moves to another pair, weights stay with pairs.

    Gives a function that rewires this graph, or another of some of its pairs, always in the same way: so a graph of fewer users stays a
    part of the graph of all. An item keeps its number of neighbours but for pairs that fall on one item or on each other.

    Args:
        edges: symmetric, by row, then column, as `co_clicks` gives them.
    """
    rng = np.random.default_rng(seed)

    def upper(some: PairSums) -> tuple[Int, Int, np.ndarray]:
        half = some.row < some.column
        return some.row[half], some.column[half], some.weight[half]

    row, column, _ = upper(edges)
    known = row * num_rows + column
    flipped = rng.random(len(known)) < 0.5
    left, right = np.where(flipped, column, row), rng.permutation(np.where(flipped, row, column))

    def rewired(some: PairSums) -> PairSums:
        row, column, weight = upper(some)
        place = np.searchsorted(known, row * num_rows + column)
        one, other = left[place], right[place]
        live = one != other
        one, other, weight = one[live], other[live], weight[live]
        keys, sums = sum_by_key(
            np.concatenate([one * num_rows + other, other * num_rows + one]),
            np.concatenate([weight, weight]),
            num_rows * num_rows,
        )
        return PairSums(row=keys // num_rows, column=keys % num_rows, weight=sums)

    return rewired


def strongest(edges: PairSums, num_rows: int, most: int, strength: Strength = "cosine") -> SparseRows:
    """Each node's strongest neighbours, at most so many; of equals those with the lowest number.

    Args:
        edges: by row, then column.
        strength: count = the weight c_ij itself; cosine = c_ij / sqrt(d_i d_j) with d_i the sum of row i, so that what everybody chooses is
            not everybody's neighbour. It becomes the weight.
    """
    row, column, weight = edges
    if strength == "cosine":
        degree_N = np.bincount(row, weights=weight, minlength=num_rows)
        weight = weight / np.sqrt(degree_N[row] * degree_N[column])
    order = np.lexsort((column, -weight, row))
    first_N = np.searchsorted(row, np.arange(num_rows))
    rank = np.empty(len(row), dtype=np.int64)
    rank[order] = np.arange(len(row)) - first_N[row]
    near = rank < most
    row_e, column_e, weight_e = (torch.from_numpy(part[near]) for part in (row, column, weight))
    return from_edges(row_e, column_e, weight_e, num_rows)


def from_edges(row_e: Tensor, column_e: Tensor, weight_e: Tensor, num_rows: int) -> SparseRows:
    """Edges [e] in any order as sparse rows, neighbours rising; no edge is summed with another."""
    order = column_e.argsort(stable=True)
    order = order[row_e[order].argsort(stable=True)]
    lengths = torch.bincount(row_e, minlength=num_rows)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return SparseRows(offsets, column_e[order].int(), weight_e[order].float())


def self_loops(num_rows: int) -> SparseRows:
    """Every node is its own only neighbour."""
    every = torch.arange(num_rows + 1)
    return SparseRows(every, every[:-1].int(), torch.ones(num_rows))


def stacked(graphs: list[SparseRows]) -> SparseRows:
    """Graphs of the same N nodes one under the other; columns still number the N nodes."""
    shifts = np.cumsum([0, *(len(g.columns) for g in graphs)])
    offsets = [g.offsets[min(s, 1) :] + int(shift) for s, (g, shift) in enumerate(zip(graphs, shifts, strict=False))]
    return SparseRows(
        torch.cat(offsets), torch.cat([g.columns for g in graphs]), torch.cat([g.weights for g in graphs])
    )


def newest_times(histories: Histories, num_users: int) -> Tensor:
    """int64 [num_users + 1]: time of each user's newest event; NEVER where there is none."""
    newest = np.full(num_users + 1, NEVER, dtype=np.int64)
    offsets = histories.offsets[: num_users + 2]
    filled = np.flatnonzero(np.diff(offsets))
    newest[filled] = histories.time[offsets[filled + 1] - 1]
    return torch.from_numpy(newest)


# -- reading ------------------------------------------------------------------------------------------------------------------------------


class Neighbours(NamedTuple):
    """Neighbours of n nodes, end to end."""

    place_e: Tensor
    """int64: which of the n nodes it belongs to."""
    node_e: Tensor
    """int64: the neighbour."""
    weight_e: Tensor
    """float32."""


def neighbours(graph: SparseRows, rows: Tensor, most: int | None = None) -> Neighbours:
    """Neighbours of the rows [n] int64, repeats allowed; in the order of the rows.

    Args:
        most: where a node has more, so many of them are drawn without replacement, with chances by weight (an exponential race: Efraimidis
            and Spirakis, 2006), from torch's random numbers; None = all.
    """
    index, lengths = Jagged(graph.columns, graph.offsets).where(rows)
    place_e = torch.arange(len(rows), device=rows.device).repeat_interleave(lengths, output_size=len(index))
    weight_e = graph.weights.index_select(0, index)
    if most is not None and len(index) and int(lengths.max()) > most:
        finish_e = torch.empty_like(weight_e).exponential_() / weight_e
        order = finish_e.argsort()
        order = order[place_e[order].argsort(stable=True)]
        rank = torch.arange(len(order), device=rows.device) - (lengths.cumsum(0) - lengths)[place_e[order]]
        kept = order[rank < most].sort().values
        index, place_e, weight_e = index[kept], place_e[kept], weight_e[kept]
    return Neighbours(place_e, graph.columns.index_select(0, index).long(), weight_e)


def drawn_edges(graph: SparseRows, num_rows: int, count: int) -> tuple[Tensor, Tensor]:
    """Edges of the graph's first `num_rows` nodes, drawn with chances by weight from torch's random numbers, repeats allowed.

    Returns int64 [count] nodes, and [count] their neighbours; the weights must not all be 0.
    """
    sums_e = graph.weights[: int(graph.offsets[num_rows])].double().cumsum(0)
    lot = torch.rand(count, dtype=torch.float64, device=sums_e.device) * sums_e[-1]
    index = torch.searchsorted(sums_e, lot, right=True).clamp(max=len(sums_e) - 1)
    row = torch.searchsorted(graph.offsets, index, right=True) - 1
    return row, graph.columns.index_select(0, index).long()


class Hop(NamedTuple):
    """One step of n nodes to their neighbours, both as places among the m distinct nodes that the step reads."""

    own_n: Tensor
    """int64: where each node itself stands below."""
    neighbour_e: Tensor
    """int64: where each neighbour stands below."""
    place_e: Tensor
    """int64: as `Neighbours.place_e`."""
    weight_e: Tensor
    """float32."""


def hops(nodes_n: Tensor, count: int, step: Callable[[Tensor], Neighbours]) -> tuple[Tensor, list[Hop]]:
    """What vectors of distinct nodes after `count` layers need: the nodes whose own vectors are read, and the hops, outermost first.

    However many nodes share a neighbour, it is read and aggregated once per layer.

    Args:
        step: gives the neighbours of nodes.
    """
    levels = []
    for _ in range(count):
        found = step(nodes_n)
        below, place = torch.cat([nodes_n, found.node_e]).unique(return_inverse=True)
        levels.append(Hop(place[: len(nodes_n)], place[len(nodes_n) :], found.place_e, found.weight_e))
        nodes_n = below
    return nodes_n, levels[::-1]


def segment_softmax(logit_e: Tensor, place_e: Tensor, num_rows: int) -> Tensor:
    """Softmax of logits [e] among those with the same place; float [e]."""
    highest_n = logit_e.new_full((num_rows,), -torch.inf).scatter_reduce(0, place_e, logit_e.detach(), "amax")
    raised_e = (logit_e - highest_n[place_e]).exp()
    return raised_e / segment_sum(raised_e, place_e, num_rows)[place_e]


def neighbour_mean(vector_eD: Tensor, weight_e: Tensor, place_e: Tensor, num_rows: int) -> Tensor:
    """Mean of vectors by place, weighted: [num_rows, D]; 0 where there is none."""
    total_n = segment_sum(weight_e, place_e, num_rows).clamp(min=torch.finfo(weight_e.dtype).tiny)
    return segment_sum(vector_eD * weight_e[:, None], place_e, num_rows) / total_n[:, None]
