"""What the claims about ranking by outcome share: films that were liked or not, requests cut from every user's order, one judgement.

ML-1M as it is at hand: the order of every user (`pos`) is complete. In the first 80 % of time every rating of 4 or more is known, and
whether it is 3 or less is known for nearly all others; only these events are used. Time stamps decide that and nothing else: where they
are missing they were filled in, and the filling tells low ratings. Windows are cut in each user's own order.

N events, R requests, t candidates of all requests end to end.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from shortlist.data.batches import Candidates, request_batch
from shortlist.data.histories import Histories, Requests, View
from shortlist.data.jagged import Jagged
from shortlist.data.schema import FieldTable, Sequence, Space
from shortlist.evaluation.evidence import Lab
from shortlist.metrics import auc, gauc, logloss
from shortlist.models.base import Phase, Ranker, RequestShape, System
from shortlist.registry import find
from shortlist.training.config import TrainerConfig
from shortlist.training.sources import BatchSource, CandidateSource, NextEventSource
from shortlist.training.trainer import fit

PASS, LIKE = 1, 2
TASK = "like"
KNOWN_SHARE = 0.80
"""Of all events, by time: the ones whose outcome is known."""
TRAIN, VALID = 0.70, 0.85
"""Shares of each user's events at which training and validation end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """Requests of one window with what was met next as labelled candidates."""

    requests: Requests
    rows: Jagged
    label: Tensor
    """float32 [t]: 1 where the film was liked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Liked:
    """One log: events with their outcome as action, no clock."""

    histories: Histories
    window_N: NDArray[np.int64]
    """0 = training, 1 = validation, 2 = test; rises with a user's order."""
    space: Space
    users: FieldTable

    @property
    def view(self) -> View:
        """What training may see."""
        return View(histories=self.histories.keep(self.window_N == 0), space=self.space, users=self.users, now=1 << 40)

    def asked(self, window: int, per_request: int) -> Asked:
        """Every user's events of a window, `per_request` to a request that knows all events before the first of them."""
        h = self.histories
        user_N, index_N = h.user_of_event, np.arange(h.num_events)
        inside = self.window_N == window
        first_of_user = np.full(h.num_users + 2, h.num_events)
        np.minimum.at(first_of_user, user_N[inside], index_N[inside])
        place = (index_N - first_of_user[user_N]) // per_request
        told = inside & (h.action > 0)
        key = user_N * (int(place[told].max()) + 1) + place
        _, opens, owner = np.unique(key[told], return_index=True, return_inverse=True)
        end = (first_of_user[user_N] + place * per_request)[told][opens]
        user, none = user_N[told][opens], np.zeros(0, dtype=np.int64)
        requests = Requests(
            user=user,
            time=h.time[end],
            start=h.offsets[user],
            end=end,
            target_offsets=np.zeros(len(user) + 1, dtype=np.int64),
            target=none,
            target_value=none.astype(np.float32),
        )
        lengths = torch.from_numpy(np.bincount(owner))
        label = torch.from_numpy((h.action[told] == LIKE).astype(np.float32))
        return Asked(requests=requests, rows=Jagged.from_lengths(torch.from_numpy(h.item[told]), lengths), label=label)


def ml1m(root: Path, num_users: int, most_events: int | None = None) -> Liked:
    """Users drawn at random (always the same ones) among those with at least 20 events and no more than `most_events`."""
    events = pl.read_parquet(root / "ml-1m" / "ml1m_sequences.parquet")
    end = events["timestamp_filled"].quantile(KNOWN_SHARE)
    events = events.filter(pl.col("timestamp_filled") < end).sort("user_id", "pos")
    count = pl.len().over("user_id")
    place = pl.int_range(pl.len()).over("user_id") / count
    action = pl.when(pl.col("rating") >= 4).then(LIKE).when(pl.col("rating_le3")).then(PASS).otherwise(0)
    events = events.with_columns(
        count=count,
        action=action.fill_null(0),
        window=(place >= TRAIN).cast(pl.Int64) + (place >= VALID).cast(pl.Int64),
    )
    events = events.filter(pl.col("count").is_between(20, most_events or 1 << 30))
    users = events["user_id"].unique().sort().to_numpy()
    chosen = np.random.default_rng(0).permutation(users)[:num_users]
    movies = pl.read_parquet(root / "ml-1m" / "movies.parquet").select("movie_id", pl.col("genres").str.split("|"))
    return liked_of(events.filter(pl.col("user_id").is_in(chosen.tolist())), movies)


def planted(num_users: int = 300, length: int = 16) -> Liked:
    """For the quick form: seven people of ten like the odd films, the others the even ones."""
    rng = np.random.default_rng(0)
    item = rng.integers(1, 41, (num_users, length))
    liked = (item % 2 == 1) == (rng.random((num_users, 1)) < 0.7)
    frame = {
        "user_id": np.repeat(np.arange(num_users), length),
        "movie_id": item.flatten(),
        "action": np.where(liked, LIKE, PASS).flatten(),
        "window": np.tile(np.digitize(np.arange(length), [length - 4, length - 2]), num_users),
    }
    return liked_of(pl.DataFrame(frame))


def liked_of(events: pl.DataFrame, movies: pl.DataFrame | None = None) -> Liked:
    """From events in each user's order (user_id, movie_id, action, window) and films (movie_id, genres)."""
    _, user = np.unique(events["user_id"].to_numpy(), return_inverse=True)
    ids, item = np.unique(events["movie_id"].to_numpy(), return_inverse=True)
    num_users, total = int(user.max()) + 1, len(user)
    offsets = np.concatenate([[0, 0], np.cumsum(np.bincount(user))]).astype(np.int64)
    place = np.arange(total) - offsets[user + 1]
    histories = Histories(
        offsets=offsets,
        item=item.astype(np.int64) + 1,
        time=place,
        group=np.arange(total),
        action=events["action"].to_numpy().astype(np.int64),
        value=np.ones(total, dtype=np.float32),
    )
    window = events["window"].to_numpy().astype(np.int64)
    known = torch.zeros(len(ids) + 1, dtype=torch.bool)
    known[torch.from_numpy(histories.item[window == 0])] = True
    space = Space(
        items=FieldTable(len(ids) + 1) if movies is None else genres_of(ids, movies),
        known_items=known,
        num_users=num_users,
        actions=("pass", "like"),
        tasks=(TASK,),
        has_clock=False,
    )
    return Liked(histories=histories, window_N=window, space=space, users=FieldTable(num_users + 1))


def genres_of(ids: NDArray[np.int64], movies: pl.DataFrame) -> FieldTable:
    """The films' genres as an item field; row 0 is the unknown film."""
    names = movies["genres"].explode().unique().sort().to_list()
    number = {name: place for place, name in enumerate(names, start=1)}
    of_film = dict(zip(movies["movie_id"].to_list(), movies["genres"].to_list(), strict=True))
    rows = [[], *([number[name] for name in of_film.get(film, [])] for film in ids.tolist())]
    field = Sequence(name="genres", size=len(names))
    return FieldTable(len(ids) + 1, (field,), {"genres": Jagged.from_rows(rows)})


@dataclass(frozen=True, kw_only=True, slots=True)
class LikedArm:
    """A ranker, and how its training differs from the others'."""

    system: str
    settings: Mapping[str, Any]
    trainer: Mapping[str, Any]
    per_request: int = 1
    """Candidates of a training request; not read where all is learned from whole sequences."""


def measured(lab: Lab, world: Liked, name: str, arm: LikedArm, seed: int, *, per_request: int) -> dict[str, float]:
    """Train one ranker, stop by AUC on validation requests, and judge it on test requests of `per_request` candidates."""
    torch.manual_seed(seed)
    entry, view = find(arm.system), world.view
    system: Ranker = entry.cls(entry.config(arm.settings), world.space)
    valid, test = world.asked(1, per_request), world.asked(2, per_request)
    looked: list[float] = []

    def validate(trained: System) -> float:
        began = time.perf_counter()
        score = judged(scores_of(trained, world, valid), world, valid)["auc"]
        looked.append(time.perf_counter() - began)
        return score

    config = TrainerConfig(**{"seed": seed, "clip_norm": 5.0, **arm.trainer})
    lesson = world.asked(0, arm.per_request)

    def source_of(phase: Phase) -> BatchSource:
        if phase.feed == "next_event":
            # A step of either source holds about the same number of examples.
            users = max(1, round(config.batch_size * world.space.num_users / view.histories.num_events))
            return NextEventSource(
                view, batch_size=users, max_history=system.max_history, seed=seed, random_window=True
            )
        return CandidateSource(
            world.histories,
            world.users,
            lesson.requests,
            Candidates(rows=lesson.rows),
            {TASK: lesson.label},
            batch_size=max(1, config.batch_size // arm.per_request),
            max_history=system.max_history,
            only_chosen=False,
            seed=seed,
        )

    slug = "".join(c if c.isalnum() else "-" for c in f"{name} {seed}")
    folder = None if lab.scratch is None else lab.scratch / slug
    report = fit(system, view, source_of, config=config, validate=validate, folder=folder, progress=not lab.quick)
    shape = RequestShape(num_history=100, num_candidates=100)
    return {
        **judged(scores_of(system, world, test), world, test),
        "validation_auc": float(report.best_score or 0.0),
        "cost:training_seconds": report.seconds - sum(looked),
        "cost:epochs": float(report.epochs),
        "cost:best_epoch": float(report.best_epoch or report.epochs),
        "cost:mflop_per_request": system.cost(shape).flops(100) / 1e6,
        "cost:mflop_per_cached_request": system.cost(shape, cached=True).flops(100) / 1e6,
    }


def measured_share(world: Liked, per_request: int) -> dict[str, float]:
    """The baseline without a user: each film by the share of those who liked it in training, ten average films added."""
    h, train = world.histories, world.window_N == 0
    told = train & (h.action > 0)
    liked = np.bincount(h.item[train & (h.action == LIKE)], minlength=world.space.num_items + 1)
    all_N = np.bincount(h.item[told], minlength=world.space.num_items + 1)
    mean = liked.sum() / all_N.sum()
    share = torch.from_numpy((liked + 10 * mean) / (all_N + 10)).float()
    valid, test = world.asked(1, per_request), world.asked(2, per_request)
    return {
        **judged(torch.logit(share)[test.rows.values], world, test),
        "validation_auc": auc(valid.label, share[valid.rows.values]),
    }


def scores_of(system: System, world: Liked, asked: Asked) -> Tensor:
    """float32 [t] logits."""
    parts = []
    for index in np.array_split(np.arange(len(asked.requests)), max(1, len(asked.requests) // 256)):
        batch = request_batch(
            world.histories, world.users, asked.requests.select(index), max_history=system.max_history
        ).with_candidates(asked.rows.select(torch.from_numpy(index)))
        with torch.inference_mode():
            parts.append(system.score(batch)[TASK])  # type: ignore[operator]
    return torch.cat(parts)


def judged(score: Tensor, world: Liked, asked: Asked) -> dict[str, float]:
    """How well scores tell what was liked: over all, within users, and as probabilities."""
    user = torch.from_numpy(asked.requests.user)[asked.rows.row_of_value]
    return {
        "auc": auc(asked.label, score),
        "gauc": gauc(asked.label, score, user),
        "logloss": logloss(asked.label, score.sigmoid()),
    }
