"""Public leaderboards beside our own rows, from the recorded result of the claim that measured them.

    kind        AUC published    ours
    ranker      .98              .98 [.98, .98]    both, where a published row and ours are of one model
    published   .98                                a published row that has none of ours beside it
    trees                        .97               boosted trees on the same columns
    rule                         .97               what needs no training

Nothing is measured here and nothing is looked up elsewhere: without a recorded result there is no table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from shortlist.errors import ConfigError, DataError
from shortlist.evaluation.evidence import evidence_folder
from shortlist.evaluation.tables import aligned, cell
from shortlist.metrics import Interval
from shortlist.registry import nearest

Kind = Literal["ranker", "published", "trees", "rule"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Board:
    """Which claim measured a leaderboard, and how its arms are to be read."""

    claim: str
    """Name of the claim whose result holds our rows and the published ones."""
    title: str
    """Of the published table."""
    metric: str
    """The one that both sides state; more is better."""
    also: tuple[str, ...]
    """Metrics of ours that are shown beside it."""
    embedding_size: int
    """Of every row that has embeddings, published or ours."""
    trees: tuple[str, ...]
    """Arms that are boosted trees."""
    rules: tuple[str, ...]
    """Arms that learn nothing."""


BOARDS: Mapping[str, Board] = {
    "frappe": Board(
        claim="frappe_leaderboard",
        title="Frappe_x1 of BARS (Zhu et al., SIGIR 2022)",
        metric="auc",
        also=("logloss", "hard_auc"),
        embedding_size=10,
        trees=("LambdaMART, ids as categories",),
        rules=("popularity", "used before", "used before, then popularity", "used before, popularity, cost"),
    )
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of a leaderboard."""

    name: str
    kind: Kind
    published: float | None
    """The metric as published: one run, no interval; None where there is no such row."""
    ours: Interval | None
    """The metric as measured, over seeds; None for what was only published."""
    also: Mapping[str, Interval]
    """Other metrics of ours."""
    num_seeds: int
    """0 where nothing was measured."""
    num_parameters: int | None
    """None where there are none or they were not told."""

    @property
    def order(self) -> float:
        """What the line is sorted by: ours where there is one, else the published figure."""
        found = self.published if self.ours is None else self.ours.mean
        assert found is not None  # a row has one of them
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Leaderboard:
    """A table, best row first, and what has to be said with it."""

    name: str
    board: Board
    rows: tuple[Row, ...]
    data: str
    protocol: str
    bar: str
    verdict: str
    reason: str
    source: str
    """File, command, date and commit of the result."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def leaderboard(name: str, evidence: Path | None = None) -> Leaderboard:
    """The named leaderboard from the results of a folder of claims (default: evidence/ of the clone).

    Raises ConfigError for an unknown name and where no result is recorded yet, DataError where the result is damaged.
    """
    if name not in BOARDS:
        raise ConfigError(f"there is no leaderboard {name!r}: {nearest(name, list(BOARDS))}")
    board = BOARDS[name]
    file = evidence_folder(evidence) / "results" / f"{board.claim}.json"
    if not file.exists():
        raise ConfigError(
            f"the leaderboard {name!r} has no recorded result at {file} yet; run `shortlist prove {board.claim}` first"
        )
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        rows = _rows(board, result)
        told = {key: str(result[key]) for key in ("data", "protocol", "bar", "verdict", "reason")}
        source = f"{file}: `shortlist prove {board.claim}`, {result['date']}, commit {result['commit'][:9]}"
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not a result ({error!r}); run `shortlist prove {board.claim}` again") from error
    return Leaderboard(name=name, board=board, rows=rows, source=source, **told)


def _rows(board: Board, result: Mapping[str, Any]) -> tuple[Row, ...]:
    """All arms and all published figures, best first; an arm and a figure of one name share a line."""
    published: Mapping[str, float] = result["published"]
    arms = {arm["name"]: arm for arm in result["arms"]}
    rows = []
    for name in dict.fromkeys([*arms, *published]):
        arm: Mapping[str, Any] = arms.get(name, {"metrics": {}, "cost": {}})
        metrics = {m: Interval(v["mean"], v["low"], v["high"]) for m, v in arm["metrics"].items()}
        parameters = arm["cost"].get("parameters")
        rows.append(
            Row(
                name=name,
                kind=_kind(board, name, is_ours=name in arms),
                published=float(published[name]) if name in published else None,
                ours=metrics[board.metric] if name in arms else None,
                also={m: metrics[m] for m in board.also if m in metrics},
                num_seeds=max((v["seeds"] for v in arm["metrics"].values()), default=0),
                num_parameters=None if parameters is None else int(parameters),
            )
        )
    return tuple(sorted(rows, key=lambda row: -row.order))


def _kind(board: Board, name: str, *, is_ours: bool) -> Kind:
    if not is_ours:
        return "published"
    if name in board.rules:
        return "rule"
    return "trees" if name in board.trees else "ranker"


# -- for people ----------------------------------------------------------------------------------------------------


def leaderboard_text(table: Leaderboard) -> str:
    """Aligned columns, then the notes."""
    return "\n".join([table.board.title, *aligned(_cells(table)), "", *_notes(table)])


def leaderboard_markdown(table: Leaderboard) -> str:
    """A Markdown table, then the notes as a list."""
    header, *rows = _cells(table)
    lines = [f"**{table.board.title}**", "", "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", *(f"- {note}" for note in _notes(table))])


def _cells(table: Leaderboard) -> list[list[str]]:
    """The table as texts, its header first."""
    board = table.board
    figures = [f"{board.metric} published", f"{board.metric} ours", "ours - published", *board.also]
    cells = [["", "kind", *figures, "parameters", "seeds"]]
    for row in table.rows:
        gap = "" if row.published is None or row.ours is None else f"{row.ours.mean - row.published:+.4f}"
        published = "" if row.published is None else f"{row.published:.4f}"
        ours = "" if row.ours is None else cell(row.ours)
        also = [cell(row.also[m]) if m in row.also else "" for m in board.also]
        parameters = "" if row.num_parameters is None else f"{row.num_parameters:,}"
        cells.append(
            [row.name, row.kind, published, ours, gap, *also, parameters, str(row.num_seeds) if row.num_seeds else ""]
        )
    return cells


def _notes(table: Leaderboard) -> list[str]:
    """What the figures must not be read without."""
    return [
        f"Embeddings of {table.board.embedding_size} in every row. Brackets: 95 % intervals over seeds; published rows are single runs.",
        f"Data: {table.data}.",
        f"Protocol: {table.protocol}.",
        f"Bar: {table.bar}. {table.verdict.capitalize()}: {table.reason}",
        f"Source: {table.source}.",
    ]
