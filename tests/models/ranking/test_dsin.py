"""DSIN: visits cut by hand and by a loop, each step against PyTorch's own modules, planted visits, costs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ranking_support import batch_of, groups_batch, groups_space, rich_batch, rich_space, share_right, space_of, train
from shortlist.embeddings.base import TableChoice
from shortlist.errors import ConfigError
from shortlist.layers.scoring import HeadConfig
from shortlist.models.base import RequestShape
from shortlist.models.ranking.dsin import DSIN, DSINConfig, cut_sessions

HEAD = HeadConfig(widths=(16,), dropout=0.0)
TINY = DSINConfig(dim=8, ffn_width=6, num_sessions=3, session_length=2, dropout=0.0, id_dropout=0.0, head=HEAD)
PAST = [[1, 2, 3, 4, 5, 6], [], [5, 5], [6]]
MINUTES = [[0, 10, 20, 100, 101, 300], [], [0, 30], [7]]
OFFERED = [[1, 7, 9], [2, 11], [], [3, 12, 8, 4]]


def made(config: DSINConfig = TINY, space=None, *, loud: bool = True) -> DSIN:
    torch.manual_seed(0)
    model = DSIN(config, space or rich_space()).eval()
    if loud:
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(std=0.5)
    return model


def at(batch, minutes):
    """The batch with events at the given minutes, the request one minute after the last."""
    time = torch.tensor([60 * m for row in minutes for m in row], dtype=torch.int64)
    ends = torch.tensor([60 * (row[-1] if row else 0) + 60 for row in minutes])
    return replace(batch, history=replace(batch.history, time=time), time=ends)


def visits_of(sessions):
    return [part.tolist() for part in sessions.events.values.split(sessions.events.lengths.tolist())]


def test_visits_by_hand():
    """10 20 | 100 101 | 300: three visits, of the first only the newest two events; a pause of just 30 minutes ends none."""
    history = at(batch_of(PAST, OFFERED), MINUTES).history
    sessions = cut_sessions(history, gap_seconds=1800, num_sessions=3, session_length=2)
    assert visits_of(sessions) == [[2, 3], [4, 5], [6], [5, 5], [6]]
    assert sessions.visits.lengths.tolist() == [3, 0, 1, 1]
    assert sessions.visits.values.tolist() == [2, 1, 0, 0, 0]
    assert sessions.is_read_E.tolist() == [False, *[True] * 8]
    two = cut_sessions(history, gap_seconds=1800, num_sessions=2, session_length=9)
    assert visits_of(two) == [[4, 5], [6], [5, 5], [6]]
    blocks = cut_sessions(history, gap_seconds=None, num_sessions=2, session_length=4)
    assert visits_of(blocks) == [[1, 2], [3, 4, 5, 6], [5, 5], [6]]  # counted from the newest event back
    nothing = cut_sessions(batch_of([[], []], [[1], [1]]).history, gap_seconds=1800, num_sessions=2, session_length=4)
    assert nothing.visits.lengths.tolist() == [0, 0]


def test_visits_against_a_loop():
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 30, 40)
    minutes = [np.cumsum(rng.choice([5, 29, 31, 200], n)).tolist() for n in lengths]
    past = [rng.integers(1, 100, n).tolist() for n in lengths]
    sessions = cut_sessions(
        at(batch_of(past, [[1]] * 40), minutes).history, gap_seconds=1800, num_sessions=4, session_length=3
    )
    expected = []
    for items, times in zip(past, minutes):
        visits = []
        for i, (item, time) in enumerate(zip(items, times)):
            if i == 0 or time - times[i - 1] > 30:
                visits.append([])
            visits[-1].append(item)
        expected += [visit[-3:] for visit in visits[-4:]]
    assert visits_of(sessions) == expected


@torch.no_grad()
def test_interests_against_pytorch_s_encoder_layer_visit_by_visit():
    """Its post-norm layer with the same weights, fed one visit at a time: no padding, no mask."""
    model, batch = made(), at(rich_batch(PAST, OFFERED), MINUTES)
    D = 8
    layer = nn.TransformerEncoderLayer(D, 2, TINY.ffn_width, dropout=0.0, batch_first=True).eval()
    layer.self_attn.in_proj_weight.copy_(model.query_key_value.weight)
    layer.self_attn.in_proj_bias.zero_()
    layer.self_attn.out_proj.weight.copy_(model.out.weight)
    layer.self_attn.out_proj.bias.zero_()
    for theirs, ours in ((layer.linear1, model.ffn[0]), (layer.linear2, model.ffn[2])):
        theirs.load_state_dict(ours.state_dict())
    layer.norm1.load_state_dict(model.norm_attention.state_dict())
    layer.norm2.load_state_dict(model.norm_ffn.state_dict())
    interests = []
    for items, back in (([2, 3], 2), ([4, 5], 1), ([6], 0), ([5, 5], 0), ([6], 0)):
        x = model.items(torch.tensor(items))
        bias = model.visit_bias[back] + model.place_bias[: len(items), None] + model.unit_bias
        interests.append(layer((x + bias)[None])[0].mean(0))
    state = model.user_state(batch)
    torch.testing.assert_close(state.interest_SD, torch.stack(interests), rtol=1e-4, atol=1e-5)
    for a, b in ((0, 3), (3, 4), (4, 5)):
        both = model.moving(torch.stack(interests)[a:b, None])[0][:, 0]
        torch.testing.assert_close(state.moving_SD[a:b], both[:, :D] + both[:, D:], rtol=1e-4, atol=1e-5)
    assert state.offsets.tolist() == [0, 3, 3, 4, 5]


@torch.no_grad()
def test_fast_activation_agrees_with_the_plain_one():
    model, batch = made(), at(rich_batch(PAST, OFFERED), MINUTES)
    state, rows = model.user_state(batch), batch.candidate_rows
    items = rows.with_values(model.items(rows.values))
    for fast, plain in zip(model.activated(state, items), model.plain_activated(state, items)):
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)
        assert (fast[:3].abs().sum(1) > 0).all()
        assert (fast[3:5] == 0).all()  # no visit: nothing, not NaN


@torch.no_grad()
def test_a_score_depends_on_nothing_else_in_the_batch():
    model = made()
    together = model.score(at(rich_batch(PAST, OFFERED), MINUTES))["target"]
    swapped = model.score(at(rich_batch(PAST, [[9, 7, 1], [4], [2, 3], [3, 12]]), MINUTES))["target"]
    torch.testing.assert_close(swapped[[2, 1, 0]], together[:3])
    torch.testing.assert_close(swapped[-2:], together[5:7])
    longer = [MINUTES[0], [0, 1, 2, 3, 4, 100, 200, 300, 400]]
    beside = model.score(at(rich_batch([PAST[0], [7] * 9], OFFERED[:2]), longer))["target"]
    torch.testing.assert_close(beside[:3], together[:3])


@torch.no_grad()
def test_empty_histories_and_candidates():
    model = made()
    assert torch.isfinite(model.score(rich_batch([[], []], OFFERED[:2]))["target"]).all()
    assert model.score(rich_batch(PAST[:2], [[], []]))["target"].shape == (0,)


def test_training_bears_histories_that_are_all_empty():
    model = made(loud=False).train()
    model.losses(rich_batch([[], []], [[1, 2], [3]], target=[1.0, 0, 0]))["target"].backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_without_a_clock_blocks_must_be_asked_for():
    space = rich_space(has_clock=False)
    with pytest.raises(ConfigError, match="count"):
        made(TINY, space)
    model = made(replace(TINY, session_by="count"), space)
    batch = rich_batch(PAST, OFFERED)
    assert visits_of(model.sessions(batch.history))[:3] == [[1, 2], [3, 4], [5, 6]]


def in_one_visit(size: int, draw: torch.Generator):
    """Two offered items were both seen before, one in the newest visit, one in the visit before it; the newest visit's is chosen.

    How many events a visit has is random, so that places in the history do not tell where it begins.
    """
    past = torch.rand(size, 40, generator=draw).argsort(1)[:, :8] + 1
    cut = torch.randint(2, 7, (size, 1), generator=draw)
    place = torch.arange(8)
    minute = torch.where(place < cut, place, place + 600)
    older = past.gather(1, (torch.rand(size, 1, generator=draw) * cut).long())
    newer = past.gather(1, cut + (torch.rand(size, 1, generator=draw) * (8 - cut)).long())
    turn = torch.rand(size, 1, generator=draw) < 0.5
    offered = torch.where(turn, torch.cat([older, newer], 1), torch.cat([newer, older], 1))
    label = torch.cat([~turn, turn], 1).float()
    return at(batch_of(past.tolist(), offered.tolist(), labels={"target": label.flatten()}), minute.tolist())


def test_learns_what_the_newest_visit_is():
    head = HeadConfig(widths=(32,), dropout=0.0, activation="relu")
    config = DSINConfig(dim=16, num_sessions=2, session_length=8, dropout=0.0, id_dropout=0.0, head=head)
    model = made(config, space_of(40), loud=False)
    train(model, in_one_visit, steps=250)
    test = in_one_visit(400, torch.Generator().manual_seed(9))
    assert share_right(model, test) > 0.85
    blind = at(test, [[0] * 8] * 400)  # the same requests without their pauses
    assert share_right(model, blind) < 0.65


def test_finds_which_group_is_in_the_past():
    """Eight visits of one event each: what pooling can not see (a DNN stays below .75, tests of DIN)."""
    head, table = HeadConfig(widths=(32,), dropout=0.0, activation="relu"), TableChoice(init_std=0.2)
    config = DSINConfig(dim=16, num_sessions=8, session_length=2, dropout=0.0, id_dropout=0.0, head=head, table=table)
    model = made(config, groups_space(), loud=False)
    train(model, groups_batch, steps=200)
    assert share_right(model, groups_batch(300, torch.Generator().manual_seed(99))) > 0.85


@torch.no_grad()
def test_cost_agrees_with_the_flop_counter():
    config = DSINConfig(dim=16, ffn_width=48, session_by="count", num_sessions=4, session_length=5, head=HeadConfig())
    model = made(config)
    batch = rich_batch([[1 + i % 12 for i in range(20)]], [[1 + i % 12 for i in range(40)]])
    with FlopCounterMode(display=False) as user:
        state = model.user_state(batch)
    with FlopCounterMode(display=False) as item:
        model.score_candidates(state, batch.candidates)
    cost = model.cost(RequestShape(num_history=20, num_candidates=40))
    # What the counter does not see: scores and mix of fused attention, and the LSTM's kernel (four gates, two maps, both ways).
    unseen = 4 * (5 * 5 * 2 * 2 * 16) + 4 * (2 * 4 * 2 * 2 * 16 * 16)
    assert cost.user_flops == pytest.approx(user.get_total_flops() + unseen, rel=0.1)
    assert 40 * cost.item_flops == pytest.approx(item.get_total_flops(), rel=0.2)
    assert model.cost(RequestShape(), cached=True).user_flops == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"dim": 0},
        {"num_heads": 3},
        {"session_by": "day"},
        {"gap_minutes": 0},
        {"dropout": 1.0},
        {"head": HeadConfig(dropout=1.0)},
    ],
)
def test_settings_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(ConfigError, match="dsin: .*" + next(iter(wrong))):
        DSINConfig(**wrong)
