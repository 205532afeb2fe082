"""Generated weights: products and formulas, what they cost, how they start."""

import pytest
import torch
from torch import nn

from shortlist.errors import ConfigError
from shortlist.layers.adaptive import AdaptiveLinear, APGConfig
from shortlist.layers.towers import MLP

MODES = [
    APGConfig(mode="static", rank=3),
    APGConfig(mode="shared", rank=3),
    APGConfig(mode="shared", rank=3, over=9),
    APGConfig(mode="generated", rank=3),
    APGConfig(mode="whole"),
    APGConfig(mode="shared", rank=3, generate_bias=True),
]


def layer(config: APGConfig, *, norm: bool = False, shaken: bool = True) -> AdaptiveLinear:
    torch.manual_seed(0)
    made = AdaptiveLinear(6, 5, config, 6, bias=True, norm=norm).double()
    if shaken and made.generator is not None:
        nn.init.normal_(made.generator.weight)
    return made


@pytest.mark.parametrize("config", MODES, ids=lambda c: f"{c.mode}-{c.over}-{c.generate_bias}")
def test_factor_by_factor_is_the_whole_product(config):
    made, x = layer(config), torch.randn(8, 6, dtype=torch.float64)
    whole = torch.einsum("rn,rnm->rm", x, made.whole_weights(x))
    bias = made.generated(x)[-1] if config.generate_bias else made.bias
    torch.testing.assert_close(made(x), whole + bias)


def test_shared_by_hand():
    made = AdaptiveLinear(2, 2, APGConfig(mode="shared", rank=1), 2, bias=True, norm=False)
    with torch.no_grad():
        made.left[0].copy_(torch.tensor([[1.0], [2.0]]))
        made.right[0].copy_(torch.tensor([[3.0, -1.0]]))
        made.generator.weight.copy_(torch.tensor([[0.5, 0.0]]))
        made.generator.bias.fill_(1.0)
        made.bias.copy_(torch.tensor([0.0, 10.0]))
    # x U = 4 + 2 = 6, S = 1 + 0.5 * 4 = 3, times V
    torch.testing.assert_close(made(torch.tensor([[4.0, 1.0]])), torch.tensor([[54.0, -8.0]]))


@pytest.mark.parametrize("config", MODES[1:], ids=lambda c: f"{c.mode}-{c.over}-{c.generate_bias}")
def test_it_starts_as_a_layer_that_ignores_the_condition_and_still_learns_it(config):
    made, x = layer(config, shaken=False), torch.randn(8, 6, dtype=torch.float64)
    first, other = made(x, torch.randn_like(x)), made(x, torch.randn_like(x))
    torch.testing.assert_close(first, other)
    assert first.std() > 0.1  # alive, whatever the condition
    first.square().sum().backward()
    assert made.generator.weight.grad.abs().max() > 1e-3


def test_tiny_embeddings_do_not_kill_it():
    """With weights of 1e-4 and factors that all start small, nothing would come through."""
    made = layer(APGConfig(mode="shared", rank=3), shaken=False)
    plain = nn.Linear(6, 5, bias=False).double()
    nn.init.xavier_normal_(plain.weight)
    x = 1e-4 * torch.randn(400, 6, dtype=torch.float64)
    assert made(x).std() > 0.2 * plain(x).std()


def test_folded_factors_give_the_same_and_are_dropped_when_training_goes_on():
    made, x = layer(APGConfig(mode="shared", rank=3, over=9)), torch.randn(8, 6, dtype=torch.float64)
    unfolded = made(x)
    made.eval()
    with torch.no_grad():
        torch.testing.assert_close(made(x), unfolded, rtol=1e-5, atol=1e-5)
        kept = made._kept
        assert made.shared_factors()[0] is kept[0]
        made.train()
        made.left[0].mul_(2)
        made.eval()
        torch.testing.assert_close(made(x) - made.bias, 2 * (unfolded - made.bias))


def test_parameters_are_those_of_the_formula():
    """K^2 Z + N K + K M, the generator's bias K^2 and the layer's M."""
    made = AdaptiveLinear(1024, 512, APGConfig(mode="shared", rank=4), 32, bias=True, norm=False)
    counted = sum(p.numel() for p in made.parameters())
    assert counted == 16 * 32 + 4 * 1024 + 4 * 512 + 16 + 512
    assert 16 * 32 + 4 * (1024 + 512) == 6_656  # the paper's example
    assert made.flops_per_row == 2 * (4 * 1536 + 16 + 16 * 32)
    wide = AdaptiveLinear(1024, 512, APGConfig(mode="shared", rank=4, generate_bias=True), 32, bias=True, norm=False)
    assert sum(p.numel() for p in wide.parameters()) - counted == 512 * 32  # M Z more; the biases change places


def test_tower_with_a_condition_of_its_own():
    torch.manual_seed(0)
    tower = MLP(
        6, (5, 4), 1, apg=APGConfig(mode="shared", rank=2, condition="group", fields=("user",)), condition_width=3
    )
    x, z = torch.randn(7, 6), torch.randn(7, 3)
    for made in tower.layers:
        if isinstance(made, AdaptiveLinear):
            nn.init.normal_(made.generator.weight)
    same = tower.gated(x, None, z[:1].expand(7, 3))
    assert not torch.allclose(same[1:], tower.gated(x, None, z)[1:])
    torch.testing.assert_close(same[0], tower.gated(x, None, z)[0])
    assert isinstance(tower.layers[-1], nn.Linear)  # the output layer stays an ordinary one
    assert tower.flops_per_row == sum(m.flops_per_row for m in tower.layers if isinstance(m, AdaptiveLinear)) + 2 * 4


def test_self_conditions_of_later_layers_do_not_grow_with_their_input():
    tower = MLP(6, (6, 6), 1, apg=APGConfig(mode="shared", rank=2))
    first, second = [m for m in tower.layers if isinstance(m, AdaptiveLinear)]
    nn.init.normal_(second.generator.weight)
    x = torch.randn(5, 6)
    torch.testing.assert_close(second.generated(x)[0], second.generated(1000 * x)[0], rtol=1e-3, atol=1e-3)
    assert isinstance(first.norm, nn.Identity)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"mode": "half"}, "mode"),
        ({"rank": 0}, "rank"),
        ({"mode": "generated", "over": 8}, "over"),
        ({"condition": "group"}, "one field"),
        ({"condition": "mix", "fields": ("user",)}, "two fields"),
        ({"fields": ("user",)}, "no field"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(wrong, word):
    with pytest.raises(ConfigError, match=word):
        APGConfig(**wrong)
    with pytest.raises(ConfigError, match=r"apg.rank must be at most 3 for a layer of 8 to 3"):
        MLP(8, (8, 3), 1, apg=APGConfig(mode="shared", rank=4))
