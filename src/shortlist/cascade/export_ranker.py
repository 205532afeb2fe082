"""A ranker for other runtimes: tensors in, tensors out, through torch.export and ONNX, in two programs.

The user's side is computed once per request (`export_user` has its inputs), the candidates' side reads what it gives:

    state      what the model's `user_state` gives for B requests: one tensor or the fields of a NamedTuple, [B, ...] each
    item       int64 [B, C] catalogue rows; 0 where a request has fewer candidates
    pair       float32 [B, C, F] user-item fields in the order that export.json gives
    -> scores  float32 [B, C] per task; those beside item 0 mean nothing

An item's vector depends on its row alone, so item encoders become tables [n + 1, D] of finished vectors. B and C, and what else differs
between batches, are free. A model whose user side torch can not follow is exported without it, and export.json says why.

    OUT/user.pt2, ranker.pt2       torch.export.load
    OUT/user.onnx, ranker.onnx     any ONNX runtime
    OUT/items.parquet              row and item_id of the catalogue
    OUT/example.safetensors        inputs and expected scores of one real batch, to check a runtime with
    OUT/export.json                signatures, and how the files compare with the run

B requests, C candidates per request, t candidates end to end, n items, D width of a vector, F pair fields.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shortlist.cascade.cascade import stage_space
from shortlist.cascade.export_programs import Runner, onnx_runner, quiet, saved, signature, to_onnx, why
from shortlist.cascade.export_user import export_user
from shortlist.cascade.exports import (
    CHECKED_REQUESTS,
    TOLERANCE,
    ExportDiffers,
    chosen,
    differs,
    item_table,
    write_export,
)
from shortlist.cascade.lessons import make_batch, sample
from shortlist.cascade.run import Run
from shortlist.data.batches import Batch, Candidates, split_batch
from shortlist.data.jagged import Jagged
from shortlist.errors import ConfigError, DataError
from shortlist.extras import library
from shortlist.layers.fields import ItemEncoder
from shortlist.models.base import Ranker
from shortlist.store.snapshot import save_tensors

TRACED_REQUESTS = 16
"""Requests of the batch that is traced; any number may be scored."""


class Flat(NamedTuple):
    """A batch as the exported ranker reads it."""

    state: tuple[Tensor, ...]
    item_BC: Tensor
    pair_BCF: Tensor
    is_real_BC: Tensor

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """In the order of the signature."""
        return (*self.state, self.item_BC, self.pair_BCF)


class _Grid(Jagged):
    """Jagged rows of one length, B x C: nothing about it depends on values, so that it can be traced."""

    __slots__ = ()

    @property
    def _shape(self) -> tuple[int, int]:
        num_rows = self.offsets.shape[0] - 1
        return num_rows, self.values.shape[0] // num_rows

    @property
    def row_of_value(self) -> Tensor:
        num_rows, length = self._shape
        return torch.arange(num_rows)[:, None].expand(num_rows, length).reshape(-1)

    @property
    def position_of_value(self) -> Tensor:
        num_rows, length = self._shape
        return torch.arange(length).expand(num_rows, length).reshape(-1)

    def padded(self, length: int | None = None, fill: float = 0) -> tuple[Tensor, Tensor]:
        """As it stands; every value is real."""
        shape = self._shape
        return self.values.reshape(*shape, *self.values.shape[1:]), torch.ones(shape, dtype=torch.bool)

    def with_values(self, values: Tensor) -> Jagged:
        """The same grid with other values."""
        return _Grid(values, self.offsets)


class _ItemTable(nn.Module):
    """An item encoder whose vectors are finished."""

    vector_ND: Tensor

    def __init__(self, encoder: ItemEncoder) -> None:
        super().__init__()
        self.register_buffer("vector_ND", encoder.all().detach())

    def forward(self, rows: Tensor) -> Tensor:
        return self.vector_ND[rows]


class CandidateScorer(nn.Module):
    """`score_candidates` of a ranker over plain tensors; see the top of this file. The ranker itself stays as it is."""

    def __init__(self, ranker: Ranker, state_type: Callable[..., Any]) -> None:
        super().__init__()
        self.ranker = copy.deepcopy(ranker).cpu().eval()
        for module in list(self.ranker.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, ItemEncoder):
                    setattr(module, name, _ItemTable(child))
        self.requires_grad_(False)
        self.state_type = state_type
        self.pair_names = tuple(f.name for f in ranker.space.pair_fields)

    def forward(self, state: tuple[Tensor, ...], item_BC: Tensor, pair_BCF: Tensor) -> tuple[Tensor, ...]:
        """float32 [B, C] per task."""
        num_requests, num_each = item_BC.shape
        offsets = torch.arange(num_requests + 1) * num_each
        pair = {name: pair_BCF[:, :, place].reshape(-1) for place, name in enumerate(self.pair_names)}
        candidates = Candidates(rows=_Grid(item_BC.reshape(-1), offsets), pair=pair)
        scores = self.ranker.score_candidates(self.state_type(*state), candidates)
        return tuple(scores[task].reshape(num_requests, num_each) for task in self.ranker.space.tasks)


@torch.no_grad()
def export_ranker(run: Run, out: Path, *, system: str | None = None, onnx: bool = True) -> dict[str, Any]:
    """Write a ranker's user side and its scoring of candidates; gives what export.json says.

    Each file is read back and must score real batches of several shapes as the run does, within 1e-4.

    Args:
        system: its name in the run; None = the only ranker.
        onnx: write .onnx beside .pt2.

    Raises ConfigError: there is no such ranker, or torch can not follow it, and why; ExportDiffers; SnapshotError.
    """
    name, ranker = chosen(run, system, Ranker, "rankers")
    assert isinstance(ranker, Ranker)
    if onnx:
        for needed in ("onnx", "onnxscript", "onnxruntime"):
            library(needed, extra="export", user="the export to ONNX")
    ranker = copy.deepcopy(ranker).cpu().eval()
    batch = _real_batch(run, name)
    names, state_type = _state_of(ranker, batch, name)
    scorer = CandidateScorer(ranker, state_type)
    traced = flat(ranker, _first(batch, TRACED_REQUESTS))
    free = _free_dimensions(ranker, batch, traced)
    batches = (batch, _first(batch, 1), _first(batch, 5))
    tests = [flat(ranker, b) for b in batches]
    expected = [scorer_of(ranker, b) for b in batches]
    inputs = [*names, "item", "pair"]

    def write(folder: Path) -> dict[str, Any]:
        program = _traced(scorer, traced, free, name)
        checks = {}
        if onnx:
            path = folder / "ranker.onnx"
            to_onnx(program, path, inputs, ranker.space.tasks, name)
            checks["ranker.onnx"] = _compare(onnx_runner(path, inputs), tests, expected, "ranker.onnx")
        module = saved(program, folder / "ranker.pt2")
        checks["ranker.pt2"] = _compare(
            lambda given: module(tuple(given[: len(names)]), *given[len(names) :]), tests, expected, "ranker.pt2"
        )
        user_side, given = export_user(ranker, scorer.ranker, batches, names, folder, name, onnx=onnx)
        example = dict(zip(inputs, tests[2].inputs)) | {f"scores.{t}": s for t, s in expected[2].items()}
        save_tensors(folder / "example.safetensors", example | {f"user_side.{n}": x for n, x in given.items()})
        item_table(run).write_parquet(folder / "items.parquet")
        return {
            "system": name,
            "user_side": user_side,
            "inputs": [signature(n, x, f) for n, x, f in zip(inputs, traced.inputs, free, strict=True)],
            "pair_fields": list(scorer.pair_names),
            "outputs": [{"name": task, "dtype": "float32", "shape": ["B", "C"]} for task in ranker.space.tasks],
            "meaning": "scores of candidates for requests; item is a catalogue row (0 = none, its score means nothing), see items.parquet; "
            "the other inputs but pair are what the user side gives; a model that bounds its memory refuses batches beyond its bound, "
            "and ranker.pt2 may refuse fewer than 4 places in all: pad with item 0",
            "check": {"requests": batch.size, "candidates": len(batch.candidate_rows.values), "max_difference": checks},
        }

    return write_export(out, run, "ranker", write)


def flat(ranker: Ranker, batch: Batch) -> Flat:
    """A batch with candidates as plain tensors."""
    assert batch.candidates is not None
    rows = batch.candidates.rows
    item_BC, is_real_BC = rows.padded()
    columns = [rows.with_values(batch.candidates.pair[f.name]).padded()[0] for f in ranker.space.pair_fields]
    pair_BCF = torch.stack(columns, dim=2) if columns else torch.zeros(*item_BC.shape, 0)
    state = ranker.user_state(batch)
    return Flat((state,) if isinstance(state, Tensor) else tuple(state), item_BC, pair_BCF, is_real_BC)


def scorer_of(ranker: Ranker, batch: Batch) -> dict[str, Tensor]:
    """The run's own scores by task, padded to [B, C]."""
    rows = batch.candidate_rows
    return {task: rows.with_values(values).padded()[0] for task, values in ranker.score(batch).items()}


def _real_batch(run: Run, name: str) -> Batch:
    """Validation requests with the candidates and pair fields that reach the ranker's stage; at least two of each kind."""
    stage = next(stage.name for stage in run.config.stages if name in stage.systems)
    asked = sample(run.dataset.split.valid, CHECKED_REQUESTS, seed=0)
    batch = run.cascade.until(make_batch(run.dataset, asked, run.cascade.max_history), stage).to("cpu")
    space = stage_space(run.config, run.dataset.space, stage)
    assert batch.candidates is not None
    missing = [f.name for f in space.pair_fields if f.name not in batch.candidates.pair]
    if batch.size < 2 or int(batch.candidate_rows.lengths.max()) < 2 or missing:
        raise DataError(f"{name} can not be checked: the validation window gives too few requests with candidates")
    return batch


def _first(batch: Batch, count: int) -> Batch:
    """The first requests of a batch with what belongs to them."""
    size = min(count, batch.size)
    return next(split_batch(batch, [size, batch.size - size]))


def _state_of(ranker: Ranker, batch: Batch, name: str) -> tuple[tuple[str, ...], Callable[..., Any]]:
    """Names of the state's tensors, and what makes the state of them."""
    state = ranker.user_state(batch)
    if isinstance(state, Tensor):
        return ("state",), _only
    fields = getattr(state, "_fields", None)
    if fields is None or not all(isinstance(part, Tensor) for part in state):
        raise ConfigError(
            f"{name} can not be exported: its user_state is a {type(state).__name__} and not tensors alone, "
            "which no runtime takes as input"
        )
    return tuple(fields), type(state)


def _only(state: Tensor) -> Tensor:
    return state


def _free_dimensions(ranker: Ranker, batch: Batch, traced: Flat) -> list[dict[int, str]]:
    """By input: which dimensions may change, with their names. Those of the state are found by asking with shorter histories."""
    few = _first(batch, 3)
    length = min(int(few.history.items.lengths.max()), ranker.max_history)
    other = ranker.user_state(replace(few, history=few.history.last(max(1, length // 2))))
    parts = (other,) if isinstance(other, Tensor) else tuple(other)
    labels: dict[int, str] = {}
    free = []
    for mine, less in zip(traced.state, parts, strict=True):
        changed = {d: mine.shape[d] for d in range(1, mine.dim()) if mine.shape[d] != less.shape[d]}
        for size in changed.values():
            labels.setdefault(size, f"L{len(labels)}" if labels else "L")
        free.append({0: "B"} | {d: labels[size] for d, size in changed.items()})
    return [*free, {0: "B", 1: "C"}, {0: "B", 1: "C"}]


def _traced(
    scorer: CandidateScorer, traced: Flat, free: list[dict[int, str]], name: str
) -> torch.export.ExportedProgram:
    """The program; ConfigError says why where torch can not follow the model."""
    # Not named: a named dimension may have no bound, and a model that scores in slices (DIN) has one.
    shapes = [dict.fromkeys(one, torch.export.Dim.AUTO) for one in free]
    *state, item, pair = shapes
    try:
        with quiet():
            return torch.export.export(
                scorer,
                (traced.state, traced.item_BC, traced.pair_BCF),
                dynamic_shapes=(tuple(state), item, pair),
                strict=True,
            )
    except Exception as error:
        raise ConfigError(f"{name} can not be exported: torch.export can not follow it ({why(error)})") from error


def _compare(scorer: Runner, tests: list[Flat], expected: list[dict[str, Tensor]], name: str) -> float:
    """Largest difference from the run's scores over all real candidates; ExportDiffers where it is above the tolerance."""
    worst = 0.0
    for given, ours in zip(tests, expected):
        for mine, theirs in zip(ours.values(), scorer(given.inputs), strict=True):
            worst = max(worst, differs(mine[given.is_real_BC], theirs[given.is_real_BC]))
    if worst > TOLERANCE:
        raise ExportDiffers(f"{name} scores differ from the run's by up to {worst:.2g}; nothing was written")
    return worst
