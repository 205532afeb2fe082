"""DIN: the activation unit by hand, fast against plain attention, the regulariser, planted preferences, costs."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ranking_support import batch_of, groups_batch, groups_space, rich_batch, rich_space, share_right, space_of, train
from shortlist.data.histories import Histories, View
from shortlist.data.jagged import Jagged
from shortlist.data.schema import FieldTable
from shortlist.embeddings.base import TableChoice
from shortlist.errors import ConfigError
from shortlist.models.base import RequestShape
from shortlist.models.ranking.din import DIN, ActivationUnit, DINConfig
from shortlist.models.ranking.dnn import DNN, DNNConfig
from shortlist.training.config import TrainerConfig
from shortlist.training.optimisers import build_optimisers

TINY = DINConfig(dim=8, unit_widths=(6,), widths=(16,), max_history=3, dropout=0.0, id_dropout=0.0)
PAST = [[1, 2, 3, 4], [], [5, 5], [6]]
OFFERED = [[1, 7, 9], [2, 11], [], [3, 12, 8, 4]]


def made(config: DINConfig = TINY, space=None) -> DIN:
    torch.manual_seed(0)
    return DIN(config, space or rich_space()).eval()


@torch.no_grad()
def test_activation_unit_by_hand():
    """q = 3, k = 2 in one dimension: the input is [3, 2, 1, 6]; hidden units 3 - 2 = 1 and relu(1 - 6 + 1) = 0."""
    unit = ActivationUnit(1, (2,), "relu")
    first, last = unit.mlp.layers[0], unit.mlp.layers[-1]
    first.weight.copy_(torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]]))
    first.bias.copy_(torch.tensor([0.0, 1.0]))
    last.weight.copy_(torch.tensor([[2.0, 100.0]]))
    last.bias.fill_(0.5)
    query, key = torch.tensor([[3.0]]), torch.tensor([[2.0]])
    assert unit.plain(query, key).item() == 2.5
    assert unit.eval()(query[None], key[None], torch.ones(1, 1, 1, dtype=torch.bool)).item() == 2.5


@torch.no_grad()
@pytest.mark.parametrize("weights", ["none", "softmax", "sigmoid", "uniform"])
def test_interest_by_hand(weights):
    """The unit gives the product of first coordinates; past items are 1, 2 and the candidate 1.3: outputs 1.3 and 2.6."""
    config = replace(TINY, dim=4, unit_widths=(1,), activation="relu", weights=weights)
    model = made(config, space_of(3))
    model.items.ids.rows.weight.zero_()
    model.items.ids.rows.weight[:, 0] = torch.tensor([0.0, 1.0, 2.0, 1.3])
    first, last = model.unit.mlp.layers[0], model.unit.mlp.layers[-1]
    first.weight.zero_()
    first.weight[0, 12] = 1.0
    first.bias.zero_()
    last.weight.fill_(1.0)
    last.bias.zero_()
    state = model.user_state(batch_of([[1, 2], []], [[3], [3]]))
    found = model.interest(state, Jagged(model.items(torch.tensor([3, 3])), torch.tensor([0, 1, 2])))
    a, b = math.exp(1.3 / 2), math.exp(2.6 / 2)  # the root of 4 dimensions
    expected = {
        "none": 1.3 * 1 + 2.6 * 2,
        "softmax": (a * 1 + b * 2) / (a + b),
        "sigmoid": 1 / (1 + math.exp(-1.3)) + 2 / (1 + math.exp(-2.6)),
        "uniform": 1.5,
    }
    assert found[0].tolist() == pytest.approx([expected[weights], 0, 0, 0], rel=1e-5)
    assert found[1].tolist() == [0, 0, 0, 0]  # no history: nothing, not NaN


@torch.no_grad()
@pytest.mark.parametrize("weights", ["softmax", "none", "sigmoid", "uniform"])
@pytest.mark.parametrize("pairs_at_once", [1, 5, 1_000_000])
def test_fast_attention_agrees_with_the_plain_one(weights, pairs_at_once):
    config = replace(TINY, weights=weights, pairs_at_once=pairs_at_once, recency="position", unit_widths=(6, 5))
    model = made(config)
    for p in model.parameters():
        p.normal_(std=0.5)
    batch = rich_batch(PAST, OFFERED)
    state, rows = model.user_state(batch), batch.candidate_rows
    items = rows.with_values(model.items(rows.values))
    fast = model.interest(state, items)
    torch.testing.assert_close(fast, model.plain_interest(state, items), rtol=1e-5, atol=1e-5)
    assert (fast[:3].abs().sum(1) > 0).all()
    assert (fast[3:5] == 0).all()


def test_fast_attention_has_the_plain_one_s_gradient():
    grads = []
    for plain in (False, True):
        model = made(replace(TINY, activation="prelu")).train()
        batch = rich_batch(PAST, OFFERED)
        state, rows = model.user_state(batch), batch.candidate_rows
        attend = model.plain_interest if plain else model.interest
        attend(state, rows.with_values(model.items(rows.values))).sin().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-6)


def test_dice_in_the_unit_sees_real_pairs_alone():
    """Training statistics come from the 6 pairs of candidate and event there are, not from padding."""
    model = made(replace(TINY, max_history=10)).train()
    batch = batch_of([[1, 2, 3], [], [4]], [[5], [6, 7], [8, 9, 10]])
    batch = replace(rich_batch([[1, 2, 3], [], [4]], [[5], [6, 7], [8, 9, 10]]), history=batch.history)
    model.score(batch)
    norm = model.unit.mlp.layers[1].norm.norm
    past, target = model.items(torch.tensor([1, 2, 3, 4, 4, 4])), model.items(torch.tensor([5, 5, 5, 8, 9, 10]))
    hidden = model.unit.mlp.layers[0](torch.cat([target, past, target - past, target * past], 1))
    torch.testing.assert_close(norm.running_mean, 0.1 * hidden.mean(0))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * hidden.var(0))


@torch.no_grad()
def test_a_score_depends_on_nothing_else_in_the_batch():
    model = made()
    together = model.score(rich_batch(PAST, OFFERED))["target"]
    swapped = model.score(rich_batch(PAST, [[9, 7, 1], [4], [2, 3], [3, 12]]))["target"]
    torch.testing.assert_close(swapped[[2, 1, 0]], together[:3])
    torch.testing.assert_close(swapped[-2:], together[5:7])
    longer = model.score(rich_batch([PAST[0], [7] * 9], OFFERED[:2]))["target"]
    torch.testing.assert_close(longer[:3], together[:3])


@torch.no_grad()
def test_a_kept_state_serves_other_candidates():
    model, batch = made(), rich_batch(PAST, OFFERED)
    state = model.user_state(batch)
    other = rich_batch(PAST, [[4], [5, 6], [7, 8], []])
    torch.testing.assert_close(model.score_candidates(state, other.candidates)["target"], model.score(other)["target"])


@torch.no_grad()
def test_empty_histories_and_candidates():
    model = made()
    assert torch.isfinite(model.score(rich_batch([[], []], OFFERED[:2]))["target"]).all()
    assert model.score(rich_batch(PAST[:2], [[], []]))["target"].shape == (0,)
    new = model.score(rich_batch([[1]], [[11, 12]]))["target"]
    assert new[0] != new[1]  # no id rows of their own: their fields differ


def test_training_bears_histories_that_are_all_empty():
    model = made().train()
    losses = model.losses(rich_batch([[], []], [[1, 2], [3]], target=[1.0, 0, 0]))
    losses["target"].backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def view_of(items: list[int], space) -> View:
    n = np.array(items, dtype=np.int64)
    one_user = np.array([0, 0, len(n)], dtype=np.int64)
    steps = np.arange(len(n))
    histories = Histories(
        offsets=one_user, item=n, time=steps, group=steps, action=np.ones_like(n), value=np.ones(len(n), np.float32)
    )
    return View(histories=histories, space=space, users=FieldTable(2), now=len(n))


@pytest.mark.parametrize("sparse", [False, True])
def test_regulariser_touches_the_rows_of_the_batch_by_their_counts(sparse):
    """mba / n_j * w_j on every known item read, nothing elsewhere: 10 is not read, 11 and 12 have no row, 1 is cut off."""
    space = rich_space()
    model = made(replace(TINY, mba=0.5, table=TableChoice(sparse=sparse)), space)
    model.prepare(view_of([2, 2, 2, 2, 3, 3, 10], space))
    model.regulariser(rich_batch([[1, 2, 3, 4]], [[5, 11]])).backward()
    grad = model.items.ids.weight().grad
    expected = torch.zeros(13, 8)
    for row, count in ((2, 4), (3, 2), (4, 1), (5, 1)):
        expected[row] = 0.5 / count * model.items.ids.weight().detach()[row]
    torch.testing.assert_close(grad.to_dense() if sparse else grad, expected)
    if sparse:
        assert sorted(set(grad.coalesce().indices()[0].tolist())) == [2, 3, 4, 5]


def test_plain_decay_does_not_look_at_the_counts():
    """l2 * w_j on every known item read, whether seen four times or once."""
    model = made(replace(TINY, mba=0, l2=0.3), rich_space())
    model.prepare(view_of([2, 2, 2, 2, 3], model.space))
    model.regulariser(rich_batch([[2, 3]], [[5]])).backward()
    weight = model.items.ids.weight()
    expected = torch.zeros(13, 8)
    expected[[2, 3, 5]] = 0.3 * weight.detach()[[2, 3, 5]]
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("sparse", [True, False])
def test_only_sparse_tables_leave_rows_of_earlier_batches_alone(sparse):
    """Adam's moments go on moving a row of a dense table that the second batch does not read."""
    model = made(replace(TINY, table=TableChoice(sparse=sparse)))
    optimisers = build_optimisers(model, TrainerConfig(lr=0.1, optimiser="adam"))
    before = []
    for past, offered in (([1, 2], [3, 4]), ([5, 6], [7, 8])):
        before.append(model.items.ids.weight().detach().clone())
        model.zero_grad()
        sum(model.losses(rich_batch([past], [offered], target=[1.0, 0])).values()).backward()
        for optimiser in optimisers:
            optimiser.step()
    moved = (model.items.ids.weight() != before[1]).any(1)
    assert moved[[5, 6, 7, 8]].all()
    assert moved[[1, 2, 3, 4]].any() != sparse


def test_the_released_code_s_unit():
    """80 and 40 sigmoid units, and the tower keeps its own activation."""
    model = made(replace(TINY, unit_widths=(80, 40), unit_activation="sigmoid"))
    assert [type(layer).__name__ for layer in model.unit.mlp.layers] == ["Linear", "Sigmoid"] * 2 + ["Linear"]
    assert any(type(layer).__name__ == "Dice" for layer in model.head.tower.mlp.layers)
    batch = rich_batch(PAST, OFFERED)
    state, rows = model.user_state(batch), batch.candidate_rows
    items = rows.with_values(model.items(rows.values))
    torch.testing.assert_close(model.interest(state, items), model.plain_interest(state, items), rtol=1e-5, atol=1e-5)


def test_regulariser_is_part_of_the_loss():
    batch = rich_batch(PAST, OFFERED, target=[1.0, 0, 0, 1, 0, 1, 0, 0, 0])
    with_it, without = (made(replace(TINY, mba=mba)) for mba in (0.5, 0))
    gap = with_it.losses(batch)["target"] - without.losses(batch)["target"]
    torch.testing.assert_close(gap, with_it.regulariser(batch))


GROUPS = {"dim": 16, "widths": (32,), "dropout": 0.0, "id_dropout": 0.0}


@pytest.mark.parametrize("weights", ["softmax", "none"])
def test_finds_what_pooling_can_not_see(weights):
    """The candidate of a group in the past is chosen: the planted rule decides all, so a perfect ranker scores 1."""
    test = groups_batch(300, torch.Generator().manual_seed(99))
    torch.manual_seed(0)
    din = DIN(DINConfig(**GROUPS, unit_widths=(16,), weights=weights, mba=0), groups_space())
    train(din, groups_batch, steps=260)
    torch.manual_seed(0)
    dnn = DNN(DNNConfig(**GROUPS), groups_space())
    train(dnn, groups_batch, steps=260)
    assert share_right(din, test) > 0.9
    assert share_right(dnn, test) < 0.75


def drawn_pairs(size: int, draw: torch.Generator):
    """The candidate whose pair field is nearest to 0.3 is chosen, whatever the history."""
    near = torch.rand(size, 5, generator=draw) * 2 - 1
    label = torch.zeros(size, 5).scatter(1, (near - 0.3).abs().argmin(1, keepdim=True), 1)
    items = torch.rand(size, 20, generator=draw).argsort(1) + 1
    columns = {"pair": {"near": near.flatten()}, "labels": {"target": label.flatten()}}
    return batch_of(items[:, :4].tolist(), items[:, 4:9].tolist(), **columns)


def test_learns_a_planted_pair_preference():
    model = made(replace(TINY, mba=0), space_of(20, pairs=("near",)))
    train(model, drawn_pairs, steps=120, lr=0.02)
    assert share_right(model, drawn_pairs(400, torch.Generator().manual_seed(9))) > 0.93


def test_same_seed_same_model():
    curves = []
    for _ in range(2):
        model = made(replace(TINY, dropout=0.2, id_dropout=0.1), groups_space())
        curves.append(train(model, groups_batch, steps=5))
    assert curves[0] == curves[1]


@torch.no_grad()
@pytest.mark.parametrize(("cross", "weights"), [(True, "softmax"), (False, "none"), (False, "uniform")])
def test_cost_agrees_with_the_flop_counter(cross, weights):
    model = made(replace(TINY, max_history=30, unit_widths=(12, 6), widths=(32, 16), cross=cross, weights=weights))
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
    assert cached.bytes > 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"dim": 0},
        {"mba": -1},
        {"l2": -1},
        {"unit_widths": ()},
        {"weights": "max"},
        {"pairs_at_once": 0},
        {"id_dropout": 1.0},
    ],
)
def test_settings_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        DINConfig(**wrong)
