"""Optimisers: row-wise ones for sparse embedding tables, torch's own for everything else.

A sparse table's gradient names the rows of the batch. A step here reads and writes those rows and their state, and nothing else:
its cost does not depend on the size of the table.

n rows of a table, d width, m rows touched in a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shortlist.errors import ConfigError
from shortlist.training.config import TrainerConfig


class RowwiseAdagrad(Optimizer):
    """Adagrad with one accumulator per row: the sum over steps of the mean squared gradient of the row.

        s_r <- s_r + mean_j g_rj^2          w_r <- w_r - lr * g_r / (sqrt(s_r) + eps)

    State: `sum` float32 [n]. With d = 1 this is Adagrad (Duchi et al., JMLR 2011); the shared accumulator is that of
    Mudigere et al., ISCA 2022 (section 4.1.4). ConfigError on a gradient that is not sparse.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float = 1e-2, eps: float = 1e-10, initial_sum: float = 0.0
    ) -> None:
        _check(lr, eps)
        super().__init__(params, {"lr": lr, "eps": eps, "initial_sum": initial_sum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the rows that the gradients name."""
        loss = _evaluate(closure)
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is None:
                    continue
                state = self.state[table]
                if not state:
                    state["sum"] = table.new_full((len(table),), group["initial_sum"])
                rows_m, grad_md = _touched(table)
                sum_m = state["sum"][rows_m] + grad_md.square().mean(1)
                state["sum"].index_copy_(0, rows_m, sum_m)
                scale_m = -group["lr"] / (sum_m.sqrt() + group["eps"])
                table.index_copy_(0, rows_m, table[rows_m] + grad_md * scale_m[:, None])
        return loss


class RowwiseAdam(Optimizer):
    """Adam with lazy moments and one second moment per row: a row's moments move only in steps that touch it.

        m_r <- b1 m_r + (1 - b1) g_r        v_r <- b2 v_r + (1 - b2) mean_j g_rj^2
        w_r <- w_r - lr * sqrt(1 - b2^t) / (1 - b1^t) * m_r / (sqrt(v_r) + eps)

    t counts the steps of the table, not of the row, as in torch.optim.SparseAdam, which is this rule at d = 1; so a row that first
    appears late takes a larger first step than Adam's. State: `mean` float32 [n, d], `square` float32 [n], `step` int.
    ConfigError on a gradient that is not sparse.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        _check(lr, eps)
        if not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"betas must be at least 0 and below 1, got {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the rows that the gradients name."""
        loss = _evaluate(closure)
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for table in group["params"]:
                if table.grad is None:
                    continue
                state = self.state[table]
                if not state:
                    state.update(step=0, mean=torch.zeros_like(table), square=table.new_zeros(len(table)))
                state["step"] += 1
                rows_m, grad_md = _touched(table)
                mean_md = state["mean"][rows_m].lerp_(grad_md, 1 - beta1)
                square_m = state["square"][rows_m].lerp_(grad_md.square().mean(1), 1 - beta2)
                state["mean"].index_copy_(0, rows_m, mean_md)
                state["square"].index_copy_(0, rows_m, square_m)
                rate = group["lr"] * (1 - beta2 ** state["step"]) ** 0.5 / (1 - beta1 ** state["step"])
                scale_m = -rate / (square_m.sqrt() + group["eps"])
                table.index_copy_(0, rows_m, table[rows_m] + mean_md * scale_m[:, None])
        return loss


def _check(lr: float, eps: float) -> None:
    if lr <= 0 or eps < 0:
        raise ConfigError(f"lr must be above 0 and eps not below, got lr={lr}, eps={eps}")


def _evaluate(closure: Callable[[], float] | None) -> float | None:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _touched(table: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows [m] int64 of the table's gradient and their summed gradients [m, d]."""
    gradient = table.grad
    assert gradient is not None
    if not gradient.is_sparse:
        raise ConfigError(
            f"a sparse table of shape {tuple(table.shape)} got a dense gradient: something reads the whole table, "
            "as a full softmax does; set sparse = false for it"
        )
    gradient = gradient.coalesce()
    return gradient.indices()[0], gradient.values()


def sparse_tables(system: nn.Module) -> list[nn.Parameter]:
    """Weights of the modules whose gradients are sparse, each once."""
    tables: dict[int, nn.Parameter] = {}
    for module in system.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            tables[id(module.weight)] = cast(nn.Parameter, module.weight)
    return list(tables.values())


def build_optimisers(
    system: nn.Module, config: TrainerConfig, parameters: Iterable[nn.Parameter] | None = None
) -> list[Optimizer]:
    """The optimisers of one phase: at most one for dense parameters and one for sparse tables.

    Args:
        system: tells which parameters are sparse tables: those of `nn.Embedding` or `nn.EmbeddingBag` with sparse=True.
        config: rules, rates and decay.
        parameters: what to train; None = all that require a gradient.

    Raises ConfigError when there is nothing to train.
    """
    chosen = [p for p in (system.parameters() if parameters is None else parameters) if p.requires_grad]
    chosen = list({id(p): p for p in chosen}.values())
    if not chosen:
        raise ConfigError(f"{type(system).__name__} has no parameter to train: all are frozen, or there are none")
    of_tables = {id(weight) for weight in sparse_tables(system)}
    tables = [p for p in chosen if id(p) in of_tables]
    dense = [p for p in chosen if id(p) not in of_tables]
    optimisers: list[Optimizer] = []
    if dense:
        optimisers.append(_dense(dense, config))
    if tables:
        lr = config.lr if config.table_lr is None else config.table_lr
        rule = RowwiseAdam if config.table_optimiser == "adam" else RowwiseAdagrad
        optimisers.append(rule(tables, lr=lr))
    return optimisers


def _dense(parameters: list[nn.Parameter], config: TrainerConfig) -> Optimizer:
    """Torch's optimiser, with decay on matrices only; its fused form where there is one, several times faster on large tables."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    match config.optimiser:
        case "adamw":
            return torch.optim.AdamW(groups, lr=config.lr, fused=True)
        case "adam":
            return torch.optim.Adam(groups, lr=config.lr, fused=True)
        case "adagrad":
            return torch.optim.Adagrad(groups, lr=config.lr)
        case "sgd":
            return torch.optim.SGD(groups, lr=config.lr, fused=True)


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients so that their joint Euclidean norm is at most `max_norm`; returns the norm before, a scalar.

    Sparse gradients are summed by row first and count with the rows they hold, so that no table is read.
    """
    values: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
        values.append(parameter.grad.values() if parameter.grad.is_sparse else parameter.grad)
    if not values:
        return torch.zeros(())
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(values)))
    torch._foreach_mul_(values, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
