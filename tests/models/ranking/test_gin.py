"""GIN: a hop by hand and by recursion, DIN without a graph, own clicks out of the training graph, kept intentions, groups, costs."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from interaction_support import flops_counted, flops_stated
from ranking_support import batch_of, rich_batch, rich_space, share_right, space_of, train
from shortlist.data.histories import Histories, View
from shortlist.data.schema import FieldTable
from shortlist.errors import ConfigError, DataError
from shortlist.layers.counting import SparseRows
from shortlist.layers.graphs import Hop, Neighbours, neighbours
from shortlist.layers.scoring import HeadConfig
from shortlist.models.base import load_weights
from shortlist.models.ranking.din import DIN, DINConfig
from shortlist.models.ranking.gin import GIN, EdgeVectors, GINConfig, IntentionLayer
from shortlist.training.context import only

HEAD = HeadConfig(widths=(16,), dropout=0.0, id_dropout=0.0, activation="relu")
TINY = GINConfig(dim=8, num_layers=2, num_neighbours=3, unit_widths=(6,), max_history=3, id_dropout=0.0, head=HEAD)
PAST, OFFERED = [[1, 2, 3, 4], [], [5, 5], [6]], [[1, 7, 9], [2, 11], [], [3, 12, 8, 4]]
CLICKS = ([1, 2, 3, 4, 1], [2, 3], [5, 6, 7], [8, 9, 8, 10], [1, 2], [3, 1, 5])


def view_of(clicks, space) -> View:
    lengths = [0, *map(len, clicks), *[0] * (space.num_users - len(clicks))]
    item = np.array([i for items in clicks for i in items], dtype=np.int64)
    time = np.array([3600 * t for items in clicks for t in range(len(items))], dtype=np.int64)
    ones = np.ones(len(item), dtype=np.int64)
    histories = Histories(
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        item=item,
        time=time,
        group=np.arange(len(item)),
        action=ones,
        value=ones.astype(np.float32),
    )
    return View(histories=histories, space=space, users=FieldTable(space.num_users + 1), now=10**9)


def made(config: GINConfig = TINY, space=None, clicks=CLICKS) -> GIN:
    torch.manual_seed(0)
    model = GIN(config, space or rich_space()).eval()
    model.prepare(view_of(clicks, model.space))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    return model


def graph_neighbours(model: GIN, item: int, graph: int = 0) -> list[int]:
    return read(model, item + graph * model.num_rows).node_e.tolist()


def read(model: GIN, node: int) -> Neighbours:
    return neighbours(SparseRows(model.offsets, model.columns, model.weights), torch.tensor([node]))


@torch.no_grad()
def test_a_hop_by_hand():
    """One dimension; W = 2, a = [1, -1], U = [1, 1]: node 1 hears 3 and -1, node 0 hears nothing.

    Logits of node 1 (h = 1): 2 * 3 - 2 * 1 = 4 and 2 * -1 - 2 = -4, leaky: 4 and -.8. Node 0 (h = -2): relu(-2 + 0) = 0.
    """
    layer = IntentionLayer(1)
    layer.project.weight.fill_(2.0)
    layer.of_neighbour.weight.fill_(1.0)
    layer.of_self.weight.fill_(-1.0)
    layer.mix.weight.fill_(1.0)
    below = torch.tensor([[-2.0], [1.0], [3.0], [-1.0]])
    hop = Hop(torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([1, 1]), torch.tensor([1.0, 1.0]))
    share = 1 / (1 + np.exp(-4.8))
    heard = share * 3 - (1 - share)
    torch.testing.assert_close(layer(below, hop), torch.tensor([[-2.0], [1 + 1 + float(heard)]]))
    layer.of_strength.fill_(1.0)  # + log c: weights 1 and e add a head start of 1 to the second
    hop = hop._replace(weight_e=torch.tensor([1.0, np.e]))
    share = 1 / (1 + np.exp(-3.8))
    assert layer(below, hop)[1].item() == pytest.approx(2 + share * 3 - (1 - share), rel=1e-5)


@pytest.mark.parametrize("num_layers", [0, 1, 2, 3])
@torch.no_grad()
def test_intentions_by_recursion(num_layers):
    model = made(replace(TINY, num_layers=num_layers))

    def plain(item: int, depth: int) -> torch.Tensor:
        if not depth:
            return model.items(torch.tensor([item]))[0]
        found = read(model, item)
        near = [plain(j, depth - 1) for j in found.node_e.tolist()]
        near_kD = torch.stack(near) if near else torch.zeros(0, TINY.dim)
        return model.layers[depth - 1].plain(plain(item, depth - 1), near_kD, found.weight_e)

    items = torch.tensor([3, 11, 8, 3, 0])  # 11 and the unknown item have no clicks, so no neighbours
    assert graph_neighbours(model, 11) == graph_neighbours(model, 0) == []
    expected = torch.stack([plain(int(i), num_layers) for i in items])
    torch.testing.assert_close(model.intentions(items), expected)


@torch.no_grad()
def test_without_layers_it_is_din():
    gin = made(replace(TINY, num_layers=0))
    settings = {"dim": 8, "unit_widths": (6,), "widths": (16,), "max_history": 3, "activation": "relu", "dropout": 0.0}
    din = DIN(DINConfig(**settings, mba=0.0), rich_space()).eval()
    shared = {name: tensor for name, tensor in gin.state_dict().items() if name in din.state_dict()}
    assert set(din.state_dict()) == {*shared, "num_events"}
    load_weights(din, {**shared, "num_events": din.num_events})
    batch = rich_batch(PAST, OFFERED)
    torch.testing.assert_close(gin.score(batch)["target"], din.score(batch)["target"])


@torch.no_grad()
def test_each_item_is_computed_once_however_often_it_is_met():
    model, asked = made().train(), []
    model.items.register_forward_hook(lambda module, args, output: asked.append(args[0]))
    past = [[1, 2, 3, 4, 1, 2, 3]] * 50
    model.user_state(replace(rich_batch(past, [[1]] * 50), user=torch.zeros(50, dtype=torch.int64)))
    (rows,) = asked
    assert len(rows) == len(rows.unique()) <= 12


# -- traps -------------------------------------------------------------------------------------------------------------------------------


def test_a_training_request_does_not_read_its_own_clicks():
    """User 2 alone went from 2 to 9. A request of theirs in training must not see that edge at any depth; all others may."""
    clicks = ([1, 2, 3], [4, 2, 9], [1, 2], [3, 4], [9, 10], [5, 6])
    model = made(replace(TINY, num_layers=3, num_neighbours=9), clicks=clicks)
    assert 9 in graph_neighbours(model, 2)
    fold = int(model.fold_U[2])
    assert fold > 0
    assert 9 not in graph_neighbours(model, 2, fold)

    def reaches(user: int, time: int) -> bool:
        """Whether item 9's own vector moves what a past of 4 and 2 says."""
        model.train().zero_grad()
        batch = rich_batch([[4, 2]], [[1]])
        batch = replace(batch, user=torch.tensor([user]), time=torch.tensor([time]))
        model.user_state(batch).past_BLD.square().sum().backward()
        return bool(model.items.ids.rows.weight.grad[9].any())

    assert not reaches(2, 7200)  # the very moment of the click on 9
    assert reaches(2, 7201)  # later than all that was counted
    assert reaches(0, 7200)  # a user without clicks
    other = next(u for u in range(1, 7) if int(model.fold_U[u]) != fold and u != 2)
    assert reaches(other, 0)  # another fold left other users out
    model.eval()
    assert model.graph_of(replace(rich_batch([[4, 2]], [[1]]), user=torch.tensor([2]))).tolist() == [0]


def test_every_user_is_in_one_fold_and_folds_are_about_equal():
    model = made(replace(TINY, folds=3))
    assert model.fold_U[0] == 0
    assert sorted(torch.bincount(model.fold_U[1:]).tolist()) == [0, 3, 3, 4]
    assert len(model.offsets) == 4 * model.num_rows + 1
    assert len(made(replace(TINY, folds=0)).offsets) == model.num_rows + 1


def test_control_graphs_have_the_same_parameters():
    shapes = []
    for graph in ("co-click", "self-loop", "random"):
        model = made(replace(TINY, graph=graph))
        shapes.append({name: p.shape for name, p in model.named_parameters()})
        assert torch.isfinite(model.score(rich_batch(PAST, OFFERED))["target"]).all()
        if graph == "self-loop":
            assert [graph_neighbours(model, i) for i in range(13)] == [[i] for i in range(13)]
    assert shapes[0] == shapes[1] == shapes[2]


@torch.no_grad()
def test_kept_intentions_score_as_those_made_on_the_fly():
    """Serving equivalence: the export of all items gives the same scores to 1e-5."""
    for enrich in (False, True):
        model, batch = made(replace(TINY, enrich_candidates=enrich)), rich_batch(PAST, OFFERED)
        kept = model.score(batch)["target"]
        assert model.kept._kept is not None
        with torch.enable_grad():  # then nothing is kept
            direct = model.score(batch)["target"]
        torch.testing.assert_close(kept, direct, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_new_graph_drops_what_was_kept():
    model, batch = made(), rich_batch(PAST, OFFERED)
    before = model.score(batch)["target"]
    model.prepare(view_of(([1, 7], [2, 7], [3, 7], [4, 8]), model.space))
    assert not torch.equal(model.score(batch)["target"], before)


@torch.no_grad()
def test_neighbours_are_not_attended_to_as_if_clicked():
    model = made()
    state = model.user_state(rich_batch([[2, 3]], [[1]]))
    assert state.past_BLD.shape == (1, 2, TINY.dim)


@torch.no_grad()
def test_slices_of_candidates_change_nothing():
    batch = rich_batch(PAST, OFFERED)
    scores = [made(replace(TINY, pairs_at_once=pairs)).score(batch)["target"] for pairs in (1, 5, 1_000_000)]
    torch.testing.assert_close(scores[0], scores[2])
    torch.testing.assert_close(scores[1], scores[2])


def test_empty_pasts_and_candidates():
    model = made()
    assert torch.isfinite(model.score(rich_batch([[], []], OFFERED[:2]))["target"]).all()
    assert model.score(rich_batch(PAST[:2], [[], []]))["target"].shape == (0,)
    model.train().losses(rich_batch([[], []], [[1, 2], [3]], target=[1.0, 0, 0]))["target"].backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    fresh = GIN(TINY, rich_space()).eval()  # before any graph: every item its own neighbour
    assert torch.isfinite(fresh.score(rich_batch(PAST, OFFERED))["target"]).all()


# -- learning ----------------------------------------------------------------------------------------------------------------------------

GROUPS, PER_GROUP = 20, 8


def grouped_clicks(draw: np.random.Generator) -> list[list[int]]:
    """Other people's clicks stay in one group of items each; only they tell which items belong together."""
    group = draw.integers(0, GROUPS, 600)
    return [(1 + g * PER_GROUP + draw.permutation(PER_GROUP)[:5]).tolist() for g in group]


def one_click(size: int, draw: torch.Generator, items: slice):
    """A past of a single item; one of two candidates is of its group. Training knows some items of a group together, the test others."""
    group = torch.rand(size, GROUPS, generator=draw).argsort(1)[:, :2]
    chosen = torch.arange(PER_GROUP)[items]
    place = chosen[torch.randint(len(chosen), (size, 3), generator=draw)]
    past = 1 + group[:, 0] * PER_GROUP + place[:, 0]
    offered = 1 + group * PER_GROUP + place[:, 1:]
    label = torch.tensor([1.0, 0.0]).repeat(size)
    return batch_of(past[:, None].tolist(), offered.tolist(), labels={"target": label})


def test_the_graph_tells_of_items_that_labels_do_not():
    """Labels tell the groups of items 0-3 of each group alone; in the test the past is one of items 4-7, the candidates of 0-3."""
    space = replace(space_of(GROUPS * PER_GROUP), num_users=600)
    config = GINConfig(dim=8, num_neighbours=7, unit_widths=(8,), head=HEAD)
    view = view_of(grouped_clicks(np.random.default_rng(0)), space)
    test = one_click(500, torch.Generator().manual_seed(9), slice(0, 4))
    moved = test.history.items.values + 4
    test = replace(test, history=replace(test.history, items=test.history.items.with_values(moved)))
    right = {}
    for graph in ("co-click", "self-loop", "random"):
        torch.manual_seed(0)
        model = GIN(replace(config, graph=graph), space)
        model.prepare(view)
        train(model, lambda size, draw: one_click(size, draw, slice(0, 4)), steps=120, lr=0.02)
        right[graph] = share_right(model, test)
    assert right["co-click"] > 0.8
    assert max(right["self-loop"], right["random"]) < 0.65


# -- joint and two-stage ------------------------------------------------------------------------------------------------------------------


def learned(config: GINConfig, phase: int) -> tuple[GIN, set[str]]:
    """The model after one step of a phase, and the parameters that it moved."""
    model = made(config).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = model.phases()[phase]
    with only(model, step) as parameters:
        optimiser = torch.optim.SGD(parameters, lr=0.5)
        sum(step.losses(rich_batch(PAST, OFFERED, target=[1.0, 0, 0, 1, 0, 1, 0, 0, 0])).values()).backward()
        optimiser.step()
    return model, {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def test_each_stage_updates_what_it_should():
    """Joint: the ranker's loss reaches vectors, graph layers and tower. Two-stage: the graph moves vectors alone, the ranker all else."""
    # With bce even the tower's last bias is felt, which a softmax over candidates is not.
    two = replace(TINY, training="two-stage", num_layers=1, head=replace(HEAD, loss="bce"))
    _, joint = learned(replace(two, training="joint"), 0)
    model, first = learned(two, 0)
    _, second = learned(two, 1)
    vectors = {name for name, _ in model.named_parameters() if name.startswith(("items.", "contexts."))}
    of_ids = {name for name in vectors if name.startswith(("items.ids", "contexts"))}
    assert of_ids <= first <= vectors
    assert not second & vectors
    assert {"layers.0.mix.weight", "layers.0.project.weight"} <= second
    assert any(name.startswith("unit.") for name in second)
    assert any(name.startswith("head.") for name in second)
    # Shifts all logits of a node alike, unless some lie on the other side of the leaky ReLU.
    unsure = {"layers.0.of_self.weight"}
    assert joint - unsure == (second | {name for name in first if not name.startswith("contexts")}) - unsure
    assert len(GIN(TINY, rich_space()).phases()) == 1
    assert GIN(TINY, rich_space()).contexts is None


def test_the_loss_of_edges_by_hand():
    """Two items with one edge: every draw is (1, 2) or (2, 1), and every negative 1 or 2."""
    config = replace(TINY, training="two-stage", edge_vectors=EdgeVectors(num_edges=4_000, num_negatives=2))
    model = made(config, clicks=([1, 2], [1, 2]))
    with torch.no_grad():
        x, y = model.items(torch.tensor([1, 2])), model.contexts(torch.tensor([1, 2]))
        found = float(model.edge_losses(rich_batch(PAST, OFFERED))["edges"])
    s = (x @ y.T).double()
    plus = torch.nn.functional.softplus
    near = (plus(-s[0, 1]) + plus(-s[1, 0])) / 2
    far = plus(s).mean()
    assert found == pytest.approx(float(near + 2 * far), rel=0.05)


def test_vectors_of_the_first_stage_tell_the_groups():
    """After the first stage, which reads no label, every item lies nearest to one of its group."""
    space = replace(space_of(GROUPS * PER_GROUP), num_users=600)
    config = GINConfig(
        dim=16, num_layers=0, num_neighbours=7, training="two-stage", unit_widths=(8,), id_dropout=0.0, head=HEAD
    )
    torch.manual_seed(0)
    model = GIN(config, space)
    model.prepare(view_of(grouped_clicks(np.random.default_rng(0)), space))
    edges = model.phases()[0]
    with only(model.train(), edges) as parameters:
        optimiser = torch.optim.Adam(parameters, lr=0.05)
        for _ in range(80):
            optimiser.zero_grad()
            edges.losses(None)["edges"].backward()
            optimiser.step()
    item_ND = torch.nn.functional.normalize(model.eval().items(torch.arange(1, space.num_items + 1)).detach())
    group_N = torch.arange(space.num_items) // PER_GROUP
    nearest = (item_ND @ item_ND.T - 2 * torch.eye(len(item_ND))).argmax(1)
    assert (group_N[nearest] == group_N).float().mean() > 0.95


def test_two_stage_without_an_edge_is_refused():
    model = made(replace(TINY, training="two-stage"), clicks=([1], [2]))
    with pytest.raises(DataError, match="no two items were clicked next to each other"):
        model.edge_losses(rich_batch(PAST, OFFERED))


# -- costs and settings ------------------------------------------------------------------------------------------------------------------


def test_stated_costs_are_what_is_computed():
    model = made(GINConfig(max_history=30))
    with torch.no_grad():
        model.score(rich_batch(PAST, OFFERED))  # intentions are kept from here on
        stated, counted = flops_stated(model, 20, 40), flops_counted(model, 20, 40)
    assert stated[1] == pytest.approx(counted[1], rel=0.2)
    assert stated[0] >= 0.9 * counted[0]


def test_settings_out_of_range_are_refused_by_name():
    for settings, words in (
        ({"folds": 1}, "folds must be 0"),
        ({"num_layers": -1}, "num_layers must be at least 0"),
        ({"graph": "tree"}, "graph must be one of co-click, self-loop, random"),
        ({"training": "later"}, "joint or two-stage"),
        ({"training": "two-stage", "graph": "self-loop"}, "has none"),
        ({"edge_vectors": EdgeVectors(epochs=0)}, "edge_vectors must all be at least 1"),
        ({"strength": "pmi"}, "strength count or cosine"),
        ({"unit_widths": ()}, "unit_widths"),
        ({"id_dropout": 1.0}, "id_dropout"),
        ({"head": HeadConfig(dropout=2.0)}, "head.dropout"),
    ):
        with pytest.raises(ConfigError, match=words):
            GINConfig(**settings)
