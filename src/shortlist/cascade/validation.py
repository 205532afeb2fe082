"""A trained cascade on validation requests: quality at the page, what each stage lost, what each stage cost."""

from __future__ import annotations

from typing import Any

import torch

from shortlist.cascade.attribution import attribute_losses, lost_at
from shortlist.cascade.cascade import Cascade
from shortlist.cascade.lessons import chunks, make_batch
from shortlist.cascade.meter import Meter
from shortlist.data.dataset import Dataset
from shortlist.data.histories import Requests
from shortlist.errors import ConfigError
from shortlist.metrics import ranking


def validated(cascade: Cascade, dataset: Dataset, requests: Requests) -> dict[str, Any]:
    """Plain values for JSON: number of requests, ndcg, recall and hit rate at the page, `lost_at` and `cost` by stage.

    Raises ConfigError where a stage does not work: while serving it would be passed over, but what was just trained must not.
    """
    k = cascade.config.surface.k
    meter, lost, pages = Meter(), [], []
    for index in chunks(len(requests), dataset.num_items):
        asked = requests.select(index)
        page = cascade.run(make_batch(dataset, asked, cascade.max_history))
        for trace in page.traces:
            for problem in trace.problems:
                raise ConfigError(f"the trained cascade does not work: {problem.reason}")
        meter.add(page.chain, page.reports)
        lost.append(lost_at(page, asked))
        pages.append(page.rows.cpu())
    judged = ranking.judge(torch.cat(pages).numpy(), requests.target, requests.target_offsets)
    stages = meter.summary().stages
    return {
        "requests": len(requests),
        f"ndcg@{k}": float(ranking.ndcg(judged, k).mean()),
        f"recall@{k}": float(ranking.recall(judged, k).mean()),
        f"hr@{k}": float(ranking.hit_rate(judged, k).mean()),
        "lost_at": attribute_losses([stage.stage for stage in stages], lost),
        "cost": {s.stage: {"ms": s.mean_ms, "mflop": s.mean_mflop} for s in stages},
    }
