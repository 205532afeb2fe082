"""Findings of experiments as text and as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shortlist.evaluation.evidence import write_json
from shortlist.evaluation.experiments import Difference, Findings
from shortlist.evaluation.page import document, element, prose, section, table
from shortlist.evaluation.tables import aligned
from shortlist.training.checkpoint import write_atomically

HOW_SURE = "Brackets are confidence sequences: they hold at all times at once, so one may look, and stop, at any time."


def findings_text(found: Sequence[Findings]) -> str:
    """For a terminal."""
    parts = []
    for one in found:
        lines = [f"{one.name}: {_units(one)}", *(f"  {sentence}" for sentence in one.sentences), ""]
        lines += aligned(arm_rows(one))
        if one.differences:
            lines += ["", *aligned(difference_rows(one))]
        if one.guardrails:
            lines += ["", *aligned(guardrail_rows(one))]
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, HOW_SURE])


def write_findings(folder: Path, found: Sequence[Findings]) -> Path:
    """FOLDER/experiments.html and experiments.json; gives the page."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "experiments.json", {"experiments": [one.as_dict() for one in found]})
    page = folder / "experiments.html"
    write_atomically(page, render(found))
    return page


def render(found: Sequence[Findings]) -> str:
    """The whole page."""
    links = "".join(f'<li><a href="#experiment{n}">{element("span", one.name)}</a></li>' for n, one in enumerate(found))
    head = f'<div class="lead">{prose(HOW_SURE)}</div>\n<nav aria-label="Sections"><ul>{links}</ul></nav>'
    return document("Experiments", head, [_section(f"experiment{n}", one) for n, one in enumerate(found)])


def _section(anchor: str, one: Findings) -> str:
    parts = [*map(prose, one.sentences), element("p", _units(one), kind="soft"), table(arm_rows(one), "Who saw what")]
    if one.differences:
        parts.append(table(difference_rows(one), f"Against {one.arms[0].variant}", mine=one.primary))
    if one.guardrails:
        parts.append(table(guardrail_rows(one), "Guardrails"))
    if one.mismatch is not None:
        parts.append(
            element(
                "p",
                f"Shares: chi-square {one.mismatch.chi_square:.2f}, p = {one.mismatch.p_value:.3g} for one look at a fixed time, "
                f"{one.mismatch.always_p:.3g} at any.",
                kind="soft",
            )
        )
    return section(anchor, one.name, "\n".join(parts))


def _units(one: Findings) -> str:
    return f"{one.units:,} units whose {one.hours:g} hours are over, {one.units_open:,} whose are not yet; alpha {one.alpha:g}."


def arm_rows(one: Findings) -> list[list[str]]:
    """Variants with their units and pages."""
    rows = [["variant", "share", "units", "pages"]]
    return rows + [[a.variant, f"{a.share:.1%}", f"{a.units:,}", f"{a.pages:,}"] for a in one.arms]


def difference_rows(one: Findings) -> list[list[str]]:
    """Metrics of every variant, the deciding one first."""
    rows = [["metric", "variant", "control mean", "mean", "difference", "interval"]]
    ordered = sorted(one.differences, key=lambda d: d.metric != one.primary)
    return rows + [
        [
            d.metric,
            d.variant,
            _number(d.control_mean),
            _number(d.variant_mean),
            _number(d.difference, "+"),
            _interval(d),
        ]
        for d in ordered
    ]


def guardrail_rows(one: Findings) -> list[list[str]]:
    """Guardrails and how they stand."""
    rows = [["guardrail", "variant", "metric", "bad", "margin", "state"]]
    return rows + [
        [g.guardrail, g.variant, g.metric, g.bad, f"{g.margin:g}", "CROSSED" if g.crossed else "holds"]
        for g in one.guardrails
    ]


def _interval(one: Difference) -> str:
    if one.low is None or one.high is None:
        return "too little is known"
    return f"[{one.low:+.4g}, {one.high:+.4g}]{' *' if one.is_sure else ''}"


def _number(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.4g}"
