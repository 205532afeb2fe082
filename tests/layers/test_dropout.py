"""Dropout by shared draws: how often, how much, and that it is repeatable."""

import torch

from shortlist.layers.dropout import Dropout


def test_drops_the_share_it_says_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(1_000, 401)
    out = Dropout(0.2)(x)
    torch.testing.assert_close(out.unique(), torch.tensor([0.0, 1.25]), rtol=1e-5, atol=0.0)
    assert abs(float((out == 0).float().mean()) - 0.2) < 0.003  # 4 standard errors
    assert abs(float(out.mean()) - 1) < 0.004
    # Four neighbours share a draw; they must not share their fate.
    dropped = (out.flatten()[:400_000] == 0).float().view(-1, 4)
    assert abs(float(torch.corrcoef(dropped.T).fill_diagonal_(0).abs().max())) < 0.015


def test_gradient_passes_where_values_do():
    torch.manual_seed(1)
    x = torch.randn(7, 3, requires_grad=True)
    out = Dropout(0.5)(x)
    out.sum().backward()
    assert torch.equal(x.grad == 0, out == 0)
    torch.testing.assert_close(out, x * x.grad)


def test_same_seed_same_draw_and_nothing_in_evaluation():
    module, x = Dropout(0.3), torch.randn(50, 9)
    outs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outs.append(module(x))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert module.eval()(x) is x
    assert module(torch.zeros(0, 4)).shape == (0, 4)
