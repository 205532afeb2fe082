"""Quality against cost, and the slider that says where on that curve the server stands."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from shortlist.errors import ShortlistError
from shortlist.serving.console import look
from shortlist.serving.console.app import Console
from shortlist.serving.console.client import BudgetState, Cost, Curve, Limits

UNITS = {"ms": "ms", "mflop": "MFLOP"}
WORTHS = {"choice": "gain of held-out items", "value": "money of held-out items"}
STEPS = 100
"""Places of the slider between the cheapest chain and the dearest."""
QUIET_S = 3.0
"""Seconds after a move in which the slider stays where it was put."""


@dataclass
class _Seen:
    """What the page shows."""

    state: BudgetState | None = None
    curve: Curve = field(default_factory=Curve)
    curve_of: str = ""
    """Snapshot that the curve belongs to."""
    moved_at: float = 0.0
    """When somebody moved the slider last."""
    wanted: float | None = None
    """Where it was let go, while that is not sent yet."""
    num_sets: int = 0
    """Budgets set from this page."""

    @property
    def resource(self) -> str:
        """What the slider sets: that which the calibrated budget limits."""
        assert self.state is not None
        return "mflop" if self.state.calibrated.ms is None and self.state.calibrated.mflop is not None else "ms"

    @property
    def limit(self) -> float | None:
        """The budget of that resource now."""
        assert self.state is not None
        found: float | None = getattr(self.state.budget, self.resource)
        return found

    @property
    def ends(self) -> tuple[float, float]:
        """What the cheapest chain and the dearest take of that resource."""
        assert self.state is not None
        costs = [getattr(chain, self.resource) for chain in self.state.chains]
        return min(costs), max(costs)


def show(console: Console) -> None:
    """Lay the page out."""
    ui, seen = console.ui, _Seen()

    async def fetch() -> BudgetState:
        num_sets = seen.num_sets
        state = await console.api.budget()
        if state.snapshot_version != seen.curve_of:
            curve = await console.api.curve()
            if curve.report is None and console.report is not None:
                curve = Curve(calibration=curve.calibration, report=console.report)
            seen.curve, seen.curve_of = curve, state.snapshot_version
        # What was asked before the budget was set and came after that is out of date.
        return state if seen.state is None or num_sets == seen.num_sets else seen.state

    def update(state: BudgetState) -> None:
        seen.state = state
        lead.set_content(_lead(state))
        steering.set_visibility(state.is_calibrated and not state.follows_traffic)
        drawn.set_visibility(bool(state.chains))
        below.set_content(_below(seen))
        if state.chains:
            low, high = seen.ends
            slider.props(f':min="{low}" :max="{high}" :step="{max(high - low, 1e-9) / STEPS}"')
            if time.monotonic() - seen.moved_at > QUIET_S:
                slider.value = high if seen.limit is None else min(max(seen.limit, low), high)
                label(seen.limit)
            _draw(chart, seen)

    def label(value: float | None) -> None:
        chosen.set_content(f"A request may cost on average <b>{look.number(value, UNITS[seen.resource])}</b>")

    def moved(value: float) -> None:
        seen.moved_at = time.monotonic()
        label(value)

    async def drop(value: float) -> None:
        seen.wanted = value
        async with sending:
            if seen.state is None or seen.wanted is None:  # a later move has taken this one along
                return
            kept = {"ms": seen.state.budget.ms, "mflop": seen.state.budget.mflop}
            kept[seen.resource], seen.wanted = seen.wanted, None
            await choose(Limits(**kept))

    async def reset() -> None:
        async with sending:
            seen.moved_at = 0.0
            await choose(Limits())

    async def choose(limits: Limits) -> None:
        try:
            state = await console.api.set_budget(limits)
        except ShortlistError as error:
            console.refused(error)
            return
        seen.num_sets += 1
        update(state)

    sending = asyncio.Lock()
    with console.fresh(fetch, update):
        lead = ui.html(sanitize=False).props('aria-live="polite"')
        with ui.element("div") as steering:
            with ui.element("div").classes("bar"):
                chosen = ui.html(sanitize=False)
                console.button("As calibrated", reset, quiet=True)
            slider = ui.slider(min=0, max=1, step=0.01, value=0).props('aria-label="Budget per request"')
            slider.on("update:model-value", lambda event: moved(event.args)).on(
                "change", lambda event: drop(event.args)
            )
        with ui.element("figure") as drawn:
            ui.html("<figcaption>Quality against cost</figcaption>", sanitize=False)
            chart = ui.echart(look.axes("ms per request", "worth of a page"), renderer="svg").classes("chart tall")
        below = ui.html(sanitize=False)


def _lead(state: BudgetState) -> str:
    if not state.is_calibrated:
        return look.paragraph(look.sentence(state.why), "lead")
    words = []
    if state.follows_traffic:
        words.append(
            "Prices follow the traffic here, within the server's capacity per second, so no budget is set by hand."
        )
    limits = [
        f"{look.number(value, UNITS[name])}" for name in UNITS if (value := getattr(state.budget, name)) is not None
    ]
    same = "as calibrated" if state.budget == state.calibrated else "set while it runs"
    words.append(f"Budget: {' and '.join(limits) or 'none'} a request ({same}).")
    prices = [f"{look.number(price)} per {UNITS.get(name, name)}" for name, price in state.prices.items() if price]
    words.append(f"Prices: {' and '.join(prices) or 'none, since the budget binds nowhere'}.")
    words.append(
        "Every chain is affordable now."
        if state.cap_ms is None
        else f"Overloaded: no chain above {look.number(state.cap_ms, 'ms')} now."
    )
    return look.paragraph(" ".join(words), "lead")


def _below(seen: _Seen) -> str:
    state, curve = seen.state, seen.curve
    assert state is not None
    worths = {chain.name: chain.worth for chain in curve.calibration.chains} if curve.calibration else {}
    rows = [[c.name, look.number(c.ms), look.number(c.mflop), look.number(worths.get(c.name))] for c in state.chains]
    told = "" if curve.report is None else look.paragraph(curve.report.sentence)
    if state.is_calibrated and curve.report is None:
        told = look.paragraph("Run “shortlist budget” on it to see what allocators make of these chains.", "soft")
    unit = WORTHS.get(curve.calibration.worth, "worth") if curve.calibration else "worth"
    return told + look.table("Chains that the allocator chooses from", ["chain", "ms", "MFLOP", unit], rows)


def _draw(chart: Any, seen: _Seen) -> None:
    """Chains as dots, allocators as lines, the budget as an upright line."""
    resource, curve = seen.resource, seen.curve
    drawing = look.axes(f"{UNITS[resource]} per request", "worth of a page")
    drawing["tooltip"] = {"trigger": "item"}
    drawing["yAxis"]["scale"] = drawing["xAxis"]["scale"] = True
    drawing["grid"]["top"] = 48  # the budget's number stands between the legend and the curve
    chains: Sequence[Cost] = ()
    if curve.report is not None:
        chains = curve.report.frontier.chains
    elif curve.calibration is not None:
        chains = curve.calibration.chains
    dots = [{"name": c.name, "value": [round(getattr(c, resource), 4), c.worth]} for c in chains if c.worth is not None]
    marked = {}
    if seen.limit is not None:
        words = {"formatter": look.number(seen.limit, UNITS[resource]), "color": "var(--ink)"}
        style = {"color": "var(--ink)", "type": "dashed"}
        marked = {"markLine": {"symbol": "none", "label": words, "lineStyle": style, "data": [{"xAxis": seen.limit}]}}
    series: list[dict[str, Any]] = [
        {
            "name": "fixed chains",
            "type": "scatter",
            "symbolSize": 6,
            "data": dots,
            "itemStyle": {"color": "var(--soft)"},
            **marked,
        }
    ]
    if curve.report is not None:
        shades = {
            "greenflow": "var(--accent)",
            "dcaf": "var(--accent)",
            "queue-only": "var(--accent)",
            "oracle": "var(--soft)",
        }
        kinds = {
            "greenflow": "solid",
            "dcaf": "dashed",
            "queue-only": "dotted",
            "mixture": "dashed",
            "oracle": "dotted",
        }
        arms = dict.fromkeys(point.arm for point in curve.report.frontier.points if point.arm != "fixed")
        for arm in arms:
            points = sorted(
                [round(getattr(p, resource), 4), p.worth.mean] for p in curve.report.frontier.points if p.arm == arm
            )
            drawn = look.line(arm, points, shades.get(arm, "var(--other)"), showSymbol=True, symbolSize=5)
            drawn["lineStyle"]["type"] = kinds.get(arm, "solid")
            series.append(drawn)
    drawing["series"] = series
    if drawing != chart.options:
        chart.options.clear()
        chart.options.update(drawing)
        chart.props(f'role="img" aria-label="{look.text(_words(seen, dots))}"')
        chart.update()


def _words(seen: _Seen, dots: Sequence[dict[str, Any]]) -> str:
    """The figure in words."""
    if seen.curve.report is not None:
        return f"Quality against cost. {seen.curve.report.sentence}"
    return f"Worth against {UNITS[seen.resource]} of {len(dots)} chains; the budget is {look.number(seen.limit, UNITS[seen.resource])}"
