"""What the claims about click models on tabular logs share: Frappe, the Criteo sample, FuxiCTR's training rule, trivial baselines.

Every row is one request with one candidate: the item is the candidate, the user asks, all other columns are context.

    table     train, valid and test frames of one log, and which columns are the label, the user and the item
    world_of  the same as requests: values that training does not hold are the unknown value 0 of their column
    trained   one ranker by the rule of the BARS leaderboards ("Open Benchmarking for Click-Through Rate Prediction", CIKM 2021)

R rows, n items, F columns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from _ranking_lab import Examples, World
from shortlist.data.batches import Batch, Candidates
from shortlist.data.histories import Histories, Requests, View
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Categorical, FieldTable, Numeric, Space
from shortlist.metrics import Interval, auc, auc_per_user, bootstrap_ratio, logloss
from shortlist.models.base import Phase, Ranker
from shortlist.registry import find
from shortlist.training.config import TrainerConfig
from shortlist.training.context import deterministic
from shortlist.training.optimisers import build_optimisers, clip_gradients
from shortlist.training.sources import CandidateSource
from shortlist.training.trainer import fit

PARTS = ("train", "valid", "test")
Change = Callable[[Ranker], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """One log, split."""

    train: pl.DataFrame
    valid: pl.DataFrame
    test: pl.DataFrame
    label: str = "label"
    user: str | None = "user"
    """None where nobody is named."""
    item: str | None = "item"
    """None where no item is named: every row then offers the same one."""
    numeric: tuple[str, ...] = ()
    """Columns that stay numbers, centred and scaled by training; all others are categories."""
    min_count: int = 1
    """Rarer values of a column in training are unknown."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The F columns that are read, in order."""
        return tuple(c for c in self.train.columns if c != self.label)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """The leaderboards' rule of training: mean cross-entropy, decay of whole embedding tables at every step, and a rate that falls by
    ten whenever an epoch does not improve AUC - logloss on validation; after `patience` such epochs in a row the best one stands."""

    batch_size: int = 4096
    lr: float = 1e-3
    table_l2: float = 0.05
    """L: the loss gains L / 2 times the squares of ALL rows of all embedding tables, read or not."""
    epochs: int = 100
    patience: int = 2
    clip_norm: float = 10.0
    init_std: float | None = 1e-4
    """Embeddings start this small and linear maps as Xavier normal with bias 0; None = as the system makes them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """How a training went."""

    epochs: int
    best_epoch: int
    best_score: float
    """AUC - logloss on validation."""


def frappe(root: Path | None) -> Table:
    """Frappe_x1 with redrawn training negatives, 202,027 / 57,722 / 28,860 rows of ten columns; planted without a root.

    Validation and test are the benchmark's own files. Training positives are exact; which items the negatives offer is drawn anew by
    the rule of the known ones (uniform over items that the user never used), so figures are near published ones, not equal.
    """
    if root is None:
        return planted_table()
    names = {"train": "train_pos_exact_neg_resampled", "valid": "valid", "test": "test"}
    train, valid, test = (pl.read_parquet(root / "frappe" / f"frappe_{names[part]}.parquet") for part in PARTS)
    return Table(train=train, valid=valid, test=test)


def criteo_sample(root: Path | None, seed: int = 0) -> Table:
    """80,000 rows of Criteo, split 8:1:1 at random; numbers x become floor(log2 x), 1 up to 2, as in Criteo_x4; planted without a root."""
    if root is None:
        return replace(planted_table(), user=None, item=None)
    rows = pl.read_parquet(root / "criteo" / "criteo_80k_hashed.parquet")
    numbers = [f"i{i}" for i in range(1, 14)]
    bucket = [pl.when(pl.col(c) > 2).then(pl.col(c).log(2).floor()).otherwise(1).cast(pl.Int64) for c in numbers]
    # A missing number is a value of its own, -1, like a missing category.
    rows = rows.with_columns(
        *[pl.when(pl.col(c).is_null()).then(-1).otherwise(b).alias(c) for c, b in zip(numbers, bucket, strict=True)]
    ).fill_null(-1)
    part = np.digitize(np.random.default_rng(seed).random(len(rows)), [0.8, 0.9])
    train, valid, test = (rows.filter(pl.Series(part == number)) for number in range(len(PARTS)))
    return Table(train=train, valid=valid, test=test, user=None, item=None, min_count=2)


def planted_table(num_rows: int = 6_000, num_users: int = 40, num_items: int = 60, seed: int = 0) -> Table:
    """A log in which only pairs of columns tell: users of five kinds like items of five kinds, at two of four hours; for quick forms."""
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, num_users, num_rows), rng.integers(0, num_items, num_rows)
    hour, noise = rng.integers(0, 4, num_rows), rng.integers(0, 50, num_rows)
    likes = np.sign(rng.standard_normal((5, 5)))[user % 5, item % 5] * np.where(hour % 2 == user % 2, 1, 0.3)
    label = (rng.random(num_rows) < 1 / (1 + np.exp(-3 * likes))).astype(np.int64)
    columns = {"label": label, "user": user, "item": item, "hour": hour, "cost": item % 3, "noise": noise}
    rows = pl.DataFrame(columns)
    first, second = int(0.7 * num_rows), int(0.85 * num_rows)
    return Table(train=rows[:first], valid=rows[first:second], test=rows[second:])


def world_of(table: Table) -> World:
    """The table as requests with one candidate each."""
    vocabulary = {c: _vocabulary(table.train[c], table.min_count) for c in table.columns if c not in table.numeric}
    num_users = len(vocabulary[table.user]) if table.user else 0
    num_items = len(vocabulary[table.item]) if table.item else 1
    context = [c for c in table.columns if c not in (table.user, table.item)]
    scale = {c: (float(table.train[c].mean()), float(table.train[c].std()) or 1.0) for c in table.numeric}  # type: ignore[arg-type]
    known = torch.ones(num_items + 1, dtype=torch.bool)
    known[0] = False
    space = Space(
        items=FieldTable(num_items + 1),
        known_items=known,
        num_users=num_users,
        context_fields=tuple(
            Numeric(name=c) if c in scale else Categorical(name=c, size=len(vocabulary[c])) for c in context
        ),
        has_clock=False,
    )

    def examples(rows: pl.DataFrame) -> Examples:
        codes = {c: _codes(rows[c], vocabulary[c]) for c in vocabulary}
        none = np.zeros(len(rows), dtype=np.int64)
        numbers = {
            c: ((rows[c].cast(pl.Float32).fill_null(mean) - mean) / std).to_numpy() for c, (mean, std) in scale.items()
        }
        requests = Requests(
            user=codes[table.user] if table.user else none,
            time=none,
            start=none,
            end=none,
            target_offsets=np.zeros(len(rows) + 1, dtype=np.int64),
            target=none[:0],
            target_value=np.zeros(0, dtype=np.float32),
            context={c: numbers[c] if c in scale else codes[c] for c in context},
        )
        item = torch.from_numpy(codes[table.item]) if table.item else torch.ones(len(rows), dtype=torch.int64)
        label = torch.from_numpy(rows[table.label].cast(pl.Float32).to_numpy().copy())
        return Examples(requests=requests, rows=Jagged(item, torch.arange(len(rows) + 1)), label=label)

    users = FieldTable(num_users + 1)
    histories = Histories.empty(num_users)
    return World(
        histories=histories,
        view=View(histories=histories, space=space, users=users, now=0),
        users=users,
        train=examples(table.train),
        valid=examples(table.valid),
        test=examples(table.test),
    )


def _vocabulary(column: pl.Series, min_count: int) -> NDArray[Any]:
    """Distinct values of training that occur often enough, sorted; value number i has code i + 1."""
    values, counts = np.unique(column.to_numpy(), return_counts=True)
    return values[counts >= min_count]


def _codes(column: pl.Series, vocabulary: NDArray[Any]) -> NDArray[np.int64]:
    """[R] codes, 0 where the value is not in the vocabulary."""
    values = column.to_numpy()
    place = np.searchsorted(vocabulary, values).clip(max=max(len(vocabulary) - 1, 0))
    found = vocabulary[place] == values if len(vocabulary) else np.zeros(len(values), dtype=bool)
    return np.where(found, place + 1, 0).astype(np.int64)


def with_ids_as_fields(world: World) -> World:
    """Ids of users and items once more as fields, for systems that read no ids, such as boosted trees."""
    space, number = world.space, torch.arange(world.space.num_items + 1)
    item = Categorical(name="item_code", size=max(space.num_items, 1))
    user = Categorical(name="user_code", size=max(space.num_users, 1))
    wider = replace(
        space,
        items=FieldTable(space.num_items + 1, (item,), {"item_code": number}),
        context_fields=(*space.context_fields, user),
    )

    def told(examples: Examples) -> Examples:
        requests = examples.requests
        context = {**requests.context, "user_code": requests.user}
        return Examples(requests=replace(requests, context=context), rows=examples.rows, label=examples.label)

    return replace(
        world,
        view=replace(world.view, space=wider),
        train=told(world.train),
        valid=told(world.valid),
        test=told(world.test),
    )


def source_of(world: World, batch_size: int, seed: int) -> CandidateSource:
    """Batches of the training rows, shuffled each epoch."""
    return CandidateSource(
        world.histories,
        world.users,
        world.train.requests,
        Candidates(rows=world.train.rows),
        {"target": world.train.label},
        batch_size=batch_size,
        max_history=1,
        only_chosen=False,
        seed=seed,
    )


def trained(
    name: str, settings: Mapping[str, Any], world: World, recipe: Recipe, seed: int, *, change: Change | None = None
) -> tuple[Ranker, Course]:
    """A ranker trained by the recipe, at its best epoch on validation.

    Args:
        name: registered name.
        settings: over the system's defaults; "bce" is forced by rows with one candidate.
        change: applied to the system before training.
    """
    torch.manual_seed(seed)
    entry = find(name)
    system = entry.cls(entry.config({**settings}), world.space)
    assert isinstance(system, Ranker)
    system.prepare(world.view)
    if recipe.init_std is not None:
        start_small(system, recipe.init_std)
    if change is not None:
        change(system)
    source = source_of(world, recipe.batch_size, seed)
    with deterministic(True):
        *earlier, last = system.phases()
        for phase in earlier:
            assert phase.learn is not None, (
                f"{name}: phase {phase.name!r} takes gradient steps, which the recipe has not"
            )
            phase.learn(source.batches(0))
        return system, _descend(system, last, source, world, recipe)


def _descend(system: Ranker, phase: Phase, source: CandidateSource, world: World, recipe: Recipe) -> Course:
    """Gradient steps by the recipe; leaves the system at its best epoch."""
    optimisers = build_optimisers(system, TrainerConfig(lr=recipe.lr, optimiser="adam"))
    best, best_epoch, best_state, failures, epoch = -np.inf, 0, copy.deepcopy(system.state_dict()), 0, 0
    while epoch < recipe.epochs and failures < recipe.patience:
        system.train()
        for batch in source.batches(epoch):
            loss = torch.stack(list(phase.losses(batch).values())).sum()
            if recipe.table_l2:
                loss = loss + recipe.table_l2 / 2 * squares_of_tables(system)
            for optimiser in optimisers:
                optimiser.zero_grad()
            loss.backward()
            clip_gradients(system.parameters(), recipe.clip_norm)
            for optimiser in optimisers:
                optimiser.step()
        epoch += 1
        found = quality(system, world, world.valid)
        score = found["auc"] - found["logloss"]
        if score > best + 1e-6:
            best, best_epoch, best_state, failures = score, epoch, copy.deepcopy(system.state_dict()), 0
        else:
            failures += 1
            for group in (group for optimiser in optimisers for group in optimiser.param_groups):
                group["lr"] = max(group["lr"] / 10, 1e-6)
    system.load_state_dict(best_state)
    system.eval()
    return Course(epochs=epoch, best_epoch=best_epoch, best_score=float(best))


def boosted(world: World, seed: int, **settings: Any) -> Ranker:
    """LambdaMART, which on single rows is boosted trees with a logistic loss, with the ids as categories. Score in `with_ids_as_fields`."""
    wider = with_ids_as_fields(world)
    entry = find("lambdamart")
    system = entry.cls(entry.config({"seed": seed, **settings}), wider.space)
    assert isinstance(system, Ranker)
    source = source_of(wider, 4096, seed)
    fit(system, wider.view, lambda phase: source, config=TrainerConfig(seed=seed), progress=False)
    return system


def embeddings_of(system: nn.Module, *, of_fields: bool = False) -> list[nn.Parameter]:
    """Weights of all look-up tables, each once; `of_fields` leaves out those that hold micro networks and their feeds (CAN)."""
    tables = [
        m.weight
        for name, m in system.named_modules()
        if isinstance(m, nn.Embedding | nn.EmbeddingBag) and not (of_fields and "co_action" in name)
    ]
    return list({id(weight): weight for weight in tables}.values())  # type: ignore[arg-type]


def squares_of_tables(system: nn.Module) -> Tensor:
    """Sum of the squares of all rows of all tables of fields, a scalar.

    Decay of a micro network shrinks its output with the power of its layers, so co-action tables are left out.
    """
    return torch.stack([weight.square().sum() for weight in embeddings_of(system, of_fields=True)]).sum()


def start_small(system: nn.Module, std: float) -> None:
    """The leaderboards' start: embeddings of fields normal with this deviation, linear maps Xavier normal with bias 0.

    What a system starts at 0 on purpose, such as the last map of a gate, stays 0, and micro networks stay as they are.
    """
    for weight in embeddings_of(system, of_fields=True):
        if weight.any():
            nn.init.normal_(weight, std=std)
    for module in system.modules():
        if isinstance(module, nn.Linear) and module.weight.any():
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def num_parameters(system: nn.Module, *, dense: bool = False) -> int:
    """Parameters of the system; `dense` leaves out the look-up tables."""
    tables = {id(weight) for weight in embeddings_of(system)}
    return sum(p.numel() for p in system.parameters() if not (dense and id(p) in tables))


@torch.inference_mode()
def logits(system: Ranker, world: World, examples: Examples, batch_size: int = 8192) -> Tensor:
    """float32 [R]."""
    parts = np.array_split(np.arange(len(examples.requests)), -(-len(examples.requests) // batch_size))
    return torch.cat([system.score(batch_of(world, examples, part))["target"] for part in parts])


def batch_of(world: World, examples: Examples, index: NDArray[np.int64]) -> Batch:
    """The given rows as a batch, labels included."""
    batch = examples.batch(world, index, max_history=1)
    return replace(batch, labels={"target": examples.label[torch.from_numpy(index)]})


def quality(system: Ranker, world: World, examples: Examples) -> dict[str, float]:
    """AUC and logloss over all rows."""
    system.eval()
    return judged(logits(system, world, examples), examples.label)


def judged(logit: Tensor, label: Tensor) -> dict[str, float]:
    """AUC and logloss of given logits [R]."""
    return {"auc": auc(label, logit), "logloss": logloss(label, logit.double().sigmoid())}


def gauc_of(logit: Tensor, examples: Examples) -> Interval:
    """AUC per user, weighed by rows, with its interval over users."""
    per_user = auc_per_user(examples.label, logit, examples.user_of_row)
    weight = per_user.impressions_U.astype(np.float64)
    return bootstrap_ratio(per_user.auc_U * weight, weight, seed=0, resamples=1000)


# --- what can be had without learning anything ---


def trivial_scores(world: World, cost: str = "cost") -> dict[str, Tensor]:
    """Scores [R] of the test rows by four rules, each from training positives alone.

    The item's popularity; whether this user had this item; that, popularity breaking ties; and that, with rows whose `cost` is not the
    item's own put last (an app has one cost, but a sampled negative keeps the cost of the row that it was made from).
    """
    n = world.space.num_items + 1
    train, test = world.train, world.test
    is_positive = train.label.numpy() > 0
    item, user = train.rows.values.numpy()[is_positive], train.requests.user[is_positive]
    popularity_N = np.bincount(item, minlength=n).astype(np.float64)
    asked_item, asked_user = test.rows.values.numpy(), test.requests.user
    popular = popularity_N[asked_item]
    seen = np.isin(asked_user * n + asked_item, user * n + item)
    rank = popular / (popularity_N.max() + 1)
    scores = {
        "popularity": popular,
        "used before": seen.astype(np.float64),
        "used before, then popularity": seen + rank,
    }
    if cost in train.requests.context:
        paid = train.requests.context[cost][is_positive].astype(np.int64)
        votes = np.zeros((n, int(paid.max(initial=0)) + 2))
        np.add.at(votes, (item, paid), 1)
        asked = test.requests.context[cost].astype(np.int64).clip(max=votes.shape[1] - 1)
        contradicts = (popular > 0) & (votes.argmax(1)[asked_item] != asked)
        scores["used before, popularity, cost"] = seen + rank - 2 * contradicts
    return {name: torch.from_numpy(np.asarray(score)) for name, score in scores.items()}


def hard_rows(world: World) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Test rows whose (user, item) was not positive in training, and weights that match the negatives' popularity to the positives'.

    Neither "used before" nor popularity tells these apart: in every bin of floor(log2(1 + popularity)) both classes weigh the same.
    Bins with one class only are left out.
    """
    scores = trivial_scores(world)
    row = np.flatnonzero(scores["used before"].numpy() == 0)
    bin_of_row = np.log2(1 + scores["popularity"].numpy()[row]).astype(np.int64)
    positive = world.test.label.numpy()[row] > 0
    counts = np.stack([np.bincount(bin_of_row[side], minlength=64) for side in (positive, ~positive)]).astype(float)
    both = np.asarray((counts > 0).all(0))
    share = np.divide(counts[0], counts[1], out=np.zeros(counts.shape[1]), where=both)
    kept = both[bin_of_row]
    weight = np.where(positive, 1.0, share[bin_of_row])
    return row[kept], weight[kept]


def hard_auc(logit: Tensor, world: World, hard: tuple[NDArray[np.int64], NDArray[np.float64]]) -> float:
    """AUC on `hard_rows`, by their weights."""
    row, weight = hard
    return auc(world.test.label[torch.from_numpy(row)], logit[torch.from_numpy(row)], weight)


def measured_trivial(world: World) -> Iterable[tuple[str, dict[str, float]]]:
    """AUC, also on the hard rows, of every rule of `trivial_scores`."""
    hard = hard_rows(world)
    for name, score in trivial_scores(world).items():
        yield name, {"auc": auc(world.test.label, score), "hard_auc": hard_auc(score, world, hard)}
