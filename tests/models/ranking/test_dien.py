"""DIEN: gates by hand, fast against plain, the auxiliary loss against loops, memories, a planted change of mind, costs."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import logsigmoid
from torch.utils.flop_counter import FlopCounterMode

from ranking_support import batch_of, rich_batch, rich_space, share_right, space_of, train
from shortlist.data.jagged import Jagged
from shortlist.data.samplers import PopularitySampler
from shortlist.errors import ConfigError
from shortlist.layers.scoring import HeadConfig
from shortlist.models.base import Remembering, RequestShape
from shortlist.models.ranking import dien
from shortlist.models.ranking.dien import DIEN, EVOLUTIONS, DIENConfig, GatedGRU, draw_negatives, next_positions
from shortlist.models.ranking.din import DIN, DINConfig

HEAD = HeadConfig(widths=(16,), dropout=0.0)
TINY = DIENConfig(dim=8, hidden=8, max_history=6, id_dropout=0.0, head=HEAD)
PAST = [[1, 2, 3, 4], [], [5, 5], [6]]
OFFERED = [[1, 7, 9], [2, 11], [], [3, 12, 8, 4]]


def made(config: DIENConfig = TINY, space=None) -> DIEN:
    torch.manual_seed(0)
    return DIEN(config, space or rich_space()).eval()


def loud(model: DIEN) -> DIEN:
    """Large weights, so that nothing is nearly 0."""
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    return model


def sigmoid(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).sigmoid())


@torch.no_grad()
@pytest.mark.parametrize("evolution", EVOLUTIONS[1:])
def test_one_step_by_hand(evolution):
    """One unit: state 0.5, weight 0.25; r = s(1), c = tanh(2 + r * 0.5 * 4), u = s(3 - 0.5), all maps of the input already made."""
    cell = GatedGRU(1, evolution)
    cell.recurrent.weight.copy_(torch.tensor([[0.0], [4.0], [-1.0]])[: len(cell.recurrent.weight)])
    x = torch.tensor([[1.0, 2.0, 3.0]])[:, : len(cell.recurrent.weight)]
    fresh, u, a = float(torch.tanh(torch.tensor(2 + sigmoid(1.0) * 2.0))), sigmoid(2.5), 0.25
    z = {"aigru": u, "agru": a, "augru": a * u, "augru-released": u + a * (1 - u)}[evolution]
    found = cell.step(x, torch.tensor([[0.5]]), torch.tensor([[a]]))
    assert found.item() == pytest.approx((1 - z) * 0.5 + z * fresh, rel=1e-5)


@torch.no_grad()
def test_without_attention_the_paper_s_gate_stands_still_and_the_released_one_is_a_plain_gru():
    torch.manual_seed(0)
    x, state, none = torch.randn(5, 4), torch.randn(5, 4), torch.zeros(5, 1)
    for evolution in ("augru", "agru"):
        cell = GatedGRU(4, evolution)
        torch.testing.assert_close(cell.step(cell.input(x), state, none), state)
    cell, theirs = GatedGRU(4, "augru-released"), nn.GRUCell(4, 4)
    # PyTorch keeps the share z of the old state, so its gate is ours with the sign turned: order r, z, n.
    sign = torch.tensor([1.0, -1.0, 1.0]).repeat_interleave(4)
    order = torch.tensor([0, 2, 1]).repeat_interleave(4) * 4 + torch.arange(4).repeat(3)
    theirs.weight_ih.copy_(sign[:, None] * cell.input.weight[order])
    theirs.bias_ih.copy_(sign * cell.input.bias[order])
    theirs.weight_hh.copy_(sign[:, None] * cell.recurrent.weight[order])
    theirs.bias_hh.zero_()
    torch.testing.assert_close(cell.step(cell.input(x), state, none), theirs(x, state))
    whole = cell.step(cell.input(x), state, torch.ones(5, 1))
    torch.testing.assert_close(
        whole, GatedGRU.step(cell, cell.input(x) + torch.tensor([0.0, 0, 50]).repeat_interleave(4), state, none)
    )


@torch.no_grad()
def test_extractor_is_the_paper_s_gru():
    """Equations 2 to 5 written out; PyTorch's gate keeps, so the paper's update is 1 minus it."""
    model = loud(made())
    batch = batch_of([[1, 2, 3]], [[4]])
    batch = replace(rich_batch([[1, 2, 3]], [[4]]), history=batch.history)
    state = model.user_state(batch)
    w_r, w_z, w_n = model.extractor.weight_ih_l0.chunk(3)
    u_r, u_z, u_n = model.extractor.weight_hh_l0.chunk(3)
    (b_r, b_z, b_n), (c_r, c_z, c_n) = model.extractor.bias_ih_l0.chunk(3), model.extractor.bias_hh_l0.chunk(3)
    h = torch.zeros(8)
    for t, e in enumerate(model.items(torch.tensor([1, 2, 3]))):
        u = 1 - torch.sigmoid(w_z @ e + u_z @ h + b_z + c_z)
        r = torch.sigmoid(w_r @ e + u_r @ h + b_r + c_r)
        h = (1 - u) * h + u * torch.tanh(w_n @ e + b_n + r * (u_n @ h + c_n))
        torch.testing.assert_close(state.interest_EH[t], h)


@torch.no_grad()
@pytest.mark.parametrize("evolution", EVOLUTIONS)
@pytest.mark.parametrize(("attention", "weights"), [("bilinear", "softmax"), ("unit", "sigmoid")])
@pytest.mark.parametrize("pairs_at_once", [1, 1_000_000])
def test_fast_evolution_agrees_with_the_plain_one(evolution, attention, weights, pairs_at_once):
    settings = {"evolution": evolution, "attention": attention, "weights": weights, "pairs_at_once": pairs_at_once}
    model, batch = loud(made(replace(TINY, **settings))), rich_batch(PAST, OFFERED)
    state, rows = model.user_state(batch), batch.candidate_rows
    items = rows.with_values(model.items(rows.values))
    fast = model.evolved(state, items)
    torch.testing.assert_close(fast, model.plain_evolved(state, items), rtol=1e-5, atol=1e-5)
    assert (fast[:3].abs().sum(1) > 0).all()
    assert (fast[3:5] == 0).all()  # no history: nothing, not NaN


@pytest.mark.parametrize("evolution", EVOLUTIONS)
def test_fast_evolution_has_the_plain_one_s_gradient(evolution):
    grads = []
    for plain in (False, True):
        model, batch = loud(made(replace(TINY, evolution=evolution))).train(), rich_batch(PAST, OFFERED)
        state, rows = model.user_state(batch), batch.candidate_rows
        evolve = model.plain_evolved if plain else model.evolved
        evolve(state, rows.with_values(model.items(rows.values))).sin().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert any(name.startswith("evolution") for name in grads[0])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("evolution", ["augru", "augru-released", "gru"])
def test_a_score_depends_on_nothing_else_in_the_batch(evolution):
    """Padding, above all: a longer neighbour adds steps that the released gate would not survive."""
    model = loud(made(replace(TINY, evolution=evolution)))
    together = model.score(rich_batch(PAST, OFFERED))["target"]
    swapped = model.score(rich_batch(PAST, [[9, 7, 1], [4], [2, 3], [3, 12]]))["target"]
    torch.testing.assert_close(swapped[[2, 1, 0]], together[:3])
    torch.testing.assert_close(swapped[-2:], together[5:7])
    longer = model.score(rich_batch([PAST[0], [7] * 9], OFFERED[:2]))["target"]
    torch.testing.assert_close(longer[:3], together[:3])


@torch.no_grad()
def test_the_order_of_the_past_matters():
    model = loud(made())
    scores = [model.score(rich_batch([past], [[7]]))["target"].item() for past in ([1, 2, 3], [3, 2, 1])]
    assert abs(scores[0] - scores[1]) > 1e-3


def test_next_behaviours_stay_inside_a_request_and_leave_a_basket_alone():
    """Groups: a a | b b | c for the first request (positions 1 and 3 end a group that is followed), one event, two events."""
    history = batch_of([[1, 2, 3, 4, 5], [6], [], [7, 8]], [[1], [1], [1], [1]]).history
    history = replace(history, group=torch.tensor([0, 0, 1, 1, 2, 3, 4, 5]))
    assert next_positions(history).tolist() == [1, 3, 6]
    assert next_positions(batch_of([[1], []], [[1], [1]]).history).tolist() == []


def test_negatives_follow_popularity_and_are_never_the_next_item():
    torch.manual_seed(0)
    sampler = PopularitySampler.of_counts(torch.tensor([5.0, 1, 0, 3]))
    drawn = draw_negatives(sampler, torch.tensor([1, 3]).repeat_interleave(1000))
    assert set(drawn[:1000].tolist()) == {3}
    assert set(drawn[1000:].tolist()) <= {
        0,
        1,
    }  # 3 comes with chance 3/4: a few draws hit it to the end and count for nothing
    free = draw_negatives(sampler, torch.full((4000,), 2))
    assert (free == 3).float().mean().item() == pytest.approx(0.75, abs=0.03)


@torch.no_grad()
@pytest.mark.parametrize("form", ["inner", "network"])
def test_auxiliary_loss_against_loops(form, monkeypatch):
    """Two actions: their marks are in the states, but not in the items that are told apart. Row 0 is no negative."""
    model = loud(made(replace(TINY, auxiliary_form=form), rich_space(actions=("view", "buy"))))
    batch = rich_batch([[1, 2, 3, 4], [], [5, 6], [7]], [[1], [1], [1], [1]])
    history = replace(batch.history, action=torch.tensor([1, 2, 1, 2, 1, 1, 2]))
    negatives = torch.tensor([9, 0, 8, 10])
    monkeypatch.setattr(dien, "draw_negatives", lambda sampler, next_P: negatives)
    state = model.user_state(replace(batch, history=history))
    found = model.auxiliary_loss(history, model.items(history.items.values), state.interest_EH)

    def tell(h, item):
        e = model.items(torch.tensor([item]))[0]
        return h @ e if form == "inner" else model.teller(torch.cat([h, e])[None])[0, 0]

    terms = []
    for position, (item, negative) in enumerate([(2, 9), (3, 0), (4, 8), (None, 0), (6, 10)]):
        if item and negative:
            h = state.interest_EH[position]
            terms.append(-logsigmoid(tell(h, item)) - logsigmoid(-tell(h, negative)))
    torch.testing.assert_close(found, torch.stack(terms).mean())


def test_auxiliary_loss_knows_no_label():
    """The candidates change, the term does not; without a second event there is none, and no NaN."""
    model = made().train()
    terms = []
    for offered in ([[7, 8]], [[9]]):
        torch.manual_seed(5)
        terms.append(
            model.losses(rich_batch([[1, 2, 3]], offered, target=[1.0, 0][: len(offered[0])]))["auxiliary"].detach()
        )
    assert terms[0] == terms[1] > 0
    losses = model.losses(rich_batch([[1], []], [[1, 2], [3]], target=[1.0, 0, 0]))
    assert losses["auxiliary"] == 0
    sum(losses.values()).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    assert "auxiliary" not in made(replace(TINY, auxiliary=0)).losses(rich_batch([[1, 2]], [[1, 2]], target=[1.0, 0]))


@torch.no_grad()
@pytest.mark.parametrize("evolution", ["augru", "gru"])
def test_a_memory_goes_on_where_the_last_request_ended(evolution):
    model = loud(made(replace(TINY, evolution=evolution)))
    assert isinstance(model, Remembering)
    before = rich_batch([[1, 2], [], [5], [6, 7]], [[]] * 4)
    _, kept = model.recall(before, [None] * 4)
    assert kept[1] is None
    now = rich_batch([[1, 2, 3, 4], [8], [5], [6, 9, 7]], OFFERED)
    state, again = model.recall(now, kept)
    expected = model.user_state(now)
    for found, right in zip(state, expected):
        torch.testing.assert_close(found, right)
    assert [len(m["item"]) for m in again] == [4, 1, 1, 3]
    torch.testing.assert_close(model.score_candidates(state, now.candidates)["target"], model.score(now)["target"])


@torch.no_grad()
def test_a_memory_is_read_where_it_fits_and_only_there():
    """A memory is falsified: it shows in the states exactly where its events are the history's first ones."""
    model = loud(made(replace(TINY, max_history=4)))

    def states(past, memory):
        return model.recall(rich_batch([past], [[]]), [memory])[0].interest_EH

    _, (kept,) = model.recall(rich_batch([[1, 2, 3]], [[]]), [None])
    false = {**kept, "interest": kept["interest"] + 1}
    fresh = model.user_state(rich_batch([[1, 2, 3, 4]], [[]])).interest_EH
    assert torch.equal(states([1, 2, 3, 4], false)[:3], false["interest"])
    assert not torch.allclose(states([1, 2, 3, 4], false)[3], fresh[3])
    for past in ([1, 2], [1, 9, 3, 4], [2, 3, 4, 5], [1, 2, 3, 4, 5]):  # events gone, another item, slid
        right = model.user_state(rich_batch([past], [[]])).interest_EH
        torch.testing.assert_close(states(past, false), right)
    later = {**kept, "time": kept["time"] + 1, "interest": false["interest"]}
    torch.testing.assert_close(states([1, 2, 3, 4], later), fresh)


GROUPS, PER_GROUP = 8, 5


def changed_mind(size: int, draw: torch.Generator):
    """Some events of one group, then as many of another on average; an item of each is offered, the newer interest wins.

    Where the change comes is random, so that a set of past items tells nothing.
    """
    pair = torch.rand(size, GROUPS, generator=draw).argsort(1)[:, :2]
    change = torch.randint(2, 7, (size, 1), generator=draw)
    group = torch.where(torch.arange(8) < change, pair[:, :1], pair[:, 1:])
    newest = torch.randint(2, (size,), generator=draw)
    offered = torch.where(newest[:, None] == 0, pair.flip(1), pair)
    items = [1 + g * PER_GROUP + torch.randint(PER_GROUP, g.shape, generator=draw) for g in (group, offered)]
    label = torch.stack([newest == 0, newest == 1], 1).float()
    return batch_of(items[0].tolist(), items[1].tolist(), labels={"target": label.flatten()})


@pytest.mark.parametrize("evolution", ["augru", "augru-released"])
def test_follows_a_change_of_mind_that_din_can_not_see(evolution):
    head = HeadConfig(widths=(32,), dropout=0.0, activation="relu")
    config = DIENConfig(dim=16, hidden=16, id_dropout=0.0, evolution=evolution, head=head)
    model = made(config, space_of(GROUPS * PER_GROUP))
    curve = train(model, changed_mind, steps=150)
    assert curve[-1] < curve[0]
    test = changed_mind(400, torch.Generator().manual_seed(99))
    assert share_right(model, test) > 0.9
    torch.manual_seed(0)
    din = DIN(DINConfig(dim=16, widths=(32,), dropout=0.0, id_dropout=0.0, mba=0), space_of(GROUPS * PER_GROUP))
    train(din, changed_mind, steps=150)
    assert share_right(din, test) < 0.65


def test_auxiliary_loss_alone_learns_what_comes_next():
    """Item i is followed by i + 1: the states learn it without any label."""
    model = made(replace(TINY, dim=16, hidden=16), space_of(20))

    def walks(size, draw):
        start = torch.randint(20, (size, 1), generator=draw)
        return batch_of(
            (1 + (start + torch.arange(6)) % 20).tolist(), [[1]] * size, labels={"target": torch.zeros(size)}
        )

    torch.manual_seed(0)
    optimiser, draw = torch.optim.Adam(model.parameters(), lr=0.02), torch.Generator().manual_seed(1)
    model.train()
    curve = []
    for _ in range(120):
        loss = model.losses(walks(32, draw))["auxiliary"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        curve.append(loss.item())
    assert curve[0] == pytest.approx(2 * 0.6931, abs=0.05)
    assert sum(curve[-10:]) / 10 < 0.4


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"evolution": "agru"}, {"evolution": "gru"}, {"attention": "unit"}])
def test_cost_agrees_with_the_flop_counter(changes):
    config = replace(TINY, dim=16, hidden=16, max_history=30, unit_widths=(12,), head=HeadConfig(widths=(32, 16)))
    model = made(replace(config, **changes))
    batch = rich_batch([[1 + i % 12 for i in range(20)]], [[1 + i % 12 for i in range(40)]])
    with FlopCounterMode(display=False) as user:
        state = model.user_state(batch)
    with FlopCounterMode(display=False) as item:
        model.score_candidates(state, batch.candidates)
    shape = RequestShape(num_history=20, num_candidates=40)
    cost, cached = model.cost(shape), model.cost(shape, cached=True)
    assert cost.user_flops == pytest.approx(user.get_total_flops(), rel=0.2)
    assert 40 * cost.item_flops == pytest.approx(item.get_total_flops(), rel=0.2)
    assert cached.user_flops < cost.user_flops


@pytest.mark.parametrize(
    "wrong",
    [
        {"dim": 0},
        {"hidden": 16},
        {"auxiliary": -1},
        {"evolution": "lstm"},
        {"attention": "none"},
        {"unit_widths": (), "attention": "unit"},
        {"pairs_at_once": 0},
        {"id_dropout": 1.0},
        {"head": HeadConfig(pair_bins=-1)},
    ],
)
def test_settings_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(ConfigError, match="dien: .*" + next(iter(wrong))):
        DIENConfig(**wrong)


def test_an_empty_batch_of_pairs_is_fine():
    cell = GatedGRU(4, "augru")
    nothing = Jagged.from_lengths(torch.zeros(0), torch.zeros(3, dtype=torch.int64))
    out = cell(torch.zeros(0, 12), torch.zeros(0, dtype=torch.int64), torch.zeros(0), nothing)
    assert out.tolist() == [[0.0] * 4] * 3
