"""DIN's local activation unit, shared by the rankers that weigh past events by a candidate.

B requests, C most candidates of a request, L longest history, p (candidate, event) pairs end to end, D width of a vector, P first hidden
width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from shortlist.layers.towers import MLP, Activation


class ActivationUnit(nn.Module):
    """a(k, q): how much the past event k matters for the candidate q, one number, from MLP([q, k, q - k, q * k]).

    For one candidate the first linear map is linear in k: W [q, k, q - k, q * k] + b = (W2 - W3 + W4 diag(q)) k + (W1 + W3) q + b. So
    all pairs of a request are one matrix product of its past with the candidates' matrices, a quarter of the plain work, and neither
    the [.., 4 D] input nor any product q * k is made.
    """

    def __init__(self, dim: int, widths: tuple[int, ...], activation: Activation) -> None:
        super().__init__()
        self.dim = dim
        self.mlp = MLP(4 * dim, widths, 1, activation=activation)
        self.query_flops = 2 * dim * widths[0]
        self.pair_flops = self.mlp.flops_per_row - 3 * self.query_flops

    def plain(self, query_pD: Tensor, key_pD: Tensor) -> Tensor:
        """[p] for pairs of candidate and event, by the formula as it stands."""
        return self.mlp(torch.cat([query_pD, key_pD, query_pD - key_pD, query_pD * key_pD], dim=1)).squeeze(1)

    def forward(self, query_BCD: Tensor, key_BLD: Tensor, is_pair_BLC: Tensor) -> Tensor:
        """[B, L, C] for every event with every candidate of its request; any finite number where the mask is False."""
        first = self.mlp.layers[0]
        assert isinstance(first, nn.Linear)
        w1_PD, w2_PD, w3_PD, w4_PD = first.weight.split(self.dim, dim=1)
        matrix_BDCP = query_BCD.transpose(1, 2)[..., None] * w4_PD.T[:, None] + (w2_PD - w3_PD).T[:, None]
        shift_BCP = linear(query_BCD, w1_PD + w3_PD, first.bias)
        hidden_BLx = torch.baddbmm(shift_BCP.flatten(1)[:, None], key_BLD, matrix_BDCP.flatten(2))
        hidden_BLCP = hidden_BLx.view(*is_pair_BLC.shape, len(w1_PD))
        rest = self.mlp.layers[1:]
        if not self.training:
            return rest(hidden_BLCP).squeeze(3)
        # Batch statistics (Dice) are over the pairs there are, not over padding.
        output_p = rest(hidden_BLCP[is_pair_BLC]).squeeze(1)
        return output_p.new_zeros(is_pair_BLC.shape).masked_scatter(is_pair_BLC, output_p)
