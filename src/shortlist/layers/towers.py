"""Fully connected towers and their activations, shared by rankers and two-tower retrievers.

rows = any leading dimensions, W width of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from shortlist.errors import ConfigError
from shortlist.layers.adaptive import AdaptiveLinear, APGConfig

Activation = Literal["relu", "silu", "gelu", "sigmoid", "prelu", "dice"]
Norm = Literal["none", "batch", "layer"]


class MLP(nn.Module):
    """Linear -> norm -> activation -> dropout for each width, then one plain linear map to `out_width`, if given.

    Args:
        in_width: width of the input.
        widths: hidden widths, first to last; may be empty when `out_width` is given (a linear map).
        out_width: width of the output, without activation; None = the last hidden layer is the output.
        activation: applied after every hidden layer.
        dropout: share of hidden units set to 0 in training.
        norm: of hidden layers, before the activation. Batch statistics are over all rows.
        apg: makes the hidden layers' weights per row (layers/adaptive.py), where it is not off.
        condition_width: width of what they are made from; 0 = each layer's own input.

    Raises ConfigError for widths below 1, no layer at all, or a dropout outside 0..1.
    """

    def __init__(
        self,
        in_width: int,
        widths: Sequence[int],
        out_width: int | None = None,
        *,
        activation: Activation = "relu",
        dropout: float = 0.0,
        norm: Norm = "none",
        apg: APGConfig | None = None,
        condition_width: int = 0,
    ) -> None:
        super().__init__()
        all_widths = [in_width, *widths] + ([out_width] if out_width is not None else [])
        if len(all_widths) < 2 or min(all_widths) < 1:
            raise ConfigError(f"an MLP needs at least one layer and widths of 1 or more, got {all_widths}")
        if not 0 <= dropout < 1:
            raise ConfigError(f"dropout must be from 0 to below 1, got {dropout}")
        self.in_width = in_width
        self.out_width = all_widths[-1]
        layers: list[nn.Module] = []
        self.gated_after: list[int] = []
        for place, (before, after) in enumerate(pairwise([in_width, *widths])):
            has_bias = norm != "batch"  # batch norm has its own shift
            if apg is None or apg.mode == "off":
                layers.append(nn.Linear(before, after, bias=has_bias))
            else:
                own = not condition_width
                layers.append(
                    AdaptiveLinear(before, after, apg, condition_width or before, bias=has_bias, norm=own and place > 0)
                )
            layers += _norm(norm, after)
            layers.append(make_activation(activation, after))
            self.gated_after.append(len(layers) - 1)
            if dropout:
                layers.append(nn.Dropout(dropout))
        if out_width is not None:
            layers.append(nn.Linear(all_widths[-2], out_width))
        self.layers = nn.Sequential(*layers)
        self.flops_per_row = sum(
            layer.flops_per_row if isinstance(layer, AdaptiveLinear) else 2 * layer.weight.numel()
            for layer in layers
            if isinstance(layer, AdaptiveLinear | nn.Linear)
        )

    def forward(self, x: Tensor) -> Tensor:
        """float [*, out_width] for x [*, in_width]; each row alone, but for batch statistics in training."""
        return self.layers(x)

    def gated(self, x: Tensor, gates: Sequence[Tensor] | None, condition: Tensor | None = None) -> Tensor:
        """As `forward` for x [rows, in_width], with activations times gates and adaptive layers by their condition.

        Args:
            gates: [rows, width] per hidden layer, applied after its activation; None = none.
            condition: [rows, condition_width]; None = each layer's own input.
        """
        at = dict(zip(self.gated_after, gates, strict=True)) if gates is not None else {}
        for number, layer in enumerate(self.layers):
            x = layer(x, condition) if isinstance(layer, AdaptiveLinear) else layer(x)
            if number in at:
                x = x * at[number]
        return x


def mlp_flops(widths: Sequence[int]) -> int:
    """FLOPs per row of linear maps between consecutive widths (input first, output last); a multiply-add is 2."""
    return sum(2 * before * after for before, after in pairwise(widths))


def make_activation(name: Activation, width: int) -> nn.Module:
    """The activation called `name` for `width` channels in the last dimension; ConfigError for an unknown one."""
    match name:
        case "relu":
            return nn.ReLU()
        case "silu":
            return nn.SiLU()
        case "gelu":
            return nn.GELU()
        case "sigmoid":
            return nn.Sigmoid()
        case "prelu":
            return PReLU(width)
        case "dice":
            return Dice(width)
    raise ConfigError(f"no activation named {name!r}; choose relu, silu, gelu, sigmoid, prelu or dice")


def _norm(name: Norm, width: int) -> list[nn.Module]:
    match name:
        case "none":
            return []
        case "batch":
            return [RowNorm(width)]
        case "layer":
            return [nn.LayerNorm(width)]
    raise ConfigError(f"no norm named {name!r}; choose none, batch or layer")


class RowNorm(nn.Module):
    """Batch norm over all leading dimensions of [*, W]; a batch of fewer than two rows uses the running statistics.

    A single row has no variance: PyTorch's own module refuses it, which would stop training at a last batch of one.
    """

    def __init__(self, width: int, *, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, eps=eps, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised x [*, W], each channel by mean and variance over the rows of the batch (in training)."""
        x_RW = x.reshape(-1, x.shape[-1])
        if self.training and len(x_RW) < 2:
            n = self.norm
            y_RW = nn.functional.batch_norm(x_RW, n.running_mean, n.running_var, n.weight, n.bias, eps=n.eps)
        else:
            y_RW = self.norm(x_RW)
        return y_RW.view(x.shape)


class PReLU(nn.Module):
    """max(0, x) + a min(0, x) with a learned slope per channel of the LAST dimension (PyTorch's own takes dimension 1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.full((width,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x [*, W]."""
        return torch.where(x > 0, x, self.slope * x)


class Dice(nn.Module):
    """A PReLU whose rectifying point follows the data (Zhou et al., DIN, KDD 2018, section 5.3).

    p = sigmoid((x - mean) / sqrt(var + 1e-8)), f(x) = p x + (1 - p) a x; mean and variance per channel over the batch
    in training and running averages after it; a is learned per channel and starts at 0.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = RowNorm(width, eps=1e-8, affine=False)
        self.slope = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x [*, W]."""
        gate = torch.sigmoid(self.norm(x))
        return gate * x + (1 - gate) * self.slope * x
