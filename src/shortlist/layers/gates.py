"""Multiplicative gates that any ranker's tower can switch on: field weights, and unit gates that depend on who asks or on what is asked.

    senet   weights of fields: z_f = mean (and maximum) of field f, a = s(relu(z W1) W2), field f becomes a_f times itself
            (FiBiNET, Huang et al., RecSys 2019, section 3.2)
    epnet   input = d * input,    d = gate([domain fields, stop(input)])           (PEPNet, Chang et al., KDD 2023)
    ppnet   hidden_l = d_l * hidden_l,    d_l = gate_l([prior fields, stop(input)])          (PEPNet), after the activation
    lhuc    hidden_l = 2 sigmoid(a_g) * hidden_l, one vector a_g per value g of a field    (Swietojanski and Renals, SLT 2014)

    gate(x) = 2 sigmoid(relu(x W + b) W' + b')

Nothing flows back through a gate into the input that it reads (stop), so the two do not fight over the embeddings; prior fields have
small tables of their own. Every gate starts as the identity: last layers and LHUC's vectors are 0, and 2 sigmoid(0) = 1.

Differences: SENet ends in 2 sigmoid rather than ReLU, which can switch a field off for good (`senet_output`), and its squeeze has the
maximum beside the mean, which is about 0 for fresh embeddings (`senet_squeeze`). The first layer's input is gated by EPNet alone.

rows = candidates of all requests end to end, X width of the tower's input, F its fields (blocks of columns), P width of the prior.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from shortlist.data.batches import Batch
from shortlist.data.schema import Space
from shortlist.errors import ConfigError
from shortlist.layers.field_matrix import FieldMatrix
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True, slots=True)
class GateConfig:
    """Which gates a tower has; all are off by default."""

    senet: bool = False
    """Weigh the fields of the tower's input."""
    senet_reduction: int = 3
    """Fields per hidden unit of SENet."""
    senet_squeeze: Literal["mean", "mean-max"] = "mean-max"
    """What SENet sees of a field; mean is the paper's."""
    senet_output: Literal["sigmoid", "relu"] = "sigmoid"
    """2 sigmoid, or the paper's ReLU."""
    epnet: tuple[str, ...] = ()
    """Fields whose values gate the input, such as ("context.scene",); empty = off."""
    ppnet: tuple[str, ...] = ()
    """Fields whose values gate the hidden units, such as ("user", "item"); empty = off."""
    lhuc: str = ""
    """Field whose values have gates of their own, such as "user"; empty = off."""
    dim: int = 8
    """Width of a prior field's vector in EPNet and PPNet."""
    hidden: int = 32
    """Hidden width of their gates."""
    id_dropout: float = 0.05
    """Share of prior user and item ids replaced by the unknown one in training, so that gates do not learn rare ids by heart."""

    def __post_init__(self) -> None:
        for name in ("senet_reduction", "dim", "hidden"):
            if getattr(self, name) < 1:
                raise ConfigError(f"gates.{name} must be at least 1, got {getattr(self, name)}")
        if self.senet_squeeze not in ("mean", "mean-max") or self.senet_output not in ("sigmoid", "relu"):
            raise ConfigError(
                "gates: senet_squeeze must be mean or mean-max and senet_output sigmoid or relu, "
                f"got {self.senet_squeeze!r} and {self.senet_output!r}"
            )
        if not 0 <= self.id_dropout < 1:
            raise ConfigError(f"gates.id_dropout must be from 0 to below 1, got {self.id_dropout}")

    @property
    def any(self) -> bool:
        """Whether one is on."""
        return self.senet or bool(self.epnet or self.ppnet or self.lhuc)


@system("senet", stage="layers", paper="Huang et al., RecSys 2019")
class SENet(nn.Module):
    """Weights of fields from what all fields look like.

    Args:
        blocks: widths of the F fields in the input, in order; they may differ.
        config: reduction, squeeze and output.
    """

    kind = "layer"
    Config = GateConfig
    field_of_column: Tensor

    def __init__(self, blocks: Sequence[int], config: GateConfig) -> None:
        super().__init__()
        self.blocks, self.config = tuple(blocks), config
        F = len(self.blocks)
        self.register_buffer(
            "field_of_column", torch.arange(F).repeat_interleave(torch.tensor(self.blocks)), persistent=False
        )
        hidden = max(F // config.senet_reduction, 1)
        squeezed = F if config.senet_squeeze == "mean" else 2 * F
        self.squeeze_map, self.excite_map = nn.Linear(squeezed, hidden, bias=False), nn.Linear(hidden, F, bias=False)
        nn.init.xavier_normal_(self.squeeze_map.weight)
        if config.senet_output == "sigmoid":
            nn.init.zeros_(self.excite_map.weight)
        else:
            nn.init.xavier_normal_(self.excite_map.weight)

    def weights(self, x: Tensor) -> Tensor:
        """float [rows, F] for x [rows, X]."""
        index = self.field_of_column.expand(len(x), -1)
        shape = (len(x), len(self.blocks))
        z = x.new_zeros(shape).scatter_add(1, index, x) / x.new_tensor(self.blocks)
        if self.config.senet_squeeze == "mean-max":
            largest = x.new_full(shape, -torch.inf).scatter_reduce(1, index, x, "amax")
            z = torch.cat([z, largest], dim=1)
        a = self.excite_map(torch.relu(self.squeeze_map(z)))
        return torch.relu(a) if self.config.senet_output == "relu" else 2 * torch.sigmoid(a)

    def forward(self, x: Tensor) -> Tensor:
        """x [rows, X] with each field times its weight."""
        return x * self.weights(x)[:, self.field_of_column]


class GateUnit(nn.Module):
    """gate(x) = 2 sigmoid(relu(x W + b) W' + b') of a prior and of an input that gets no gradient from it; 1 at the start."""

    def __init__(self, prior_width: int, input_width: int, hidden: int, out_width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(prior_width + input_width, hidden), nn.Linear(hidden, out_width)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, prior: Tensor, x: Tensor) -> Tensor:
        """float [rows, out_width] in 0..2 for the prior [rows, P] and the input [rows, X]."""
        return 2 * torch.sigmoid(self.last(torch.relu(self.first(torch.cat([prior, x.detach()], dim=1)))))


@system("epnet", stage="layers", paper="Chang et al., KDD 2023")
class EPNet(nn.Module):
    """Gates each number of the tower's input by the domain."""

    kind = "layer"
    Config = GateConfig

    def __init__(self, prior_width: int, input_width: int, config: GateConfig) -> None:
        super().__init__()
        self.gate = GateUnit(prior_width, input_width, config.hidden, input_width)

    def forward(self, prior: Tensor, x: Tensor) -> Tensor:
        """x [rows, X], gated."""
        return self.gate(prior, x) * x


@system("ppnet", stage="layers", paper="Chang et al., KDD 2023")
class PPNet(nn.Module):
    """One gate per hidden layer of the tower, from the prior."""

    kind = "layer"
    Config = GateConfig

    def __init__(self, prior_width: int, input_width: int, widths: Sequence[int], config: GateConfig) -> None:
        super().__init__()
        self.gates = nn.ModuleList(GateUnit(prior_width, input_width, config.hidden, width) for width in widths)

    def forward(self, prior: Tensor, x: Tensor) -> list[Tensor]:
        """Gates [rows, width] of the hidden layers, first to last."""
        return [gate(prior, x) for gate in self.gates]


@system("lhuc", stage="layers", paper="Swietojanski and Renals, SLT 2014")
class LHUC(nn.Module):
    """Learned contributions of hidden units, per value of a field."""

    kind = "layer"
    Config = GateConfig

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.widths = list(widths)

    def forward(self, a: Tensor) -> list[Tensor]:
        """Gates [rows, width] of the hidden layers for the values' vectors a [rows, sum of widths]."""
        return list((2 * torch.sigmoid(a)).split(self.widths, dim=1))


class PriorFields(nn.Module):
    """Named groups of fields, each with tables of its own: what gates and generated weights are conditioned on.

    Args:
        space: what the log offers.
        groups: by name, which fields and how wide a vector.
        id_dropout: see FieldMatrix.
    """

    def __init__(self, space: Space, groups: Mapping[str, tuple[Sequence[str], int]], *, id_dropout: float) -> None:
        super().__init__()
        self.groups = nn.ModuleDict(
            {name: FieldMatrix(space, dim, fields, id_dropout=id_dropout) for name, (fields, dim) in groups.items()}
        )
        self.request_width = sum(m.num_request * m.dim for m in self._matrices.values())

    @property
    def _matrices(self) -> dict[str, FieldMatrix]:
        return {name: m for name, m in self.groups.items() if isinstance(m, FieldMatrix)}

    def width(self, name: str) -> int:
        """Width of a group's prior."""
        matrix = self._matrices[name]
        return (matrix.num_request + matrix.num_candidate) * matrix.dim

    def request(self, batch: Batch) -> Tensor:
        """float32 [B, request_width]: the requests' part of all groups, end to end."""
        nothing = torch.zeros(batch.size, 0, device=batch.user.device)
        return torch.cat([nothing, *[m.request(batch).flatten(1) for m in self._matrices.values()]], dim=1)

    def forward(self, request: Tensor, items: Tensor) -> dict[str, Tensor]:
        """Priors by group, float32 [rows, width], from the requests' part of each row [rows, request_width] and its item [rows] int64."""
        matrices = self._matrices
        parts = request.split([m.num_request * m.dim for m in matrices.values()], dim=1)
        return {
            name: torch.cat([part, matrix.candidate(items).flatten(1)], dim=1)
            for (name, matrix), part in zip(matrices.items(), parts, strict=True)
        }


class TowerGates(nn.Module):
    """The gates of one tower.

    Args:
        blocks: widths of the fields in the tower's input.
        widths: of the hidden layers.
        config: which gates.
        priors: holds a group "epnet", "ppnet", "lhuc" for each that is on.
    """

    def __init__(self, blocks: Sequence[int], widths: Sequence[int], config: GateConfig, priors: PriorFields) -> None:
        super().__init__()
        if not widths and (config.ppnet or config.lhuc):
            raise ConfigError("ppnet and lhuc gate hidden layers, and this tower has none; give it widths")
        X = sum(blocks)
        self.senet = SENet(blocks, config) if config.senet else None
        self.epnet = EPNet(priors.width("epnet"), X, config) if config.epnet else None
        self.ppnet = PPNet(priors.width("ppnet"), X, widths, config) if config.ppnet else None
        self.lhuc = LHUC(widths) if config.lhuc else None

    def input(self, x: Tensor, priors: Mapping[str, Tensor]) -> Tensor:
        """The tower's input [rows, X], gated."""
        if self.senet is not None:
            x = self.senet(x)
        return x if self.epnet is None else self.epnet(priors["epnet"], x)

    def hidden(self, x: Tensor, priors: Mapping[str, Tensor]) -> list[Tensor] | None:
        """Gates [rows, width] of the hidden layers for the gated input; None where there are none."""
        gates = [] if self.ppnet is None else [self.ppnet(priors["ppnet"], x)]
        gates += [] if self.lhuc is None else [self.lhuc(priors["lhuc"])]
        return [torch.stack(of_layer).prod(0) for of_layer in zip(*gates, strict=True)] if gates else None


def prior_groups(gates: GateConfig, widths: Sequence[int]) -> dict[str, tuple[tuple[str, ...], int]]:
    """What `PriorFields` must hold for these gates over hidden layers of these widths."""
    groups: dict[str, tuple[tuple[str, ...], int]] = {}
    if gates.epnet:
        groups["epnet"] = (gates.epnet, gates.dim)
    if gates.ppnet:
        groups["ppnet"] = (gates.ppnet, gates.dim)
    if gates.lhuc:
        groups["lhuc"] = ((gates.lhuc,), sum(widths))
    return groups


def start_at_one(priors: PriorFields) -> None:
    """LHUC's vectors 0, so that all its gates are 1."""
    if "lhuc" in priors.groups:
        for parameter in priors.groups["lhuc"].parameters():
            nn.init.zeros_(parameter)
