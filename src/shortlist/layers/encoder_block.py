"""The transformer block of BERT over jagged sequences, which BERT4Rec and S3-Rec share.

total = all positions end to end, D width, P positions that are asked for.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from shortlist.layers.attention import LengthClasses, SelfAttention, attention_flops
from shortlist.layers.towers import MLP

NormPlace = Literal["post-ln", "pre-ln"]
WIDENING = 4
"""The feed-forward part is so many times as wide as the block."""


class EncoderBlock(nn.Module):
    """Self-attention, then a feed-forward part with GELU, each with a residual.

    post-ln, as in BERT: X = LN(X + MHA(X)); X = LN(X + FFN(X)). pre-ln: X = X + MHA(LN X); X = X + FFN(LN X), which needs one more
    layer norm after the last block.

    Args:
        width: D, a multiple of num_heads.
        dropout: share dropped of both parts' outputs in training.
        attention_dropout: share of attention weights dropped in training; slow on CPU.
    """

    def __init__(
        self, width: int, num_heads: int, *, dropout: float, attention_dropout: float = 0.0, norm: NormPlace = "post-ln"
    ) -> None:
        super().__init__()
        self.norm = norm
        self.attention = SelfAttention(width, num_heads, dropout=attention_dropout)
        self.norm_attention = nn.LayerNorm(width)
        self.ffn = MLP(width, (WIDENING * width,), width, activation="gelu")
        self.norm_ffn = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_TD: Tensor, classes: LengthClasses, *, causal: bool, at: Tensor | None = None) -> Tensor:
        """float [total, D], or [P, D] for the positions `at` int64 [P]: all read every position, only these are computed on."""
        residual_PD = x_TD if at is None else x_TD.index_select(0, at)
        if self.norm == "post-ln":
            mixed_PD = self.attention(x_TD, x_TD, classes, causal=causal, at=at)
            y_PD = self.norm_attention(residual_PD + self.dropout(mixed_PD))
            return self.norm_ffn(y_PD + self.dropout(self.ffn(y_PD)))
        normed_TD = self.norm_attention(x_TD)
        y_PD = residual_PD + self.dropout(self.attention(normed_TD, normed_TD, classes, causal=causal, at=at))
        return y_PD + self.dropout(self.ffn(self.norm_ffn(y_PD)))


def encoder_flops(length: int, width: int, num_blocks: int, *, causal: bool, num_asked: int) -> float:
    """FLOPs of a stack of blocks over `length` positions whose last block is asked for `num_asked` of them."""
    attention = attention_flops(length, width, causal=causal)
    after = 2 * WIDENING * 2 * width * width
    saved_each = after + 2 * width * width  # no feed-forward and output map where nobody asks
    if not causal:
        saved_each += 2 * width * width + 4 * length * width  # and no query
    return num_blocks * (attention + length * after) - (length - num_asked) * saved_each
