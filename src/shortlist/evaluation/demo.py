"""The demo: a year of a real shop becomes a trained cascade with an honest table."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from shortlist.cascade.build import train_cascade
from shortlist.cascade.config import RunConfig
from shortlist.cascade.run import Run, load_run
from shortlist.data.check import check
from shortlist.data.dataset import build_dataset
from shortlist.data.datasets import load
from shortlist.data.datasets.builtin import ATTRIBUTION
from shortlist.evaluation.evaluate import Comparison, compare
from shortlist.evaluation.evidence import surroundings, write_json
from shortlist.evaluation.runs import BASELINES, RunReport, baselines, cost_rows, evaluate_counted, evaluate_run, is_run
from shortlist.evaluation.tables import aligned, comparison_plot, comparison_text, losses_text, slices_text

CONFIG = "demo.toml"


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
) -> dict[str, Any]:
    """Train (or load) the demo's run in `out`, judge it on the test window, and write the report beside it.

    Args:
        settings: overrides such as "ranking.keep=50".
        fresh: train anew even if a run is there.
        say: prints a line of the report.
        progress: training shows its progress on standard error.

    Returns: what was also written to `OUT-report/report.json`; the plot is `OUT-report/quality.png`.
    """
    began = time.perf_counter()
    config = demo_config().override(*settings)
    log = load("builtin")
    for line in check(log).sentences()[:3]:
        say(line)
    say(ATTRIBUTION)
    say()
    if is_run(out) and not fresh and not settings:
        say(f"A trained run is in {out}; --fresh trains anew.")
        run = load_run(out)
    else:
        dataset = build_dataset(log, config.data_settings)
        run = train_cascade(dataset, config, out, progress=progress, resume=not fresh)
    trained = time.perf_counter() - began
    say(f"Trained and validated in {trained:.0f} s. Test requests, asked once:")
    say()
    comparisons, cascade = {}, None
    for repeats in (True, False):
        mine = evaluate_run(run, name="cascade", repeats=repeats)
        cascade = cascade or mine
        comparisons[repeats] = beside_baselines(run, mine, repeats)
        say(comparison_text(comparisons[repeats], shown_metrics(run)))
        say()
    assert cascade is not None
    verdicts = [
        verdict(comparisons[True], run, "Items seen before may be shown"),
        verdict(comparisons[False], run, "New items only"),
    ]
    for text in (
        losses_text(cascade.lost_at),
        "\n".join(aligned(cost_rows(cascade.cost))),
        slices_text(cascade.report),
    ):
        say(text)
        say()
    for line in example_page(run):
        say(line)
    say()
    for line in verdicts:
        say(line)
    report = out.with_name(f"{out.name}-report")
    report.mkdir(parents=True, exist_ok=True)
    comparison_plot(comparisons[True], shown_metrics(run)[:3], report / "quality.png")
    result = {
        "seconds": round(time.perf_counter() - began, 1),
        "cascade": cascade.as_dict(),
        "with_repeats": comparisons[True].as_dict(),
        "without_repeats": comparisons[False].as_dict(),
        "verdicts": verdicts,
        **surroundings(),
    }
    write_json(report / "report.json", result)
    say()
    say(
        f"{result['seconds']:.0f} s in all. The run is in {out}, the report in {report}/report.json, the plot in {report}/quality.png."
    )
    say(f"Next: shortlist recommend {out} --user 17850    shortlist serve {out}")
    return result


def shown_metrics(run: Run) -> list[str]:
    """The metrics of the demo's table."""
    k = run.config.surface.k
    return [f"ndcg@{k}", f"recall@{k}", f"value@{k}", f"hr@{k}"]


def beside_baselines(run: Run, mine: RunReport, repeats: bool, names: Sequence[str] = BASELINES) -> Comparison:
    """The cascade and the simple systems on the same requests, the cascade as the reference."""
    k = run.config.surface.k
    others = [evaluate_counted(name, run.dataset, k=k, repeats=repeats) for name in baselines(run.dataset, names)]
    return compare([mine.report, *others], reference=mine.report.name)


def verdict(comparison: Comparison, run: Run, surface: str) -> str:
    """One sentence: whether the cascade beats every simple system beyond chance, and if not, which one it does not beat."""
    metric = f"ndcg@{run.config.surface.k}"
    against = {name: tests[metric] for name, tests in comparison.tests.items()}
    means = {report.name: report.metrics[metric].mean for report in comparison.reports}
    best = max(against, key=lambda name: means[name])
    test = against[best]
    found = (
        f"{test['difference']:+.4f} {metric} ({test['difference'] / means[best]:+.1%}; "
        f"95 % interval {test['low']:+.4f} to {test['high']:+.4f}, p {test['p_value']:.3f})"
    )
    not_beaten = [name for name, t in against.items() if t["low"] <= 0]
    if not_beaten:
        claim = f"the cascade does not beat {', '.join(not_beaten)} beyond the interval"
    else:
        claim = "the cascade beats every simple system beyond the interval"
    return f"{surface}: {claim}; against the best of them, {best}, it is {found}."


def example_page(run: Run) -> list[str]:
    """One person's newest basket, the page that the cascade makes for the next one, and what was then bought."""
    from shortlist.data.batches import request_batch

    requests = run.dataset.split.test
    length = requests.end - requests.start
    chosen = int(np.argsort(np.abs(length - 40), kind="stable")[0])
    one = requests.select(np.array([chosen]))
    batch = request_batch(run.dataset.histories, run.dataset.users, one, max_history=run.cascade.max_history)
    page = run.cascade.run(batch)
    title = run.dataset.titles or [f"item {row}" for row in range(run.dataset.num_items + 1)]
    bought = set(one.target.tolist())
    past = run.dataset.histories.item[one.start[0] : one.end[0]]
    seen = set(past.tolist())
    user = run.dataset.user_ids.decode(one.user)[0]
    lines = [
        f"Customer {user}, {int(length[chosen])} past lines, the last of them: "
        + "; ".join(title[row] for row in past[-3:])
    ]
    for place, (row, score) in enumerate(zip(page.rows[0].tolist(), page.scores[0].tolist()), start=1):
        marks = [word for word, true in (("bought before", row in seen), ("bought next", row in bought)) if true]
        lines.append(f"{place:3}. {title[row]:40} {score:8.3f}  {', '.join(marks)}")
    return lines
