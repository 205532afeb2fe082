"""The demo's cascade at the page, beside the simple systems that are hard to beat on a shop's log.

`shortlist prove demo_page`; needs no data but the built-in log and the extra [baselines]. About three minutes a seed on 2 cores.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from shortlist.cascade.build import train_cascade
from shortlist.cascade.config import RunConfig
from shortlist.cascade.run import load_run
from shortlist.cascade.sharing import Shared
from shortlist.data.dataset import Dataset, build_dataset
from shortlist.data.datasets import load
from shortlist.evaluation.demo import beside_baselines, demo_config
from shortlist.evaluation.evaluate import Report
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab, Verdict
from shortlist.evaluation.runs import BASELINES, evaluate_counted, evaluate_run
from shortlist.evaluation.trees import TREES, beside, train_trees
from shortlist.metrics import Interval
from shortlist.models.base import System

CLAIM = Claim(
    name="demo_page",
    systems=("dnn", "mmr", "personal-frequency", "popularity", "counts", "item-knn", "ease", "als", "lambdamart"),
    claim="On a year of a real shop's baskets the four-stage cascade makes better pages of ten than popularity, personal frequency, "
    "co-occurrence counts, item neighbours, EASE, ALS and LambdaMART in place of its rankers: with items bought before, and, trained for "
    "that, with new items only.",
    data="UCI Online Retail as shipped: 387,841 lines in 18,532 baskets of 4,338 customers on 3,665 items; repeat purchases are the norm",
    protocol="Split by time; every basket of the last tenth is a request with all earlier baskets as history; the whole catalogue is "
    "ranked; whole baskets are the targets. 'new' columns filter items bought before and do not count them. Settings of the cascade and "
    "of the baselines were chosen on earlier windows; the test window is read once per seed. LambdaMART ranks what the same retrieval "
    "finds, learns on the same requests with 60 candidates each, and its pages pass the same re-ranker. Intervals over customers; value = "
    "money recovered in the top 10.",
    bar="The paired 95 % interval of NDCG@10, cascade minus baseline, lies above 0 against every baseline: with repeats for the demo's "
    "cascade, and on new items for the cascade trained for new items; partly where only one of the two does.",
)
NEW_ITEMS = ("data.repeats=no", 'retrieval.systems=["ease", "item-knn", "counts", "lately", "popularity"]')
QUICK = (
    'retrieval.systems=["personal-frequency", "lately", "popularity"]',
    "learning.fit_requests=300",
    "learning.slices=1",
    "trainer.epochs=1",
    "data.max_requests=300",
)
QUICK_BASELINES = ("popularity", "personal-frequency")


def run(lab: Lab) -> None:
    names = QUICK_BASELINES if lab.quick else BASELINES
    quick = QUICK if lab.quick else ()
    config = demo_config().override(*quick)
    # Quick runs on the demo's retrieval, which is lighter; the setting for new items matters only in full.
    for_new = demo_config().override(*(NEW_ITEMS[:1] if lab.quick else NEW_ITEMS), *quick)
    log = load("builtin")
    shop, new_shop = (build_dataset(log, settings.data_settings) for settings in (config, for_new))
    with tempfile.TemporaryDirectory() as temporary:
        place = lab.scratch or Path(temporary)
        for seed in lab.seeds:
            ours = config.override(f"trainer.seed={seed}"), shop, place / f"repeats-{seed}", (True, False)
            new = for_new.override(f"trainer.seed={seed}"), new_shop, place / f"new-{seed}", (False,)
            for about, arm in (("", ours), (" trained for new items", new)):
                lab.measure(f"cascade{about}", seed, partial(cascade, *arm, names))
                lab.measure(f"{TREES}{about}", seed, partial(trees, *arm[2:]))
    for name in names:
        lab.measure(name, 0, partial(baseline, name, shop))


def cascade(
    config: RunConfig, dataset: Dataset, out: Path, surfaces: Sequence[bool], names: Sequence[str]
) -> dict[str, Interval]:
    """Train and judge: the page's metrics, and the paired difference to every baseline and to LambdaMART on the same candidates."""
    shared = Shared()
    trained = train_cascade(dataset, config, out, progress=False, shared=shared)
    rivals = {TREES: train_trees(trained, beside(out), shared=shared, progress=False)}
    found: dict[str, Interval] = {}
    made: dict[str, System] = {}
    for repeats in surfaces:
        mine = evaluate_run(trained, repeats=repeats)
        comparison = beside_baselines(trained, mine, repeats, names, rivals=rivals, made=made)
        found |= page_metrics(comparison.reports[0], repeats)
        for name, tests in comparison.tests.items():
            test = tests["ndcg@10"]
            found[f"{prefix(repeats)}ndcg@10 - {name}"] = Interval(test["difference"], test["low"], test["high"])
    return found


def trees(out: Path, surfaces: Sequence[bool]) -> dict[str, Interval]:
    """LambdaMART in place of the rankers of the cascade in `out`, which stands beside it since that was measured."""
    rival = train_trees(load_run(out), beside(out), progress=False)
    found: dict[str, Interval] = {}
    for repeats in surfaces:
        found |= page_metrics(evaluate_run(rival, repeats=repeats).report, repeats)
    return found


def baseline(name: str, dataset: Dataset) -> dict[str, Interval]:
    """A simple system on both surfaces."""
    found: dict[str, Interval] = {}
    for repeats in (True, False):
        found |= page_metrics(evaluate_counted(name, dataset, repeats=repeats), repeats)
    return found


def page_metrics(report: Report, repeats: bool) -> dict[str, Interval]:
    return {f"{prefix(repeats)}{metric}": report.metrics[metric] for metric in ("ndcg@10", "value@10", "recall@10")}


def prefix(repeats: bool) -> str:
    return "" if repeats else "new "


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bar, and how the demo's cascade, which was trained with repeats, does on new items."""
    gains = {
        "with repeats": {m: i for m, i in arms["cascade"].metrics.items() if m.startswith("ndcg@10 - ")},
        "new items": {
            m: i for m, i in arms["cascade trained for new items"].metrics.items() if m.startswith("new ndcg@10 - ")
        },
    }
    passed = {surface: all(gain.low > 0 for gain in of.values()) for surface, of in gains.items()}
    verdict: Verdict = "holds" if all(passed.values()) else "partly" if any(passed.values()) else "fails"
    told = []
    for surface, of in gains.items():
        closest = min(of, key=lambda metric: of[metric].mean)
        told.append(f"{surface}, closest: {shown(closest, of[closest])}")
    mixed = {m: i for m, i in arms["cascade"].metrics.items() if m.startswith("new ndcg@10 - ")}
    closest = min(mixed, key=lambda metric: mixed[metric].mean)
    told.append(f"the cascade trained with repeats, asked for new items only: {shown(closest, mixed[closest])}")
    return Judgement(verdict, "; ".join(told))


def shown(metric: str, gain: Interval) -> str:
    return f"{metric} {gain.mean:+.4f} ({gain.low:+.4f} to {gain.high:+.4f})"
