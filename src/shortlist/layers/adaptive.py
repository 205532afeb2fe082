"""Dense layers whose weights are made per row on the fly.

"APG: Adaptive Parameter Generation Network for Click-Through Rate Prediction", Yan et al., NeurIPS 2022 (arXiv 2203.16218). A layer of
N inputs and M outputs with a condition z of width Z:

    whole      W_i = reshape(G z_i)                       y_i = x_i W_i + b                        the basic form, N M Z
    generated  U_i, S_i, V_i from z_i, of rank K          y_i = ((x_i U_i) S_i) V_i + b            low rank, decomposed feed-forward
    shared     only S_i from z_i, U and V ordinary        y_i = ((x_i U) S_i) V + b                parameter sharing, K^2 Z + N K + K M
    static     S = 1: the low-rank layer without any generation, to compare with

`over` = P trains U = U_l U_r and V = V_l V_r with an inner width P; the products are made once for inference.

Differences from the paper: a generator starts at weight 0 and a bias that makes S_i the identity (U_i, V_i a fixed random matrix),
so that a layer begins as the static one; with factors that all start small, the product and its gradients would vanish. The generator is
one linear map. Self conditions of layers after the first are layer-normed, since a layer is quadratic in them. With a linear generator,
generating from each of several conditions and adding up is the same as generating once from their concatenation, which is done here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from shortlist.errors import ConfigError
from shortlist.registry import system

Mode = Literal["off", "static", "shared", "generated", "whole"]
Condition = Literal["self", "group", "mix"]


@dataclass(frozen=True, kw_only=True, slots=True)
class APGConfig:
    """Settings of adaptive parameter generation in the hidden layers of a tower."""

    mode: Mode = "off"
    """off: ordinary layers; shared is the paper's final form, generated and whole are its earlier steps, static generates nothing."""
    rank: int = 4
    """K, at most the narrowest layer."""
    over: int = 0
    """P, inner width of the factors of U and V in training; 0 = none. For static and shared."""
    condition: Condition = "self"
    """What weights are made from: the layer's own input, one field (group), or several (mix)."""
    fields: tuple[str, ...] = ()
    """The fields of group and mix, such as ("user",) or ("context.hour", "item"); they have small tables of their own."""
    dim: int = 8
    """Width of one such field's vector."""
    generate_bias: bool = False
    """Make the bias from the condition too, which costs Z M."""

    def __post_init__(self) -> None:
        if self.mode not in ("off", "static", "shared", "generated", "whole"):
            raise ConfigError(f"apg.mode must be off, static, shared, generated or whole, got {self.mode!r}")
        if self.condition not in ("self", "group", "mix"):
            raise ConfigError(f"apg.condition must be self, group or mix, got {self.condition!r}")
        if self.rank < 1 or self.dim < 1 or self.over < 0:
            raise ConfigError(
                f"apg: rank and dim must be at least 1 and over at least 0, got {self.rank}, {self.dim} and {self.over}"
            )
        if self.over and self.mode not in ("static", "shared"):
            raise ConfigError(f"apg.over factors U and V, which mode={self.mode!r} does not have; use shared or static")
        wanted = {"self": "no field", "group": "one field", "mix": "two fields or more"}[self.condition]
        if min(len(self.fields), 2) != {"self": 0, "group": 1, "mix": 2}[self.condition]:
            raise ConfigError(f"apg: condition {self.condition!r} takes {wanted}, got fields={list(self.fields)}")


@system("apg", stage="layers", paper="Yan et al., NeurIPS 2022")
class AdaptiveLinear(nn.Module):
    """A dense layer whose weights are made per row from a condition.

    Args:
        in_width: N.
        out_width: M.
        config: settings; ConfigError where its rank is above N or M.
        condition_width: Z; the condition is the input itself where `config.condition` is self.
        bias: add one.
        norm: layer-norm the condition.
    """

    kind = "layer"
    Config = APGConfig

    def __init__(
        self, in_width: int, out_width: int, config: APGConfig, condition_width: int, *, bias: bool, norm: bool
    ) -> None:
        super().__init__()
        N, M, K = in_width, out_width, config.rank
        if config.mode != "whole" and min(N, M) < K:
            raise ConfigError(f"apg.rank must be at most {min(N, M)} for a layer of {N} to {M}, got {K}; lower it")
        self.in_features, self.out_features, self.rank, self.mode = N, M, K, config.mode
        self.norm = nn.LayerNorm(condition_width, elementwise_affine=False) if norm else nn.Identity()
        shared, P = config.mode in ("static", "shared"), config.over
        self.left = nn.ParameterList(_xavier(a, b) for a, b in _factors(N, K, P)) if shared else None
        self.right = nn.ParameterList(_xavier(a, b) for a, b in _factors(K, M, P)) if shared else None
        matrices: dict[str, tuple[int, ...]] = {
            "shared": (K * K,),
            "generated": (N * K, K * K, K * M),
            "whole": (N * M,),
        }
        self.sizes = matrices.get(config.mode, ())
        self.generates_bias = bias and config.generate_bias and bool(self.sizes)
        if self.generates_bias:
            self.sizes = (*self.sizes, M)
        self.generator = nn.Linear(condition_width, sum(self.sizes)) if self.sizes else None
        self.bias = nn.Parameter(torch.zeros(M)) if bias and not self.generates_bias else None
        self._start()
        self.flops_per_row = self._flops(condition_width)
        self._kept: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def _start(self) -> None:
        """Weights 0; biases that make the first layers those of a fixed matrix."""
        if self.generator is None:
            return
        N, M, K = self.in_features, self.out_features, self.rank
        starts = {
            "shared": (torch.eye(K),),
            "generated": (_xavier(N, K), torch.eye(K), _xavier(K, M)),
            "whole": (_xavier(N, M),),
        }[self.mode]
        self.generator.weight.zero_()
        self.generator.bias.zero_()
        self.generator.bias[: sum(s.numel() for s in starts)] = torch.cat([s.detach().flatten() for s in starts])

    def _flops(self, condition_width: int) -> int:
        N, M, K = self.in_features, self.out_features, self.rank
        multiply = {"static": (N + M) * K, "whole": N * M}.get(self.mode, (N + M) * K + K * K)
        return 2 * (multiply + condition_width * sum(self.sizes))

    def train(self, mode: bool = True) -> AdaptiveLinear:
        """As nn.Module; kept products are dropped, since their factors may change."""
        self._kept = None
        super().train(mode)
        return self

    def shared_factors(self) -> tuple[Tensor, Tensor]:
        """U [N, K] and V [K, M] of static and shared layers; outside training multiplied once and kept."""
        assert self.left is not None
        assert self.right is not None
        if self.training or torch.is_grad_enabled():
            return _product(self.left), _product(self.right)
        if self._kept is None or self._kept[0].device != self.left[0].device:
            self._kept = _product(self.left), _product(self.right)
        return self._kept

    def generated(self, z: Tensor) -> list[Tensor]:
        """What is made from conditions z [rows, Z]: matrices end to end, in the order of `sizes`."""
        assert self.generator is not None
        return list(self.generator(self.norm(z)).split(self.sizes, dim=1))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """float [rows, M] for x [rows, N] and conditions [rows, Z]; None = x itself."""
        N, M, K = self.in_features, self.out_features, self.rank
        made = self.generated(x if condition is None else condition) if self.sizes else []
        if self.mode == "static":
            U, V = self.shared_factors()
            y = x @ U @ V
        elif self.mode == "shared":
            U, V = self.shared_factors()
            y = _each(x @ U, made[0].view(-1, K, K)) @ V
        elif self.mode == "generated":
            u, s, v = made[0].view(-1, N, K), made[1].view(-1, K, K), made[2].view(-1, K, M)
            y = _each(_each(_each(x, u), s), v)
        else:
            y = _each(x, made[0].view(-1, N, M))
        if self.generates_bias:
            return y + made[-1]
        return y if self.bias is None else y + self.bias

    def whole_weights(self, z: Tensor) -> Tensor:
        """W_i = U_i S_i V_i [rows, N, M] for conditions z [rows, Z], which `forward` never builds: the reference of tests."""
        N, M, K = self.in_features, self.out_features, self.rank
        made = self.generated(z) if self.sizes else []
        if self.mode == "whole":
            return made[0].view(-1, N, M)
        if self.mode == "generated":
            return made[0].view(-1, N, K) @ made[1].view(-1, K, K) @ made[2].view(-1, K, M)
        U, V = self.shared_factors()
        return U @ (made[0].view(-1, K, K) if made else torch.eye(K).to(U).expand(len(z), K, K)) @ V


def _factors(rows: int, columns: int, inner: int) -> list[tuple[int, int]]:
    return [(rows, inner), (inner, columns)] if inner else [(rows, columns)]


def _xavier(rows: int, columns: int) -> nn.Parameter:
    weight = nn.Parameter(torch.empty(rows, columns))
    nn.init.xavier_normal_(weight)
    return weight


def _product(factors: nn.ParameterList) -> Tensor:
    return factors[0] if len(factors) == 1 else factors[0] @ factors[1]


def _each(x: Tensor, weight: Tensor) -> Tensor:
    """Row i [N] times its own matrix [N, M]: [rows, M]."""
    return torch.bmm(x[:, None], weight)[:, 0]
