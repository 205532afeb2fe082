"""Pairs of fields against the double loop, cross layers against their formula and by hand."""

import pytest
import torch

from shortlist.layers.interactions import CrossLayers, field_pairs, plain_field_pairs


def test_the_identity_of_factorisation_machines():
    v = torch.randn(3, 7, 4, dtype=torch.float64)
    torch.testing.assert_close(field_pairs(v), plain_field_pairs(v))
    by_hand = torch.tensor([[[1.0], [2.0], [5.0]]])
    assert field_pairs(by_hand).item() == 1 * 2 + 1 * 5 + 2 * 5
    assert not field_pairs(torch.randn(2, 1, 4)).any()
    assert not field_pairs(torch.randn(2, 0, 4)).any()


def test_pairs_split_into_request_and_candidate():
    r, c = torch.randn(5, 3, 4, dtype=torch.float64), torch.randn(5, 2, 4, dtype=torch.float64)
    split = field_pairs(r) + field_pairs(c) + r.sum(1) * c.sum(1)
    torch.testing.assert_close(split, plain_field_pairs(torch.cat([r, c], 1)))


@torch.no_grad()
def test_one_cross_layer_by_hand():
    cross = CrossLayers(1, 1, 1)
    cross.up[0].weight.copy_(torch.tensor([[1.0, 2.0], [0.0, -1.0]]))
    cross.up[0].bias.copy_(torch.tensor([0.5, 0.0]))
    x = torch.tensor([[2.0, 3.0]])
    # W x + b = [8.5, -3]; x * that + x = [19, -6]
    torch.testing.assert_close(cross.plain(x), torch.tensor([[19.0, -6.0]]))
    torch.testing.assert_close(cross(x[:, :1], cross.request_side(x[:, :1]), x[:, 1:]), torch.tensor([[19.0, -6.0]]))


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("num_layers", [1, 3])
@torch.no_grad()
def test_the_split_form_is_the_plain_one(rank, num_layers):
    torch.manual_seed(0)
    cross = CrossLayers(4, 5, num_layers, rank)
    for layer in cross.up:
        layer.bias.normal_()
    request, candidate, row = torch.randn(2, 4), torch.randn(6, 5), torch.tensor([0, 1, 1, 0, 1, 0])
    split = cross(request[row], cross.request_side(request)[row], candidate)
    torch.testing.assert_close(split, cross.plain(torch.cat([request[row], candidate], 1)))


def test_low_rank_matrices_are_the_product_of_their_factors():
    low, whole = CrossLayers(2, 3, 2, rank=2), CrossLayers(2, 3, 2)
    with torch.no_grad():
        for down, up, layer in zip(low.down, low.up, whole.up):
            layer.weight.copy_(up.weight @ down.weight)
    x = torch.randn(4, 5)
    torch.testing.assert_close(low.plain(x), whole.plain(x))


def test_flops_are_those_of_the_matrices():
    cross = CrossLayers(4, 6, 3)
    assert cross.request_flops + cross.candidate_flops == 3 * (2 * 100 + 20)
    low = CrossLayers(4, 6, 3, rank=2)
    assert low.request_flops + low.candidate_flops == 3 * (2 * 2 * 20 + 20)
