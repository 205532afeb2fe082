"""What another snapshot, budget, chain or set of rules would have shown: logged requests asked again, each as of its own moment.

    record  ->  its question (cascade/repeating.py)  ->  the engine, which reads no later events  ->  both pages side by side

A request keeps its chain unless that is what changes. Nothing is written to the log or the event store. With nothing changed every page
comes back as it was, scores included, where snapshot, events and moment are those of then; where they are not, `why` says what is missing.

R requests. Item ids are compared as text.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from shortlist.cascade.allocation.base import Budget
from shortlist.cascade.allocation.calibration import allocation_path, load_allocation
from shortlist.cascade.answers import Answer
from shortlist.cascade.engine import Engine, EngineConfig
from shortlist.cascade.governor import Governor, GovernorConfig
from shortlist.cascade.last_resort import LAST_RESORT
from shortlist.cascade.live import Live
from shortlist.cascade.questions import Question, check
from shortlist.cascade.repeating import as_question
from shortlist.cascade.request_log import RequestLog, Span
from shortlist.cascade.rules import Rules
from shortlist.errors import ConfigError, DataError, ShortlistError, SnapshotError
from shortlist.evaluation.aftermath import aftermath
from shortlist.evaluation.replayed import Change, Difference, Replay, when
from shortlist.metrics.overlap import displacement, jaccard, rank_biased_overlap

Record = Mapping[str, Any]
Tell = Callable[[str, int, int], None]


def open_replay(folder: Path, change: Change, *, events: Path | str | None = None, seed: int = 0) -> Engine:
    """The engine that answers again: it logs nothing, waits for every stage, and remembers nothing between requests.

    Args:
        folder: of the run that answers.
        change: what is to be other than it was.
        events: event store, as it is now; None = only what the run knows.
        seed: of the draws of allocators that explore.

    Raises:
        SnapshotError: no run, or a calibration that does not belong to it.
        ConfigError: no such chain, rules that the run can not follow, a budget where the run is not calibrated.
    """
    folder = folder.absolute()
    engine = Engine.load(
        folder, events=events, config=EngineConfig(memory_mib=0, governor=GovernorConfig(allocate=False))
    )
    try:
        live = engine.live
        check(live, Question(user=None, chain=change.chain, rules=change.rules or Rules()), engine.config)
        if change.allocates:
            live.governor = _governor(folder, live.version, change.budget, seed)
    except ShortlistError:
        engine.close()
        raise
    return engine


def replay(
    engine: Engine,
    log: RequestLog,
    change: Change,
    *,
    run: Path,
    since_ms: int | None = None,
    until_ms: int | None = None,
    limit: int = 1_000,
    hours: float = 24.0,
    seed: int = 0,
    tell: Tell = lambda what, done, of: None,
) -> Replay:
    """Ask logged requests again.

    Args:
        engine: of `open_replay`, with the same change.
        log: where they are; read, not written.
        change: what is other than it was.
        run: folder of the run whose log it is, for its name and its calibrated costs.
        since_ms, until_ms: window, the end excluded; None = open.
        limit: requests at most, the newest of the window.
        hours: after a request, in which what its user does counts as its outcome.
        seed: of bootstrap.
        tell: told of progress.

    Raises DataError where the window holds no request, or none that can be asked again; ConfigError for a limit below 1.
    """
    if limit < 1 or not 0 < hours < math.inf:
        raise ConfigError(f"limit must be at least 1 and hours above 0, got {limit} and {hours:g}")
    live, span = engine.live, log.span()
    costs_of = {live.version: calibrated_ms(live.folder, live.version)}
    differences: list[Difference] = []
    skipped: Counter[str] = Counter()
    most = min(limit, span.num_kept)
    for number, record in enumerate(log.read(since_ms=since_ms, until_ms=until_ms, newest=limit), start=1):
        tell("replaying", number, most)
        found = _again(engine, record, change)
        if isinstance(found, str):
            skipped[found] += 1
            continue
        made = difference(record, *found, change, live.version)
        version = record["snapshot_version"]
        if version not in costs_of:
            costs_of[version] = calibrated_ms(run, version)
        then, now = costs_of[version].get(made.chain_then), costs_of[live.version].get(made.chain_now)
        differences.append(replace(made, calibrated_then=then, calibrated_now=now))
    if not differences:
        raise DataError(_nothing(log, span, since_ms, until_ms, skipped))
    after = None
    if engine.events is not None:
        known_until = live.log_end if live.dataset.space.has_clock else None
        after = aftermath(differences, engine.events, hours=hours, known_until=known_until, seed=seed)
    done = len(differences) + skipped.total()
    return Replay(
        run=run.name,
        version=live.version,
        change=change,
        since_ms=since_ms,
        until_ms=until_ms,
        span=span,
        differences=tuple(differences),
        skipped=dict(skipped),
        after=after,
        notes=tuple(_notes(span, since_ms, done == limit < span.num_kept, skipped, engine)),
        titles=_titles(live, differences),
        seed=seed,
    )


def difference(record: Record, question: Question, answer: Answer, change: Change, version: str) -> Difference:
    """A logged request beside the answer to the same question; calibrated costs are left open.

    Args:
        record: as the log gives it.
        question: of now.
        answer: of now.
        change: what is other than it was.
        version: of the snapshot that answered now.
    """
    page_then = tuple(map(str, record["page"]))
    page_now = tuple(str(item.item_id) for item in answer.items)
    last: Record = record["stages"][-1] if record["stages"] else {"name": "", "items": [], "scores": []}
    then: dict[str, float | None] = dict(zip(map(str, last["items"]), last["scores"]))
    now = {str(item.item_id): item.scores.get(last["name"]) for item in answer.items}
    pairs = [(then.get(item), now.get(item)) for item in page_then]
    changes = [abs(after - before) for before, after in pairs if before is not None and after is not None]
    same = page_then == page_now and all(then.get(item) == now[item] for item in page_now)
    return Difference(
        request_id=record["request_id"],
        at_ms=record["at_ms"],
        user=record["user"],
        k=record["k"],
        page_then=page_then,
        page_now=page_now,
        chain_then=record["chain"],
        chain_now=answer.chain,
        overlap=rank_biased_overlap(page_then, page_now),
        jaccard=jaccard(page_then, page_now),
        displacement=displacement(page_then, page_now),
        score_change=sum(changes) / len(changes) if changes else None,
        same_scores=same,
        mflop_then=sum(stage["spent_mflop"] for stage in record["reports"]),
        mflop_now=sum(stage.spent_mflop for stage in answer.stages),
        ms_then=sum(stage["spent_ms"] for stage in record["reports"]),
        ms_now=sum(stage.spent_ms for stage in answer.stages),
        calibrated_then=None,
        calibrated_now=None,
        why=tuple(_why(record, question, answer, change, version, same=same)),
        degraded=answer.degraded,
    )


def calibrated_ms(folder: Path | None, version: str) -> dict[str, float]:
    """Calibrated milliseconds of every chain of a run; empty where there is no calibration of that version."""
    path = None if folder is None else allocation_path(folder.absolute())
    if path is None or not path.exists():
        return {}
    try:
        load_allocation(path, version=version)
        chains = json.loads((path / "summary.json").read_text())["chains"]
        return {chain["name"]: float(chain["ms"]) for chain in chains}
    except (SnapshotError, OSError, ValueError, KeyError):
        return {}  # costs as stated are there all the same


def _governor(folder: Path, version: str, budget: Budget, seed: int) -> Governor:
    """The run's allocator, aimed at another budget."""
    path = allocation_path(folder)
    if not path.exists():
        raise ConfigError(f"{folder} is not calibrated, so no budget can be kept: run `shortlist calibrate {folder}`")
    allocation = load_allocation(path, version=version)
    allocation.allocator.aim(budget, allocation.rows_RF)
    return Governor(allocation.allocator, allocation.contexts, seed=seed)


def _again(engine: Engine, record: Record, change: Change) -> tuple[Question, Answer] | str:
    """The question of a record and its answer now, or why it can not be asked."""
    try:
        question = as_question(record, change.rules)
        names = {chain.name for chain in engine.live.cascade.config.chains()}
        # With an allocator, requests that named their chain keep it; without, all keep the one they had.
        wanted = change.chain or (question.chain if change.allocates else record["chain"])
        question = replace(
            question,
            chain=wanted if wanted in names else None,
            budget=question.budget if change.allocates else Budget(),
        )
        answer = engine.answer([question])[0]
    except ShortlistError as error:
        return str(error)
    return str(answer) if isinstance(answer, ShortlistError) else (question, answer)


def _why(record: Record, question: Question, answer: Answer, change: Change, version: str, *, same: bool) -> list[str]:
    """What keeps the page from coming back, of what was not changed on purpose."""
    found = []
    if record["snapshot_version"] != version and change.run is None:
        found.append("snapshot")
    if record["chain"] == LAST_RESORT:
        found.append("fallback")
    elif answer.chain != record["chain"] and change.chain is None and not change.allocates:
        found.append("chain")
    if record["degraded"] and "fallback" not in found:
        found.append("degraded")
    if answer.num_history != record["num_history"]:
        found.append("gone" if answer.num_history == 0 and question.history is None else "past")
    if not same and not found and change == Change():
        found.append("other")
    return found


def _notes(span: Span, since_ms: int | None, is_cut: bool, skipped: Counter[str], engine: Engine) -> list[str]:
    """Caveats of a replay."""
    notes = []
    if span.num_gone and (since_ms is None or (span.oldest_ms is not None and since_ms < span.oldest_ms)):
        notes.append(
            f"{span.num_gone:,} requests are not in the log any more, which keeps the newest and no deleted user; the oldest left is of "
            f"{when(span.oldest_ms)}."
        )
    if is_cut:
        notes.append("The limit was reached: older requests of the window were left out.")
    notes += [f"{count:,} requests could not be asked again: {reason}." for reason, count in skipped.most_common()]
    if engine.events is None:
        notes.append(
            "No event store was given: pasts are those of the snapshot alone, and what people did next is not known."
        )
    return notes


def _nothing(log: RequestLog, span: Span, since_ms: int | None, until_ms: int | None, skipped: Counter[str]) -> str:
    """Why there is nothing to show."""
    if skipped:
        reason, count = skipped.most_common(1)[0]
        return f"none of the {skipped.total():,} requests can be asked again; of {count:,} of them: {reason}"
    if not span.num_kept:
        return f"{log.path} holds no request; serve some, with the request log on, and replay then"
    start, end = ("the start" if since_ms is None else when(since_ms)), ("now" if until_ms is None else when(until_ms))
    gone = f", and {span.num_gone:,} older ones have made room" if span.num_gone else ""
    return (
        f"{log.path} holds no request from {start} to {end}; it has {span.num_kept:,} from {when(span.oldest_ms)} to "
        f"{when(span.newest_ms)}{gone}"
    )


def _titles(live: Live, differences: Sequence[Difference]) -> dict[str, str]:
    """Titles of all items on either page."""
    ids = sorted({item for d in differences for item in (*d.page_then, *d.page_now)})
    titles = {item: live.title(row) for item, row in zip(ids, live.items(ids).tolist()) if row}
    return {item: title for item, title in titles.items() if title}
