"""Field selectors: the prior's identity, gates in closed form, costs, and the choice under a budget."""

import itertools
import math

import pytest
import torch

from ranking_support import rich_space
from shortlist.errors import ConfigError
from shortlist.layers.selection import (
    ChoiceConfig,
    ConcreteGates,
    CostConfig,
    ExcitationGates,
    FieldChoice,
    GatesConfig,
    choose,
    facts_of,
    field_costs,
    linear_log,
)

COST = torch.tensor([0.5, 1.0, 1.5])
X = torch.arange(24.0).view(4, 3, 2)


def gates_at(logits: list[float], **settings: float) -> ConcreteGates:
    """In training mode, with these l_j."""
    gates = ConcreteGates(len(logits), GatesConfig(**settings)).train()
    with torch.no_grad():
        gates.raw_M.copy_(torch.tensor(logits) / gates.config.rate)
    return gates


# --- FSCD ---


def test_with_the_paper_s_prior_a_field_pays_exactly_its_cost():
    c = torch.linspace(-5, 30, 71, dtype=torch.float64)
    theta = 1 - torch.sigmoid(c)
    alpha = (1 - theta).log() - theta.log()
    # 1 - sigmoid(c) has lost c's digits at 30, which is why no logarithm is taken.
    torch.testing.assert_close(alpha[c < 15], c[c < 15], rtol=1e-9, atol=1e-9)
    gates = gates_at([50.0, 50.0, 50.0], weight=0.1)
    dear = torch.tensor([1.0, 200.0, 1e6])  # theta is 0 in floating point, log theta infinite
    assert (1 - torch.sigmoid(dear)).log().isinf().any()
    torch.testing.assert_close(gates(X, dear)[1], 0.1 * dear.sum())


@pytest.mark.parametrize("logit", [-2.0, 0.0, 1.5])
def test_draws_follow_the_concrete_distribution(logit):
    """P(z <= x) = P(logit(u) <= t logit(x) - l) = sigmoid(t logit(x) - l); at 1/2 that is the chance that the field is dropped."""
    torch.manual_seed(0)
    z = gates_at([logit]).draw(200_000)
    for x in (0.01, 0.5, 0.9, 0.99):
        expected = 1 / (1 + math.exp(-(0.1 * math.log(x / (1 - x)) - logit)))
        assert abs(float((z <= x).float().mean()) - expected) < 0.005


def test_every_row_and_field_has_its_own_draw():
    torch.manual_seed(0)
    gates = gates_at([0.0, 0.0, 0.0])
    z = gates.draw(64)
    assert z.shape == (64, 3)
    assert len(z[:, 0].unique()) > 50  # equal where they round to 1
    assert not torch.equal(z[:, 0], z[:, 1])
    torch.manual_seed(0)
    gated, paid = gates(torch.ones(64, 3, 2), COST)
    torch.testing.assert_close(gated, z[:, :, None].expand(64, 3, 2))
    torch.testing.assert_close(paid, 3e-3 * (COST * z.mean(0)).sum())


def test_gradients_reach_a_gate_through_what_it_pays_and_what_it_passes():
    """dz/dl = z (1 - z) / t."""
    torch.manual_seed(0)
    gates = gates_at([0.3, -0.2, 0.1], rate=1.0, weight=0.5)
    z = gates.draw(4).detach()
    torch.manual_seed(0)
    gated, paid = gates(X, COST)
    slope = z * (1 - z) / 0.1
    (grad,) = torch.autograd.grad(paid, gates.raw_M, retain_graph=True)
    torch.testing.assert_close(grad, 0.5 * COST * slope.mean(0))
    (grad,) = torch.autograd.grad(gated.sum(), gates.raw_M)
    torch.testing.assert_close(grad, (slope * X.sum(2)).sum(0))


@pytest.mark.parametrize("rows", [1, 7, 512])
def test_what_is_paid_does_not_depend_on_the_batch(rows):
    """The published 1 / N and the company's 1 / batch size would."""
    gates = gates_at([40.0, 40.0, 40.0], weight=0.01)
    torch.testing.assert_close(gates(torch.ones(rows, 3, 2), COST)[1], torch.tensor(0.01 * 3.0))


def test_out_of_training_a_gate_is_its_mean_and_nothing_is_paid():
    gates = gates_at([0.0, 2.0, -1.0]).eval()
    gated, paid = gates(X, COST)
    assert paid is None
    torch.testing.assert_close(gated, X * torch.tensor([0.5, 0.880797, 0.268941])[:, None])
    torch.testing.assert_close(gates.importance(), torch.tensor([0.5, 0.880797, 0.268941]))


def test_gates_move_at_a_multiple_of_the_learning_rate_and_start_where_they_are_told():
    gates = ConcreteGates(3, GatesConfig(start=2.0, rate=5.0))
    torch.testing.assert_close(gates.logit_M, torch.full((3,), 2.0))
    optimiser = torch.optim.Adam(gates.parameters(), lr=1e-2)
    gates.train()(torch.ones(500, 3, 2), COST)[1].backward()
    before = gates.logit_M.detach().clone()
    optimiser.step()  # Adam's first step is lr, whatever the gradient
    torch.testing.assert_close(before - gates.logit_M.detach(), torch.full((3,), 0.05), rtol=1e-3, atol=1e-5)


def test_the_ancestor_pays_the_chances_themselves_whatever_fields_cost():
    gates = gates_at([0.0, 2.0, -1.0], cost_aware=False, weight=0.01)
    paid = gates(X, COST)[1]
    torch.testing.assert_close(paid, torch.tensor(0.01 * (0.5 + 0.880797 + 0.268941)))
    torch.testing.assert_close(gates(X, 100 * COST)[1], paid)


# --- COLD ---


def test_scores_come_from_all_fields_and_their_mean_ranks():
    torch.manual_seed(0)
    gates = ExcitationGates(3, 2).train()
    means = []
    for _ in range(3):
        x = torch.randn(5, 3, 2)
        s = torch.sigmoid(x.flatten(1) @ gates.map.weight.T + gates.map.bias)
        means.append(s.mean(0))
        gated, paid = gates(x, COST)
        assert paid is None
        torch.testing.assert_close(gated, x * s[:, :, None])
    torch.testing.assert_close(gates.importance(), torch.stack(means).mean(0))
    gates.eval()(torch.randn(5, 3, 2), COST)
    torch.testing.assert_close(gates.importance(), torch.stack(means).mean(0))


def test_linear_log_is_the_identity_inside_and_a_logarithm_outside():
    x = torch.tensor([-1e4, -math.e, -1.0, -0.3, 0.0, 0.7, 1.0, math.e, 1e4], dtype=torch.float64, requires_grad=True)
    by_hand = [-(math.log(1e4) + 1), -2.0, -1.0, -0.3, 0.0, 0.7, 1.0, 2.0, math.log(1e4) + 1]
    y = linear_log(x)
    torch.testing.assert_close(y, torch.tensor(by_hand, dtype=torch.float64))
    y.sum().backward()
    inner = torch.tensor([1e-4, 1 / math.e, 1.0, 1.0, 1.0, 1.0, 1.0, 1 / math.e, 1e-4], dtype=torch.float64)
    at_edge = x.detach().abs() == 1  # either side's slope would do
    torch.testing.assert_close(x.grad[~at_edge], inner[~at_edge])


# --- costs ---

NAMES = ("user", "context.hour", "context.rain", "history.category", "item", "item.words", "match", "pair.seen")


def test_costs_by_hand():
    facts = facts_of(rich_space(), NAMES)
    assert [f.kind for f in facts] == ["id", "id", "number", "history", "id", "set", "match", "pair"]
    assert [f.num_keys for f in facts] == [11, 25, 0, 4, 13, 5, 0, 0]
    config = CostConfig(kinds={"set": 3.0}, declared={"pair.seen": 7.0}, compute=2.0, width=0.5, keys=0.1)
    raw = torch.tensor([2 * 1 + 1.1, 2 * 1 + 2.5, 2, 8 + 0.4, 2 + 1.3, 6 + 0.5, 8, 14]) + 0.5 * 4
    torch.testing.assert_close(field_costs(facts, 4, config), raw / raw.mean())


def test_measured_times_stand_in_for_kinds_and_declared_ones_go_before():
    facts = facts_of(rich_space(), NAMES)
    measured = torch.arange(1.0, 9.0)
    cost = field_costs(facts, 4, CostConfig(declared={"item": 100.0}, width=0.0, keys=0.0), measured)
    expected = measured.clone()
    expected[4] = 100
    torch.testing.assert_close(cost, expected / expected.mean())


def test_a_huge_vocabulary_neither_overflows_nor_moves_the_scale():
    facts = [f._replace(num_keys=10**12) if f.name == "user" else f for f in facts_of(rich_space(), NAMES)]
    cost = field_costs(facts, 4, CostConfig())
    assert torch.isfinite(cost).all()
    torch.testing.assert_close(cost.mean(), torch.tensor(1.0))
    gated, paid = gates_at([0.0] * 8)(torch.ones(3, 8, 2), cost)
    assert torch.isfinite(gated).all()
    assert torch.isfinite(paid)


def test_costs_that_can_not_be_are_refused_by_name():
    facts = facts_of(rich_space(), NAMES)
    with pytest.raises(ConfigError, match=r"'itm'.*did you mean item"):
        field_costs(facts, 4, CostConfig(declared={"itm": 1.0}))
    with pytest.raises(ConfigError, match="no field costs anything"):
        field_costs(facts, 4, CostConfig(compute=0.0, width=0.0, keys=0.0))
    with pytest.raises(ConfigError, match="no kind 'crosses'"):
        CostConfig(kinds={"crosses": 1.0})
    with pytest.raises(ConfigError, match="user must be a number from 0 on, got -1"):
        CostConfig(declared={"user": -1.0})
    with pytest.raises(ConfigError, match="budget must be above 0"):
        ChoiceConfig(budget=0.0)
    with pytest.raises(ConfigError, match="temperature must be above 0"):
        GatesConfig(temperature=0.0)


# --- the choice ---


def test_a_budget_is_filled_by_importance_and_what_does_not_fit_is_passed_over():
    importance, cost = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.1]), torch.tensor([3.0, 4.0, 1.0, 2.0, 0.5])
    assert choose(importance, cost, ChoiceConfig(budget=0.5)).tolist() == [True, False, True, False, True]
    assert choose(importance, cost, ChoiceConfig(keep=2)).tolist() == [True, True, False, False, False]
    assert choose(importance, cost, ChoiceConfig(keep=99)).all()
    assert choose(importance, cost, ChoiceConfig(budget=1.0)).all()


def test_the_filled_set_is_the_first_one_in_the_order_of_importance():
    """By brute force: of all sets that fit, the one whose members come first, compared field by field from the most wanted on."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        importance, cost = torch.rand(6, generator=draw), torch.rand(6, generator=draw) + 0.1
        order = importance.argsort(descending=True)
        fitting = [
            bits for bits in itertools.product([True, False], repeat=6)
            if float(cost[order[torch.tensor(bits)]].double().sum()) <= 0.5 * float(cost.double().sum())
        ]  # fmt: skip
        kept = choose(importance, cost, ChoiceConfig(budget=0.5))
        assert tuple(kept[order].tolist()) == max(fitting)


def test_one_of_the_needed_fields_stays():
    importance, cost = torch.tensor([0.9, 0.8, 0.2, 0.1]), torch.tensor([1.0, 1.0, 3.0, 1.0])
    needed = torch.tensor([False, False, True, True])
    assert choose(importance, cost, ChoiceConfig(keep=2), needed).tolist() == [True, False, True, False]
    # The most wanted of them does not fit into 2 of 6, the other does.
    assert choose(importance, cost, ChoiceConfig(budget=2 / 6), needed).tolist() == [True, False, False, True]
    assert choose(importance, cost, ChoiceConfig(keep=2), torch.zeros(4, dtype=torch.bool)).sum() == 2
    with pytest.raises(ConfigError, match=r"allows no field .* takes 0\.167"):
        choose(importance, cost, ChoiceConfig(budget=0.1), needed)


def test_the_choice_tells_what_became_of_each_field():
    choice = FieldChoice(("a", "b", "c"), COST)
    choice.importance_M = torch.tensor([0.05, 0.95, 0.94])
    choice.kept_M = torch.tensor([False, True, False])
    assert [(row.name, row.is_kept) for row in choice.report()] == [("b", True), ("c", False), ("a", False)]
    assert choice.histogram() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 2]
    assert choice.kept_share() == pytest.approx(1 / 3)
    choice.check_names(FieldChoice(("a", "b", "c"), COST).names_utf8)
    with pytest.raises(ValueError, match=r"other fields: \['c', 'd'\]"):
        choice.check_names(FieldChoice(("a", "b", "d"), COST).names_utf8)
