"""VISTA: attention over tokens by hand, summaries streamed and kept, what may not leak, staleness, planted tastes, costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ranking_support import batch_of, groups_batch, groups_space, rich_batch, rich_space, share_right, space_of, train
from shortlist.cascade.config import RunConfig
from shortlist.data.jagged import Jagged
from shortlist.errors import ConfigError
from shortlist.layers.scoring import HeadConfig
from shortlist.models.base import Remembering, RequestShape
from shortlist.models.ranking.vista import (
    DAY,
    OWN,
    VISTA,
    Decoder,
    TargetAttention,
    VISTAConfig,
    quantise,
    without_newest,
)

HEAD = HeadConfig(widths=(16,), dropout=0.0)
TINY = VISTAConfig(
    dim=8,
    num_seeds=3,
    max_history=6,
    num_recent=2,
    max_lag=2,
    num_reconstructed=4,
    dropout=0.0,
    id_dropout=0.0,
    head=HEAD,
)
PAST = [[1, 2, 3, 4], [], [5, 5], [6]]
OFFERED = [[1, 7, 9], [2, 11], [], [3, 12, 8, 4]]


def made(config=TINY, space=None) -> VISTA:
    torch.manual_seed(0)
    model = VISTA(config, space or rich_space()).eval()
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.4)
    return model


def keyed(batch):
    return replace(batch, key=tuple(f"u{i}" for i in range(batch.size)))


def memories_of(model, batch):
    """What a refresh would have kept of the batch's users."""
    columns = model.summaries(batch)._asdict()
    return [{name: column[row] for name, column in columns.items()} for row in range(batch.size)]


@torch.no_grad()
def test_target_attention_by_hand():
    """Width 2, one head. Values are twice the normed token, all logits 0: the mean of the token's, the other's and the own value."""
    attention = TargetAttention(2, 1, 0.0).eval()
    for linear in (attention.query, attention.key_value, attention.out, attention.ffn[0], attention.ffn[2]):
        linear.weight.zero_()
        linear.bias.zero_()
    attention.key_value.weight[2:] = 2 * torch.eye(2)
    attention.out.weight.copy_(torch.eye(2))
    tokens = attention.tokens(
        torch.tensor([[[1.0, -1.0], [-3.0, 3.0], [9.0, 9.0]]]), torch.tensor([[True, True, False]])
    )
    out = attention(torch.tensor([[[5.0, -5.0]]]), tokens)
    # Normed: (1, -1), (-1, 1) and the candidate's own (1, -1); the third token is filling.
    torch.testing.assert_close(out[0, 0], torch.tensor([5.0 + 2 / 3, -5.0 - 2 / 3]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_target_attention_agrees_with_the_plain_one():
    model = made()
    item, tokens = torch.randn(2, 4, 8), torch.randn(2, 5, 8)
    is_real = torch.tensor([[True] * 5, [True, True, False, False, False]])
    fast = model.attention(item, model.attention.tokens(tokens, is_real))
    for row in range(2):
        for place in range(4):
            plain = model.attention.plain(item[row, place], tokens[row, is_real[row]])
            torch.testing.assert_close(fast[row, place], plain, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_candidate_s_score_is_bit_identical_whatever_stands_beside_it():
    model = made()
    one = model.score(rich_batch(PAST, [[1, 7, 9], [2, 11], [], [3, 12, 8, 4]]))["target"]
    other = model.score(rich_batch(PAST, [[1, 7, 5], [2, 4], [], [3, 12, 8, 6]]))["target"]
    same = [0, 1, 3, 5, 6, 7]
    assert torch.equal(one[same], other[same])
    assert not torch.equal(one[2], other[2])


@torch.no_grad()
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("recency", ["position", "gap", "none"])
def test_streaming_gives_what_encoding_gives(num_layers, recency):
    model = made(replace(TINY, num_layers=num_layers, recency=recency, events_at_once=3))
    history = rich_batch([[1, 2, 3, 4, 5] * 40, [], [5, 5], [6]], OFFERED).history
    torch.testing.assert_close(model.stream(history), model.encode(history), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.stream(history, model.item_vectors()), model.stream(history), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_codes_are_within_half_a_step_per_token():
    z = torch.randn(5, 3, 8) * torch.tensor([0.01, 1.0, 100.0])[:, None]
    code, scale = quantise(z)
    assert code.dtype == torch.int8
    torch.testing.assert_close(scale, z.abs().amax(-1) / 127)
    assert ((code * scale[..., None] - z).abs() <= scale[..., None] / 2 * 1.001).all()
    code, scale = quantise(torch.zeros(1, 1, 4))
    assert (code == 0).all()
    assert (scale == 0).all()


@torch.no_grad()
def test_with_a_memory_the_history_is_not_encoded():
    model, batch = made(), keyed(rich_batch([[1, 2, 3, 4], [2, 2], [5, 5], [6]], OFFERED))
    kept = memories_of(model, batch)
    expected = model.score_candidates(model.state(model.summaries(batch).tokens(), batch), batch.candidates)["target"]
    model.encoder.stream = model.encoder.forward = None  # whoever encodes fails
    state, _ = model.recall(batch, kept)
    assert isinstance(model, Remembering)
    assert torch.equal(model.score_candidates(state, batch.candidates)["target"], expected)
    # Nor are events that are neither summarised nor among the newest two read at all.
    other = keyed(rich_batch([[9, 9, 3, 4], [2, 2], [5, 5], [6]], OFFERED))
    state, _ = model.recall(other, kept)
    assert torch.equal(model.score_candidates(state, batch.candidates)["target"], expected)


@torch.no_grad()
def test_int8_changes_scores_by_little():
    model, batch = made(), rich_batch([[1, 2, 3, 4], [2, 2], [5, 5], [6]], OFFERED)
    state, _ = model.recall(keyed(batch), memories_of(model, batch))
    exact = model.score(batch)["target"]
    torch.testing.assert_close(model.score_candidates(state, batch.candidates)["target"], exact, rtol=0.05, atol=0.05)


@torch.no_grad()
def test_users_without_a_memory_get_one_and_those_of_a_refresh_are_not_kept_twice():
    model, batch = made(), keyed(rich_batch([[1, 2, 3, 4], [2, 2], [], [6]], OFFERED))
    refreshed = memories_of(model, batch)
    state, kept = model.recall(batch, [refreshed[0], None, None, refreshed[3]])
    assert [memory is None for memory in kept] == [True, False, False, True]
    assert OWN in kept[1]
    again, _ = model.recall(batch, [refreshed[0], kept[1], kept[2], refreshed[3]])
    for one, other in zip(state.tokens, again.tokens):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        model.score_candidates(state, batch.candidates)["target"], model.score(batch)["target"], rtol=0.05, atol=0.05
    )


@torch.no_grad()
def test_memories_that_do_not_fit_are_passed_over():
    """One of another shape, one of the future, one of a person whose events are gone: all are made anew."""
    model, batch = made(), keyed(rich_batch([[1, 2, 3], [2, 2], [], [6]], OFFERED))
    kept = memories_of(model, batch)
    kept[0] = {**kept[0], "code": torch.zeros(5, 8, dtype=torch.int8)}
    kept[1] = {**kept[1], "time": batch.time[1] + 1}
    _, made_now = model.recall(batch, kept)
    assert [memory is None for memory in made_now] == [False, False, False, True]


def stale_world(when_stale, **settings):
    """A summary of the first two of six events, an hour apart, and the request an hour after the last."""
    model = made(replace(TINY, when_stale=when_stale, **settings), space_of(12))
    batch = keyed(batch_of([[1, 2, 3, 4, 5, 6]], [[7, 8, 9]]))
    old = memories_of(model, replace(batch, history=without_newest(batch.history, torch.tensor([4]))))
    return model, batch, old


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"max_stale_events": 3}, {"max_stale_days": 3.9 / 24}])
def test_a_stale_summary_is_used_and_remarked_on(settings):
    model, batch, old = stale_world("use", **settings)
    state, _ = model.recall(batch, old)
    ((who, text),) = model.remarks(state)
    assert who.tolist() == [True]
    assert "lacks more than" in text
    assert state.tokens.key_BHTd.shape[2] == 3 + 2


@torch.no_grad()
def test_a_summary_within_the_bounds_is_not_remarked_on():
    model, batch, old = stale_world("use", max_stale_events=4, max_stale_days=4.1 / 24)
    assert model.remarks(model.recall(batch, old)[0]) == []
    much_later = replace(batch, time=batch.time + 90 * DAY)
    assert (
        model.remarks(model.recall(much_later, memories_of(model, batch))[0]) == []
    )  # nothing is missing, however old


@torch.no_grad()
def test_a_stale_summary_is_made_again_where_that_is_wanted():
    model, batch, old = stale_world("encode", max_stale_events=3)
    state, kept = model.recall(batch, old)
    assert model.remarks(state) == []
    assert kept[0] is not None
    assert int(kept[0]["num_events"]) == 6
    fresh, _ = model.recall(batch, [None])
    assert torch.equal(state.tokens.key_BHTd, fresh.tokens.key_BHTd)


@torch.no_grad()
def test_own_memories_are_made_again_when_recent_tokens_no_longer_reach_back():
    model = made(space=space_of(12))
    first = keyed(batch_of([[1, 2]], [[7]]))
    _, kept = model.recall(first, [None])
    _, two_more = model.recall(keyed(batch_of([[1, 2, 3, 4]], [[7]])), kept)
    _, three_more = model.recall(keyed(batch_of([[1, 2, 3, 4, 5]], [[7]])), kept)
    assert (int(two_more[0]["num_events"]), int(three_more[0]["num_events"])) == (2, 5)


@torch.no_grad()
def test_recent_events_reach_an_old_summary_as_raw_tokens():
    with_them, without = (made(replace(TINY, num_recent=n), space_of(12)) for n in (2, 0))
    for model, moved in ((with_them, True), (without, False)):
        batch = keyed(batch_of([[1, 2, 3, 4]], [[7, 8, 9]]))
        old = memories_of(model, replace(batch, history=without_newest(batch.history, torch.tensor([2]))))
        other = keyed(batch_of([[1, 2, 10, 11]], [[7, 8, 9]]))
        one, two = (model.score_candidates(model.recall(b, old)[0], b.candidates)["target"] for b in (batch, other))
        assert torch.equal(one, two) is not moved


def test_summaries_read_no_event_after_the_request_s_history():
    """A batch of two requests of one user, at two moments: the later history does not reach the earlier request's summary."""
    model = made(space=space_of(12)).train()
    batch = batch_of([[1, 2], [1, 2, 3, 4]], [[5, 6], [5, 6]])
    z = model.encode(batch.history)
    z[0].square().cumsum(0).sin().sum().backward()
    grad = model.items.ids.weight().grad
    assert (grad[[1, 2]].abs().sum(1) > 0).all()
    assert (grad[[3, 4]] == 0).all()


def test_lag_in_training_leaves_out_the_newest_and_keeps_one():
    model = made(replace(TINY, max_lag=3), space_of(12)).train()
    history = batch_of([[1, 2, 3, 4, 5], [6], []], [[7], [7], [7]]).history
    lengths = torch.stack([model._lagging(history).items.lengths for _ in range(60)])
    assert lengths[:, 0].unique().tolist() == [2, 3, 4, 5]
    assert lengths[:, 1].unique().tolist() == [1]
    assert lengths[:, 2].unique().tolist() == [0]
    cut = without_newest(history, torch.tensor([2, 0, 0]))
    assert cut.items.values.tolist() == [1, 2, 3, 6]
    assert cut.time.tolist() == [0, 3600, 7200, 0]
    assert model.eval()._lagging(history) is history


def test_reconstruction_gains_nothing_from_small_embeddings():
    """A decoder that says nothing, as it begins, gets 1 whatever their size, and the events it reads are not moved."""
    torch.manual_seed(0)
    decoder = Decoder(8, 2, 4)
    z, events = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 4, 8, requires_grad=True)
    is_real = torch.tensor([[True] * 4, [True, True, False, False]])
    for size in (1.0, 1e-3):
        torch.testing.assert_close(decoder(z, events * size, is_real), torch.tensor(1.0))
    torch.nn.init.normal_(decoder.predict.weight)
    decoder(z, events, is_real).backward()
    assert events.grad is None
    assert (z.grad.abs().sum((1, 2)) > 0).all()


def test_the_decoder_is_causal_and_sees_the_summary():
    torch.manual_seed(0)
    decoder = Decoder(8, 2, 4)
    torch.nn.init.normal_(decoder.predict.weight)
    z, events = torch.randn(1, 3, 8), torch.randn(1, 4, 8)
    three = torch.tensor([[True, True, True, False]])
    changed = events.clone()
    changed[0, 3] += 5  # after the last target
    torch.testing.assert_close(decoder(z, events, three), decoder(z, changed, three))
    assert not torch.allclose(decoder(z, events, three), decoder(z + torch.randn(8), events, three))


def test_windows_are_consecutive_events_of_one_request():
    model = made(replace(TINY, recency="none", num_reconstructed=3), space_of(12)).train()
    history = batch_of([[1, 2, 3, 4, 5], [], [6, 7]], [[7], [7], [7]]).history
    vectors = model.items(torch.arange(13)).detach()
    seen = set()
    for _ in range(60):
        window, is_real = model._window(history)
        rows = [[int((vectors - v).abs().sum(1).argmin()) for v in window[r, is_real[r]].detach()] for r in range(3)]
        seen.add(tuple(rows[0]))
        assert rows[1:] == [[], [6, 7]]
    assert seen == {(1, 2, 3), (2, 3, 4), (3, 4, 5)}


def test_training_bears_histories_that_are_all_empty():
    model = made().train()
    losses = model.losses(rich_batch([[], []], [[1, 2], [3]], target=[1.0, 0, 0]))
    assert set(losses) == {"target"}
    losses["target"].backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_second_phase_leaves_the_encoder_alone():
    model = made(replace(TINY, head_epochs=2)).train()
    joint, head = model.phases()
    assert (joint.name, head.name, head.epochs) == ("joint", "head", 2)
    assert len(made(TINY).phases()) == 1
    torch.stack(
        list(head.losses(rich_batch(PAST, OFFERED, target=[1.0, 0, 0, 1, 0, 1, 0, 0, 0])).values())
    ).sum().backward()
    moved = {id(p) for p in head.parameters()}
    assert all(p.grad is None for p in model.encoder.parameters())
    assert {id(p) for p in model.encoder.parameters()}.isdisjoint(moved)
    assert all(p.grad is not None for p in model.attention.parameters())


GROUPS = VISTAConfig(
    dim=16, num_seeds=8, num_recent=0, max_lag=0, dropout=0.0, id_dropout=0.0, reconstruction=0.1, num_reconstructed=4,
    head=HeadConfig(widths=(32,), dropout=0.0),
)  # fmt: skip


NUM_TASTES, PER_TASTE = 12, 4


def tastes_batch(size, draw):
    """Twenty past events of two of twelve tastes; the first of six candidates is to one's taste and the others are not."""
    taste = torch.rand(size, NUM_TASTES, generator=draw).argsort(1)
    past = taste.gather(1, torch.randint(2, (size, 20), generator=draw))
    offered = torch.cat([taste[:, :1], taste[:, 2:7]], 1)
    past, offered = (1 + t * PER_TASTE + torch.randint(PER_TASTE, t.shape, generator=draw) for t in (past, offered))
    label = torch.zeros(size, 6)
    label[:, 0] = 1
    return batch_of(past.tolist(), offered.tolist(), labels={"target": label.flatten()})


def test_finds_planted_tastes_through_the_summary():
    """Nothing but the summary is read of the past, fresh or from int8; chance is 0.5."""
    test = tastes_batch(300, torch.Generator().manual_seed(99))
    torch.manual_seed(0)
    model = VISTA(GROUPS, space_of(NUM_TASTES * PER_TASTE))
    curve = train(model, tastes_batch, steps=150)
    right = share_right(model, test)
    assert right > 0.9, curve[::20]
    with torch.no_grad():
        state, _ = model.recall(keyed(test), memories_of(model, test))
        again = model.score_candidates(state, test.candidates)["target"].view(300, -1)
    assert abs(float((again[:, :1] > again[:, 1:]).float().mean()) - right) < 0.01


def test_same_seed_same_model():
    curves = []
    for _ in range(2):
        torch.manual_seed(0)
        model = VISTA(replace(GROUPS, dropout=0.2, id_dropout=0.1, max_lag=3, num_recent=2), groups_space())
        curves.append(train(model, groups_batch, steps=5))
    assert curves[0] == curves[1]


@torch.no_grad()
def test_cost_agrees_with_the_flop_counter_and_does_not_grow_when_cached():
    model = made(replace(TINY, max_history=10_000, dim=16, num_seeds=8, num_recent=4)).requires_grad_(False)
    batch = rich_batch([[1 + i % 12 for i in range(500)]], [[1 + i % 12 for i in range(40)]])
    kept = memories_of(model, batch)
    with FlopCounterMode(display=False) as encoded:
        model.user_state(batch)
    with FlopCounterMode(display=False) as recalled:
        state, _ = model.recall(keyed(batch), kept)
    with FlopCounterMode(display=False) as scored:
        model.score_candidates(state, batch.candidates)
    shape = RequestShape(num_history=500, num_candidates=40)
    assert model.cost(shape).user_flops == pytest.approx(encoded.get_total_flops(), rel=0.2)
    assert model.cost(shape, cached=True).user_flops == pytest.approx(recalled.get_total_flops(), rel=0.2)
    assert 40 * model.cost(shape).item_flops == pytest.approx(scored.get_total_flops(), rel=0.2)
    long = RequestShape(num_history=10_000, num_candidates=40)
    assert model.cost(long, cached=True) == model.cost(shape, cached=True)
    assert model.cost(long).user_flops > 15 * model.cost(shape).user_flops
    assert model.cost(long, cached=True).bytes < model.cost(long).bytes / 10


@torch.no_grad()
def test_full_state_is_attention_over_every_event():
    model = made(replace(TINY, recency="none"), space_of(12))
    batch = batch_of([[1, 2, 3]], [[7, 8]])
    full = model.full_state(batch)
    assert full.tokens.key_BHTd.shape[2] == 3
    plain = model.attention.plain(model.items(torch.tensor(7)), model.items(torch.tensor([1, 2, 3])))
    seen = model.attention(model.items(torch.tensor([[7]])), full.tokens)
    torch.testing.assert_close(seen[0, 0], plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"dim": 0},
        {"num_seeds": 0},
        {"phi": "relu"},
        {"num_reconstructed": 1},
        {"when_stale": "refuse"},
        {"dropout": 1.0},
        {"head": HeadConfig(loss="mse")},
    ],
)
def test_settings_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        VISTAConfig(**wrong)


def test_a_run_s_toml_reaches_the_tower():
    settings = (
        RunConfig.from_toml("""
[stages.retrieval]
systems = ["popularity"]
keep = 20
[stages.ranking]
systems = ["vista"]
[systems.vista]
dim = 8
[systems.vista.head]
widths = [4]
loss = "bce"
""")
        .systems["vista"]
        .settings
    )
    assert (settings.dim, settings.head.widths, settings.head.loss) == (8, (4,), "bce")


def test_heads_must_divide_the_width():
    for heads in ({"num_heads": 4}, {"num_target_heads": 4}):
        with pytest.raises(ConfigError, match=f"multiple of {next(iter(heads))}"):
            VISTA(VISTAConfig(dim=9, **{"num_target_heads": 3, **heads}), groups_space())


def test_nothing_in_the_past_and_jagged_rows_stand_together():
    rows = Jagged.from_rows([[], [1]])
    assert rows.num_rows == 2
    model = made()
    with torch.no_grad():
        assert torch.isfinite(model.score(rich_batch([[], [1]], OFFERED[:2]))["target"]).all()
        assert model.score(rich_batch([[], []], [[], []]))["target"].shape == (0,)
