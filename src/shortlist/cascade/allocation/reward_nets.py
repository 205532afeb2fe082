"""Networks that predict what every chain is worth to a request, all chains in one pass.

    context [B, F]  ->  values [B, J], above 0, in units of the mean reward

Recursive     GreenFlow's: bases of the counts, weighed by request and models, joined from stage to stage      monotone in every count
Monotone      a network whose weights on counts, and on all that follows them, are not negative                monotone in every count
Additive      a number for every (stage, models, count), summed
Plain         a network on (context, which chain)

"GreenFlow: A Computation Allocation Framework for Building Environmentally Sound Recommendation System", Lu et al., IJCAI 2023. Its
reward model is a reconstruction: recursive over stages, several bases, monotone, as published descriptions say; the formulas are ours.

B requests, F features, J chains, K stages, D hidden width, P bases, N different counts of a stage, V prefixes: different choices of models
up to a stage, U up to the one before.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from shortlist.errors import ConfigError

Int = NDArray[np.int64]
Basis = Literal["linear", "log", "sqrt", "fast", "slow", "ratio"]
BASES: tuple[Basis, ...] = ("linear", "log", "sqrt", "fast", "slow", "ratio")
"""All increasing, 0 where nothing is scored and at most 1."""
Join = Literal["product", "softmin"]
EMBED = 16
"""Width of what stands for a model of a stage."""
START = {"fast": 0.05, "slow": 0.3, "ratio": 0.1}
"""Where learned scales of the bases begin, as shares of a stage's largest count."""


def inverse_softplus(value: float) -> float:
    """The number whose softplus is `value`, above 0."""
    return float(np.log(np.expm1(value)))


class CountBases(nn.Module):
    """P increasing functions of a count n from 0 to n_max; with u = n / n_max and learned scales t above 0:

        linear u     log log(1 + n) / log(1 + n_max)     sqrt sqrt(u)     fast, slow 1 - exp(-u / t)     ratio u / (u + t)

    Args:
        most: n_max, at least 1.
        bases: which.
    """

    def __init__(self, most: int, bases: tuple[Basis, ...] = BASES) -> None:
        super().__init__()
        unknown = set(bases) - set(BASES)
        if unknown or not bases:
            raise ConfigError(f"bases must be some of {', '.join(BASES)}, got {', '.join(sorted(bases)) or 'none'}")
        self.most, self.bases = max(most, 1), bases
        self.scales = nn.ParameterDict(
            {name: nn.Parameter(torch.tensor(inverse_softplus(START[name]))) for name in bases if name in START}
        )

    def forward(self, count_N: Tensor) -> Tensor:
        """[P, N], from counts of any type."""
        count_N = count_N.to(torch.float32)
        u_N = count_N / self.most
        t = {name: functional.softplus(raw) for name, raw in self.scales.items()}
        shapes = {
            "linear": lambda: u_N,
            "log": lambda: count_N.log1p() / np.log1p(self.most),
            "sqrt": lambda: u_N.sqrt(),
            "fast": lambda: -(-u_N / t["fast"]).expm1(),
            "slow": lambda: -(-u_N / t["slow"]).expm1(),
            "ratio": lambda: u_N / (u_N + t["ratio"]),
        }
        return torch.stack([shapes[name]() for name in self.bases])


class Shared(NamedTuple):
    """What a stage's part of a forward pass has that does not depend on the request."""

    model_VD: Tensor
    """What the models of each prefix add to the hidden state before it is rectified."""
    bases_PN: Tensor
    """Bases of the stage's different counts."""


class Stage(nn.Module):
    """One stage of the recursive model.

    Args:
        model_JK: models of the chains by stage, up to this one.
        count_J: candidates it scores.
        dim: D.
        bases: of its counts.
    """

    parent_V: Tensor
    model_V: Tensor
    count_N: Tensor
    cell_J: Tensor

    def __init__(self, model_JK: Int, count_J: Int, dim: int, bases: tuple[Basis, ...]) -> None:
        super().__init__()
        prefix_VK, first_V, prefix_J = _unique(model_JK)
        count_N, place_J = np.unique(count_J, return_inverse=True)
        self.carry = nn.Linear(dim + EMBED, dim)
        self.embed = nn.Embedding(int(model_JK[:, -1].max()) + 1, EMBED)
        self.weigh = nn.Linear(dim, len(bases))
        nn.init.constant_(self.weigh.bias, inverse_softplus(1.5 / len(bases)))  # stages begin near 1
        self.bases = CountBases(int(count_N[-1]), bases)
        parent_J = _unique(model_JK[:, :-1])[2] if model_JK.shape[1] > 1 else np.zeros_like(prefix_J)
        places = {"parent_V": parent_J[first_V], "model_V": prefix_VK[:, -1], "count_N": count_N}
        for name, place in {**places, "cell_J": prefix_J * len(count_N) + place_J}.items():
            self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(place)), persistent=False)

    def shared(self) -> Shared:
        """The part that all requests share."""
        dim = self.carry.out_features
        return Shared(
            functional.linear(self.embed(self.model_V), self.carry.weight[:, dim:], self.carry.bias),
            self.bases(self.count_N),
        )

    def forward(self, h_BUD: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        """h_k [B, V, D] and s_k [B, J], from h_{k-1} [B, U, D]."""
        carried_BUD = functional.linear(h_BUD, self.carry.weight[:, : h_BUD.shape[2]])
        h_BVD = functional.relu(carried_BUD.index_select(1, self.parent_V) + shared.model_VD)
        s_BVN = functional.softplus(self.weigh(h_BVD)) @ shared.bases_PN
        return h_BVD, s_BVN.flatten(1).index_select(1, self.cell_J)


def joined(before: Tensor, here: Tensor, join: Join) -> Tensor:
    """g_k from g_{k-1} and s_k: their product, or softmin -log(exp(-a) + exp(-b)); both increase with either."""
    return before * here if join == "product" else -torch.logaddexp(-before, -here)


class Recursive(nn.Module):
    """GreenFlow's reward model: h_k depends on request and models, s_k adds bases of the count, g_k joins stages.

        h_0 = MLP(x)    h_k = ReLU(W_h [h_{k-1}; e_k] + b_h)    a_k = softplus(W_a h_k + b_a)
        s_k = sum_p a_k[p] phi_p(n_k)    g_k = join(g_{k-1}, s_k)    value = softplus(w g_K + b(h_0)), w >= 0

    a_k is computed once for every prefix of models and a matrix product gives s_k for all counts; a chain picks its cell. As weights are
    not negative and bases increase, so does the value with every count, whatever was learned. W_h and W_a are each stage's own.

    Args:
        num_features: F.
        model_JK: models of the chains by stage.
        count_JK: candidates scored by stage.
        dim: D.
        bases: which bases of counts.
        join: how a stage's gain meets what earlier ones let through.
    """

    def __init__(
        self,
        num_features: int,
        model_JK: Int,
        count_JK: Int,
        *,
        dim: int,
        bases: tuple[Basis, ...] = BASES,
        join: Join = "product",
    ) -> None:
        super().__init__()
        self.join: Join = join
        self.context = _context(num_features, dim)
        self.stages = nn.ModuleList(
            [Stage(model_JK[:, : k + 1], count_JK[:, k], dim, bases) for k in range(model_JK.shape[1])]
        )
        self.gain = nn.Parameter(torch.tensor(inverse_softplus(1.0)))
        self.level = nn.Linear(dim, 1)

    def shared(self) -> list[Shared]:
        """What all requests share, by stage; computed once where weights do not change."""
        return [stage.shared() for stage in self.stages if isinstance(stage, Stage)]

    def forward(self, x_BF: Tensor, shared: list[Shared] | None = None) -> Tensor:
        """[B, J] values; `shared` as `shared()` gave it, None = computed here."""
        h_BD = self.context(x_BF)
        h_BVD = h_BD[:, None]
        g_BJ: Tensor | None = None
        for stage, same in zip(self.stages, shared or self.shared()):
            h_BVD, s_BJ = stage(h_BVD, same)
            g_BJ = s_BJ if g_BJ is None else joined(g_BJ, s_BJ, self.join)
        assert g_BJ is not None  # there is always a stage
        return functional.softplus(functional.softplus(self.gain) * g_BJ + self.level(h_BD))


class Monotone(nn.Module):
    """A network of two hidden layers whose weights from counts to the value are not negative.

        h_1 = tanh(W x + e(models) + softplus(U) log-counts)    h_2 = tanh(softplus(V) h_1 + c)    value = softplus(softplus(v) h_2 + b(x))

    Args:
        num_features: F.
        model_JK: models of the chains by stage.
        count_JK: candidates scored by stage.
        dim: D.
    """

    def __init__(self, num_features: int, model_JK: Int, count_JK: Int, *, dim: int) -> None:
        super().__init__()
        self.context = _context(num_features, dim)
        self.shift = nn.Linear(dim, dim)
        self.level = nn.Linear(dim, 1)
        _, _, model_J = _unique(model_JK)
        self.models = nn.Embedding(int(model_J.max()) + 1, dim)
        self.counts = nn.Parameter(_above_zero(dim, count_JK.shape[1]))
        self.hidden = nn.Parameter(_above_zero(dim, dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.out = nn.Parameter(_above_zero(1, dim))
        share_JK = np.log1p(count_JK) / np.log1p(np.maximum(count_JK.max(0), 1))
        self.register_buffer("share_JK", torch.from_numpy(share_JK).float(), persistent=False)
        self.register_buffer("model_J", torch.from_numpy(model_J), persistent=False)

    def forward(self, x_BF: Tensor) -> Tensor:
        """[B, J] values."""
        h_BD = self.context(x_BF)
        counts_JD = functional.linear(self.get_buffer("share_JK"), functional.softplus(self.counts))
        chain_JD = self.models(self.get_buffer("model_J")) + counts_JD
        h_BJD = torch.tanh(self.shift(h_BD)[:, None] + chain_JD)
        h_BJD = torch.tanh(functional.linear(h_BJD, functional.softplus(self.hidden), self.bias))
        return functional.softplus(functional.linear(h_BJD, functional.softplus(self.out))[..., 0] + self.level(h_BD))


class Additive(nn.Module):
    """value = softplus(b(x) + sum over stages of a number that the request gives to the stage's (models, count)).

    Args:
        num_features: F.
        model_JK: models of the chains by stage.
        count_JK: candidates scored by stage.
        dim: D.
    """

    def __init__(self, num_features: int, model_JK: Int, count_JK: Int, *, dim: int) -> None:
        super().__init__()
        self.context = _context(num_features, dim)
        cells, before = [], 0
        for k in range(model_JK.shape[1]):
            _, first, cell_J = _unique(np.stack([model_JK[:, k], count_JK[:, k]], 1))
            cells.append(before + cell_J)
            before += len(first)
        self.parts = nn.Linear(dim, before)
        self.level = nn.Linear(dim, 1)
        self.register_buffer("cell_JK", torch.from_numpy(np.stack(cells, 1)), persistent=False)

    def forward(self, x_BF: Tensor) -> Tensor:
        """[B, J] values."""
        h_BD = self.context(x_BF)
        return functional.softplus(self.parts(h_BD)[:, self.get_buffer("cell_JK")].sum(2) + self.level(h_BD))


class Plain(nn.Module):
    """A network of two hidden layers on the context and a one-hot chain.

    Args:
        num_features: F.
        num_chains: J.
        dim: D.
    """

    def __init__(self, num_features: int, num_chains: int, *, dim: int) -> None:
        super().__init__()
        self.request = nn.Linear(num_features, dim)
        self.chain = nn.Parameter(torch.randn(num_chains, dim) * dim**-0.5)
        self.hidden = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, 1)

    def forward(self, x_BF: Tensor) -> Tensor:
        """[B, J] values."""
        h_BJD = functional.relu(self.request(x_BF)[:, None] + self.chain)
        return functional.softplus(self.out(functional.relu(self.hidden(h_BJD)))[..., 0])


def _context(num_features: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(num_features, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU())


def _above_zero(rows: int, width: int) -> Tensor:
    """Weights whose softplus is about 1 / width."""
    return inverse_softplus(1.0 / width) + 0.3 * torch.randn(rows, width)


def _unique(rows_JX: Int) -> tuple[Int, Int, Int]:
    """Different rows, where each is first, and the number of each row's among them."""
    unique, first, inverse = np.unique(rows_JX, axis=0, return_index=True, return_inverse=True)
    return unique, first, inverse.reshape(-1)
