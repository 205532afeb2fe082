"""What a request brought, as the request log keeps it, and back as a question that can be asked again.

    as_logged(asked, 0, surface)      plain values; what is not there was not brought
    as_question(found)                of a record as `RequestLog.find` gives it

A list of more than `MOST_KEPT` entries is not kept, so that a few large requests do not fill the log; its name then stands in `left_out`,
and the request can not be asked again. The moment of the answer becomes the question's `at`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from shortlist.cascade.allocation.base import RESOURCES, Budget
from shortlist.cascade.pasts import PastEvent
from shortlist.cascade.questions import Asked, Question
from shortlist.cascade.rules import NO_RULES, Rules
from shortlist.cascade.settings import build, plain
from shortlist.data.histories import Int
from shortlist.errors import DataError

MOST_KEPT = 1_000
"""Entries of a history, of candidates, of allowed or denied items."""


def as_logged(asked: Asked, place: int, surface: Rules = NO_RULES) -> dict[str, Any]:
    """What request `place` of a checked batch brought beside its user, its page size and its candidates.

    Args:
        asked: B questions.
        place: 0..B-1.
        surface: rules that hold without any from the request; those are not kept.
    """
    kept: dict[str, Any] = {}
    left_out = []
    if asked.sent is not None:
        if len(asked.sent) > MOST_KEPT:
            left_out.append("history")
        else:
            kept["history"] = [
                {name: value for name, value in asdict(event).items() if value is not None} for event in asked.sent
            ]
    if asked.rules is not surface and asked.rules != surface and asked.rules != NO_RULES:
        if max(len(asked.rules.allow or ()), len(asked.rules.deny)) > MOST_KEPT:
            left_out.append("rules")
        else:
            kept["rules"] = {name: value for name, value in plain(asked.rules).items() if value not in ([], None)}
            if asked.rules.allow is not None:
                kept["rules"]["allow"] = list(asked.rules.allow)  # an empty list is a rule, too
    brought = asked.num_unknown_candidates is not None
    if brought and (asked.query is not None or (asked.candidates is not None and len(asked.candidates) > MOST_KEPT)):
        left_out.append("candidates")
    if asked.context:
        kept["context"] = {name: values[place] for name, values in asked.context.items()}
    if asked.most_BC is not None:
        limits = zip(RESOURCES, asked.most_BC[place].tolist())
        kept["budget"] = {name: limit for name, limit in limits if np.isfinite(limit)}
    for name in ("chain", "query"):
        if (value := getattr(asked, name)) is not None:
            kept[name] = value
    return {**kept, "left_out": left_out} if left_out else kept


def brought_candidates(asked: Asked) -> Int | None:
    """Catalogue rows that the requests themselves named, for the log; None where they named none, or too many."""
    if asked.num_unknown_candidates is None or asked.query is not None or asked.candidates is None:
        return None
    return asked.candidates if len(asked.candidates) <= MOST_KEPT else None


def as_question(found: Mapping[str, Any], rules: Rules | None = None) -> Question:
    """The question of a logged request, at its moment.

    Args:
        found: as `RequestLog.find` gives it.
        rules: laid over those that the request brought; None = nothing is.

    Raises DataError where the record is of an earlier version, or parts were left out of it.
    """
    asked, moment = found.get("asked"), found.get("moment")
    if asked is None or moment is None:
        raise DataError("its record is of an earlier version, which did not keep what the request brought")
    if asked.get("left_out"):
        raise DataError(f"its {' and '.join(asked['left_out'])} had more than {MOST_KEPT:,} entries and was not kept")
    history = asked.get("history")
    # What was kept has the surface's rules of that time in it already.
    own = replace(build(Rules, asked["rules"], "rules"), with_surface=False) if "rules" in asked else NO_RULES
    return Question(
        user=found["user"],
        k=found["k"],
        history=None if history is None else [PastEvent(**event) for event in history],
        context=asked.get("context", {}),
        candidates=asked.get("candidates"),
        rules=own if rules is None else rules.over(own),
        at=float(moment),
        budget=Budget(**asked.get("budget", {})),
        chain=asked.get("chain"),
        query=asked.get("query"),
    )
