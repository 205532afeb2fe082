"""PCF-GNN: statistics by hand, the network by plain loops, unseen pairs, loss weights, no label among the statistics, frozen, costs."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from interaction_support import flops_counted, flops_stated
from ranking_support import batch_of, rich_batch, rich_space, space_of
from shortlist.data.batches import Candidates
from shortlist.data.histories import Histories, Requests, View
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Categorical, FieldTable
from shortlist.errors import ConfigError, DataError
from shortlist.layers.field_matrix import FieldsConfig
from shortlist.layers.graphs import neighbours
from shortlist.layers.pair_statistics import history_window
from shortlist.layers.scoring import HeadConfig
from shortlist.metrics import auc
from shortlist.models.ranking.pcf_gnn import PCFGNN, PCFGNNConfig, edge_weights
from shortlist.training.config import TrainerConfig
from shortlist.training.sources import CandidateSource
from shortlist.training.trainer import fit

HEAD = HeadConfig(widths=(8,), activation="relu", dropout=0.0, id_dropout=0.0)
TINY = PCFGNNConfig(
    pairs=("item*user", "item.category*user", "item*user.country"),
    clicks=("click",),
    dim=4,
    cross_widths=(5,),
    epochs=2,
    batch_size=4,
    fields=FieldsConfig(dim=4),
    head=HEAD,
)
ACTIONS = ("click", "pass")
EVENTS = [  # user, item, clicked; user 3 has no event, nor have items 6 and above
    (1, 1, 1), (1, 1, 0), (1, 2, 0), (1, 5, 1),
    (2, 1, 1), (2, 4, 1), (2, 4, 1),
]  # fmt: skip


def shop() -> tuple:
    """`rich_space` with clicks and passes; users come from country 1, 0 (unknown), 2, ..."""
    space = rich_space(actions=ACTIONS)
    country = torch.tensor([0, 1, 0, 2, 1, 2, 1, 2, 1, 2, 1])
    return space, FieldTable(11, space.user_fields, {"country": country})


def view_of(events, space, users) -> View:
    user, item, clicked = np.array(events, dtype=np.int64).T
    offsets = np.searchsorted(user, np.arange(space.num_users + 2))
    place = np.arange(len(user)) - offsets[user]
    histories = Histories(
        offsets=offsets.astype(np.int64),
        item=item,
        time=place,
        group=np.arange(len(user)),
        action=2 - clicked,
        value=np.ones(len(user), dtype=np.float32),
    )
    return View(histories=histories, space=space, users=users, now=100)


def asked(users: list[int], items: list[int], time: int = 1000, labels=None):
    """Requests with one candidate each, at a moment."""
    batch = rich_batch([[]] * len(users), [[i] for i in items])
    _, table = shop()
    user = torch.tensor(users)
    return replace(
        batch,
        user=user,
        time=torch.full((len(users),), time),
        user_fields=table.gather(user),
        labels={"target": torch.tensor(labels or [float(i % 2) for i in items])},
    )


def made(config: PCFGNNConfig = TINY) -> PCFGNN:
    torch.manual_seed(0)
    space, users = shop()
    model = PCFGNN(config, space)
    model.prepare(view_of(EVENTS, space, users))
    return model.eval()


def stated(model: PCFGNN, pair: int) -> dict[tuple[int, int], tuple[float, float]]:
    """Events and statistic by the two values of one pair."""
    first = model.pair_nodes.first
    candidate, user = model.pair_nodes.ids.pairs[pair]
    mine = model.edge_relation == pair
    one, other = model.pair_nodes.ends(model.edge_key[mine])
    rows = zip(
        (one - first[candidate]).tolist(),
        (other - first[user]).tolist(),
        model.edge_events[mine].tolist(),
        model.edge_target[mine].tolist(),
    )
    return {(i, u): (n, pytest.approx(a)) for i, u, n, a in rows}


def test_statistics_by_hand():
    """Five of seven events are clicks; one event at that rate is added to every pair's own. Categories of items 1, 2, 4, 5: 1, 2, 1, 2."""
    model, mean = made(), 5 / 7
    one = {"no": mean / 2, "yes": (1 + mean) / 2}
    assert stated(model, 0) == {
        (1, 1): (2, (1 + mean) / 3), (2, 1): (1, one["no"]), (5, 1): (1, one["yes"]),
        (1, 2): (1, one["yes"]), (4, 2): (2, (2 + mean) / 3),
    }  # fmt: skip
    assert stated(model, 1) == {(1, 1): (2, (1 + mean) / 3), (2, 1): (2, (1 + mean) / 3), (1, 2): (3, (3 + mean) / 4)}
    # User 2's country is unknown: it meets nothing, and the relation's mean is that of user 1 alone.
    assert stated(model, 2) == {(1, 1): (2, 1.5 / 3), (2, 1): (1, 0.5 / 2), (5, 1): (1, 1.5 / 2)}
    torch.testing.assert_close(model.prior_P.sigmoid(), torch.tensor([mean, mean, 0.5]))


def test_without_clicks_the_statistic_is_a_count():
    model = made(replace(TINY, clicks=(), pairs=("item*user",)))
    found = {pair: a for pair, (_, a) in stated(model, 0).items()}
    assert found[1, 1] == found[4, 2] == float(np.log(3))
    assert found[2, 1] == float(np.log(2))
    assert model.prior_P.item() == pytest.approx((2 * np.log(3) + 3 * np.log(2)) / 5)


def test_pairs_that_did_not_meet_are_no_edges():
    """Absence is not a rate of 0: pre-training sees what met and nothing else."""
    model = made()
    assert len(model.edge_key) == 5 + 3 + 3
    assert len(model.edge_key.unique()) == len(model.edge_key)


@torch.no_grad()
def test_the_table_knows_what_met_and_the_prior_else():
    model = made(replace(TINY, statistic="table"))
    batch = asked([1, 2, 1, 3, 0, 2], [1, 4, 4, 1, 1, 12])
    p = model.statistics(batch)
    mean = 5 / 7
    expected = torch.tensor([(1 + mean) / 3, (2 + mean) / 3, mean, mean, mean, mean])
    torch.testing.assert_close(p[:, 0], expected)
    assert p[2, 1].item() == pytest.approx((1 + mean) / 3)  # category 1, met by user 1 on item 1
    assert p[5, 1].item() == pytest.approx(mean)  # item 12 is of category 3, which met nobody


@pytest.mark.parametrize("weight", ["one", "log", "count"])
def test_edge_weights_are_1_on_average(weight):
    events = torch.tensor([1.0, 3.0, 8.0])
    raw = {"one": [1, 1, 1], "log": np.log1p([1, 3, 8]).tolist(), "count": [1, 3, 8]}[weight]
    torch.testing.assert_close(edge_weights(events, weight), torch.tensor(raw) * 3 / sum(raw))


@pytest.mark.parametrize("num_layers", [0, 1, 2])
@torch.no_grad()
def test_the_network_node_by_node(num_layers):
    """h <- h + tanh(W [h; m_1; .. m_R] + b), means weighted by events, by plain loops over all nodes."""
    model = made(replace(TINY, num_layers=num_layers))
    network, graph, N = model.network, model.graph(), model.pair_nodes.num_nodes
    for p in network.parameters():
        p.normal_(std=0.5)
    h = network.nodes.weight.clone()
    for layer in network.layers:
        fresh = []
        for node in range(N):
            parts = [h[node]]
            for relation in range(3):
                edges = [
                    (int(other if node == one else one), float(n))
                    for one, other, r, n in zip(
                        *model.pair_nodes.ends(model.edge_key), model.edge_relation, model.edge_events
                    )
                    if r == relation and node in (int(one), int(other))
                ]
                total = sum(n for _, n in edges)
                parts.append(sum((h[j] * n / total for j, n in edges), torch.zeros(4)))
            fresh.append(h[node] + torch.tanh(layer(torch.cat(parts))))
        h = torch.stack(fresh)
    torch.testing.assert_close(network.encode_all(graph), h)
    some = torch.tensor([1, 14, 5])
    torch.testing.assert_close(network.encode(some, graph), h[some])  # fewer neighbours than are drawn: all of them


@torch.no_grad()
def test_pre_training_draws_few_neighbours_and_export_reads_all():
    model = made(replace(TINY, most_neighbours=1, pairs=("item*user",)))
    graph, node = model.graph(), torch.tensor([model.pair_nodes.first["user"] + 1])
    assert len(neighbours(graph, node).node_e) == 3
    assert len(model.network.step(graph, model.network.most, node).node_e) == 1


@pytest.mark.parametrize("widths", [(), (5,)])
@torch.no_grad()
def test_p_by_the_formula_and_the_prior_for_unknown_values(widths):
    model = made(replace(TINY, pairs=("item*user",), cross_widths=widths))
    model.learn([asked([1, 2], [2, 3])])
    cross, first = model.network.cross[0], model.pair_nodes.first
    u, v = model.node_ND[first["item"] + 2], model.node_ND[first["user"] + 2]
    told = (u * v).sum() + (cross.mlp(torch.cat([u, v, u * v])) if widths else 0)
    expected = torch.sigmoid(model.prior_P + told)
    p = model.statistics(asked([2, 3, 2, 0], [2, 2, 7, 2]))[:, 0]  # 2 * 2 never met
    torch.testing.assert_close(p[:1], expected)
    torch.testing.assert_close(p[1:], torch.full((3,), 5 / 7))  # user 3, item 7 and nobody are not in the history


@torch.no_grad()
def test_the_tower_reads_standardised_logits():
    model = made()
    lesson = asked([1, 1, 2, 2, 1], [1, 5, 4, 2, 4])
    model.learn([lesson])
    state, rows = model.user_state(lesson), lesson.candidate_rows
    raw = model.raw(state.node_BP, state.is_met_BP, rows.row_of_value, rows.values)
    torch.testing.assert_close(raw.sigmoid(), model.statistics(lesson))
    number = (raw - model.centre_P) / model.spread_P
    torch.testing.assert_close(number.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    varied = raw.std(0, correction=0) > 1e-3
    torch.testing.assert_close(number.std(0, correction=0)[varied], torch.ones(int(varied.sum())), atol=1e-4, rtol=0)
    whole = torch.cat(
        [model.fields.request(lesson).flatten(1), model.fields.candidate(lesson.candidates).flatten(1)], 1
    )
    expected = model.deep.tower.mlp(torch.cat([whole, number], 1))[:, 0]
    torch.testing.assert_close(model.score(lesson)["target"], expected)


# -- traps -------------------------------------------------------------------------------------------------------------------------------


def test_labels_of_requests_inside_the_history_teach_nothing():
    """User 1's last counted event is at 3 s, user 2's at 2 s; a pair seen once would carry its label."""
    model = made()
    early = asked([1, 2, 1], [1, 2, 3], time=3)  # user 2's request is later than all that was counted of them
    one = model.losses(early)["target"]
    flipped = replace(early, labels={"target": torch.tensor([0.0, 0.0, 0.0])})
    torch.testing.assert_close(model.losses(flipped)["target"], one)  # item 2's label is 0 in both
    later = replace(early, labels={"target": torch.tensor([1.0, 1.0, 1.0])})
    assert model.losses(later)["target"] != one
    nothing = model.losses(asked([1], [1], time=3))["target"]
    assert nothing.item() == 0


def test_no_request_after_the_history_is_an_error():
    with pytest.raises(DataError, match="history_share below 1"):
        made().learn([asked([1, 2], [1, 2], time=2)])


@pytest.mark.parametrize("has_clock", [True, False])
def test_a_part_of_the_history(has_clock):
    """Times are 0 1 2 3 and 0 1 2. Half by time: up to 1 s for all, users without events too; half by order: two events of each."""
    space, users = shop()
    view = view_of(EVENTS, replace(space, has_clock=has_clock), users)
    kept, until = history_window(view, 0.5)
    assert kept.time.tolist() == [0, 1, 0, 1]
    assert until[:3].tolist() == ([1, 1, 1] if has_clock else [torch.iinfo(torch.int64).min, 1, 1])
    model = PCFGNN(replace(TINY, history_share=0.5), view.space)
    model.prepare(view)
    assert model.edge_events[model.edge_relation == 0].sum() == 4
    assert model._is_late(asked([1, 2], [1, 1], time=2)).all()
    assert not model._is_late(asked([1, 2], [1, 1], time=1)).any()


def planted(seed: int = 0):
    """60 users and 50 items of rank 2; two of five pairs stand in the history, each about twice."""
    draw = np.random.default_rng(seed)
    logit = 2 * draw.standard_normal((61, 2)) @ draw.standard_normal((2, 51))
    seen = draw.random((61, 51)) < 0.4
    user, item = draw.integers(1, 61, 20_000), draw.integers(1, 51, 20_000)
    clicked = draw.random(20_000) < 1 / (1 + np.exp(-logit[user, item]))
    history = np.flatnonzero(seen[user, item])[:2_500]
    order = history[np.argsort(user[history], kind="stable")]
    space = replace(space_of(50, actions=ACTIONS, has_clock=False), num_users=60)
    view = view_of(np.stack([user, item, clicked], 1)[order], space, FieldTable(61))
    met = np.zeros((61, 51), dtype=bool)
    met[user[history], item[history]] = True
    later = np.arange(10_000, 20_000)
    batch = batch_of(
        [[]] * len(later), item[later, None].tolist(), labels={"target": torch.tensor(clicked[later]).float()}
    )
    batch = replace(batch, user=torch.from_numpy(user[later]), time=torch.full((len(later),), 1000))
    return view, batch, torch.from_numpy(met[user[later], item[later]])


PLANTED = PCFGNNConfig(clicks=("click",), dim=8, cross_widths=(), epochs=20, batch_size=128, lr=2e-2, head=HEAD)


@pytest.mark.parametrize("num_layers", [0, 1])
def test_unseen_pairs_are_told_where_a_table_knows_nothing(num_layers):
    view, batch, met = planted()
    found = {}
    for statistic in ("network", "table"):
        torch.manual_seed(0)
        model = PCFGNN(replace(PLANTED, statistic=statistic, num_layers=num_layers), view.space)
        model.prepare(view)
        model.learn([batch])
        p, label = model.statistics(batch)[:, 0].detach(), batch.labels["target"]
        found[statistic] = [auc(label[part], p[part]) for part in (met, ~met)]
    assert found["table"][1] == 0.5  # every unseen pair has the prior
    assert found["table"][0] > 0.6
    assert min(found["network"]) > 0.7


def test_training_leaves_the_network_as_it_was(tmp_path):
    """Through the trainer: the first phase trains the network alone, the second all but the network; resumed, nothing changes."""
    view, batch, _ = planted()
    rows = batch.candidate_rows
    size = 400
    none = np.zeros(size, dtype=np.int64)
    requests = Requests(
        user=batch.user[:size].numpy(),
        time=batch.time[:size].numpy(),
        start=none,
        end=none,
        target_offsets=np.zeros(size + 1, dtype=np.int64),
        target=none[:0],
        target_value=none[:0].astype(np.float32),
    )
    source = CandidateSource(
        view.histories,
        view.users,
        requests,
        Candidates(rows=Jagged(rows.values[:size], rows.offsets[: size + 1])),
        {"target": batch.labels["target"][:size]},
        batch_size=100,
        max_history=5,
        only_chosen=False,
    )
    scores = []
    for _ in range(2):
        torch.manual_seed(0)
        model = PCFGNN(replace(PLANTED, epochs=3), view.space)
        kept = []
        learn, rate = model.learn, TrainerConfig(epochs=2, lr=1e-2)
        model.learn = lambda batches, learn=learn, model=model, kept=kept: (
            learn(batches),
            kept.append({n: t.clone() for n, t in model.network.state_dict().items()}),
        )[0]
        before = {n: p.clone() for n, p in model.fields.named_parameters()}
        report = fit(model, view, lambda phase: source, config=rate, folder=tmp_path / "run", progress=False)
        assert report.phases == ("statistics", "train")
        if kept:
            assert all(torch.equal(t, kept[0][n]) for n, t in model.network.state_dict().items())
            assert any(not torch.equal(p, before[n]) for n, p in model.fields.named_parameters())
        assert len(model.edge_key) == 0
        with torch.no_grad():
            scores.append(model.score(batch)["target"])
    assert len(kept) == 0  # the second fit found the run done
    assert torch.equal(scores[0], scores[1])


def test_what_is_stored_does_not_grow_with_pairs():
    view, _, _ = planted()
    network, table = (PCFGNN(replace(PLANTED, statistic=s), view.space) for s in ("network", "table"))
    for model in (network, table):
        model.prepare(view)
    assert network.stored_bytes() == 4 * 8 * (61 + 51)
    assert table.stored_bytes() == 12 * len(table.edge_key)


# -- costs and settings ------------------------------------------------------------------------------------------------------------------


def test_stated_costs_are_what_is_computed():
    model = made(replace(TINY, dim=16, cross_widths=(32,), fields=FieldsConfig(dim=16, max_history=30)))
    stated_flops, counted = flops_stated(model, 20, 40), flops_counted(model, 20, 40)
    assert stated_flops[1] == pytest.approx(counted[1], rel=0.2)
    assert stated_flops[0] >= 0.9 * counted[0]


def test_settings_out_of_range_are_refused_by_name():
    space = space_of(5, actions=ACTIONS, context_fields=(Categorical(name="hour", size=3),))
    for settings, words in (
        ({"pairs": ()}, "at least one pair"),
        ({"pairs": ("item*user", "item*user")}, "each once"),
        ({"history_share": 0.0}, "history_share must be above 0"),
        ({"weight": "square"}, "weight must be one, log or count"),
        ({"num_layers": -1}, "num_layers must be at least 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            PCFGNNConfig(**settings)
    for settings, words in (
        ({"clicks": ("clik",)}, "'clik'.*'click'|click"),
        ({"pairs": ("item*history",)}, "crosses 'history'"),
        ({"pairs": ("item*context.hour",)}, r"crosses 'context\.hour'"),
        ({"pairs": ("item*user.age",)}, r"user\.age"),
    ):
        with pytest.raises(ConfigError, match=words):
            PCFGNN(PCFGNNConfig(**settings), space)
