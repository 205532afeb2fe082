"""HSTU: against a dense right-padded reference, the traps of its digest, and planted logs it must learn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, silu

from sequence_support import batch_of, learn, view_of
from shortlist.data.batches import Batch, next_event_batch
from shortlist.data.histories import View
from shortlist.data.jagged import Jagged
from shortlist.embeddings.base import TableChoice
from shortlist.errors import ConfigError
from shortlist.kernels.hstu_attention import time_bucket
from shortlist.layers.hstu import HSTUBlockConfig
from shortlist.models.base import Remembering, RequestShape
from shortlist.models.retrieval.hstu import (
    HSTU,
    Events,
    HSTUConfig,
    kept_targets,
    newest,
    next_times,
    stochastic_length,
)
from shortlist.training.config import TrainerConfig
from shortlist.training.optimisers import RowwiseAdam, build_optimisers
from support import planted_view, training_batch

ITEMS = view_of([[[i] for i in range(1, 10)]], 9)
"""One user who bought items 1..9, so that all of them are known."""


RECIPE = {"loss": "sampled_softmax", "num_negatives": 128, "normalise": True, "temperature": 0.05}
"""The objective of the public code."""


def make(view: View, seed: int = 0, *, layers: dict | None = None, **settings) -> HSTU:
    """A small model under the public code's objective."""
    torch.manual_seed(seed)
    settings = {**RECIPE, **settings}
    blocks = HSTUBlockConfig(**{"block_dropout": 0.0, **(layers or {})})
    model = HSTU(HSTUConfig(**{"dim": 8, "max_history": 12, "dropout": 0.0, "layers": blocks, **settings}), view.space)
    model.prepare(view)
    return model.eval()


def loud(model: HSTU) -> HSTU:
    """The same with normal weights of 0.3, so that attention and its biases matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def timed(batch: Batch, times: list[int], request: list[int]) -> Batch:
    """The batch with other times."""
    return replace(batch, time=torch.tensor(request), history=replace(batch.history, time=torch.tensor(times)))


# --- against a dense reference ---


def dense(model: HSTU, rows_BL: Tensor, time_BL: Tensor, request_B: Tensor) -> Tensor:
    """[B, L, D] for right-padded rows (0 = padding), as the authors' public code and their ranking example compute it."""
    config, layers = model.config, model.config.layers
    D, H, L = config.dim, layers.num_heads, rows_BL.shape[1]
    is_real = rows_BL > 0
    lengths = is_real.sum(1)
    asked_BL = torch.cat([time_BL[:, 1:], torch.zeros(len(time_BL), 1, dtype=torch.int64)], 1)
    asked_BL[torch.arange(len(lengths)), lengths - 1] = request_B
    x = (model.items(rows_BL) * D**0.5 + model.places.weight[:L]) * is_real[:, :, None]
    apart = torch.arange(L) - torch.arange(L)[:, None] + config.max_history - 1
    bucket = time_bucket(asked_BL[:, :, None] - time_BL[:, None], layers.num_time_buckets)
    mask = torch.ones(L, L).tril()
    for block in model.stack.blocks:
        is_production = layers.variant == "production"
        affine = (block.norm_in.weight, block.norm_in.bias) if is_production else (None, None)
        mixed = linear(layer_norm(x, (D,), *affine, eps=1e-6), block.project.weight, block.project.bias)
        u, v, q, k = mixed.split(D, dim=-1)
        if is_production:
            u, scale = silu(u), (D // H) ** -0.5
        else:
            (u, v, q, k), scale = (silu(z) for z in (u, v, q, k)), 1.0
        v_h, q_h, k_h = (z.unflatten(-1, (H, D // H)) for z in (v, q, k))
        rab = block.position_bias[apart] + block.time_bias[bucket]
        weight = silu(torch.einsum("bihd,bjhd->bhij", q_h, k_h) * scale + rab[:, None]) / config.max_history * mask
        av = torch.einsum("bhij,bjhd->bihd", weight, v_h).flatten(2)
        affine = (block.norm_out.weight, block.norm_out.bias) if is_production else (None, None)
        gated = u * layer_norm(av, (D,), *affine, eps=1e-6)
        gated = torch.cat([u, av, gated], -1) if is_production else gated
        x = (x + linear(gated, block.out.weight, block.out.bias)) * is_real[:, :, None]
    return x


@pytest.mark.parametrize("variant", ["research", "production"])
@pytest.mark.parametrize("extra_padding", [0, 3])
def test_agrees_with_a_dense_right_padded_model(variant, extra_padding):
    model = loud(make(ITEMS, layers={"num_heads": 2, "variant": variant}))
    lists = [[1, 2, 3, 4, 5, 6, 7], [9], [4, 4, 2]]
    times = [100, 130, 130, 90_000, 90_001, 90_400, 1_000_000, 5, 7, 700, 70_000]
    batch = timed(batch_of(ITEMS, lists), times, [1_000_500, 5, 80_000])
    events = model._events(batch)
    ours = model._query(events, model.items(events.rows.values))
    rows, mask = events.rows.padded(7 + extra_padding)
    time_BL, _ = events.rows.with_values(events.time_T).padded(7 + extra_padding)
    theirs = dense(model, rows, time_BL, batch.time)
    torch.testing.assert_close(ours, theirs[mask], rtol=1e-4, atol=1e-5)


def test_untrained_norms_of_the_research_variant_have_no_weights_and_its_map_no_bias():
    model = make(ITEMS)
    names = {name.split(".", 3)[-1] for name, _ in model.stack.named_parameters()}
    assert not any("norm" in name or name.endswith("project.bias") for name in names)
    assert model.stack.blocks[0].time_bias.shape == (129,)
    assert model.stack.blocks[0].position_bias.shape == (2 * 12 - 1,)


# --- time: what is asked, and what may be known ---


def test_each_event_asks_about_the_time_of_the_next_one_and_the_last_about_the_request():
    rows = Jagged.from_rows([[1, 2, 3], [], [4]])
    asked = next_times(torch.tensor([10, 20, 30, 5]), torch.tensor([99, 88, 77]), rows)
    assert asked.tolist() == [20, 30, 99, 77]


def test_training_asks_about_the_time_of_the_target_and_of_nothing_later():
    view = view_of([[[1], [2], [3, 4], [5]]], 9)
    view = replace(view, histories=replace(view.histories, time=np.array([10, 20, 30, 30, 45])))
    model = make(view)
    batch = next_event_batch(view.histories, view.users, np.array([1]), max_history=12)
    events = model._events(batch)
    assert events.time_T.tolist() == [10, 20, 30, 30]
    assert events.query_time_T.tolist() == [20, 30, 30, 45]
    assert make(view, query_time="own")._events(batch).query_time_T.tolist() == [10, 20, 30, 30]


def outputs(model: HSTU, items: list[int], times: list[int], request: int) -> Tensor:
    events = model._events(timed(batch_of(ITEMS, [items]), times, [request]))
    return model._query(events, model.items(events.rows.values))


@pytest.mark.parametrize("attention", ["pointwise", "softmax"])
def test_later_events_do_not_change_earlier_outputs(attention):
    """Output i reads events up to i and the time of event i + 1, which training knows as serving knows the request's; no more."""
    model = loud(make(ITEMS, layers={"attention": attention}))
    out = outputs(model, [1, 2, 3, 4, 5], [0, 50, 100, 150, 200], 250)
    other = outputs(model, [1, 2, 3, 8, 9], [0, 50, 100, 150, 90_000], 100_000)
    assert torch.equal(out[:3], other[:3])
    assert not torch.isclose(out[3:], other[3:]).all(1).any()
    sooner = outputs(model, [1, 2, 3, 4, 5], [0, 50, 100, 90_000, 100_000], 110_000)
    assert torch.equal(out[:2], sooner[:2])
    assert not torch.isclose(out[2], sooner[2]).all()


def test_the_request_s_time_matters_only_where_it_is_asked():
    late, soon = ([1, 2, 3], [0, 50, 100], 900_000), ([1, 2, 3], [0, 50, 100], 160)
    model = loud(make(ITEMS))
    assert not torch.isclose(outputs(model, *late)[-1], outputs(model, *soon)[-1]).all()
    for settings in ({"query_time": "own"}, {"layers": {"time_bias": False}}):
        model = loud(make(ITEMS, **settings))
        assert torch.equal(outputs(model, *late), outputs(model, *soon))


def test_without_a_clock_there_is_no_time_bias():
    view = replace(ITEMS, space=replace(ITEMS.space, has_clock=False))
    model = loud(make(view))
    assert all(block.time_bias is None for block in model.stack.blocks)
    assert torch.equal(outputs(model, [1, 2], [0, 10], 20), outputs(model, [1, 2], [0, 9_000], 10**9))


# --- what else is read ---


def test_an_unknown_event_among_known_ones_does_not_matter():
    view = view_of([[[i] for i in range(1, 10)]], 12)
    model = loud(make(view, layers={"time_bias": False}))
    users = model.encode_user(batch_of(view, [[1, 2, 3], [1, 11, 2, 0, 3, 12]]))
    torch.testing.assert_close(users[0], users[1])


def test_the_newest_events_are_read_and_counted_from_the_oldest_of_them():
    model = loud(make(ITEMS, max_history=4))
    long = batch_of(ITEMS, [[1, 2, 3, 6, 7, 8, 9]])
    short = timed(batch_of(ITEMS, [[6, 7, 8, 9]]), long.history.time[3:].tolist(), [int(long.time)])
    torch.testing.assert_close(model.encode_user(long), model.encode_user(short))
    kept = newest(Jagged.from_rows([[1, 2, 3, 4], [], [5]]), torch.tensor([True, True, False, True, True]), 2)
    assert kept.tolist() == [False, True, False, True, True]


def test_actions_are_read_where_there_are_several():
    view = replace(ITEMS, space=replace(ITEMS.space, actions=("view", "buy")))
    batch = batch_of(view, [[1, 2, 3]])
    other = replace(batch, history=replace(batch.history, action=torch.tensor([2, 1, 1])))
    model = loud(make(view))
    assert not torch.allclose(model.encode_user(batch), model.encode_user(other))
    assert make(view, use_actions=False).actions is None
    assert make(ITEMS).actions is None


@pytest.mark.parametrize("normalise", [True, False])
def test_scores_serve_as_they_train(normalise):
    """With the public objective the served score is the cosine over 0.05; without, an inner product of the normed query."""
    settings = {} if normalise else {"normalise": False, "temperature": 1.0, "loss": "full_softmax"}
    model = loud(make(ITEMS, **settings))
    batch = batch_of(ITEMS, [[1, 2, 3]])
    score = model.encode_user(batch) @ model.item_matrix().T
    query = outputs(model, [1, 2, 3], batch.history.time.tolist(), int(batch.time))[-1]
    items = model.items.all()
    expected = torch.cosine_similarity(query[None], items, dim=1) / 0.05 if normalise else items @ query
    torch.testing.assert_close(score[0], expected, rtol=1e-4, atol=1e-4)


# --- memories ---


@pytest.mark.parametrize(
    "layers", [{"num_heads": 2}, {"variant": "production", "num_heads": 2}, {"attention": "softmax"}]
)
def test_a_remembered_user_goes_on_exactly(layers):
    model = loud(make(ITEMS, layers=layers))
    assert isinstance(model, Remembering)
    with torch.no_grad():
        first = timed(batch_of(ITEMS, [[1, 2, 3], [], [4, 5], [6]]), [0, 60, 90, 5, 9_000, 7], [99, 5, 90_000, 8])
        user, memories = model.recall(first, [None] * 4)
        torch.testing.assert_close(user, model.encode_user(first))
        assert [m is None for m in memories] == [False, True, False, True]  # of one event nothing outlives its request
        now = timed(
            batch_of(ITEMS, [[1, 2, 3, 7, 8], [9], [4, 5], [6, 1]]),
            [0, 60, 90, 4_000, 4_100, 3, 5, 9_000, 7, 70_000],
            [5_000, 5, 100_000, 80_000],
        )
        again, kept = model.recall(now, memories)
        torch.testing.assert_close(again, model.encode_user(now), rtol=1e-4, atol=1e-5)
        assert kept[0]["marks"][:, 0].tolist() == [1, 2, 3, 7]


def test_a_memory_that_does_not_fit_is_passed_over():
    model = loud(make(ITEMS, max_history=4))
    with torch.no_grad():
        _, memories = model.recall(batch_of(ITEMS, [[1, 2, 3]] * 3 + [[1, 2, 3, 4]]), [None] * 4)
        # Another past, all gone, less than was remembered, and a window that slid.
        now = batch_of(ITEMS, [[1, 5, 3, 4], [], [1, 2], [1, 2, 3, 4, 5]])
        user, _ = model.recall(now, memories)
        torch.testing.assert_close(user, model.encode_user(now))


def test_only_the_last_known_and_new_events_pass_the_layers(monkeypatch):
    model = make(ITEMS)
    times = [0, 10, 20, 30]
    _, memories = model.recall(timed(batch_of(ITEMS, [[1, 2, 3]]), times[:3], [30]), [None])
    read = []
    monkeypatch.setattr(
        model, "_input", lambda events, x: read.append(events.rows.values.tolist()) or HSTU._input(model, events, x)
    )
    model.recall(timed(batch_of(ITEMS, [[1, 2, 3, 4]]), times, [99]), memories)
    assert read == [[3, 4]]


# --- Stochastic Length ---


def events_of(lengths: list[int], times: list[int] | None = None) -> Events:
    rows = Jagged.from_rows([list(range(1, n + 1)) for n in lengths])
    time_T = torch.arange(len(rows.values)) * 10 if times is None else torch.tensor(times)
    return Events(rows, torch.ones_like(rows.values), time_T, time_T + 10, rows.position_of_value)


def test_stochastic_length_keeps_all_or_so_many_as_the_formula_says():
    """N = 64 and alpha = 1.5: 64 ^ 0.75 = 22.6, so 22 of a long history, and all of it with chance 64 ^ 1.5 / n ^ 2."""
    torch.manual_seed(0)
    repeats = 2_000
    for n, chance in ((22, 1.0), (40, 512 / 1_600), (64, 512 / 4_096)):
        events = events_of([n] * repeats)
        keep = stochastic_length(events, 1.5, 64, has_clock=True).view(repeats, n).sum(1)
        assert set(keep.tolist()) == ({n} if n == 22 else {22, n})
        assert abs(float((keep == n).float().mean()) - chance) < 0.03


def test_stochastic_length_prefers_recent_events_by_the_paper_s_weights():
    """Three of an event's places are drawn one by one; ages 30, 10, 0 weigh 1/4, 3/4, 1, so the first draw is 1 : 3 : 4."""
    torch.manual_seed(0)
    events = events_of([3] * 20_000, [0, 20, 30] * 20_000)
    kept = stochastic_length(events, 1.001, 2, has_clock=True).view(-1, 3)  # 2 ^ 0.5005: one event
    kept = kept[kept.sum(1) == 1].float().mean(0)
    torch.testing.assert_close(kept, torch.tensor([1, 3, 4]) / 8, atol=0.015, rtol=0.0)


def test_thinned_histories_keep_places_times_and_targets():
    view = view_of([[[i] for i in range(1, 7)]], 9)
    batch = next_event_batch(view.histories, view.users, np.array([1]), max_history=12)
    keep = torch.tensor([True, False, True, True, False])
    events = make(view)._events(batch)
    thinned, targets = events.only(keep), kept_targets(batch.targets, keep)
    assert thinned.rows.values.tolist() == [1, 3, 4]
    assert thinned.place_T.tolist() == [0, 2, 3]
    assert thinned.query_time_T.tolist() == events.query_time_T[keep].tolist()
    assert targets.position.tolist() == [0, 1, 2]
    assert targets.items.values.tolist() == [2, 4, 5]


def test_stochastic_length_acts_in_training_alone():
    view = view_of([[[1 + (u + t) % 9] for t in range(11)] for u in range(20)], 9)
    batch = next_event_batch(view.histories, view.users, np.arange(1, 21), max_history=12)
    plain, thinned = (make(view, stochastic_length=a, num_negatives=9) for a in (None, 1.5))
    torch.testing.assert_close(plain.losses(batch), thinned.losses(batch))
    plain.train()
    thinned.train()
    assert not torch.isclose(plain.losses(batch)["next"], thinned.losses(batch)["next"])
    thinned.losses(batch)["next"].backward()
    assert thinned.places.weight.grad[11 - 2].abs().sum() > 0  # late places are trained too


# --- learning ---


def walks(rule, num_items: int = 24, num_users: int = 300, length: int = 8, seed: int = 0) -> View:
    """Users whose next item and gap, in seconds, follow `rule(rng, item)`."""
    rng = np.random.default_rng(seed)
    rows, times = [], []
    for _ in range(num_users):
        at, now = int(rng.integers(1, num_items + 1)), 0
        row = []
        for _ in range(length):
            row.append([at])
            times.append(now)
            at, gap = rule(rng, at)
            now += gap
        rows.append(row)
    view = view_of(rows, num_items)
    return replace(view, histories=replace(view.histories, time=np.array(times)))


def next_in_circle(rng, at):
    return (at % 24 + 1 if rng.random() < 0.9 else int(rng.integers(1, 25))), 100


def by_gap(rng, at):
    """Soon: the next item of the circle; days later: the one six further."""
    soon = rng.random() < 0.5
    return (at % 24 + 1, 60) if soon else ((at + 5) % 24 + 1, 300_000)


FAST = {"dim": 16, "num_negatives": 12, "table": TableChoice(init_std=0.1)}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"layers": {"attention": "softmax"}},
        {"layers": {"variant": "production", "position_bias": False, "time_bias": False, "num_heads": 2}},
        {"loss": "full_softmax", "normalise": False, "temperature": 1.0},
        {"stochastic_length": 1.5, "max_history": 7},
    ],
    ids=["recipe", "softmax", "production", "full-softmax", "stochastic-length"],
)
def test_recovers_planted_transitions(settings):
    view = walks(next_in_circle)
    layers = {"num_blocks": 1, **settings.pop("layers", {})} if "layers" in settings else {"num_blocks": 1}
    model = learn(make(view, layers=layers, **{**FAST, **settings}), view, epochs=15)
    with torch.no_grad():
        top = model.retrieve(batch_of(view, [[i] for i in range(1, 25)]), 1).rows[:, 0]
    assert (top == torch.arange(1, 25) % 24 + 1).float().mean() >= 0.9  # a popularity list is right once in 24


def test_learns_what_depends_on_when_the_user_comes_back():
    """Only the request's time tells the two apart; asking by the event's own time can be right half the time.

    Histories have five events: of a single one the norm after the sum hides how much time lets through.
    """
    view, fresh = walks(by_gap), walks(by_gap, num_users=100, seed=1)
    item_U8, time_U8 = (torch.from_numpy(x).view(100, 8) for x in (fresh.histories.item, fresh.histories.time))
    share = {}
    for query_time in ("next", "own"):
        model = learn(make(view, layers={"num_blocks": 1}, query_time=query_time, **FAST), view, epochs=25)
        batch = timed(
            batch_of(view, item_U8[:, :5].tolist()), time_U8[:, :5].flatten().tolist(), time_U8[:, 5].tolist()
        )
        with torch.no_grad():
            share[query_time] = float((model.retrieve(batch, 1).rows[:, 0] == item_U8[:, 5]).float().mean())
    assert share["next"] >= 0.85, share
    assert share["own"] <= 0.65, share


def test_row_wise_adam_moves_the_rows_of_the_batch_alone():
    view = view_of([[[1], [2], [3]]] * 4 + [[[7], [8], [9]]], 9)
    model = make(view, num_negatives=1, table=TableChoice(sparse=True)).train()
    table = model.items.ids.weight()
    before = table.detach().clone()
    optimisers = build_optimisers(model, TrainerConfig())
    batch = next_event_batch(view.histories, view.users, np.array([1]), max_history=12)
    torch.manual_seed(0)
    model.losses(batch)["next"].backward()
    for optimiser in optimisers:
        optimiser.step()
    rowwise = next(o for o in optimisers if isinstance(o, RowwiseAdam))
    assert rowwise.state[table]["square"].shape == (10,)  # one second moment per row
    moved = (table != before).any(1).nonzero()[:, 0].tolist()
    assert {1, 2, 3} <= set(moved)
    assert len(moved) <= 4  # and one negative at most


def test_same_seed_same_weights():
    view = walks(next_in_circle, num_users=60)
    settings = {"stochastic_length": 1.5, "dropout": 0.3, "max_history": 7}
    states = [learn(make(view, seed=s, **settings), view, epochs=2, seed=s).state_dict() for s in (5, 5, 6)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_bf16_training_learns_too():
    view = walks(next_in_circle)
    model = learn(make(view, layers={"num_blocks": 1}, **FAST), view, epochs=15, bf16=True)
    batch = batch_of(view, [[i] for i in range(1, 25)])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model.encode_user(batch).dtype == torch.float32
        top = model.retrieve(batch, 1).rows[:, 0]
    assert (top == torch.arange(1, 25) % 24 + 1).float().mean() >= 0.9


# --- edges, settings and cost ---


def test_a_batch_without_supervision_or_history_costs_nothing():
    view = view_of([[[1]], [[2]]], 9)
    model = make(view, stochastic_length=1.5).train()
    value = model.losses(next_event_batch(view.histories, view.users, np.array([1, 2]), max_history=12))["next"]
    assert float(value.detach()) == 0
    value.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_someone_without_known_history_gets_the_popular_items():
    view = view_of([[[1], [2]], [[2], [3]], [[2], [3]], [[2], [4], [3]]], 6)
    ranking = make(view).retrieve(batch_of(view, [[], [6]]), 2).rows
    assert ranking.tolist() == [[2, 3], [2, 3]]


def test_cost_counts_maps_and_pairs():
    cost = make(ITEMS, layers={"qk_dim": 3, "v_dim": 5, "num_heads": 2}).cost(RequestShape(num_history=3, num_items=9))
    D, L, H, d, e = 8, 3, 2, 3, 5
    maps, out, pair = 2 * D * (2 * H * e + 2 * H * d), 2 * H * e * D, 2 * H * (d + e)
    first = L * (maps + out) + 6 * pair  # 1 + 2 + 3 pairs, scored and summed
    last = L * maps + out + 3 * pair  # only the newest event asks
    assert cost.user_flops == first + last
    assert cost.item_flops == 2 * (D + 1)
    long, longer = (make(ITEMS).cost(RequestShape(num_history=n)).user_flops for n in (12, 500))
    assert long == longer


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dim": 10, "layers": HSTUBlockConfig(num_heads=4)}, "num_heads must divide dim"),
        ({"max_history": 0}, "max_history must be at least 1"),
        ({"dropout": 1.0}, "dropout must be from 0"),
        ({"stochastic_length": 1.0}, "stochastic_length must be above 1"),
        ({"temperature": 0.0}, "temperature"),
        ({"table": TableChoice(sparse=True)}, "sampled loss or sparse = false"),
    ],
)
def test_bad_settings_say_what_to_do(settings, words):
    with pytest.raises(ConfigError, match=words):
        HSTUConfig(**settings)


def test_a_batch_without_targets_is_refused():
    with pytest.raises(ValueError, match="next-event"):
        make(ITEMS).losses(batch_of(ITEMS, [[1, 2]]))


def test_item_fields_are_read_only_when_wanted():
    view = planted_view()
    assert make(view).items.num_fields == 3
    assert make(view, use_fields=False).items.num_fields == 0
    assert make(view).losses(training_batch("next_event", view))["next"].isfinite()
