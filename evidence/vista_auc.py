"""VISTA against full target attention on ML-1M: AUC at a constant request cost, and what int8 and stale summaries lose.

`shortlist prove vista_auc` (wants SHORTLIST_DATA); `vista_planted` asks the same of a world whose tastes lie far back. ML-1M is read in
its exact order and without times: there a missing time means a low rating.

Tried in previews of one seed, on validation, on ML-1M: after about 1,000 steps full attention stood at .812 and VISTA at .806 to .807, with
16 or 32 tokens, no norm of what seeds read, and weights of .02 and .1 of the reconstruction alike. After 330 to 470 steps, where full
attention stood at .804: 64 tokens, keys four times as wide or a batch norm of the summaries gained nothing; four heads in stage 2, or 50
recent events in place of 16, gained .0025 each, not both; a learning rate of 2e-3 in place of 4e-3 another .0025 (.8035 at 463). DIN on
the newest 50 stood at .797 after 700. In the planted world a reconstruction that moved the items, with a weight of 1 and a decoder that
began at random, cost .05 at equal steps.

R requests, t candidates of all requests end to end, K summary tokens of D numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from shortlist.data.batches import Batch, Candidates, request_batch
from shortlist.data.datasets import load
from shortlist.data.histories import Histories, Requests, View
from shortlist.data.jagged import Jagged
from shortlist.data.schema import FieldTable, Sequence, Space
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab, hold_if
from shortlist.layers.scoring import HeadConfig
from shortlist.metrics.classification import auc, gauc
from shortlist.models.base import RequestShape, System
from shortlist.models.ranking.din import DIN, DINConfig
from shortlist.models.ranking.vista import VISTA, VISTAConfig, VISTAState, quantise
from shortlist.training.config import TrainerConfig
from shortlist.training.sources import CandidateSource
from shortlist.training.trainer import fit

FULL, SUMMARY = "full target attention", "VISTA"
PAPER, PLAIN = "VISTA without recent events", "VISTA without reconstruction"
RECENT = "DIN, newest 50"
ARMS = (FULL, SUMMARY, PAPER, RECENT)
LAGS = (0, 5, 20, 50, 200)
QUALITY, INT8 = 0.003, 0.001
PROTOCOL = (
    "Per user in order: 80 % training, 10 % validation, 10 % test; requests of 20 (validation and test 10) consecutive events as "
    "candidates with the history before the first of them, so no summary holds a later event; up to 500 past events, each liked or "
    "not. Full attention and VISTA have the same embeddings, stage 2, tower and epochs. VISTA's learning rate and shape were "
    "chosen in previews on validation, full attention's rate was tried at one value on ML-1M: the tuning favours VISTA; binary "
    "cross-entropy; epoch by validation AUC, test once; 3 seeds. auc_lag_k: from int8 "
    "summaries that lack the newest k events, all else equal."
)
BAR = f"Means over seeds: AUC of VISTA >= full target attention - {QUALITY}; int8 loses <= {INT8}."

CLAIM = Claim(
    name="vista_auc",
    systems=("vista", "din"),
    claim="Thirty-two summary tokens per user, made without knowing the candidate and kept as int8, with the newest 50 events beside "
    "them, rank films as well as attention over every event of the history.",
    data="MovieLens-1M, the first 80 % of its events, where the label (rating >= 4) is known for 99.4 %; order by `pos`, no times, genres",
    protocol=PROTOCOL,
    bar=BAR,
    published={
        "Amazon-Electronics AUC": {"DIN": 0.873, "HSTU": 0.884, "VISTA, QLA": 0.884},
        "KuaiRand-1K AUC": {"DIN": 0.744, "HSTU": 0.743, "VISTA, QLA": 0.743},
    },
)


class FullAttention(VISTA):
    """The same model with every event as a token."""

    def user_state(self, batch: Batch) -> VISTAState:
        """See VISTA.full_state."""
        return self.full_state(batch)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """By task."""
        return self.head.losses(self.score(batch), batch)


LR: Mapping[str, Mapping[type, float]] = {
    "planted": {FullAttention: 2e-3, VISTA: 4e-3, DIN: 2e-3},
    "ml-1m": {FullAttention: 4e-3, VISTA: 2e-3, DIN: 2e-3},
}
"""Learning rates by world and model."""


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Requests with candidates and what was liked of them."""

    requests: Requests
    rows: Jagged
    label: Tensor


@dataclass(frozen=True, kw_only=True)
class World:
    """Histories and the three sets of questions asked of them."""

    name: str
    histories: Histories
    space: Space
    train: Questions
    valid: Questions
    test: Questions
    epochs: int
    per_topic: int = 0
    """Items of a topic, which stand side by side; 0 = there are no topics."""
    reconstruction: float = 0.1
    """Weight of VISTA's reconstruction loss."""

    @property
    def users(self) -> FieldTable:
        """No user fields."""
        return FieldTable(self.space.num_users + 1)

    def view(self) -> View:
        """Events before each user's validation part; DIN counts them."""
        first = np.full(self.space.num_users + 1, np.iinfo(np.int64).max)
        np.minimum.at(first, self.valid.requests.user, self.valid.requests.end)
        keep = np.arange(self.histories.num_events) < first[self.histories.user_of_event]
        return View(histories=self.histories.keep(keep), space=self.space, users=self.users, now=0)


def run(lab: Lab) -> None:
    """Every arm; the quick form asks a small planted world."""
    make = cache(partial(planted, 100, 200, 2) if lab.quick else partial(movies, lab))
    measure(lab, make, ARMS)


def measure(lab: Lab, make: Callable[[], World], arms: Collection[str]) -> None:
    """Baselines that count, then every arm with every seed."""
    lab.measure("item mean", 0, lambda: counted(make(), by_user=False))
    lab.measure("item mean and user mean", 0, lambda: counted(make(), by_user=True))
    for seed in lab.seeds:
        for arm in arms:
            if arm != PAPER or seed == lab.seeds[0]:  # for its curve of staleness, which one seed shows
                lab.measure(arm, seed, partial(learned, lab, make, arm, seed))


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bar, and the curve of staleness."""
    mean = {arm: {name: value.mean for name, value in arms[arm].metrics.items()} for arm in arms}
    full, summary = mean[FULL]["auc"], mean[SUMMARY]["auc"]
    behind, rounded = full - summary, summary - mean[SUMMARY]["auc_int8"]
    lags = ", ".join(f"{lag}: {mean[SUMMARY][f'auc_lag_{lag}']:.4f}" for lag in LAGS)
    told = [
        f"AUC of full target attention {full:.4f}, of VISTA {summary:.4f} ({-behind:+.4f}); int8 loses {rounded:.5f}; DIN on the newest 50 "
        f"{mean[RECENT]['auc']:.4f}",
        f"with so many events missing from the summary: {lags}",
    ]
    if PAPER in mean:
        without = ", ".join(f"{lag}: {mean[PAPER][f'auc_lag_{lag}']:.4f}" for lag in LAGS)
        told.append(f"without recent events as raw tokens: {without}")
    if PLAIN in mean:
        told.append(
            f"without the reconstruction loss: AUC {mean[PLAIN]['auc']:.4f}; a linear probe tells a topic of the history from the summary "
            f"with AUC {mean[SUMMARY]['probe']:.3f}, without the loss {mean[PLAIN]['probe']:.3f}"
        )
    return hold_if(behind <= QUALITY and rounded <= INT8, "; ".join(told) + ".")


# -- arms ---------------------------------------------------------------------------------------------------------------


def learned(lab: Lab, make: Callable[[], World], arm: str, seed: int) -> dict[str, float]:
    """Train one arm and ask it the test questions once."""
    world = make()
    torch.manual_seed(seed)
    head = HeadConfig(widths=(64, 32), loss="bce", dropout=0.1)
    config = VISTAConfig(
        num_seeds=32, num_recent=50, max_lag=20, reconstruction=world.reconstruction, head=head, dropout=0.0
    )
    model: VISTA | DIN
    match arm:
        case "DIN, newest 50":
            model = DIN(DINConfig(dim=32, widths=(64, 32), loss="bce", recency="position", max_history=50), world.space)
        case "full target attention":
            model = FullAttention(replace(config, reconstruction=0.0), world.space)
        case "VISTA without recent events":
            model = VISTA(replace(config, num_recent=0, max_lag=0), world.space)
        case "VISTA without reconstruction":
            model = VISTA(replace(config, reconstruction=0.0), world.space)
        case _:
            model = VISTA(config, world.space)
    source = CandidateSource(
        world.histories,
        world.users,
        world.train.requests,
        Candidates(rows=world.train.rows),
        {"target": world.train.label},
        batch_size=64,
        max_history=model.max_history,
        only_chosen=False,
        seed=seed,
    )
    report = fit(
        model,
        world.view(),
        lambda phase: source,
        config=TrainerConfig(
            epochs=world.epochs, batch_size=64, lr=LR[world.name][type(model)], patience=2, seed=seed, device="cpu"
        ),
        validate=lambda system: auc(world.valid.label.numpy(), asked(system, world, world.valid)),
        folder=None
        if lab.scratch is None
        else lab.scratch / "".join(c if c.isalnum() else "-" for c in f"{world.name} {arm} {seed}"),
        progress=not lab.quick,
    )
    told = measured(model, world)
    if type(model) is VISTA and world.per_topic:
        told["probe"] = probe(model, world)
    return {**told, "cost:epochs": float(report.best_epoch or report.epochs), "cost:training_seconds": report.seconds}


def measured(model: VISTA | DIN, world: World) -> dict[str, float]:
    """AUC and GAUC on the test; of VISTA also with int8 summaries, and with summaries that lack the newest events."""
    label, user = world.test.label.numpy(), world.test.requests.user[world.test.rows.row_of_value.numpy()]
    score = asked(model, world, world.test)
    told = {"auc": auc(label, score), "gauc": gauc(label, score, user)}
    flops = model.cost(RequestShape(num_history=500, num_candidates=10), cached=type(model) is VISTA).flops(10)
    if type(model) is VISTA:
        told["auc_int8"] = auc(label, asked(model, world, world.test, int8=True))
        told |= {f"auc_lag_{lag}": auc(label, asked(model, world, world.test, lag=lag, int8=True)) for lag in LAGS}
    return told if isinstance(model, FullAttention) else {**told, "cost:flops_per_request": flops}


@torch.inference_mode()
def asked(
    model: System, world: World, questions: Questions, *, lag: int = 0, int8: bool = False
) -> NDArray[np.float32]:
    """float32 [t]: scores; VISTA's from summaries that lack the newest `lag` events, rounded to int8 if wanted."""
    scores = []
    for start in range(0, len(questions.requests), 256):
        index = np.arange(start, min(start + 256, len(questions.requests)))
        requests = questions.requests.select(index)
        batch = request_batch(world.histories, world.users, requests, max_history=500).with_candidates(
            questions.rows.select(torch.from_numpy(index))
        )
        if lag or int8:
            assert isinstance(model, VISTA)
            old = replace(requests, end=np.maximum(requests.end - lag, requests.start))
            z = model.stream(request_batch(world.histories, world.users, old, max_history=500).history)
            if int8:
                code, scale = quantise(z)
                z = code * scale[..., None]
            assert batch.candidates is not None
            scores.append(model.score_candidates(model.state(z, batch), batch.candidates)["target"])
        else:
            scores.append(model.score(batch)["target"])  # type: ignore[operator]
    return torch.cat(scores).numpy()


@torch.inference_mode()
def probe(model: VISTA, world: World) -> float:
    """AUC with which a ridge regression on the K D numbers of a summary tells whether a topic fills 5 % of the history.

    Fitted on the test requests of every other user, asked about the rest.
    """
    batch = request_batch(world.histories, world.users, world.test.requests, max_history=500)
    x = model.stream(batch.history).flatten(1).double()
    x = torch.cat([(x - x.mean(0)) / (x.std(0) + 1e-6), torch.ones(len(x), 1)], 1)
    rows = batch.history.items
    topic = (rows.values - 1) // world.per_topic
    count = torch.zeros(rows.num_rows, int(topic.max()) + 1, dtype=torch.float64)
    count.index_put_((rows.row_of_value, topic), torch.ones(len(topic), dtype=torch.float64), accumulate=True)
    y = (count >= 0.05 * rows.lengths[:, None]).double()
    fitted = batch.user % 2 == 0
    gram = x[fitted].T @ x[fitted] + 10 * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, x[fitted].T @ (y[fitted] - y[fitted].mean(0)))
    return auc(y[~fitted].flatten().numpy(), (x[~fitted] @ weight).flatten().numpy())


def counted(world: World, *, by_user: bool) -> dict[str, float]:
    """Shares liked, of the item and, if wanted, of the user's own past, in training; smoothed by 5 average events."""
    train, test = world.train, world.test
    mean = float(train.label.mean())
    count = torch.bincount(train.rows.values, minlength=world.space.num_items + 1) + 5
    liked = torch.bincount(train.rows.values, train.label, minlength=world.space.num_items + 1) + 5 * mean
    score = torch.logit((liked / count)[test.rows.values]).numpy()
    user = test.requests.user[test.rows.row_of_value.numpy()]
    if by_user:
        who = torch.from_numpy(train.requests.user)[train.rows.row_of_value]
        size = world.space.num_users + 1
        share = (torch.bincount(who, train.label, minlength=size) + 5 * mean) / (
            torch.bincount(who, minlength=size) + 5
        )
        score = score + torch.logit(share[torch.from_numpy(user)]).numpy()
    return {"auc": auc(test.label.numpy(), score), "gauc": gauc(test.label.numpy(), score, user)}


# -- worlds -------------------------------------------------------------------------------------------------------------


def movies(lab: Lab) -> World:
    """ML-1M in order: liked means rated 4 or 5."""
    log = load("ml-1m", lab.data_root)
    frame = pl.read_parquet(lab.data_root / "ml-1m" / "ml1m_sequences.parquet").sort("user_id", "pos")
    # The moment is read to find where the labels end, and for nothing else; every user's kept events are the first ones.
    early = pl.col("timestamp_filled") < pl.col("timestamp_filled").quantile(0.8)
    frame = frame.filter(early.fill_null(False)).filter(pl.len().over("user_id") >= 20)
    assert log.items is not None
    genres = log.items.select("item_id", "genres").explode("genres").drop_nulls()
    names = {name: i + 1 for i, name in enumerate(sorted(genres["genres"].unique()))}
    item_of = {item: i + 1 for i, item in enumerate(sorted(frame["movie_id"].unique()))}
    of_item: list[list[int]] = [[] for _ in range(len(item_of) + 1)]
    for item, genre in genres.iter_rows():
        if item in item_of:
            of_item[item_of[item]].append(names[genre])
    field = Sequence(name="genres", size=len(names))
    items = FieldTable(len(item_of) + 1, (field,), {"genres": Jagged.from_rows(of_item)})
    user = frame["user_id"].rank("dense").to_numpy().astype(np.int64)
    item = frame["movie_id"].replace_strict(item_of, return_dtype=pl.Int64).to_numpy()
    action = frame["rating_le3"].replace_strict({True: 2, False: 1}, default=0, return_dtype=pl.Int64).to_numpy()
    made = world("ml-1m", user, item, action, np.arange(len(user)), items, epochs=6)
    return replace(made, reconstruction=0.02)


def planted(num_users: int, length: int, epochs: int, num_topics: int = 60, per_topic: int = 5) -> World:
    """Each user has four tastes, one of which changes every 240 events; a run of 60 events shows one of them, with likes at 85 %.

    Every fifth event is of any topic and liked at 15 % unless it is to taste. Candidates are half of the tastes and half of others, so
    who sees 50 events knows one taste in four.
    """
    rng = np.random.default_rng(0)
    taste = np.argsort(rng.random((num_users, num_topics)), axis=1)[:, : 4 + length // 240 + 1]
    place = np.arange(length)
    eldest = place // 240  # the four tastes at a moment are those from here on
    shown = eldest + (place // 60 + rng.integers(0, 4, (num_users, 1))) % 4
    topic = np.take_along_axis(taste, shown, axis=1)
    stray = rng.random((num_users, length)) < 0.2
    topic = np.where(stray, rng.integers(0, num_topics, topic.shape), topic)
    now = taste[np.arange(num_users)[:, None, None], eldest[None, :, None] + np.arange(4)]
    asked_topic = np.where(
        rng.random(topic.shape) < 0.5,
        np.take_along_axis(taste, eldest + rng.integers(0, 4, topic.shape), axis=1),
        topic,
    )
    asked_topic = np.where(rng.random(topic.shape) < 0.5, rng.integers(0, num_topics, topic.shape), asked_topic)
    draw = rng.random(topic.shape)
    liked, asked_liked = (draw < np.where((t[..., None] == now).any(2), 0.85, 0.15) for t in (topic, asked_topic))
    item, asked_item = (1 + t * per_topic + rng.integers(0, per_topic, t.shape) for t in (topic, asked_topic))
    user = np.repeat(np.arange(1, num_users + 1), length)
    items = FieldTable(num_topics * per_topic + 1)
    return world(
        "planted",
        user,
        item.reshape(-1),
        np.where(liked, 1, 2).reshape(-1),
        np.tile(place, num_users) * 3_600,
        items,
        epochs=epochs,
        per_topic=per_topic,
        asked=(asked_item.reshape(-1), np.where(asked_liked, 1, 2).reshape(-1)),
    )


def world(
    name: str,
    user: NDArray[Any],
    item: NDArray[Any],
    action: NDArray[Any],
    time: NDArray[Any],
    items: FieldTable,
    *,
    epochs: int,
    per_topic: int = 0,
    asked: tuple[NDArray[Any], NDArray[Any]] | None = None,
) -> World:
    """Events in order become histories and questions.

    Args:
        asked: items and actions [N] that stand as candidates in place of the events themselves, at their moments.
    """
    offsets = np.searchsorted(user, np.arange(user.max() + 2)).astype(np.int64)
    group = np.arange(len(user))
    histories = Histories(
        offsets=offsets, item=item, time=time, group=group, action=action, value=np.ones(len(user), np.float32)
    )
    known = torch.zeros(items.num_rows, dtype=torch.bool)
    known[torch.from_numpy(np.unique(item))] = True
    space = Space(items=items, known_items=known, num_users=int(user.max()), actions=("liked", "not"), has_clock=False)
    first, length = offsets[1:-1], np.diff(offsets)[1:]
    valid, test = first + (0.8 * length).astype(np.int64), first + (0.9 * length).astype(np.int64)
    of: Callable[..., Questions] = partial(questions, histories, *(asked or (item, action)))
    return World(
        name=name,
        histories=histories,
        space=space,
        train=of(first + 10, valid, 20),
        valid=of(valid, test, 10),
        test=of(test, offsets[2:], 10),
        epochs=epochs,
        per_topic=per_topic,
    )


def questions(
    histories: Histories, item: NDArray[Any], action: NDArray[Any], start: NDArray[Any], stop: NDArray[Any], size: int
) -> Questions:
    """Every user's events start .. stop in groups of `size`; the history of a group ends where it begins. Only events with a label ask."""
    count = np.maximum(stop - start + size - 1, 0) // size
    user = np.repeat(np.arange(1, len(start) + 1), count)
    place = np.arange(len(user)) - np.repeat(np.cumsum(count) - count, count)
    begin = start[user - 1] + place * size
    end = np.minimum(begin + size, stop[user - 1])
    index = np.concatenate([np.arange(a, b) for a, b in zip(begin, end)])
    owner = np.repeat(np.arange(len(user)), end - begin)
    kept = action[index] > 0
    index, owner = index[kept], owner[kept]
    lengths = torch.from_numpy(np.bincount(owner, minlength=len(user)))
    requests = Requests(
        user=user,
        time=histories.time[np.maximum(begin - 1, 0)] + 1,
        start=histories.offsets[user],
        end=begin,
        target_offsets=np.zeros(len(user) + 1, dtype=np.int64),
        target=np.zeros(0, dtype=np.int64),
        target_value=np.zeros(0, dtype=np.float32),
    )
    return Questions(
        requests=requests,
        rows=Jagged.from_lengths(torch.from_numpy(item[index]), lengths),
        label=torch.from_numpy((action[index] == 1).astype(np.float32)),
    )
