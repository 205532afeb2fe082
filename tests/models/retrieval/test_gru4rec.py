"""GRU4Rec: the network by hand, lanes and their resets, remembered states, sessions, and planted logs it must learn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax

from next_item_support import batch_of, learn, next_events, share_of_rule_found, view_of, walks
from shortlist.data.batches import Batch
from shortlist.embeddings.base import TableChoice
from shortlist.errors import ConfigError
from shortlist.layers.gru import LANE, SESSION_START
from shortlist.models.base import Remembering, RequestShape, load_weights
from shortlist.models.retrieval.gru4rec import GRU4Rec, GRU4RecConfig
from shortlist.training.session_parallel import SessionParallelSource
from support import planted_batch, planted_view

torch.set_num_threads(1)
HOUR = 3600
LOSSES = ("full_softmax", "sampled_softmax", "top1", "bpr", "top1_max", "bpr_max")
NINE = [[[i] for i in range(1, 10)]]


def make(view, seed: int = 0, **settings) -> GRU4Rec:
    torch.manual_seed(seed)
    table = TableChoice(init_std=0.3)
    model = GRU4Rec(
        GRU4RecConfig(**{"dim": 6, "max_history": 12, "dropout": 0.0, "table": table, **settings}), view.space
    )
    model.prepare(view)
    return model.eval()


def state_by_hand(model: GRU4Rec, items: list[int]) -> torch.Tensor:
    """The cell's equations, event by event, one layer."""
    gru, h = model.gru, torch.zeros(model.config.dim)
    for x in model.items(torch.tensor(items)):
        from_x = gru.weight_ih_l0 @ x + gru.bias_ih_l0
        from_h = gru.weight_hh_l0 @ h + gru.bias_hh_l0
        (x_r, x_z, x_c), (h_r, h_z, h_c) = from_x.chunk(3), from_h.chunk(3)
        r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        h = (1 - z) * torch.tanh(x_c + r * h_c) + z * h
    return h


def test_scores_are_the_equations():
    view = view_of(NINE, 9)
    model = make(view)
    with torch.no_grad():
        score = model.encode_user(batch_of(view, [[4, 2, 7]])) @ model.item_matrix().T
        expected = model.items.all() @ state_by_hand(model, [4, 2, 7]) + model.bias.start_N
    torch.testing.assert_close(score[0, 1:], expected[1:])


def test_full_softmax_is_the_formula_at_group_ends():
    view = view_of([[[1], [2], [3, 4]], [[5, 6], [7]]], 9)
    model = make(view, output_bias=False)
    items = model.items.all()[1:]
    log_p = [log_softmax(items @ state_by_hand(model, past), 0) for past in ([1], [1, 2], [5, 6])]
    by_hand = -(log_p[0][1] + (log_p[1][2] + log_p[1][3]) / 2 + log_p[2][6]) / 3
    torch.testing.assert_close(model.losses(next_events(view))["next"], by_hand)


def test_later_events_do_not_change_earlier_states():
    view = view_of(NINE, 9)
    model = make(view)
    one, other = ([[[1], [2], [3], [4]]], [[[1], [2], [9], [4]]])
    grads = []
    for rows in (one, other):
        batch = next_events(view_of(rows, 9))
        first = replace(batch.targets, weight=batch.targets.weight * torch.tensor([1.0, 0.0, 0.0]))
        grads.append(float(model.losses(replace(batch, targets=first))["next"].detach()))
    assert grads[0] == grads[1]


# --- session-parallel training ---


def test_lanes_go_on_where_they_stood_and_only_finished_ones_start_anew():
    """Rows of every step, against states run from each session's own start: a fault in either reset would show."""
    rng = np.random.default_rng(0)
    view = view_of([[[int(i)] for i in rng.integers(1, 10, rng.integers(2, 7))] for _ in range(12)], 9)
    model = make(view).train()
    source = SessionParallelSource(view, batch_size=3)
    past: dict[int, list[int]] = {}
    for batch in source.batches(0):
        lanes, opens = batch.context[LANE].tolist(), batch.context[SESSION_START].tolist()
        expected = []
        for lane, item, new in zip(lanes, batch.history.items.values.tolist(), opens):
            past[lane] = [item] if new else [*past[lane], item]
            expected.append(state_by_hand(model, past[lane]))
        model.losses(batch)
        torch.testing.assert_close(model.lanes_NBD[0, lanes], torch.stack(expected))


def test_a_step_sends_no_gradient_into_earlier_steps_and_ends_with_training():
    view = view_of([[[1], [2], [3]], [[4], [5], [6]]], 9)
    model = make(view).train()
    first, second = SessionParallelSource(view, batch_size=2).batches(0)
    model.losses(first)
    assert model.lanes_NBD.shape == (1, 2, 6)
    assert not model.lanes_NBD.requires_grad
    model.losses(second)["next"].backward()  # the first step's graph is not needed
    assert model.eval().lanes_NBD.shape == (1, 0, 6)


def test_resuming_inside_an_epoch_goes_on_with_the_lanes():
    view = view_of([[[1], [2], [3]], [[4], [5], [6]]], 9)
    first, second = SessionParallelSource(view, batch_size=2).batches(0)
    model = make(view).train()
    model.losses(first)
    fresh = make(view, seed=5).train()
    load_weights(fresh, {name: t.clone() for name, t in model.state_dict().items()})
    assert torch.equal(fresh.losses(second)["next"], model.losses(second)["next"])


@pytest.mark.parametrize("loss", LOSSES)
def test_both_feeds_train_every_loss(loss):
    view = view_of([[[1], [2], [3]], [[4], [5], [6, 7]]], 9)
    model = make(view, loss=loss, negatives="in_batch", num_negatives=4).train()
    for batch in (next_events(view), next(SessionParallelSource(view, batch_size=2).batches(0))):
        value = model.losses(batch)["next"]
        value.backward()
        assert value.isfinite()
    assert model.items.ids.weight().grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_without_supervision_or_history_costs_nothing(loss):
    view = view_of([[[1]], [[2]]], 9)
    model = make(view, loss=loss, num_negatives=3).train()
    value = model.losses(next_events(view))["next"]
    assert float(value.detach()) == 0
    value.backward()


# --- sessions in time ---


def hours(view, rows: list[list[tuple[float, int]]], at: float) -> Batch:
    """Requests with events (hour, item), asked at the given hour."""
    batch = batch_of(view, [[item for _, item in row] for row in rows])
    time = torch.tensor([int(hour * HOUR) for row in rows for hour, _ in row])
    return replace(batch, history=replace(batch.history, time=time), time=torch.full((len(rows),), int(at * HOUR)))


def test_only_the_open_session_is_read():
    view = view_of(NINE, 9)
    model = make(view, session_hours=2.0)
    rows = [[(0, 1), (1, 2), (9, 3), (10, 4)], [(9.5, 3), (10, 4)], [(1, 5)], []]
    users = model.encode_user(hours(view, rows, at=10.5))
    expected = model.encode_user(hours(view, [[(10, 3), (10, 4)], []], at=10.5))
    torch.testing.assert_close(users[0], expected[0])
    torch.testing.assert_close(users[1], expected[0])
    torch.testing.assert_close(users[2], expected[1])  # its session is over: as one without history
    torch.testing.assert_close(users[3], expected[1])


def test_training_on_sequences_stops_at_the_end_of_a_session():
    view = view_of([[[1], [2], [3], [4], [5]]], 9)
    model = make(view, session_hours=2.0, output_bias=False)
    batch = next_events(view)
    time = torch.tensor([0, 1, 9, 10]) * HOUR
    batch = replace(batch, history=replace(batch.history, time=time), time=torch.tensor([20 * HOUR]))
    items = model.items.all()[1:]
    log_p = [log_softmax(items @ state_by_hand(model, past), 0) for past in ([1], [3])]
    by_hand = -(log_p[0][1] + log_p[1][3]) / 2  # neither 2 -> 3 nor 4 -> 5
    torch.testing.assert_close(model.losses(batch)["next"], by_hand)


# --- what is remembered ---


@torch.no_grad()
def test_a_remembered_state_goes_on_exactly():
    view = view_of(NINE, 9)
    model = make(view, num_layers=2)
    assert isinstance(model, Remembering)
    before = batch_of(view, [[1, 2, 3], [], [4, 5], [6]])
    now = batch_of(view, [[1, 2, 3, 7, 8], [9], [4, 5], [6, 1]])
    state, memories = model.recall(before, [None] * 4)
    torch.testing.assert_close(state, model.encode_user(before))
    assert memories[1] is None
    again, kept = model.recall(now, memories)
    torch.testing.assert_close(again, model.encode_user(now))
    assert kept[0]["items"].tolist() == [1, 2, 3, 7, 8]


@torch.no_grad()
def test_a_memory_that_does_not_fit_is_passed_over():
    view = view_of(NINE, 9)
    model = make(view, max_history=4)
    _, memories = model.recall(batch_of(view, [[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3, 4]]), [None] * 4)
    # Another past, one event gone, all gone, and a window that slid.
    now = batch_of(view, [[1, 5, 3, 4], [1, 2], [], [1, 2, 3, 4, 5]])
    state, _ = model.recall(now, memories)
    torch.testing.assert_close(state, model.encode_user(now))


@torch.no_grad()
def test_only_new_events_are_run(monkeypatch):
    view = view_of(NINE, 9)
    model = make(view)
    _, memories = model.recall(batch_of(view, [[1, 2, 3]]), [None])
    read = []
    monkeypatch.setattr(model, "_read", lambda rows: read.append(rows.tolist()) or model.items(rows))
    model.recall(batch_of(view, [[1, 2, 3, 4]]), memories)
    assert read == [[4]]


@torch.no_grad()
def test_a_memory_is_of_one_user_alone():
    model = make(planted_view(), num_layers=1, id_dropout=0.0)
    batch = planted_batch()
    _, memories = model.recall(batch, [None] * batch.size)
    for memory in memories:
        assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in memory.values())


# --- the traps ---


def test_the_unknown_item_is_never_recommended():
    view = view_of(NINE, 12)
    model = make(view)
    learn(model, view, epochs=3)
    found = model.retrieve(batch_of(view, [[1, 2], [], [12]]), 20)
    assert ((found.rows > 0) == found.scores.isfinite()).all()
    assert (found.rows <= 12).all()
    assert found.rows[1].tolist() == found.rows[2].tolist()  # neither has a known event


def test_truncation_keeps_the_last_items():
    view = view_of(NINE, 9)
    model = make(view, max_history=4)
    long, short = (model.encode_user(batch_of(view, [row])) for row in ([1, 2, 3, 6, 7, 8, 9], [6, 7, 8, 9]))
    torch.testing.assert_close(long, short)


def test_gates_start_within_their_own_bounds():
    view = view_of(NINE, 9)
    model = make(view, dim=64)
    bound = (6 / 128) ** 0.5
    for gate in model.gru.weight_hh_l0.chunk(3):
        assert bound * 0.95 < gate.abs().max() <= bound
    assert not model.gru.bias_ih_l0.any()


# --- learning ---


@pytest.mark.parametrize(
    ("settings", "lanes"),
    [
        ({"loss": "full_softmax"}, False),
        ({"loss": "full_softmax", "inputs": "separate", "num_layers": 2}, False),
        ({"loss": "sampled_softmax"}, True),
        ({"loss": "bpr_max", "elu": 1.0}, True),
        ({"loss": "top1_max"}, True),
        ({"loss": "bpr"}, True),
        ({"loss": "top1"}, True),
    ],
    ids=lambda s: "-".join(str(v) for v in s.values()) if isinstance(s, dict) else ("lanes" if s else "sequences"),
)
def test_recovers_planted_transitions(settings, lanes):
    view, next_of = walks()
    model = make(view, dim=16, negatives="in_batch", num_negatives=10, popularity_alpha=0.0, **settings)
    if not lanes:
        learn(model, view, epochs=25)
    else:
        torch.manual_seed(0)
        optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
        source = SessionParallelSource(view, batch_size=32)
        model.train()
        for epoch in range(6):
            for batch in source.batches(epoch):
                optimiser.zero_grad()
                model.losses(batch)["next"].backward()
                optimiser.step()
        model.eval()
    assert share_of_rule_found(model, view, next_of) >= 0.85  # chance is 1 in 30


# --- settings and cost ---


def test_cost_is_per_event_and_nothing_when_remembered():
    view = view_of(NINE, 9)
    model = make(view, num_layers=2)
    shape = RequestShape(num_history=3, num_items=9)
    assert model.cost(shape).user_flops == 3 * 2 * 12 * 6 * 6
    assert model.cost(shape).item_flops == 2 * (6 + 2)
    assert model.cost(shape, cached=True).user_flops == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"dropout": 1.0}, "dropout must be from 0"),
        ({"normalise": True}, "output_bias = false"),
        ({"session_hours": 0.0}, "session_hours must be above 0"),
        ({"table": TableChoice(sparse=True)}, "full softmax touches every row"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        GRU4RecConfig(**settings)


def test_sessions_need_a_clock():
    view = view_of(NINE, 9)
    with pytest.raises(ConfigError, match="session_hours needs times"):
        GRU4Rec(GRU4RecConfig(session_hours=1.0), replace(view.space, has_clock=False))
