"""DIN's local activation unit, shared by the rankers that weigh past events by a candidate.

B requests, C most candidates of a request, L longest history, p (candidate, event) pairs end to end, D width of a vector, P first hidden
width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from shortlist.data.jagged import Jagged
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


def mixed_past(
    weigh: Callable[[Tensor, Tensor, Tensor], Tensor],
    items: Jagged,
    past_BLD: Tensor,
    is_real_BL: Tensor,
    pairs_at_once: int | None,
) -> Tensor:
    """The past as each candidate sees it: sums of past vectors by weights, float32 [t, D].

    Args:
        weigh: gives weights [B, L, C], 0 where the mask is False, for candidates [B, C, D], the past and the mask [B, L, C] of real pairs.
        items: vectors [t, D] of the candidates.
        pairs_at_once: candidates are taken in slices, so that B x C x L is no more than this at a time (with at least one candidate of
            every request); None = all at once.
    """
    item_BCD, is_item_BC = items.padded()
    step = item_BCD.shape[1] if pairs_at_once is None else max(pairs_at_once // max(is_real_BL.numel(), 1), 1)
    mixed = []
    for slice_BCD, is_slice_BC in zip(item_BCD.split(step, dim=1), is_item_BC.split(step, dim=1)):
        weight_BLC = weigh(slice_BCD, past_BLD, is_real_BL[:, :, None] & is_slice_BC[:, None, :])
        mixed.append(weight_BLC.transpose(1, 2) @ past_BLD)
    return torch.cat(mixed, dim=1)[is_item_BC]
