"""Graphs: co-clicks by hand and by brute force, degrees of the random control, neighbours, samples, hops, sums over neighbours."""

import numpy as np
import pytest
import torch

from shortlist.data.histories import Histories
from shortlist.layers.counting import PairSums, SparseRows
from shortlist.layers.graphs import (
    NEVER,
    Neighbours,
    co_clicks,
    drawn_edges,
    from_edges,
    hops,
    neighbour_mean,
    neighbours,
    newest_times,
    rewiring,
    segment_softmax,
    self_loops,
    stacked,
    strongest,
)


def log_of(*users: list[list[int]]) -> Histories:
    """One list of groups per user, a group per second."""
    item, time, group, lengths = [], [], [], [0]
    for groups in users:
        for second, items in enumerate(groups):
            item += items
            time += [second] * len(items)
            group += [len(lengths) * 100 + second] * len(items)
        lengths.append(sum(map(len, groups)))
    ones = np.ones(len(item), dtype=np.int64)
    return Histories(
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        item=np.array(item, dtype=np.int64),
        time=np.array(time, dtype=np.int64),
        group=np.array(group, dtype=np.int64),
        action=ones,
        value=ones.astype(np.float32),
    )


def clicks(*users: list[int]) -> Histories:
    return log_of(*[[[item] for item in items] for items in users])


def counts(edges: PairSums) -> dict[tuple[int, int], float]:
    return {(int(i), int(j)): float(w) for i, j, w in zip(*edges)}


def test_co_clicks_by_hand():
    """1-2 by both users, 2-3 by the first; 3-2 is no edge between users; an item after itself is none."""
    log = clicks([1, 2, 3, 3], [2, 1])
    assert counts(co_clicks(log, 5)) == {(1, 2): 2, (2, 1): 2, (2, 3): 1, (3, 2): 1}
    # A wider window: 1 to 3 and 2 to the second 3 as well.
    assert counts(co_clicks(log, 5, window=2)) == {(1, 2): 2, (2, 1): 2, (2, 3): 2, (3, 2): 2, (1, 3): 1, (3, 1): 1}


def test_order_inside_a_group_says_nothing():
    one = co_clicks(log_of([[1, 2], [3], [4, 5]]), 6)
    other = co_clicks(log_of([[2, 1], [3], [5, 4]]), 6)
    near = {(1, 2), (1, 3), (2, 3), (3, 4), (3, 5), (4, 5)}
    assert counts(one) == counts(other) == {pair: 1 for i, j in near for pair in ((i, j), (j, i))}


@pytest.mark.parametrize("window", [1, 3])
def test_co_clicks_by_brute_force(window):
    rng = np.random.default_rng(0)
    users = [rng.integers(0, 9, rng.integers(0, 12)).tolist() for _ in range(20)]  # 0 is unknown and never counted
    expected: dict[tuple[int, int], float] = {}
    for items in users:
        known = [i for i in items if i]
        for a in range(len(known)):
            for b in range(max(a - window, 0), min(a + window, len(known) - 1) + 1):
                if known[a] != known[b]:
                    expected[known[a], known[b]] = expected.get((known[a], known[b]), 0) + 1
    assert counts(co_clicks(clicks(*users), 9, window)) == expected


def test_no_events_no_edges():
    edges = co_clicks(Histories.empty(3), 5)
    assert len(edges.row) == 0
    assert strongest(edges, 5, 3).offsets.tolist() == [0] * 6


def random_edges(num_rows: int = 40, seed: int = 0) -> PairSums:
    rng = np.random.default_rng(seed)
    return co_clicks(clicks(*[(1 + rng.zipf(1.5, 12) % (num_rows - 1)).tolist() for _ in range(60)]), num_rows)


def test_a_hub_is_not_everybody_s_neighbour():
    """Item 1 is clicked beside 3 twice and beside all others often; 2 is clicked beside 3 alone, twice."""
    edges = co_clicks(clicks([1, 3], [1, 3], [2, 3], [2, 3], *([[1, i] for i in (4, 5, 6, 7)] * 5)), 8)
    by_count, by_cosine = strongest(edges, 8, 1, "count"), strongest(edges, 8, 1, "cosine")
    assert neighbours(by_count, torch.tensor([3])).node_e.tolist() == [1]  # a tie, the lower number
    found = neighbours(by_cosine, torch.tensor([3]))
    assert found.node_e.tolist() == [2]
    assert found.weight_e.item() == pytest.approx(2 / np.sqrt(4 * 2))


def test_the_strongest_are_the_strongest():
    edges, most = random_edges(), 4
    graph = strongest(edges, 40, most, "count")
    for i in range(40):
        weights = sorted(((-w, j) for (a, j), w in counts(edges).items() if a == i))[:most]
        found = neighbours(graph, torch.tensor([i]))
        assert found.node_e.tolist() == sorted(j for _, j in weights)


def test_the_random_graph_keeps_degrees_and_stays_a_part():
    rng = np.random.default_rng(1)
    users = [(1 + rng.integers(0, 199, 8)).tolist() for _ in range(60)]
    whole, part = co_clicks(clicks(*users), 200), co_clicks(clicks(*users[:30]), 200)
    change = rewiring(whole, 200, seed=3)
    random, random_part = change(whole), change(part)
    before, after = (np.bincount(edges.row, minlength=200) for edges in (whole, random))
    assert np.abs(before - after).sum() <= 0.03 * before.sum()  # pairs that fell on one item, or on each other
    assert before.max() > 3
    same = set(counts(whole)) & set(counts(random))
    assert len(same) < 0.1 * len(whole.row)
    assert {(j, i) for i, j in counts(random)} == set(counts(random))
    assert set(counts(random_part)) <= set(counts(random))
    assert all(random_weight <= counts(random)[pair] for pair, random_weight in counts(random_part).items())
    again = rewiring(whole, 200, seed=3)(whole)
    assert counts(again) == counts(random)


GRAPH = from_edges(
    torch.tensor([2, 0, 2, 2, 1]), torch.tensor([3, 1, 0, 1, 0]), torch.tensor([7.0, 1.0, 1.0, 2.0, 5.0]), 4
)


def test_edges_in_any_order_become_rows():
    assert GRAPH.offsets.tolist() == [0, 1, 2, 5, 5]
    assert GRAPH.columns.tolist() == [1, 0, 0, 1, 3]
    assert GRAPH.weights.tolist() == [1, 5, 1, 2, 7]


def test_neighbours_of_many_nodes_at_once():
    place, node, weight = neighbours(GRAPH, torch.tensor([2, 3, 0, 2]))
    assert place.tolist() == [0, 0, 0, 2, 3, 3, 3]  # node 3 has none
    assert node.tolist() == [0, 1, 3, 1, 0, 1, 3]
    assert weight.tolist() == [1, 2, 7, 1, 1, 2, 7]


def test_samples_are_drawn_by_weight_without_replacement():
    torch.manual_seed(0)
    rows = torch.cat([torch.full((20_000,), 2), torch.tensor([1])])
    one = neighbours(GRAPH, rows, most=1)
    assert one.place_e.tolist() == list(range(20_001))
    share = torch.bincount(one.node_e[:-1], minlength=4) / 20_000
    torch.testing.assert_close(share, torch.tensor([0.1, 0.2, 0.0, 0.7]), atol=0.015, rtol=0)
    two = neighbours(GRAPH, rows, most=2)
    pairs = two.node_e[:-1].view(-1, 2)
    assert (pairs[:, 0] < pairs[:, 1]).all()
    # Both draws miss node 0 with chance (2 then 7) or (7 then 2): .2 * 7/8 + .7 * 2/3.
    missed = (pairs[:, 0] != 0).float().mean()
    assert missed.item() == pytest.approx(0.2 * 7 / 8 + 0.7 * 2 / 3, abs=0.015)
    whole = neighbours(GRAPH, torch.tensor([2, 1]), most=3)
    assert whole.node_e.tolist() == [0, 1, 3, 0]


def test_edges_are_drawn_by_weight_from_the_first_graph():
    one = from_edges(torch.tensor([1, 1, 3]), torch.tensor([2, 3, 1]), torch.tensor([1.0, 3.0, 4.0]), 5)
    other = from_edges(torch.tensor([4]), torch.tensor([0]), torch.tensor([100.0]), 5)
    torch.manual_seed(0)
    row, column = drawn_edges(stacked([one, other]), 5, 20_000)
    found = torch.bincount(row * 5 + column, minlength=25).double() / 20_000
    expected = torch.zeros(25, dtype=torch.float64)
    expected[[7, 8, 16]] = torch.tensor([0.125, 0.375, 0.5], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=0.015, rtol=0)
    assert found[expected == 0].sum() == 0


def test_stacked_graphs_are_read_by_shifted_rows():
    both = stacked([self_loops(4), GRAPH, self_loops(4)])
    assert len(both.offsets) == 13
    assert neighbours(both, torch.tensor([2, 6, 10])).node_e.tolist() == [2, 0, 1, 3, 2]


def test_hops_give_what_recursion_gives():
    """Vectors of two layers, each the node's own plus the sum of its neighbours', by recursion and level by level."""
    graph = strongest(random_edges(), 40, 3)
    start = torch.randn(40, 2)

    def recursive(node: int, depth: int) -> torch.Tensor:
        if not depth:
            return start[node]
        found = neighbours(graph, torch.tensor([node])).node_e.tolist()
        return recursive(node, depth - 1) + sum(recursive(j, depth - 1) for j in found)

    nodes = torch.tensor([3, 17, 1])
    for depth in (0, 1, 2, 3):
        leaves, levels = hops(nodes, depth, lambda some: neighbours(graph, some))
        assert len(levels) == depth
        assert len(leaves) == len(leaves.unique()) <= 40
        vector = start[leaves]
        for hop in levels:
            heard = torch.zeros(len(hop.own_n), 2).index_add(0, hop.place_e, vector[hop.neighbour_e])
            vector = vector[hop.own_n] + heard
        torch.testing.assert_close(vector, torch.stack([recursive(int(n), depth) for n in nodes]))


def test_softmax_and_mean_by_place():
    place = torch.tensor([0, 0, 2, 2, 2])
    logit = torch.tensor([1.0, 1000.0, 0.5, -3.0, 2.0], requires_grad=True)
    weight = segment_softmax(logit, place, 4)
    torch.testing.assert_close(weight[:2], logit[:2].softmax(0))
    torch.testing.assert_close(weight[2:], logit[2:].softmax(0))
    (weight * torch.arange(5.0)).sum().backward()
    assert torch.isfinite(logit.grad).all()
    mean = neighbour_mean(torch.eye(5), torch.tensor([1.0, 3.0, 1.0, 1.0, 2.0]), place, 4)
    assert mean[0].tolist() == [0.25, 0.75, 0, 0, 0]
    assert mean[2].tolist() == [0, 0, 0.25, 0.25, 0.5]
    assert not mean[[1, 3]].any()  # nothing, not a mean of padding
    assert segment_softmax(torch.zeros(0), torch.zeros(0, dtype=torch.int64), 3).shape == (0,)


def test_newest_times():
    log = log_of([[1], [2], [3, 4]], [], [[5]])
    assert newest_times(log, 5).tolist() == [NEVER, 2, NEVER, 0, NEVER, NEVER]


def test_neighbours_of_nothing():
    none = torch.zeros(0, dtype=torch.int64)
    found = neighbours(GRAPH, none, most=2)
    assert isinstance(found, Neighbours)
    assert len(found.node_e) == 0
    empty = SparseRows(torch.zeros(5, dtype=torch.int64), none.int(), torch.zeros(0))
    assert len(neighbours(empty, torch.tensor([1, 2]), most=2).node_e) == 0
