"""The DNN ranker: its formula written out, independence of requests, cold items and users, planted preferences, costs."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ranking_support import batch_of, rich_batch, rich_space, share_right, space_of, train
from shortlist.embeddings.base import TableChoice
from shortlist.errors import ConfigError
from shortlist.models.base import RequestShape
from shortlist.models.ranking.dnn import DNN, DNNConfig

TINY = DNNConfig(dim=8, widths=(16,), max_history=3, dropout=0.0, id_dropout=0.0)
PAST = [[1, 2, 3, 4], [], [5, 5], [6]]
OFFERED = [[1, 7, 9], [2, 11], [], [3, 12, 8, 4]]


def made(config: DNNConfig = TINY, space=None) -> DNN:
    torch.manual_seed(0)
    return DNN(config, space or rich_space()).eval()


@torch.no_grad()
def test_the_formula_written_out():
    """One request, one candidate at a time: mean of the last three items, beside the fields, through the whole tower."""
    model, batch = made(), rich_batch(PAST, OFFERED)
    expected, at = [], 0
    for r, (past, offered) in enumerate(zip(PAST, OFFERED)):
        pooled = model.items(torch.tensor(past[-3:])).mean(0) if past else torch.zeros(8)
        country = model.request.user_fields.maps[0].weight[batch.user_fields["country"][r]]
        hour = model.request.context_fields.maps[0].weight[batch.context["hour"][r]]
        rain = model.request.context_fields.maps[1](batch.context["rain"][r : r + 1, None])[0]
        for row in offered:
            pair = {name: column[at : at + 1] for name, column in batch.candidates.pair.items()}
            parts = [country, hour, rain, pooled, model.items(torch.tensor(row)), model.pair(pair, 1)[0]]
            expected.append(model.head.mlp(torch.cat(parts)))
            at += 1
    torch.testing.assert_close(model.score(batch)["target"], torch.cat(expected))


@torch.no_grad()
def test_a_score_depends_on_nothing_else_in_the_batch():
    model = made()
    together = model.score(rich_batch(PAST, OFFERED))["target"]
    swapped = model.score(rich_batch(PAST, [[9, 7, 1], [4], [2, 3], [3, 12]]))["target"]
    torch.testing.assert_close(swapped[[2, 1, 0]], together[:3])
    torch.testing.assert_close(swapped[-2:], together[5:7])


@torch.no_grad()
def test_a_kept_state_serves_other_candidates():
    model, batch = made(), rich_batch(PAST, OFFERED)
    state = model.user_state(batch)
    other = rich_batch(PAST, [[4], [5, 6], [7, 8], []])
    torch.testing.assert_close(model.score_candidates(state, other.candidates)["target"], model.score(other)["target"])


def test_several_tasks_each_learn_from_their_own_labels():
    space = rich_space(tasks=("click", "buy"))
    model = made(replace(TINY, loss="bce"), space)
    labels = {"click": [1.0, 0, 1, 0, 1, 1, 0, 0, 1], "buy": [0.0] * 9}
    batch = rich_batch(PAST, OFFERED, **labels)
    losses = model.losses(batch)
    for task in ("click", "buy"):
        logit = model.score(batch)[task]
        by_hand = torch.nn.functional.binary_cross_entropy_with_logits(logit, batch.labels[task])
        torch.testing.assert_close(losses[task], by_hand)
    weight = torch.zeros(9)
    weight[4] = 2.0
    alone = model.losses(replace(batch, weight=weight))["click"]
    torch.testing.assert_close(alone, -torch.nn.functional.logsigmoid(model.score(batch)["click"][4]))


@torch.no_grad()
def test_new_items_differ_by_their_fields_and_new_users_by_their_context():
    model = made()
    batch = rich_batch([[], []], [[11, 12], [11, 12]])
    score = model.score(replace(batch, user=torch.zeros(2, dtype=torch.int64)))["target"]
    assert score[0] != score[1]  # no id row of their own
    assert score[0] != score[2]  # another hour and country
    ids_only = made(space=space_of(12, unknown=(11, 12)))
    same = ids_only.score(batch_of([[]], [[11, 12]]))["target"]
    assert same[0] == same[1]


@torch.no_grad()
def test_without_ids_only_fields_speak():
    model = made(replace(TINY, use_ids=False))
    same_fields = space_of(12)
    assert (
        made(replace(TINY, use_ids=False), same_fields).score(batch_of([[1]], [[2, 3]]))["target"].unique().numel() == 1
    )
    assert model.score(rich_batch([[1]], [[2, 3]]))["target"].unique().numel() == 2
    assert model.request.user_ids is None
    assert made(replace(TINY, use_user_ids=True)).request.user_ids.weight().shape == (11, 8)


def drawn_pairs(size: int, draw: torch.Generator):
    """The candidate whose pair field is nearest to 0.3 is chosen: no monotone function of it tells; ids say nothing."""
    near = torch.rand(size, 5, generator=draw) * 2 - 1
    label = torch.zeros(size, 5).scatter(1, (near - 0.3).abs().argmin(1, keepdim=True), 1)
    rows = (torch.rand(size, 20, generator=draw).argsort(1)[:, :5] + 1).tolist()
    return batch_of([[]] * size, rows, pair={"near": near.flatten()}, labels={"target": label.flatten()})


def test_learns_a_planted_pair_preference():
    test = drawn_pairs(400, torch.Generator().manual_seed(9))
    right = {}
    for bins in (0, 8):
        model = made(replace(TINY, widths=(), pair_bins=bins), space_of(20, pairs=("near",)))
        train(model, drawn_pairs, steps=150, lr=0.05)
        right[bins] = share_right(model, test)
    assert right[8] > 0.93  # ramps alone bend the curve: there is no hidden layer here
    assert right[8] > right[0] + 0.1


def test_same_seed_same_model():
    curves = []
    for _ in range(2):
        model = made(replace(TINY, dropout=0.2, id_dropout=0.1), space_of(20, pairs=("near",)))
        curves.append(train(model, drawn_pairs, steps=5))
    assert curves[0] == curves[1]


def test_sparse_table_gets_gradients_on_the_rows_of_the_batch_alone():
    model = made(replace(TINY, table=TableChoice(sparse=True)))
    labels = {"target": [1.0, 0, 0, 1, 0, 1, 0, 0, 0]}
    sum(model.losses(rich_batch(PAST, OFFERED, **labels)).values()).backward()
    gradient = model.items.ids.weight().grad
    assert gradient.is_sparse
    # Item 1 of the first history is cut off, but offered; 10 is nowhere; 11 and 12 have no row of their own.
    assert set(gradient.coalesce().indices()[0].tolist()) == {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}


@torch.no_grad()
def test_cost_agrees_with_the_flop_counter():
    model = made(replace(TINY, max_history=30, widths=(32, 16)))
    shape = RequestShape(num_history=20, num_candidates=40)
    batch = rich_batch([[1 + i % 12 for i in range(20)]], [[1 + i % 12 for i in range(40)]])
    with FlopCounterMode(display=False) as user:
        state = model.user_state(batch)
    with FlopCounterMode(display=False) as item:
        model.score_candidates(state, batch.candidates)
    cost, cached = model.cost(shape), model.cost(shape, cached=True)
    assert cost.user_flops == pytest.approx(user.get_total_flops(), rel=0.2)
    assert 40 * cost.item_flops == pytest.approx(item.get_total_flops(), rel=0.2)
    assert cached.user_flops == 0
    assert 0 < cached.bytes < cost.bytes


@torch.no_grad()
def test_nobody_and_nothing():
    model = made()
    assert model.score(rich_batch([[], []], [[], []]))["target"].shape == (0,)


@pytest.mark.parametrize(
    "wrong", [{"dim": 0}, {"max_history": 0}, {"pair_bins": -1}, {"id_dropout": 1.0}, {"loss": "mse"}]
)
def test_settings_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        DNNConfig(**wrong)
