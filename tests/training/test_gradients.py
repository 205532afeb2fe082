"""Gradient rules: closed forms for two tasks, promises on random sets (hypothesis), and the trainer that applies them."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from training_toys import Toy, ToyConfig, chain_view, make, score_of, train

from shortlist.errors import ConfigError
from shortlist.registry import systems
from shortlist.training.config import RuleChoice, TrainerConfig
from shortlist.training.gradients.base import backward, make_rule, stacked
from shortlist.training.gradients.solvers import on_simplex
from shortlist.training.gradients.sum import Sum, SumConfig

RULES = [entry.name for entry in systems(kind="gradient-rule")]
seeds = st.integers(0, 2**32 - 1)


def rule_of(name, **given):
    """The rule, also of the plain sum, for which the trainer needs none."""
    return make_rule(RuleChoice(rule=name, settings=given)) or Sum(SumConfig())


def drawn(seed, num_tasks=None, width=40):
    """float64 [T, P]: gradients of very different lengths around a common direction of random strength."""
    rng = np.random.default_rng(seed)
    num_tasks = num_tasks or int(rng.integers(2, 6))
    own, common = rng.normal(size=(num_tasks, width)), rng.normal(size=width)
    return (own + rng.uniform(-1, 1) * common) * 10 ** rng.uniform(-2, 2, (num_tasks, 1))


def combined(name, gradient_TP, **given):
    torch.manual_seed(0)
    return rule_of(name, **given).coefficients(gradient_TP @ gradient_TP.T) @ gradient_TP


def unit(v):
    return v / np.linalg.norm(v)


def test_all_rules_are_registered():
    assert sorted(["sum", "pcgrad", "gradvac", "cagrad", "mgda", "imtl-g", "nash-mtl", "gradops"]) == RULES


# --- promises on random sets ---


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_equal_gradients_give_their_mean(name, seed):
    gradient = drawn(seed, 1)
    for num_tasks in (1, 2, 4):
        np.testing.assert_allclose(combined(name, np.repeat(gradient, num_tasks, 0)), gradient[0], rtol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_a_task_without_a_gradient_does_not_count(name):
    gradient_TP = drawn(3, 3)
    with_none = np.insert(gradient_TP, 1, 0.0, axis=0)
    np.testing.assert_allclose(combined(name, with_none) * 4, combined(name, gradient_TP) * 3)
    assert not combined(name, np.zeros((3, 5))).any()


@settings(max_examples=200, deadline=None)
@given(seed=seeds, alpha=st.sampled_from([-3.0, -1.0, 0.0, 2.0]))
def test_gradops_is_never_in_conflict(seed, alpha):
    gradient_TP = drawn(seed)
    step = combined("gradops", gradient_TP, alpha=alpha)
    cosine = gradient_TP @ step / np.linalg.norm(gradient_TP, axis=1) / np.linalg.norm(step)
    assert cosine.min() > -1e-9


@settings(max_examples=50, deadline=None)
@given(seed=seeds)
def test_gradops_projects_off_the_whole_span(seed):
    """Against a basis made by QR; nothing is left of a gradient that the others span."""
    gradient_TP = drawn(seed)
    expected = gradient_TP.copy()
    for i, g in enumerate(gradient_TP):
        if (gradient_TP @ g < 0).any():
            basis, _ = np.linalg.qr(np.delete(gradient_TP, i, 0).T)
            expected[i] = g - basis @ (basis.T @ g)
    np.testing.assert_allclose(combined("gradops", gradient_TP), expected.mean(0), atol=1e-7 * abs(gradient_TP).max())
    flat = np.array([[1.0, 0], [-1, 1], [0, -1.0]])
    assert abs(combined("gradops", flat)).max() < 1e-12


def test_other_rules_do_conflict_on_some_sets():
    """So the test above is not empty: with three tasks the sum, PCGrad and GradVac leave conflicts, MGDA and CAGrad near 1 do not."""
    found = dict.fromkeys(RULES, 0)
    for seed in range(200):
        gradient_TP = drawn(seed, 3, 4)
        for name in RULES:
            step = combined(name, gradient_TP)
            found[name] += bool((gradient_TP @ step < -1e-8 * np.linalg.norm(step) * abs(gradient_TP).max()).any())
    assert min(found["sum"], found["pcgrad"], found["gradvac"]) > 10, found
    assert found["gradops"] == found["mgda"] == 0, found


@settings(max_examples=50, deadline=None)
@given(seed=seeds)
def test_mgda_s_point_is_the_shortest(seed):
    """At the minimum-norm point p of a convex hull, p.g_i >= |p|^2 for all i."""
    gradient_TP = drawn(seed)
    point = combined("mgda", gradient_TP)
    assert (gradient_TP @ point).min() >= point @ point - 1e-7 * abs(gradient_TP @ gradient_TP.T).max()
    shortest = min(point @ point, 1e300)
    for w in np.random.default_rng(seed).dirichlet(np.ones(len(gradient_TP)), 50):
        assert (w @ gradient_TP) @ (w @ gradient_TP) >= shortest * (1 - 1e-7)


@settings(max_examples=50, deadline=None)
@given(seed=seeds, c=st.sampled_from([0.1, 0.4, 0.9]))
def test_cagrad_is_the_best_for_the_worst_off(seed, c):
    """Against random directions in the ball around the mean gradient; and its worst gain equals the dual's value."""
    rng = np.random.default_rng(seed)
    gradient_TP = rng.normal(size=(3, 4))
    mean = gradient_TP.mean(0)
    step = combined("cagrad", gradient_TP, c=c) * (1 + c)
    radius = c * np.linalg.norm(mean)
    assert np.linalg.norm(step - mean) <= radius * (1 + 1e-9)
    best = (gradient_TP @ step).min()
    others = rng.normal(size=(2000, 4))
    others = mean + radius * others / np.linalg.norm(others, axis=1, keepdims=True)
    assert best >= (others @ gradient_TP.T).min(1).max() - 1e-9
    weights = rng.dirichlet(np.ones(3), 500)
    dual = weights @ (gradient_TP @ mean) + radius * np.linalg.norm(weights @ gradient_TP, axis=1)
    assert best <= dual.min() + 1e-9


@settings(max_examples=50, deadline=None)
@given(seed=seeds)
def test_imtl_projects_alike_on_every_task(seed):
    gradient_TP = drawn(seed, width=60)
    along = np.array([unit(g) for g in gradient_TP]) @ combined("imtl-g", gradient_TP)
    np.testing.assert_allclose(along, along[0], rtol=1e-6, atol=1e-9 * abs(gradient_TP).max())


@settings(max_examples=50, deadline=None)
@given(seed=seeds)
def test_nash_solves_its_equation(seed):
    gradient_TP = drawn(seed)
    gram_TT = gradient_TP @ gradient_TP.T
    weight_T = rule_of("nash-mtl").coefficients(gram_TT)
    a_T = weight_T / np.sqrt(weight_T @ gram_TT @ weight_T / len(gram_TT))  # the solution has a'Ma = T
    np.testing.assert_allclose(gram_TT @ a_T, 1 / a_T, rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=seeds)
def test_the_simplex_solver_against_a_fine_grid(seed):
    rng = np.random.default_rng(seed)
    gradient_TP, slope_T, radius = rng.normal(size=(3, 3)), rng.normal(size=3), float(rng.uniform(0, 2))
    gram_TT = gradient_TP @ gradient_TP.T
    grid = np.array([(i, j, 60 - i - j) for i in range(61) for j in range(61 - i)]) / 60
    length = np.sqrt(np.einsum("ni,ij,nj->n", grid, gram_TT, grid))
    found = on_simplex(gram_TT)
    assert found @ gram_TT @ found <= (length**2).min() + 1e-9
    found = on_simplex(gram_TT, slope_T, radius)
    assert (
        slope_T @ found + radius * np.sqrt(found @ gram_TT @ found) <= (grid @ slope_T + radius * length).min() + 1e-9
    )
    assert found.min() >= 0
    assert found.sum() == pytest.approx(1)


# --- two tasks, by hand ---

CONFLICT = np.array([[3.0, 0.0, 0.0], [-1.0, 1.0, 0.0]])
FRIENDS = np.array([[2.0, 0.0, 0.0], [1.0, 1.0, 0.0]])


def test_two_tasks_in_closed_form():
    g, h = CONFLICT
    expected = g - (g @ h) / (h @ h) * h + h - (g @ h) / (g @ g) * g
    np.testing.assert_allclose(combined("pcgrad", CONFLICT) * 2, expected)
    np.testing.assert_allclose(combined("gradops", CONFLICT) * 2, expected)
    np.testing.assert_allclose(combined("pcgrad", FRIENDS) * 2, FRIENDS.sum(0))
    np.testing.assert_allclose(combined("gradops", FRIENDS) * 2, FRIENDS.sum(0))
    share = (h - g) @ h / ((g - h) @ (g - h))  # the foot of the perpendicular from 0 on the segment
    np.testing.assert_allclose(combined("mgda", CONFLICT), share * g + (1 - share) * h)
    np.testing.assert_allclose(combined("mgda", FRIENDS), FRIENDS[1])  # the foot lies at the end
    middle = unit(unit(g) + unit(h))
    np.testing.assert_allclose(unit(combined("imtl-g", CONFLICT)), middle)
    np.testing.assert_allclose(unit(combined("nash-mtl", CONFLICT)), middle)
    for name in ("imtl-g", "nash-mtl"):
        assert rule_of(name).coefficients(CONFLICT @ CONFLICT.T).sum() == pytest.approx(1)
    angles = np.linspace(0, 2 * np.pi, 200_001)
    ball = CONFLICT.mean(0) + 0.5 * np.linalg.norm(CONFLICT.mean(0)) * np.stack(
        [np.cos(angles), np.sin(angles), 0 * angles], 1
    )
    best = ball[(ball @ CONFLICT.T).min(1).argmax()]
    np.testing.assert_allclose(combined("cagrad", CONFLICT, c=0.5) * 1.5, best, atol=1e-4)
    np.testing.assert_allclose(combined("cagrad", CONFLICT, c=0.0), CONFLICT.mean(0))


def test_mgda_by_direction():
    for factor in (1.0, 100.0):
        step = combined("mgda", CONFLICT * [[1.0], [factor]], unit=True)
        np.testing.assert_allclose(unit(step), unit(unit(CONFLICT[0]) + unit(CONFLICT[1])))


def test_gradvac_raises_the_cosine_to_the_usual_one():
    rule = rule_of("gradvac", decay=0.5, by="model")
    gram_TT = CONFLICT @ CONFLICT.T
    cosine = unit(CONFLICT[0]) @ unit(CONFLICT[1])
    np.testing.assert_allclose(
        rule.coefficients(gram_TT) @ CONFLICT, combined("pcgrad", CONFLICT)
    )  # the usual cosine is 0
    assert rule.usual[0][0, 1] == pytest.approx(0.5 * cosine)
    again = make_rule(RuleChoice(rule="gradvac", settings={"decay": 0.5, "by": "model"}))
    again.load_state({"0": [[0.0, 0.6], [0.6, 0.0]]})
    torch.manual_seed(0)
    mixed = again.coefficients(gram_TT) * 2
    # By symmetry the step is a combination of both turned gradients, each with cosine 0.6 to the other.
    turned = []
    for own, other in (CONFLICT, CONFLICT[::-1]):
        gain = np.linalg.norm(own) * (0.6 * np.sqrt(1 - cosine**2) - cosine * 0.8) / (np.linalg.norm(other) * 0.8)
        turned.append(own + gain * other)
        assert unit(turned[-1]) @ unit(other) == pytest.approx(0.6)
    np.testing.assert_allclose(mixed @ CONFLICT, sum(turned))


def test_gradops_trade_off():
    """Weights by hand: two friends, gains r = (2 + 1/2 ... ) as the formula says; alpha moves the step towards one of them."""
    gain = FRIENDS.sum(0) @ FRIENDS.T / (FRIENDS**2).sum(1)
    for alpha in (-3.0, -1.0, 0.0, 2.0):
        weight = (gain / gain.mean()) ** alpha
        expected = weight / weight.mean() @ FRIENDS
        np.testing.assert_allclose(combined("gradops", FRIENDS, alpha=alpha) * 2, expected)
    assert gain[1] > gain[0]
    down, up = (combined("gradops", FRIENDS, alpha=a)[1] for a in (-1.0, 1.0))
    assert down < up  # the second gains more, so alpha above 0 favours it


def test_gradops_off_the_conflicting_alone():
    """The third gradient conflicts with nobody: it stays in the first one's projection."""
    gradient_TP = np.array([[1.0, 0, 0], [-1, 1, 0], [1, 0, 1.0]])
    step = combined("gradops", gradient_TP, span="conflicting") * 3
    first = gradient_TP[0] + 0.5 * gradient_TP[1]
    second = gradient_TP[1].copy()
    basis, _ = np.linalg.qr(gradient_TP[[0, 2]].T)
    second -= basis @ (basis.T @ second)
    third = gradient_TP[2] + 0.5 * gradient_TP[1]
    np.testing.assert_allclose(step, first + second + third)


# --- settings ---


@pytest.mark.parametrize(
    ("choice", "word"),
    [
        (RuleChoice(rule="gradop"), "gradops"),
        (RuleChoice(rule="dnn"), "gradient rule"),
        (RuleChoice(rule="cagrad", settings={"c": 1.5}), "c must be"),
        (RuleChoice(rule="cagrad", settings={"c": "much"}), "c"),
        (RuleChoice(rule="gradops", settings={"beta": 1}), "alpha"),
        (RuleChoice(rule="gradvac", settings={"by": "layer"}), "by"),
        (RuleChoice(rule="nash-mtl", settings={"every": 0}), "every"),
    ],
)
def test_wrong_choices_are_refused_by_name(choice, word):
    with pytest.raises(ConfigError, match=word):
        make_rule(choice)


# --- on a model ---


@dataclass(frozen=True, kw_only=True)
class TwoTasksConfig(ToyConfig):
    sparse: bool = True


class TwoTasks(Toy):
    """The toy with a second map that predicts the event after next from the same vectors: its own parameters, a shared sparse table."""

    Config = TwoTasksConfig

    def __init__(self, config, space):
        super().__init__(config, space)
        self.other = nn.Linear(config.dim, space.num_items + 1)

    def losses(self, batch):
        items = batch.targets.items
        vector = self.drop(self.table(batch.history.items.values[batch.targets.position]))[items.row_of_value]
        after = items.values % 11 + 1
        nll = nn.functional.cross_entropy
        return {"next": nll(self.out(vector), items.values), "after": nll(self.other(vector), after)}

    def shared_parameters(self):
        return [self.table.weight]


def two_tasks():
    view = chain_view()
    torch.manual_seed(3)
    return TwoTasks(TwoTasksConfig(), view.space), view


def batch_of(view):
    from shortlist.training.sources import NextEventSource

    return next(NextEventSource(view, batch_size=16, max_history=6, seed=0).batches(0))


@pytest.mark.parametrize("name", RULES)
def test_only_shared_parameters_are_touched(name):
    """Against autograd, task by task: own gradients stay as they are, the table's is the combination of its touched rows."""
    model, view = two_tasks()
    model.eval()
    batch = batch_of(view)
    by_task = {}
    for task, loss in model.losses(batch).items():
        model.zero_grad()
        loss.backward(retain_graph=True)
        by_task[task] = {n: p.grad.to_dense() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    noted = backward(rule_of(name), model.losses(batch), model.shared_parameters())
    torch.testing.assert_close(model.out.weight.grad, by_task["next"]["out.weight"])
    torch.testing.assert_close(model.other.bias.grad, by_task["after"]["other.bias"])
    table = model.table.weight.grad
    assert table.is_sparse
    matrix = torch.stack([by_task[task]["table.weight"].flatten() for task in ("next", "after")]).double().numpy()
    expected = combined(name, matrix) * 2
    np.testing.assert_allclose(table.to_dense().flatten().numpy(), expected, atol=1e-6)
    touched = set(batch.history.items.values[batch.targets.position].tolist())
    assert set(table.coalesce().indices()[0].tolist()) <= touched
    assert float(noted["conflicts"]) == float(matrix[0] @ matrix[1] < 0)


def test_rows_touched_by_one_task_are_zero_for_the_other():
    table = nn.Parameter(torch.zeros(6, 2))
    one = torch.sparse_coo_tensor([[1, 4, 1]], torch.tensor([[1.0, 2], [3, 4], [10, 20]]), (6, 2))
    two = torch.sparse_coo_tensor([[4, 5]], torch.tensor([[5.0, 6], [7, 8]]), (6, 2))
    block = stacked(table, [one, None, two])
    assert block.rows_m.tolist() == [1, 4, 5]
    assert block.matrix_TP.tolist() == [[11, 22, 3, 4, 0, 0], [0] * 6, [0, 0, 5, 6, 7, 8]]
    block.set(torch.tensor([1.0, 9.0, 0.5]))
    dense = torch.zeros(6, 2)
    dense[[1, 4, 5]] = torch.tensor([[11.0, 22], [5.5, 7], [3.5, 4]])
    assert torch.equal(table.grad.to_dense(), dense)
    assert stacked(table, [None, None]) is None
    whole = stacked(table, [one, torch.ones(6, 2)])  # a table that one task reads whole
    assert whole.rows_m is None
    assert whole.matrix_TP.shape == (2, 12)


def test_products_are_summed_in_double(monkeypatch):
    from shortlist.training.gradients import base

    monkeypatch.setattr(base, "COLUMNS_AT_ONCE", 3)
    gradients = [torch.randn(10, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    matrix = torch.stack(gradients).double()
    torch.testing.assert_close(stacked(nn.Parameter(torch.zeros(10)), gradients).gram(), matrix @ matrix.T)


CONFIG = TrainerConfig(epochs=3, batch_size=16, lr=0.02, table_lr=0.05, device="cpu", seed=5, checkpoint_seconds=0)


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_plain_sum_is_what_training_always_did():
    """The named sum, a rule whose weights are all 1, and no rule at all: the same weights to rounding."""
    trained = []
    for choice in (RuleChoice(), RuleChoice(rule="cagrad", settings={"c": 0.0})):
        model, view = two_tasks()
        report = train(model, view, replace(CONFIG, gradients=choice))
        trained.append(weights_of(model))
    assert "conflicts" in report.curve[0].losses
    for name, tensor in trained[0].items():
        torch.testing.assert_close(tensor, trained[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["gradvac", "nash-mtl", "pcgrad"])
def test_a_stopped_training_goes_on_with_the_same_bits(name, tmp_path):
    """Rules with state and rules with draws: stopped by time after some steps, then resumed, against one that was not stopped."""
    given = {"nash-mtl": {"every": 5}}.get(name, {})
    config = replace(CONFIG, gradients=RuleChoice(rule=name, settings=given))
    whole, view = two_tasks()
    train(whole, view, config)
    stopped, _ = two_tasks()
    pauses = iter([0.0] * 6 + [10.0] * 1000)
    losses, clock = stopped.losses, {"now": 0.0}

    def counted(batch):
        clock["now"] += next(pauses)
        return losses(batch)

    def now():
        clock["now"] += 1e-3
        return clock["now"]

    import shortlist.training.trainer as trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stopped, "losses", counted)
        patch.setattr(trainer.time, "monotonic", now)
        report = train(stopped, view, replace(config, max_seconds=5.0), folder=tmp_path)
    assert 0 < report.steps < 12
    resumed, _ = two_tasks()
    train(resumed, view, config, folder=tmp_path)
    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[key]), key


def test_task_weights_and_their_decay():
    """A weight of 2 doubles a task's part of the loss; with decay the third epoch has weight 2 x 0.5^2."""
    base, view = two_tasks()
    base.drop.p = 0.0
    still = replace(CONFIG, lr=1e-12, table_lr=1e-12)
    plain = train(base, view, still).curve
    model, _ = two_tasks()
    model.drop.p = 0.0
    curve = train(model, view, replace(still, task_weights=(2.0, 1.0), task_decay=(0.5, 1.0))).curve
    for epoch, (before, after) in enumerate(zip(plain, curve)):
        assert after.losses["next"] == pytest.approx(before.losses["next"] * 2 * 0.5**epoch, rel=1e-4)
        assert after.losses["after"] == pytest.approx(before.losses["after"], rel=1e-4)
    with pytest.raises(ConfigError, match="task_weights"):
        train(two_tasks()[0], view, replace(CONFIG, task_weights=(1.0, 2.0, 3.0)))
    with pytest.raises(ConfigError, match="above 0"):
        TrainerConfig(task_decay=(0.0,))


def test_a_system_with_one_loss_needs_no_rule():
    """The same bits with and without one, and settings that were never set do not stand in a checkpoint's."""
    ends = []
    for choice in (RuleChoice(), RuleChoice(rule="gradops")):
        toy, view = make()
        train(toy, view, replace(CONFIG, gradients=choice), validate=score_of)
        ends.append(toy.state_dict())
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    assert not {"gradients", "task_weights", "task_decay"} & TrainerConfig().deciding().keys()
    assert replace(CONFIG, gradients=RuleChoice(rule="mgda")).deciding()["gradients"] == {
        "rule": "mgda",
        "settings": {},
    }
