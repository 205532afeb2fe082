"""What pages look like: one style by day and by night, numbers with units, tables and figures as HTML, charts in the page's colours.

Whatever comes from the server is escaped here.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

STYLE = """
:root { color-scheme: light dark; --ink: #1e2530; --soft: #566174; --paper: #ffffff; --panel: #f4f6f9; --line: #d5dae2;
  --accent: #3949ab; --on-accent: #ffffff; --other: #c2410c; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #a4aebd; --paper: #14181f; --panel: #1d232d; --line: #3a4351;
  --accent: #a3b1ff; --on-accent: #14181f; --other: #fb923c; --bad: #ffb4ab; } }
body { background: var(--paper); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
body .nicegui-content { padding: 0; gap: 0; align-items: stretch; max-width: none; width: 100%; }
.top { display: flex; flex-wrap: wrap; align-items: center; gap: 0 1.25rem; padding: .3rem 1rem; background: var(--panel);
  border-bottom: 1px solid var(--line); }
.top nav { display: flex; flex-wrap: wrap; gap: 0 1rem; }
.top a { color: var(--ink); text-decoration: none; padding: .45rem 0; border-bottom: 3px solid transparent; }
.top a[aria-current] { border-bottom-color: var(--accent); font-weight: 600; }
.top .name { font-weight: 700; }
.body { width: 100%; max-width: 62rem; margin: 0 auto; padding: .75rem 1rem 2rem; }
h1 { font-size: 1.5rem; line-height: 1.3; margin: .25rem 0 .5rem; font-weight: 600; letter-spacing: 0; }
h2 { font-size: 1.1rem; line-height: 1.4; margin: 1.25rem 0 .25rem; font-weight: 600; letter-spacing: 0; }
p { margin: .4rem 0; max-width: 46rem; }
.soft { color: var(--soft); }
.problem { border-left: 4px solid var(--bad); background: var(--panel); padding: .6rem .9rem; margin: .5rem 0; }
.lead { border-left: 4px solid var(--accent); background: var(--panel); padding: .6rem .9rem; margin: .5rem 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(7.4rem, 1fr)); gap: .6rem; margin: .6rem 0; }
.tiles div { background: var(--panel); border-radius: .4rem; padding: .5rem .75rem; }
.tiles dt { color: var(--soft); font-size: .85rem; font-weight: 400; }
.tiles dd { margin: 0; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; font-weight: 400; }
thead th { color: var(--soft); }
th:first-child, td:first-child, .left { text-align: left; }
td.words, th.words { white-space: normal; text-align: left; } td.words { min-width: 11rem; }
caption { text-align: left; white-space: nowrap; font-weight: 600; padding-bottom: .2rem; }
ol.why { padding-left: 1.6rem; margin: .5rem 0; } ol.why li { margin: .3rem 0; max-width: 46rem; }
summary { cursor: pointer; }
@media (max-width: 30rem) { .top .name { display: none; } .top nav { gap: 0 .85rem; } }
.tables { display: flex; flex-wrap: wrap; gap: 0 3rem; } .tables > .wide { max-width: 100%; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 0 1rem; }
figure { margin: .5rem 0; min-width: 0; } figcaption { font-weight: 600; }
.chart { height: 11rem; width: 100%; } .chart.tall { height: 18rem; }
.bar { display: flex; flex-wrap: wrap; gap: .6rem 1rem; align-items: center; margin: .5rem 0; }
.bar.apart { justify-content: space-between; border-bottom: 1px solid var(--line); padding-bottom: .4rem; }
.q-field { min-width: 10rem; } .q-field__native, .q-field__label { color: var(--ink); } .q-field__label { opacity: .8; }
.q-slider, .q-field { --q-primary: var(--accent); }
.q-btn { background: var(--accent); color: var(--on-accent); border-radius: .3rem; }
.q-btn.quiet { background: transparent; color: var(--accent); border: 1px solid currentColor; }
a:focus-visible, summary:focus-visible, button:focus-visible, .q-btn:focus-visible, [tabindex]:focus-visible {
  outline: 3px solid var(--accent); outline-offset: 2px; }
.q-field--focused { outline: 3px solid var(--accent); outline-offset: 2px; border-radius: .2rem; }
.nicegui-skip-link { background: var(--paper); color: var(--ink); }
"""
NOTHING = "–"


def number(value: float | None, unit: str = "") -> str:
    """Three significant digits, thousands apart, with its unit; a dash where there is none."""
    if value is None or math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "any"
    digits = 0 if value == 0 or abs(value) >= 100 else max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{min(digits, 6)}f}"
    return f"{text} {unit}".rstrip()


def time_ms(value: float) -> str:
    """Milliseconds of a histogram, whose last bucket has no end."""
    return "over 5 s" if math.isinf(value) else number(value, "ms")


def share(value: float) -> str:
    """A share in per cent."""
    return NOTHING if math.isnan(value) else f"{value:.1%}" if value >= 0.001 or not value else "under 0.1%"


def count(value: float | None) -> str:
    """A whole number, thousands apart."""
    return NOTHING if value is None or math.isnan(value) else f"{value:,.0f}"


def sentence(words: object) -> str:
    """Words as a sentence: a capital letter before, a full stop behind."""
    plain = str(words).strip()
    return f"{plain[:1].upper()}{plain[1:]}" + ("" if plain.endswith((".", "?", "!")) else ".")


def text(value: object) -> str:
    """Escaped, so that it can stand inside an element or an attribute."""
    return html.escape(str(value))


def paragraph(words: str, kind: str = "") -> str:
    """A paragraph; `kind` is a class of the style."""
    return f'<p class="{text(kind)}">{text(words)}</p>'


def tiles(values: Mapping[str, str]) -> str:
    """Numbers that are seen at a glance, each with its name."""
    parts = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in values.items())
    return f'<dl class="tiles">{parts}</dl>'


def table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]], *, words: Sequence[int] = ()) -> str:
    """A table that scrolls in itself where it is too wide; nothing at all without rows.

    Args:
        caption: names it.
        heads: of the columns; the first column names the row.
        rows: cells as text.
        words: columns that hold sentences and may break.
    """
    if not rows:
        return ""
    head = "".join(f'<th scope="col"{_kind(n, words)}>{text(name)}</th>' for n, name in enumerate(heads))
    body = "".join(
        "<tr>"
        + f'<th scope="row">{text(row[0])}</th>'
        + "".join(f"<td{_kind(n, words)}>{text(cell)}</td>" for n, cell in enumerate(row[1:], start=1))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{text(caption)}"><table><caption>{text(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _kind(column: int, words: Sequence[int]) -> str:
    return ' class="words"' if column in words else ""


def tables(*made: str) -> str:
    """Tables side by side as far as there is room."""
    return f'<div class="tables">{"".join(made)}</div>' if any(made) else ""


def axes(x_name: str, y_name: str, **more: Any) -> dict[str, Any]:
    """What every chart has in common: thin lines, the page's colours, numbers that name their units in the axis titles."""
    line = {"lineStyle": {"color": "var(--line)"}, "onZero": False}
    label = {"color": "var(--soft)", "fontSize": 12}
    common = {"type": "value", "axisLabel": label, "axisLine": line, "nameTextStyle": label, "splitLine": line}
    return {
        "animation": False,
        "textStyle": {"fontFamily": "system-ui, sans-serif"},
        "grid": {"left": 8, "right": 16, "top": 30, "bottom": 24, "containLabel": True},
        "legend": {"top": 0, "right": 0, "itemWidth": 18, "textStyle": {"color": "var(--ink)"}},
        "tooltip": {"trigger": "axis"},
        "xAxis": {**common, "name": x_name, "nameLocation": "middle", "nameGap": 24, "splitLine": {"show": False}},
        "yAxis": {**common, "name": y_name, "nameTextStyle": {**label, "align": "left"}, "splitNumber": 3},
        "series": [],
        **more,
    }


def line(name: str, points: Sequence[Sequence[float | None]], color: str, **more: Any) -> dict[str, Any]:
    """A line of a chart; a None in a point makes a gap."""
    style = {"lineStyle": {"color": color, "width": 2}, "itemStyle": {"color": color}}
    return {"name": name, "type": "line", "showSymbol": False, "data": points, **style, **more}
