"""BST: attention by hand, the split softmax against the whole matrix, padding, marks of time, planted preferences, costs."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ranking_support import batch_of, rich_batch, rich_space, share_right, space_of, train
from shortlist.data.jagged import Jagged
from shortlist.errors import ConfigError
from shortlist.layers.scoring import HeadConfig
from shortlist.models.base import RequestShape
from shortlist.models.ranking.bst import BST, BSTConfig

HEAD = HeadConfig(widths=(16,), dropout=0.0)
TINY = BSTConfig(dim=8, ffn_width=6, max_history=3, dropout=0.0, id_dropout=0.0, head=HEAD)
PAST = [[1, 2, 3, 4], [], [5, 5], [6]]
OFFERED = [[1, 7, 9], [2, 11], [], [3, 12, 8, 4]]


def made(config: BSTConfig = TINY, space=None, *, loud: bool = True) -> BST:
    torch.manual_seed(0)
    model = BST(config, space or rich_space()).eval()
    if loud:
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(std=0.5)
    return model


@torch.no_grad()
def test_attention_by_hand():
    """One dimension, all maps 1, tokens 1, 2 and candidate 3: token 1 weighs them by e^1, e^2, e^3. The rest of the layer is left out."""
    config = BSTConfig(dim=1, num_heads=1, ffn_width=1, max_history=4, recency="none", dropout=0.0, head=HEAD)
    model = made(config, space_of(3), loud=False)
    model.items.ids.rows.weight.copy_(torch.tensor([[0.0], [1.0], [2.0], [3.0]]))
    for linear in (model.query, model.key, model.value):
        linear.weight.fill_(1.0)
    model._rest = lambda token, mix: mix
    state = model.user_state(batch_of([[1, 2], []], [[3], [3]]))
    flat = model.outputs(state, Jagged(model.items(torch.tensor([3, 3])), torch.tensor([0, 1, 2])))

    def mix(x):
        weights = [math.exp(x * y) for y in (1, 2, 3)]
        return sum(w * y for w, y in zip(weights, (1, 2, 3))) / sum(weights)

    assert flat[0].tolist() == pytest.approx([0, 0, mix(1), mix(2), mix(3)], rel=1e-5)
    assert flat[1].tolist() == pytest.approx([0, 0, 0, 0, 3])  # alone, the candidate sees itself


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["flatten", "mean", "target"])
@pytest.mark.parametrize("candidate_inside", [True, False])
@pytest.mark.parametrize(("num_heads", "pairs_at_once"), [(1, 1_000_000), (4, 1)])
def test_split_softmax_agrees_with_the_whole_matrix(pooling, candidate_inside, num_heads, pairs_at_once):
    config = replace(TINY, pooling=pooling, candidate_inside=candidate_inside, num_heads=num_heads)
    model, batch = made(replace(config, pairs_at_once=pairs_at_once)), rich_batch(PAST, OFFERED)
    state, rows = model.user_state(batch), batch.candidate_rows
    items = rows.with_values(model.items(rows.values))
    fast = model.outputs(state, items)
    torch.testing.assert_close(fast, model.plain_outputs(state, items), rtol=1e-5, atol=1e-5)
    assert fast.shape == (9, 4 * 8 if pooling == "flatten" else 16)


def test_split_softmax_has_the_whole_matrix_s_gradient():
    grads = []
    for plain in (False, True):
        model, batch = made().train(), rich_batch(PAST, OFFERED)
        state, rows = model.user_state(batch), batch.candidate_rows
        layer = model.plain_outputs if plain else model.outputs
        layer(state, rows.with_values(model.items(rows.values))).sin().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_large_logits_neither_overflow_nor_lose_the_candidate():
    model = made()
    for linear in (model.query, model.key):
        linear.weight.mul_(100)
    batch = rich_batch(PAST, OFFERED)
    state, rows = model.user_state(batch), batch.candidate_rows
    items = rows.with_values(model.items(rows.values))
    torch.testing.assert_close(model.outputs(state, items), model.plain_outputs(state, items), rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("num_heads", [1, 4])
def test_a_score_depends_on_nothing_else_in_the_batch(num_heads):
    """With several heads too: a mask that is laid out over them in another order than the samples would mix these."""
    model = made(replace(TINY, num_heads=num_heads))
    together = model.score(rich_batch(PAST, OFFERED))["target"]
    swapped = model.score(rich_batch(PAST, [[9, 7, 1], [4], [2, 3], [3, 12]]))["target"]
    torch.testing.assert_close(swapped[[2, 1, 0]], together[:3])
    torch.testing.assert_close(swapped[-2:], together[5:7])
    longer = model.score(rich_batch([PAST[0], [7] * 9], OFFERED[:2]))["target"]
    torch.testing.assert_close(longer[:3], together[:3])


@torch.no_grad()
def test_empty_histories_and_candidates():
    for pooling in ("flatten", "mean", "target"):
        model = made(replace(TINY, pooling=pooling))
        assert torch.isfinite(model.score(rich_batch([[], []], OFFERED[:2]))["target"]).all()
        assert model.score(rich_batch(PAST[:2], [[], []]))["target"].shape == (0,)


def test_training_bears_histories_that_are_all_empty():
    model = made(loud=False).train()
    model.losses(rich_batch([[], []], [[1, 2], [3]], target=[1.0, 0, 0]))["target"].backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


@torch.no_grad()
def test_time_before_the_request_is_read_where_there_is_a_clock():
    batch = rich_batch([[1, 2]], [[7, 8]])
    later = replace(batch, time=batch.time + 1_000_000)
    for space, recency, changes in (
        (rich_space(), None, True),
        (rich_space(has_clock=False), None, False),
        (rich_space(), "position", False),
    ):
        model = made(replace(TINY, recency=recency), space)
        assert torch.allclose(model.score(batch)["target"], model.score(later)["target"]) != changes
    with pytest.raises(ConfigError, match="position"):
        made(replace(TINY, recency="gap"), rich_space(has_clock=False))


def taste(size: int, draw: torch.Generator):
    """The past is of one of 8 groups of 5 items; of two offered items, the one of that group is chosen."""
    group = torch.rand(size, 8, generator=draw).argsort(1)[:, :2]
    turn = torch.rand(size, 1, generator=draw) < 0.5
    offered = torch.where(turn, group.flip(1), group)
    past = 1 + 5 * group[:, :1] + torch.randint(5, (size, 4), generator=draw)
    offered = 1 + 5 * offered + torch.randint(5, (size, 2), generator=draw)
    label = torch.cat([~turn, turn], 1).float()
    return batch_of(past.tolist(), offered.tolist(), labels={"target": label.flatten()})


@pytest.mark.parametrize("pooling", ["mean", "target"])
def test_learns_a_taste(pooling):
    head = HeadConfig(widths=(32,), dropout=0.0, activation="relu")
    config = BSTConfig(dim=16, dropout=0.0, id_dropout=0.0, max_history=8, pooling=pooling, head=head)
    model = made(config, space_of(40), loud=False)
    train(model, taste, steps=200)
    assert share_right(model, taste(400, torch.Generator().manual_seed(9))) > 0.9


def newest_counts(size: int, draw: torch.Generator):
    """Five items seen, two of them offered: the one seen last is chosen. Order is all there is to learn."""
    past = torch.rand(size, 20, generator=draw).argsort(1)[:, :5] + 1
    older = past[:, :4].gather(1, torch.randint(4, (size, 1), generator=draw))
    turn = torch.rand(size, 1, generator=draw) < 0.5
    offered = torch.where(turn, torch.cat([older, past[:, 4:]], 1), torch.cat([past[:, 4:], older], 1))
    label = torch.cat([~turn, turn], 1).float()
    return batch_of(past.tolist(), offered.tolist(), labels={"target": label.flatten()})


def test_the_paper_s_form_learns_an_order():
    head = HeadConfig(widths=(32,), dropout=0.0, activation="relu")
    config = BSTConfig(dim=16, dropout=0.0, id_dropout=0.0, max_history=5, recency="position", head=head)
    model = made(config, space_of(20), loud=False)
    train(model, newest_counts, steps=200)
    assert share_right(model, newest_counts(400, torch.Generator().manual_seed(9))) > 0.9


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["flatten", "mean", "target"])
def test_cost_agrees_with_the_flop_counter(pooling):
    model = made(BSTConfig(dim=16, ffn_width=48, max_history=30, pooling=pooling, head=HeadConfig(widths=(32, 16))))
    batch = rich_batch([[1 + i % 12 for i in range(20)]], [[1 + i % 12 for i in range(40)]])
    with FlopCounterMode(display=False) as user:
        state = model.user_state(batch)
    with FlopCounterMode(display=False) as item:
        model.score_candidates(state, batch.candidates)
    cost = model.cost(RequestShape(num_history=20, num_candidates=40))
    assert cost.user_flops == pytest.approx(user.get_total_flops(), rel=0.2)
    assert 40 * cost.item_flops == pytest.approx(
        item.get_total_flops(), rel=0.25
    )  # inner products of pairs are not counted there
    assert model.cost(RequestShape(), cached=True).user_flops == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"dim": 0},
        {"num_heads": 3},
        {"pooling": "max"},
        {"recency": "day"},
        {"dropout": 1.0},
        {"head": HeadConfig(dropout=1.0)},
    ],
)
def test_settings_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(ConfigError, match="bst: .*" + next(iter(wrong))):
        BSTConfig(**wrong)
