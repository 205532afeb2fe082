"""What an engine is asked, checked before anything is done with it, and put together with others that can be answered at once.

    Question(user="u7", k=10)     as the caller means it
    Asked                         B checked questions that share everything but the user, context and budget

A question that brings its own history, candidates or moment is answered alone; all others of one page size and one set of rules are
answered together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from shortlist.cascade.allocation.base import Budget, Float
from shortlist.cascade.live import Live
from shortlist.cascade.pasts import PastEvent, sent_history
from shortlist.cascade.rules import NO_RULES, Rules
from shortlist.data.histories import Int
from shortlist.data.vocabulary import Id
from shortlist.errors import ConfigError
from shortlist.store.events import MAX_TIMESTAMP

if TYPE_CHECKING:
    from shortlist.cascade.search import Found


NO_BUDGET = Budget()
"""No limit on what a request may cost."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One request for a page."""

    user: Id | None
    """Id; None or an unknown one is a person without a past, unless `history` brings it."""
    k: int | None = None
    """Items; None = a page of the surface."""
    history: Sequence[Id | tuple[Id, float] | PastEvent] | None = None
    """What the user did, oldest first, in place of what is on record."""
    context: Mapping[str, Any] = field(default_factory=dict)
    """Raw values of the run's context columns."""
    candidates: Sequence[Id] | None = None
    """The only items to choose from."""
    rules: Rules = NO_RULES
    """Which items may be shown and how the page is laid out, over the surface's own."""
    at: float | None = None
    """Seconds since 1970 UTC; later events are not read. None = now, with all that is known."""
    budget: Budget = NO_BUDGET
    """What this request may cost at most; no limits = as the server's allocator says."""
    chain: str | None = None
    """Name of the chain that is to answer, in place of the allocator's choice."""
    query: str | None = None
    """What somebody typed: only items whose text matches it are shown; None = no search."""
    session: Id | None = None
    """Whom experiments tell apart where nobody is named; read by nothing else."""


class Bounds(Protocol):
    """Limits of a request."""

    @property
    def max_k(self) -> int:
        """Longest page."""

    @property
    def max_ids(self) -> int:
        """Longest list of ids."""

    @property
    def max_sent_history(self) -> int:
        """Most events that a request may bring."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """B checked questions that share everything but the user, the context and the budget."""

    users: Sequence[Id | None]
    k: int
    sent: Sequence[PastEvent] | None = None
    context: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    candidates: Int | None = None
    num_unknown_candidates: int | None = None
    rules: Rules = NO_RULES
    at: int | None = None
    most_BC: Float | None = None
    """[B, C] what each may cost at most; None = none has a limit of its own."""
    chain: str | None = None
    query: str | None = None
    found: Found | None = None
    """What matches the query; the candidates are these and what rules took of the best matches."""
    note: str | None = None
    """What to tell of how the query was read."""

    def goes_with(self, other: Asked) -> bool:
        """Whether both can be answered in one batch."""
        alone = any(
            asked.sent is not None or asked.candidates is not None or asked.at is not None or asked.query is not None
            for asked in (self, other)
        )
        mine = (self.k, self.chain, self.most_BC is None, set(self.context))
        theirs = (other.k, other.chain, other.most_BC is None, set(other.context))
        return not alone and mine == theirs and (self.rules is other.rules or self.rules == other.rules)


def page_size(live: Live, k: int | None, bounds: Bounds) -> int:
    """Items of a page; ConfigError where `k` is out of range."""
    k = live.cascade.config.surface.k if k is None else k
    if not 1 <= k <= bounds.max_k:
        raise ConfigError(f"k must be from 1 to {bounds.max_k}, got {k}")
    return k


def check(live: Live, question: Question, bounds: Bounds) -> Asked:
    """Refuse what can not be answered, number what can.

    Raises:
        ConfigError: `k` is out of range, a list is too long, no such chain.
        DataError: an unknown context column, or a history with some times missing.
    """
    rules, candidates = question.rules.over(live.rules), question.candidates
    lists = {"history": question.history, "candidates": candidates, "allow": rules.allow, "deny": rules.deny}
    for name, given in lists.items():
        most = bounds.max_sent_history if name == "history" else bounds.max_ids
        if given is not None and len(given) > most:
            raise ConfigError(f"{name} has {len(given):,} entries; at most {most:,} are taken")
    if rules is not live.rules:
        live.check_rules(rules)
    if candidates is not None and not len(candidates):
        raise ConfigError("candidates is an empty list; leave it out to choose from all items")
    if question.at is not None and not 0 <= question.at < MAX_TIMESTAMP:
        raise ConfigError(f"at must be seconds since 1970, got {question.at!r}")
    if question.chain is not None:
        live.cascade.config.chain(question.chain)  # refuses names that do not exist
    rows = None if candidates is None else live.items(candidates)
    context = {name: [value] for name, value in question.context.items()}
    if context:
        live.dataset.requests_for([None], context=context)  # refuses columns that do not exist
    return Asked(
        users=[question.user],
        k=page_size(live, question.k, bounds),
        sent=None if question.history is None else sent_history(question.history),
        context=context,
        candidates=None if rows is None else np.unique(rows[rows > 0]),
        num_unknown_candidates=None if rows is None else int((rows == 0).sum()),
        rules=rules,
        at=None if question.at is None else int(question.at),
        most_BC=None if question.budget == NO_BUDGET else question.budget.limits_C[None],
        chain=question.chain,
        query=question.query,
    )


def together(asked: Sequence[Asked]) -> list[tuple[Asked, list[int]]]:
    """The same questions [of one user each] in as few batches as possible, each with the places of its questions in the list."""
    groups: list[tuple[list[Asked], list[int]]] = []
    for place, one in enumerate(asked):
        group = next((group for group in groups if group[0][0].goes_with(one)), None)
        if group is None:
            groups.append(([one], [place]))
        else:
            group[0].append(one)
            group[1].append(place)
    return [(_joined(members), places) for members, places in groups]


def _joined(members: Sequence[Asked]) -> Asked:
    first = members[0]
    if len(members) == 1:
        return first
    limits = [one.most_BC for one in members if one.most_BC is not None]
    return replace(
        first,
        users=[user for one in members for user in one.users],
        context={name: [value for one in members for value in one.context[name]] for name in first.context},
        most_BC=np.concatenate(limits) if limits else None,
    )
