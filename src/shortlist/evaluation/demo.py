"""The demo: a year of a real shop becomes a trained cascade with an honest table."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from shortlist.cascade.allocation.calibration import allocation_path, save_allocation
from shortlist.cascade.build import train_cascade
from shortlist.cascade.config import RunConfig
from shortlist.cascade.run import Run, load_run
from shortlist.cascade.sharing import Shared
from shortlist.data.check import check
from shortlist.data.dataset import build_dataset
from shortlist.data.datasets import load
from shortlist.data.datasets.builtin import ATTRIBUTION
from shortlist.evaluation.budget import judge_budgets, write_budget
from shortlist.evaluation.report import NUMBERS, Example, judge, write_report
from shortlist.evaluation.runs import beside_baselines, cost_rows, is_run, shown_metrics
from shortlist.evaluation.tables import aligned, comparison_text, losses_text, slices_text
from shortlist.evaluation.trees import TREES, beside, has_trees, missing_rows, train_trees

CONFIG = "demo.toml"
BUDGET_ARMS = ("fixed", "mixture", "greenflow", "oracle")
BUDGET_REQUESTS = 1_000
"""Test requests that every chain answers."""

__all__ = ["beside_baselines", "demo_config", "run_demo"]


def demo_config() -> RunConfig:
    """The settings of the demo, chosen on the validation window."""
    return RunConfig.from_toml(resources.files("shortlist.data").joinpath("demo", CONFIG).read_text())


def run_demo(
    out: Path,
    *,
    settings: Sequence[str] = (),
    fresh: bool = False,
    say: Callable[..., None] = print,
    progress: bool = True,
    command: str = "",
) -> dict[str, Any]:
    """Train (or load) the demo's run in `out`, judge it on the test window, and write the report beside it.

    Args:
        settings: overrides such as "ranking.keep=50"; the run is trained anew.
        fresh: train anew even if a run is there.
        say: prints a line of the report.
        progress: training shows its progress on standard error.
        command: how it was called, for the report.

    Returns: what `OUT-report/report.json` holds; the page is `OUT-report/report.html`.
    """
    began = time.perf_counter()
    config = demo_config().override(*settings)
    log = load("builtin")
    health = check(log).sentences()
    for line in health[:3]:
        say(line)
    say(ATTRIBUTION)
    say()
    shared = Shared()
    if is_run(out) and not fresh and not settings:
        say(f"A trained run is in {out}; --fresh trains anew.")
        run = load_run(out)
    else:
        dataset = build_dataset(log, config.data_settings)
        run = train_cascade(dataset, config, out, progress=progress, resume=not fresh, shared=shared)
    rivals = _rivals(run, shared, fresh, progress)
    say(f"Trained and validated in {time.perf_counter() - began:.0f} s. Test requests, asked once:")
    say()
    test = judge(run, "test", surfaces=(True, False), rivals=rivals)
    for comparison in test.comparisons:
        say(comparison_text(comparison, shown_metrics(run.config.surface.k)))
        say()
    for told in (_about_trees(rivals), missing_rows()):
        if told is not None:
            say(told)
            say()
    for text in (
        losses_text(test.cascade.lost_at),
        "\n".join(aligned(cost_rows(test.cascade.cost))),
        slices_text(test.cascade.report),
        "\n".join(example_page(test.examples[0])),
        "\n".join(test.verdicts),
    ):
        say(text)
        say()
    valid = judge(run, "valid", max_requests=run.config.learning.valid_requests)
    if (bought := _budget(run)) is not None:
        sentence, drawn = bought
        say(f"{sentence} Quality against cost is drawn in {drawn}.")
        say()
    seconds = time.perf_counter() - began
    page = write_report(run, [valid, test], health=health, command=command, seconds=seconds)
    say(f"{seconds:.0f} s in all. The run is in {out}, the report in {page}.")
    say(f"Next: shortlist recommend {out} --user 17850    shortlist serve {out}")
    result: dict[str, Any] = json.loads((page.parent / NUMBERS).read_text())
    return result


def _budget(run: Run) -> tuple[str, Path] | None:
    """Calibrate the run's chains for serving, and say what a budget saves; None where its settings leave one chain alone."""
    if len(list(run.config.chains())) < 2:
        return None
    report = judge_budgets(run, window="test", arms=BUDGET_ARMS, max_requests=BUDGET_REQUESTS)
    save_allocation(allocation_path(run.folder), report.calibration)
    return report.sentence, write_budget(run, report)


def _rivals(run: Run, shared: Shared, fresh: bool, progress: bool) -> dict[str, Run]:
    """LambdaMART in place of the run's rankers, where its library is installed and the run has rankers."""
    ranks = any(choice.entry.kind == "ranker" for choice in run.config.systems.values())
    if not (ranks and has_trees()):
        return {}
    return {TREES: train_trees(run, beside(run.folder), shared=shared, fresh=fresh, progress=progress)}


def _about_trees(rivals: Mapping[str, Run]) -> str | None:
    if TREES not in rivals:
        return None
    folder = rivals[TREES].folder
    return f"{TREES}: the cascade's own retrieval and pages, ranked by boosted trees in place of its rankers; the run is in {folder}."


def example_page(example: Example) -> list[str]:
    """One person's history, the page that the cascade makes, and what was then bought."""
    lines = [
        f"Customer {example.user}, {example.num_past} past lines, the last of them: " + "; ".join(example.recent[:3])
    ]
    for place, shown in enumerate(example.page, start=1):
        marks = [word for word, true in (("bought before", shown.seen), ("bought next", shown.chosen)) if true]
        lines.append(f"{place:3}. {shown.title:40} {', '.join(marks)}".rstrip())
    return lines
