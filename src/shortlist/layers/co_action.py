"""Co-action units: a tiny network whose weights belong to one id, fed with the vector of another.

"CAN: Feature Co-Action for Click-Through Rate Prediction", Bian et al., WSDM 2022 (arXiv 2011.05625). For an induction vector P of the
candidate and a feed vector f of the request,

    (w_1 | b_1 | w_2 | ...) = P,    h_0 = f^c (element by element),    h_l = tanh(h_{l-1} w_l + b_l),    without tanh for the last l
    H_c = [h_1, ..., h_L],          output = sum over the ids of a past of [H_1, ..., H_C]

for the orders c = 1..C. All layers are kept, as in the final paper and its code; orders are put end to end, as in the code (`combine="sum"`
adds them up, as in the text). With one layer of one output and no bias it is the inner product of a factorisation machine.

t candidates, M pairs, S ids of a request, C orders, d width of a feed, m widths of the layers, P parameters of one micro network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from shortlist.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class CoActionConfig:
    """Settings of the co-action units."""

    feed_dim: int = 16
    """d, width of the vector of a request's id."""
    widths: tuple[int, ...] = (8, 4)
    """m, widths of the micro network's layers."""
    orders: int = 3
    """C, powers of the feed."""
    bias: bool = False
    """Give the layers biases."""
    combine: Literal["concat", "sum"] = "concat"
    """How the orders come together."""
    pair_independence: bool = False
    """Each pair has its own slice of both vectors, instead of one vector per id for all its partners (combination independence)."""
    order_independence: bool = False
    """Each order has a micro network of its own."""
    init_std: float = 0.01
    """Standard deviation of the initial vectors; larger ones explode with powers and long pasts."""

    def __post_init__(self) -> None:
        if self.feed_dim < 1 or self.orders < 1 or not self.widths or min(self.widths) < 1:
            raise ConfigError(
                "co_action: feed_dim, orders and all widths must be at least 1, "
                f"got {self.feed_dim}, {self.orders} and {list(self.widths)}"
            )
        if self.combine not in ("concat", "sum") or self.init_std <= 0:
            raise ConfigError(
                f"co_action: combine must be concat or sum and init_std above 0, got {self.combine!r} and {self.init_std}"
            )

    @property
    def num_weights(self) -> int:
        """P of one order."""
        sizes = pairwise((self.feed_dim, *self.widths))
        return sum(before * after + (after if self.bias else 0) for before, after in sizes)

    @property
    def induction_width(self) -> int:
        """Width of the vector that holds all micro networks of one pair."""
        return self.num_weights * (self.orders if self.order_independence else 1)

    @property
    def out_width(self) -> int:
        """Width of one pair's output."""
        return sum(self.widths) * (self.orders if self.combine == "concat" else 1)

    @property
    def flops(self) -> int:
        """Per pair, candidate and id of the request."""
        return 2 * self.orders * sum(before * after for before, after in pairwise((self.feed_dim, *self.widths)))


def powers(feed: Tensor, orders: int) -> Tensor:
    """f, f^2, ..., f^C: float [*, C, d] for feeds [*, d]."""
    made = [feed]
    for _ in range(orders - 1):
        made.append(made[-1] * feed)  # a product takes a fraction of the time of a power
    return torch.stack(made, dim=-2)


class CoAction(nn.Module):
    """The micro networks of M pairs at once; it has no parameters of its own."""

    def __init__(self, config: CoActionConfig) -> None:
        super().__init__()
        self.config = config

    def layers(self, weight: Tensor) -> Sequence[tuple[Tensor, Tensor | None]]:
        """Weights [*, in, out] and biases [*, out] of the layers, cut from vectors [*, P]."""
        cut, at = [], 0
        for before, after in pairwise((self.config.feed_dim, *self.config.widths)):
            matrix = weight[..., at : at + before * after].unflatten(-1, (before, after))
            at += before * after
            bias = weight[..., at : at + after] if self.config.bias else None
            at += after if self.config.bias else 0
            cut.append((matrix, bias))
        return cut

    def forward(self, weight_tMP: Tensor, power_tMSCd: Tensor, is_real_tMS: Tensor) -> Tensor:
        """float [t, M, out_width] for induction vectors, powers of feeds and which of them are real.

        The mask is applied to the outputs: with biases a feed of 0 does not give 0.
        """
        config = self.config
        own = config.order_independence
        if own:
            weight_tMP = weight_tMP.unflatten(-1, (config.orders, config.num_weights))
        # A past is pooled by a product with the mask, layer by layer, so that nothing as long as the past is put end to end.
        real_tM1S = is_real_tMS.to(power_tMSCd.dtype)[:, :, None]
        hidden, made = power_tMSCd, []
        cut = self.layers(weight_tMP)
        for number, (matrix, bias) in enumerate(cut):
            if own:
                hidden = torch.einsum("tmscd,tmcdo->tmsco", hidden, matrix)
            else:
                hidden = (hidden.flatten(2, 3) @ matrix).unflatten(2, (-1, config.orders))
            if bias is not None:
                hidden = hidden + (bias[:, :, None] if own else bias[:, :, None, None])
            if number < len(cut) - 1:
                hidden = torch.tanh(hidden)
            made.append((real_tM1S @ hidden.flatten(3)).unflatten(3, (config.orders, -1))[:, :, 0])
        output_tMCo = torch.cat(made, dim=-1)
        return output_tMCo.sum(2) if config.combine == "sum" else output_tMCo.flatten(2)

    def plain(self, weight_P: Tensor, feeds: Sequence[Tensor]) -> Tensor:
        """One pair's output [out_width] for the candidate's vector and the feeds [d] of a request, by the formula: for tests."""
        config = self.config
        total = torch.zeros(config.out_width)
        for feed_d in feeds:
            by_order = []
            for order in range(config.orders):
                own = weight_P.split(config.num_weights)[order if config.order_independence else 0]
                hidden, made = feed_d ** (order + 1), []
                cut = self.layers(own)
                for number, (matrix, bias) in enumerate(cut):
                    hidden = hidden @ matrix + (0 if bias is None else bias)
                    hidden = torch.tanh(hidden) if number < len(cut) - 1 else hidden
                    made.append(hidden)
                by_order.append(torch.cat(made))
            total = total + (torch.stack(by_order).sum(0) if config.combine == "sum" else torch.cat(by_order))
        return total
