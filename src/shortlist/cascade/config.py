"""A run as one typed object: data, surface, stages, systems and trainer, read from TOML and printed with every default filled in.

    [data]                        how the log is encoded and split
    [surface]                     what a page is
    [rules]                       which items it may hold and how it is laid out, beneath the rules of each request
    [learning]                    how later stages learn from what earlier ones let through
    [trainer]                     defaults of the trainer; [trainer.NAME] for one system
    [index]                       how vector retrievers search the catalogue; [index.NAME] for one system
    [allocation]                  which chain a request gets, where stages have offers; [allocation.settings] of its allocator
    [energy]                      watts, PUE and grid that `shortlist energy` reckons with
    [update]                      how and how often `shortlist update` learns from what came in since
    [stages.retrieval]            stages in the order in which they act; systems, keep, and further actions under `offers`
    [systems.NAME]                settings of one system; `system = "din"` gives a second instance another name

An action is what one stage may do (which systems, how many items survive); a chain is one action per stage. Chains are named by one
letter per stage and the number of the action: `a0-b1-c0`; the first action of every stage makes the default chain.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from shortlist.cascade.allocation.base import Allocator, Budget
from shortlist.cascade.power import EnergyConfig
from shortlist.cascade.rules import Rules
from shortlist.cascade.schedule import UpdateConfig
from shortlist.cascade.settings import Plain, build, nearest, parse_value, plain, refuse_unknown, toml
from shortlist.data.roles import Roles
from shortlist.data.splits import DataConfig
from shortlist.errors import ConfigError
from shortlist.models.base import VectorRetriever
from shortlist.registry import Entry, find
from shortlist.store.vector_index import IndexConfig
from shortlist.training.config import FeedbackChoice, TrainerConfig
from shortlist.training.feedback.base import make_feedback
from shortlist.training.feedback.windows import Windows
from shortlist.training.gradients.base import make_rule


@dataclass(frozen=True, kw_only=True, slots=True)
class Surface:
    """What a page is."""

    k: int = 10
    """Items on a page."""
    repeats: Literal["auto", "yes", "no"] = "auto"
    """Whether items the user already has may be shown again; auto = as the log's own share of repeats says."""
    objective: Literal["choice", "value"] = "choice"
    """What rankers learn: every chosen item alike, or each by its worth (money)."""
    task_weights: Mapping[str, float] = field(default_factory=dict)
    """How much each task of `learning.tasks` counts in the order of the page; empty = the first task alone."""
    combine: Literal["sum", "product"] = "sum"
    """What is done with the tasks' chances p: sum of weight * p, or product of p ** weight, such as click times conversion. p is the
    sigmoid of a ranker's score, which is a chance where the ranker learns with loss = "bce"."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"k must be at least 1, got {self.k}")
        weights = self.task_weights.values()
        if weights and not (min(weights) >= 0 and max(weights) > 0):
            raise ConfigError(f"task_weights must be 0 or above, one of them above, got {dict(self.task_weights)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Learning:
    """How stages are trained and selected."""

    fit_requests: int = 20_000
    """Requests at most, drawn at random from the fit window, on which rankers learn."""
    valid_requests: int = 2_000
    """Requests at most, drawn from the validation window, on which each system's training is stopped."""
    candidates: Literal["cascade", "logged"] = "cascade"
    """What rankers learn from: what the stages before let through, or what the log's own pages showed, chosen or not. Either way
    training stops by how well they order what the stages let through, which is what they will meet."""
    max_candidates: int = 300
    """Candidates kept per fit request: all that were chosen and a random part of the others, drawn once."""
    num_negatives: int | None = None
    """Of those, so many not chosen ones are shown to a ranker per request and epoch; none = all, which ranks best but costs most."""
    max_targets: int | None = 16
    """Targets per past request that a two-tower sees in one epoch; none = all."""
    refresh: bool = True
    """Systems that learn no weights count again, as a nightly job would: before every slice of the fit window, before the validation
    window, and, when all is selected, before the test window. Weights stay as they were trained."""
    slices: int = 4
    """Parts of the fit window, cut by time: later stages learn from counts about as fresh as those that they will meet."""
    tasks: tuple[str, ...] = ()
    """What rankers learn of each candidate: actions of the log, or, with logged candidates, its label columns; the first orders the page
    unless `surface.task_weights` says otherwise. Empty = the choice alone."""
    task_hours: float = 24.0
    """An action counts for the request where it came in the request's group or up to so many hours later, before the window ends."""
    chained: bool = False
    """Each task is learned only where the one before it came true, such as a purchase on clicked candidates: then the product of the tasks'
    chances is that of the last one."""
    feedback: FeedbackChoice = field(default_factory=FeedbackChoice)
    """How the task is learned whose outcome comes late: `task_hours` is then how long it counts, and the other tasks count within its
    observation_hours."""

    @property
    def late_task(self) -> str:
        """The task that a feedback rule learns; empty where there is no rule."""
        if self.feedback.rule == "none":
            return ""
        return self.feedback.task or (self.tasks[-1] if self.tasks else "")

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise ConfigError(f"{f.name} must be at least 1, got {value}")
        if not self.task_hours >= 0:
            raise ConfigError(f"task_hours must not be negative, got {self.task_hours}")
        if len(set(self.tasks)) < len(self.tasks) or not all(self.tasks):
            raise ConfigError(f"tasks must have different names, got {list(self.tasks)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Action:
    """One thing a stage may do."""

    systems: tuple[str, ...]
    """Names of the systems that act, as [systems.NAME] or the registry has them."""
    keep: int | None = None
    """Items that survive the stage; the last stage may leave it out and then keeps a page."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One step of the cascade."""

    name: str
    """As in the file: retrieval, pre-ranking, ranking, re-ranking, or another."""
    actions: tuple[Action, ...]
    """What it may do; the first is the default."""

    @property
    def systems(self) -> tuple[str, ...]:
        """Every system of any action, once, in order of first use."""
        return tuple(dict.fromkeys(name for action in self.actions for name in action.systems))


@dataclass(frozen=True, kw_only=True, slots=True)
class SystemChoice:
    """A system as this run uses it."""

    system: str
    """Registered name."""
    settings: Any
    """Its settings object."""

    @property
    def entry(self) -> Entry:
        """The registry's entry."""
        return find(self.system)


@dataclass(frozen=True, slots=True)
class Chain:
    """One action per stage."""

    name: str
    actions: tuple[Action, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class AllocationConfig:
    """Which chain a request gets; has a meaning where stages have offers, and works once `shortlist calibrate` has run."""

    system: str = "fixed"
    """The allocator: one chain for all (fixed), or what each request is worth."""
    budget_ms: float | None = None
    """Milliseconds of one core that a request may cost on average; none = no limit on time."""
    budget_mflop: float | None = None
    """1e6 FLOPs that a request may cost on average; none = no limit on them. Without either limit, what the default chain takes."""
    worth: Literal["choice", "value"] = "choice"
    """What a page is worth: the discounted gain of the held-out items on it, or the sum of their money."""
    measured: Literal["alone", "batched"] = "alone"
    """Which measured milliseconds count: those of a request that is answered alone, or its share of a batch of 16."""
    max_requests: int = 4_000
    """Validation requests at most that calibration answers with every chain."""
    settings: Any = None
    """Of the allocator, as its own settings class has them; None = its defaults, where the section is left out."""

    def __post_init__(self) -> None:
        _ = self.budget
        if self.max_requests < 1:
            raise ConfigError(f"max_requests must be at least 1, got {self.max_requests}")

    @property
    def budget(self) -> Budget:
        """The limits; none at all where neither is set."""
        return Budget(ms=self.budget_ms, mflop=self.budget_mflop)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """All settings of a run. Without stages it is incomplete: `default_config` chooses them from what a log offers."""

    data: DataConfig = field(default_factory=DataConfig)
    roles: Roles = field(default_factory=Roles)
    """Which column of the log plays which role, where the guess from its name is wrong; the command line's flags come before these."""
    surface: Surface = field(default_factory=Surface)
    rules: Rules = field(default_factory=Rules)
    """Of the surface; those of a request come on top. They act where the run is served, not in training and evaluation."""
    learning: Learning = field(default_factory=Learning)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Of every system that is trained by gradient."""
    trainers: Mapping[str, Plain] = field(default_factory=dict)
    """What is different for one system: setting by name."""
    index: IndexConfig = field(default_factory=IndexConfig)
    """How vector retrievers of the first stage search the catalogue."""
    indexes: Mapping[str, Plain] = field(default_factory=dict)
    """What is different for one of them: setting by name."""
    allocation: AllocationConfig = field(default_factory=AllocationConfig)
    energy: EnergyConfig = field(default_factory=EnergyConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    stages: tuple[Stage, ...] = ()
    systems: Mapping[str, SystemChoice] = field(default_factory=dict)
    """Every system of the stages by its name in this run."""

    @classmethod
    def from_toml(cls, source: Path | str) -> RunConfig:
        """Read a TOML file (Path) or text (str).

        Raises:
            ConfigError: unreadable, or any setting is unknown, of the wrong type, or does not go with the others.
        """
        where = str(source) if isinstance(source, Path) else "run settings"
        try:
            return cls.from_table(tomllib.loads(source.read_text() if isinstance(source, Path) else source))
        except OSError as error:
            raise ConfigError(f"{where} can not be read: {error.strerror or error}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where}: not TOML: {error}") from error
        except ConfigError as error:
            raise type(error)(f"{where}: {error}") from error

    @classmethod
    def from_table(cls, table: Plain) -> RunConfig:
        """The same from nested tables."""
        refuse_unknown(table, SECTIONS, "run")
        stages = tuple(_stage(name, values) for name, values in _table(table, "stages").items())
        systems = _systems(stages, _table(table, "systems"))
        trainer, trainers = _shared_and_own(TrainerConfig, _table(table, "trainer"), "trainer", systems)
        index, indexes = _shared_and_own(IndexConfig, _table(table, "index"), "index", systems)
        config = cls(
            data=build(DataConfig, _table(table, "data"), "data"),
            surface=build(Surface, _table(table, "surface"), "surface"),
            rules=build(Rules, _table(table, "rules"), "rules"),
            roles=build(Roles, _table(table, "roles"), "roles"),
            learning=build(Learning, _table(table, "learning"), "learning"),
            trainer=trainer,
            trainers=trainers,
            index=index,
            indexes=indexes,
            allocation=_allocation(_table(table, "allocation")),
            energy=build(EnergyConfig, _table(table, "energy"), "energy"),
            update=build(UpdateConfig, _table(table, "update"), "update"),
            stages=stages,
            systems=MappingProxyType(systems),
        )
        _check(config)
        return config

    def to_table(self) -> dict[str, Any]:
        """Nested tables with every default filled in; `from_table` gives the same run."""
        return {
            "data": plain(self.data),
            "roles": plain(self.roles),
            "surface": plain(self.surface),
            "rules": {} if self.rules == Rules() else plain(self.rules),
            "learning": plain(self.learning),
            "trainer": {**plain(self.trainer), **{name: dict(values) for name, values in self.trainers.items()}},
            "index": {**plain(self.index), **{name: dict(values) for name, values in self.indexes.items()}},
            # Where nothing is set, a run of one chain need not speak of it.
            "allocation": {} if self.allocation == AllocationConfig() else plain(self.allocation),
            "energy": plain(self.energy),
            "update": plain(self.update),
            "stages": {stage.name: _stage_table(stage) for stage in self.stages},
            "systems": {name: {"system": c.system, **plain(c.settings)} for name, c in self.systems.items()},
        }

    def to_toml(self) -> str:
        """As TOML text with every default filled in."""
        return toml({name: table for name, table in self.to_table().items() if table})

    __str__ = to_toml

    def override(self, *assignments: str) -> RunConfig:
        """The same with settings replaced: `ranking.keep=50`, `din.dim=64`, `trainer.lr=0.01`, `trainer.din.lr=0.1`.

        The first part of the path is a section, a stage or a system; the value is read as TOML, a bare word as a string. Systems that
        no stage uses any more lose their settings, and another allocator begins with its own.
        """
        table = self.to_table()
        for assignment in assignments:
            path, sign, text = assignment.partition("=")
            if not sign:
                raise ConfigError(f"override {assignment!r} has no '='; write it as stage.field=value")
            self._assign(table, [part.strip() for part in path.split(".")], parse_value(text.strip()))
        used = {name for stage in table["stages"].values() for name in _names_in(stage)}
        table["systems"] = {name: values for name, values in table["systems"].items() if name in used}
        for section, cls in (("trainer", TrainerConfig), ("index", IndexConfig)):
            own = _own_names(cls, table[section])
            table[section] = {n: v for n, v in table[section].items() if n not in own or n in used}
        return RunConfig.from_table(table)

    def _assign(self, table: dict[str, Any], path: list[str], value: Any) -> None:
        heads = {
            **{section: [section] for section in SECTIONS},
            **{system: ["systems", system] for system in self.systems},
            **{stage.name: ["stages", stage.name] for stage in self.stages},
        }
        if path[0] not in heads or len(path) < 2:
            raise ConfigError(
                f"override {'.'.join(path)!r} names no setting: {path[0]!r} is no section, stage or system of this run; "
                f"{nearest(path[0], heads)}"
                if path[0] not in heads
                else f"override {path[0]!r} names a whole table; name one setting in it, as in {path[0]}.field=value"
            )
        *inner, last = [*heads[path[0]], *path[1:]]
        for name in inner:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise ConfigError(f"override {'.'.join(path)!r}: {name!r} is a single value and has no settings inside")
        if path == ["allocation", "system"] and table.get("system") != value:
            table.pop("settings", None)  # they were of another allocator
        table[last] = value

    @property
    def default_chain(self) -> Chain:
        """The first action of every stage."""
        return self.chain("-".join(f"{letter}0" for letter, _ in zip(LETTERS, self.stages)))

    def chain(self, name: str) -> Chain:
        """The chain of that name; ConfigError says which there are."""
        parts = name.split("-")
        wanted = [part[1:] if part[:1] == letter else "" for letter, part in zip(LETTERS, parts)]
        if len(parts) != len(self.stages) or not all(number.isdecimal() for number in wanted):
            raise ConfigError(
                f"no chain {name!r}: {len(self.stages)} stages make names such as {self.default_chain.name}"
            )
        for stage, number in zip(self.stages, wanted):
            if int(number) >= len(stage.actions):
                raise ConfigError(f"no chain {name!r}: stage {stage.name} offers actions 0 to {len(stage.actions) - 1}")
        return Chain(name, tuple(stage.actions[int(number)] for stage, number in zip(self.stages, wanted)))

    def chains(self) -> Iterator[Chain]:
        """Every chain in which no stage keeps more than the one before; the default chain comes first."""
        for numbers in itertools.product(*(range(len(stage.actions)) for stage in self.stages)):
            chain = self.chain("-".join(f"{letter}{number}" for letter, number in zip(LETTERS, numbers)))
            if _shrinks([action.keep or self.surface.k for action in chain.actions]):
                yield chain

    def trainer_of(self, name: str) -> TrainerConfig:
        """Trainer settings of one system."""
        return build(TrainerConfig, {**plain(self.trainer), **self.trainers.get(name, {})}, f"trainer.{name}")

    def index_of(self, name: str) -> IndexConfig:
        """Index settings of one vector retriever."""
        return build(IndexConfig, {**plain(self.index), **self.indexes.get(name, {})}, f"index.{name}")

    @property
    def data_settings(self) -> DataConfig:
        """What to build the dataset with: `data`, and the surface's word on repeats where it has one."""
        return self.data if self.surface.repeats == "auto" else replace(self.data, repeats=self.surface.repeats)


T = TypeVar("T")
SECTIONS = (
    "data",
    "roles",
    "surface",
    "rules",
    "learning",
    "trainer",
    "index",
    "allocation",
    "energy",
    "update",
    "stages",
    "systems",
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _table(table: Plain, name: str) -> Plain:
    inner = table.get(name, {})
    if not isinstance(inner, Mapping):
        raise ConfigError(f"{name} must be a table, written as [{name}], got {inner!r}")
    return inner


@dataclass(frozen=True, kw_only=True, slots=True)
class _StageTable:
    """A stage as the file has it: the first action's settings, and the further ones."""

    systems: tuple[str, ...]
    keep: int | None = None
    offers: tuple[dict[str, Any], ...] = ()


def _stage(name: str, values: Plain) -> Stage:
    where = f"stages.{name}"
    read = build(_StageTable, values, where)
    first = Action(systems=read.systems, keep=read.keep)
    others = (
        build(Action, {"systems": read.systems, **offer}, f"{where}.offers[{number}]")
        for number, offer in enumerate(read.offers)
    )
    return Stage(name=name, actions=(first, *others))


def _stage_table(stage: Stage) -> dict[str, Any]:
    first, *others = stage.actions
    return plain(first) | ({"offers": [plain(action) for action in others]} if others else {})


def _names_in(stage: Plain) -> Iterator[str]:
    for action in (stage, *stage.get("offers", ())):
        yield from action.get("systems", ()) if isinstance(action, Mapping) else ()


def _systems(stages: tuple[Stage, ...], tables: Plain) -> dict[str, SystemChoice]:
    used = list(dict.fromkeys(name for stage in stages for name in stage.systems))
    for name in tables:
        if name not in used:
            raise ConfigError(f"[systems.{name}] is set, but no stage uses {name!r}: {nearest(name, used)}")
    chosen = {}
    for name in used:
        settings = dict(_table(tables, name))
        entry = find(str(settings.pop("system", name)))
        chosen[name] = SystemChoice(system=entry.name, settings=build(entry.cls.Config, settings, f"systems.{name}"))  # type: ignore[attr-defined]
    return chosen


def _allocation(table: Plain) -> AllocationConfig:
    """Settings of the allocator are those of the class that is registered under its name."""
    config = build(AllocationConfig, {name: value for name, value in table.items() if name != "settings"}, "allocation")
    if not table:
        return config
    entry = find(config.system)
    if entry.kind != Allocator.kind:
        raise ConfigError(f"allocation.system names {config.system!r}, which is a {entry.kind} and chooses no chains")
    settings = build(entry.cls.Config, table.get("settings", {}), "allocation.settings")  # type: ignore[attr-defined]
    return replace(config, settings=settings)


def _shared_and_own(cls: type[T], table: Plain, section: str, systems: Plain) -> tuple[T, dict[str, Plain]]:
    """Settings of a section that hold for all systems, and by name what is different for one of them."""
    own = {name: table[name] for name in _own_names(cls, table)}
    shared = {name: values for name, values in table.items() if name not in own}
    for name in own:
        if name not in systems:
            raise ConfigError(f"[{section}.{name}] is set, but no stage uses {name!r}: {nearest(name, systems)}")
    settings = build(cls, shared, section)
    for name, values in own.items():
        build(cls, {**plain(settings), **values}, f"{section}.{name}")
    return settings, own


def _own_names(cls: type, table: Plain) -> list[str]:
    """Tables of a section that belong to one system each: those that are no setting of the section."""
    shared = {f.name for f in fields(cls)}
    return [name for name, values in table.items() if isinstance(values, Mapping) and name not in shared]


def _check_tasks(config: RunConfig) -> None:
    """Tasks that go together, and gradient rules that exist."""
    for name in config.surface.task_weights:
        if name not in config.learning.tasks:
            raise ConfigError(
                f"surface.task_weights names {name!r}, which is no task: {nearest(name, config.learning.tasks)} (learning.tasks)"
            )
    for name in config.systems:
        make_rule(config.trainer_of(name).gradients)
    make_rule(config.trainer.gradients)
    _check_feedback(config)


def _check_feedback(config: RunConfig) -> None:
    """A feedback rule that exists, can be served, and has a task to learn and all that its weights count on."""
    learning = config.learning
    rule = make_feedback(learning.feedback)
    if rule is None:
        return
    name, task = learning.feedback.rule, learning.late_task
    if not rule.realisable or not rule.own_chance:
        why = (
            "reads labels before they are there" if not rule.realisable else "has scores that are no chances as served"
        )
        raise ConfigError(
            f"learning.feedback.rule {name!r} {why}, and works in the streaming trainer alone; choose vanilla, fnw, fsiw, es-dfm, "
            "defer or defuse"
        )
    if task not in learning.tasks:
        raise ConfigError(
            f"learning.feedback learns task {task!r}, which is none of learning.tasks: {', '.join(learning.tasks) or 'there is none'}"
        )
    if config.surface.objective == "value":
        raise ConfigError('learning.feedback does not go with surface.objective = "value"; choose one of them')
    if learning.num_negatives is not None and not (learning.chained and task != learning.tasks[0]):
        raise ConfigError(
            "learning.feedback weighs all samples of a click, so none may be left out: drop learning.num_negatives, or set "
            "learning.chained with the late task behind another"
        )
    if learning.candidates == "logged" and not learning.feedback.delay:
        raise ConfigError(
            "learning.feedback with logged candidates needs learning.feedback.delay: the label column with the hours to the outcome"
        )
    Windows.of_hours(learning.feedback.observation_hours, learning.task_hours)


def _check(config: RunConfig) -> None:
    """What no single section can see: names that clash, kinds that do not fit their stage, a cascade that grows."""
    _check_tasks(config)
    for stage in config.stages:
        if stage.name in SECTIONS or stage.name in config.systems:
            raise ConfigError(f"stage {stage.name!r} has the name of a section or of a system; give it another")
        for number, action in enumerate(stage.actions):
            _check_action(config, stage, number, action)
    for name in config.indexes:
        if name not in config.stages[0].systems or not issubclass(config.systems[name].entry.cls, VectorRetriever):
            raise ConfigError(
                f"[index.{name}] is set, but {name!r} is no vector retriever of the first stage and searches no vectors"
            )
    for name in set(config.systems) & set(SECTIONS):
        raise ConfigError(
            f"system {name!r} has the name of a section; give it another with [systems.OTHER] system = {name!r}"
        )
    keeps = [stage.actions[0].keep or config.surface.k for stage in config.stages]
    for before, after, kept, keep in zip(config.stages, config.stages[1:], keeps, keeps[1:]):
        if keep > kept:
            raise ConfigError(
                f"stage {after.name} keeps {keep} of the {kept} items that {before.name} lets through; "
                f"lower {after.name}.keep or raise {before.name}.keep"
            )


def _check_action(config: RunConfig, stage: Stage, number: int, action: Action) -> None:
    where = f"stage {stage.name}" + (f", offer {number - 1}" if number else "")
    is_first, is_last = stage is config.stages[0], stage is config.stages[-1]
    if not action.systems or len(set(action.systems)) < len(action.systems):
        raise ConfigError(f"{where} must name at least one system, each once, got {list(action.systems)}")
    if action.keep is None and not is_last:
        raise ConfigError(f"{where} must say how many items it keeps: keep = 100")
    if action.keep is not None and action.keep < config.surface.k:
        raise ConfigError(f"{where} keeps {action.keep} items, fewer than the {config.surface.k} of a page (surface.k)")
    for name in action.systems:
        kind = config.systems[name].entry.kind
        if is_first and kind != "retriever":
            raise ConfigError(f"{where} comes first and must hold retrievers, but {name!r} is a {kind}")
        if kind not in ("retriever", "ranker", "reranker"):
            raise ConfigError(f"{where} names {name!r}, which is a {kind} and can not act in a cascade")
        if kind == "reranker" and (not is_last or len(action.systems) > 1):
            raise ConfigError(f"{where}: the re-ranker {name!r} must stand alone in the last stage")


def _shrinks(keeps: list[int]) -> bool:
    return all(after <= before for before, after in itertools.pairwise(keeps))
