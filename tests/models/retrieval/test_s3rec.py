"""S3-Rec: its four objectives by hand, the traps of its digest, and a planted log whose attributes must help."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from next_item_support import batch_of, next_events, share_of_rule_found, view_of, walks
from shortlist.data.batches import next_event_batch
from shortlist.data.histories import View
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Categorical, FieldTable, Numeric, Sequence
from shortlist.embeddings.base import TableChoice
from shortlist.errors import ConfigError
from shortlist.layers.attention import LengthClasses
from shortlist.layers.cloze import hide, whole_sequences
from shortlist.models.base import Phase, RequestShape
from shortlist.models.retrieval import s3rec
from shortlist.models.retrieval.s3rec import S3Rec, S3RecConfig

torch.set_num_threads(1)
SCRATCH = {"pretrain_epochs": 0}


def catalogue(num_items: int = 9) -> FieldTable:
    """Colour (item % 3), words (two of five, one twice) and a price, which is no attribute."""
    number = torch.arange(num_items + 1)
    words = torch.stack([1 + number % 5, 1 + number % 5, 1 + (number + 1) % 5], 1)
    lengths = torch.full((num_items + 1,), 3)
    lengths[0] = 0
    return FieldTable(
        num_items + 1,
        (Categorical(name="colour", size=3), Numeric(name="price"), Sequence(name="words", size=5)),
        {
            "colour": torch.where(number > 0, 1 + number % 3, 0),
            "price": torch.zeros(num_items + 1),
            "words": Jagged.from_lengths(words[1:].flatten(), lengths),
        },
    )


def has(item: int) -> list[int]:
    """Attributes of an item by hand: three colours, then five words."""
    return sorted({item % 3, 3 + item % 5, 3 + (item + 1) % 5})


def make(view: View, seed: int = 0, **settings) -> S3Rec:
    torch.manual_seed(seed)
    table = TableChoice(init_std=0.3)
    config = S3RecConfig(**{"dim": 8, "max_history": 12, "dropout": 0.0, "init_std": 0.3, "table": table, **settings})
    model = S3Rec(config, view.space)
    model.prepare(view)
    return model.eval()


def learn(model: S3Rec, view: View, phase: Phase, epochs: int, lr: float = 0.01, size: int = 64) -> None:
    torch.manual_seed(0)
    optimiser = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    for _ in range(epochs):
        for users in torch.randperm(view.space.num_users).add(1).split(size):
            batch = next_event_batch(view.histories, view.users, users.numpy(), max_history=model.max_history)
            optimiser.zero_grad()
            torch.stack(list(phase.losses(batch).values())).sum().backward()
            optimiser.step()
    model.eval()


# --- the objectives by hand ---


def test_attributes_are_those_of_the_fields():
    model = make(view_of([[[1], [2], [3]]], 9, catalogue()))
    have = model.attributes.have(Jagged.from_rows([[4], [1, 2], []]))
    assert have.shape == (3, 8)
    assert have[0].nonzero()[:, 0].tolist() == has(4)
    expected = torch.zeros(8)
    for item in (1, 2):
        expected[has(item)] += 0.5
    assert torch.equal(have[1], expected)
    assert not have[2].any()
    narrow = make(view_of([[[1], [2], [3]]], 9, catalogue()), attributes=("colour",))
    assert narrow.attributes.vectors.weight.shape == (3, 8)


def test_item_and_attribute_objectives_are_the_formulas(monkeypatch):
    """One user, 1 2 3 with 2 and 3 hidden; the negatives are 7 and 9."""
    view = view_of([[[1], [2], [3]]], 9, catalogue())
    model = make(view)
    batch = next_events(view)
    whole = whole_sequences(batch.history, batch.targets)
    monkeypatch.setattr("shortlist.models.retrieval.s3rec.draw_outside", lambda *_: torch.tensor([[7], [9]]))
    sums = model._on_masked(hide(whole, torch.tensor([False, True, True])), whole)

    rows = Jagged.from_rows([[1, 0, 0]])
    is_mask = torch.tensor([False, True, True])
    F = model._encode(rows, model.items(rows.values), is_mask, LengthClasses.of(rows), causal=False)
    e, a = model.items.all(), model.attributes.vectors.weight

    def entropy(asked: torch.Tensor, item: int) -> torch.Tensor:
        score = a @ asked
        return -sum(logsigmoid(score[k] if k in has(item) else -score[k]) for k in range(8))

    def margin(asked: torch.Tensor, item: int, other: int) -> torch.Tensor:
        return -logsigmoid(asked @ e[item] - asked @ e[other])

    aap, mip, map_ = (model.scorers[name] for name in ("aap", "mip", "map"))
    torch.testing.assert_close(sums["aap"], entropy(aap(F[0]), 1))
    torch.testing.assert_close(sums["mip"], margin(mip(F[1]), 2, 7) + margin(mip(F[2]), 3, 9))
    torch.testing.assert_close(sums["map"], entropy(map_(F[1]), 2) + entropy(map_(F[2]), 3))


@pytest.mark.parametrize("double_sigmoid", [False, True])
def test_segment_objective_is_the_formula(monkeypatch, double_sigmoid):
    """1 2 3 4 with the segment 2 3; the negative stretch is drawn from the start of the others, 8 9."""
    view = view_of([[[1], [2], [3], [4]]], 9, catalogue())
    model = make(view, double_sigmoid=double_sigmoid)
    batch = next_events(view)
    whole = whole_sequences(batch.history, batch.targets)
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.zeros(*shape, dtype=torch.float64))
    segment = torch.tensor([False, True, True, False])
    value = model._on_segments(whole, segment, torch.tensor([8, 9, 5, 6]))

    def last(items: list[int]) -> torch.Tensor:
        rows = Jagged.from_rows([items])
        return model._encode(rows, model.items(rows.values), rows.values == 0, LengthClasses.of(rows), causal=False)[-1]

    asked = model.scorers["sp"](last([1, 0, 0, 4]))
    better, worse = asked @ last([0, 2, 3, 0]), asked @ last([0, 8, 9, 0])
    if double_sigmoid:
        better, worse = better.sigmoid(), worse.sigmoid()
    torch.testing.assert_close(value, -logsigmoid(better - worse))


def test_losses_are_weighted_and_per_prefix():
    view = view_of([[[1], [2], [3]], [[4], [5]]], 9, catalogue())
    light, heavy = make(view), make(view, aap_weight=0.4, mip_weight=3.0, map_weight=0.5, sp_weight=1.0)
    heavy.load_state_dict(light.state_dict())
    values = []
    for model in (light, heavy):
        torch.manual_seed(3)
        values.append({name: float(v.detach()) for name, v in model.pretraining_losses(next_events(view)).items()})
    ratio = {name: values[1][name] / values[0][name] for name in values[0]}
    assert ratio == pytest.approx({"aap": 2, "mip": 3, "map": 0.5, "sp": 2})
    only = make(view, aap_weight=0.0, mip_weight=0.0, map_weight=0.0)
    assert set(only.pretraining_losses(next_events(view))) == {"sp"}
    assert set(only.scorers) == {"sp"}


# --- the traps ---


def test_one_encoder_looks_both_ways_in_phase_1_and_back_alone_in_phase_2():
    view = view_of([[[i] for i in range(1, 10)]], 9, catalogue())
    model = make(view)

    def out(items: list[int], causal: bool) -> torch.Tensor:
        rows = Jagged.from_rows([items])
        return model._encode(rows, model.items(rows.values), None, LengthClasses.of(rows), causal=causal)

    assert torch.equal(out([1, 2, 3, 4], True)[:2], out([1, 2, 8, 9], True)[:2])
    assert not torch.isclose(out([1, 2, 3, 4], False)[:2], out([1, 2, 8, 9], False)[:2]).all(1).any()


def test_what_is_hidden_does_not_show():
    """The encoder's outputs at masks and in a sequence without its segment are the same whatever was there."""
    model = make(view_of([[[1], [2], [3]]], 9, catalogue()))
    outs = []
    for hidden in (2, 7):
        batch = next_events(view_of([[[1], [hidden], [3]]], 9, catalogue()))
        whole = whole_sequences(batch.history, batch.targets)
        cloze = hide(whole, torch.tensor([False, True, False]))
        outs.append(
            model._encode(
                cloze.rows,
                model.items(cloze.rows.values),
                cloze.is_mask,
                LengthClasses.of(cloze.rows),
                causal=False,
            )
        )
    assert torch.equal(*outs)


def test_the_last_group_is_always_hidden_and_others_by_chance():
    torch.manual_seed(0)
    batch = next_events(view_of([[[i] for i in range(1, 7)]] * 4, 9))
    whole = whole_sequences(batch.history, batch.targets)
    model = make(view_of([[[1], [2]]], 9, catalogue()), mask_share=0.25)
    drawn = torch.stack([model._draw_masks(whole).view(4, 6) for _ in range(500)]).float().mean((0, 1))
    assert drawn[-1] == 1
    torch.testing.assert_close(drawn[:-1], torch.full((5,), 0.25), atol=0.05, rtol=0)


def test_negatives_avoid_the_prefix_and_not_the_future(monkeypatch):
    """Forbidden is what the prefix holds. Later items stay possible: leaving them out would tell the model what comes."""
    view = view_of([[[1], [2], [3], [4], [5]]], 9, catalogue())
    model = make(view, num_prefixes=8, aap_weight=0.0, map_weight=0.0, sp_weight=0.0)
    seen = []

    def watched(sampler, forbidden, owner, count):
        drawn = draw(sampler, forbidden, owner, count)
        seen.append((forbidden, owner, drawn[:, 0]))
        return drawn

    draw = s3rec.draw_outside
    monkeypatch.setattr(s3rec, "draw_outside", watched)
    torch.manual_seed(0)
    future = 0
    for _ in range(20):
        model.pretraining_losses(next_events(view))
        forbidden, owner, drawn = seen.pop()
        for row, negative in zip(owner.tolist(), drawn.tolist()):
            prefix = forbidden.values[forbidden.offsets[row] : forbidden.offsets[row + 1]].tolist()
            assert negative not in prefix
            future += negative in (2, 3, 4, 5)
    assert future > 0


def test_segments_of_others_are_training_events(monkeypatch):
    view = view_of([[[1], [2], [3]], [[4], [5]]], 9, catalogue())
    model = make(view)
    given = []
    monkeypatch.setattr(
        model, "_on_segments", lambda prefixes, segment, others: given.append(others) or torch.zeros(())
    )
    model.pretraining_losses(next_events(view))
    assert sorted(given[0].tolist()) == [1, 2, 3, 4, 5]  # all events of the view, which ends before validation


def test_two_sigmoids_cannot_reach_zero():
    model = make(view_of([[[1], [2]]], 9, catalogue()), double_sigmoid=True)
    floor = math.log(1 + math.exp(-1))
    assert float(model._margin(torch.tensor(50.0), torch.tensor(-50.0))) == pytest.approx(floor, abs=1e-4)
    plain = make(view_of([[[1], [2]]], 9, catalogue()))
    assert float(plain._margin(torch.tensor(50.0), torch.tensor(-50.0))) == pytest.approx(0)


def test_phases_and_training_from_scratch():
    view = view_of([[[1], [2], [3]]], 9, catalogue())
    both = make(view, pretrain_epochs=7).phases()
    assert [(p.name, p.feed, p.epochs) for p in both] == [
        ("pre-training", "next_event", 7),
        ("fine-tuning", "next_event", None),
    ]
    scratch = make(view, **SCRATCH)
    assert [p.name for p in scratch.phases()] == ["fine-tuning"]
    assert scratch.attributes is None
    assert not len(scratch.scorers)


@pytest.mark.parametrize("loss", ["full_softmax", "bce"])
def test_a_batch_without_supervision_costs_nothing(loss):
    view = view_of([[[1]], [[2]]], 9, catalogue())
    model = make(view, loss=loss).train()
    batch = next_events(view)
    for losses in (model.losses(batch), model.pretraining_losses(batch)):
        total = torch.stack(list(losses.values())).sum()
        assert float(total.detach()) == 0
        total.backward()


def test_the_mask_is_never_recommended_and_popular_items_go_to_strangers():
    view = view_of([[[1], [2]], [[2], [3]], [[2], [3]], [[2], [4], [3]]], 9, catalogue())
    model = make(view)
    found = model.retrieve(batch_of(view, [[1, 2], []]), 20)
    assert ((found.rows > 0) == found.scores.isfinite()).all()
    assert found.rows[1, :2].tolist() == [2, 3]


# --- learning ---


@pytest.mark.parametrize("loss", ["full_softmax", "bce"])
def test_recovers_planted_transitions(loss):
    view, next_of = walks()
    model = make(view, dim=16, num_blocks=1, loss=loss, init_std=0.1, **SCRATCH)
    learn(model, view, model.phases()[0], epochs=25)
    assert share_of_rule_found(model, view, next_of) >= 0.9  # chance is 1 in 30


def test_pretraining_learns_attributes_and_they_help_a_short_fine_tuning():
    """Users stay with one kind of item, and items are too many for so few users to show their kinds."""
    rng = np.random.default_rng(0)
    kind = np.concatenate([[0], 1 + np.arange(60) % 12])
    mates = {k: np.flatnonzero(kind == k) for k in range(1, 13)}
    rows = []
    for _ in range(60):  # a user stays with one kind
        mine = mates[int(rng.integers(1, 13))]
        rows.append([[int(i)] for i in rng.choice(mine, 4, replace=False)])
    table = FieldTable(61, (Categorical(name="kind", size=12),), {"kind": torch.from_numpy(kind)})
    view = view_of(rows, 60, table)
    scores = {}
    for name, epochs in (("pre-trained", 60), ("scratch", 0)):
        model = make(view, dim=16, num_blocks=1, init_std=0.1, table=TableChoice(init_std=0.1), pretrain_epochs=epochs)
        if epochs:
            learn(model, view, model.phases()[0], epochs, lr=0.02, size=20)
            rows = Jagged.from_rows([[i, 0] for i in range(1, 61)])  # the last one is always hidden in phase 1
            classes, is_mask = LengthClasses.of(rows), rows.values == 0
            out = model._encode(rows, model.items(rows.values), is_mask, classes, causal=False)[~is_mask]
            said = (model.scorers["aap"](out) @ model.attributes.vectors.weight.T).argmax(1)
            known = view.space.known_items[1:]  # nobody could learn the others
            assert (said + 1 == torch.from_numpy(kind[1:]))[known].float().mean() > 0.6  # chance is 1 in 12
        learn(model, view, model.phases()[-1], 6, lr=0.003)
        batch = batch_of(view, [[i] for i in range(1, 61)])
        with torch.no_grad():
            score = (model.encode_user(batch) @ model.item_matrix().T)[:, 1:].fill_diagonal_(-torch.inf)
        same = torch.from_numpy(kind[1:][score.topk(4).indices.numpy()] == kind[1:, None])
        scores[name] = float(same.float().mean())
    assert scores["pre-trained"] > scores["scratch"] + 0.15


# --- settings and cost ---


def test_cost_is_that_of_a_causal_encoder_asked_once():
    model = make(view_of([[[1], [2]]], 9, catalogue()), num_blocks=2)
    D, L = 8, 3
    first = 2 * L * D * D * (4 + 8) + 4 * 6 * D
    last = 2 * L * D * D * 3 + 2 * D * D * (1 + 8) + 4 * 6 * D
    cost = model.cost(RequestShape(num_history=L, num_items=9))
    assert cost.user_flops == first + last
    assert cost.item_flops == 2 * (D + 1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dim": 10, "num_heads": 4}, "num_heads must divide dim"),
        ({"num_prefixes": 0}, "num_prefixes must be at least 1"),
        ({"mask_share": 1.0}, "mask_share must be from 0"),
        ({"sp_weight": -1.0}, "sp_weight must not be negative"),
        ({"aap_weight": 0.0, "mip_weight": 0.0, "map_weight": 0.0, "sp_weight": 0.0}, "needs an objective"),
        ({"window_days": 0.0}, "window_days must be above 0"),
        ({"negatives": "in_batch"}, "does not count items"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        S3RecConfig(**settings)


def test_a_log_without_attributes_is_refused_by_name():
    bare = view_of([[[1], [2]]], 9)
    with pytest.raises(ConfigError, match="no item field has ids"):
        S3Rec(S3RecConfig(), bare.space)
    S3Rec(S3RecConfig(aap_weight=0.0, map_weight=0.0), bare.space)
    with pytest.raises(ConfigError, match="price"):
        S3Rec(S3RecConfig(attributes=("price",)), view_of([[[1], [2]]], 9, catalogue()).space)
