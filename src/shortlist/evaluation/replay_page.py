"""A replay for people: RUN-report/replay.html with figures, and replay.json with every request."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shortlist.evaluation.evidence import write_json
from shortlist.evaluation.figures import ACCENT, INK, LINE, empty_figure, inline
from shortlist.evaluation.page import document, element, figures, prose, section, table
from shortlist.evaluation.replayed import WHY, Difference, Replay, when
from shortlist.evaluation.report import report_folder
from shortlist.training.checkpoint import write_atomically

PAGE, NUMBERS = "replay.html", "replay.json"
NUM_SHOWN = 50
"""Requests on the page, those that changed most; all are in the JSON."""
NUM_ITEMS = 8
"""Items named per request."""
BINS = 20


def write_replay(run: Path, found: Replay) -> Path:
    """Write the page and the numbers beside the run; gives the page's path."""
    folder = report_folder(run)
    write_json(folder / NUMBERS, found.as_dict())
    page = folder / PAGE
    write_atomically(page, render(found))
    return page


def summary_table(found: Replay) -> list[list[str]]:
    """Rows of text, the first one the heads."""
    rows = [["a request", "then", "now"]]
    for name, words in (("mflop", "MFLOP"), ("calibrated", "ms as calibrated"), ("ms", "ms as measured")):
        pair = found.cost(name)
        if pair is not None:
            rows.append([words, f"{pair[0]:.3f}", f"{pair[1]:.3f}"])
    if found.after is not None and found.after.num_requests:
        count = found.after.num_requests
        rows.append(["items taken", f"{found.after.hits_then / count:.4f}", f"{found.after.hits_now / count:.4f}"])
    return rows


def overlap_figure(found: Replay, key: str) -> str:
    """Requests by overlap of their two pages."""
    value_R = np.array([d.overlap for d in found.differences])
    counts, edges = np.histogram(value_R, bins=BINS, range=(0.0, 1.0))
    figure, (axis,) = empty_figure(2.8, 1)
    axis.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=ACCENT)
    axis.axvline(float(value_R.mean()), color=INK, linestyle=":", linewidth=1)
    axis.set_xlim(0, 1)
    axis.set_xlabel("overlap of a page then and now (dotted: mean)")
    axis.set_ylabel("requests")
    quarters = [int(part.sum()) for part in np.split(counts, 4)]
    words = ", ".join(f"{n:,} from {q / 4:g} to {(q + 1) / 4:g}" for q, n in enumerate(quarters))
    return inline(figure, alt=f"Requests by rank-biased overlap: {words}; mean {value_R.mean():.3f}.", key=key)


def cost_figure(found: Replay, name: str, unit: str, key: str) -> str:
    """What each request cost now against what it cost then; below the line it is cheaper."""
    pairs = [(getattr(d, f"{name}_then"), getattr(d, f"{name}_now")) for d in found.differences]
    then_R, now_R = np.array([pair for pair in pairs if None not in pair], dtype=float).T
    figure, (axis,) = empty_figure(3.3, 1)
    end = 1.05 * max(float(then_R.max()), float(now_R.max()), 1e-9)
    axis.plot([0, end], [0, end], color=LINE, linewidth=1)
    axis.scatter(then_R, now_R, s=8, color=ACCENT, alpha=0.5)
    axis.set_xlim(0, end)
    axis.set_ylim(0, end)
    axis.set_xlabel(f"{unit} then")
    axis.set_ylabel(f"{unit} now")
    cheaper, dearer = int((now_R < then_R).sum()), int((now_R > then_R).sum())
    words = f"{unit} of each request now against then: {cheaper:,} are cheaper, {dearer:,} dearer, of {len(then_R):,}; "
    return inline(figure, alt=f"{words}means {then_R.mean():.3f} and {now_R.mean():.3f}.", key=key)


def render(found: Replay) -> str:
    """The whole page."""
    since = "the start of the log" if found.since_ms is None else when(found.since_ms)
    until = "its end" if found.until_ms is None else when(found.until_ms)
    lines = [*found.sentences, *found.notes]
    head = f'<div class="lead">{"".join(prose(line) for line in lines)}</div>' + element(
        "p", f"Requests from {since} to {until} (UTC), answered again by snapshot {found.version}.", kind="soft"
    )
    parts = [
        section("pages", "How far pages moved", _pages(found)),
        section("cost", "What they cost", _cost(found)),
        section("items", "Items that gained and lost", _items(found)),
    ]
    if found.after is not None:
        parts.append(section("after", "What people did next", _after(found)))
    parts += [
        section("requests", "Request by request", _requests(found)),
        section("limits", "What may keep a page from coming back as it was", _limits(found)),
    ]
    return document(f"Replay of {found.run}: {found.change.words}", head, parts)


def _pages(found: Replay) -> str:
    caption = "Rank-biased overlap (p = 0.9): 1 = the same page, 0 = nothing in common"
    rows: list[list[object]] = [["chain then", "chain now", "requests"]]
    rows += [[then, now, f"{count:,}"] for (then, now), count in found.chains.items()]
    return figures((overlap_figure(found, "overlap"), caption)) + table(rows, "Chains then and now")


def _cost(found: Replay) -> str:
    drawn = [
        (
            cost_figure(found, "mflop", "MFLOP", "mflop"),
            "As the systems state it; below the line a request is cheaper now",
        )
    ]
    if found.cost("calibrated") is not None:
        drawn.append((cost_figure(found, "calibrated", "calibrated ms", "calibrated"), "As calibrated, by chain"))
    told = prose(
        "Milliseconds as measured are not alike: then on the server under its load and in batches, now here and one request at a time. "
        "FLOPs and calibrated milliseconds compare."
    )
    return table(summary_table(found), "Means") + figures(*drawn) + told


def _items(found: Replay) -> str:
    parts = []
    for words, named in (("Came onto most pages", found.gained), ("Left most pages", found.lost)):
        if named:
            rows: list[list[object]] = [["item", "pages"]]
            rows += [[_name(found, item), f"{count:,}"] for item, count in named]
            parts.append(table(rows, f"{words}, net"))
    return "".join(parts) or prose("No item came onto or left any page.")


def _after(found: Replay) -> str:
    after = found.after
    assert after is not None
    rows: list[list[object]] = [["action", "events", "on the page then", "on the page now"]]
    rows += [[n, f"{a.events:,}", f"{a.on_then:,}", f"{a.on_now:,}"] for n, a in after.actions.items()]
    nobody = f" {after.num_nameless:,} requests of nobody in particular are not counted." if after.num_nameless else ""
    counted = table(rows, f"Events within {after.hours:g} hours of a request") if after.actions else ""
    said = "".join(prose(line) for line in after.sentences)
    return said + counted + prose(f"An event belongs to the user's last request before it.{nobody}")


def _requests(found: Replay) -> str:
    changed = sorted(found.differences, key=lambda d: (d.overlap, -d.displacement))[:NUM_SHOWN]
    rows: list[list[object]] = [
        ["request", "user", "overlap", "in", "out", "moved", "score change", "chain", "MFLOP", "ms", "note"]
    ]
    rows += [_row(found, d) for d in changed if not d.same_page or d.why]
    if len(rows) == 1:
        return prose("Every page is as it was.")
    said = f"The {len(rows) - 1:,} that changed most of {len(found.differences):,}; all are in `{NUMBERS}`."
    return prose(said) + table(rows, "Then and now")


def _row(found: Replay, d: Difference) -> list[object]:
    moved = [f"{_name(found, m.item)} {m.then}>{m.now}" for m in d.moved]
    return [
        f"{d.request_id[:8]}\n{when(d.at_ms)}",
        "" if d.user is None else d.user,
        f"{d.overlap:.3f}",
        _few([_name(found, item) for item in d.came]),
        _few([_name(found, item) for item in d.went]),
        _few(moved),
        "" if d.score_change is None else f"{d.score_change:.3g}",
        d.chain_then if d.chain_then == d.chain_now else f"{d.chain_then}\n{d.chain_now}",
        f"{d.mflop_then:.3f}\n{d.mflop_now:.3f}",
        f"{d.ms_then:.2f}\n{d.ms_now:.2f}",
        ", ".join((*d.why, *(["degraded now"] if d.degraded else []))),
    ]


def _limits(found: Replay) -> str:
    rows: list[list[object]] = [["", "requests", "meaning"]]
    rows += [[reason, f"{count:,}", WHY[reason]] for reason, count in found.why.items()]
    told = prose(
        "A request is asked as of the second of its answer, with the events that the store has of before. Events that came in late, or "
        "in that very second, are read although they were not known then; events deleted since are missing."
    )
    return (table(rows, "Requests by what is not as it was") if found.why else prose("Nothing was found.")) + told


def _name(found: Replay, item: str) -> str:
    title = found.titles.get(item)
    return item if title is None else f"{item} {title[:40]}"


def _few(names: list[str]) -> str:
    more = [f"and {len(names) - NUM_ITEMS:,} more"] if len(names) > NUM_ITEMS else []
    return "\n".join([*names[:NUM_ITEMS], *more])
