"""Which settings a tuner tries, and from where to where: read from the settings' types, with the usual ranges by name.

lr = 0.0001:0.01:log       numbers from low to high, evenly in their logarithm
num_neighbours = 10:500    whole numbers, since the setting is one
loss = softmax,bce         one of these
widths = [64],[128,64]     the same; values as TOML writes them
"""

from __future__ import annotations

import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from shortlist.cascade.config import RunConfig
from shortlist.cascade.settings import NONE, nearest, parse_value, toml
from shortlist.errors import ConfigError
from shortlist.training.config import TrainerConfig

USUAL: Mapping[str, str] = {
    "lr": "0.0003:0.01:log",
    "weight_decay": "0.000001:0.1:log",
    "dim": "16,32,64,128",
    "dropout": "0:0.5",
    "attention_dropout": "0:0.5",
    "id_dropout": "0:0.3",
    "num_blocks": "1:4",
    "num_heads": "1,2,4",
    "num_negatives": "16:1024:log",
    "num_uniform": "16:1024:log",
    "gbce_t": "0:1",
    "mba": "0.0001:1:log",
    "pair_bins": "0:16",
    "regularisation": "1:5000:log",
    "num_factors": "16,32,64,128",
    "alpha": "0.1:100:log",
    "decay": "0.3:1",
    "shrinkage": "0.1:1000:log",
    "num_neighbours": "10:500:log",
    "max_gap": "1:10",
    "num_groups": "1:20",
    "half_life_days": "7:720:log",
    "half_life_groups": "1:64:log",
    "window_days": "3:365:log",
    "popularity_power": "0:1",
    "relevance": "0.5:1",
}
"""Ranges of settings by name, whatever the system. Numbers of other names are tried where a person gives their range."""
AROUND = ("temperature",)
"""Settings tried from a quarter of their default to four times it."""
LEFT_ALONE = ("double", "fill")
"""Switches that trade cost, not quality."""
JUDGES = ("learning.valid_requests",)
"""Settings by which trials are judged: these, and the surface's, are the same for all."""
OF_TRAINER = ("lr", "weight_decay")
"""Settings of the trainer that are tried for what is trained by gradient."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What is tried for one setting: a range, or a list of values."""

    path: str
    """As `--set` takes it: din.dim, trainer.din.lr, ranking.keep."""
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    """Evenly in the logarithm."""
    whole: bool = False
    """Whole numbers only."""
    values: tuple[str, ...] = ()
    """Where there are any: one of these, each as TOML text, in place of a range."""

    def __str__(self) -> str:
        if self.values:
            return ", ".join(self.values)
        return f"{self.low:g} to {self.high:g}{', logarithmic' if self.log else ''}"

    def text(self, value: Any) -> str:
        """A value as `--set` takes it."""
        return str(value) if self.values else repr(int(value) if self.whole else float(value))

    def holds(self, value: Any) -> Any:
        """A setting's value as the tuner knows it, None where it is outside."""
        if self.values:
            text = as_text(value)
            return text if text in self.values else None
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            return None
        return int(value) if self.whole else float(value)


def read_ranges(path: Path) -> dict[str, str | dict[str, str]]:
    """Ranges from a TOML file: `name = "low:high:log"`, `name = [a, b]`, and the same in a table named after a system.

    Raises ConfigError: unreadable, or a value that is neither.
    """
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path} can not be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error

    def one(name: str, value: Any) -> str:
        match value:
            case str():
                return value
            case list() if value:
                return ",".join(map(as_text, value))
        raise ConfigError(f'{path}: {name} is {value!r}; write "low:high", "low:high:log" or a list of values')

    return {
        name: {inner: one(f"{name}.{inner}", v) for inner, v in value.items()}
        if isinstance(value, dict)
        else one(name, value)
        for name, value in table.items()
    }


def parse_ranges(texts: Sequence[str]) -> dict[str, str | dict[str, str]]:
    """Ranges from the command line, `name=range` each; ConfigError for one without '='."""
    found: dict[str, str | dict[str, str]] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name.strip() or not value.strip():
            raise ConfigError(f"range {text!r} is not name=low:high, name=low:high:log or name=a,b,c")
        found[name.strip()] = value.strip()
    return found


def space_of(
    config: RunConfig, system: str | None, ranges: Mapping[str, str | Mapping[str, str]], *, only: bool = False
) -> tuple[Choice, ...]:
    """What is tried for one arm.

    Args:
        config: the arm's settings.
        system: whose settings are tried; None = of the whole cascade, each range naming its path.
        ranges: by setting, or by system and setting, in place of or beside the usual ones; names that this arm lacks are skipped.
        only: nothing but `ranges`.

    Raises ConfigError: a range that can not be read, or whose ends the setting does not take; nothing to try.
    """
    found: dict[str, Choice] = {}
    if system is not None and not only:
        found = {choice.path: choice for choice in _usual(config, system) if _is_taken(config, choice)}
    for name, text in _of_arm(config, system, ranges).items():
        path = _path(config, system, name)
        if path is not None:
            found[path] = _choice(config, path, text)
            _try(config, found[path])
    if not found:
        what = system or "the cascade"
        raise ConfigError(f"nothing to try for {what}: name settings with --range, as in --range NAME=low:high")
    return tuple(found.values())


def refuse_unused(
    ranges: Mapping[str, str | Mapping[str, str]], arms: Mapping[str, tuple[RunConfig, str | None]]
) -> None:
    """ConfigError for a range that no arm has a setting for."""
    for name, value in ranges.items():
        inner = [name] if isinstance(value, str) else [f"{name}.{n}" for n in value]
        for path in inner:
            if all(_path(config, system, path) is None for config, system in arms.values()):
                known = {
                    f.name
                    for config, system in arms.values()
                    if system
                    for f in (*fields(config.systems[system].settings), *fields(TrainerConfig))
                }
                raise ConfigError(
                    f"range {path!r} names no setting of {', '.join(arms)}: {nearest(path.rpartition('.')[2], known)}"
                )


def current(config: RunConfig, choice: Choice) -> Any:
    """The value that the setting has; None where it has none."""
    head, *rest = choice.path.split(".")
    if head == "trainer" and len(rest) == 2:
        return getattr(config.trainer_of(rest[0]), rest[1])
    whole = config.to_table()
    table: Any = next((whole[section] for section in ("systems", "stages") if head in whole[section]), whole)
    for part in (head, *rest):
        table = table.get(part) if isinstance(table, Mapping) else None
    return table


def _try(config: RunConfig, choice: Choice) -> None:
    """ConfigError where the setting does not take an end of its range, or one of its values."""
    for value in choice.values or (choice.low, choice.high):
        config.override(f"{choice.path}={choice.text(value)}")


def _is_taken(config: RunConfig, choice: Choice) -> bool:
    try:
        _try(config, choice)
    except ConfigError:
        return False
    return True


def _of_arm(config: RunConfig, system: str | None, ranges: Mapping[str, str | Mapping[str, str]]) -> dict[str, str]:
    """Ranges as plain names or paths: those of other arms left out."""
    found: dict[str, str] = {}
    for name, value in ranges.items():
        if isinstance(value, str):
            found[name] = value
        elif name == system:
            found |= value
        elif system is None:
            found |= {f"{name}.{inner}": text for inner, text in value.items()}
    return found


def _path(config: RunConfig, system: str | None, name: str) -> str | None:
    """The full path of a setting that was named in short or in full; None where the arm has no such setting."""
    head, _, rest = name.partition(".")
    if not rest:
        if system is None:
            return None
        if name in {f.name for f in fields(config.systems[system].settings)}:
            return f"{system}.{name}"
        trained = config.systems[system].entry.cls.feed is not None  # type: ignore[attr-defined]
        return f"trainer.{system}.{name}" if trained and name in {f.name for f in fields(TrainerConfig)} else None
    if head == "trainer":
        return name if rest.split(".")[0] in {*config.systems, *(f.name for f in fields(TrainerConfig))} else None
    known = {*config.systems, *(stage.name for stage in config.stages), "learning"}
    if head in config.systems and rest not in {f.name for f in fields(config.systems[head].settings)}:
        return _path(config, head, rest) if "." not in rest else None
    return name if head in known and name not in JUDGES else None


def _usual(config: RunConfig, system: str) -> list[Choice]:
    """The usual ranges of a system's own settings and of its trainer."""
    choice = config.systems[system]
    found = []
    hints = get_type_hints(type(choice.settings))
    for f in fields(choice.settings):
        text = _usual_text(f.name, hints[f.name], getattr(choice.settings, f.name))
        if text is not None:
            found.append(_choice(config, f"{system}.{f.name}", text))
    if choice.entry.cls.feed is not None:  # type: ignore[attr-defined]
        found += [_choice(config, f"trainer.{system}.{name}", USUAL[name]) for name in OF_TRAINER]
    return found


def _usual_text(name: str, kind: Any, value: Any) -> str | None:
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    if name in LEFT_ALONE:
        return None
    if bool in options:
        return "false,true"
    if get_origin(kind) is Literal:
        return ",".join(map(as_text, get_args(kind)))
    if not {int, float} & set(options):
        return None
    if name in AROUND and value:
        return f"{value / 4}:{value * 4}:log"
    return USUAL.get(name)


def _choice(config: RunConfig, path: str, text: str) -> Choice:
    """Read "low:high", "low:high:log" or "a,b,c"."""
    parts = [part.strip() for part in text.split(":")]
    if len(parts) in (2, 3) and not text.startswith(('"', "[")):
        low, high = (_number(part, path, text) for part in parts[:2])
        log = parts[2:] == ["log"]
        if low >= high or (parts[2:] and not log) or (log and low <= 0):
            raise ConfigError(
                f"range {path}={text}: low must be below high, and above 0 where `log` follows; it is written low:high or low:high:log"
            )
        whole = _is_whole(config, path, parts)
        return Choice(path=path, low=low, high=high, log=log, whole=whole)
    try:
        values = tomllib.loads(f"value = [{text}]")["value"]
    except tomllib.TOMLDecodeError:
        values = [parse_value(part.strip()) for part in text.split(",")]
    return Choice(path=path, values=tuple(dict.fromkeys(map(as_text, values))))


def _number(text: str, path: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"range {path}={whole}: {text!r} is not a number; write low:high or a,b,c") from error


def _is_whole(config: RunConfig, path: str, parts: Sequence[str]) -> bool:
    """Whether the setting takes whole numbers only; of stages and sections, whether the range was written so."""
    *head, name = path.split(".")
    if head[0] == "trainer":
        hints = get_type_hints(TrainerConfig)
    elif head[0] in config.systems:
        hints = get_type_hints(type(config.systems[head[0]].settings))
    else:
        return all(part.lstrip("-").isdigit() for part in parts[:2])
    options = {hints.get(name), *get_args(hints.get(name))}
    return int in options and float not in options


def as_text(value: Any) -> str:
    """A value as TOML text; None as the word that switches a setting off."""
    if value is None:
        return NONE
    return toml({"v": list(value) if isinstance(value, tuple) else value}).strip().removeprefix("v = ")
