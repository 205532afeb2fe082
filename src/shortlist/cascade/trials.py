"""Experiments at work: every question gets its variants, the answer names them, and who saw what is logged.

    with Engine.load(RUN, events=..., request_log=...) as engine, Trials(engine, read_experiments(FILE)) as trials:
        trials.answer([Question(user="u7")])

Questions of one variant are answered together. A variant that changes the run or the budget has an engine of its own, which shares the
event store and the request log. A variant that fails costs nobody their page: the question is answered as if there were no experiment, the
answer is marked degraded, and the exposure still counts for the variant.
"""

from __future__ import annotations

import copy
import threading
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from shortlist.cascade.allocation.base import Budget
from shortlist.cascade.answers import Answer
from shortlist.cascade.engine import Engine
from shortlist.cascade.experiments import INTERLEAVED, Experiment, Variant, random_page, team_draft
from shortlist.cascade.exposures import Exposure, read_stops, write_experiments, write_stop
from shortlist.cascade.live import Live, load_live
from shortlist.cascade.pasts import MS
from shortlist.cascade.questions import Question
from shortlist.errors import ConfigError, ShortlistError
from shortlist.store.published import served_run

ALONE = "request:"
"""What the unit of a request begins with that names neither a user nor a session; no event can be told to be its own."""
Outcome = Answer | ShortlistError


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """What experiments make of one question."""

    question: Question
    unit: str
    assigned: Mapping[str, str]
    """Variant, or INTERLEAVED, by experiment."""
    sides: Sequence[Sequence[Variant]]
    """Variants of the page; two where one experiment interleaves."""


class Trials:
    """Answers questions under experiments; safe to use from many threads.

    Args:
        engine: what is served where no experiment says otherwise; stays the caller's to close.
        experiments: by name, as `read_experiments` gives them.
        folder: where relative folders of runs begin.
        seed: of random pages and coins; None = another one every time.

    Raises:
        ConfigError: a variant names a chain or fields that its run does not have, or a budget where it is not calibrated.
        SnapshotError: a variant's run is no run or is damaged.
    """

    def __init__(
        self,
        engine: Engine,
        experiments: Mapping[str, Experiment],
        *,
        folder: Path | None = None,
        seed: int | None = None,
    ) -> None:
        self.engine, self.experiments = engine, dict(experiments)
        self._folder = folder or Path()
        self._rng, self._drawing = np.random.default_rng(seed), threading.Lock()
        self._stopped: dict[str, str] = {}
        self.shown: Counter[tuple[str, str]] = Counter()
        """Pages by experiment and variant, since the start."""
        self._base, self._adopting = engine.live, threading.Lock()
        self._engines: dict[tuple[str, Budget], Engine] = {}
        for experiment in self.experiments.values():
            for name, variant in experiment.variants.items():
                try:
                    self._open(variant)
                except ConfigError as error:
                    raise ConfigError(f"[experiments.{experiment.name}.variants.{name}] {error}") from error
        if engine.request_log is not None:
            write_experiments(engine.request_log.path, self.experiments.values())
        self.look_for_stops()

    def answer(self, questions: Sequence[Question], *, deadline_ms: float | None = None) -> list[Outcome]:
        """An answer for each question, or the error that its caller should be told; as `Engine.answer`."""
        began = time.perf_counter()
        self._follow()
        plans = [self._plan(question) for question in questions]
        jobs: dict[Engine, list[tuple[int, int, Question]]] = {}
        for place, plan in enumerate(plans):
            for team, side in enumerate(plan.sides):
                engine, question = self._asked(plan.question, side)
                jobs.setdefault(engine, []).append((place, team, question))
        found: dict[tuple[int, int], Outcome] = {}
        for engine, mine in jobs.items():
            spent_ms = (time.perf_counter() - began) * 1e3
            left_ms = None if deadline_ms is None else max(deadline_ms - spent_ms, 1.0)
            results = engine.answer([question for *_, question in mine], deadline_ms=left_ms)
            found |= {(place, team): result for (place, team, _), result in zip(mine, results, strict=True)}
        exposures: list[Exposure] = []
        made = [
            self._finished(plan, [found[place, team] for team in range(len(plan.sides))], exposures)
            for place, plan in enumerate(plans)
        ]
        self._expose(exposures)
        return made

    def missed(self, question: Question, made: Answer) -> Answer:
        """A page that came from elsewhere, since the variant's was late: it counts for the variant, else slowness would go unseen."""
        exposures: list[Exposure] = []
        made = self._exposed(self._plan(question), made, (), (), exposures)
        self._expose(exposures)
        return made

    def stop(self, name: str, reason: str) -> None:
        """End an experiment for good: everyone is served as if it did not exist, here at once, on other servers of the same request log
        when they look next. ConfigError for a name that is not there."""
        if name not in self.experiments:
            raise ConfigError(f"there is no experiment {name!r}; there are {', '.join(self.experiments)}")
        self._stopped.setdefault(name, reason)
        if self.engine.request_log is not None:
            write_stop(self.engine.request_log.path, name, reason, round(time.time() * MS))

    def look_for_stops(self) -> None:
        """Take over what other servers, or this one before it was started again, have stopped."""
        if self.engine.request_log is not None:
            for name, reason in read_stops(self.engine.request_log.path).items():
                self._stopped.setdefault(name, reason)

    @property
    def stopped(self) -> Mapping[str, str]:
        """Why, by experiment, of those that were stopped."""
        return dict(self._stopped)

    def close(self) -> None:
        """Let go of the variants' engines; the files they share stay open."""
        for engine in self._engines.values():
            engine.events = engine.request_log = engine.upkeep = None  # the served engine's to close
            engine.close()

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- who gets what -----------------------------------------------------------------------------------------------

    def _plan(self, question: Question) -> _Plan:
        unit = question.user if question.user is not None else question.session
        unit = f"{ALONE}{uuid.uuid4().hex}" if unit is None else str(unit)
        assigned: dict[str, str] = {}
        own_way = question.chain is not None or question.at is not None or question.budget != Budget()
        surface = "recommend" if question.query is None else "search"
        for name, experiment in self.experiments.items():
            if own_way or name in self._stopped or experiment.settings.surface != surface:
                continue
            variant = experiment.variant_of(unit)
            if variant is not None:
                assigned[name] = variant
        fixed = [self.experiments[n].variants[v] for n, v in assigned.items() if v != INTERLEAVED]
        both = [self.experiments[n].variants.values() for n, v in assigned.items() if v == INTERLEAVED]
        sides = [[*fixed, variant] for variant in both[0]] if both else [fixed]
        return _Plan(question=question, unit=unit, assigned=assigned, sides=sides)

    def _asked(self, question: Question, side: Sequence[Variant]) -> tuple[Engine, Question]:
        """Which engine is asked what."""
        engine = next((self._engines[_key(v)] for v in side if _key(v) in self._engines), self.engine)
        for variant in side:
            if variant.chain:
                question = replace(question, chain=variant.chain)
            if question.rules.with_surface:
                laid = question.rules.over(variant.rules)
                question = replace(question, rules=replace(laid, with_surface=variant.rules.with_surface))
            if variant.explore:
                # The page is the head of the longer list, so that every item's chance to be at its place is known.
                wanted = max(self._page_size(question), variant.explore_from)
                question = replace(question, k=min(wanted, engine.config.max_k))
        return engine, question

    def _page_size(self, question: Question) -> int:
        return self.engine.live.cascade.config.surface.k if question.k is None else question.k

    # -- one page ----------------------------------------------------------------------------------------------------

    def _finished(self, plan: _Plan, results: Sequence[Outcome], exposures: list[Exposure]) -> Outcome:
        """One answer from those of the sides, and its exposures."""
        if not plan.assigned:
            return results[0]
        failed = next((result for result in results if isinstance(result, ShortlistError)), None)
        if failed is not None:
            plain = self.engine.answer([plan.question])[0]
            if isinstance(plain, ShortlistError):
                return plain  # the question's own fault
            reason = f"a variant failed ({failed})"
            made = replace(plain, degraded=f"{plain.degraded}; {reason}" if plain.degraded else reason)
            return self._exposed(plan, made, (), (), exposures)
        pages = [result for result in results if isinstance(result, Answer)]
        if len(pages) == 2:
            return self._exposed(plan, *self._drafted(pages, self._page_size(plan.question)), exposures)
        made, chances = pages[0], tuple[float, ...]()
        explore = next((variant.explore for variant in plan.sides[0] if variant.explore), 0.0)
        if explore and made.items:
            with self._drawing:
                items, drawn = random_page(made.items, self._page_size(plan.question), explore, self._rng)
            made, chances = replace(made, items=tuple(items)), tuple(drawn)
        return self._exposed(plan, made, chances, (), exposures)

    def _drafted(self, pages: Sequence[Answer], k: int) -> tuple[Answer, tuple[float, ...], tuple[int, ...]]:
        """One page of two; it goes by the first one's request id, under which the request log has the first one's page."""
        items = [{item.item_id: item for item in page.items} for page in pages]
        with self._drawing:
            drafted = team_draft(list(items[0]), list(items[1]), k, self._rng)
        problems = [page.degraded for page in pages if page.degraded]
        made = replace(
            pages[0],
            items=tuple(items[team][item_id] for item_id, team in drafted),
            degraded="; ".join(problems) or None,
            spent_ms=sum(page.spent_ms for page in pages),
        )
        return made, (), tuple(team for _, team in drafted)

    def _expose(self, exposures: Sequence[Exposure]) -> None:
        """Count and log."""
        if exposures:
            with self._drawing:
                self.shown.update((exposure.experiment, exposure.variant) for exposure in exposures)
            if self.engine.request_log is not None:
                self.engine.request_log.expose(exposures)

    def _exposed(
        self,
        plan: _Plan,
        made: Answer,
        chances: tuple[float, ...],
        teams: tuple[int, ...],
        exposures: list[Exposure],
    ) -> Answer:
        for name, variant in plan.assigned.items():
            experiment = self.experiments[name]
            explores = variant != INTERLEAVED and experiment.variants[variant].explore > 0
            exposures.append(
                Exposure(
                    request_id=made.request_id,
                    at_ms=round(time.time() * MS),
                    experiment=name,
                    variant=variant,
                    unit=plan.unit,
                    propensity=experiment.shares.get(variant, 1.0),
                    spent_ms=made.spent_ms,
                    degraded=made.degraded is not None,
                    items=tuple(str(item.item_id) for item in made.items),
                    chances=chances if explores else (),
                    teams=teams if variant == INTERLEAVED else (),
                )
            )
        return replace(made, variants=dict(plan.assigned))

    # -- engines of variants -------------------------------------------------------------------------------------------

    def _open(self, variant: Variant) -> None:
        """Make the variant's engine where it needs one, and refuse what its run can not do."""
        key = _key(variant)
        if key != _key(Variant()) and key not in self._engines:
            live = load_live(served_run(self._folder / variant.run)) if variant.run else _twin(self._base)
            governor = self.engine.config.governor
            budget = governor.budget if key[1] == Budget() else key[1]
            engine = Engine(
                live,
                events=self.engine.events,
                request_log=self.engine.request_log,
                catalogue=None if self.engine.upkeep is None else self.engine.upkeep.store,
                config=replace(self.engine.config, governor=replace(governor, budget=budget)),
            )
            if key[1] != Budget() and engine.live.governor is None:
                raise ConfigError("a budget needs to know what chains cost: run `shortlist calibrate` on the run first")
            self._engines[key] = engine
        live = self._engines.get(key, self.engine).live
        if variant.chain:
            live.cascade.config.chain(variant.chain)
        live.check_rules(variant.rules.over(live.rules))

    def _follow(self) -> None:
        """Where the served engine has taken up another snapshot, so do variants that only change its budget."""
        if self._base is self.engine.live:
            return
        with self._adopting:
            base: Live = self.engine.live
            if self._base is not base:
                for (run, _), engine in self._engines.items():
                    if not run:
                        engine.adopt(_twin(base))
                self._base = base


def _twin(live: Live) -> Live:
    """The same run with a governor and memories of its own."""
    twin = copy.copy(live)
    twin.cascade = copy.copy(live.cascade)
    return twin


def _key(variant: Variant) -> tuple[str, Budget]:
    return variant.run, Budget(ms=variant.budget_ms, mflop=variant.budget_mflop)
