"""The report as HTML: one file without scripts and without anything fetched, for a phone or a desk, by day or by night.

Whatever comes from the data is escaped by `text`; elements are put together by `element` and its kin.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from shortlist.evaluation.evaluate import Comparison
from shortlist.evaluation.figures import bars, curve_figure, funnel_figure, quality_figure
from shortlist.evaluation.report import NUM_CHOSEN, Example, Judged, Summary
from shortlist.evaluation.runs import cost_rows, shown_metrics
from shortlist.evaluation.tables import SIGNIFICANT, cell

WINDOWS = {"fit": "Fit", "valid": "Validation", "test": "Test"}
STYLE = """
:root { color-scheme: light dark; --ink: #1e2530; --soft: #566174; --paper: #ffffff; --panel: #f4f6f9; --line: #d5dae2;
  --accent: #c2410c; --other: #64748b; --good: #166534; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #a4aebd; --paper: #14181f; --panel: #1d232d; --line: #3a4351;
  --accent: #fb923c; --other: #8492a8; --good: #86efac; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
main { max-width: 62rem; margin: 0 auto; padding: 1rem 1rem 3rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .4rem; }
p { margin: .5rem 0; max-width: 46rem; }
li { max-width: 46rem; }
a { color: inherit; }
.soft { color: var(--soft); }
.lead { background: var(--panel); border-left: 4px solid var(--accent); padding: .6rem .9rem; }
.lead p { max-width: none; }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin: .75rem 0; padding: 0; }
.wide { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); text-align: right; white-space: pre; }
th:first-child, td:first-child { text-align: left; }
caption { text-align: left; color: var(--soft); padding-bottom: .3rem; }
tr.mine { color: var(--accent); font-weight: 600; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem 1.5rem; }
figure { flex: 1 1 18rem; max-width: 27rem; margin: .5rem 0; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .9rem; }
@media (max-width: 32rem) { table { font-size: .85rem; } th, td { padding-right: .6rem; } }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); gap: 1rem; }
article { background: var(--panel); padding: .8rem 1rem; border-radius: .4rem; font-size: .93rem; overflow-wrap: anywhere; }
article ol, article ul { margin: .2rem 0 .6rem; padding-left: 1.6rem; }
article h3 { margin: 0 0 .4rem; }
article p { margin: .4rem 0 0; }
.chosen { color: var(--good); font-weight: 600; }
pre { overflow-x: auto; background: var(--panel); padding: .8rem 1rem; font-size: .85rem; }
summary { cursor: pointer; padding: .3rem 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: .75rem 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
"""


def render(summary: Summary) -> str:
    """The whole page."""
    sections = [
        section("data", "The data", _health(summary)),
        section("split", "How the log was split", _split(summary)),
        section("settings", "Settings", _settings(summary)),
        section("curves", "Learning curves", _curves(summary)),
        *(section(j.window, f"{WINDOWS[j.window]} requests", _window(j, summary)) for j in summary.judged),
    ]
    links = [("data", "Data"), ("split", "Split"), ("settings", "Settings"), ("curves", "Learning")]
    links += [(j.window, WINDOWS[j.window]) for j in summary.judged]
    told = summary.judged[-1] if summary.judged else None
    if told is not None and told.examples:
        sections.append(section("examples", "Examples", _examples(told)))
        links.append(("examples", "Examples"))
    sections.append(section("surroundings", "Surroundings", _surroundings(summary)))
    links.append(("surroundings", "Surroundings"))
    navigation = "".join(f'<li><a href="#{anchor}">{text(words)}</a></li>' for anchor, words in links)
    head = f'{_lead(summary)}\n<nav aria-label="Sections"><ul>{navigation}</ul></nav>'
    return document(f"Report of {summary.name}", head, sections)


def document(title: str, head: str, sections: Sequence[str]) -> str:
    """A whole page: its title, what stands under it (HTML), and its parts (HTML)."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<header>\n<h1>{text(title)}</h1>\n{head}\n</header>\n" + "\n".join(sections) + "\n</main>\n</body>\n</html>\n"
    )


# -- elements -----------------------------------------------------------------------------------------------------


def text(value: object) -> str:
    """Escaped, so that it can stand inside an element or an attribute."""
    return html.escape(str(value))


def element(tag: str, content: object, *, kind: str = "") -> str:
    """A tag around escaped text."""
    opened = f'{tag} class="{kind}"' if kind else tag
    return f"<{opened}>{text(content)}</{tag}>"


def section(anchor: str, heading: str, content: str) -> str:
    """A part of the page with its heading; the content is HTML."""
    head = f'<h2 id="{anchor}-heading">{text(heading)}</h2>'
    return f'<section id="{anchor}" aria-labelledby="{anchor}-heading">\n{head}\n{content}\n</section>'


def prose(sentence: str, tag: str = "p") -> str:
    """A sentence in which `this` is code."""
    content = re.sub("`([^`]+)`", r"<code>\1</code>", text(sentence))
    return f"<{tag}>{content}</{tag}>"


def listed(items: Sequence[object], tag: str = "ul") -> str:
    """A list of escaped texts."""
    return f"<{tag}>{''.join(element('li', item) for item in items)}</{tag}>"


def table(rows: Sequence[Sequence[object]], caption: str, *, mine: str | None = None) -> str:
    """A table that scrolls sideways where the screen is narrow; the first row is the header, `mine` the first cell of a marked row."""
    head = "".join(f'<th scope="col">{text(c)}</th>' for c in rows[0])
    body = ""
    for first, *others in rows[1:]:
        marked = ' class="mine"' if first == mine else ""
        body += f'<tr{marked}><th scope="row">{text(first)}</th>{"".join(element("td", c) for c in others)}</tr>\n'
    return (
        f'<div class="wide" role="region" aria-label="{text(caption)}" tabindex="0"><table><caption>{text(caption)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>"
    )


def figures(*drawn: tuple[str, str]) -> str:
    """Figures (svg, caption) beside each other where there is room."""
    parts = (f"<figure>{svg}<figcaption>{text(caption)}</figcaption></figure>" for svg, caption in drawn)
    return f'<div class="figures">{"".join(parts)}</div>'


# -- sections -----------------------------------------------------------------------------------------------------


def _lead(summary: Summary) -> str:
    lines = [f"Run {summary.version}, {summary.surroundings.get('date', '')}."]
    if summary.judged:
        told = summary.judged[-1]
        report = told.cascade.report
        ndcg = f"ndcg@{report.k}"
        shown = told.cascade.lost_at.get("shown", 0.0)
        lines.append(
            f"{WINDOWS[told.window]}: {ndcg} {cell(report.metrics[ndcg])} on {report.num_requests:,} requests of "
            f"{report.num_users:,} users; {shown:.1%} of what was held out stands on the page."
        )
        lines += told.verdicts
    lines += summary.problems
    return f'<div class="lead">{"".join(map(prose, lines))}</div>'


def _health(summary: Summary) -> str:
    if summary.health is None:
        return prose(
            "The log was not at hand when this report was written, so nothing is said of its health; "
            "`shortlist check LOG` says it."
        )
    return f"<ul>{''.join(prose(sentence, 'li') for sentence in summary.health)}</ul>"


def _split(summary: Summary) -> str:
    rows: list[list[object]] = [["window", "requests", "users", "held-out items"]]
    for window, sizes in summary.windows.items():
        rows.append([WINDOWS[window], *(f"{count:,}" for count in sizes.values())])
    unread = "" if any(j.window == "test" for j in summary.judged) else " The test window was not read for this report."
    return element("p", summary.split + unread) + table(rows, "Requests that are asked")


def _settings(summary: Summary) -> str:
    return (
        "<details><summary>Every setting of this run, as TOML</summary>\n"
        f'<pre tabindex="0"><code>{text(summary.settings)}</code></pre></details>'
    )


def _curves(summary: Summary) -> str:
    rows: list[list[object]] = [["system", "stage", "epochs", "kept", "validation ndcg", "seconds"]]
    for s in summary.systems:
        rows.append(
            [
                s["name"],
                s["stage"],
                s["epochs"] or "counted",
                s["best_epoch"] or "",
                f"{s['ndcg']:.4f}",
                f"{s['seconds']:.1f}",
            ]
        )
    made = table(rows, "How each system was made; ndcg on what reached its stage") if summary.systems else ""
    drawn = [(n, name, points) for n, (name, points) in enumerate(summary.curves.items()) if points]
    if not drawn:
        if any(s["epochs"] for s in summary.systems):
            return made + element("p", "This run kept no curves; it was trained by an older version.")
        return made + element("p", "Nothing was trained by gradient, so there are no curves.")
    best = {s["name"]: s["best_epoch"] for s in summary.systems}
    return made + figures(
        *((curve_figure(name, points, best.get(name), f"curve{n}"), f"{name}, by epoch") for n, name, points in drawn)
    )


def _window(judged: Judged, summary: Summary) -> str:
    report, key = judged.cascade.report, judged.window
    parts = ["<h3>Quality beside simple systems</h3>"]
    for number, comparison in enumerate(judged.comparisons):
        parts.append(_quality(comparison, summary.has_value, f"{key}{number}"))
    if judged.left_out:
        names, words = ", ".join(judged.left_out), " ".join(judged.left_out)
        parts.append(prose(f"Not measured, to save time: {names}; `shortlist compare RUN {words}` does."))
    parts += [element("p", sentence) for sentence in judged.verdicts]
    parts.append("<h3>Where held-out items were lost</h3>")
    lost = judged.cascade.lost_at
    rows = [["stage", "share lost there"]]
    rows += [["none: on the page" if stage == "shown" else stage, f"{share:.1%}"] for stage, share in lost.items()]
    parts.append(figures((funnel_figure(lost, f"{key}funnel"), "What is still there after each stage")))
    parts.append(table(rows, "Held-out items by the stage that let them fall"))
    parts += ["<h3>What each stage cost</h3>", _cost(judged.cascade.cost, key)]
    parts += ["<h3>Quality by length of history</h3>", _history(report.slices, f"ndcg@{report.k}", key)]
    return "\n".join(parts)


def _quality(comparison: Comparison, has_value: bool, key: str) -> str:
    first = comparison.reports[0]
    shown = [m for m in shown_metrics(first.k) if has_value or not m.startswith("value")]
    rows: list[list[object]] = [["", *shown, "coverage"]]
    for report in comparison.reports:
        cells = []
        for metric in shown:
            test = comparison.tests.get(report.name, {}).get(metric)
            star = " *" if test is not None and test["p_value"] < SIGNIFICANT else ""
            cells.append(cell(report.metrics[metric]).replace(" [", f"{star}\n["))
        rows.append([report.name, *cells, f"{report.metrics['coverage'].mean:.1%}"])
    drawn = [
        (quality_figure(comparison, metric, f"{key}m{n}"), f"{metric} with 95 % intervals")
        for n, metric in enumerate(shown[:2])
    ]
    note = (
        f"{first.num_requests:,} requests of {first.num_users:,} users; {first.protocol}. Brackets: 95 % intervals over users. "
        f"* differs from {comparison.reference} beyond chance (paired test, Holm, p < {SIGNIFICANT:g})."
    )
    return (
        table(rows, "Means of the page metrics", mine=comparison.reference)
        + figures(*drawn)
        + element("p", note, kind="soft")
    )


def _cost(cost: Mapping[str, Mapping[str, float]], key: str) -> str:
    drawn = []
    for unit, label in (("ms", "ms per request"), ("mflop", "MFLOP per request")):
        values = {stage: c[unit] for stage, c in cost.items()}
        words = ", ".join(f"{stage} {value:.3f}" for stage, value in values.items())
        svg = bars(values, label=label, alt=f"{label} by stage: {words}.", key=f"{key}{unit}", form="{:.3f}".format)
        drawn.append((svg, f"{label}, answered in batches" if unit == "ms" else f"{label}, as the systems state it"))
    return table(cost_rows(cost), "Means per request") + figures(*drawn)


def _history(slices: Mapping[str, Mapping[str, float]], metric: str, key: str) -> str:
    rows = [["history", "requests", metric]]
    rows += [[name, f"{values['requests']:,.0f}", f"{values[metric]:.4f}"] for name, values in slices.items()]
    found = {name: values[metric] for name, values in slices.items()}
    words = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
    svg = bars(found, label=metric, alt=f"{metric} by length of history: {words}.", key=f"{key}history")
    return table(rows, "By events known of the user when asked") + figures((svg, f"{metric} by length of history"))


def _examples(judged: Judged) -> str:
    drawn = f"{WINDOWS[judged.window]} requests drawn at random with a fixed seed, not picked for how well they went."
    return element("p", drawn) + '\n<div class="examples">\n' + "\n".join(map(_example, judged.examples)) + "\n</div>"


def _example(example: Example) -> str:
    parts = [element("h3", f"User {example.user}")]
    if example.recent:
        parts += [element("p", f"The last of {example.num_past:,} past events, newest first"), listed(example.recent)]
    else:
        parts.append(element("p", "Nothing is known of this user."))
    lines = ""
    for place in example.page:
        marks = element("span", "chosen next", kind="chosen") if place.chosen else ""
        seen = element("span", "seen before", kind="soft") if place.seen else ""
        lines += f"<li>{' '.join(part for part in (text(place.title), seen, marks) if part)}</li>"
    parts += [element("p", "The page"), f"<ol>{lines}</ol>"]
    more = len(example.chosen) - NUM_CHOSEN
    chosen = [*example.chosen[:NUM_CHOSEN], *([f"and {more:,} more"] if more > 0 else [])]
    parts += [element("p", "Then chosen"), listed(chosen)]
    return f"<article>{''.join(parts)}</article>"


def _surroundings(summary: Summary) -> str:
    around: dict[str, Any] = dict(summary.surroundings)
    hardware, versions = around.get("hardware", {}), around.get("versions", {})
    facts = {
        "command": summary.command or "not given",
        "seconds": f"{summary.seconds:.1f}",
        "run": summary.version,
        "date": around.get("date", ""),
        "processor": f"{hardware.get('cpu', '')}, {hardware.get('cores', '')} cores, {hardware.get('memory_gib', '')} GiB",
        "device": hardware.get("device", ""),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return f"<dl>{''.join(element('dt', name) + element('dd', value) for name, value in facts.items())}</dl>"
