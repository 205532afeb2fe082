"""What a budget buys on a run: every allocator at several budgets, as a page with a figure and as numbers.

RUN-report/budget.html and budget.json. Learned and aimed on the validation window, judged on another one, which is asked once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from shortlist.cascade.allocation.base import RESOURCES
from shortlist.cascade.allocation.calibration import Calibration, calibrate
from shortlist.cascade.allocation.costs import Tell
from shortlist.cascade.allocation.outcomes import replay
from shortlist.cascade.lessons import sample
from shortlist.cascade.run import Run, as_of
from shortlist.errors import ConfigError
from shortlist.evaluation.chains import UNITS, WORTHS, chain_table
from shortlist.evaluation.evidence import write_json
from shortlist.evaluation.figures import ACCENT, INK, LINE, OTHER, empty_figure, inline
from shortlist.evaluation.frontier import ARMS, Frontier, check_wishes, frontier
from shortlist.evaluation.page import document, element, figures, prose, section, table
from shortlist.evaluation.report import report_folder
from shortlist.training.checkpoint import write_atomically

PAGE, NUMBERS = "budget.html", "budget.json"
MARKS = {
    "mixture": ("--", OTHER),
    "oracle": (":", OTHER),
    "dcaf": ("-", INK),
    "queue-only": ("-.", INK),
    "greenflow": ("-", ACCENT),
}


@dataclass(frozen=True, kw_only=True)
class BudgetReport:
    """A run's chains, and what allocators make of them."""

    name: str
    calibration: Calibration
    frontier: Frontier
    window: str

    @property
    def sentence(self) -> str:
        """What the budget saves, in one sentence."""
        return saving_sentence(self.frontier, self.calibration.config.system)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "run": self.name,
            "window": self.window,
            "sentence": self.sentence,
            "calibration": self.calibration.as_dict(),
            "frontier": self.frontier.as_dict(),
        }


def judge_budgets(
    run: Run,
    *,
    window: Literal["valid", "test"] = "test",
    resource: str = "ms",
    arms: Sequence[str] = ARMS,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    max_requests: int = 4_000,
    seed: int = 0,
    calibration: Calibration | None = None,
    tell: Tell = lambda what, done, of: None,
) -> BudgetReport:
    """Every allocator at several budgets on a window's requests.

    Args:
        run: with offers of chains.
        window: "test" once; on "valid" the calibration's later part is judged, which has already served for aiming.
        resource: that budgets are set in.
        arms: names of allocators.
        settings: of an arm, where not its defaults.
        max_requests: of the test window, at most.
        calibration: of this run, where it has just been made; None = made here.
        tell: told of progress.

    Raises ConfigError for what `check_wishes` refuses, before any work, and where the run has one chain alone; DataError where there are
    too few requests.
    """
    check_wishes(resource, arms)
    if max_requests < 2:
        raise ConfigError(f"max_requests must be at least 2, for intervals need two people, got {max_requests}")
    made = calibrate(run, seed=seed, tell=tell) if calibration is None else calibration
    test = made.judged
    if window == "test":
        requests = sample(run.dataset.split.test, max_requests, seed)
        chains = [run.config.chain(name) for name in made.chains.names]
        test = replay(
            as_of(run, "test"),
            run.dataset,
            requests,
            chains,
            worth=made.config.worth,
            contexts=made.allocation.contexts,
            tell=tell,
        )
    found = frontier(
        made.chains,
        made.learned,
        made.judged,
        test,
        default=made.default,
        resource=resource,
        arms=arms,
        settings=settings,
        seed=seed,
        note=run.dataset.split.note,
    )
    return BudgetReport(name=run.folder.name, calibration=made, frontier=found, window=window)


def write_budget(run: Run, report: BudgetReport) -> Path:
    """Write the page and the numbers; gives the page's path."""
    folder = report_folder(run.folder)
    write_json(folder / NUMBERS, report.as_dict())
    page = folder / PAGE
    write_atomically(page, render(run, report))
    return page


def saving_sentence(found: Frontier, arm: str) -> str:
    """What choosing chains by request saves against the default chain at its worth, or gains at its cost."""
    if arm not in found.arms:
        arm = "greenflow" if "greenflow" in found.arms else found.arms[0]
    default, number = found.chains.names[found.default], RESOURCES.index(found.resource)
    paid = found.chains.costs_JC[found.default, number]
    saving, drawn = found.saving(arm), found.saving("mixture") if "mixture" in found.arms else float("nan")
    start = f"The default chain ({default}) costs {paid:.3g} {UNITS[found.resource]} a request"
    if np.isnan(saving):
        best = max(found.of(arm), key=lambda point: point.worth.mean)
        share = best.worth.mean / max(float(found.worth_J[found.default]), 1e-12)
        cost = float(best.costs_C[number]) / paid
        return f"{start}; {arm} does not reach its worth at any budget here, but {share:.1%} of it for {cost:.0%} of the cost."
    rival = ""
    if arm != "mixture" and not np.isnan(drawn):
        rival = f"; mixing chains at random would {f'save {drawn:.0%}' if drawn >= 0 else f'take {-drawn:.0%} more'}"
    return f"{start}; {arm} reaches the same worth for {1 - saving:.0%} of that{rival}."


def frontier_table(found: Frontier, worth: str) -> list[list[str]]:
    """Rows of text, the first one the heads."""
    rows = [
        [
            "arm",
            f"budget {UNITS[found.resource]}",
            *(UNITS[r] for r in RESOURCES),
            worth,
            "against mixture",
            "of the oracle's gain",
        ]
    ]
    for point in found.points:
        gain = point.gain
        rows.append(
            [
                point.arm,
                f"{getattr(point.budget, found.resource):.3f}",
                *(f"{cost:.3f}" for cost in point.costs_C.tolist()),
                f"{point.worth.mean:.4f} [{point.worth.low:.4f}, {point.worth.high:.4f}]",
                f"{gain.difference:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]",
                "" if np.isnan(point.of_oracle) else f"{point.of_oracle:.0%}",
            ]
        )
    return rows


def frontier_figure(found: Frontier, worth: str, key: str, *, marked: float | None = None) -> str:
    """Quality against cost: fixed chains as dots, a line per arm with its interval, the chosen budget as an upright line."""
    number = RESOURCES.index(found.resource)
    figure, (axis,) = empty_figure(3.6, 1)
    axis.scatter(found.chains.costs_JC[:, number], found.worth_J, s=9, color=OTHER, alpha=0.5, label="fixed chains")
    words = []
    for arm in found.arms:
        if arm == "fixed":
            continue
        points = found.of(arm)
        cost = [float(p.costs_C[number]) for p in points]
        style, color = MARKS.get(arm, ("-", INK))
        if arm == "greenflow":
            axis.fill_between(
                cost, [p.worth.low for p in points], [p.worth.high for p in points], color=color, alpha=0.15, lw=0
            )
        axis.plot(cost, [p.worth.mean for p in points], style, color=color, marker="o", markersize=3, lw=1.2, label=arm)
        words.append(f"{arm} " + ", ".join(f"{p.worth.mean:.4f} at {c:.2f}" for p, c in zip(points, cost)))
    if marked is not None:
        axis.axvline(marked, color=LINE, lw=1)
    axis.plot(
        [found.chains.costs_JC[found.default, number]],
        [found.worth_J[found.default]],
        "s",
        color=INK,
        markersize=6,
        label="default chain",
    )
    axis.set_xlabel(f"{UNITS[found.resource]} per request")
    axis.set_ylabel(f"{worth} of a page")
    axis.legend(frameon=False, fontsize=7, labelcolor=INK, loc="lower right")
    return inline(figure, alt=f"{worth} against {UNITS[found.resource]} per request: {'; '.join(words)}.", key=key)


def render(run: Run, report: BudgetReport) -> str:
    """The whole page."""
    found, made = report.frontier, report.calibration
    worth = WORTHS[made.config.worth]
    budget = made.allocation.budget
    marked = getattr(budget, found.resource)
    drawn = frontier_figure(found, worth, "frontier", marked=marked)
    caption = f"{worth} of a page against what a request costs, {found.num_requests:,} {report.window} requests; band: 95 % over people"
    head = f'<div class="lead">{prose(report.sentence)}{prose(found.note) if found.note else ""}</div>'
    explained = prose(
        f"Every allocator learned on {len(made.learned):,} validation requests and was aimed on {len(made.judged):,} later ones of other "
        "people. `against mixture` compares it, request by request, with the best random mixture of fixed chains that costs the same. The "
        "oracle knows the true worth of every page and can not be served."
    )
    agreement = ", ".join(
        f"{name.replace('_', ' ')} {'not known' if np.isnan(value) else f'{value:.3f}'}"
        for name, value in made.costs.agreement.items()
    )
    return document(
        f"What a budget buys: {report.name}",
        head,
        [
            section("curve", "Quality against cost", figures((drawn, caption)) + explained),
            section("points", "Every allocator at every budget", table(frontier_table(found, worth), "Per request")),
            section(
                "chains",
                "The chains",
                table(chain_table(made, run.config), "By rising cost")
                + element("p", f"Rank correlation of costs: {agreement}."),
            ),
        ],
    )
