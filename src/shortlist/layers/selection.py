"""Which fields a model can do without: gates that learn it while the model trains, what a field costs, and the choice under a budget.

A field selector is a `FieldGates`: it stands between the fields' vectors and the tower, gives the gated vectors and what the loss must add,
and says in the end how much the model wants to keep each field.

    ConcreteGates   FSCD ("Towards a Better Tradeoff between Effectiveness and Efficiency in Pre-Ranking", Ma et al., SIGIR 2021):

        z_j   = sigmoid((l_j + log u - log(1 - u)) / t)         u uniform, drawn anew for every row and field;  v_j <- z_j v_j
        loss  = cross-entropy + weight * sum_j alpha_j mean(z_j)         alpha_j = log(1 - theta_j) - log(theta_j)
        theta_j = 1 - sigmoid(c_j)                              the prior's chance of keeping a field falls with its cost c_j

      With this prior alpha_j = c_j exactly, so no logarithm is ever taken. Without `cost_aware` it is the ancestor, Dropout Feature
      Ranking (Chang et al., arXiv 1712.08645): every field pays alike, and pays delta_j = sigmoid(l_j) itself.

    ExcitationGates   COLD ("COLD: Towards the Next Generation of Pre-Ranking System", Wang et al., arXiv 2007.16122):

        s = sigmoid(W [v_1; ...; v_M] + b),   v_j <- s_j v_j            the mean of s_j over training ranks the fields; no cost is paid

Differences from the papers: the cost term is weighed against the mean cross-entropy by `weight`, where FSCD divides by the number of rows
(which moves no gate in a few epochs) and its code by the batch size; costs are scaled to a mean of 1, so that no single field's vocabulary
drowns the others; a gate out of training is its mean delta_j.

r rows (requests with one candidate each), M fields, D width of a vector.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from shortlist.data.schema import Categorical, Field, Numeric, Space, Vector
from shortlist.data.schema import Sequence as SequenceField
from shortlist.errors import ConfigError
from shortlist.registry import nearest

FieldKind = Literal["id", "set", "number", "history", "match", "pair"]
RECENT_BATCHES = 100
"""Over so many of the last training batches the mean of COLD's scores runs."""
SMALLEST_DRAW = 1e-6
"""u stays so far from 0 and 1, where its log odds are infinite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GatesConfig:
    """Settings of FSCD's gates."""

    weight: float = 3e-3
    """Of the cost term against the mean cross-entropy, whatever the batch size; 1e-3 to 1e-2. What a kept field of mean cost pays."""
    cost_aware: bool = True
    """Fields pay by their costs; False = all alike, which is Dropout Feature Ranking."""
    temperature: float = 0.1
    """t of the concrete relaxation; above 0.1 draws are no longer nearly 0 or 1, and the weights after a gate can undo it."""
    start: float = 0.0
    """l_j at first: 0 keeps a field in half of the draws; 2 in seven of eight, which spares fields that learn slowly."""
    rate: float = 5.0
    """The gates' learning rate as a multiple of the network's, under Adam."""

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ConfigError(f"gates.weight must not be below 0, got {self.weight}")
        for name in ("temperature", "rate"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"gates.{name} must be above 0, got {getattr(self, name)}")


class FieldGates(nn.Module, ABC):
    """Learns how much a model wants each of its M fields."""

    @abstractmethod
    def forward(self, x_rMD: Tensor, cost_M: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gated vectors float32 [r, M, D], and what the loss must add, a scalar; None where nothing is paid, as out of training.

        Args:
            x_rMD: the fields' vectors.
            cost_M: what each field costs, float32 [M], of mean 1.
        """

    @abstractmethod
    def importance(self) -> Tensor:
        """float32 [M] in 0..1: how much each field is wanted, no gradient."""


class ConcreteGates(FieldGates):
    """FSCD's gates, and those of Dropout Feature Ranking; see the top of this file."""

    def __init__(self, num_fields: int, config: GatesConfig) -> None:
        super().__init__()
        self.config = config
        # Adam's step does not depend on the scale of a gradient, so that l = rate * raw moves `rate` times as fast as other parameters.
        self.raw_M = nn.Parameter(torch.full((num_fields,), config.start / config.rate))

    @property
    def logit_M(self) -> Tensor:
        """l_j, with its gradient."""
        return self.config.rate * self.raw_M

    def draw(self, num_rows: int) -> Tensor:
        """z float32 [num_rows, M]: one draw for every row and field."""
        u_rM = torch.rand(num_rows, len(self.raw_M), device=self.raw_M.device)
        return torch.sigmoid(
            (self.logit_M + u_rM.clamp(SMALLEST_DRAW, 1 - SMALLEST_DRAW).logit()) / self.config.temperature
        )

    def forward(self, x_rMD: Tensor, cost_M: Tensor) -> tuple[Tensor, Tensor | None]:
        """See FieldGates."""
        if not self.training:
            return x_rMD * self.logit_M.sigmoid()[:, None], None
        z_rM = self.draw(len(x_rMD))
        paid_M = cost_M * z_rM.mean(0) if self.config.cost_aware else self.logit_M.sigmoid()
        return x_rMD * z_rM[:, :, None], self.config.weight * paid_M.sum()

    def importance(self) -> Tensor:
        """delta_j, the chance that a field is kept."""
        return self.logit_M.detach().sigmoid()


class ExcitationGates(FieldGates):
    """COLD's squeeze-and-excitation scores; see the top of this file."""

    mean_M: Tensor
    num_seen: Tensor

    def __init__(self, num_fields: int, dim: int) -> None:
        super().__init__()
        self.num_fields = num_fields
        self.map = nn.Linear(num_fields * dim, num_fields)
        self.register_buffer("mean_M", torch.full((num_fields,), 0.5))
        self.register_buffer("num_seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x_rMD: Tensor, cost_M: Tensor) -> tuple[Tensor, Tensor | None]:
        """See FieldGates; costs are not read."""
        s_rM = self.map(x_rMD.flatten(1)).sigmoid()
        if self.training and len(s_rM):
            with torch.no_grad():
                self.num_seen += 1
                self.mean_M.lerp_(s_rM.mean(0), 1 / min(int(self.num_seen), RECENT_BATCHES))
        return x_rMD * s_rM[:, :, None], None

    def importance(self) -> Tensor:
        """The mean score of each field over the newest training batches."""
        return self.mean_M.clone()


# --- what a field costs ---


@dataclass(frozen=True, kw_only=True, slots=True)
class CostConfig:
    """What a field costs: c_j = compute * o_j + width * D + keys * n_j, scaled afterwards to a mean of 1."""

    measured: bool = False
    """o_j is the time it takes to build and look up the field for 1,000 candidates, in microseconds, measured before training; two
    trainings may then choose differently. False = by kind and name, as below."""
    kinds: Mapping[str, float] = field(default_factory=dict)
    """o_j by kind, over the defaults id 1, number 1, set 2, pair 2, history 4, match 4."""
    declared: Mapping[str, float] = field(default_factory=dict)
    """o_j by name of a field, such as {"context.weather" = 20.0}: what a call to another service costs. Goes before all else."""
    compute: float = 1.0
    """Weight of o_j."""
    width: float = 0.01
    """Weight of the width of the field's vector."""
    keys: float = 1e-7
    """Weight of the number of keys n_j, so of memory."""

    def __post_init__(self) -> None:
        for name in self.kinds:
            if name not in KIND_COSTS:
                raise ConfigError(f"costs.kinds has no kind {name!r}: {nearest(name, list(KIND_COSTS))}")
        numbers = {**self.kinds, **self.declared, "compute": self.compute, "width": self.width, "keys": self.keys}
        for name, value in numbers.items():
            if not 0 <= value < float("inf"):
                raise ConfigError(f"costs: {name} must be a number from 0 on, got {value}")


KIND_COSTS: Mapping[FieldKind, float] = {
    "id": 1.0,
    "number": 1.0,
    "set": 2.0,
    "pair": 2.0,
    "history": 4.0,
    "match": 4.0,
}
"""o_j where nothing else is said: a look-up < a mean over a set < what reads the whole past."""


class FieldFact(NamedTuple):
    """What is known of a field before anything is measured."""

    name: str
    kind: FieldKind
    num_keys: int
    """n_j: rows of its table, the unknown one included; 0 for numbers."""


def facts_of(space: Space, names: Sequence[str]) -> list[FieldFact]:
    """Facts of named fields, as layers/field_matrix.py and layers/selected_fields.py name them."""
    sides: dict[str, tuple[Field, ...]] = {
        "user": space.user_fields,
        "context": space.context_fields,
        "history": space.items.fields,
        "item": space.items.fields,
    }
    ids = {"user": space.num_users + 1, "item": space.num_items + 1, "history": space.num_items + 1}
    facts = []
    for name in names:
        side, _, own = name.partition(".")
        if side in ("match", "pair"):
            facts.append(FieldFact(name, "match" if side == "match" else "pair", 0))
        elif not own:
            facts.append(FieldFact(name, "history" if side == "history" else "id", ids[side]))
        else:
            of_log = next(f for f in sides[side] if f.name == own)
            kind = "history" if side == "history" else _kind(of_log)
            facts.append(
                FieldFact(name, kind, of_log.size + 1 if isinstance(of_log, Categorical | SequenceField) else 0)
            )
    return facts


def _kind(of_log: Field) -> FieldKind:
    match of_log:
        case Categorical():
            return "id"
        case Numeric() | Vector():
            return "number"
        case _:
            return "set"


def field_costs(facts: Sequence[FieldFact], dim: int, config: CostConfig, measured_M: Tensor | None = None) -> Tensor:
    """c_j, float32 [M], of mean 1.

    Args:
        dim: D.
        measured_M: o_j in microseconds, float [M], in place of those by kind; declared ones go before.

    Raises ConfigError for a declared field that is not there, or where nothing costs anything.
    """
    names = [fact.name for fact in facts]
    for name in config.declared:
        if name not in names:
            raise ConfigError(f"costs.declared names {name!r}, which is not among the fields: {nearest(name, names)}")
    by_kind: dict[str, float] = {str(kind): o for kind, o in KIND_COSTS.items()} | dict(config.kinds)
    known = [by_kind[fact.kind] for fact in facts] if measured_M is None else measured_M.tolist()
    work_M = torch.tensor([config.declared.get(name, o) for name, o in zip(names, known, strict=True)])
    keys_M = torch.tensor([float(fact.num_keys) for fact in facts])
    cost_M = config.compute * work_M + config.width * dim + config.keys * keys_M
    if not cost_M.sum() > 0:
        raise ConfigError(
            "costs: no field costs anything, so there is nothing to choose by; set compute, width or keys above 0"
        )
    return cost_M / cost_M.mean()


# --- the choice ---


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceConfig:
    """How many fields stay."""

    epochs: int = 3
    """Of the first phase, in which gates learn what matters; 0 = no choice is made, all fields stay."""
    keep: int = 0
    """Fields to keep, those that are wanted most; 0 = as many as the budget allows."""
    budget: float = 0.25
    """Share of the cost of all fields that the kept ones may have; filled greedily, the most wanted first. Only read where keep is 0."""

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.keep < 0:
            raise ConfigError(f"choice.epochs and choice.keep must not be below 0, got {self.epochs} and {self.keep}")
        if not 0 < self.budget <= 1:
            raise ConfigError(f"choice.budget must be above 0 and at most 1, got {self.budget}")


def choose(importance_M: Tensor, cost_M: Tensor, config: ChoiceConfig, needed_M: Tensor | None = None) -> Tensor:
    """bool [M]: the fields that stay. Equals go in the order of the fields.

    Args:
        importance_M: how much each is wanted.
        cost_M: what each costs, in any unit.
        needed_M: bool [M], fields of which at least one must stay, as those of the candidate for a model that is to tell candidates apart:
            where the choice has none, the most wanted one that the budget allows goes first. None = no such fields.

    Raises ConfigError where the budget allows no (needed) field at all.
    """
    order = importance_M.argsort(descending=True, stable=True).tolist()
    kept_M = _filled(order, cost_M, config)
    if needed_M is not None and bool(needed_M.any()) and not bool((kept_M & needed_M).any()):
        for first in (m for m in order if needed_M[m]):
            kept_M = _filled([first, *(m for m in order if m != first)], cost_M, config)
            if kept_M[first]:
                break
    wanted_M = kept_M if needed_M is None or not bool(needed_M.any()) else kept_M & needed_M
    if not bool(wanted_M.any()):
        least = float(cost_M.min() / cost_M.sum())
        raise ConfigError(
            f"choice.budget = {config.budget} allows no field that tells candidates apart; the cheapest field of all takes {least:.3f}: "
            "raise the budget, or set choice.keep"
        )
    return kept_M


def _filled(order: Sequence[int], cost_M: Tensor, config: ChoiceConfig) -> Tensor:
    """bool [M]: fields taken in this order, by number, or passed over where they do not fit what is left of the budget."""
    kept_M = torch.zeros(len(cost_M), dtype=torch.bool)
    if config.keep:
        kept_M[list(order[: config.keep])] = True
        return kept_M
    cost = cost_M.double().tolist()
    left = config.budget * sum(cost) * (1 + 1e-9)
    for m in order:
        if cost[m] <= left:
            kept_M[m] = True
            left -= cost[m]
    return kept_M


class FieldReport(NamedTuple):
    """What became of one field."""

    name: str
    cost: float
    """c_j, of mean 1."""
    importance: float
    """How much the gates wanted it; 0.5 where none were trained."""
    is_kept: bool


class FieldChoice(nn.Module):
    """What was chosen, saved with the weights: names of all fields, what each costs, how much it was wanted, whether it stays."""

    names_utf8: Tensor
    cost_M: Tensor
    importance_M: Tensor
    kept_M: Tensor

    def __init__(self, names: Sequence[str], cost_M: Tensor) -> None:
        super().__init__()
        self.names = tuple(names)
        self.register_buffer("names_utf8", torch.tensor(list(json.dumps(self.names).encode()), dtype=torch.uint8))
        self.register_buffer("cost_M", cost_M)
        self.register_buffer("importance_M", torch.full((len(self.names),), 0.5))
        self.register_buffer("kept_M", torch.ones(len(self.names), dtype=torch.bool))

    def kept_names(self) -> tuple[str, ...]:
        """Fields that stay, in order."""
        return tuple(name for name, kept in zip(self.names, self.kept_M.tolist(), strict=True) if kept)

    def kept_share(self) -> float:
        """Cost of the kept fields as a share of that of all."""
        return float(self.cost_M[self.kept_M].sum() / self.cost_M.sum())

    def report(self) -> list[FieldReport]:
        """Every field, the most wanted first."""
        rows = zip(self.names, self.cost_M.tolist(), self.importance_M.tolist(), self.kept_M.tolist(), strict=True)
        return sorted((FieldReport(*row) for row in rows), key=lambda row: -row.importance)

    def histogram(self, bins: int = 10) -> list[int]:
        """Fields by importance, in equal bins over 0..1: whether the gates have decided."""
        counts: list[int] = torch.histc(self.importance_M.float().cpu(), bins, 0, 1).int().tolist()
        return counts

    def check_names(self, names_utf8: Tensor) -> None:
        """ValueError where saved names are not these."""
        saved = json.loads(bytes(names_utf8.tolist()))
        if tuple(saved) != self.names:
            other = sorted(set(saved) ^ set(self.names))
            raise ValueError(f"saved for other fields: {other or 'in another order'}")


assert set(KIND_COSTS) == set(get_args(FieldKind))


def linear_log(x: Tensor) -> Tensor:
    """COLD's squashing of numbers of any range: x from -1 to 1, beyond it sign(x) (log|x| + 1); same shape."""
    return x.clamp(-1, 1) + x.sign() * x.abs().clamp(min=1).log()
