"""What the claims about delayed feedback share: MovieLens-100K as a stream of clicks whose conversions come late, and one run of a rule.

Ratings in the order of their real times are clicks, a rating of 5 is a conversion: labels and features are real. Moments and delays are
made: clicks come evenly over 60 days, and a conversion follows after 20 minutes on average, or after days, with shares and means that
hidden functions of user and film decide.

R clicks, U users, n films.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from shortlist.data.batches import Candidates
from shortlist.data.datasets import load
from shortlist.data.histories import Histories, Int, Requests, View
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Categorical, FieldTable, Space
from shortlist.data.schema import Sequence as SequenceField
from shortlist.evaluation.evidence import Lab
from shortlist.models.ranking.dnn import DNN, DNNConfig
from shortlist.training.config import FeedbackChoice, TrainerConfig
from shortlist.training.feedback.clicks import ClickLog
from shortlist.training.feedback.windows import NEVER, Windows
from shortlist.training.streaming import StreamConfig, train_stream

DAY_S = 86_400
DAYS, START_DAY = 60, 30
USER_FIELDS = ("age", "gender", "occupation")
ARMS: dict[str, tuple[str, dict[str, str | bool]]] = {
    "vanilla": ("vanilla", {}),
    "vanilla, duplicates": ("vanilla", {"duplicates": True}),
    "oracle": ("label-oracle", {}),
    "DFM": ("dfm", {}),
    "FSIW": ("fsiw", {}),
    "FNW": ("fnw", {}),
    "FNC": ("fnc", {}),
    "ES-DFM": ("es-dfm", {}),
    "DEFER": ("defer", {}),
    "DEFUSE": ("defuse", {}),
    "DEFUSE on FNW's samples": ("defuse", {"samples": "fnw", "posterior": "current"}),
    "DEFUSE on DEFER's samples": ("defuse", {"samples": "defer"}),
    "Bi-DEFUSE": ("bi-defuse", {}),
}
METRICS = ("auc", "pr_auc", "nll")


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """Clicks and what is known before them."""

    log: ClickLog
    view: View


def stream(lab: Lab, seed: int) -> Stream:
    """The ratings with delays drawn by the seed; planted ratings in the quick form."""
    events, items, users = planted() if lab.quick else films(lab)
    events = events.sort("timestamp", maintain_order=True)
    user, user_ids = _coded(events["user_id"], users["user_id"])
    item, item_ids = _coded(events["item_id"], items["item_id"])
    clicked = np.linspace(0, DAYS * DAY_S, len(events), endpoint=False).astype(np.int64)
    converts = (events["rating"] == 5).to_numpy()
    genres, field = _genres(items, item_ids)
    user_table = _user_table(users, user_ids)
    hidden = _hidden(seed, genres, user_table, user, item)
    delay = _delays(np.random.default_rng([seed, 1]), *hidden)
    none = np.zeros(len(events), dtype=np.int64)
    requests = Requests(
        user=user,
        time=clicked,
        start=none,
        end=none,
        target_offsets=np.zeros(len(events) + 1, dtype=np.int64),
        target=none[:0],
        target_value=np.zeros(0, dtype=np.float32),
    )
    known = torch.ones(len(item_ids) + 1, dtype=torch.bool)
    known[0] = False
    space = Space(
        items=FieldTable(len(item_ids) + 1, (field,), {field.name: genres}),
        known_items=known,
        num_users=len(user_ids),
        user_fields=user_table.fields,
    )
    histories = Histories.empty(len(user_ids))
    rows = Jagged(torch.from_numpy(item), torch.arange(len(events) + 1))
    log = ClickLog(
        histories=histories,
        users=user_table,
        requests=requests,
        candidates=Candidates(rows=rows),
        converted_at=np.where(converts, clicked + delay, NEVER),
    )
    return Stream(log=log, view=View(histories=histories, space=space, users=user_table, now=0))


def films(lab: Lab) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Ratings, films with their genres, people in bands of ten years."""
    log = load("ml-100k", lab.data_root)
    assert isinstance(log.events, pl.DataFrame)
    assert log.items is not None
    assert log.users is not None
    bands = pl.col("age").cast(pl.Int64) // 10
    return log.events, log.items.select("item_id", "genres"), log.users.select("user_id", bands, "gender", "occupation")


def planted(num_clicks: int = 2_400) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Ratings that follow from genre and age, and the more from age the later they are; for quick forms."""
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, 40, num_clicks), rng.integers(0, 30, num_clicks)
    late = np.linspace(0, 2, num_clicks)
    logit = -1.0 + (item % 3 - 1) * (1.5 - late / 2) + late * (user % 3 - 1)
    five = rng.random(num_clicks) < 1 / (1 + np.exp(-logit))
    events = pl.DataFrame(
        {"user_id": user, "item_id": item, "timestamp": np.arange(num_clicks), "rating": 3 + 2 * five}
    )
    items = pl.DataFrame({"item_id": np.arange(30), "genres": [[f"g{i % 3}", f"h{i % 5}"] for i in range(30)]})
    people = {
        "user_id": np.arange(40),
        "age": np.arange(40) % 3,
        "gender": np.arange(40) % 2,
        "occupation": np.arange(40) % 5,
    }
    return events, items, pl.DataFrame(people)


def told(stream: Stream, arm: str, seed: int, *, quick: bool) -> dict[str, float]:
    """Streaming metrics of one rule, weighted by clicks; the mean chance told over the share of conversions is `calibration`."""
    rule, settings = ARMS[arm]
    config = StreamConfig(
        feedback=FeedbackChoice(rule=rule, settings=settings, observation_hours=1.0, auxiliary_epochs=5),
        attribution_hours=24.0 * 30,
        window_hours=48.0 if quick else 6.0,
        first_epochs=5,
    )
    trainer = TrainerConfig(lr=5e-3 if quick else 1e-3, batch_size=64 if quick else 256, optimiser="adam", seed=seed)
    _, report = train_stream(
        network, stream.view, stream.log, config=config, trainer=trainer, start=START_DAY * DAY_S, progress=False
    )
    clicks = sum(w.clicks for w in report.windows)
    rate = sum(w.conversions for w in report.windows) / clicks
    found = {metric: report.mean(metric) for metric in METRICS}
    return {**found, "calibration": report.mean("predicted") / rate, "cost:steps": float(report.steps)}


def network(space: Space) -> DNN:
    """The same for every rule, but for its outputs; the auxiliary networks are of its kind too."""
    return DNN(
        DNNConfig(dim=16, widths=(64, 32), dropout=0.0, max_history=1, loss="bce", use_user_ids=True, id_dropout=0.05),
        space,
    )


def of_delays(stream: Stream) -> dict[str, float]:
    """Shares of conversions that come within an hour and a day, and after two weeks; and of clicks that convert within 30 days."""
    log = stream.log
    delay = (log.converted_at - log.clicked_at)[log.converted_at != NEVER]
    windows = Windows.of_hours(1.0, 24.0 * 30)
    return {
        "within an hour": float((delay <= 3_600).mean()),
        "within a day": float((delay <= DAY_S).mean()),
        "after two weeks": float((delay > 14 * DAY_S).mean()),
        "conversions": float(log.outcome(windows).mean()),
    }


def _coded(column: pl.Series, known: pl.Series) -> tuple[Int, NDArray[np.int64]]:
    """[R] codes 1.. of the values, and the sorted ids that they stand for."""
    ids = np.unique(known.to_numpy())
    return (np.searchsorted(ids, column.to_numpy()) + 1).astype(np.int64), ids


def _genres(items: pl.DataFrame, ids: NDArray[np.int64]) -> tuple[Jagged, SequenceField]:
    """The films' genres by row, row 0 empty."""
    listed = items.sort("item_id")["genres"].fill_null([])
    names = listed.explode().drop_nulls().unique().sort()
    code = (
        listed.explode().drop_nulls().replace_strict(names, pl.Series(range(1, len(names) + 1)), return_dtype=pl.Int64)
    )
    lengths = torch.from_numpy(np.append(0, listed.list.len().to_numpy()).astype(np.int64))
    return Jagged.from_lengths(torch.from_numpy(code.to_numpy().copy()), lengths), SequenceField(
        name="genres", size=len(names)
    )


def _user_table(users: pl.DataFrame, ids: NDArray[np.int64]) -> FieldTable:
    """The people's fields by row, row 0 unknown."""
    ordered, fields, columns = users.sort("user_id"), [], {}
    for name in USER_FIELDS:
        values, code = np.unique(ordered[name].cast(pl.String).to_numpy().astype(str), return_inverse=True)
        fields.append(Categorical(name=name, size=len(values)))
        columns[name] = torch.from_numpy(np.append(0, code + 1).astype(np.int64))
    return FieldTable(len(ids) + 1, tuple(fields), columns)


def _hidden(
    seed: int, genres: Jagged, users: FieldTable, user: Int, item: Int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two hidden functions of user and film, each of mean 0 and deviation 1 over the clicks: float64 [R]."""
    rng = np.random.default_rng([seed, 2])
    found = []
    for _ in range(2):
        weight = rng.normal(size=int(genres.values.max()) + 1)
        summed = np.zeros(genres.num_rows)
        np.add.at(summed, genres.row_of_value.numpy(), weight[genres.values.numpy()])
        value = summed[item]
        for f in users.fields:
            column = users.columns[f.name]
            assert isinstance(column, torch.Tensor)
            value = value + rng.normal(size=int(column.max()) + 1)[column.numpy()[user]]
        found.append((value - value.mean()) / value.std())
    return found[0], found[1]


def _delays(rng: np.random.Generator, one: NDArray[np.float64], other: NDArray[np.float64]) -> Int:
    """[R] seconds: with chance sigmoid(one - 0.7) exponential of 20 minutes, else exponential of 1 to 20 days, as `other` says.

    About a third then comes within the hour and half within a day, as is told of Criteo's conversion log.
    """
    quick = rng.random(len(one)) < 1 / (1 + np.exp(0.7 - one))
    days = 20 ** (1 / (1 + np.exp(-1.5 * other)))
    return np.where(quick, rng.exponential(1_200, len(one)), rng.exponential(days * DAY_S)).astype(np.int64)
