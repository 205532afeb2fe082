"""Reports as text and Markdown, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shortlist.evaluation.evaluate import Comparison, Report
from shortlist.metrics import Interval

SIGNIFICANT = 0.05


def comparison_text(comparison: Comparison, metrics: Sequence[str] | None = None) -> str:
    """One line per report, means with 95 % intervals; a star where the reference differs beyond chance (Holm, p < 0.05)."""
    reports, names = comparison.reports, _shown(comparison, metrics)
    header = ["", *names]
    rows = []
    for report in reports:
        cells = []
        for metric in names:
            test = comparison.tests.get(report.name, {}).get(metric)
            star = "*" if test is not None and test["p_value"] < SIGNIFICANT else ""
            cells.append(cell(report.metrics[metric]) + star)
        rows.append([report.name, *cells])
    lines = [*aligned([header, *rows]), ""]
    first = reports[0]
    lines.append(f"{first.num_requests:,} requests of {first.num_users:,} users; {first.protocol}.")
    if first.note:
        lines.append(f"Note: {first.note}")
    if len(reports) > 1:
        lines.append(
            f"Brackets: 95 % intervals over users. * differs from {comparison.reference} beyond chance (paired test, Holm, p < 0.05)."
        )
    return "\n".join(lines)


def comparison_markdown(comparison: Comparison, metrics: Sequence[str] | None = None) -> str:
    """The same as a Markdown table, without stars and notes."""
    names = _shown(comparison, metrics)
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {r.name} | " + " | ".join(cell(r.metrics[m]) for m in names) + " |" for r in comparison.reports]
    return "\n".join(lines)


def _shown(comparison: Comparison, metrics: Sequence[str] | None) -> list[str]:
    """The metrics asked for; by default those that are known per request."""
    first = comparison.reports[0]
    return list(metrics or [m for m in first.metrics if m in first.per_request])


def losses_text(losses: Mapping[str, float]) -> str:
    """Where held-out items were lost: {"retrieval": 0.31, ..., "shown": 0.25} in the order of the stages."""
    rows = [["held-out items", "share"]]
    rows += [
        [f"not let through by {stage}" if stage != "shown" else "on the page", f"{share:.1%}"]
        for stage, share in losses.items()
    ]
    return "\n".join(aligned(rows))


def slices_text(report: Report) -> str:
    """Quality by length of history."""
    metric = next(iter(report.metrics))
    rows = [["history", "requests", metric]]
    rows += [[name, f"{values['requests']:,.0f}", f"{values[metric]:.4f}"] for name, values in report.slices.items()]
    return "\n".join(aligned(rows))


def cell(interval: Interval) -> str:
    """0.1234 [0.1200, 0.1270]; the mean alone where there is no interval."""
    if interval.low == interval.high:
        return f"{interval.mean:.4f}"
    return f"{interval.mean:.4f} [{interval.low:.4f}, {interval.high:.4f}]"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, the first one left-aligned, the others to the right."""
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell_.rjust(width) for cell_, width in zip(row[1:], widths[1:]))]
        ).rstrip()
        for row in rows
    ]
