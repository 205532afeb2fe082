"""Dropout whose random numbers are cheap on CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout


class Dropout(nn.Module):
    """nn.Dropout with a share rounded to 1 / 65,536: on CPU four numbers are cut from each draw of 64 bits.

    PyTorch draws a number of its own for every element, which on one core takes longer than the matrix product before it: for 13,600
    x 50 numbers 3.8 ms against 0.4 ms. Elsewhere than on CPU this is nn.Dropout.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Float (*) like `x`: in training each element is 0 with chance `rate`, else divided by 1 - rate."""
        if not self.training or not self.rate:
            return x
        if x.device.type != "cpu":
            return dropout(x, self.rate)
        bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(1 << 63), None)
        dropped = round(self.rate * 65_536)
        keep = bits.view(torch.int16)[: x.numel()] >= dropped - 32_768
        return x * (keep.to(x.dtype) * (65_536 / (65_536 - dropped))).view(x.shape)

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"rate={self.rate}"
