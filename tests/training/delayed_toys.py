"""A stream of clicks with known truth, for the tests of delayed feedback."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from shortlist.data.batches import Candidates
from shortlist.data.histories import Histories, Requests, View
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Categorical, FieldTable, Numeric, Space
from shortlist.models.ranking.dnn import DNN, DNNConfig
from shortlist.training.config import FeedbackChoice, TrainerConfig
from shortlist.training.feedback.clicks import ClickLog
from shortlist.training.feedback.windows import NEVER
from shortlist.training.streaming import StreamConfig, train_stream

HOUR, DAY = 3_600, 86_400
NUM_ITEMS = 6


@dataclass(frozen=True)
class Planted:
    log: ClickLog
    view: View
    chance: np.ndarray
    """[R] p of each click."""
    late: np.ndarray
    """[R] h of each click, for an observation window of an hour."""


def planted(num_clicks: int = 6_000, *, days: int = 20, seed: int = 0) -> Planted:
    """Clicks with two numbers, a category and an item, whose chance to convert drifts; some convert within the hour, others take days."""
    rng = np.random.default_rng(seed)
    clicked = np.sort(rng.integers(0, days * DAY, num_clicks))
    x, kind, item = (
        rng.normal(size=(num_clicks, 2)),
        rng.integers(1, 4, num_clicks),
        rng.integers(1, NUM_ITEMS + 1, num_clicks),
    )
    turn = 2.5 * clicked / (days * DAY)
    logit = -1.2 + np.cos(turn) * x[:, 0] + np.sin(turn) * x[:, 1] + 0.4 * (kind - 2) + 0.2 * (item - 3)
    chance = 1 / (1 + np.exp(-logit))
    quick_share, mean_days = 1 / (1 + np.exp(-x[:, 0])) * 0.8, 0.5 + 0.4 * kind
    quick = rng.random(num_clicks) < quick_share
    delay = np.where(quick, rng.exponential(600, num_clicks), rng.exponential(mean_days * DAY)).astype(np.int64)
    converted = np.where(rng.random(num_clicks) < chance, clicked + delay, NEVER)
    late = quick_share * np.exp(-HOUR / 600) + (1 - quick_share) * np.exp(-HOUR / (mean_days * DAY))
    none = np.zeros(num_clicks, dtype=np.int64)
    requests = Requests(
        user=none,
        time=clicked,
        start=none,
        end=none,
        target_offsets=np.zeros(num_clicks + 1, dtype=np.int64),
        target=none[:0],
        target_value=np.zeros(0, dtype=np.float32),
        context={"x0": x[:, 0].astype(np.float32), "x1": x[:, 1].astype(np.float32), "kind": kind},
    )
    known = torch.ones(NUM_ITEMS + 1, dtype=torch.bool)
    known[0] = False
    space = Space(
        items=FieldTable(NUM_ITEMS + 1),
        known_items=known,
        num_users=0,
        context_fields=(Numeric(name="x0"), Numeric(name="x1"), Categorical(name="kind", size=3)),
    )
    histories, users = Histories.empty(), FieldTable(1)
    log = ClickLog(
        histories=histories,
        users=users,
        requests=requests,
        candidates=Candidates(rows=Jagged(torch.from_numpy(item), torch.arange(num_clicks + 1))),
        converted_at=converted,
    )
    return Planted(log, View(histories=histories, space=space, users=users, now=0), chance, late)


def make(space: Space) -> DNN:
    return DNN(DNNConfig(dim=4, widths=(16,), dropout=0.1, max_history=1, id_dropout=0.0, loss="bce"), space)


TRAINER = TrainerConfig(lr=5e-3, batch_size=128, seed=3, device="cpu", checkpoint_seconds=0)


def stream_of(rule: str, *, observation_hours: float = 1.0, **settings: object) -> StreamConfig:
    return StreamConfig(
        feedback=FeedbackChoice(rule=rule, settings=settings, observation_hours=observation_hours, auxiliary_epochs=4),
        attribution_hours=5 * 24,
        window_hours=12,
        first_epochs=4,
    )


def train(
    world: Planted, rule: str, folder: Path | None = None, *, trainer: TrainerConfig = TRAINER, **settings: object
):
    config = stream_of(rule, **settings)
    return train_stream(
        make, world.view, world.log, config=config, trainer=trainer, start=10 * DAY, folder=folder, progress=False
    )
