"""Towers: shapes, hand-computed activations, FLOPs against PyTorch's own counter, rows that do not see each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from shortlist.errors import ConfigError
from shortlist.layers.towers import MLP, Dice, PReLU, RowNorm, make_activation, mlp_flops


def test_mlp_is_the_chain_of_maps_written_out():
    torch.manual_seed(0)
    mlp = MLP(3, (4, 2), 1)
    first, second, last = (m for m in mlp.layers if isinstance(m, torch.nn.Linear))
    x = torch.randn(5, 7, 3)
    by_hand = x @ first.weight.T + first.bias
    by_hand = by_hand.clamp(min=0) @ second.weight.T + second.bias
    by_hand = by_hand.clamp(min=0) @ last.weight.T + last.bias
    torch.testing.assert_close(mlp(x), by_hand)
    assert mlp.out_width == 1


def test_without_out_width_the_last_hidden_layer_is_the_output():
    mlp = MLP(3, (4, 2))
    assert mlp.out_width == 2
    assert mlp(torch.randn(6, 3)).min() >= 0  # it ends in a ReLU


def test_flops_are_what_torch_counts():
    mlp = MLP(10, (8, 4), 1)
    with FlopCounterMode(display=False) as counter:
        mlp(torch.randn(3, 10))
    assert mlp.flops_per_row * 3 == counter.get_total_flops()
    assert mlp_flops([10, 8, 4, 1]) == 2 * (80 + 32 + 4)


def test_dice_by_hand():
    dice = Dice(1)
    with torch.no_grad():
        dice.slope.fill_(0.5)
    x = torch.tensor([[-1.0], [1.0]])  # mean 0, variance 1: the gate is sigmoid(x)
    gate = [1 / (1 + math.exp(1)), 1 / (1 + math.exp(-1))]
    expected = [-gate[0] - 0.5 * (1 - gate[0]), gate[1] + 0.5 * (1 - gate[1])]
    torch.testing.assert_close(dice(x).flatten(), torch.tensor(expected))


def test_dice_follows_the_data_and_uses_running_statistics_after_training():
    torch.manual_seed(0)
    dice = Dice(2)
    for _ in range(200):
        dice(torch.randn(500, 2) * torch.tensor([1.0, 3.0]) + torch.tensor([5.0, -2.0]))
    dice.eval()
    at_mean = dice(torch.tensor([[5.0, -2.0]]))
    torch.testing.assert_close(at_mean, torch.tensor([[2.5, -1.0]]), atol=0.1, rtol=0)  # gate 1/2, slope 0


def test_prelu_acts_on_the_last_dimension():
    prelu = PReLU(2)
    with torch.no_grad():
        prelu.slope.copy_(torch.tensor([0.1, 0.2]))
    x = torch.tensor([[[-1.0, -1.0], [2.0, -3.0]]])
    torch.testing.assert_close(prelu(x), torch.tensor([[[-0.1, -0.2], [2.0, -0.6]]]))


@pytest.mark.parametrize("num_rows", [0, 1])
@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
def test_tiny_batches_train(num_rows, norm):
    mlp = MLP(3, (4,), 1, activation="dice", norm=norm).train()
    out = mlp(torch.randn(num_rows, 3))
    assert out.shape == (num_rows, 1)
    assert out.isfinite().all()


def test_batch_norm_statistics_are_over_all_rows():
    torch.manual_seed(0)
    x = torch.randn(4, 5, 3) * 7 + 2
    y = RowNorm(3).train()(x)
    torch.testing.assert_close(y.flatten(0, 1).mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.flatten(0, 1).std(0, correction=0), torch.ones(3), atol=1e-4, rtol=0)


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "sigmoid", "prelu", "dice"])
@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
def test_a_row_does_not_depend_on_its_neighbours_after_training(activation, norm):
    torch.manual_seed(0)
    mlp = MLP(3, (4, 4), 2, activation=activation, norm=norm, dropout=0.3)
    mlp(torch.randn(50, 3))
    mlp.eval()
    x = torch.randn(6, 3)
    torch.testing.assert_close(mlp(x), torch.cat([mlp(row) for row in x.split(1)]))


def test_dropout_only_in_training():
    torch.manual_seed(0)
    mlp = MLP(3, (64,), dropout=0.5)
    x = torch.randn(200, 3)
    mlp.eval()
    kept = mlp(x)
    mlp.train()
    dropped = mlp(x)
    is_active = kept > 0
    assert (dropped[is_active] == 0).float().mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"in_width": 3, "widths": ()}, "at least one layer"),
        ({"in_width": 0, "widths": (2,)}, "widths of 1 or more"),
        ({"in_width": 3, "widths": (2,), "dropout": 1.0}, "dropout"),
        ({"in_width": 3, "widths": (2,), "activation": "tanh"}, "no activation named 'tanh'"),
        ({"in_width": 3, "widths": (2,), "norm": "group"}, "no norm named 'group'"),
    ],
)
def test_bad_settings_say_what_to_do(arguments, words):
    with pytest.raises(ConfigError, match=words):
        MLP(**arguments)


def test_make_activation_knows_every_name():
    assert {type(make_activation(name, 2)).__name__ for name in ("relu", "silu", "gelu", "prelu", "dice")} == {
        "ReLU",
        "SiLU",
        "GELU",
        "PReLU",
        "Dice",
    }
