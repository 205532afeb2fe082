"""What the claims about PCF-GNN share: a log cut into history (H), training (T) and evaluation (E), planted or films; AUC of p alone, and
of rankers with and without it.

U users, V items, R rows of a window, t candidates of all requests end to end, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from _ranking_lab import Examples, Training, World, films, scores, trained
from shortlist.data.batches import Batch
from shortlist.data.histories import Histories, Int, Requests, View
from shortlist.data.jagged import Jagged
from shortlist.data.schema import FieldTable, Space
from shortlist.evaluation.evidence import Arm, Judgement, Lab, hold_if
from shortlist.layers.field_matrix import FieldsConfig
from shortlist.layers.pair_statistics import history_window
from shortlist.layers.scoring import HeadConfig
from shortlist.metrics import auc, gauc, logloss
from shortlist.models.ranking.pcf_gnn import PCFGNN
from shortlist.registry import find

HISTORY_SHARE = 0.625
"""Of a user's training films: H is half of all, T three tenths, a tenth validates, E is the last tenth."""
L2 = (0.0, 1e-3)
"""Each is tried; validation decides."""
USER_FIELDS = ("age", "occupation")
PLANTED_PAIRS = ("item*user",)
FILM_PAIRS = ("item*user", "item*user.age", "item*user.occupation")
HEAD = HeadConfig(
    widths=(64, 32), activation="relu", dropout=0.0, use_user_ids=True, id_dropout=0.0, pair_bins=0, loss="bce"
)

BASE, TABLE, PLAIN, GRAPH, WHOLE = "tower on T", "+ table", "+ PCF, K = 0", "+ PCF-GNN", "tower on H and T"
FM, FM_WHOLE = "DeepFM on T", "DeepFM on H and T"
PCF: dict[str, dict[str, Any]] = {
    TABLE: {"statistic": "table"},
    PLAIN: {"num_layers": 0},
    GRAPH: {"num_layers": 1},
}
OTHERS = {BASE: "can", WHOLE: "can", FM: "deepfm", FM_WHOLE: "deepfm"}
ARMS = (BASE, TABLE, PLAIN, GRAPH, WHOLE, FM, FM_WHOLE)
LEAST = 0.003
DOWNSTREAM = (
    "One tower 64-32 over vectors of 16 of all fields for all arms; + table and + PCF give it the standardised logit of each pair's "
    "statistic from H. on H and T: the honest control, which trains on all rows. DeepFM beside. Learning rate (one of two) and epoch by "
    "validation GAUC, tested once"
)
BAR = (
    f"PCF-GNN's mean AUC is at least {LEAST} above the tower's on T and above the table's, with every seed above both. The towers on H and "
    "T stand beside: a claim to beat them is not made"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """Three disjoint windows: `world.view` holds the events of H, `world.train` and `world.valid` are T, `world.test` is E."""

    world: World
    whole: Examples
    """Rows of H and T without those that validate."""
    pairs: tuple[str, ...]
    clicks: tuple[str, ...]
    """Actions that count as clicks."""
    oracle: Tensor | None = None
    """float [t of E]: the true logits, where they are known."""

    @property
    def fields(self) -> FieldsConfig:
        """Ids and what else is known of users and items, for towers."""
        space = self.world.space
        users = [f"user.{f.name}" for f in space.user_fields]
        return FieldsConfig(dim=16, names=("user", "item", *users, *(f"item.{f.name}" for f in space.items.fields)))


def planted(num_users: int = 1_000, num_items: int = 500, num_rows: int = 100_000, rank: int = 4) -> Windows:
    """Clicks by the sum of a user's and an item's bias and an inner product of rank 4, in three windows of as many impressions.

    Users and items come with chances 1 / place^.8, so that some pairs are met often and many never.
    """
    rng = np.random.default_rng(0)

    def drawn(number: int) -> Int:
        chance = 1 / (1 + np.arange(number)) ** 0.8
        return 1 + rng.permutation(number)[rng.choice(number, 3 * num_rows, p=chance / chance.sum())]

    user, item = drawn(num_users), drawn(num_items)
    a_UK, b_VK = rng.standard_normal((num_users + 1, rank)), rng.standard_normal((num_items + 1, rank))
    bias_U, bias_V = rng.standard_normal(num_users + 1), rng.standard_normal(num_items + 1)
    logit = 1.6 * (a_UK[user] * b_VK[item]).sum(1) / rank**0.5 + 0.5 * bias_U[user] + 0.5 * bias_V[item] - 1
    clicked = rng.random(len(logit)) < 1 / (1 + np.exp(-logit))
    history = np.argsort(user[:num_rows], kind="stable")
    histories = Histories(
        offsets=np.searchsorted(user[history], np.arange(num_users + 2)).astype(np.int64),
        item=item[history],
        time=history,
        group=history,
        action=2 - clicked[history].astype(np.int64),
        value=np.ones(num_rows, dtype=np.float32),
    )
    known = torch.arange(num_items + 1) > 0
    space = Space(
        items=FieldTable(num_items + 1), known_items=known, num_users=num_users, actions=("click", "no click")
    )
    users = FieldTable(num_users + 1)
    view = View(histories=histories, space=space, users=users, now=num_rows)

    def rows(first: int, last: int) -> Examples:
        none = np.zeros(last - first, dtype=np.int64)
        requests = Requests(
            user=user[first:last],
            time=np.arange(first, last),
            start=none,
            end=none,
            target_offsets=np.zeros(last - first + 1, dtype=np.int64),
            target=none[:0],
            target_value=none[:0].astype(np.float32),
        )
        offered = Jagged(torch.from_numpy(item[first:last]), torch.arange(last - first + 1))
        return Examples(requests=requests, rows=offered, label=torch.from_numpy(clicked[first:last]).float())

    valid = num_rows + 9 * num_rows // 10
    world = World(
        histories=histories,
        view=view,
        users=users,
        train=rows(num_rows, valid),
        valid=rows(valid, 2 * num_rows),
        test=rows(2 * num_rows, 3 * num_rows),
    )
    oracle = torch.from_numpy(logit[2 * num_rows :])
    return Windows(world=world, whole=rows(0, valid), pairs=PLANTED_PAIRS, clicks=("click",), oracle=oracle)


def film_windows(lab: Lab, num_users: int) -> Windows:
    """ML-1M, labels without times; the first part of each user's training films is H."""
    root, users = (None, None) if lab.quick else (lab.data_root, num_users)
    world = films(root, num_users=users, user_fields=USER_FIELDS)
    events, until_U = history_window(world.view, HISTORY_SHARE)
    requests = world.train.requests
    late = torch.from_numpy(np.flatnonzero(requests.time > until_U.numpy()[requests.user]))
    train = Examples(
        requests=requests.select(late.numpy()),
        rows=world.train.rows.select(late),
        label=world.train.label[world.train.rows.value_index(late)],
    )
    history = replace(world, view=replace(world.view, histories=events), train=train)
    return Windows(world=history, whole=world.train, pairs=FILM_PAIRS, clicks=("liked",))


def model(windows: Windows, seed: int, **settings: Any) -> PCFGNN:
    """A PCF-GNN of these windows with its statistics counted, not yet learned."""
    torch.manual_seed(seed)
    entry = find("pcf-gnn")
    shared = {"pairs": windows.pairs, "clicks": windows.clicks, "fields": windows.fields, "head": HEAD}
    system = entry.cls(entry.config({**shared, **settings}), windows.world.space)
    assert isinstance(system, PCFGNN)
    system.prepare(windows.world.view)
    return system


def batches(world: World, examples: Examples, size: int = 4_096) -> Iterator[Batch]:
    """The examples in order."""
    for part in np.array_split(np.arange(len(examples.requests)), -(-len(examples.requests) // size)):
        yield examples.batch(world, part, 1)


@torch.no_grad()
def p_alone(system: PCFGNN, world: World, examples: Examples) -> Tensor:
    """float32 [t, P]."""
    return torch.cat([system.statistics(batch) for batch in batches(world, examples)])


def seen_in_history(windows: Windows) -> Tensor:
    """bool [t of E, P]: the pair met in H."""
    table, found = model(windows, 0, statistic="table"), []
    for batch in batches(windows.world, windows.world.test):
        rows = batch.candidate_rows
        one_tP, _ = table.pair_nodes.of_items(rows.values)
        other_BP, _ = table.pair_nodes.of_requests(batch)
        found.append(torch.isin(table.pair_nodes.keys(one_tP, other_BP[rows.row_of_value]), table.edge_key))
    return torch.cat(found)


def measured_alone(
    windows: Windows, seen_tP: Tensor, seed: int, tries: tuple[float, ...] = L2, **settings: Any
) -> dict[str, float]:
    """AUC of p without any ranker on E, by pair, all and split by whether the pair met in H; L2 chosen on T's last part."""
    world, best = windows.world, None
    for l2 in tries:
        system = model(windows, seed, l2=l2, **settings)
        system.learn(batches(world, world.train))
        score = auc(world.valid.label, p_alone(system, world, world.valid)[:, 0])
        if best is None or score > best[0]:
            best = score, l2, system
    assert best is not None
    _, l2, system = best
    p_tP, label, found = p_alone(system, world, world.test), world.test.label, {}
    for number, name in enumerate(windows.pairs):
        for part, inside in (("", None), (", seen", seen_tP[:, number]), (", unseen", ~seen_tP[:, number])):
            chosen = torch.ones_like(label, dtype=torch.bool) if inside is None else inside
            if chosen.sum() >= 100:
                found[f"{name}{part}"] = auc(label[chosen], p_tP[chosen, number])
    return {**found, "bytes": float(system.stored_bytes()), "cost:l2": l2}


def measure_downstream(lab: Lab, windows: Windows, training: Training) -> None:
    """Every arm with every seed."""
    for seed in lab.seeds:
        for name in ARMS:
            lab.measure(name, seed, partial(measured_downstream, windows, training, name, seed))


def measured_downstream(windows: Windows, training: Training, name: str, seed: int) -> dict[str, float]:
    """One arm, trained and judged on E."""
    world = windows.world
    settings: dict[str, Any] = {"fields": windows.fields, "head": HEAD}
    if name in PCF:
        system_name = "pcf-gnn"
        settings |= {"pairs": windows.pairs, "clicks": windows.clicks, **PCF[name]}
    else:
        system_name = OTHERS[name]
        settings |= {"pairs": ()} if system_name == "can" else {}
        world = replace(world, train=windows.whole) if name in (WHOLE, FM_WHOLE) else world
    system, report = trained(system_name, settings, world, training, seed)
    score, label = scores(system, world, world.test), world.test.label
    return {
        "auc": auc(label, score),
        "gauc": gauc(label, score, world.test.user_of_row),
        "logloss": logloss(label, score.double().sigmoid()),
        "cost:best_epoch": float(report.best_epoch or 0),
        "cost:rows": float(len(world.train.label)),
    }


def judged_downstream(arms: Mapping[str, Arm]) -> Judgement:
    """The bar of the claims about rankers, and all arms beside."""
    value = {name: np.array(arms[name].per_seed["auc"]) for name in ARMS}
    gains = {other: value[GRAPH] - value[other] for other in (BASE, TABLE)}
    shown = "; ".join(
        f"{name} AUC {found.mean():.4f}, logloss {arms[name].metrics['logloss'].mean:.4f}"
        for name, found in value.items()
    )
    lead = ", ".join(f"{gain.mean():+.4f} ({gain.min():+.4f} at least) over {other}" for other, gain in gains.items())
    reached = all(bool(gain.mean() >= LEAST and (gain > 0).all()) for gain in gains.values())
    return hold_if(reached, f"{shown}. PCF-GNN is {lead}.")
