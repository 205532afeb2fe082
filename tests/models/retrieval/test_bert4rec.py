"""BERT4Rec: against a dense left-padded reference, the traps of its digest, and planted logs it must learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import gelu, layer_norm, log_softmax
from torch.utils.flop_counter import FlopCounterMode

from next_item_support import batch_of, learn, next_events, share_of_rule_found, view_of, walks
from shortlist.data.jagged import Jagged
from shortlist.embeddings.base import TableChoice
from shortlist.errors import ConfigError
from shortlist.layers.cloze import hide, whole_sequences, with_mask_behind
from shortlist.models.base import RequestShape
from shortlist.models.retrieval.bert4rec import BERT4Rec, BERT4RecConfig
from support import planted_view

torch.set_num_threads(1)
LOSSES = ("full_softmax", "sampled_softmax", "gbce", "bce_k", "bce")
NINE = [[[i] for i in range(1, 10)]]


def make(view, seed: int = 0, **settings) -> BERT4Rec:
    torch.manual_seed(seed)
    model = BERT4Rec(BERT4RecConfig(**{"dim": 8, "max_history": 12, "dropout": 0.0, **settings}), view.space)
    model.prepare(view)
    return model.eval()


def dense(model: BERT4Rec, rows_BL: torch.Tensor, is_mask_BL: torch.Tensor) -> torch.Tensor:
    """[B, L, D] queries for left-padded rows (0 = padding unless masked): the paper's equations, one head at a time."""
    config, L = model.config, rows_BL.shape[1]
    is_real = (rows_BL > 0) | is_mask_BL
    item = torch.where(is_mask_BL[:, :, None], model.mask, model.items(rows_BL))

    def norm(layer, t):
        return layer_norm(t, (config.dim,), layer.weight, layer.bias)

    x = item + model.positions.weight[:L].flip(0)  # the last column has position 0
    x = config.dim**0.5 * x if config.norm == "pre-ln" else norm(model.norm_input, x)
    for block in model.blocks:
        first, last = (m for m in block.ffn.layers if isinstance(m, torch.nn.Linear))
        asks = norm(block.norm_attention, x) if config.norm == "pre-ln" else x
        q = block.attention.query(asks)
        k, v = block.attention.key_value(asks).split(config.dim, dim=-1)
        heads = []
        for h in torch.arange(config.dim).chunk(config.num_heads):
            logits = q[..., h] @ k[..., h].transpose(1, 2) / len(h) ** 0.5
            heads.append(logits.masked_fill(~is_real[:, None, :], -10000).softmax(-1) @ v[..., h])
        mixed = block.attention.out(torch.cat(heads, -1))
        if config.norm == "pre-ln":
            y = x + mixed
            x = y + last(gelu(first(norm(block.norm_ffn, y))))
        else:
            y = norm(block.norm_attention, x + mixed)
            x = norm(block.norm_ffn, y + last(gelu(first(y))))
    x = norm(model.norm, x) if config.norm == "pre-ln" else x
    return norm(model.head[2], gelu(model.head[0](x)))


@pytest.mark.parametrize("norm", ["post-ln", "pre-ln"])
@pytest.mark.parametrize("extra_padding", [0, 3])
def test_agrees_with_a_dense_left_padded_model(norm, extra_padding):
    view = view_of(NINE, 9)
    model = make(view, norm=norm, init_std=0.3)
    rows = [[1, 2, 0, 4, 5, 6, 0], [0], [4, 0, 2]]
    jagged = Jagged.from_rows(rows)
    is_mask = jagged.values == 0
    at = is_mask.nonzero()[:, 0]
    ours = model._query(jagged, model.items(jagged.values), is_mask, at)
    width = 7 + extra_padding  # more padding on the left must not matter
    padded = torch.zeros(3, width, dtype=torch.int64)
    masks = torch.zeros(3, width, dtype=torch.bool)
    for r, row in enumerate(rows):
        padded[r, width - len(row) :] = torch.tensor(row)
        masks[r, width - len(row) :] = torch.tensor(row) == 0
    torch.testing.assert_close(ours[:, :-1], dense(model, padded, masks)[masks], rtol=1e-4, atol=1e-5)
    assert (ours[:, -1] == 1).all()  # the bias's column


def test_loss_is_the_formula(monkeypatch):
    """1 -> [mask] -> 3 and [mask] for the basket {5, 6} -> 7: cross-entropy over all items with the output bias."""
    view = view_of([[[1], [2], [3]], [[5, 6], [7]]], 9)
    model = make(view, init_std=0.3)
    with torch.no_grad():
        model.bias.learned.weight.normal_()
    masked = torch.tensor([False, True, False, True, False])
    monkeypatch.setattr("shortlist.models.retrieval.bert4rec.draw_masks", lambda *_: masked)
    rows = torch.tensor([[1, 0, 3], [0, 0, 7]])
    is_mask = torch.tensor([[False, True, False], [False, True, False]])
    query = dense(model, rows, is_mask)[is_mask]
    known = torch.where(view.space.known_items, torch.arange(10), 0)
    bias = model.bias.learned.weight[known, 0] + model.bias.start_N
    log_p = log_softmax(query @ model.items.all().T + bias, dim=-1)
    log_p = log_p - torch.logsumexp(log_p[:, 1:], 1, keepdim=True)  # row 0 is no item
    by_hand = -(log_p[0, 2] + (log_p[1, 5] + log_p[1, 6]) / 2) / 2
    torch.testing.assert_close(model.losses(next_events(view))["masked"], by_hand)


# --- the traps ---


def test_training_reads_both_sides_and_never_what_is_hidden():
    def query(items: list[int]) -> torch.Tensor:
        batch = next_events(view_of([[[i] for i in items]], 9))
        whole = whole_sequences(batch.history, batch.targets)
        cloze = hide(whole, torch.tensor([False, False, True, False, False]))
        return model._query(cloze.rows, model.items(cloze.rows.values), cloze.is_mask, cloze.targets.position)

    model = make(view_of(NINE, 9), init_std=0.3)
    assert torch.equal(query([1, 2, 3, 4, 5]), query([1, 2, 9, 4, 5]))
    assert not torch.allclose(query([1, 2, 3, 4, 5]), query([1, 2, 3, 8, 5]))
    assert not torch.allclose(query([1, 2, 3, 4, 5]), query([7, 2, 3, 4, 5]))


def test_serving_is_training_with_the_last_item_hidden(monkeypatch):
    """The same tokens, positions and mask: the request after 1 2 3 scores as the training sequence 1 2 3 [mask] does."""
    view = view_of([[[1], [2], [3], [4]]], 9)
    model = make(view, init_std=0.3)
    monkeypatch.setattr(
        "shortlist.models.retrieval.bert4rec.draw_masks", lambda *_: torch.tensor([False, False, False, True])
    )
    with torch.no_grad():
        score = model.encode_user(batch_of(view, [[1, 2, 3]])) @ model.item_matrix().T
        loss = model.losses(next_events(view))["masked"]
    torch.testing.assert_close(loss, -log_softmax(score[0, 1:], dim=0)[3])


def test_truncation_leaves_room_for_the_mask():
    view = view_of(NINE, 9)
    model = make(view, max_history=4, init_std=0.3)
    long, short = (model.encode_user(batch_of(view, [row])) for row in ([1, 2, 3, 6, 7, 8, 9], [6, 7, 8, 9]))
    torch.testing.assert_close(long, short)
    assert not torch.allclose(short, model.encode_user(batch_of(view, [[5, 7, 8, 9]])))  # the fourth newest is read


def test_the_mask_and_the_unknown_item_are_never_recommended():
    view = view_of(NINE, 12)
    model = make(view)
    learn(model, view, epochs=3)
    found = model.retrieve(batch_of(view, [[1, 2], [], [12]]), 20)
    assert found.rows.shape == (3, 20)
    assert ((found.rows > 0) == found.scores.isfinite()).all()
    assert (found.rows <= 12).all()
    assert all(len(set(row[row > 0].tolist())) == 12 for row in found.rows)


def test_the_output_bias_starts_at_log_counts():
    view = view_of([[[1], [2]], [[2], [3]], [[2], [3]], [[2], [4], [3]]], 6)
    model = make(view)
    log = np.log([1, 4, 3, 1])
    expected = log - log.mean()
    np.testing.assert_allclose(model.bias.start_N[1:5].numpy(), expected, rtol=1e-5)
    assert model.bias.start_N[5:].tolist() == pytest.approx(
        [expected.min()] * 2
    )  # nothing tells of items without events
    described = make(planted_view())
    assert described.bias.start_N[1:].mean() == pytest.approx(0, abs=1e-6)


def test_new_masks_at_every_step_and_the_same_with_the_same_seed():
    view, _ = walks(num_users=20)
    model, batch = make(view).train(), next_events(view_of(NINE * 5, 9))
    torch.manual_seed(3)
    first, second = (float(model.losses(batch)["masked"].detach()) for _ in range(2))
    torch.manual_seed(3)
    again = float(model.losses(batch)["masked"].detach())
    assert first == again != second


def test_an_unknown_event_among_known_ones_does_not_matter():
    view = view_of(NINE, 12)
    model = make(view, init_std=0.3)
    users = model.encode_user(batch_of(view, [[1, 2, 3], [1, 11, 2, 0, 3, 12]]))
    torch.testing.assert_close(users[0], users[1])


def test_someone_without_known_history_gets_the_popular_items():
    view = view_of([[[1], [2]], [[2], [3]], [[2], [3]], [[2], [4], [3]]], 6)
    model = make(view)
    learn(model, view, epochs=3)
    ranking = model.retrieve(batch_of(view, [[], [6], [2]]), 3).rows  # item 6 has no events, and no fields describe it
    assert ranking[0].tolist()[:2] == [2, 3]
    assert ranking[1].tolist() == ranking[0].tolist()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_without_supervision_or_history_costs_nothing(loss):
    view = view_of([[[1]], [[2]]], 9)
    model = make(view, loss=loss).train()
    value = model.losses(next_events(view))["masked"]
    assert float(value.detach()) == 0
    value.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# --- learning ---


@pytest.mark.parametrize(
    ("settings", "epochs", "share"),
    [
        ({"loss": "full_softmax"}, 50, 0.9),
        ({"loss": "full_softmax", "norm": "post-ln"}, 50, 0.9),
        ({"loss": "sampled_softmax", "num_negatives": 10}, 60, 0.6),  # ten of thirty items: slower
    ],
    ids=["full", "post-ln", "sampled"],
)
def test_recovers_planted_transitions(settings, epochs, share):
    view, next_of = walks()
    table = TableChoice(init_std=0.1)  # small problems start faster from larger weights
    model = make(view, dim=16, num_blocks=1, init_std=0.1, table=table, last_share=0.3, **settings)
    learn(model, view, epochs=epochs)
    assert share_of_rule_found(model, view, next_of) >= share  # chance is 1 in 30


def test_a_sorted_basket_teaches_no_order():
    """Baskets of two hold i and i + 1, sorted, and say nothing of the next basket: i alone must not ask for i + 1."""
    rng = np.random.default_rng(0)
    view = view_of([[[i, i + 1] for i in rng.integers(1, 20, 6).tolist()] for _ in range(200)], 20)
    model = make(view, dim=16, num_blocks=1)
    learn(model, view, epochs=15)
    with torch.no_grad():
        score = model.encode_user(batch_of(view, [[i] for i in range(1, 20)])) @ model.item_matrix().T
    rank = (score[:, 1:] > score.gather(1, torch.arange(2, 21)[:, None])).sum(1)
    assert 5 < rank.float().mean() < 14, "the item that stands next in sorted baskets should rank like any other"


# --- settings and cost ---


def test_cost_is_what_torch_counts():
    view = view_of([[[i] for i in range(1, 17)]], 16)
    model = make(view, max_history=16)
    rows, is_mask = with_mask_behind(Jagged.from_rows([list(range(1, 16))]))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model._query(rows, model.items(rows.values), is_mask, rows.offsets[1:] - 1)
    counted = {op.__name__.split(".")[0]: n for op, n in counter.get_flop_counts()["Global"].items()}
    maps = counted.get("addmm", 0) + counted.get("mm", 0)
    pairs = 4 * 16 * 16 * 8 + 4 * 16 * 8  # scored and mixed: all, and in the last block the mask alone
    cost = model.cost(RequestShape(num_history=15, num_items=16))
    assert cost.user_flops == maps + pairs
    assert cost.item_flops == 2 * (8 + 2)
    assert model.cost(RequestShape(num_history=15), cached=True).user_flops == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dim": 10, "num_heads": 4}, "num_heads must divide dim"),
        ({"max_history": 0}, "max_history must be at least 1"),
        ({"mask_share": 1.0}, "mask_share must lie between"),
        ({"last_share": -0.1}, "last_share from 0 to 1"),
        ({"dropout": 1.0}, "dropout must be from 0"),
        ({"normalise": True}, "output_bias = false"),
        ({"init_std": 0.0}, "init_std must be above 0"),
        ({"window_days": -1.0}, "window_days must be above 0"),
        ({"table": TableChoice(sparse=True)}, "full softmax touches every row"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        BERT4RecConfig(**settings)


def test_the_first_loss_is_that_of_popularity():
    """Before training every item but for its bias is alike: the loss is near that of popularity."""
    view, _ = walks()
    loss = float(make(view).losses(next_events(view))["masked"].detach())
    assert loss == pytest.approx(math.log(30), abs=0.3)
