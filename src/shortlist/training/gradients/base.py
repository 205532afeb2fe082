"""The contract of gradient rules, and the one backward pass per task that feeds them.

Every rule here answers with one number per task: the step of the shared parameters is a combination of the tasks' own gradients, and all
that a rule needs to choose it is their inner products. So the work on [tasks, parameters] is two matrix products, whatever the rule, and
the rule itself is a few operations on a [tasks, tasks] matrix in float64.

    M = G G'  [T, T]          c = rule(M)  [T]          step = T * c G  [P]

The factor T keeps the scale of the plain sum, which parameters of a single task get. T tasks, P shared parameters, m touched rows of a
sparse table, d its width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shortlist.models.base import Losses
from shortlist.training.choice import chosen
from shortlist.training.config import RuleChoice

Floats = NDArray[np.float64]
COLUMNS_AT_ONCE = 1 << 20
"""Parameters whose products are summed in float64 at a time."""


class GradientRule(ABC):
    """Combines the gradients of several tasks. `Config` is its settings dataclass.

    One rule object sees all steps of one training, in order; what it keeps between them is its `state`.
    """

    kind: ClassVar[str] = "gradient-rule"
    Config: ClassVar[type]
    by_matrix: bool = False
    """Each parameter tensor is combined on its own; else all of them together."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def weigh(self, gram_TT: Floats, place: int) -> Floats:
        """float64 [T]: the weight of each task's gradient, on the scale of a mean: gradients that are all equal are given back.

        Args:
            gram_TT: inner products of the tasks' gradients, none of which is 0.
            place: number of the parameter tensor where `by_matrix` is set, else 0.
        """

    @final
    def coefficients(self, gram_TT: Floats, place: int = 0) -> Floats:
        """`weigh` for any gradients: tasks without one (a batch without their labels) get 0 and do not count."""
        live = np.flatnonzero(np.diag(gram_TT) > 0)
        weight_T = np.zeros(len(gram_TT))
        if len(live):
            weight_T[live] = self.weigh(gram_TT[np.ix_(live, live)], place) * len(live) / len(gram_TT)
        return weight_T

    def state(self) -> dict[str, Any]:
        """What is kept between steps, as JSON; floats survive it to the last bit."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        del state  # a rule without state has nothing to take


def make_rule(choice: RuleChoice) -> GradientRule | None:
    """The chosen rule; None for the plain sum, which needs no gradients by task.

    Raises ConfigError: no rule of that name, or a setting that it does not have or refuses.
    """
    if choice == RuleChoice():  # no need to look for systems
        return None
    rule = chosen(choice.rule, choice.settings, GradientRule, "gradient rule")  # type: ignore[type-abstract]
    return None if choice.rule == "sum" else rule


@dataclass(frozen=True, slots=True)
class TaskGradients:
    """The tasks' gradients of one parameter tensor."""

    parameter: nn.Parameter
    matrix_TP: Tensor
    """One row per task, 0 where it has no gradient; of a sparse table only the rows that any task touched, P = m d."""
    rows_m: Tensor | None = None
    """int64 [m]: those rows; None for a dense parameter."""
    place: int = 0
    """Its number among the shared parameters."""

    def gram(self) -> Tensor:
        """float64 [T, T] inner products."""
        total = self.matrix_TP.new_zeros(len(self.matrix_TP), len(self.matrix_TP), dtype=torch.float64)
        for part in self.matrix_TP.split(COLUMNS_AT_ONCE, dim=1):
            wide = part.double()
            total += wide @ wide.T
        return total

    def set(self, weight_T: Tensor) -> None:
        """Make the weighted sum of the tasks' gradients the gradient of the parameter."""
        summed_P = weight_T.to(self.matrix_TP.dtype) @ self.matrix_TP
        if self.rows_m is None:
            self.parameter.grad = summed_P.view_as(self.parameter)
            return
        values = summed_P.view(len(self.rows_m), *self.parameter.shape[1:])
        self.parameter.grad = torch.sparse_coo_tensor(
            self.rows_m[None], values, self.parameter.shape, is_coalesced=True, check_invariants=False
        )


def stacked(parameter: nn.Parameter, gradients: Sequence[Tensor | None], place: int = 0) -> TaskGradients | None:
    """The gradients of one parameter, one per task and None where a task has none; None where no task has any."""
    there = [g for g in gradients if g is not None]
    if not there:
        return None
    if not all(g.is_sparse for g in there):
        zero = torch.zeros_like(parameter)
        dense = [zero if g is None else g.to_dense() if g.is_sparse else g for g in gradients]
        return TaskGradients(parameter, torch.stack(dense).flatten(1), place=place)
    found = [None if g is None else g.coalesce() for g in gradients]
    rows_m = torch.cat([g.indices()[0] for g in found if g is not None]).unique()
    matrix = parameter.new_zeros((len(found), len(rows_m), *parameter.shape[1:]))
    for task, g in enumerate(found):
        if g is not None:
            matrix[task, torch.searchsorted(rows_m, g.indices()[0])] = g.values()
    return TaskGradients(parameter, matrix.flatten(1), rows_m, place)


def backward(rule: GradientRule, losses: Losses, shared: Sequence[nn.Parameter]) -> dict[str, Tensor]:
    """Set the gradients of a step: of `shared` as the rule says, of every other parameter as the sum of the losses would.

    All losses come from one forward pass; each has a backward pass of its own. A sparse table takes part with the rows of the batch;
    a dense one whole, T times its size in memory, so large ones should be `sparse`.

    Returns, for the curve, the share of pairs of tasks whose gradients of the shared parameters point against each other.
    """
    wanted = [loss for loss in losses.values() if loss.requires_grad]
    rows: list[list[Tensor | None]] = []
    for number, loss in enumerate(wanted, start=1):
        loss.backward(retain_graph=number < len(wanted))
        rows.append([p.grad for p in shared])
        for p in shared:
            p.grad = None
    found = [stacked(p, of_p, place) for place, (p, of_p) in enumerate(zip(shared, zip(*rows)))]
    blocks = [block for block in found if block is not None]
    if not blocks:
        return {"conflicts": wanted[0].new_zeros(())}
    gram_QTT = torch.stack([block.gram() for block in blocks])
    whole = gram_QTT.sum(0).cpu().numpy()
    if not np.isfinite(whole).all():  # the trainer reports the loss or the norm that broke
        weights = np.ones((len(blocks), len(wanted)))
    elif rule.by_matrix:
        grams = gram_QTT.cpu().numpy()
        weights = np.stack([rule.coefficients(g, b.place) for g, b in zip(grams, blocks)]) * len(wanted)
    else:
        weights = np.broadcast_to(rule.coefficients(whole) * len(wanted), (len(blocks), len(wanted)))
    weight_QT = torch.from_numpy(np.array(weights)).to(wanted[0].device)
    for block, weight_T in zip(blocks, weight_QT):
        block.set(weight_T)
    pairs = whole[np.triu_indices(len(wanted), 1)]
    return {"conflicts": wanted[0].new_tensor(float((pairs < 0).mean()) if len(pairs) else 0.0).detach()}
