"""Experiments as data: variants with shares, who gets which, and what the pages of two teams look like on one.

    [experiments.ranker]
    primary = "clicks"                          the metric that decides
    [experiments.ranker.variants.control]       the first variant is what others are held against
    share = 0.5
    [experiments.ranker.variants.longer]
    share = 0.5
    chain = "a0-b1-c0"                          what is different: run, chain, budget_ms, budget_mflop, rules, explore
    [experiments.ranker.metrics.clicks]
    of = "events"
    actions = ["click"]
    [experiments.ranker.guardrails.speed]
    metric = "spent_ms"
    bad = "up"
    margin = 5.0

A unit (a user, of an anonymous request its session, else the request alone) gets its variant from a hash of the experiment's salt and its
id: the same one every time and on every server, in the shares that were set, and independent of other experiments, whose salts differ.
"""

from __future__ import annotations

import hashlib
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import numpy as np

from shortlist.cascade.rules import NO_RULES, Rules
from shortlist.cascade.settings import build, nearest, plain, refuse_unknown
from shortlist.errors import ConfigError

T = TypeVar("T")
INTERLEAVED = "interleaved"
"""Stands in place of a variant where both make one page."""
_SCALE = 2.0**-64


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """What one arm of an experiment does differently; nothing = as the server is."""

    share: float = 1.0
    """Beside the other variants' shares; they need not add up to 1."""
    run: str = ""
    """Folder of a run, or of a place of published runs (its version at the start); "" = the run that is served."""
    chain: str = ""
    """Chain to answer by; "" = the allocator's choice, without one the default chain."""
    budget_ms: float | None = None
    """Milliseconds that a request may cost on average, for the run's calibrated allocator."""
    budget_mflop: float | None = None
    """1e6 FLOPs, likewise."""
    rules: Rules = NO_RULES
    """Over the surface's and beneath those of each request."""
    explore: float = 0.0
    """Share of requests whose page is drawn at random from the best `explore_from` items; the chances are logged."""
    explore_from: int = 50
    """Items that a random page is drawn from. Places that rules laid out (pins, quotas) do not hold on it."""

    def __post_init__(self) -> None:
        if not 0 < self.share < math.inf:
            raise ConfigError(f"share must be above 0, got {self.share}; leave the variant out instead")
        if not 0 <= self.explore <= 1:
            raise ConfigError(f"explore is a share from 0 to 1, got {self.explore}")
        if self.explore_from < 1:
            raise ConfigError(f"explore_from must be at least 1, got {self.explore_from}")

    @property
    def knobs(self) -> frozenset[str]:
        """What it turns: parts that no two experiments may turn for the same request."""
        turned = {
            "run, chain or budget": bool(self.run or self.chain or self.budget_ms or self.budget_mflop),
            "rules": self.rules != NO_RULES,
            "explore": self.explore > 0,
        }
        return frozenset(name for name, is_turned in turned.items() if is_turned)


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One number per unit."""

    of: Literal["converted", "events", "value", "spent_ms", "degraded"] = "converted"
    """converted: 1 with an event, else 0; events: how many; value: the sum of their values; spent_ms and degraded: means of its pages."""
    actions: tuple[str, ...] = ()
    """Kinds of event that count; empty = all."""
    shown: bool = True
    """Whether only events with items count that one of the unit's pages had shown before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Guardrail:
    """When an experiment is stopped: once it is sure, at any time, that a variant is worse than control by more than the margin."""

    metric: str
    """Name of a metric of the experiment, or spent_ms or degraded."""
    bad: Literal["up", "down"]
    """Which way is worse."""
    margin: float = 0.0
    """What is put up with, in the metric's unit."""

    def __post_init__(self) -> None:
        if not 0 <= self.margin < math.inf:
            raise ConfigError(f"margin must be 0 or above, got {self.margin}")

    def crossed(self, low: float, high: float) -> bool:
        """Whether the interval of variant minus control lies beyond the margin as a whole."""
        return low > self.margin if self.bad == "up" else high < -self.margin


BUILT_IN = MappingProxyType({"spent_ms": Metric(of="spent_ms"), "degraded": Metric(of="degraded")})
"""Metrics that every experiment has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What an experiment is beside its variants, metrics and guardrails."""

    primary: str = ""
    """Metric that decides; "" = the first one."""
    surface: Literal["recommend", "search"] = "recommend"
    """Which requests take part. Those that name a chain, a budget or a moment of their own never do."""
    traffic: float = 1.0
    """Share of units that take part; others are served as if there were no experiment."""
    salt: str = ""
    """Of the assignment; "" = the experiment's name. Another salt draws anew."""
    interleave: bool = False
    """Both variants make one page in turns (team draft), and clicks tell which made the better part."""
    hours: float = 24.0
    """What a unit does counts so long after its first page; units whose time is not over are not looked at yet."""
    alpha: float = 0.05
    """Chance that an interval ever misses the truth, over all looks and all variants of the experiment."""
    planned: int = 10_000
    """Units after which intervals are to be tightest; they are valid at any number."""
    running: bool = True
    """False = stopped; everyone is served as if there were no experiment."""

    def __post_init__(self) -> None:
        if not 0 < self.traffic <= 1:
            raise ConfigError(f"traffic is a share above 0 and at most 1, got {self.traffic}")
        if not 0 < self.hours < math.inf:
            raise ConfigError(f"hours must be above 0, got {self.hours}")
        if not 0 < self.alpha < 1:
            raise ConfigError(f"alpha must be above 0 and below 1, got {self.alpha}")
        if self.planned < 1:
            raise ConfigError(f"planned must be at least 1, got {self.planned}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """One experiment; made by `read_experiments`."""

    name: str
    settings: Settings
    variants: Mapping[str, Variant]
    """By name; the first is control."""
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    guardrails: Mapping[str, Guardrail] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.variants) < 2:
            raise ConfigError(f"[experiments.{self.name}] needs at least 2 variants, has {len(self.variants)}")
        if self.settings.interleave and len(self.variants) != 2:
            raise ConfigError(
                f"[experiments.{self.name}] interleaves, which takes 2 variants, has {len(self.variants)}"
            )
        if self.settings.interleave and any(variant.explore for variant in self.variants.values()):
            raise ConfigError(
                f"[experiments.{self.name}] interleaves, so that no variant can explore; make it two experiments"
            )
        named = {**{name: g.metric for name, g in self.guardrails.items()}, "primary": self.primary}
        for name, metric in named.items():
            if metric not in self.all_metrics:
                raise ConfigError(
                    f"[experiments.{self.name}] {name} names the metric {metric!r}: {nearest(metric, self.all_metrics)}"
                )

    def to_table(self) -> dict[str, Any]:
        """Nested tables; `experiment_of` gives the same experiment."""
        variants = {name: plain(variant) for name, variant in self.variants.items()}
        for table in variants.values():
            table["rules"] = {name: value for name, value in table["rules"].items() if value != [] or name == "allow"}
        return {
            **plain(self.settings),
            "variants": variants,
            "metrics": {name: plain(metric) for name, metric in self.metrics.items()},
            "guardrails": {name: plain(guardrail) for name, guardrail in self.guardrails.items()},
        }

    @property
    def control(self) -> str:
        """Name of the first variant."""
        return next(iter(self.variants))

    @property
    def all_metrics(self) -> Mapping[str, Metric]:
        """Its own and those that every experiment has."""
        return {**(self.metrics or {"converted": Metric()}), **BUILT_IN}

    @property
    def primary(self) -> str:
        """Name of the metric that decides."""
        return self.settings.primary or next(iter(self.all_metrics))

    @property
    def shares(self) -> dict[str, float]:
        """Chance of each variant for a unit that takes part."""
        total = sum(variant.share for variant in self.variants.values())
        return {name: variant.share / total for name, variant in self.variants.items()}

    def variant_of(self, unit: str) -> str | None:
        """Which variant a unit gets, always the same; None where it does not take part."""
        salt = self.settings.salt or self.name
        if not self.settings.running or uniform(f"{salt}/traffic", unit) >= self.settings.traffic:
            return None
        if self.settings.interleave:
            return INTERLEAVED
        place, reached = uniform(salt, unit), 0.0
        for name, share in self.shares.items():
            reached += share
            if place < reached:
                return name
        return name  # sums of shares may end a hair below 1

    @property
    def knobs(self) -> frozenset[str]:
        """What its variants turn."""
        return frozenset().union(*(variant.knobs for variant in self.variants.values()))


def uniform(salt: str, unit: str) -> float:
    """A number from 0 to below 1 that belongs to the unit: 64 bits of BLAKE2b of salt and id."""
    digest = hashlib.blake2b(f"{len(salt)}:{salt}{unit}".encode(), digest_size=8).digest()
    return min(int.from_bytes(digest, "big") * _SCALE, math.nextafter(1.0, 0.0))


def read_experiments(source: Path | str) -> dict[str, Experiment]:
    """Experiments of a TOML file (Path) or text (str), by name.

    Raises ConfigError where it can not be read, a setting is unknown or wrong, or two experiments turn the same thing of the same pages.
    """
    where = str(source) if isinstance(source, Path) else "experiments"
    try:
        table = tomllib.loads(source.read_text() if isinstance(source, Path) else source)
    except OSError as error:
        raise ConfigError(f"{where} can not be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: not TOML: {error}") from error
    try:
        refuse_unknown(table, ["experiments"], "file")
        tables = _tables(table, "experiments", "file")
        if not tables:
            raise ConfigError("there is no [experiments.NAME]")
        found = {name: experiment_of(name, inner) for name, inner in tables.items()}
        _check_apart(list(found.values()))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return found


def experiment_of(name: str, table: Mapping[str, Any]) -> Experiment:
    """One experiment from nested tables; ConfigError where a setting is unknown or wrong."""
    path = f"experiments.{name}"
    own = {key: value for key, value in table.items() if key not in ("variants", "metrics", "guardrails")}

    def parts(key: str, cls: type[T]) -> dict[str, T]:
        inner = _tables(table, key, path)
        return {part: build(cls, values, f"{path}.{key}.{part}") for part, values in inner.items()}

    return Experiment(
        name=name,
        settings=build(Settings, own, path),
        variants=parts("variants", Variant),
        metrics=parts("metrics", Metric),
        guardrails=parts("guardrails", Guardrail),
    )


def _tables(table: Mapping[str, Any], key: str, where: str) -> Mapping[str, Mapping[str, Any]]:
    inner = table.get(key, {})
    if not isinstance(inner, Mapping) or not all(isinstance(value, Mapping) for value in inner.values()):
        raise ConfigError(f"[{where}] {key} must hold tables, such as [{key}.NAME], got {inner!r:.80}")
    return inner


def _check_apart(experiments: Sequence[Experiment]) -> None:
    """Experiments on one surface may cross each other only where they turn different things."""
    for number, one in enumerate(experiments):
        for other in experiments[:number]:
            both = one.settings.running and other.settings.running and one.settings.surface == other.settings.surface
            shared = one.knobs & other.knobs if both else frozenset()
            if shared:
                raise ConfigError(
                    f"the experiments {other.name!r} and {one.name!r} both turn {sorted(shared)[0]} of {one.settings.surface}; run one "
                    "after the other, or make their combinations variants of one"
                )
            if both and one.settings.interleave and other.settings.interleave:
                raise ConfigError(
                    f"{other.name!r} and {one.name!r} both interleave the same pages; run one after the other"
                )


def team_draft(first: Sequence[T], second: Sequence[T], k: int, rng: np.random.Generator) -> list[tuple[T, int]]:
    """One page of two: the teams pick in turns, each its best item that is not on the page yet (Radlinski, Kurup and Joachims, "How Does
    Clickthrough Data Reflect Retrieval Quality?", CIKM 2008).

    Args:
        first: items of team 0, best first.
        second: items of team 1.
        k: places.
        rng: tosses the coin for who picks first in each round.

    Returns up to k (item, team); a team that has nothing left lets the other pick on.
    """
    lists, places, picks = (first, second), [0, 0], [0, 0]
    taken: set[T] = set()
    page: list[tuple[T, int]] = []
    while len(page) < k:
        for team in (0, 1):
            while places[team] < len(lists[team]) and lists[team][places[team]] in taken:
                places[team] += 1
        left = [places[team] < len(lists[team]) for team in (0, 1)]
        if not any(left):
            break
        turn = int(picks[1] < picks[0]) if picks[0] != picks[1] else int(rng.integers(2))
        turn = turn if left[turn] else 1 - turn
        item = lists[turn][places[turn]]
        page.append((item, turn))
        taken.add(item)
        picks[turn] += 1
    return page


def random_page(own: Sequence[T], k: int, explore: float, rng: np.random.Generator) -> tuple[list[T], list[float]]:
    """The first k of the list, or, with chance `explore`, k of all M drawn in any order; and the chance of each item to be at its place.

    The chance is explore / M + (1 - explore) [the item stands there in the list], as `metrics.off_policy` wants it.
    """
    k = min(k, len(own))
    chosen = list(range(k))
    if rng.random() < explore:
        chosen = rng.permutation(len(own))[:k].tolist()
    chances = [explore / len(own) + (1 - explore) * (number == place) for place, number in enumerate(chosen)]
    return [own[number] for number in chosen], chances
