"""HSTU in the demo's retrieval: beside the systems that only count, and in their place.

`shortlist prove demo_retrieval`; needs no data but the built-in log. About five minutes a seed on one core.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from shortlist.cascade.build import train_cascade
from shortlist.cascade.config import RunConfig
from shortlist.cascade.run import load_run
from shortlist.data.dataset import Dataset, build_dataset
from shortlist.data.datasets import load
from shortlist.evaluation.demo import demo_config
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab
from shortlist.evaluation.runs import beside_baselines, evaluate_run
from shortlist.metrics import Interval

SHIPPED = "as shipped"
COUNTED = demo_config().stages[0].systems
ARMS = {SHIPPED: COUNTED, "HSTU beside": (*COUNTED, "hstu"), "HSTU alone": ("hstu",)}
ALLOWED_S = 120.0

CLAIM = Claim(
    name="demo_retrieval",
    systems=("hstu", "personal-frequency", "item-knn", "ease", "popularity"),
    claim="HSTU belongs in the demo's retrieval: with it the pages get better, and the demo stays within two minutes.",
    data="UCI Online Retail as shipped: 387,841 lines in 18,532 baskets of 4,338 customers on 3,665 items; repeat purchases are the norm",
    protocol="The demo's cascade with three retrievals, 200 candidates and all other settings the same: the counting systems as shipped, "
    "these and HSTU (64 wide, 2 blocks, full softmax, the demo's trainer), HSTU alone. Split by time; every basket of the last tenth is a "
    "request with all earlier baskets as history, repeats allowed. `found` is the share of held-out items among the candidates. `training "
    "seconds` are wall time with one thread, another run on the other core. Three seeds, the test window read once per seed, intervals "
    "over customers.",
    bar="NDCG@10 of the pages with HSTU beside, minus the shipped cascade's, has an interval above 0 in every seed, and training stays "
    f"within {ALLOWED_S:.0f} seconds.",
)
QUICK = ("learning.fit_requests=300", "learning.slices=1", "trainer.epochs=1", "data.max_requests=300")
LIGHT = ("personal-frequency", "lately", "popularity")


def run(lab: Lab) -> None:
    """Every arm on every seed; the shipped cascade first, since the others stand beside it."""
    log, config = load("builtin"), demo_config().override(*(QUICK if lab.quick else ()))
    dataset = build_dataset(log, config.data_settings)
    with tempfile.TemporaryDirectory() as temporary:
        place = lab.scratch or Path(temporary)
        for seed in lab.seeds:
            shipped = place / f"shipped-{seed}"
            for arm, systems in ARMS.items():
                systems = [name for name in systems if not lab.quick or name in (*LIGHT, "hstu")]
                settings = f"retrieval.systems={json.dumps(systems)}", f"trainer.seed={seed}"
                out = shipped if arm == SHIPPED else place / f"{arm}-{seed}"
                lab.measure(arm, seed, partial(measured, config.override(*settings), dataset, out, shipped))


def measured(config: RunConfig, dataset: Dataset, out: Path, shipped: Path) -> dict[str, Interval | float]:
    """The page's metrics, the share of held-out items found, seconds, and the paired difference to the shipped cascade."""
    began = time.perf_counter()
    trained = train_cascade(dataset, config, out, progress=False)
    seconds = time.perf_counter() - began
    mine = evaluate_run(trained)
    found: dict[str, Interval | float] = {m: mine.metrics[m] for m in ("ndcg@10", "recall@10", "value@10")}
    found |= {"found": 1 - mine.lost_at["retrieval"], "training seconds": seconds}
    if out != shipped:
        rival = {SHIPPED: load_run(shipped)}
        test = beside_baselines(trained, mine, True, (), rivals=rival).tests[SHIPPED]["ndcg@10"]
        found["ndcg@10 - shipped"] = Interval(test["difference"], test["low"], test["high"])
    return found


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """Both parts of the bar."""
    beside, alone, shipped = arms["HSTU beside"], arms["HSTU alone"], arms[SHIPPED]
    gain, seconds = beside.metrics["ndcg@10 - shipped"], beside.metrics["training seconds"].mean
    wins, fits = gain.low > 0, seconds <= ALLOWED_S
    ndcg = {name: arm.metrics["ndcg@10"].mean for name, arm in arms.items()}
    share = {name: arm.metrics["found"].mean for name, arm in arms.items()}
    told = (
        f"NDCG@10 with HSTU beside {gain.mean:+.4f} ({gain.low:+.4f} to {gain.high:+.4f}) over the shipped {ndcg[SHIPPED]:.4f}, alone "
        f"{alone.metrics['ndcg@10 - shipped'].mean:+.4f}; held-out items found: shipped {share[SHIPPED]:.1%}, beside "
        f"{share['HSTU beside']:.1%}, alone {share['HSTU alone']:.1%}; training {seconds:.0f} s where the shipped one takes "
        f"{shipped.metrics['training seconds'].mean:.0f} s."
    )
    return Judgement("holds" if wins and fits else "partly" if wins else "fails", told)
