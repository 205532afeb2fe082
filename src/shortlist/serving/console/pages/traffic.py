"""Live traffic: rates, latency, what stages take, which chains answered and why."""

from __future__ import annotations

import math
from typing import Any

from shortlist.serving.console import look
from shortlist.serving.console.app import Console
from shortlist.serving.console.client import ApiError
from shortlist.serving.console.numbers import Point, Reading

REASONS = {
    "default": "the run has no allocator",
    "named": "the request asked for it",
    "price": "best value at the prices",
    "own budget": "the request's own limit",
    "overload": "the server's cap",
    "fallback": "the allocator failed",
}
"""Why a request got its chain, in words."""


def show(console: Console) -> None:
    """Lay the page out."""
    ui = console.ui

    async def fetch() -> Reading:
        if console.problem is not None:
            raise ApiError(console.problem)
        return console.history.reading()

    def update(reading: Reading) -> None:
        head.set_content(_head(reading))
        below.set_content(_tables(reading))
        points = list(console.history.points)
        _draw(rate, points, ("requests/s",), reading)
        _draw(latency, points, ("p50", "p99"), reading)

    with console.fresh(fetch, update):
        head = ui.html(sanitize=False)
        with ui.element("div").classes("charts"):
            rate, latency = (_chart(ui, title, unit) for title, unit in (("Requests", "1/s"), ("Latency", "ms")))
        below = ui.html(sanitize=False)


def _head(reading: Reading) -> str:
    told = look.tiles(
        {
            "requests": look.number(reading.all.per_s, "/s"),
            "p50": look.time_ms(reading.all.p50_ms),
            "p99": look.time_ms(reading.all.p99_ms),
            "failed": look.share(reading.all.failed),
            "degraded": look.share(reading.degraded),
            "waiting": look.count(reading.waiting),
            "events": look.number(reading.events_per_s, "/s"),
        }
    )
    parts = [f"The last minute of snapshot {reading.snapshot}"]
    if reading.processes > 1:
        parts.append(f"sampled from {reading.processes} processes in turn")
    if reading.workers_replaced:
        parts.append(f"{look.count(reading.workers_replaced)} workers hung and were replaced since the start")
    if reading.cap_ms is not None:
        parts.append(f"overloaded, so that no chain above {look.number(reading.cap_ms, 'ms')} is affordable")
    return told + look.paragraph("; ".join(parts) + ".", "soft")


def _tables(reading: Reading) -> str:
    stages = [
        [s.stage, look.number(s.ms), look.time_ms(s.p99_ms), look.number(s.mflop), look.share(s.degraded)]
        for s in reading.stages
    ]
    if len(stages) > 1:
        ms, mflop = (sum(getattr(s, name) for s in reading.stages) for name in ("ms", "mflop"))
        stages.append(["together", look.number(ms), look.NOTHING, look.number(mflop), look.NOTHING])
    chains = [
        [chain, REASONS.get(reason, reason), look.count(pages), look.share(pages / reading.pages)]
        for (chain, reason), pages in reading.chains.items()
    ]
    routes = [
        [
            r.route.replace(":path}", "}"),
            look.number(r.per_s, "/s"),
            look.time_ms(r.p50_ms),
            look.time_ms(r.p99_ms),
            look.share(r.failed),
        ]
        for r in reading.routes
    ]
    found = look.tables(
        look.table("Compute per stage and page", ["stage", "mean ms", "p99", "MFLOP", "degraded"], stages),
        look.table("Chains", ["chain", "why", "pages", "share"], chains, words=[1]),
        look.table("Routes", ["route", "rate", "p50", "p99", "failed"], routes),
    )
    return found or look.paragraph("No request came in the last minute.", "soft")


def _chart(ui: Any, title: str, unit: str) -> Any:
    with ui.element("figure"):
        ui.html(f"<figcaption>{title}</figcaption>", sanitize=False)
        drawing = look.axes("minutes from now", unit)
        drawing["xAxis"] |= {"min": -10, "max": 0, "splitNumber": 5}
        drawing["yAxis"] |= {"min": 0}
        drawing["legend"]["show"] = unit == "ms"
        return ui.echart(drawing, renderer="svg").classes("chart")


def _draw(chart: Any, points: list[Point], names: tuple[str, ...], reading: Reading) -> None:
    fields = {
        "requests/s": ("per_s", "var(--accent)"),
        "p50": ("p50_ms", "var(--accent)"),
        "p99": ("p99_ms", "var(--other)"),
    }
    now = points[-1].at if points else 0.0
    oldest = (now - points[0].at) / 60 if points else 0.0
    drawing = chart.options
    drawing["xAxis"]["min"] = -min(max(math.ceil(oldest), 1), 10)
    drawing["series"] = [
        look.line(
            name, [[round((p.at - now) / 60, 3), _finite(getattr(p, fields[name][0]))] for p in points], fields[name][1]
        )
        for name in names
    ]
    last = reading.all
    words = (
        look.number(last.per_s, "requests a second")
        if len(names) == 1
        else f"p50 {look.time_ms(last.p50_ms)}, p99 {look.time_ms(last.p99_ms)}"
    )
    chart.props(f'role="img" aria-label="Ten minutes; now {words}"')
    chart.update()


def _finite(value: float) -> float | None:
    return round(value, 3) if math.isfinite(value) else None
