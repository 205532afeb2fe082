"""The engine: a trained run that answers requests, learns of events at once, and always gives a page.

    with Engine.load("RUN", events="events.db") as engine:
        engine.recommend("u7", 10)                                            who is known
        engine.recommend("visitor", history=["b2", "a1"], deny=["c3"])        who is not
        engine.record([Event(user="u7", item="b2", timestamp=now)])           changes the next answer of u7

The past of a user is the snapshot's, and what the event store has on top. Everything a request can bring is checked first and refused
with a sentence; after that nothing it meets may fail: a broken stage is passed over by the cascade, a broken event store leaves the
snapshot's history, and when all else breaks the most popular items make the page. The answer says so in `degraded`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shortlist.cascade.ads import Ads, AdsConfig
from shortlist.cascade.allocation.base import Budget
from shortlist.cascade.answers import Answer, Circumstances, logged, make_answers
from shortlist.cascade.arranging import laid_out, longer
from shortlist.cascade.cascade import Page
from shortlist.cascade.every import Every
from shortlist.cascade.governor import Allotted, Decision, GovernorConfig, open_governor
from shortlist.cascade.knowing import Known, find_out, reason_of, rulings_of
from shortlist.cascade.last_resort import LAST_RESORT as LAST_RESORT
from shortlist.cascade.last_resort import popular_page
from shortlist.cascade.live import Live, load_live
from shortlist.cascade.meter import Meter
from shortlist.cascade.pasts import PastEvent
from shortlist.cascade.questions import NO_BUDGET, Asked, Question, check, page_size, together
from shortlist.cascade.recording import Recorded as Recorded
from shortlist.cascade.recording import Seen as Seen
from shortlist.cascade.recording import recorded, seen
from shortlist.cascade.request_log import RequestLog
from shortlist.cascade.rules import NO_RULES, Rules
from shortlist.cascade.ruling import Ruling
from shortlist.cascade.search import SearchConfig, find
from shortlist.cascade.similar import Similar, similar
from shortlist.cascade.summaries import open_summaries
from shortlist.cascade.traced import Traced as Traced
from shortlist.cascade.upkeep import Forgotten, Upkeep
from shortlist.data.jagged import Jagged
from shortlist.data.vocabulary import Id
from shortlist.errors import ConfigError, ShortlistError
from shortlist.store.catalogue import CatalogueStore
from shortlist.store.events import Event, EventStore
from shortlist.store.memories import Memories
from shortlist.store.shelf import Shelf, ShelfConfig, open_shelf


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """What bounds a request."""

    deadline_ms: float | None = None
    """Time after which no stage is waited for; None = wait."""
    max_k: int = 500
    """Longest page."""
    max_ids: int = 100_000
    """Longest list of candidates, allowed or denied items."""
    max_sent_history: int = 10_000
    """Most events that a request may bring."""
    stale_days: float = 30.0
    """A log that ended longer ago is asked as of its end, unless the user has newer events: training saw no such silence."""
    batch_size: int = 256
    """Requests answered together by `recommend_many`."""
    memory_mib: int = 256
    """Bound of what systems remember of users between requests in this process, in MiB; 0 = nothing but what `shortlist refresh` wrote, and
    what stands on a shelf."""
    shelf: ShelfConfig = field(default_factory=ShelfConfig)
    """What bounds the file or the Redis in which memories outlast the process."""
    governor: GovernorConfig = field(default_factory=GovernorConfig)
    """What a calibrated allocator may spend."""
    search: SearchConfig = field(default_factory=SearchConfig)
    """How queries are answered."""
    ads: AdsConfig = field(default_factory=AdsConfig)
    """How ads are chosen and paid."""

    def __post_init__(self) -> None:
        for name in ("max_k", "max_ids", "max_sent_history", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.memory_mib < 0:
            raise ConfigError(f"memory_mib must be at least 0, got {self.memory_mib}")
        if self.deadline_ms is not None and self.deadline_ms <= 0:
            raise ConfigError(f"deadline_ms must be above 0, got {self.deadline_ms}")


class Engine:
    """Answers requests over one run; safe to use from many threads.

    Args:
        live: the run.
        events: where events are kept; None = `record` is refused.
        catalogue: where news of items and users are kept; None = the run stands as it is.
        request_log: where answers are logged; None = nowhere.
        shelf: where systems' memories of users outlast this process; None = they do not.
        config: bounds.
    """

    def __init__(
        self,
        live: Live,
        *,
        events: EventStore | None = None,
        request_log: RequestLog | None = None,
        catalogue: CatalogueStore | None = None,
        shelf: Shelf | None = None,
        config: EngineConfig | None = None,
    ) -> None:
        self.swapping = threading.Lock()  # held while the run, or what it may spend, changes
        self.events, self.request_log, self.shelf = events, request_log, shelf
        self.upkeep = None if catalogue is None else Upkeep(catalogue)
        """Tells the run what became of items and users since; None = nobody does."""
        self.config = config or EngineConfig()
        self._live = self._remembering(live)
        self.meter = Meter()
        self.ads = Ads(self, self._known, self.config.ads)  # engine.ads(user, slots)
        self._ticks = Every(1.0, self._tick, "governor")
        if self.config.governor.moves:
            self._ticks.start()

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        events: Path | str | None = None,
        request_log: Path | str | None = None,
        memories: Path | str | None = None,
        config: EngineConfig | None = None,
    ) -> Engine:
        """Open a run.

        Args:
            folder: as `shortlist train --out` wrote it.
            events: SQLite file of events and of news of items and users, made when missing; keep it outside the run, which is replaced
                as a whole. Or postgresql://..., for servers that share them.
            request_log: SQLite file of the request log, made when missing.
            memories: file in which systems' memories of users outlast this process, made when missing, or redis://... to share them.
            config: bounds.

        Raises:
            SnapshotError: `folder` is no run or is damaged.
            DataError: a file is no event store, request log or file of memories, or a database can not be used.
        """
        config = config or EngineConfig()
        live = load_live(Path(folder))
        store = None if events is None else EventStore(events)
        catalogue = None if events is None else CatalogueStore(events)
        log = None if request_log is None else RequestLog(Path(request_log))
        shelf = None if memories is None else open_shelf(memories, config.shelf)
        return cls(live, events=store, request_log=log, catalogue=catalogue, shelf=shelf, config=config)

    @property
    def snapshot_version(self) -> str:
        """Of the run that answers now."""
        return self._live.version

    @property
    def live(self) -> Live:
        """The run that answers now; take it once and use it, since a swap may replace it."""
        return self._live

    def swap(self, folder: Path | str) -> str:
        """Answer from another run from now on; requests under way finish on the old one. Gives the new version.

        Raises SnapshotError, and changes nothing, when `folder` is no run or is damaged.
        """
        with self.swapping:
            live = self._remembering(load_live(Path(folder)))
            self._live = live
        return live.version

    def adopt(self, live: Live) -> None:
        """Answer from a run that is in memory already; it must not be another engine's, which may have a copy of its own."""
        with self.swapping:
            self._live = self._remembering(live)

    def _tick(self) -> None:
        """Once a second the governor looks at what the last one was like."""
        if self._live.governor is not None:
            self._live.governor.tick()

    def _remembering(self, live: Live) -> Live:
        """Memories belong to a snapshot, and so do summaries and the calibration beside it: those of other weights would be wrong."""
        backings, problems = open_summaries(live)
        live.governor, others = open_governor(live.folder, live.version, self.config.governor)
        live.problems = (*problems, *others)
        memories = Memories(self.config.memory_mib << 20, backings, shelf=self.shelf, snapshot=live.version)
        wanted = self.config.memory_mib or backings or self.shelf is not None
        live.cascade.memories = memories if wanted else None
        if self.upkeep is not None:
            self.upkeep.apply(live)
        return live

    def recommend(
        self,
        user: Id | None,
        k: int | None = None,
        *,
        history: Sequence[Id | tuple[Id, float] | PastEvent] | None = None,
        context: Mapping[str, Any] | None = None,
        candidates: Sequence[Id] | None = None,
        rules: Rules | None = None,
        allow: Sequence[Id] | None = None,
        deny: Sequence[Id] = (),
        at: float | None = None,
        budget: Budget | None = None,
        chain: str | None = None,
    ) -> Answer:
        """A page for one user, known or not.

        Args:
            user: id; None or an unknown one is a person without a past, unless `history` brings it.
            k: items; None = a page of the surface.
            history: what the user did, oldest first, in place of what is on record: ids, (id, seconds) pairs or PastEvents.
            context: raw values of the run's context columns.
            candidates: the only items to choose from.
            rules: which items may be shown; `allow` and `deny` are short for rules that only name those.
            at: seconds since 1970 UTC; later events are not read. None = now, with all that is known.
            budget: what this request may cost at most; None = as the run's allocator says.
            chain: name of the chain to answer by; None = the allocator's choice, without one the default chain.

        Raises:
            ConfigError: `k` is out of range, a list is too long, rules and allow/deny are both given, no such chain, or a budget where
                the run is not calibrated.
            DataError: an unknown context column, or a history with some times missing.
        """
        if rules is not None and (allow is not None or deny):
            raise ConfigError("give either rules, or allow and deny, not both")
        question = Question(
            user=user,
            k=k,
            history=history,
            context=context or {},
            candidates=candidates,
            rules=rules or (NO_RULES if allow is None and not deny else Rules(allow=allow, deny=deny)),
            at=at,
            budget=budget or NO_BUDGET,
            chain=chain,
        )
        return self._alone(question)

    def search(self, user: Id | None, query: str, k: int | None = None, *, rules: Rules | None = None) -> Answer:
        """A page of items whose text matches a query, in an order that knows the user; see cascade/search.py.

        No item matches: the page is empty, and `note` says so. Other wishes go into a Question with a query, given to `answer`.

        Args:
            user: id, known or not; None = nobody in particular.
            query: words, of which a page needs not have all.
            k: items; None = a page of the surface.
            rules: which items may be shown; items of the user's past are kept unless they say otherwise.

        Raises:
            ConfigError: the query is empty or too long, `k` is out of range, or the extra `search` is not installed.
            DataError: the run's items have no text.
        """
        return self._alone(Question(user=user, k=k, query=query, rules=rules or Rules()))

    def _alone(self, question: Question) -> Answer:
        began = time.perf_counter()
        live = self._live
        return self._answer(live, self._check(live, question), began, log=True)[0]

    def answer(
        self, questions: Sequence[Question], *, deadline_ms: float | None = None
    ) -> list[Answer | ShortlistError]:
        """Answers to questions that came at about the same time, worked on together as far as they allow it.

        Args:
            questions: of any users.
            deadline_ms: time from now after which no stage is waited for; None = as the engine's settings say.

        Returns an answer for each question, or the error that its caller should be told.
        """
        began = time.perf_counter()
        live = self._live
        results: list[Answer | ShortlistError | None] = [None] * len(questions)
        asked, places = [], []
        for place, question in enumerate(questions):
            try:
                asked.append(self._check(live, question))
                places.append(place)
            except ShortlistError as error:
                results[place] = error
        for group, members in together(asked):
            answers = self._answer(live, group, began, log=True, deadline_ms=deadline_ms)
            for member, answer in zip(members, answers):
                results[places[member]] = answer
        return [result for result in results if result is not None]

    def last_resort(self, question: Question, reason: str) -> Answer:
        """The most popular items that the question permits, for one that could not be answered in its time; marked degraded."""
        began = time.perf_counter()
        live = self._live
        asked = check(live, question, self.config)
        known = Known(batch=None, num_history=[0], moments=[int(time.time())])
        rulings = rulings_of(live, asked, known)
        page = popular_page(live, longer(asked), known, rulings[0].allowed)
        page, (answer,) = _told(live, asked, known, rulings, [Allotted(reason="fallback")], page, [reason], began)
        if self.request_log is not None:
            self.request_log.add(logged(page, answer, 0, asked, 0, live.rules), live.ids)
        return answer

    def answered(self, latency_ms: float, *, failed: bool = False) -> None:
        """Tell how long a caller waited and whether for nothing; what chains the server can afford follows it."""
        if self._live.governor is not None:
            self._live.governor.answered(latency_ms, failed=failed)

    def traced(
        self,
        user: Id | None,
        k: int | None = None,
        *,
        history: Sequence[Id | tuple[Id, float] | PastEvent] | None = None,
    ) -> Traced:
        """The page that `recommend` gives to the same question, with what every stage did. Not logged, not metered."""
        return self.trace(Question(user=user, k=k, history=history))

    def trace(self, question: Question) -> Traced:
        """The same for any question but a search."""
        live = self._live
        asked = self._check(live, question)
        problems = list(live.problems)
        known = self._known(live, asked, problems)
        chain = _decide(live, asked, known, problems).chains[0]
        ruling = rulings_of(live, asked, known)[0]
        page = self._page(live, longer(asked), known, ruling.allowed, chain, self.config.deadline_ms, problems)
        page, _ = laid_out(live, asked, known, ruling, page, problems)
        return Traced(
            live=live,
            user=question.user,
            batch=known.batch,
            page=page,
            num_history=known.num_history[0],
            problems=tuple(problems),
        )

    def similar(self, item: Id, k: int | None = None, *, rules: Rules | None = None) -> Similar:
        """Items like an item, most alike first; none where it is unknown. See cascade/similar.py for what is compared."""
        if self.upkeep is not None:
            self.upkeep.look(self._live, [])
        return similar(self._live, item, k, rules, self.config)

    def recommend_many(
        self, users: Sequence[Id | None], k: int | None = None, *, rules: Rules | None = None
    ) -> list[Answer]:
        """Pages for many users under one set of rules, `config.batch_size` at a time; not written to the request log."""
        live = self._live
        ruled = check(live, Question(user=None, rules=rules or NO_RULES), self.config).rules
        k = page_size(live, k, self.config)
        answers: list[Answer] = []
        for start in range(0, len(users), self.config.batch_size):
            asked = Asked(users=users[start : start + self.config.batch_size], k=k, rules=ruled)
            answers += self._answer(live, asked, time.perf_counter(), log=False)
        return answers

    def record(self, events: Sequence[Event]) -> Recorded:
        """Keep events for good; when this returns they are durable and count in the users' next answers.

        Raises:
            ConfigError: the engine was opened without an event store.
            DataError: an event is not what it should be; nothing was kept.
            StoreUnavailable: the store can not be written; nothing was kept.
        """
        if self.events is None:
            raise ConfigError("this engine keeps no events; open it with events=PATH (command line: --events PATH)")
        return recorded(self._live, events, self.events.append(events))

    def forget(self, user: Id) -> Forgotten:
        """Wipe a user's past from all files and know the user no more; see cascade/upkeep.py for what that takes in.

        ConfigError where the engine was opened without a store, StoreUnavailable where a file can not be written: call again later.
        """
        if self.upkeep is None:
            raise ConfigError(
                "this engine keeps nothing; open it with events=PATH (on the command line: --events PATH)"
            )
        return self.upkeep.forget_user(self._live, str(user), self.events, self.request_log, self.ads.store)

    def history(self, user: Id, count: int = 10) -> list[Seen]:
        """The newest `count` events of a user, newest first; StoreUnavailable when the event store can not be read."""
        return seen(self._live, self.events, user, count)

    def close(self) -> None:
        """Write what waits for the request log and let go of the files."""
        self._ticks.stop()
        if self.request_log is not None:
            self.request_log.close()
        if self.events is not None:
            self.events.close()
        if self.upkeep is not None:
            self.upkeep.store.close()
        if self.shelf is not None:
            self.shelf.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- answering -----------------------------------------------------------------------------------------------

    def _check(self, live: Live, question: Question) -> Asked:
        asked = check(live, question, self.config)
        if asked.most_BC is not None and live.governor is None:
            raise ConfigError(
                "a request's budget needs to know what chains cost: run `shortlist calibrate` on this run, or leave the budget out"
            )
        return asked if asked.query is None else find(live, asked, self.config.search)

    @torch.inference_mode()
    def _answer(
        self, live: Live, asked: Asked, began: float, *, log: bool, deadline_ms: float | None = None
    ) -> list[Answer]:
        """Answers to B questions, whatever happens."""
        problems = list(live.problems)
        known = self._known(live, asked, problems)
        rulings = rulings_of(live, asked, known)
        decision = _decide(live, asked, known, problems)
        limit = min((ms for ms in (deadline_ms, self.config.deadline_ms) if ms is not None), default=None)
        answers: list[Answer | None] = [None] * len(asked.users)
        for name, places in _by_chain(decision):
            part, of_part = asked, known
            if len(places) < len(asked.users):
                part = replace(asked, users=[asked.users[place] for place in places])
                of_part = known.select(places)
            own = list(problems)  # what goes wrong with one chain is no matter of the others' requests
            page = self._page(live, longer(part), of_part, rulings[0].allowed, name, limit, own)
            ruled, allotted = [rulings[place] for place in places], [decision.told[place] for place in places]
            page, made = _told(live, part, of_part, ruled, allotted, page, own, began, of=len(asked.users))
            self.meter.add(page.chain, page.reports)
            for number, (place, answer) in enumerate(zip(places, made)):
                answers[place] = answer
                if log and self.request_log is not None:
                    self.request_log.add(logged(page, answer, number, asked, place, live.rules), live.ids)
        done = [answer for answer in answers if answer is not None]
        if live.governor is not None:
            live.governor.note(decision, [answer.stages for answer in done])
        return done

    def _known(self, live: Live, asked: Asked, problems: list[str]) -> Known:
        if self.upkeep is not None:
            self.upkeep.look(live, problems)
        known = find_out(live, self.events, asked, stale_days=self.config.stale_days, problems=problems)
        return known if self.upkeep is None else self.upkeep.known(live, known, asked.users, problems)

    def _page(
        self,
        live: Live,
        asked: Asked,
        known: Known,
        allowed: Tensor | None,
        chain: str | None,
        deadline_ms: float | None,
        problems: list[str],
    ) -> Page:
        """What the cascade makes of it, or the last resort."""
        found = asked.found
        if known.batch is not None and (found is None or len(found.rows)):
            try:
                page = live.cascade.run(
                    known.batch,
                    k=asked.k if found is None else len(found.rows),
                    candidates=None if asked.candidates is None else Jagged.from_rows([asked.candidates.tolist()]),
                    allowed=allowed,
                    chain=chain,
                    deadline_ms=deadline_ms,
                )
                return page if found is None else found.page(page, asked.k)
            except Exception as error:  # a request always gets a page
                problems.append(reason_of("the cascade failed", error))
        if found is not None:
            return found.page(None, asked.k, None if known.batch is None else known.batch.excluded)
        return popular_page(live, asked, known, allowed)


def _told(
    live: Live,
    asked: Asked,
    known: Known,
    rulings: Sequence[Ruling],
    allotted: Sequence[Allotted],
    page: Page,
    problems: list[str],
    began: float,
    *,
    of: int = 1,
) -> tuple[Page, list[Answer]]:
    """Pages laid out by rules, and the answers [B] that tell of them; the time since `began` is that of `of` requests."""
    page, arranged = laid_out(live, asked, known, rulings[0], page, problems)
    told = Circumstances(
        users=asked.users,
        num_history=known.num_history,
        moments=known.moments,
        rulings=rulings,
        arranged=arranged,
        problems=problems,
        num_unknown_candidates=asked.num_unknown_candidates,
        spent_ms=(time.perf_counter() - began) * 1e3 / of,
        allotted=allotted,
        note=asked.note,
    )
    return page, make_answers(live, page, told)


def _decide(live: Live, asked: Asked, known: Known, problems: list[str]) -> Decision:
    """A chain for each of B requests."""
    num_requests = len(asked.users)
    if asked.chain is not None:
        return Decision([asked.chain] * num_requests, [Allotted(reason="named")] * num_requests)
    if live.governor is None or known.batch is None:
        return Decision([None] * num_requests, [Allotted(reason="default")] * num_requests)
    try:
        return live.governor.choose(known.batch, asked.most_BC)
    except Exception as error:  # a request always gets a page
        problems.append(reason_of("the allocator failed", error))
        return Decision([None] * num_requests, [Allotted(reason="fallback")] * num_requests)


def _by_chain(decision: Decision) -> list[tuple[str | None, list[int]]]:
    """The chains that were chosen, each with the places of its requests."""
    places: dict[str | None, list[int]] = {}
    for place, name in enumerate(decision.chains):
        places.setdefault(name, []).append(place)
    return list(places.items())
