"""SASRec: against a dense left-padded reference, the traps of its digest, and planted logs it must learn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import layer_norm, log_softmax, logsigmoid, relu

from sequence_support import batch_of, learn, view_of
from shortlist.data.batches import Batch, next_event_batch
from shortlist.data.histories import View
from shortlist.data.jagged import Jagged
from shortlist.embeddings.base import TableChoice
from shortlist.errors import ConfigError
from shortlist.layers.next_item import _items_of_users
from shortlist.models.base import RequestShape
from shortlist.models.retrieval.sasrec import SASRec, SASRecConfig
from shortlist.registry import find
from support import NUM_ITEMS, PER_CLUSTER, planted_space, planted_view, training_batch

LOSSES = ("full_softmax", "sampled_softmax", "gbce", "bce_k", "bce")


def make(view: View, seed: int = 0, **settings) -> SASRec:
    torch.manual_seed(seed)
    model = SASRec(SASRecConfig(**{"dim": 8, "max_history": 12, "dropout": 0.0, **settings}), view.space)
    model.prepare(view)
    return model.eval()


# --- against a dense reference ---


def dense(model: SASRec, rows_BL: torch.Tensor) -> torch.Tensor:
    """[B, L, D] for left-padded rows (0 = padding): the equations of the paper over padded blocks, one head at a time."""
    config, L = model.config, rows_BL.shape[1]
    is_real = rows_BL > 0
    places = model.positions.weight[:L].flip(0)  # the last column has position 0
    x = (model.items(rows_BL) * config.dim**0.5 + places) * is_real[:, :, None]
    visible = torch.ones(L, L, dtype=torch.bool).tril() & is_real[:, None, :]

    def norm(layer, t):
        return layer_norm(t, (config.dim,), layer.weight, layer.bias)

    for block in model.blocks:
        attention, (first, last) = block.attention, [m for m in block.ffn.layers if isinstance(m, torch.nn.Linear)]
        asks = norm(block.norm_query if config.block == "original" else block.norm_attention, x)
        source = x if config.block == "original" else asks
        q = attention.query(asks)
        k, v = attention.key_value(source).split(config.dim, dim=-1)
        heads = []
        for h in torch.arange(config.dim).chunk(config.num_heads):
            logits = q[..., h] @ k[..., h].transpose(1, 2) / len(h) ** 0.5
            weights = logits.masked_fill(~visible, -1e30).softmax(-1)
            heads.append(weights @ v[..., h])
        mixed = torch.cat(heads, -1)
        if config.block == "original":
            y = norm(block.norm_ffn, asks + mixed)
            x = y + last(relu(first(y)))
        else:
            x = x + attention.out(mixed)
            x = x + last(relu(first(norm(block.norm_ffn, x))))
        x = x * is_real[:, :, None]
    return norm(model.norm, x)


@pytest.mark.parametrize("block", ["pre-ln", "original"])
@pytest.mark.parametrize("extra_padding", [0, 3])
def test_agrees_with_a_dense_left_padded_model(block, extra_padding):
    view = view_of([[[i] for i in range(1, 10)]], 9)
    model = make(view, block=block, num_heads=2, init_std=0.3)
    rows = Jagged.from_rows([[1, 2, 3, 4, 5, 6, 7], [9], [4, 4, 2]])
    ours = model._query(rows, model.items(rows.values))
    width = 7 + extra_padding  # more padding on the left must not matter
    padded = torch.zeros(3, width, dtype=torch.int64)
    for r, row in enumerate([[1, 2, 3, 4, 5, 6, 7], [9], [4, 4, 2]]):
        padded[r, width - len(row) :] = torch.tensor(row)
    torch.testing.assert_close(ours, dense(model, padded)[padded > 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", ["pre-ln", "original"])
def test_later_items_do_not_change_earlier_outputs(block):
    view = view_of([[[i] for i in range(1, 10)]], 9)
    model = make(view, block=block, init_std=0.3)
    before, after = Jagged.from_rows([[1, 2, 3, 4, 5]]), Jagged.from_rows([[1, 2, 3, 8, 9]])
    out_before, out_after = (model._query(rows, model.items(rows.values)) for rows in (before, after))
    assert torch.equal(out_before[:3], out_after[:3])
    assert not torch.isclose(out_before[3:], out_after[3:]).any(1).all()


def test_truncation_keeps_the_last_items():
    view = view_of([[[i] for i in range(1, 10)]], 9)
    model = make(view, max_history=4, init_std=0.3)
    long, short = (
        model.encode_user(batch_of(view, [[1, 2, 3, 6, 7, 8, 9]])),
        model.encode_user(batch_of(view, [[6, 7, 8, 9]])),
    )
    torch.testing.assert_close(long, short)
    other = model.encode_user(batch_of(view, [[1, 2, 3, 6]]))
    assert not torch.allclose(long, other)


# --- losses ---


def two_baskets() -> tuple[View, Batch]:
    """Two users: 1 -> 2 -> {3, 4}, and {5, 6} -> 7. Supervised: after 1, after 2, and after the basket {5, 6}."""
    view = view_of([[[1], [2], [3, 4]], [[5, 6], [7]]], 9)
    return view, next_event_batch(view.histories, view.users, np.array([1, 2]), max_history=12)


def test_full_softmax_is_the_formula_at_group_ends():
    view, batch = two_baskets()
    model = make(view, init_std=0.3)
    rows = torch.tensor([[1, 2], [5, 6]])
    hidden = dense(model, rows)
    log_p = log_softmax(hidden @ model.items.all()[1:].T, dim=-1)  # items 1..9, no row 0
    by_hand = -(log_p[0, 0, 1] + (log_p[0, 1, 2] + log_p[0, 1, 3]) / 2 + log_p[1, 1, 6]) / 3
    torch.testing.assert_close(model.losses(batch)["next"], by_hand)


def test_bce_is_the_papers_formula(monkeypatch):
    view, batch = two_baskets()
    model = make(view, init_std=0.3, loss="bce")
    negatives = torch.tensor([[8], [9], [8]])
    monkeypatch.setattr("shortlist.layers.next_item.draw_outside", lambda *_: negatives)
    hidden = dense(model, torch.tensor([[1, 2], [5, 6]]))
    score = hidden @ model.items.all().T

    def pair(query, target, negative):
        return -(logsigmoid(query[target]) + logsigmoid(-query[negative])) / 2

    at = [score[0, 0], score[0, 1], score[1, 1]]
    basket = (pair(at[1], 3, 9) + pair(at[1], 4, 9)) / 2
    by_hand = (pair(at[0], 2, 8) + basket + pair(at[2], 7, 8)) / 3
    torch.testing.assert_close(model.losses(batch)["next"], by_hand)


def test_the_offset_of_many_negatives_starts_at_their_number_and_shifts_every_score():
    view, batch = two_baskets()
    settings = {"init_std": 0.3, "loss": "bce_k", "num_negatives": 9}  # all items, so the draw does not matter
    model = make(view, **settings)
    plain = make(view, **settings, learn_offset=False)
    assert model.objective.offset.item() == pytest.approx(-np.log(9))
    assert plain.objective.offset is None
    hidden = dense(plain, torch.tensor([[1, 2], [5, 6]]))
    score = hidden @ plain.items.all().T - np.log(9)
    total = torch.zeros(())
    for query, targets in ((score[0, 0], [2]), (score[0, 1], [3, 4]), (score[1, 1], [7])):
        others = [i for i in range(1, 10) if i not in targets]
        for target in targets:
            pair = -(logsigmoid(query[target]) + logsigmoid(-query[others]).sum()) / 10
            total = total + pair / len(targets) / 3
    torch.testing.assert_close(model.losses(batch)["next"], total)
    assert "objective.offset" in model.state_dict()
    assert make(view, loss="bce").objective.offset is None  # one negative needs none, and the paper has none


def test_bce_negatives_avoid_the_users_own_training_items():
    _, batch = two_baskets()
    own, owner = _items_of_users(batch.history.items, batch.targets)
    sets = [set(own.values[a:b].tolist()) for a, b in zip(own.offsets[:-1].tolist(), own.offsets[1:].tolist())]
    assert sets == [{1, 2, 3, 4}, {5, 6, 7}]
    assert owner.tolist() == [0, 0, 1]


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_is_learned_about_the_order_inside_a_group(loss):
    """The gradient is the same whatever the order of the items of a target basket, and no basket item predicts another."""
    view, batch = two_baskets()
    model = make(view, init_std=0.3, loss=loss, num_negatives=9)
    targets = batch.targets
    assert targets.position.tolist() == [0, 1, 3]  # never position 2, between the two items of {5, 6}
    swapped = replace(targets, items=targets.items.with_values(targets.items.values[torch.tensor([0, 2, 1, 3])]))
    losses = []
    for t in (targets, swapped):
        torch.manual_seed(1)
        losses.append(model.losses(replace(batch, targets=t))["next"])
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_without_supervision_or_history_costs_nothing(loss):
    view = view_of([[[1]], [[2]]], 9)
    model = make(view, loss=loss).train()
    batch = next_event_batch(view.histories, view.users, np.array([1, 2]), max_history=12)
    value = model.losses(batch)["next"]
    assert float(value.detach()) == 0
    value.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("settings", [{"loss": loss} for loss in LOSSES] + [{"negatives": "own", "loss": "gbce"}])
def test_cosine_scores_serve_as_they_train(settings):
    """With normalise and temperature the served score is the cosine over the temperature, whatever the loss."""
    view = view_of([[[i] for i in range(1, 10)]], 9)
    model = make(view, init_std=0.3, normalise=True, temperature=0.05, num_negatives=3, **settings)
    batch = batch_of(view, [[1, 2, 3]])
    score = model.encode_user(batch) @ model.item_matrix().T
    rows = batch.history.items
    query = model._query(rows, model.items(rows.values))[-1]
    expected = torch.cosine_similarity(query[None], model.items.all(), dim=1) / 0.05
    torch.testing.assert_close(score[0], expected, rtol=1e-4, atol=1e-4)
    assert model.losses(training_batch("next_event", view))["next"].isfinite()


# --- people and items one has not met ---


def test_someone_without_known_history_gets_the_popular_items():
    view = view_of([[[1], [2]], [[2], [3]], [[2], [3]], [[2], [4], [3]]], 6)
    model = learn(make(view), view, epochs=3)
    ranking = model.retrieve(batch_of(view, [[], [6], [2]]), 3).rows  # item 6 has no events, and no fields describe it
    assert ranking[0].tolist()[:2] == [2, 3]
    popularity = find("popularity")
    counted = popularity.cls(popularity.config(), view.space)
    counted.prepare(view)
    assert torch.equal(ranking[:1], counted.retrieve(batch_of(view, [[]]), 3).rows)
    assert ranking[1].tolist() == ranking[0].tolist()
    assert ranking[2].tolist() != ranking[0].tolist()


def test_an_unknown_event_among_known_ones_does_not_matter():
    view = view_of([[[i] for i in range(1, 10)]], 12)
    model = make(view, init_std=0.3)
    users = model.encode_user(batch_of(view, [[1, 2, 3], [1, 11, 2, 0, 3, 12]]))
    torch.testing.assert_close(users[0], users[1])


def test_an_item_without_events_and_fields_ranks_below_the_average_item():
    view = view_of([[[1 + (u + t) % 8] for t in range(6)] for u in range(40)], 12)  # rows 9..12 never occur
    model = learn(make(view), view, epochs=20)
    with torch.no_grad():
        score = model.encode_user(batch_of(view, [[3], [5, 6], [1, 2, 3]])) @ model.item_matrix().T
    assert ((score[:, 1:9] > score[:, 9:10]).sum(1) >= 5).all()


def test_a_new_item_is_found_through_its_fields():
    """The planted shop, with one item of each cluster taken out of training: its fields must place it in its cluster."""
    view = planted_view()
    new = torch.tensor([1, 7, 13, 19])
    known = view.space.known_items.clone()
    known[new] = False
    keep = ~np.isin(view.histories.item, new.numpy())
    space = replace(view.space, known_items=known)
    view = replace(view, histories=view.histories.keep(keep), space=space)
    model = learn(make(view, dim=16, id_dropout=0.3), view, epochs=60)
    singles = [[1 + c * PER_CLUSTER + p] for c in range(4) for p in range(5) if 1 + c * PER_CLUSTER + p not in new]
    with torch.no_grad():
        score = model.encode_user(batch_of(view, singles)) @ model.item_matrix().T
    own = torch.tensor([new[(row[0] - 1) // PER_CLUSTER] for row in singles])
    others = torch.stack([new[new != item] for item in own])
    wins = score.gather(1, own[:, None]) > score.gather(1, others)
    assert wins.float().mean() > 0.9, "a new item should please those who like its cluster most"


# --- learning ---


def markov_view(num_items: int = 30, num_users: int = 400, seed: int = 0) -> tuple[View, np.ndarray]:
    """Users walk: item i is followed by next_of[i] with chance 0.8, else by any item. Popularity knows nothing of it."""
    rng = np.random.default_rng(seed)
    cycle = rng.permutation(num_items) + 1
    next_of = np.zeros(num_items + 1, dtype=np.int64)
    next_of[cycle] = np.roll(cycle, -1)
    walks = []
    for _ in range(num_users):
        at = int(rng.integers(1, num_items + 1))
        walk = [at]
        for _ in range(7):
            at = int(next_of[at]) if rng.random() < 0.8 else int(rng.integers(1, num_items + 1))
            walk.append(at)
        walks.append([[i] for i in walk])
    return view_of(walks, num_items), next_of


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "full_softmax"},
        {"loss": "full_softmax", "block": "original"},
        {"loss": "sampled_softmax", "num_negatives": 10},
        {"loss": "sampled_softmax", "normalise": True, "temperature": 0.1, "num_negatives": 10},
        {"loss": "gbce", "num_negatives": 10},
        {"loss": "bce_k", "num_negatives": 10, "negatives": "own"},
        {"loss": "bce"},
    ],
    ids=lambda s: "-".join(str(v) for v in s.values()),
)
def test_recovers_planted_transitions(settings):
    view, next_of = markov_view()
    table = TableChoice(init_std=0.1)  # small problems start faster from larger weights
    model = learn(make(view, dim=16, num_blocks=1, init_std=0.1, table=table, **settings), view, epochs=40)
    batch = batch_of(view, [[i] for i in range(1, 31)])
    # As in the paper, what was seen is not shown again: BCE never has a seen item as a negative and so ranks it high.
    batch = replace(batch, excluded=batch.history.items)
    with torch.no_grad():
        top = model.retrieve(batch, 1).rows[:, 0].numpy()
    assert (top == next_of[1:]).mean() >= 0.9  # a popularity list is right once in 30


def test_a_sorted_basket_teaches_no_order():
    """Baskets of two hold i and i + 1, sorted, and say nothing of the next basket: i alone must not ask for i + 1."""
    rng = np.random.default_rng(0)
    view = view_of([[[i, i + 1] for i in rng.integers(1, 20, 6).tolist()] for _ in range(200)], 20)
    model = learn(make(view, dim=16, num_blocks=1), view, epochs=15)
    with torch.no_grad():
        score = model.encode_user(batch_of(view, [[i] for i in range(1, 20)])) @ model.item_matrix().T
    rank = (score[:, 1:] > score.gather(1, torch.arange(2, 21)[:, None])).sum(1)
    assert 5 < rank.float().mean() < 14, "the item that stands next in sorted baskets should rank like any other"


def test_same_seed_same_weights():
    view, _ = markov_view(num_users=60)
    states = [
        learn(make(view, seed=s, dropout=0.3, loss="sampled_softmax"), view, epochs=2, seed=s).state_dict()
        for s in (5, 5, 6)
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_bf16_training_learns_too():
    view, next_of = markov_view()
    table = TableChoice(init_std=0.1)
    model = learn(make(view, dim=16, num_blocks=1, init_std=0.1, table=table), view, epochs=30, bf16=True)
    batch = batch_of(view, [[i] for i in range(1, 31)])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model.encode_user(batch).dtype == torch.float32
        top = model.retrieve(batch, 1).rows[:, 0].numpy()
    assert (top == next_of[1:]).mean() >= 0.9


# --- settings and cost ---


def test_padding_does_not_exist_and_the_unknown_row_stays_out_of_results():
    view = planted_view()
    model = learn(make(view, use_fields=False), view, epochs=2)
    before = make(view, use_fields=False).items.ids.weight()[0]
    assert torch.equal(model.items.ids.weight()[0], before)  # never read, so never moved
    assert (model.retrieve(batch_of(view, [[1], []]), NUM_ITEMS).rows > 0).all()


def test_cost_counts_maps_and_pairs():
    view = view_of([[[i] for i in range(1, 10)]], 9)
    cost = make(view, num_blocks=2).cost(RequestShape(num_history=3, num_items=9))
    D, L = 8, 3
    maps = 2 * L * D * D * (4 + 2)  # query, key, value, output; two of the feed-forward
    pairs = 6 * 2 * 2 * D  # 1 + 2 + 3 pairs, scored and mixed
    assert cost.user_flops == 2 * (maps + pairs)
    assert cost.item_flops == 2 * (D + 1)
    assert (
        make(view).cost(RequestShape(num_history=500)).user_flops
        == make(view).cost(RequestShape(num_history=12)).user_flops
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dim": 10, "num_heads": 4}, "num_heads must divide dim"),
        ({"max_history": 0}, "max_history must be at least 1"),
        ({"dropout": 1.0}, "dropout must be from 0"),
        ({"temperature": 0.0}, "temperature"),
        ({"table": TableChoice(sparse=True)}, "sampled loss or sparse = false"),
    ],
)
def test_bad_settings_say_what_to_do(settings, words):
    with pytest.raises(ConfigError, match=words):
        SASRecConfig(**settings)


def test_a_batch_without_targets_is_refused():
    view = planted_view()
    with pytest.raises(ValueError, match="next-event"):
        make(view).losses(batch_of(view, [[1, 2]]))


def test_item_fields_are_read_only_when_wanted():
    space = planted_space()
    with_fields, without = (SASRec(SASRecConfig(dim=8, use_fields=use), space) for use in (True, False))
    assert with_fields.items.num_fields == 3
    assert without.items.num_fields == 0
    assert without.items.id_dropout == 0
