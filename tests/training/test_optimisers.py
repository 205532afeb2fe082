"""Row-wise optimisers against hand-computed steps and torch's own; untouched rows are poisoned."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from shortlist.errors import ConfigError
from shortlist.training.config import TrainerConfig
from shortlist.training.optimisers import RowwiseAdagrad, RowwiseAdam, build_optimisers, clip_gradients, sparse_tables


def sparse_gradient(rows: list[int], values: list[list[float]], num_rows: int) -> Tensor:
    return torch.sparse_coo_tensor(
        torch.tensor([rows]), torch.tensor(values), (num_rows, len(values[0])), check_invariants=True
    )


def test_adagrad_by_hand():
    """Row 2 gets (3, 4) in two parts: mean square 12.5, step lr * g / sqrt(12.5); then again with the sum at 25."""
    table = nn.Parameter(torch.ones(4, 2))
    optimiser = RowwiseAdagrad([table], lr=0.5, eps=0.0)
    for accumulated in (12.5, 25.0):
        expected = table[2].detach() - 0.5 * torch.tensor([3.0, 4.0]) / math.sqrt(accumulated)
        table.grad = sparse_gradient([2, 2], [[1.0, 4.0], [2.0, 0.0]], 4)
        optimiser.step()
        torch.testing.assert_close(table[2].detach(), expected)
        assert optimiser.state[table]["sum"].tolist() == [0, 0, accumulated, 0]


def test_adam_by_hand():
    """At the first step both corrections cancel: m = 0.1 g, v = 0.001 * 12.5, so the step is lr * g / sqrt(12.5)."""
    table = nn.Parameter(torch.zeros(3, 2))
    optimiser = RowwiseAdam([table], lr=0.1, eps=0.0)
    table.grad = sparse_gradient([1], [[3.0, 4.0]], 3)
    optimiser.step()
    torch.testing.assert_close(table[1].detach(), -0.1 * torch.tensor([3.0, 4.0]) / math.sqrt(12.5))
    # Row 0 is first touched at step 2, with the corrections of step 2: m = 0.1 * 2, v = 0.001 * 4.
    table.grad = sparse_gradient([0], [[2.0, 2.0]], 3)
    optimiser.step()
    step = 0.1 * math.sqrt(1 - 0.999**2) / (1 - 0.9**2) * 0.2 / math.sqrt(0.004)
    torch.testing.assert_close(table[0].detach(), torch.tensor([-step, -step]))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(RowwiseAdam, torch.optim.SparseAdam), (RowwiseAdagrad, torch.optim.Adagrad)],
    ids=["adam", "adagrad"],
)
def test_agrees_with_torch_at_width_one(ours, theirs):
    """With one number per row, the row's scalar is the element's: torch's rule."""
    torch.manual_seed(0)
    tables = [nn.Embedding(20, 1, sparse=True) for _ in range(2)]
    tables[1].load_state_dict(tables[0].state_dict())
    optimisers = [ours(tables[0].parameters(), lr=0.05), theirs(tables[1].parameters(), lr=0.05)]
    for _ in range(30):
        ids = torch.randint(0, 20, (7,))
        for table, optimiser in zip(tables, optimisers):
            optimiser.zero_grad()
            (table(ids) - 1).square().sum().backward()
            optimiser.step()
    torch.testing.assert_close(tables[0].weight, tables[1].weight)


@pytest.mark.parametrize("bag", [False, True], ids=["embedding", "bag"])
@pytest.mark.parametrize("rule", [RowwiseAdam, RowwiseAdagrad])
def test_an_untouched_row_is_neither_read_nor_written(rule, bag):
    """Poison in all other rows and their state must not reach the touched ones, and must stay as it is, to the bit."""

    def trained(poison: bool) -> tuple[Tensor, dict[str, Tensor], Tensor, dict[str, Tensor]]:
        torch.manual_seed(1)
        table = nn.EmbeddingBag(50, 4, sparse=True, mode="sum") if bag else nn.Embedding(50, 4, sparse=True)
        optimiser = rule(table.parameters(), lr=0.1)
        touched = torch.tensor([3, 7, 7, 31])

        def step(ids: Tensor) -> None:
            optimiser.zero_grad()
            out = table(ids[None]) if bag else table(ids)
            (out * torch.arange(1.0, 5.0)).square().sum().backward()
            optimiser.step()

        step(torch.arange(50))
        others = torch.ones(50, dtype=torch.bool)
        others[touched] = False
        state = optimiser.state[table.weight]
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        if poison:
            with torch.no_grad():
                for tensor in (table.weight, *tensors.values()):
                    tensor[others] = math.nan
        before = {"weight": table.weight.detach().clone(), **{name: value.clone() for name, value in tensors.items()}}
        for _ in range(3):
            step(touched)
        return others, before, table.weight.detach(), tensors

    others, before, weight, state = trained(poison=True)
    _, _, clean_weight, clean_state = trained(poison=False)
    for name, after, clean in [("weight", weight, clean_weight), *((n, state[n], clean_state[n]) for n in state)]:
        assert torch.equal(after[others].view(torch.int32), before[name][others].view(torch.int32)), name
        assert torch.equal(after[~others], clean[~others]), name
        assert not torch.equal(after[~others], before[name][~others]), name


def test_a_dense_gradient_is_refused_by_size():
    table = nn.Parameter(torch.ones(4, 2))
    table.grad = torch.ones(4, 2)
    with pytest.raises(ConfigError, match=r"\(4, 2\) got a dense gradient.*sparse = false"):
        RowwiseAdam([table]).step()


@pytest.mark.parametrize("settings", [{"lr": 0.0}, {"betas": (0.9, 1.0)}])
def test_adam_refuses_unusable_settings(settings):
    with pytest.raises(ConfigError):
        RowwiseAdam([nn.Parameter(torch.ones(2, 2))], **settings)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 2, sparse=True)
        self.bag = nn.EmbeddingBag(6, 2, sparse=True)
        self.dense_table = nn.Embedding(6, 2)
        self.tied = nn.Embedding(6, 2, sparse=True)
        self.tied.weight = self.table.weight
        self.linear = nn.Linear(2, 1)


def test_parameters_are_split_by_sparseness():
    system = Mixed()
    dense, sparse = build_optimisers(system, TrainerConfig(lr=0.1, table_lr=0.2, weight_decay=0.3))
    assert isinstance(dense, torch.optim.AdamW)
    assert isinstance(sparse, RowwiseAdam)
    of = {name: id(p) for name, p in system.named_parameters()}
    decayed, free = ({id(p) for p in group["params"]} for group in dense.param_groups)
    assert decayed == {of["dense_table.weight"], of["linear.weight"]}
    assert free == {of["linear.bias"]}
    assert [group["weight_decay"] for group in dense.param_groups] == [0.3, 0.0]
    assert [id(p) for p in sparse.param_groups[0]["params"]] == [of["table.weight"], of["bag.weight"]]
    assert (dense.param_groups[0]["lr"], sparse.param_groups[0]["lr"]) == (0.1, 0.2)
    assert len(sparse_tables(system)) == 2


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("adamw", torch.optim.AdamW),
        ("adam", torch.optim.Adam),
        ("adagrad", torch.optim.Adagrad),
        ("sgd", torch.optim.SGD),
    ],
)
def test_dense_optimiser_by_name_steps(name, cls):
    linear = nn.Linear(3, 1)
    (optimiser,) = build_optimisers(linear, TrainerConfig(optimiser=name, lr=0.1))
    assert type(optimiser) is cls
    before = linear.weight.detach().clone()
    linear(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    # The gradient is 1 everywhere, so all these rules move by about lr at the first step.
    torch.testing.assert_close(linear.weight.detach(), before - 0.1, atol=1e-5, rtol=0)


def test_nothing_to_train_is_refused():
    linear = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ConfigError, match="Linear has no parameter to train"):
        build_optimisers(linear, TrainerConfig())


def test_clipping_scales_dense_and_sparse_together():
    """Gradients (3) and rows (0, 4 in two parts): norm 5, scaled to 1."""
    dense, table = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(5, 2))
    dense.grad = torch.tensor([3.0])
    table.grad = sparse_gradient([4, 4], [[0.0, 1.0], [0.0, 3.0]], 5)
    norm = clip_gradients([dense, table, nn.Parameter(torch.ones(1))], 1.0)
    assert norm.item() == pytest.approx(5.0)
    torch.testing.assert_close(dense.grad, torch.tensor([0.6]))
    torch.testing.assert_close(table.grad.to_dense()[4], torch.tensor([0.0, 0.8]))
    assert clip_gradients([dense], 10.0).item() == pytest.approx(0.6)
    torch.testing.assert_close(dense.grad, torch.tensor([0.6]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "lr must be above 0"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"clip_norm": -1.0}, "clip_norm must be above 0"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"lr": math.nan}, "lr must be above 0"),
    ],
)
def test_trainer_settings_are_checked(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainerConfig(**settings)
