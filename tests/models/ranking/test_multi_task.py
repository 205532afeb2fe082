"""Multi-task rankers: their formulas written out, what tasks share, costs, and a planted world in which two tasks disagree."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ranking_support import batch_of, rich_batch, rich_space, space_of
from shortlist.errors import ConfigError
from shortlist.layers.experts import Experts, InputConfig, gate, gate_diagnosis
from shortlist.layers.scoring import task_losses
from shortlist.metrics.classification import auc
from shortlist.models.base import RequestShape
from shortlist.models.ranking.mmoe import MMoE, MMoEConfig
from shortlist.models.ranking.ple import PLE, PLEConfig
from shortlist.models.ranking.shared_bottom import SharedBottom, SharedBottomConfig

TASKS = ("click", "buy", "like")
INPUT = InputConfig(dim=8, max_history=3, id_dropout=0.0)
TINY = {
    "shared-bottom": SharedBottomConfig(widths=(12, 10), tower_widths=(6,), dropout=0.0, input=INPUT),
    "mmoe": MMoEConfig(num_experts=3, expert_widths=(7, 6), tower_widths=(5,), dropout=0.0, input=INPUT),
    "omoe": MMoEConfig(num_experts=3, expert_widths=(7,), tower_widths=(5,), gates="one", dropout=0.0, input=INPUT),
    "cgc": PLEConfig(num_levels=1, expert_widths=(7,), tower_widths=(), dropout=0.0, input=INPUT),
    "ple": PLEConfig(
        num_levels=3, num_own=1, num_shared=2, expert_widths=(7, 6), tower_widths=(5,), dropout=0.0, input=INPUT
    ),
}
CLASSES = {"shared-bottom": SharedBottom, "mmoe": MMoE, "omoe": MMoE, "cgc": PLE, "ple": PLE}
PAST = [[1, 2, 3, 4], [], [5, 5], [6]]
OFFERED = [[1, 7, 9], [2, 11], [], [3, 12, 8, 4]]


def made(name, config=None, space=None):
    torch.manual_seed(0)
    return CLASSES[name](config or TINY[name], space or rich_space(tasks=TASKS)).eval()


def labelled(seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = {task: (torch.rand(9, generator=generator) < 0.5).float().tolist() for task in TASKS}
    return rich_batch(PAST, OFFERED, **labels)


def inputs_of(model, batch):
    """x of each candidate, request side first; and the plain layers by hand."""
    request_BR = model.input.request(batch)
    return torch.cat([request_BR[batch.candidate_rows.row_of_value], model.input.candidates(batch.candidates)], 1)


def expert_by_hand(experts, number, first_map, x):
    """One network of a bank, layer by layer."""
    size = experts.first_width // experts.num_experts
    rows = slice(number * size, (number + 1) * size)
    hidden = torch.relu(x @ first_map.weight[rows].T + first_map.bias[rows])
    for weight, bias in zip(experts.weights, experts.biases):
        hidden = torch.relu(hidden @ weight[number] + bias[number])
    return hidden


def mix_by_hand(outputs, gate_map, x):
    weight = torch.softmax(x @ gate_map.weight.T, 1)
    assert gate_map.bias is None
    return sum(weight[:, [i]] * output for i, output in enumerate(outputs))


@torch.no_grad()
def test_input_is_fields_mean_of_the_past_and_candidate():
    model, batch = made("mmoe"), labelled()
    x = model.input.request(batch)
    torch.testing.assert_close(x[0, -8:], model.input.items(torch.tensor([2, 3, 4])).mean(0))
    assert not x[1, -8:].any()
    torch.testing.assert_close(x[:, 8:16], model.input.fields.context_fields(batch.context)[:, 0])
    torch.testing.assert_close(
        model.input.candidates(batch.candidates)[:, :8], model.input.items(batch.candidate_rows.values)
    )


@torch.no_grad()
def test_shared_bottom_written_out():
    model, batch = made("shared-bottom"), labelled()
    shared = expert_by_hand(model.bottom, 0, model.first.maps[0], inputs_of(model, batch))
    for task, tower in zip(TASKS, model.towers.towers):
        torch.testing.assert_close(model.score(batch)[task], tower(shared)[:, 0])


@pytest.mark.parametrize("name", ["mmoe", "omoe"])
@torch.no_grad()
def test_mmoe_written_out(name):
    model, batch = made(name), labelled()
    x = inputs_of(model, batch)
    outputs = [expert_by_hand(model.experts, i, model.first.maps[0], x) for i in range(3)]
    gates = list(model.first.maps[1:])
    assert len(gates) == (3 if name == "mmoe" else 1)
    for number, (task, tower) in enumerate(zip(TASKS, model.towers.towers)):
        mixture = mix_by_hand(outputs, gates[number % len(gates)], x)
        torch.testing.assert_close(model.score(batch)[task], tower(mixture)[:, 0])
    weights = model.gate_weights(batch)
    torch.testing.assert_close(weights["buy"], torch.softmax(x @ gates[1 % len(gates)].weight.T, 1))


@pytest.mark.parametrize("name", ["cgc", "ple"])
@torch.no_grad()
def test_ple_written_out(name):
    """Each task's gate sees its own and the shared experts; the shared gate sees all; no shared gate on the last level."""
    model, batch = made(name), labelled()
    inputs = [inputs_of(model, batch)] * 4
    for number, level in enumerate(model.levels):
        maps = list(model.first.maps if number == 0 else model.deeper[number - 1])
        is_last = number == len(model.levels) - 1
        assert len(maps) == 4 + (3 if is_last else 4)
        banks = [
            [expert_by_hand(bank, i, maps[g], inputs[g]) for i in range(bank.num_experts)]
            for g, bank in enumerate(level.experts)
        ]
        outputs = [mix_by_hand(banks[k] + banks[3], maps[4 + k], inputs[k]) for k in range(3)]
        if not is_last:
            outputs.append(mix_by_hand([expert for bank in banks for expert in bank], maps[7], inputs[3]))
        inputs = outputs
    for k, (task, tower) in enumerate(zip(TASKS, model.towers.towers)):
        torch.testing.assert_close(model.score(batch)[task], tower(inputs[k])[:, 0])


@pytest.mark.parametrize("name", TINY)
def test_what_is_shared_is_what_several_tasks_reach(name):
    """By autograd: a shared parameter has a gradient from every task, any other from one task alone."""
    model, batch = made(name), labelled()
    losses = model.losses(batch)
    shared = {id(p) for p in model.shared_parameters()}
    assert len(shared) == len(model.shared_parameters())
    for parameter_name, p in model.named_parameters():
        reached = []
        for loss in losses.values():
            (g,) = torch.autograd.grad(loss, p, retain_graph=True, allow_unused=True)
            reached.append(g is not None and bool(g.to_dense().any()))
        assert sum(reached) == (3 if id(p) in shared else 1), parameter_name


def test_labels_that_are_not_known_are_left_out():
    """NaN = not known: the loss is the mean over the others, with both losses, and a task without any label costs nothing."""
    model, batch = made("mmoe"), labelled()
    label = batch.labels["buy"].clone()
    label[[0, 4, 6]] = torch.nan
    known = ~label.isnan()
    batch = replace(batch, labels={**batch.labels, "buy": label, "like": torch.full((9,), torch.nan)})
    scores = model.score(batch)
    losses = task_losses(scores, batch, "bce")
    plain = torch.nn.functional.binary_cross_entropy_with_logits(scores["buy"][known], label[known])
    torch.testing.assert_close(losses["buy"], plain)
    assert losses["like"] == 0
    assert losses["like"].requires_grad
    one = batch_of([[1]], [[2, 3, 4]], labels={"buy": torch.tensor([1.0, torch.nan, 0.0])})
    score = torch.tensor([0.3, 9.0, -0.2])
    listed = task_losses({"buy": score}, one, "softmax")["buy"]
    torch.testing.assert_close(listed, -torch.log_softmax(score[[0, 2]], 0)[0])


def test_gates_leave_experts_out_in_training_alone():
    logits = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    weight = gate(logits, 0.5)
    torch.testing.assert_close(weight.sum(1), torch.ones(4000))
    # 1/8 of the rows would lose all and keep all instead: 0.5 - 1/8 of the weights are 0.
    assert float((weight == 0).float().mean()) == pytest.approx(0.375, abs=0.02)
    assert torch.equal(gate(logits), logits.softmax(1))
    config = replace(TINY["mmoe"], expert_dropout=0.9)
    batch = labelled()
    assert torch.equal(made("mmoe", config).score(batch)["buy"], made("mmoe").score(batch)["buy"])


def test_gate_diagnosis_by_hand():
    sure, even = torch.tensor([[1.0, 0.0]] * 4), torch.tensor([[0.5, 0.5]] * 4)
    told = gate_diagnosis({"a": sure, "b": even})
    assert told["a"] == {"entropy": 0.0, "apart": pytest.approx(0.25)}
    assert told["b"]["entropy"] == pytest.approx(1.0)


def test_experts_start_as_linear_maps_do():
    torch.manual_seed(0)
    experts = Experts(4, (50, 30))
    assert experts.weights[0].abs().max() <= 50**-0.5
    assert float(experts.weights[0].detach().std()) == pytest.approx((1 / 150) ** 0.5, rel=0.05)
    assert not experts.biases[0].any()


def disagreeing(size, seed):
    """Tabular rows: "up" grows with the sum of two pair fields, "down" with their difference; the tasks share half of what they need."""
    draw = torch.Generator().manual_seed(seed)
    a, b = torch.rand(2, size, generator=draw) * 2 - 1
    labels = {"up": (a + b > 0).float(), "down": (a - b > 0).float()}
    return batch_of([[]] * size, [[1]] * size, pair={"a": a, "b": b}, labels=labels)


@pytest.mark.parametrize("name", TINY)
def test_learns_two_tasks_that_disagree(name):
    model = made(name, space=space_of(3, pairs=("a", "b"), tasks=("up", "down")))
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    model.train()
    for step in range(60):
        loss = sum(model.losses(disagreeing(128, step)).values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    test = disagreeing(2000, 999)
    with torch.no_grad():
        scores = model.eval().score(test)
    assert min(auc(test.labels[task], scores[task]) for task in ("up", "down")) > 0.95


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_cost_agrees_with_the_flop_counter(name):
    config = replace(TINY[name], input=replace(INPUT, max_history=30))
    model = made(name, config)
    shape = RequestShape(num_history=20, num_candidates=40)
    batch = rich_batch([[1 + i % 12 for i in range(20)]], [[1 + i % 12 for i in range(40)]])
    with FlopCounterMode(display=False) as user:
        state = model.user_state(batch)
    with FlopCounterMode(display=False) as item:
        model.score_candidates(state, batch.candidates)
    cost, cached = model.cost(shape), model.cost(shape, cached=True)
    assert cost.user_flops == pytest.approx(user.get_total_flops(), rel=0.1)
    assert 40 * cost.item_flops == pytest.approx(item.get_total_flops(), rel=0.1)
    assert cached.user_flops == 0
    assert 0 < cached.bytes < cost.bytes


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: SharedBottomConfig(widths=()), "widths"),
        (lambda: MMoEConfig(num_experts=0), "num_experts"),
        (lambda: MMoEConfig(expert_widths=(0,)), "expert_widths"),
        (lambda: MMoEConfig(gates="two"), "gates"),
        (lambda: MMoEConfig(expert_dropout=1.0), "expert_dropout"),
        (lambda: PLEConfig(num_levels=0), "num_levels"),
        (lambda: PLEConfig(loss="mse"), "loss"),
        (lambda: PLEConfig(dropout=1.0), "dropout"),
        (lambda: InputConfig(dim=0), "dim"),
        (lambda: InputConfig(id_dropout=1.0), "id_dropout"),
        (lambda: Experts(2, ()), "experts"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(make, word):
    with pytest.raises(ConfigError, match=word):
        make()
