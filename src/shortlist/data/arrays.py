"""Tables, requests and impressions as named arrays, which is how a data set is kept in safetensors files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays

from shortlist.data.fields import FittedField
from shortlist.data.histories import Requests
from shortlist.data.impressions import Impressions
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Column, FieldTable
from shortlist.errors import DataError, SnapshotError


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """From a safetensors file; SnapshotError where it is missing or damaged."""
    try:
        arrays: dict[str, NDArray[Any]] = load_arrays(path)
        return arrays
    except (OSError, SafetensorError) as error:
        raise SnapshotError(f"{path} is missing or damaged ({error}); restore the snapshot or train again") from error


def table_arrays(table: FieldTable) -> dict[str, NDArray[Any]]:
    """Columns of a table; `table_of` is the way back."""
    arrays: dict[str, NDArray[Any]] = {"num_rows": np.array([table.num_rows])}
    for name, column in table.columns.items():
        if isinstance(column, Jagged):
            arrays |= {f"values.{name}": column.values.numpy(), f"offsets.{name}": column.offsets.numpy()}
        else:
            arrays[f"dense.{name}"] = column.numpy()
    return arrays


def table_of(fitted: tuple[FittedField, ...], arrays: Mapping[str, NDArray[Any]]) -> FieldTable:
    """The table of these fields from `table_arrays`; DataError names a field that has no column."""
    columns: dict[str, Column] = {}
    for f in fitted:
        if f"dense.{f.name}" in arrays:
            columns[f.name] = torch.from_numpy(arrays[f"dense.{f.name}"])
        elif f"values.{f.name}" in arrays:
            columns[f.name] = Jagged(*(torch.from_numpy(arrays[f"{kind}.{f.name}"]) for kind in ("values", "offsets")))
        else:
            raise DataError(
                f"field {f.name!r} of the {f.side} side stands in the schema but not in the table; encode the log again"
            )
    return FieldTable(int(arrays["num_rows"][0]), tuple(f.field for f in fitted), columns)


def request_arrays(requests: Requests) -> dict[str, NDArray[Any]]:
    """Arrays of requests; `requests_of` is the way back."""
    arrays = {f.name: np.ascontiguousarray(getattr(requests, f.name)) for f in fields(Requests) if f.name != "context"}
    return arrays | {f"context.{name}": np.ascontiguousarray(column) for name, column in requests.context.items()}


def requests_of(arrays: Mapping[str, NDArray[Any]]) -> Requests:
    """Requests from `request_arrays`."""
    context = {name.removeprefix("context."): a for name, a in arrays.items() if name.startswith("context.")}
    return Requests(**{name: a for name, a in arrays.items() if not name.startswith("context.")}, context=context)


def impression_arrays(logged: Impressions) -> dict[str, NDArray[Any]]:
    """Arrays of logged impressions; `impressions_of` is the way back."""
    arrays: dict[str, NDArray[Any]] = {"window": logged.window, "shown": logged.rows.values.numpy()}
    arrays |= {"shown_offsets": logged.rows.offsets.numpy()}
    arrays |= {f"label.{name}": column.numpy() for name, column in logged.labels.items()}
    return arrays | {f"request.{name}": array for name, array in request_arrays(logged.requests).items()}


def impressions_of(arrays: Mapping[str, NDArray[Any]], labels: Sequence[str]) -> Impressions:
    """Impressions from `impression_arrays`; the file does not keep the order of `labels`."""
    requests = {name.removeprefix("request."): a for name, a in arrays.items() if name.startswith("request.")}
    return Impressions(
        requests=requests_of(requests),
        window=arrays["window"],
        rows=Jagged(torch.from_numpy(arrays["shown"]), torch.from_numpy(arrays["shown_offsets"])),
        labels={name: torch.from_numpy(arrays[f"label.{name}"]) for name in labels},
    )
