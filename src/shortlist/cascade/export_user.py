"""A ranker's user side for other runtimes: plain tensors of B requests in, the state that its scoring of candidates reads out.

    past_item      int64 [B, L] catalogue rows of past events, oldest first, then 0; at most the model's newest max_history
    past_length    int64 [B] how many there are
    past_time, past_action, past_value, past_group     [B, L] of the same events, where the model reads them
    user, time     int64 [B] user row (0 = unknown), second of the request, where the model reads them
    user_NAME, context_NAME     columns of the fields, where the model reads them
    -> state       the inputs of the scoring program, [B, ...] each

Histories have any length, and a program has dense inputs only. So one more request is appended inside, which owns all padding, and its
state is thrown away: sums and means over a request's events never see padding, whatever the model does with rows of events.

B requests, L events of the longest history, E = B x L.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shortlist.cascade.export_programs import Runner, onnx_runner, quiet, saved, signature, to_onnx, why
from shortlist.cascade.exports import TOLERANCE, ExportDiffers, differs
from shortlist.data.batches import Batch, History, split_batch
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Column
from shortlist.models.base import Ranker

PAST, LENGTH = "past_item", "past_length"
TRACED_REQUESTS = 16
"""Requests of the batch that is traced; any number may be asked."""


class _PaddedPast(Jagged):
    """Histories of B requests on a grid of B x L, and a last row, number B, that owns the padding."""

    __slots__ = ("grid",)
    grid: tuple[int, int]
    """B and L."""

    @classmethod
    def on(cls, grid: tuple[int, int], values: Tensor, offsets: Tensor) -> _PaddedPast:
        """`values` [B x L, ...] and `offsets` [B + 2], of which only the differences are read."""
        past = cls(values, offsets)
        object.__setattr__(past, "grid", grid)
        return past

    def _position(self) -> tuple[Tensor, Tensor]:
        """Place on the grid and whether an event stands there, [B, L] each."""
        num_requests, length = self.grid
        place_BL = torch.arange(length).expand(num_requests, length)
        return place_BL, place_BL < self.offsets.diff()[:num_requests, None]

    @property
    def lengths(self) -> Tensor:
        """Of the padding's row: L, so that no place lies beyond its end."""
        num_requests, length = self.grid
        return torch.cat([self.offsets.diff()[:num_requests], torch.full((1,), length)])

    @property
    def row_of_value(self) -> Tensor:
        num_requests, _ = self.grid
        _, is_real_BL = self._position()
        return torch.where(is_real_BL, torch.arange(num_requests)[:, None], num_requests).reshape(-1)

    @property
    def position_of_value(self) -> Tensor:
        return self._position()[0].reshape(-1)

    def padded(self, length: int | None = None, fill: float = 0) -> tuple[Tensor, Tensor]:
        """[B + 1, L, ...] with an empty last row."""
        num_requests, longest = self.grid
        if length is not None and length != longest:
            raise NotImplementedError(f"histories padded to {length} places")
        _, is_real_BL = self._position()
        dense = self.values.reshape(num_requests, longest, *self.values.shape[1:])
        mask = is_real_BL.reshape(num_requests, longest, *[1] * (dense.dim() - 2))
        dense = torch.where(mask, dense, torch.full_like(dense, fill))
        return torch.cat([dense, torch.full_like(dense[:1], fill)]), torch.cat([is_real_BL, is_real_BL[:1] & False])

    def with_values(self, values: Tensor) -> Jagged:
        """The same grid with other values."""
        return _PaddedPast.on(self.grid, values, self.offsets)


class _Past(History):
    """A history that is no longer than what is read of it."""

    __slots__ = ()

    def last(self, count: int) -> History:
        """All of it."""
        return self


class UserSide(nn.Module):
    """`user_state` of a ranker over plain tensors; see the top of this file. The ranker itself stays as it is.

    Args:
        ranker: whose item encoders are tables already.
        names: the inputs that `forward` takes, in order; what is not among them is 0.
    """

    def __init__(self, ranker: Ranker, names: Sequence[str]) -> None:
        super().__init__()
        self.ranker = copy.deepcopy(ranker).cpu().eval()
        self.requires_grad_(False)
        self.names = tuple(names)

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """The state's tensors, [B, ...] each."""
        inputs = dict(zip(self.names, given, strict=True))
        item_BL, length_B = inputs[PAST], inputs[LENGTH]
        num_requests, longest = item_BL.shape
        counts = torch.cat([length_B.new_zeros(1), length_B, length_B.new_zeros(1)])
        items = _PaddedPast.on((num_requests, longest), item_BL.reshape(-1), counts.cumsum(0))

        def events(name: str, dtype: torch.dtype) -> Tensor:
            column = inputs.get(f"past_{name}")
            return torch.zeros_like(items.values, dtype=dtype) if column is None else column.reshape(-1)

        def row(name: str) -> Tensor:
            column = inputs.get(name)
            return length_B.new_zeros(num_requests + 1) if column is None else _with_row(column)

        past = _Past(
            items=items,
            time=events("time", torch.int64),
            action=events("action", torch.int64),
            value=events("value", torch.float32),
            group=events("group", torch.int64),
        )
        space = self.ranker.space
        batch = Batch(
            user=row("user"),
            time=row("time"),
            history=past,
            user_fields={f.name: row(f"user_{f.name}") for f in space.user_fields if f"user_{f.name}" in inputs},
            context={f.name: row(f"context_{f.name}") for f in space.context_fields if f"context_{f.name}" in inputs},
        )
        state = self.ranker.user_state(batch)
        parts = (state,) if isinstance(state, Tensor) else tuple(state)
        return tuple(part[:num_requests] for part in parts)


def _with_row(column: Tensor) -> Tensor:
    """[B + 1, ...]: a row of zeros more."""
    return torch.cat([column, torch.zeros_like(column[:1])])


def user_inputs(ranker: Ranker, batch: Batch) -> dict[str, Tensor]:
    """A batch as the program reads it, by input name. Sequence fields, which have no dense column, are left out."""
    history = batch.history.last(ranker.max_history)

    def dense(values: Tensor) -> Tensor:
        return history.items.with_values(values).padded()[0]

    fields: dict[str, Mapping[str, Column]] = {"user": batch.user_fields, "context": batch.context}
    columns = {
        f"{side}_{name}": column
        for side, of in fields.items()
        for name, column in of.items()
        if isinstance(column, Tensor)
    }
    return {
        PAST: dense(history.items.values),
        LENGTH: history.items.lengths,
        "past_time": dense(history.time),
        "past_action": dense(history.action),
        "past_value": dense(history.value),
        "past_group": dense(history.group),
        "user": batch.user,
        "time": batch.time,
        **columns,
    }


def shortened(batch: Batch, ranker: Ranker) -> Batch:
    """The same requests, each with the newest half of its longest history at most."""
    longest = min(int(batch.history.items.lengths.max()), ranker.max_history)
    return replace(batch, history=batch.history.last(max(1, longest // 2)))


def traced_user_side(ranker: Ranker, batch: Batch) -> tuple[torch.export.ExportedProgram, tuple[str, ...]]:
    """The program and the names of its inputs: those that the model reads, the past always.

    Args:
        ranker: whose item encoders are tables already.
        batch: at least two requests and two past events of one of them.

    Raises whatever torch raises where it can not follow the model.
    """
    given = user_inputs(ranker, batch)
    names = tuple(given)
    program = _trace(ranker, names, given)
    size = torch.ops.aten.sym_size.int
    program.graph.eliminate_dead_code()
    read = {
        node.name
        for node in program.graph.nodes
        if node.op == "placeholder" and any(user.target is not size for user in node.users)
    }
    places = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
    kept = tuple(name for name, place in zip(names, places, strict=True) if place in read or name in (PAST, LENGTH))
    return (program, names) if kept == names else (_trace(ranker, kept, given), kept)


def export_user(
    ranker: Ranker,
    tables: Ranker,
    batches: Sequence[Batch],
    state: Sequence[str],
    folder: Path,
    name: str,
    *,
    onnx: bool,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Write user.pt2 and user.onnx, compared with the run; what export.json says of them, and the inputs of the last batch.

    Where torch can not follow the model, or what it followed gives something else, nothing is written and the reason is given.

    Args:
        ranker: as the run has it.
        tables: the same with its item encoders as tables.
        batches: real ones, the first with 2 requests and 2 past events at least.
        state: names of the state's tensors.
        onnx: write user.onnx too.
    """
    try:
        return _exported(ranker, tables, batches, state, folder, name, onnx)
    except Exception as error:  # a model may do anything; the scoring program is worth having without this one
        for path in folder.glob("user.*"):
            path.unlink()
        sides = {"user": batches[0].user_fields, "context": batches[0].context}
        jagged = [f"{side}_{field}" for side, of in sides.items() for field, c in of.items() if isinstance(c, Jagged)]
        sets = f"; fields that hold sets have no dense input: {', '.join(jagged)}" if jagged else ""
        return {"left_out": f"its user_state can not be followed ({why(error)}){sets}"}, {}


def _exported(
    ranker: Ranker, tables: Ranker, batches: Sequence[Batch], state: Sequence[str], folder: Path, name: str, onnx: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    few = next(
        split_batch(batches[0], [min(TRACED_REQUESTS, batches[0].size), max(batches[0].size - TRACED_REQUESTS, 0)])
    )
    with quiet():
        program, inputs = traced_user_side(tables, few)
    tried = [*batches, shortened(batches[-1], ranker)]
    given = [user_inputs(ranker, batch) for batch in tried]
    ours = [ranker.user_state(batch) for batch in tried]
    checks = {}

    def check(file: str, run: Runner) -> None:
        worst = 0.0
        for each, mine in zip(given, ours):
            parts = (mine,) if isinstance(mine, Tensor) else tuple(mine)
            for part, theirs in zip(parts, run([each[n] for n in inputs]), strict=True):
                if part.shape != theirs.shape:
                    raise ExportDiffers(f"{file} gives {list(theirs.shape)} where the run gives {list(part.shape)}")
                worst = max(worst, differs(part.float(), theirs.float()))
        if worst > TOLERANCE:
            raise ExportDiffers(f"{file} differs from the run's user_state by up to {worst:.2g}")
        checks[file] = worst

    if onnx:
        to_onnx(program, folder / "user.onnx", inputs, state, name)
        check("user.onnx", onnx_runner(folder / "user.onnx", inputs))
    module = saved(program, folder / "user.pt2")
    check("user.pt2", lambda tensors: module(*tensors))
    about = {
        "inputs": [signature(n, given[0][n], dict(enumerate("BL")) if _has_events(n) else {0: "B"}) for n in inputs],
        "outputs": list(state),
        "meaning": f"past_item: catalogue rows of the newest {ranker.max_history} events at most, oldest first, then 0; past_length: how "
        "many they are; fields as the run's dataset encodes them",
        "check": {"requests": batches[0].size, "max_difference": checks},
    }
    return about, {n: given[len(batches) - 1][n] for n in inputs}


def _has_events(name: str) -> bool:
    return name.startswith("past_") and name != LENGTH


def _trace(ranker: Ranker, names: Sequence[str], given: Mapping[str, Tensor]) -> torch.export.ExportedProgram:
    requests, events = torch.export.Dim("B"), torch.export.Dim("L")
    shapes = tuple({0: requests, 1: events} if _has_events(name) else {0: requests} for name in names)
    module = UserSide(ranker, names)
    return torch.export.export(module, tuple(given[name] for name in names), dynamic_shapes=(shapes,), strict=True)
