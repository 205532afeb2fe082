"""What the claims about target attention share: labelled requests from public logs, one training, AUC and GAUC, an auxiliary loss for all.

    films       each rated film is liked (4 or 5) or not; 8 consecutive films of a user are one request, read with what was rated before
    purchases   each purchase against items drawn from the catalogue, read with what was bought on earlier days

R requests, E events of all histories, t candidates of all requests end to end, n items.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import softplus

from shortlist.data.batches import Batch, Candidates, request_batch
from shortlist.data.datasets import load
from shortlist.data.histories import Histories, Int, Requests, View
from shortlist.data.jagged import Jagged
from shortlist.data.samplers import PopularitySampler, UniformSampler, draw_outside
from shortlist.data.schema import Categorical, FieldTable, Space
from shortlist.data.schema import Sequence as SequenceField
from shortlist.metrics import Interval, auc, auc_per_user, bootstrap_ratio, gauc
from shortlist.models.base import Losses, Ranker, RequestShape, System
from shortlist.models.ranking.dien import draw_negatives, next_positions
from shortlist.registry import find
from shortlist.training.config import TrainerConfig
from shortlist.training.sources import CandidateSource
from shortlist.training.trainer import TrainReport, fit

BLOCK = 8
PARTS = ("train", "valid", "test")


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """Labelled requests."""

    requests: Requests
    rows: Jagged
    label: Tensor
    """float32 [t]."""

    @property
    def user_of_row(self) -> Int:
        """[t]."""
        user: Int = self.requests.user[self.rows.row_of_value.numpy()]
        return user

    def batch(self, world: World, index: Int, max_history: int) -> Batch:
        """The given requests as a batch."""
        batch = request_batch(world.histories, world.users, self.requests.select(index), max_history=max_history)
        return batch.with_candidates(self.rows.select(torch.from_numpy(index)))


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """A log and what is asked of it."""

    histories: Histories
    view: View
    """What systems prepare on: events of the training part."""
    users: FieldTable
    train: Examples
    valid: Examples
    test: Examples

    @property
    def space(self) -> Space:
        """Of the view."""
        return self.view.space


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """The same for every arm of a claim."""

    epochs: int
    batch_size: int
    lrs: tuple[float, ...] = (1e-3,)
    """Each is tried; validation decides."""
    patience: int = 2
    max_history: int = 50


def films(root: Path | None, *, num_users: int | None = None, user_fields: tuple[str, ...] = ()) -> World:
    """ML-1M in the exact order of each user, without times: liked = rating of 4 or 5, where the label is known; planted without a root.

    A user's first eighty percent train, the next ten validate, the last ten test. Whether a past film was liked is read as its action.
    `user_fields` names columns of users to read as categories.
    """
    if root is None:
        events, items = planted_films()
        people = events.select("user_id", *((pl.col("user_id") % 5).alias(name) for name in user_fields)).unique()
    else:
        log = load("ml-1m", root)
        assert log.items is not None
        assert log.users is not None
        people = log.users
        items = log.items.select("item_id", attributes="genres")
        events = log.events.filter(pl.col("rating_le3").is_not_null()).select(
            "user_id", "item_id", liked=~pl.col("rating_le3")
        )
    if num_users is not None:
        chosen = events["user_id"].unique().sort().sample(num_users, seed=0)
        events = events.filter(pl.col("user_id").is_in(chosen.implode()))
    events = events.sort("user_id", maintain_order=True)
    events = events.with_columns(place=pl.int_range(pl.len()).over("user_id"), length=pl.len().over("user_id"))
    events = events.with_columns(
        group=pl.int_range(pl.len()),
        time=pl.col("place"),
        action=2 - pl.col("liked").cast(pl.Int64),
        part=(pl.col("place") >= 0.8 * pl.col("length")).cast(pl.Int64)
        + (pl.col("place") >= 0.9 * pl.col("length")).cast(pl.Int64),
    )
    histories, item_table = _histories(events, items)
    place, part, user = (events[c].to_numpy() for c in ("place", "part", "user_id"))
    opens = np.flatnonzero(np.diff(part, prepend=-1) | np.diff(user, prepend=-1))
    since = np.arange(len(part)) - opens[np.searchsorted(opens, np.arange(len(part)), side="right") - 1]
    first = np.flatnonzero(since % BLOCK == 0)
    lengths = np.diff(first, append=len(part))
    label = torch.from_numpy(events["liked"].cast(pl.Float32).to_numpy().copy())
    rows = Jagged.from_lengths(torch.from_numpy(histories.item.copy()), torch.from_numpy(lengths))
    has_past = place[first] > 0
    requests = _requests(histories, first)
    parts = [_kept(requests, rows, label, has_past & (part[first] == p)) for p in range(3)]
    world = _world(histories, item_table, part == 0, parts, actions=("liked", "not liked"), has_clock=False)
    present = events.select(pl.col("user_id").unique(maintain_order=True))
    return _with_user_fields(world, present.join(people, on="user_id", how="left", maintain_order="left"), user_fields)


def purchases(
    root: Path | None,
    name: str,
    *,
    negatives: tuple[int, int],
    max_per_user: int = 5,
    min_history: int = 1,
    split: str = "last",
    seed: int = 0,
) -> World:
    """A log of purchases; a request asks for the last item of a day's group against items that the user has not had up to then.

    Args:
        root: folder of public data; None = a planted log.
        name: data set.
        negatives: how many uniform ones and how many by popularity per request.
        max_per_user: newest training requests per user.
        min_history: events before the request.
        split: "last": a user's last group tests, the one before validates; "user": one request per user, the last group, and users are
            drawn eight to one to one.
        seed: of negatives and users.
    """
    if root is None:
        events, items = planted_purchases()
    else:
        log = load(name, root)
        assert log.items is not None
        items = log.items.select("item_id", "attributes")
        events = log.events.select("user_id", "item_id", time=pl.col("timestamp").dt.epoch("s"), group="group_id")
    return next_choices(
        events,
        items,
        negatives=negatives,
        max_per_user=max_per_user,
        min_history=min_history,
        split=split,
        seed=seed,
    )


def next_choices(
    events: pl.DataFrame,
    items: pl.DataFrame,
    *,
    negatives: tuple[int, int],
    max_per_user: int = 5,
    min_history: int = 1,
    split: str = "last",
    seed: int = 0,
) -> World:
    """As `purchases`, of events (user_id, item_id, time, group) in order of time per user and items (item_id, attributes)."""
    events = events.sort("user_id", maintain_order=True).with_columns(action=pl.lit(1))
    events = events.with_columns(group=pl.struct("user_id", "group").rle_id().cast(pl.Int64))
    group = events["group"].to_numpy()
    histories, item_table = _histories(events, items)
    first = np.flatnonzero(np.diff(group, prepend=-1))
    target = np.append(first[1:], len(group)) - 1
    requests = _requests(histories, first)
    # Place of each group from the user's last: 0, 1, 2, ...
    owner = requests.user
    last = np.searchsorted(owner, owner, side="right") - 1
    from_end = last - np.arange(len(owner))
    rng = np.random.default_rng(seed)
    if split == "user":
        drawn = np.digitize(rng.random(histories.num_users + 1), [0.8, 0.9])[owner]
        part = np.where(from_end > 0, -1, drawn)
        is_training = (drawn == 0)[group]
    else:
        part = np.where(from_end > 1 + max_per_user, -1, np.where(from_end == 0, 2, np.where(from_end == 1, 1, 0)))
        is_training = (from_end > 1)[group]
    part = np.where(requests.end - requests.start < min_history, -1, part)
    kept = np.flatnonzero(part >= 0)
    requests, part, target = requests.select(kept), part[kept], target[kept]
    rows, label = _with_negatives(histories, requests, histories.item[target], is_training, negatives, seed)
    parts = [_kept(requests, rows, label, part == p) for p in range(3)]
    return _world(histories, item_table, is_training, parts, actions=("event",), has_clock=True)


def _with_negatives(
    histories: Histories,
    requests: Requests,
    target_R: Int,
    is_training: NDArray[np.bool_],
    numbers: tuple[int, int],
    seed: int,
) -> tuple[Jagged, Tensor]:
    """The target and its negatives per request, in random order so that no place tells; labels [t]."""
    generator = torch.Generator().manual_seed(seed)
    counts_N = torch.bincount(torch.from_numpy(histories.item[is_training]), minlength=int(histories.item.max()) + 1)
    past = request_batch(histories, FieldTable(histories.num_users + 1), requests, max_history=1 << 30).history.items
    owner = torch.arange(len(requests))
    key = torch.cat([past.row_of_value, owner])
    met = torch.cat([past.values, torch.from_numpy(target_R)])[key.argsort(stable=True)]
    forbidden = Jagged.from_lengths(met, past.lengths + 1)
    drawn = [torch.from_numpy(target_R)[:, None]]
    for sampler, number in (
        (UniformSampler.of_mask(counts_N > 0), numbers[0]),
        (PopularitySampler.of_counts(counts_N), numbers[1]),
    ):
        if number:
            drawn.append(draw_outside(sampler, forbidden, owner, number, generator, rounds=50))
    rows_RC = torch.cat(drawn, dim=1)
    order_RC = torch.rand(rows_RC.shape, generator=generator).argsort(1)
    label_RC = (order_RC == 0).float()
    return Jagged.from_padded(
        rows_RC.gather(1, order_RC), torch.ones_like(rows_RC, dtype=torch.bool)
    ), label_RC.flatten()


def _histories(events: pl.DataFrame, items: pl.DataFrame) -> tuple[Histories, FieldTable]:
    """Histories of events sorted by user (user_id, item_id, time, group, action), and the items with their attributes."""
    codes = items.sort("item_id").with_row_index("row", offset=1)
    item = events.select("item_id").join(
        codes.select("item_id", "row"), on="item_id", how="left", maintain_order="left"
    )
    user = events["user_id"].rle_id().to_numpy().astype(np.int64) + 1
    offsets = np.searchsorted(user, np.arange(int(user.max()) + 2)).astype(np.int64)
    histories = Histories(
        offsets=offsets,
        item=item["row"].to_numpy().astype(np.int64),
        time=events["time"].to_numpy().astype(np.int64),
        group=events["group"].to_numpy().astype(np.int64),
        action=events["action"].to_numpy().astype(np.int64),
        value=np.ones(len(user), dtype=np.float32),
    )
    listed = codes["attributes"].fill_null([])
    words = listed.explode().drop_nulls()
    names = words.unique().sort()
    if not len(names):
        return histories, FieldTable(len(codes) + 1)
    code = words.replace_strict(names, pl.Series(range(1, len(names) + 1)), return_dtype=pl.Int64)
    lengths = torch.from_numpy(np.append(0, listed.list.len().to_numpy()).astype(np.int64))
    column = Jagged.from_lengths(torch.from_numpy(code.to_numpy().copy()), lengths)
    field = SequenceField(name="attributes", size=len(names))
    return histories, FieldTable(len(codes) + 1, (field,), {"attributes": column})


def _requests(histories: Histories, first: Int) -> Requests:
    """Requests made at the events first [R], of what came before them."""
    user = histories.user_of_event[first]
    return Requests(
        user=user,
        time=histories.time[first],
        start=histories.offsets[user],
        end=first.astype(np.int64),
        target_offsets=np.zeros(len(first) + 1, dtype=np.int64),
        target=np.zeros(0, dtype=np.int64),
        target_value=np.zeros(0, dtype=np.float32),
    )


def _kept(requests: Requests, rows: Jagged, label: Tensor, mask_R: NDArray[np.bool_]) -> Examples:
    index = torch.from_numpy(np.flatnonzero(mask_R))
    return Examples(
        requests=requests.select(index.numpy()), rows=rows.select(index), label=label[rows.value_index(index)]
    )


def _world(
    histories: Histories,
    items: FieldTable,
    is_training: NDArray[np.bool_],
    parts: Sequence[Examples],
    *,
    actions: tuple[str, ...],
    has_clock: bool,
) -> World:
    trained = histories.keep(is_training)
    known = torch.bincount(torch.from_numpy(trained.item), minlength=items.num_rows) > 0
    known[0] = False
    space = Space(items=items, known_items=known, num_users=histories.num_users, actions=actions, has_clock=has_clock)
    users = FieldTable(histories.num_users + 1)
    view = View(histories=trained, space=space, users=users, now=int(histories.time.max()))
    return World(histories=histories, view=view, users=users, train=parts[0], valid=parts[1], test=parts[2])


def _with_user_fields(world: World, people: pl.DataFrame, names: tuple[str, ...]) -> World:
    """The same with columns of its users, one row each in their order, as categories."""
    fields, columns = [], {}
    for name in names:
        values, code = np.unique(people[name].to_numpy(), return_inverse=True)
        fields.append(Categorical(name=name, size=len(values)))
        columns[name] = torch.from_numpy(np.append(0, code + 1))
    users = FieldTable(world.users.num_rows, tuple(fields), columns)
    space = replace(world.space, user_fields=tuple(fields))
    return replace(world, users=users, view=replace(world.view, users=users, space=space))


def trained(
    name: str,
    settings: Mapping[str, Any],
    world: World,
    training: Training,
    seed: int,
    *,
    use_fields: bool = True,
    change: Callable[[Ranker], None] | None = None,
    after_epoch: Callable[[Ranker], None] | None = None,
) -> tuple[Ranker, TrainReport]:
    """A ranker trained with each learning rate; the one with the best validation GAUC, at its best epoch.

    Args:
        name: registered name.
        use_fields: let it see the items' attributes.
        change: applied to the system before training.
        after_epoch: sees the system after every epoch, before the validation.
    """
    entry, best, space = find(name), None, world.space
    if not use_fields:
        space = replace(space, items=FieldTable(space.items.num_rows))
    for lr in training.lrs:
        torch.manual_seed(seed)
        known = entry.cls.Config.__dataclass_fields__
        length = {"max_history": training.max_history} if "max_history" in known else {}
        system = entry.cls(entry.config({**length, **settings}), space)
        if change is not None:
            change(system)

        def validate(system: System) -> float:
            assert isinstance(system, Ranker)
            if after_epoch is not None:
                after_epoch(system)
            return gauc(world.valid.label, scores(system, world, world.valid), world.valid.user_of_row)

        source = CandidateSource(
            world.histories,
            world.users,
            world.train.requests,
            Candidates(rows=world.train.rows),
            {"target": world.train.label},
            batch_size=training.batch_size,
            max_history=training.max_history,
            only_chosen=False,
            seed=seed,
        )
        config = TrainerConfig(
            epochs=training.epochs,
            batch_size=training.batch_size,
            lr=lr,
            patience=training.patience,
            optimiser="adam",
            seed=seed,
        )
        report = fit(
            system, world.view, lambda phase, source=source: source, config=config, validate=validate, progress=False
        )  # type: ignore[misc]
        if best is None or (report.best_score or 0) > (best[1].best_score or 0):
            best = system, report
    assert best is not None
    return best


@torch.inference_mode()
def scores(system: Ranker, world: World, examples: Examples) -> Tensor:
    """float32 [t]."""
    parts = np.array_split(np.arange(len(examples.requests)), -(-len(examples.requests) // 512))
    return torch.cat([system.score(examples.batch(world, part, system.max_history))["target"] for part in parts])


def measured(system: Ranker, world: World, examples: Examples) -> dict[str, Interval]:
    """AUC over all rows, and GAUC with its interval over users."""
    return judged(scores(system, world, examples), examples)


def outcome(
    system: Ranker, report: TrainReport, world: World, num_history: int | None = None
) -> dict[str, float | Interval]:
    """`measured` on the test rows, the best epoch, and with `num_history` the FLOPs of one candidate at so many past events."""
    found: dict[str, float | Interval] = {
        **measured(system, world, world.test),
        "cost:best_epoch": float(report.best_epoch or 0),
    }
    if num_history is not None:
        shape = RequestShape(num_history=num_history, num_candidates=100)
        found["cost:flops_per_candidate"] = system.cost(shape).item_flops
    return found


def judged(score: Tensor, examples: Examples) -> dict[str, Interval]:
    """The same for given scores [t]."""
    per_user = auc_per_user(examples.label, score, examples.user_of_row)
    weight = per_user.impressions_U.astype(np.float64)
    whole = auc(examples.label, score)
    return {
        "gauc": bootstrap_ratio(per_user.auc_U * weight, weight, seed=0, resamples=1000),
        "auc": Interval(whole, whole, whole),
    }


def popularity(world: World, examples: Examples) -> Tensor:
    """[t] how often the item occurs in training."""
    counts_N = np.bincount(world.view.histories.item, minlength=world.space.num_items + 1)
    return torch.from_numpy(counts_N[examples.rows.values.numpy()].astype(np.float32))


def like_rate(world: World, examples: Examples, strength: float = 10.0) -> Tensor:
    """[t] share of an item's training events that were likes (action 1), drawn towards the mean of all."""
    events, n = world.view.histories, world.space.num_items + 1
    liked = np.bincount(events.item, weights=events.action == 1, minlength=n)
    seen, mean = np.bincount(events.item, minlength=n), float((events.action == 1).mean())
    rate = (liked + strength * mean) / (seen + strength)
    return torch.from_numpy(rate[examples.rows.values.numpy()].astype(np.float32))


def with_auxiliary(system: Ranker) -> None:
    """Give a ranker without a recurrent state DIEN's auxiliary loss: a linear map of the mean of the past tells the next item."""
    items, space = system.items, system.space
    assert callable(items)
    width = system.config.dim
    system.add_module("auxiliary_map", nn.Linear(width, width))
    own_losses, own_prepare = system.losses, system.prepare

    def prepare(view: View) -> None:
        own_prepare(view)
        counts_N = torch.bincount(torch.from_numpy(view.histories.item.copy()), minlength=space.num_items + 1)
        system.buffer("auxiliary_counts_N", counts_N.double())

    def losses(batch: Batch) -> Losses:
        history = batch.history.last(system.max_history)
        rows = history.items
        item_ED: Tensor = items(rows.values)
        sums_ED = item_ED.cumsum(0)
        before_ED = torch.cat([sums_ED.new_zeros(1, width), sums_ED])[rows.offsets[:-1]][rows.row_of_value]
        mean_ED = (sums_ED - before_ED) / (rows.position_of_value + 1)[:, None]
        position_P = next_positions(history)
        negative_P = draw_negatives(PopularitySampler.of_counts(system.auxiliary_counts_N), rows.values[position_P + 1])
        found = own_losses(batch)
        if len(position_P):
            state_PD = system.auxiliary_map(mean_ED[position_P])
            next_P = (state_PD * item_ED[position_P + 1]).sum(1)
            other_P = (state_PD * items(negative_P)).sum(1)
            found["auxiliary"] = (softplus(-next_P) + softplus(other_P)).mean()
        return found

    system.prepare, system.losses = prepare, losses  # type: ignore[method-assign]


def changed_minds(num_users: int, *, num_groups: int = 20, length: int = 10) -> World:
    """Users whose interest moves once, at a random place, from one group of items to another; offered is an item of each, the new one wins.

    How much of either a past holds says nothing on average: only its order does.
    """
    rng = np.random.default_rng(0)
    pair = rng.random((num_users, num_groups)).argsort(1)[:, :2]
    is_new = np.arange(length) >= rng.integers(2, length - 1, (num_users, 1))
    group = np.where(is_new, pair[:, 1:], pair[:, :1])
    time = np.broadcast_to(86_400 * np.arange(length), group.shape)
    return _pairs(group, time, pair[:, 1], pair[:, 0], rng, num_groups)


def visits(num_users: int, *, num_groups: int = 20, per_group: int = 10, length: int = 12) -> World:
    """Users who look at one group of items per visit, ten minutes apart; the newest visit's group wins over that of an earlier visit.

    A visit begins at a random place, at least once after the first event.
    """
    rng = np.random.default_rng(0)
    opens = rng.random((num_users, length)) < 0.3
    opens[:, 0] = False
    opens[np.arange(num_users), rng.integers(1, length, num_users)] = True
    visit = opens.cumsum(1)
    group_of_visit = rng.random((num_users, num_groups)).argsort(1)[:, :length]
    group = np.take_along_axis(group_of_visit, visit, 1)
    time = 86_400 * visit + 600 * np.arange(length)
    earlier = (rng.random(num_users) * visit[:, -1]).astype(np.int64)
    old = group_of_visit[np.arange(num_users), earlier]
    return _pairs(group, time, group[:, -1], old, rng, num_groups, per_group)


def _pairs(
    group_UL: Int,
    time_UL: Int,
    winner_U: Int,
    loser_U: Int,
    rng: np.random.Generator,
    num_groups: int,
    per_group: int = 10,
) -> World:
    """One request per user after L events of the given groups: an item of the winner's group is chosen, one of the loser's is not."""
    num_users, length = group_UL.shape
    groups = np.concatenate([group_UL, winner_U[:, None], loser_U[:, None]], axis=1)
    item = groups * per_group + rng.integers(0, per_group, groups.shape)
    events = pl.DataFrame(
        {
            "user_id": np.repeat(np.arange(num_users), length),
            "item_id": item[:, :length].ravel(),
            "time": time_UL.ravel(),
            "group": np.arange(num_users * length),
            "action": np.ones(num_users * length, dtype=np.int64),
        }
    )
    nothing = pl.Series([[] for _ in range(num_groups * per_group)], dtype=pl.List(pl.String))
    items = pl.DataFrame({"item_id": np.arange(num_groups * per_group), "attributes": nothing})
    histories, table = _histories(events, items)
    requests = _requests(histories, histories.offsets[1:-1])
    requests = replace(requests, end=histories.offsets[2:], time=time_UL[:, -1] + 600)
    turn = rng.random((num_users, 1)) < 0.5
    offered = np.where(turn, item[:, : length - 1 : -1], item[:, length:]) + 1
    label = torch.from_numpy(np.concatenate([~turn, turn], 1).astype(np.float32)).flatten()
    rows = Jagged.from_lengths(torch.from_numpy(offered.ravel()), torch.full((num_users,), 2))
    part = np.digitize(rng.random(num_users), [0.7, 0.8])
    parts = [_kept(requests, rows, label, part == p) for p in range(3)]
    return _world(histories, table, np.repeat(part == 0, length), parts, actions=("event",), has_clock=True)


def planted_films(num_users: int = 300, num_items: int = 200, length: int = 40) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Users who like 6 of 20 groups of films, one label in ten turned; for the quick form."""
    rng = np.random.default_rng(0)
    item = rng.integers(0, num_items, (num_users, length))
    liked_groups = rng.random((num_users, 20)).argsort(1) < 6
    liked = np.take_along_axis(liked_groups, item % 20, 1) ^ (rng.random(item.shape) < 0.1)
    events = {"user_id": np.repeat(np.arange(num_users), length), "item_id": item.ravel(), "liked": liked.ravel()}
    return pl.DataFrame(events), _named_items(num_items)


def planted_purchases(num_users: int = 600, num_items: int = 200, length: int = 8) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Users who buy from one group of items and change to another once, a day apart; for the quick form."""
    rng = np.random.default_rng(0)
    group = rng.random((num_users, 20)).argsort(1)[:, :2]
    changed = np.arange(length) >= rng.integers(2, length - 1, (num_users, 1))
    item = np.where(changed, group[:, 1:], group[:, :1]) + 20 * rng.integers(0, num_items // 20, (num_users, length))
    events = {
        "user_id": np.repeat(np.arange(num_users), length),
        "item_id": item.ravel(),
        "time": 86_400 * np.tile(np.arange(length), num_users),
        "group": np.tile(np.arange(length), num_users),
    }
    return pl.DataFrame(events), _named_items(num_items)


def _named_items(num_items: int) -> pl.DataFrame:
    return pl.DataFrame({"item_id": np.arange(num_items), "attributes": [[str(i % 20)] for i in range(num_items)]})
