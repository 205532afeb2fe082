"""Products of fields: the pairs of a factorisation machine, and cross layers. Both split into a request's share and a candidate's.

rows = any leading dimensions, F fields, D width of a field's vector, X width of a cross layer's input, R of it the request's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def field_pairs(v_FD: Tensor) -> Tensor:
    """Sum over all pairs i < j of v_i * v_j, dimension by dimension: float [*, D] for vectors [*, F, D].

    Half of the square of the sum less the sum of the squares (Rendle, ICDM 2010, lemma 3.1), F D products instead of F^2 D / 2.
    """
    return (v_FD.sum(-2).square() - v_FD.square().sum(-2)) / 2


def plain_field_pairs(v_FD: Tensor) -> Tensor:
    """As `field_pairs`, pair by pair: the reference of tests."""
    pairs = torch.zeros_like(v_FD[..., 0, :])
    for i in range(v_FD.shape[-2]):
        for j in range(i + 1, v_FD.shape[-2]):
            pairs = pairs + v_FD[..., i, :] * v_FD[..., j, :]
    return pairs


class CrossLayers(nn.Module):
    """x_{l+1} = x_0 * (W_l x_l + b_l) + x_l (DCN V2, Wang et al., WWW 2021, equation 1), x_0 = [request; candidate].

    The first layer reads x_0 alone, so the request's share of W_0 x_0 + b_0 is made once per request. Of width `rank`, W = U V' is the
    low-rank form of equation 2.

    Args:
        request_width: R.
        candidate_width: X - R.
        num_layers: L, 1 or more.
        rank: 0 = whole matrices.
    """

    def __init__(self, request_width: int, candidate_width: int, num_layers: int, rank: int = 0) -> None:
        super().__init__()
        X = request_width + candidate_width
        self.request_width = request_width
        self.down = nn.ModuleList(nn.Linear(X, rank, bias=False) for _ in range(num_layers)) if rank else None
        self.up = nn.ModuleList(nn.Linear(rank or X, X) for _ in range(num_layers))
        for layer in (*self.up, *(self.down or ())):
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_normal_(layer.weight)
        for layer in self.up:
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        first = 2 * X * (rank or X)
        self.request_flops = 2 * request_width * (rank or X)
        self.candidate_flops = num_layers * (first + (first if rank else 0) + 2 * X) - self.request_flops

    @property
    def _first(self) -> nn.Linear:
        first = (self.down or self.up)[0]
        assert isinstance(first, nn.Linear)
        return first

    def request_side(self, request_BR: Tensor) -> Tensor:
        """float [B, X or rank]: the request's share of the first layer, bias included."""
        return nn.functional.linear(request_BR, self._first.weight[:, : self.request_width], self._first.bias)

    def forward(self, request_tR: Tensor, share_t: Tensor, candidate_tV: Tensor) -> Tensor:
        """float [t, X] for the request of each candidate, its `request_side`, and the candidate's own side [t, X - R]."""
        x0_tX = torch.cat([request_tR, candidate_tV], dim=1)
        own = nn.functional.linear(candidate_tV, self._first.weight[:, self.request_width :])
        mapped = share_t + own
        x_tX = x0_tX * (self.up[0](mapped) if self.down is not None else mapped) + x0_tX
        for number in range(1, len(self.up)):
            down = x_tX if self.down is None else self.down[number](x_tX)
            x_tX = x0_tX * self.up[number](down) + x_tX
        return x_tX

    def plain(self, x0_tX: Tensor) -> Tensor:
        """The formula as it stands, for whole inputs [t, X]: the reference of tests."""
        x_tX = x0_tX
        for number in range(len(self.up)):
            down = x_tX if self.down is None else self.down[number](x_tX)
            x_tX = x0_tX * self.up[number](down) + x_tX
        return x_tX
