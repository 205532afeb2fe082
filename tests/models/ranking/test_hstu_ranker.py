"""HSTU as a ranker: the formula by hand, M-FALCON against one by one, what each position may know, learning."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hstu_support import (
    ACTIONS,
    BLOCK,
    FORMS,
    HEAD,
    INTERLEAVED,
    OFFERED,
    PAST,
    SMALL_PRODUCTION,
    TINY,
    events,
    made,
    next_batch,
    rich,
    score_of,
    with_candidates,
)
from ranking_support import batch_of, groups_batch, groups_space, rich_batch, rich_space, space_of, train
from shortlist.cascade.config import RunConfig
from shortlist.data.batches import Batch, NextTargets
from shortlist.data.jagged import Jagged
from shortlist.errors import ConfigError
from shortlist.layers.hstu import HSTUBlockConfig
from shortlist.layers.next_item import NextItemConfig
from shortlist.layers.scoring import HeadConfig
from shortlist.models.base import RequestShape
from shortlist.models.ranking.hstu_ranker import PRODUCTION, HSTURanker, HSTURankerConfig

# -- the formula -----------------------------------------------------------------------------------------------------


def plain_output(model: HSTURanker, batch: Batch, item: int) -> torch.Tensor:
    """The research form for one request and one candidate, written out token by token in float64: the output at the candidate."""
    history, D = batch.history, model.config.dim
    item_vector = model.items(torch.arange(13)).double()
    tokens = []  # vector, own time, time that is asked about
    times = [*history.time.tolist(), int(batch.time)]
    for i, (row, action) in enumerate(zip(history.items.values.tolist(), history.action.tolist())):
        content = item_vector[row] * math.sqrt(D)
        deed = model.tokens.actions(torch.arange(1, 4)[None] == action)[0].double()
        if model.config.tokens == "merged":
            tokens.append((content + deed, times[i], times[i + 1]))
        else:
            tokens += [(content, times[i], times[i]), (deed, times[i], times[i + 1])]
    content = item_vector[item] * math.sqrt(D)
    if model.config.tokens == "merged":
        content = content + model.tokens.unknown.double()
    tokens.append((content, times[-1], times[-1]))
    x = torch.stack([token[0] for token in tokens])
    n, count = model.config.max_history * model.tokens.per_event + 1, len(tokens)
    for block in model.stack.blocks:
        normed = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        mixed = normed @ block.project.weight.double().T
        mixed = mixed * torch.sigmoid(mixed)
        u, v, q, k = mixed.split([D, D, D, D], dim=1)
        gathered = torch.zeros(count, D, dtype=torch.float64)
        for i in range(count):
            for j in range(i + 1):
                seconds = max(abs(tokens[i][2] - tokens[j][1]), 1)
                bias = block.time_bias[min(int(math.log(seconds) / 0.301), 128)] + block.position_bias[n - 1 + j - i]
                for head in range(2):
                    part = slice(head * D // 2, (head + 1) * D // 2)
                    weight = q[i, part] @ k[j, part] + bias.double()
                    gathered[i, part] += weight * torch.sigmoid(weight) / n * v[j, part]
        spread = (gathered.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        gathered = (gathered - gathered.mean(1, keepdim=True)) / spread
        x = x + (gathered * u) @ block.out.weight.double().T + block.out.bias.double()
    return torch.nn.functional.layer_norm(x[-1], (D,)).float()


@torch.no_grad()
@pytest.mark.parametrize("form", ["merged", "interleaved"])
def test_the_output_is_the_formula_s(form):
    """The divisor n, which is the longest sequence's length and not this one's, the bias's natural logarithm, masks, places, times."""
    model, batch = made(FORMS[form]), rich()
    for row, item in ((0, 9), (2, 11), (1, 2)):
        request = events(batch, [(row, slice(None))])
        state = model.user_state(request)
        rows = Jagged.from_rows([[item]])
        found = model.outputs(state, rows.with_values(model.tokens.candidates(model.items(rows.values))))[0]
        torch.testing.assert_close(found, plain_output(model, request, item), rtol=1e-4, atol=1e-5)


# -- M-FALCON --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_batched_and_cached_is_one_by_one(form):
    batch = rich()
    one_by_one = []
    model = made(FORMS[form])
    for row, offered in enumerate(OFFERED):
        request = events(batch, [(row, slice(None))])
        one_by_one += [score_of(model, request, [[item]]) for item in offered]
    one_by_one = torch.cat(one_by_one)
    assert one_by_one.std() > 0.05
    for micro_batch in (1, 2, 3, 100):
        again = made(replace(FORMS[form], micro_batch=micro_batch))
        torch.testing.assert_close(score_of(again, batch, OFFERED), one_by_one, rtol=0, atol=1e-5)
    if form != "production":  # it has dropout
        torch.testing.assert_close(made(FORMS[form]).train().score(batch)["target"], one_by_one, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_candidate_sees_no_other_and_neither_order_nor_number_matter():
    model, batch = made(), rich()
    score = score_of(model, batch, OFFERED)
    turned = score_of(model, batch, [row[::-1] for row in OFFERED])
    expected = torch.cat([part.flip(0) for part in score.split([len(row) for row in OFFERED])])
    torch.testing.assert_close(turned, expected, rtol=0, atol=1e-5)
    fewer = score_of(model, batch, [row[:1] for row in OFFERED])
    torch.testing.assert_close(fewer, score[[0, 5, 7, 11]], rtol=0, atol=1e-5)
    twice = score_of(model, batch, [row * 2 for row in OFFERED])
    torch.testing.assert_close(twice[:5], score[:5], rtol=0, atol=1e-5)


def test_a_candidate_s_gradient_is_its_own():
    """In training too: the loss of the first candidate moves the vector of no other one."""
    model = made(replace(INTERLEAVED, head=replace(HEAD, loss="bce"))).train()
    batch = with_candidates(events(rich(), [(0, slice(None))]), [[7, 9, 10]])
    model.score(batch)["target"][0].backward()
    touched = model.items.ids.rows.weight.grad.abs().sum(1).nonzero()[:, 0].tolist()
    assert touched == [1, 2, 3, 4, 7]


@torch.no_grad()
def test_a_score_depends_on_nothing_else_in_the_batch():
    """The divisor is a constant of training: neither longer neighbours nor more candidates change it."""
    model, batch = made(), rich()
    alone = score_of(model, events(batch, [(3, slice(None))]), [OFFERED[3]])
    torch.testing.assert_close(alone, score_of(model, batch, OFFERED)[7:11], rtol=0, atol=1e-5)
    assert {block.divisor for block in model.stack.blocks} == {7.0}


@torch.no_grad()
def test_only_the_newest_events_are_read():
    model, batch = made(), rich()
    whole = score_of(model, events(batch, [(4, slice(None))]), [OFFERED[4]])
    newest = score_of(model, events(batch, [(4, slice(2, None))]), [OFFERED[4]])
    torch.testing.assert_close(whole, newest)


@torch.no_grad()
def test_the_request_s_time_is_read_and_not_where_there_is_no_clock():
    batch = rich()
    for form, reads in (("merged", True), ("interleaved", True), ("production", True), ("no time", False)):
        config = FORMS.get(form, replace(TINY, layers=replace(BLOCK, time_bias=False)))
        model = made(config)
        now, later = (
            score_of(model, events(batch, [(0, slice(None))], later=after), [OFFERED[0]]) for after in (1, 10**7)
        )
        assert torch.allclose(now, later) != reads, form
    space = rich_space(actions=ACTIONS, has_clock=False)
    model = made(TINY, space)
    now, later = (score_of(model, events(batch, [(0, slice(None))], later=t), [OFFERED[0]]) for t in (1, 10**7))
    torch.testing.assert_close(now, later)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_actions_and_lines_of_a_group(form):
    """Another action changes the scores; the order of lines in a group does not."""
    model, batch = made(FORMS[form]), rich()
    history = batch.history
    liked = replace(batch, history=replace(history, action=history.action % 3 + 1))
    assert not torch.allclose(score_of(model, batch, OFFERED)[:5], score_of(model, liked, OFFERED)[:5], atol=1e-3)
    time, group = history.time.clone(), history.group.clone()
    time[2], group[2] = time[1], group[1]
    one = replace(history, time=time, group=group)
    index = torch.tensor([0, 2, 1, *range(3, len(group))])
    items = history.items.with_values(history.items.values[index])
    other = replace(one, items=items, action=one.action[index], value=one.value[index])
    first, second = (score_of(model, replace(batch, history=h), OFFERED) for h in (one, other))
    torch.testing.assert_close(first, second)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_empty_histories_and_candidates(form):
    model = made(FORMS[form])
    nobody = replace(rich_batch([[], []], OFFERED[:2]), time=torch.tensor([5, 6]))
    assert torch.isfinite(model.score(nobody)["target"]).all()
    assert score_of(model, rich(PAST[:2], OFFERED[:2]), [[], []]).shape == (0,)
    new = score_of(model, events(rich(), [(0, slice(None))]), [[11, 12]])
    assert new[0] != new[1]  # no id rows of their own: their fields differ


def test_training_bears_histories_that_are_all_empty():
    for form in ("merged", "interleaved"):
        model = made(FORMS[form]).train()
        batch = replace(rich_batch([[], []], [[1, 2], [3]], target=[1.0, 0, 0]), time=torch.tensor([5, 6]))
        model.losses(batch)["target"].backward()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


# -- generative training ---------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("form", ["interleaved", "interleaved prefix"])
def test_one_sequence_is_as_many_impressions(form):
    """What the generative phase computes at each item is what scoring that item behind the events before it would."""
    model = made(replace(FORMS[form], learning="generative"), rich_space(actions=ACTIONS))
    batch = next_batch(events(rich(), [(0, slice(None)), (2, slice(None)), (4, slice(2, None))]))
    logits, labels = model.outcomes_at_all(batch)
    history = batch.history
    expected, place = [], 0
    for row, length in enumerate(history.items.lengths.tolist()):
        for count in range(length):
            request = events(batch, [(row, slice(0, count))])
            request = replace(request, context={"hour": torch.zeros(1, dtype=torch.int64), "rain": torch.zeros(1)})
            assert int(request.time) == int(history.time[place])
            expected.append(score_of(model, request, [[int(history.items.values[place])]]))
            place += 1
    torch.testing.assert_close(logits["target"], torch.cat(expected), rtol=0, atol=1e-5)
    assert labels["target"].tolist() == (history.action == 2).float().tolist()


@torch.no_grad()
def test_no_position_knows_its_own_or_a_later_outcome():
    model = made(INTERLEAVED)
    batch = next_batch(events(rich(), [(4, slice(2, None))]))
    logits = model.outcomes_at_all(batch)[0]["target"]
    for place in range(6):
        history = batch.history
        action = torch.where(torch.arange(6) >= place, history.action % 3 + 1, history.action)
        values = torch.where(torch.arange(6) > place, history.items.values % 12 + 1, history.items.values)
        changed = replace(history, action=action, items=history.items.with_values(values))
        again = model.outcomes_at_all(replace(batch, history=changed))[0]["target"]
        torch.testing.assert_close(again[: place + 1], logits[: place + 1])
        assert place == 5 or not torch.allclose(again[place + 1 :], logits[place + 1 :], atol=1e-4)


@torch.no_grad()
def test_unknown_outcomes_and_companions_are_not_asked_about():
    """Of six events one has an unknown action, one was met together with the event before it."""
    model = made(replace(INTERLEAVED, head=replace(HEAD, loss="bce")))
    batch = next_batch(events(rich(), [(4, slice(2, None))]))
    action, group, time = batch.history.action.clone(), batch.history.group.clone(), batch.history.time.clone()
    action[1], group[4], time[4] = 0, group[3], time[3]
    batch = replace(batch, history=replace(batch.history, action=action, group=group, time=time))
    logits, labels = model.outcomes_at_all(batch)
    first = min(3, 4, key=lambda i: int(batch.history.items.values[i]))  # a group stands by item
    assert labels["target"].tolist() == (action[[0, 2, first, 5]] == 2).float().tolist()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits["target"], labels["target"])
    torch.testing.assert_close(model.generative_losses(batch)["target"], loss)


@torch.no_grad()
@pytest.mark.parametrize("form", ["merged", "interleaved", "prefix"])
def test_the_next_item_is_asked_for_with_what_a_request_at_that_moment_would_know(form):
    objective = NextItemConfig(loss="full_softmax", normalise=True, temperature=0.3)
    model = made(replace(FORMS[form], generative="next", objective=objective))
    batch = next_batch(events(rich(), [(0, slice(None)), (4, slice(2, None))]))
    history, losses, place = batch.history, [], 0
    vectors = torch.nn.functional.normalize(model.items(torch.arange(13)), dim=1)
    known = torch.arange(1, 13)  # items with fields can be judged, new ones are left out of the softmax
    known = known[model.objective.candidates_N[1:]]
    for row, length in enumerate(history.items.lengths.tolist()):
        for count in range(1, length + 1):
            request = events(batch, [(row, slice(0, count))])
            request = replace(request, context={"hour": torch.zeros(1, dtype=torch.int64), "rain": torch.zeros(1)})
            user = torch.nn.functional.normalize(model.user_state(request).user_BD[0], dim=0)
            target = batch.targets.items.values[place]
            losses.append((user @ vectors[known].T / 0.3).logsumexp(0) - user @ vectors[target] / 0.3)
            place += 1
    torch.testing.assert_close(model.generative_losses(batch)["next"], torch.stack(losses).mean(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_history_beyond_the_window_is_cut_with_its_positions():
    model = made(replace(TINY, objective=NextItemConfig(loss="full_softmax")))
    long = next_batch(rich())
    rows = long.history.items
    short = events(rich(), [(i, slice(-6, None)) for i in range(5)])
    cut = next_batch(short)
    # The last target of a row is the first item of the next one: the cut one's targets are made from the whole.
    inside = rows.position_of_value >= (rows.lengths - 6)[rows.row_of_value]
    cut = replace(
        cut, targets=replace(cut.targets, items=cut.targets.items.with_values(long.targets.items.values[inside]))
    )
    assert len(cut.targets.position) == len(long.targets.position) - 2
    torch.testing.assert_close(model.generative_losses(long)["next"], model.generative_losses(cut)["next"])


# -- learning --------------------------------------------------------------------------------------------------------


LEARNER = HSTURankerConfig(
    dim=16,
    max_history=20,
    layers=HSTUBlockConfig(block_dropout=0.0),
    head=HeadConfig(widths=(32,), dropout=0.0),
    dropout=0.0,
    id_dropout=0.0,
)


def kinds(size: int, draw: torch.Generator, length: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Items 1..20 [size, length] and whether they are liked: seven people of ten like the odd ones, three the even ones.

    Without a past the best guess is right seven times of ten; one event with its action tells all.
    """
    likes_odd = torch.rand(size, 1, generator=draw) < 0.7
    item = torch.randint(1, 21, (size, length), generator=draw)
    return item, (item % 2 == 1) == likes_odd


def kinds_batch(size: int, draw: torch.Generator, num_offered: int = 0) -> Batch:
    """Whole sequences, or the first 16 - num_offered events of them as history and the others as labelled candidates."""
    item, liked = kinds(size, draw)
    cut = item.shape[1] - num_offered
    batch = batch_of(item[:, :cut].tolist(), item[:, cut:].tolist(), labels={"like": liked[:, cut:].flatten().float()})
    return replace(batch, history=replace(batch.history, action=1 + liked[:, :cut].flatten().long()))


def kinds_model(**settings: object) -> HSTURanker:
    torch.manual_seed(0)
    config = replace(LEARNER, head=replace(LEARNER.head, loss="bce"), **settings)
    return HSTURanker(config, space_of(20, tasks=("like",), actions=("pass", "like")))


def descend(loss_of, model: HSTURanker, steps: int) -> None:
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    model.train()
    for _ in range(steps):
        loss = loss_of()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()


@torch.no_grad()
def share_told(model: HSTURanker) -> float:
    batch = kinds_batch(300, torch.Generator().manual_seed(5), num_offered=4)
    return float(((model.score(batch)["like"] > 0) == (batch.labels["like"] > 0)).float().mean())


def test_generative_training_teaches_to_score_candidates():
    """Trained on whole sequences alone, asked by M-FALCON."""
    model, draw = kinds_model(tokens="interleaved", learning="generative"), torch.Generator().manual_seed(1)
    assert [phase.feed for phase in model.phases()] == ["next_event"]
    descend(lambda: model.generative_losses(kinds_batch(64, draw))["like"], model, 50)
    assert share_told(model) > 0.97


@pytest.mark.parametrize("tokens", ["merged", "interleaved"])
def test_learns_from_candidates(tokens):
    model, draw = kinds_model(tokens=tokens, learning="candidates"), torch.Generator().manual_seed(1)
    assert [phase.feed for phase in model.phases()] == ["candidates"]
    descend(lambda: model.losses(kinds_batch(64, draw, num_offered=4))["like"], model, 70)
    assert share_told(model) > 0.97


def ring_batch(size: int, draw: torch.Generator) -> Batch:
    """Item i is followed by i + 1 on a ring of 30."""
    start = torch.randint(30, (size, 1), generator=draw)
    item = (start + torch.arange(8)) % 30 + 1
    batch = batch_of(item[:, :-1].tolist(), [[]] * size)
    position = torch.arange(size * 7)
    target = Jagged.from_lengths(item[:, 1:].flatten(), torch.ones_like(position))
    return replace(
        batch, candidates=None, targets=NextTargets(position=position, items=target, weight=torch.ones(size * 7))
    )


def test_after_the_next_phase_candidates_are_in_order():
    """The score that the generative phase learned is part of the logits from the start: no candidate was seen in training."""
    torch.manual_seed(0)
    config = replace(LEARNER, learning="both", objective=NextItemConfig(loss="full_softmax"))
    model = HSTURanker(config, space_of(30))
    assert [phase.name for phase in model.phases()] == ["generative", "candidates"]
    draw = torch.Generator().manual_seed(1)
    descend(lambda: model.generative_losses(ring_batch(64, draw))["next"], model, 80)
    with torch.no_grad():
        past = [[(s + i) % 30 + 1 for i in range(5)] for s in range(30)]
        score = model.score(batch_of(past, [list(range(1, 31))] * 30))["target"].view(30, 30)
    assert (score.argmax(1) == (torch.arange(30) + 5) % 30).float().mean() > 0.95


def test_several_tasks_learn_at_once():
    model = made(replace(INTERLEAVED, positive_actions=()), rich_space(actions=ACTIONS, tasks=("like", "buy")))
    batch = rich()
    labels = {task: torch.randint(2, (18,)).float() for task in ("like", "buy")}
    losses = model.losses(replace(batch, labels=labels))
    assert set(losses) == {"like", "buy"}
    generative = model.generative_losses(next_batch(batch))
    assert set(generative) == {"like", "buy"}
    logits, outcomes = model.outcomes_at_all(next_batch(batch))
    assert outcomes["buy"].sum() + outcomes["like"].sum() <= len(outcomes["buy"])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits["buy"], outcomes["buy"])
    torch.testing.assert_close(generative["buy"], expected)


def test_same_seed_same_model():
    curves = []
    for _ in range(2):
        torch.manual_seed(3)
        model = HSTURanker(replace(LEARNER, dropout=0.2, id_dropout=0.1, learning="both"), groups_space())
        curves.append(train(model, groups_batch, steps=3))
    assert curves[0] == curves[1]


# -- costs and settings ----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("form", ["merged", "interleaved", "prefix", "production layer", "production"])
def test_cost_agrees_with_the_flop_counter(form):
    """Wide layers and a short history: kernels may or may not compute what the mask drops, which is little here."""
    block = replace(FORMS[form].layers, qk_dim=16, v_dim=16, num_heads=2)
    model = made(
        replace(FORMS[form], dim=32, max_history=30, layers=block, micro_batch=4, head=replace(HEAD, widths=(32,)))
    )
    shape = RequestShape(num_history=20, num_candidates=4)
    batch = rich([[1 + i % 12 for i in range(20)]], [[1, 2, 3, 4]])
    with FlopCounterMode(display=False) as user:
        state = model.user_state(batch)
    with FlopCounterMode(display=False) as item:
        model.score_candidates(state, batch.candidates)
    cost, cached = model.cost(shape), model.cost(shape, cached=True)
    assert cost.user_flops == pytest.approx(user.get_total_flops(), rel=0.2)
    assert 4 * cost.item_flops == pytest.approx(item.get_total_flops(), rel=0.2)
    if model.remembers:
        _, kept = model.recall(batch, [None])
        with FlopCounterMode(display=False) as again:
            model.recall(batch, kept)
        assert cached.user_flops == pytest.approx(again.get_total_flops(), rel=0.2)
        assert cached.user_flops < cost.user_flops / 5
    else:
        assert cached == cost
    assert cost.bytes > model.cost(replace(shape, num_candidates=1)).bytes > 0


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"dim": 0}, "dim"),
        ({"micro_batch": 0}, "micro_batch"),
        ({"dropout": 1.0}, "dropout"),
        ({"tokens": "mixed"}, "tokens must be one of merged, interleaved"),
        ({"learning": "all"}, "learning"),
        ({"generative": "actions"}, "merged ones show the outcome"),
        ({"places_from_end": True, "learning": "both"}, "learning"),
        ({"layers": HSTUBlockConfig(num_blocks=0)}, "num_blocks"),
        ({"head": HeadConfig(pair_bins=-1)}, "head.pair_bins"),
        ({"objective": NextItemConfig(temperature=0)}, "temperature"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(wrong, named):
    with pytest.raises(ConfigError, match=named):
        HSTURankerConfig(**wrong)


@pytest.mark.parametrize(
    ("settings", "space", "named"),
    [
        ({"positive_actions": ("wish",)}, {"actions": ACTIONS}, "'wish'; the log's actions are view, like, buy"),
        ({"tokens": "interleaved", "generative": "actions"}, {"actions": ACTIONS}, "name some in positive_actions"),
        ({"learning": "generative"}, {"actions": ACTIONS, "tasks": ("like",)}, "must learn every task from actions"),
        ({"time_of_day": True}, {"has_clock": False}, "which this log lacks"),
    ],
)
def test_settings_that_the_log_can_not_serve_are_refused(settings, space, named):
    with pytest.raises(ConfigError, match=named):
        HSTURanker(HSTURankerConfig(**settings), space_of(5, **space))


def test_the_production_form_is_a_config():
    config = HSTURankerConfig(**PRODUCTION)
    assert (config.layers.num_blocks, config.layers.qk_dim, config.dim) == (5, 128, 512)
    model = made(SMALL_PRODUCTION)
    assert model.stack.blocks[0].position_bias is None
    assert model.stack.blocks[0].time_bias is None
    assert model.stack.blocks[0].out.in_features == 3 * 2 * 5
    assert model.num_prefix == 3
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, 2, 18).astype(np.float32))
    model.train().losses(replace(rich(), labels={"target": labels}))["target"].backward()
    assert all(
        p.grad is not None for name, p in model.named_parameters() if name.startswith(("marks", "stack", "time"))
    )


def test_settings_survive_a_cascade_s_toml():
    text = """
    [stages.retrieval]
    systems = ["popularity"]
    keep = 20
    [stages.ranking]
    systems = ["hstu-ranker"]
    [systems.hstu-ranker]
    tokens = "interleaved"
    positive_actions = ["like", "buy"]
    layers = { variant = "production", num_heads = 4, position_bias = false }
    head = { widths = [512], loss = "bce" }
    """
    config = RunConfig.from_toml(text)
    settings = config.systems["hstu-ranker"].settings
    assert settings == HSTURankerConfig(
        tokens="interleaved",
        positive_actions=("like", "buy"),
        layers=HSTUBlockConfig(variant="production", num_heads=4, position_bias=False),
        head=HeadConfig(widths=(512,), loss="bce"),
    )
    assert RunConfig.from_toml(config.to_toml()).systems["hstu-ranker"].settings == settings


@pytest.mark.parametrize(
    ("settings", "gain"),
    [
        ({}, 0.0),
        ({"learning": "both"}, 1.0),
        ({"learning": "both", "head": HeadConfig(loss="bce")}, 0.0),
        ({"learning": "both", "tokens": "interleaved", "positive_actions": ("like",)}, 0.0),
    ],
)
def test_the_next_item_s_score_counts_from_the_start_only_where_it_is_learned_first(settings, gain):
    model = HSTURanker(HSTURankerConfig(**settings), space_of(5, actions=ACTIONS))
    assert model.match_gain.tolist() == [gain]
