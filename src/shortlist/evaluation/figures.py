"""Figures as SVG that stands inside a page: its text stays text, its colours are the page's, so that it is readable by day and by night.

Figures are narrow, so that a phone shows them at nearly full size. The page defines the variables --ink, --accent, --other and --line.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shortlist.evaluation.evaluate import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, ACCENT, OTHER, LINE = "#010203", "#020304", "#030405", "#040506"
"""Stand-ins that become the page's colours."""
VARIABLES = {INK: "var(--ink)", ACCENT: "var(--accent)", OTHER: "var(--other)", LINE: "var(--line)"}
WIDTH = 4.4
"""Inches."""


def quality_figure(comparison: Comparison, metric: str, key: str) -> str:
    """Means of one metric with their 95 % intervals, a bar per report, the reference in the accent colour."""
    reports = comparison.reports
    found = {r.name: r.metrics[metric] for r in reports}
    words = ", ".join(f"{name} {i.mean:.4f} ({i.low:.4f} to {i.high:.4f})" for name, i in found.items())
    return bars(
        {name: interval.mean for name, interval in found.items()},
        label=metric,
        alt=f"{metric} with 95 % intervals: {words}.",
        key=key,
        spans={name: (interval.low, interval.high) for name, interval in found.items()},
        accents=(comparison.reference,),
    )


def funnel_figure(lost_at: Mapping[str, float], key: str) -> str:
    """Share of the held-out items that is still there after every stage, in the order of the stages, the page last."""
    left, share = {"held out": 1.0}, 1.0
    stages = [name for name in lost_at if name != "shown"]
    for stage in stages:
        share -= lost_at[stage]
        left[f"after {stage}"] = max(share, 0.0)
    words = ", ".join(f"{name} {value:.1%}" for name, value in left.items())
    last = f"after {stages[-1]}" if stages else ""
    return bars(
        left,
        label="share of held-out items still there",
        alt=f"Funnel of held-out items: {words}.",
        key=key,
        accents=(last,),
        form=lambda v: f"{v:.1%}",
    )


def curve_figure(name: str, points: Sequence[Mapping[str, Any]], best_epoch: int | None, key: str) -> str:
    """Training loss above and validation score below, by epoch; the epoch whose weights were kept is marked."""
    from matplotlib.ticker import MaxNLocator

    scored = [(n, p["score"]) for n, p in enumerate(points, start=1) if p["score"] is not None]
    figure, axes = empty_figure(3.3, 2 if scored else 1)
    numbers = list(range(1, len(points) + 1))
    axes[0].plot(numbers, [p["loss"] for p in points], color=OTHER, marker="o", markersize=3)
    axes[0].set_ylabel("training loss")
    for number in [n for n in numbers[1:] if points[n - 1]["phase"] != points[n - 2]["phase"]]:
        axes[0].axvline(number - 0.5, color=LINE)
    words = [f"training loss from {points[0]['loss']:.4f} to {points[-1]['loss']:.4f} in {len(points)} epochs"]
    if scored:
        axes[1].plot(*zip(*scored), color=ACCENT, marker="o", markersize=3)
        axes[1].set_ylabel("validation score")
        words.append("validation score " + ", ".join(f"{score:.4f} at {epoch}" for epoch, score in scored))
    last = [n for n, p in enumerate(points, start=1) if p["phase"] == points[-1]["phase"] and p["epoch"] == best_epoch]
    for axis in axes:
        for number in last:
            axis.axvline(number, color=INK, linestyle=":", linewidth=1)
    axes[-1].set_xlabel("epoch" + (" (dotted: kept)" if last else ""))
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return inline(figure, alt=f"Learning curves of {name}: {'; '.join(words)}.", key=key)


def bars(
    values: Mapping[str, float],
    *,
    label: str,
    alt: str,
    key: str,
    spans: Mapping[str, tuple[float, float]] | None = None,
    accents: Sequence[str] = (),
    form: Callable[[float], str] = "{:.4f}".format,
) -> str:
    """Horizontal bars, the first on top, each with its number written beside it.

    Args:
        values: bar lengths by name.
        label: what they measure.
        alt: the figure in words.
        key: distinguishes this figure from the others of its page.
        spans: low and high ends of an interval, where there is one.
        accents: names of the bars in the accent colour.
        form: writes a value.
    """
    figure, (axis,) = empty_figure(0.34 * len(values) + 0.7, 1)
    names, places = list(values), range(len(values))
    lengths = list(values.values())
    axis.barh(places, lengths, height=0.66, color=[ACCENT if name in accents else OTHER for name in names])
    ends = lengths
    if spans is not None:
        errors = [[v - spans[n][0] for n, v in values.items()], [spans[n][1] - v for n, v in values.items()]]
        axis.errorbar(lengths, places, xerr=errors, fmt="none", ecolor=INK, elinewidth=1.2, capsize=2.5)
        ends = [spans[name][1] for name in names]
    widest = max([*ends, 0.0]) or 1.0
    for place, (value, end) in enumerate(zip(lengths, ends)):
        axis.text(end + 0.02 * widest, place, form(value), va="center", fontsize=9, color=INK)
    axis.set_xlim(0, 1.24 * widest)
    axis.set_xticks([tick for tick in axis.get_xticks() if 0 <= tick <= widest])  # none where only the numbers stand
    axis.set_yticks(places, [_plain(name) for name in names])
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    axis.set_xlabel(_plain(label))
    return inline(figure, alt=alt, key=key)


def inline(figure: Figure, *, alt: str, key: str) -> str:
    """A figure as an <svg> element that needs nothing from outside: no header, no metadata, ids of its own, the page's colours."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": key}):
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    drawn = file.getvalue()
    drawn = drawn[drawn.index("<svg") :].strip()
    head, _, rest = drawn.partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    rest = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>|<metadata>.*?</metadata>", "", rest, flags=re.DOTALL)
    rest = rest.replace("xlink:href=", "href=")
    rest = re.sub(r'(\sid="|\shref="#|url\(#)', rf"\g<1>{key}-", rest)
    rest = re.sub(r"'DejaVu Sans'[^;\"]*?sans-serif", "system-ui, sans-serif", rest)
    for stand_in, variable in VARIABLES.items():
        rest = rest.replace(stand_in, variable)
    return f'<svg role="img" aria-label="{html.escape(alt)}" {box[0]}>{rest}'


def empty_figure(height: float, panels: int) -> tuple[Figure, list[Axes]]:
    """A figure with panels above each other that share their x axis."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {"axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}
    with mpl.rc_context(style):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = list(figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_facecolor("none")
    return figure, axes


def _plain(words: str) -> str:
    """Text in which no dollar sign starts a formula."""
    return words.replace("$", r"\$")
