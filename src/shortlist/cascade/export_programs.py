"""Programs for other runtimes: ONNX files of what torch.export followed, what they are called with, and why something can not be.

What every export of a program shares; `export_ranker` says what is in the files.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shortlist.errors import ConfigError
from shortlist.extras import library

Runner = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Inputs in the order of the signature -> outputs."""


def to_onnx(
    program: torch.export.ExportedProgram, path: Path, inputs: Sequence[str], outputs: Sequence[str], name: str
) -> None:
    """Write a program as ONNX; ConfigError says why, in the name of the system, where it can not be."""
    try:
        with quiet():
            # The optimiser's inlining pass fails on masks that choose rows (DIN); runtimes optimise for themselves.
            made = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                optimize=False,
                input_names=list(inputs),
                output_names=list(outputs),
            )
            assert made is not None
            made.save(path)
    except Exception as error:
        raise ConfigError(f"{name} can not be exported to ONNX ({why(error)}); leave it out with --no-onnx") from error


def onnx_runner(path: Path, inputs: Sequence[str]) -> Runner:
    """The file in ONNX Runtime; inputs that the program does not read are passed over."""
    runtime = library("onnxruntime", extra="export", user="the export to ONNX")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    read = {given.name for given in session.get_inputs()}

    def run(given: Sequence[Tensor]) -> list[Tensor]:
        feed = {name: tensor.numpy() for name, tensor in zip(inputs, given) if name in read}
        return [torch.from_numpy(result) for result in session.run(None, feed)]

    return run


def signature(name: str, tensor: Tensor, free: Mapping[int, str]) -> dict[str, Any]:
    """An input or output for export.json; `free` names the dimensions that may change."""
    shape = [free.get(d, size) for d, size in enumerate(tensor.shape)]
    return {"name": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": shape}


def why(error: Exception) -> str:
    """The kind of an error and its first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' remarks on what else is installed."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def saved(program: torch.export.ExportedProgram, path: Path) -> torch.nn.Module:
    """Write a program for torch.export.load, without its example inputs, which torch would pickle; what is read back."""
    program.example_inputs = None
    with quiet():
        torch.export.save(program, path)
        return torch.export.load(path).module()
