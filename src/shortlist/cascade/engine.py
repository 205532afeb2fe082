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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shortlist.cascade.allocation.base import Budget
from shortlist.cascade.answers import Answer, Circumstances, logged, make_answers
from shortlist.cascade.candidates import Blocked, first_permitted
from shortlist.cascade.cascade import Page, StageTrace
from shortlist.cascade.governor import Allotted, Decision
from shortlist.cascade.live import Live, load_live
from shortlist.cascade.meter import Meter
from shortlist.cascade.pasts import Newer, PastEvent, newer_of, newer_stored, pasts
from shortlist.cascade.questions import Asked, Question, check, page_size, together
from shortlist.cascade.request_log import RequestLog
from shortlist.cascade.rules import Rules, Ruling, rule
from shortlist.cascade.summaries import open_summaries
from shortlist.data.batches import Batch, request_batch
from shortlist.data.histories import Histories, Int
from shortlist.data.jagged import Jagged
from shortlist.data.vocabulary import Id
from shortlist.errors import ConfigError, ShortlistError
from shortlist.store.events import Event, EventStore, StoreUnavailable
from shortlist.store.memories import Memories

LAST_RESORT = "popular"
"""Name of the chain, and of its only stage, when the cascade itself failed."""
_DAY_S = 86_400


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
    """Bound of what systems remember of users between requests, in MiB; 0 = nothing but what `shortlist refresh` wrote is remembered."""

    def __post_init__(self) -> None:
        for name in ("max_k", "max_ids", "max_sent_history", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.memory_mib < 0:
            raise ConfigError(f"memory_mib must be at least 0, got {self.memory_mib}")
        if self.deadline_ms is not None and self.deadline_ms <= 0:
            raise ConfigError(f"deadline_ms must be above 0, got {self.deadline_ms}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """What became of events."""

    num_new: int
    num_repeated: int
    """Were there already under their event_id."""
    num_unknown_users: int
    """Not in the snapshot; kept."""
    num_unknown_items: int
    """Not in the catalogue; kept, and counted in histories once a snapshot knows the item."""
    num_unknown_actions: int
    """Not seen in training; kept, and read as the unknown action."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """An event of a user's past, to be shown."""

    item_id: Id
    title: str | None
    timestamp: int | None
    """Seconds since 1970 UTC; None where it is not known, as in a log without a clock."""
    action: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Traced:
    """One question, what was known of it, and how its page came about."""

    live: Live
    user: Id | None
    batch: Batch | None
    """The request as the cascade got it, on the CPU; None where not even the user's past could be read."""
    page: Page
    num_history: int
    """Events known; the batch holds the newest of them."""
    problems: tuple[str, ...]
    """What went wrong outside the stages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Known:
    """What the engine found out about B users."""

    batch: Batch | None
    """None where even that failed."""
    num_history: list[int]
    moments: list[int]

    def select(self, places: Sequence[int]) -> _Known:
        """Of some of the users."""
        return _Known(
            batch=None if self.batch is None else self.batch.select(torch.tensor(places)),
            num_history=[self.num_history[place] for place in places],
            moments=[self.moments[place] for place in places],
        )


class Engine:
    """Answers requests over one run; safe to use from many threads.

    Args:
        live: the run.
        events: where events are kept; None = `record` is refused.
        request_log: where answers are logged; None = nowhere.
        config: bounds.
    """

    def __init__(
        self,
        live: Live,
        *,
        events: EventStore | None = None,
        request_log: RequestLog | None = None,
        config: EngineConfig | None = None,
    ) -> None:
        self._swapping = threading.Lock()
        self.events, self.request_log = events, request_log
        self.config = config or EngineConfig()
        self._live = self._remembering(live)
        self.meter = Meter()

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        events: Path | str | None = None,
        request_log: Path | str | None = None,
        config: EngineConfig | None = None,
    ) -> Engine:
        """Open a run.

        Args:
            folder: as `shortlist train --out` wrote it.
            events: SQLite file of the event store, made when missing; keep it outside the run, which is replaced as a whole.
            request_log: SQLite file of the request log, made when missing.
            config: bounds.

        Raises:
            SnapshotError: `folder` is no run or is damaged.
            DataError: a file is no event store or no request log.
        """
        live = load_live(Path(folder))
        store = None if events is None else EventStore(Path(events))
        log = None if request_log is None else RequestLog(Path(request_log))
        return cls(live, events=store, request_log=log, config=config)

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
        with self._swapping:
            live = self._remembering(load_live(Path(folder)))
            self._live = live
        return live.version

    def _remembering(self, live: Live) -> Live:
        """Memories belong to a snapshot, and so do summaries beside it: those of another one's weights would be wrong."""
        backings, problems = open_summaries(live)
        live.problems = tuple(problems)
        wanted = self.config.memory_mib or backings
        live.cascade.memories = Memories(self.config.memory_mib << 20, backings) if wanted else None
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
            rules=rules or Rules(allow=allow, deny=deny),
            at=at,
            budget=budget or Budget(),
            chain=chain,
        )
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
        known = _Known(batch=None, num_history=[0], moments=[int(time.time())])
        rulings = _rulings(live, asked, known)
        page = _popular_page(live, asked, known, rulings[0].allowed)
        told = Circumstances(
            users=asked.users,
            num_history=known.num_history,
            moments=known.moments,
            rulings=rulings,
            problems=[reason],
            num_unknown_candidates=asked.num_unknown_candidates,
            spent_ms=(time.perf_counter() - began) * 1e3,
            allotted=[Allotted(reason="fallback")],
        )
        return make_answers(live, page, told)[0]

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
        live = self._live
        asked = self._check(live, Question(user=user, k=k, history=history))
        problems = list(live.problems)
        known = self._known(live, asked, problems)
        chain = _decide(live, asked, known, problems).chains[0]
        allowed = _rulings(live, asked, known)[0].allowed
        page = self._page(live, asked, known, allowed, chain, self.config.deadline_ms, problems)
        return Traced(
            live=live,
            user=user,
            batch=known.batch,
            page=page,
            num_history=known.num_history[0],
            problems=tuple(problems),
        )

    def recommend_many(self, users: Sequence[Id | None], k: int | None = None) -> list[Answer]:
        """Pages for many users, `config.batch_size` at a time; not written to the request log."""
        live = self._live
        k = page_size(live, k, self.config)
        answers: list[Answer] = []
        for start in range(0, len(users), self.config.batch_size):
            asked = Asked(users=users[start : start + self.config.batch_size], k=k)
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
            raise ConfigError(
                "this engine keeps no events; open it with events=PATH (on the command line: --events PATH)"
            )
        num_new = self.events.append(events)
        live = self._live
        named = [event.action for event in events if event.action is not None]
        return Recorded(
            num_new=num_new,
            num_repeated=len(events) - num_new,
            num_unknown_users=int((live.users([event.user for event in events]) == 0).sum()),
            num_unknown_items=int((live.items([event.item for event in events]) == 0).sum()),
            num_unknown_actions=int((live.action_ids(named) == 0).sum()),
        )

    def history(self, user: Id, count: int = 10) -> list[Seen]:
        """The newest `count` events of a user, newest first; StoreUnavailable when the event store can not be read."""
        live = self._live
        past = pasts(
            live.dataset.histories,
            live.users([user]),
            self._stored(live, [user]),
            has_clock=live.dataset.space.has_clock,
            newest=max(count, 1),
        )
        newest = slice(None, -count - 1, -1)
        rows, actions = past.item[newest], past.action[newest].tolist()
        times = past.time[newest].tolist() if live.dataset.space.has_clock else [None] * len(rows)
        names = (None, *live.dataset.space.actions)
        return [
            Seen(item_id=live.id(row), title=live.title(row), timestamp=then, action=names[action])
            for row, then, action in zip(rows.tolist(), times, actions)
        ]

    def close(self) -> None:
        """Write what waits for the request log and let go of the files."""
        if self.request_log is not None:
            self.request_log.close()
        if self.events is not None:
            self.events.close()

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
        return asked

    def _answer(
        self, live: Live, asked: Asked, began: float, *, log: bool, deadline_ms: float | None = None
    ) -> list[Answer]:
        """Answers to B questions, whatever happens."""
        problems = list(live.problems)
        known = self._known(live, asked, problems)
        rulings = _rulings(live, asked, known)
        decision = _decide(live, asked, known, problems)
        limit = min((ms for ms in (deadline_ms, self.config.deadline_ms) if ms is not None), default=None)
        answers: list[Answer | None] = [None] * len(asked.users)
        for name, places in _by_chain(decision):
            part, of_part = asked, known
            if len(places) < len(asked.users):
                part = replace(asked, users=[asked.users[place] for place in places])
                of_part = known.select(places)
            page = self._page(live, part, of_part, rulings[0].allowed, name, limit, problems)
            self.meter.add(page.chain, page.reports)
            told = Circumstances(
                users=part.users,
                num_history=of_part.num_history,
                moments=of_part.moments,
                rulings=[rulings[place] for place in places],
                problems=problems,
                num_unknown_candidates=asked.num_unknown_candidates,
                spent_ms=(time.perf_counter() - began) * 1e3 / len(asked.users),
                allotted=[decision.told[place] for place in places],
            )
            made = make_answers(live, page, told)
            for number, (place, answer) in enumerate(zip(places, made)):
                answers[place] = answer
                if log and self.request_log is not None:
                    self.request_log.add(logged(page, answer, asked.k, number), live.ids)
        done = [answer for answer in answers if answer is not None]
        if live.governor is not None:
            live.governor.note(decision, [answer.stages for answer in done])
        return done

    def _page(
        self,
        live: Live,
        asked: Asked,
        known: _Known,
        allowed: Tensor | None,
        chain: str | None,
        deadline_ms: float | None,
        problems: list[str],
    ) -> Page:
        """What the cascade makes of it, or the last resort."""
        if known.batch is not None:
            try:
                return live.cascade.run(
                    known.batch,
                    k=asked.k,
                    candidates=None if asked.candidates is None else Jagged.from_rows([asked.candidates.tolist()]),
                    allowed=allowed,
                    chain=chain,
                    deadline_ms=deadline_ms,
                )
            except Exception as error:  # a request always gets a page
                problems.append(_reason("the cascade failed", error))
        return _popular_page(live, asked, known, allowed)

    def _known(self, live: Live, asked: Asked, problems: list[str]) -> _Known:
        """The batch, from all that is known of the users."""
        now = time.time()
        excludes = not (live.repeats if asked.rules.seen is None else asked.rules.seen == "keep")
        # What systems read, unless all that was seen is to be left out or the question is of an earlier moment.
        all_of_it = excludes or asked.at is not None or not live.dataset.space.has_clock
        newest = None if all_of_it else live.cascade.max_history
        try:
            rows = live.users(asked.users)
            past, moments = self._pasts(live, asked, rows, now, newest, problems)
            histories, requests = live.dataset.requests_for(
                asked.users, rows=rows, at=moments, histories=past, context=asked.context
            )
            batch = request_batch(
                histories,
                live.user_fields,
                requests,
                max_history=live.cascade.max_history,
                exclude_history=excludes,
            )
        except Exception as error:  # a request always gets a page
            problems.append(_reason("the user's past could not be read", error))
            return _Known(batch=None, num_history=[0] * len(asked.users), moments=[int(now)] * len(asked.users))
        if asked.sent is None and asked.at is None and all(user is not None for user in asked.users):
            batch = replace(batch, key=tuple(str(user) for user in asked.users))
        known = requests.end - requests.start
        if newest is not None and asked.sent is None:
            offsets = live.dataset.histories.offsets
            known = known + np.maximum(offsets[rows + 1] - offsets[rows] - newest, 0)
        return _Known(batch=batch, num_history=known.tolist(), moments=moments.tolist())

    def _pasts(
        self, live: Live, asked: Asked, rows: Int, now: float, newest: int | None, problems: list[str]
    ) -> tuple[Histories, Int]:
        """Histories of B users, and the moment [B] each is asked about."""
        newer: Newer | None = None
        if asked.sent is not None:
            rows = np.zeros_like(rows)  # what the request says stands in place of what is on record
            actions = live.action_ids([event.action for event in asked.sent])
            newer = newer_of(asked.sent, live.items, actions, now if asked.at is None else asked.at)
        else:
            try:
                newer = self._stored(live, asked.users)
            except StoreUnavailable as error:
                problems.append(f"recent events are missing: {error}")
        past = pasts(live.dataset.histories, rows, newer, has_clock=live.dataset.space.has_clock, newest=newest)
        if asked.at is not None:
            return past, np.full(len(rows), asked.at, dtype=np.int64)
        is_stale = now - live.log_end > self.config.stale_days * _DAY_S
        moments = np.full(len(rows), live.log_end if is_stale else int(now), dtype=np.int64)
        if newer is not None:
            moments[newer.user] = int(now)
        return past, np.maximum(moments, _last_times(past)) if live.dataset.space.has_clock else moments

    def _stored(self, live: Live, users: Sequence[Id | None]) -> Newer | None:
        return None if self.events is None else newer_stored(self.events, users, live.items, live.action_ids)


def _decide(live: Live, asked: Asked, known: _Known, problems: list[str]) -> Decision:
    """A chain for each of B requests."""
    num_requests = len(asked.users)
    if asked.chain is not None:
        return Decision([asked.chain] * num_requests, [Allotted(reason="named")] * num_requests)
    if live.governor is None or known.batch is None:
        return Decision([None] * num_requests, [Allotted(reason="default")] * num_requests)
    try:
        return live.governor.choose(known.batch, asked.most_BC)
    except Exception as error:  # a request always gets a page
        problems.append(_reason("the allocator failed", error))
        return Decision([None] * num_requests, [Allotted(reason="fallback")] * num_requests)


def _by_chain(decision: Decision) -> list[tuple[str | None, list[int]]]:
    """The chains that were chosen, each with the places of its requests."""
    places: dict[str | None, list[int]] = {}
    for place, name in enumerate(decision.chains):
        places.setdefault(name, []).append(place)
    return list(places.items())


def _reason(what: str, error: Exception) -> str:
    return f"{what} ({type(error).__name__}: {error})"


def _last_times(past: Histories) -> Int:
    """int64 [B]: time of each user's newest event; 0 without one."""
    start, end = past.offsets[1:-1], past.offsets[2:]
    if not past.num_events:
        return np.zeros(len(start), dtype=np.int64)
    return np.where(end > start, past.time[np.maximum(end - 1, 0)], 0)


def _rulings(live: Live, asked: Asked, known: _Known) -> list[Ruling]:
    """The rules' meaning per request; `allowed` is the same for all."""
    excluded = None if known.batch is None else known.batch.excluded
    rulings = []
    for place in range(len(asked.users)):
        seen = None
        if excluded is not None:
            seen = excluded.values[int(excluded.offsets[place]) : int(excluded.offsets[place + 1])].numpy()
        rulings.append(rule(asked.rules, live.items, live.dataset.num_items, seen=seen, candidates=asked.candidates))
    return rulings


def _popular_page(live: Live, asked: Asked, known: _Known, allowed: Tensor | None) -> Page:
    """What is left when the cascade fails as a whole: the most popular items that the rules permit."""
    began = time.perf_counter()
    popular, num_requests = live.cascade.popular.cpu(), len(asked.users)
    if asked.candidates is not None:
        popular = popular[torch.isin(popular, torch.from_numpy(asked.candidates))]
    if allowed is not None:
        popular = popular[allowed[popular]]
    excluded = None if known.batch is None else known.batch.excluded
    most = asked.k + (0 if excluded is None else int(excluded.lengths.max()))
    rows_Bk = first_permitted(
        popular[:most].expand(num_requests, -1), Blocked(live.dataset.num_items, excluded, allowed), asked.k
    )
    shown = Jagged.from_padded(rows_Bk, rows_Bk > 0)
    trace = StageTrace(
        name=LAST_RESORT,
        systems=(),
        rows=shown,
        scores=torch.zeros(len(shown.values)),
        system_scores={},
        num_received=torch.full((num_requests,), len(popular)),
        spent_ms=(time.perf_counter() - began) * 1e3,
        flops=0.0,
    )
    return Page(rows=rows_Bk, scores=torch.full(rows_Bk.shape, -torch.inf), traces=(trace,), chain=LAST_RESORT)
