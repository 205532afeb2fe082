"""Rules of a file, for commands that take --rules."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from shortlist.cascade.rules import Rules

RulesFile = Annotated[
    Path | None,
    typer.Option("--rules", help="Rules over those of the run: TOML as under [rules], or JSON as in a request's body."),
]


def read_rules(path: Path | None) -> Rules | None:
    """The rules of a file; None without one. ConfigError names the file and what is wrong in it."""
    from shortlist.cascade.rules import Rules
    from shortlist.cascade.settings import build
    from shortlist.errors import ConfigError

    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8")
        table: Any = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} can not be read as rules ({error}); give TOML or JSON") from error
    if isinstance(table, dict) and set(table) == {"rules"}:
        table = table["rules"]
    try:
        return build(Rules, table, "rules")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
