"""EPNet on domains of very different size: one model for all, with the domain as a field, and with gates on its input by domain.

`shortlist prove epnet_domains` (wants SHORTLIST_DATA); resumes where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from _ctr import num_parameters
from _gates import as_large, with_items
from _ranking_lab import Training, World, films, judged, scores, trained
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Categorical, FieldTable
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab
from shortlist.layers.gates import GateConfig
from shortlist.metrics import Interval, auc

SHARED, FIELD, WIDER, EPNET = "shared", "domain as a field", "domain as a field, as large as EPNet", "EPNet"
DNN: dict[str, Any] = {"loss": "bce", "use_user_ids": True}
GATED: dict[str, Any] = {**DNN, "gates": GateConfig(epnet=("item.domain",))}
FULL = Training(epochs=3, batch_size=256, lrs=(1e-3, 3e-3), patience=1)
QUICK = Training(epochs=1, batch_size=64, lrs=(1e-2,), patience=2, max_history=20)
LEAST_SHARE, SMALL_SHARE = 0.03, 0.1
GAIN, LOSS = 0.002, 0.001

CLAIM = Claim(
    name="epnet_domains",
    systems=("epnet", "dnn"),
    claim="Gates on the input by domain help small domains more than the domain as one more field does, and cost large ones nothing.",
    data="MovieLens-1M, 2,000 users drawn from 6,040, rating of 4 or more against less (labels of nine in ten events are known; exact "
    "order, no times). The domain of a film is its first genre; "
    f"all with less than {LEAST_SHARE:.0%} of the training rows are one domain",
    protocol="Each user's first 80 % train, 10 % validate, 10 % test; eight consecutive films are one request, which reads the 50 rated "
    "before it and whether each was liked. Embeddings of 32, tower 128-64, ids of users and films and no other field than the domain, "
    "binary cross-entropy, Adam; learning rate (one of two) and epoch of every arm chosen on validation GAUC, test once. EPNet reads the "
    "domain as a field as well; `as large as EPNet` widens both layers of the plain DNN until it has as many parameters. Small domains: "
    f"below {SMALL_SHARE:.0%} of the training rows; AUC inside each domain, mean of the domains",
    bar=f"In the mean of the small domains and of the seeds EPNet's AUC is at least {GAIN} above the equally large DNN with the domain as "
    f"a field, and in the mean of the others at most {LOSS} below it; partly where only one of the two holds",
)


def run(lab: Lab) -> None:
    """Every arm with every seed."""
    # Genres of the planted films are about equally frequent: a twentieth keeps half of them and makes one large domain of the rest.
    world = with_domains(films(None), 0.05) if lab.quick else with_domains(films(lab.data_root, num_users=2_000))
    nothing = with_items(world, items=FieldTable(world.space.items.num_rows))
    arms = {
        SHARED: (nothing, DNN),
        FIELD: (world, DNN),
        WIDER: (world, as_large(DNN, GATED, world)),
        EPNET: (world, GATED),
    }
    for seed in lab.seeds:
        for name, (seen, settings) in arms.items():
            lab.measure(name, seed, partial(measured, lab, world, seen, settings, seed))


def with_domains(world: World, least_share: float = LEAST_SHARE) -> World:
    """The world with one field of items: the domain, 1 for films of no genre and of those with a smaller share of the training rows."""
    listed = world.space.items.columns["attributes"]
    assert isinstance(listed, Jagged)
    has_genre_N = listed.lengths > 0
    first_N = torch.zeros(listed.num_rows, dtype=torch.int64)
    first_N[has_genre_N] = listed.values[listed.offsets[:-1][has_genre_N]]
    count = torch.bincount(first_N[world.train.rows.values], minlength=int(first_N.max()) + 1)
    kept = (count >= least_share * count.sum()).nonzero()[:, 0]
    kept = kept[kept > 0]
    domain_N = 1 + torch.searchsorted(kept, first_N).clamp(max=len(kept) - 1) + 1
    domain_N = torch.where(torch.isin(first_N, kept), domain_N, 1)
    domain_N[0] = 0
    field = Categorical(name="domain", size=len(kept) + 1)
    return with_items(world, items=FieldTable(listed.num_rows, (field,), {"domain": domain_N}))


def measured(
    lab: Lab, world: World, seen: World, settings: Mapping[str, Any], seed: int
) -> dict[str, float | Interval]:
    """One arm, trained on what it sees and tested once, by domain."""
    system, report = trained("dnn", settings, seen, QUICK if lab.quick else FULL, seed)
    score = scores(system, seen, world.test)
    found: dict[str, float | Interval] = {**judged(score, world.test), **by_domain(score, world)}
    return found | {
        "cost:best_epoch": float(report.best_epoch or 0),
        "cost:parameters": float(num_parameters(system)),
        "cost:dense_parameters": float(num_parameters(system, dense=True)),
    }


def by_domain(score: Tensor, world: World) -> dict[str, float]:
    """Mean AUC inside small and inside large domains, and how many test rows the smallest one has."""
    domain_N = world.space.items.columns["domain"]
    assert isinstance(domain_N, Tensor)
    share = torch.bincount(domain_N[world.train.rows.values], minlength=int(domain_N.max()) + 1).float()
    share /= share.sum()
    domain_t = domain_N[world.test.rows.values]
    inside: dict[str, list[float]] = {"small": [], "large": []}
    sizes = []
    for domain in domain_t.unique().tolist():
        mask = domain_t == domain
        if world.test.label[mask].unique().numel() == 2:
            size = "small" if share[domain] < SMALL_SHARE else "large"
            inside[size].append(auc(world.test.label[mask], score[mask]))
            sizes.append(int(mask.sum()))
    means = {f"auc_{size}": float(np.mean(values)) for size, values in inside.items() if values}
    return means | {"domains_small": float(len(inside["small"])), "rows_of_smallest": float(min(sizes))}


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bar against the equally large DNN, the others beside."""
    value = {
        name: {size: np.array(arms[name].per_seed[f"auc_{size}"]) for size in ("small", "large")}
        for name in (SHARED, FIELD, WIDER, EPNET)
    }
    gain = {size: value[EPNET][size] - value[WIDER][size] for size in ("small", "large")}
    shown = "; ".join(f"{name} {v['small'].mean():.4f} and {v['large'].mean():.4f}" for name, v in value.items())
    told = "; ".join(
        f"{size} domains {g.mean():+.4f} ({g.min():+.4f} to {g.max():+.4f} over the seeds)" for size, g in gain.items()
    )
    of = {m: arms[EPNET].metrics[m].mean for m in ("domains_small", "rows_of_smallest")}
    held = [bool(gain["small"].mean() >= GAIN), bool(gain["large"].mean() >= -LOSS)]
    reason = (
        f"EPNet against the equally large DNN with the domain as a field: {told}. AUC inside small and large domains: {shown}. "
        f"{of['domains_small']:.0f} small domains; the smallest has {of['rows_of_smallest']:.0f} test rows."
    )
    return Judgement("holds" if all(held) else "partly" if any(held) else "fails", reason)
