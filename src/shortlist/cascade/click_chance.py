"""From what a run's ranker says to the chance of a click: a calibration, fitted on validation requests and kept beside the run.

    z = bias + sum over the ranking stage's systems of weight x standardised raw score
    platt      chance = sigmoid(z)                     (Platt, "Probabilistic Outputs for Support Vector Machines", 1999, with his targets)
    isotonic   chance = a rising curve of z            (Zadrozny and Elkan, KDD 2002: pool adjacent violators, straight between the steps)

RUN.clicks.json belongs to one version of the run: scores of other weights mean something else. Where the log has impressions, the items
that were shown are judged, clicked or not; else what the stages before let through, chosen or not, and the chance is that of being chosen.

n judged items, S systems, X steps of a curve, b bins.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter

from shortlist.cascade.cascade import Cascade, Page
from shortlist.cascade.lessons import chunks, make_batch, sample, sample_shown
from shortlist.cascade.run import Run, as_of
from shortlist.data.batches import labels_of
from shortlist.data.dataset import Dataset
from shortlist.errors import ConfigError, DataError, SnapshotError
from shortlist.metrics.classification import expected_calibration_error, logloss
from shortlist.models.base import Reranker
from shortlist.training.checkpoint import write_atomically

Float = NDArray[np.float64]
Method = Literal["platt", "isotonic"]
LEAST = 1e-6
"""Chances keep so far from 0 and 1."""
_RIDGE = 1e-6
_STEPS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class ClickConfig:
    """How a calibration is fitted."""

    method: Method = "platt"
    """platt: two numbers and one per further system, safe with few clicks; isotonic: any rising curve, wants a thousand or more."""
    max_requests: int = 4_000
    """Validation requests that are judged, drawn at random."""
    seed: int = 0
    """Of the drawing."""

    def __post_init__(self) -> None:
        if self.method not in ("platt", "isotonic"):
            raise ConfigError(f"calibration method {self.method!r} is unknown; choose platt or isotonic")
        if self.max_requests < 2:
            raise ConfigError(f"max_requests must be at least 2, got {self.max_requests}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Chance of a click from the raw scores of a stage's systems."""

    version: str
    """Of the run whose scores it reads."""
    method: Method
    systems: tuple[str, ...]
    """S names, in the order of the scores."""
    mean_S: tuple[float, ...]
    """Of the raw scores."""
    scale_S: tuple[float, ...]
    """1 / standard deviation of the raw scores."""
    weight_S: tuple[float, ...]
    bias: float
    z_X: tuple[float, ...] = ()
    """Where the steps of an isotonic curve are; empty for platt."""
    chance_X: tuple[float, ...] = ()
    """Chances there, not falling."""
    rate: float
    """Share of judged items that were clicked: the chance where there is no score."""
    num_judged: int
    num_clicked: int
    judged: Literal["impressions", "choices"]
    """What it was fitted on."""
    held_out: Mapping[str, float]
    """What the same fit on one half of the requests was worth on the other: logloss, that of the mean rate, calibration error."""

    def chances(self, scores_nS: Float) -> Float:
        """[n] chances of a click at the first place, from `LEAST` to 1 - `LEAST`."""
        z_n = self.bias + ((scores_nS - np.array(self.mean_S)) * np.array(self.scale_S)) @ np.array(self.weight_S)
        found_n = np.interp(z_n, self.z_X, self.chance_X) if self.z_X else _sigmoid(z_n)
        return np.clip(found_n, LEAST, 1 - LEAST)

    def save(self, path: Path) -> None:
        """Write JSON into the place of `path`; SnapshotError where that can not be."""
        try:
            write_atomically(path, json.dumps(asdict(self), indent=1) + "\n")
        except OSError as error:
            raise SnapshotError(f"{path} can not be written: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: Path, *, version: str) -> Calibration:
        """Read what `save` wrote; SnapshotError where it is damaged or of another version of the run."""
        try:
            made = TypeAdapter(cls).validate_json(path.read_text())
            if not np.isfinite(made.chances(np.zeros((1, len(made.systems))))).all():
                raise ValueError("its numbers are not finite")
        except (OSError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise SnapshotError(f"{path} is damaged ({reason}); run `shortlist ads` on the run again") from error
        if made.version != version:
            raise SnapshotError(
                f"{path} is of version {made.version} of the run, which now is {version}; run `shortlist ads` on it again"
            )
        return made


@dataclass(frozen=True, kw_only=True, slots=True)
class Bin:
    """Judged items whose chances are alike."""

    num_judged: int
    predicted: float
    """Mean chance."""
    observed: float
    """Share that was clicked."""
    low: float
    """Least rate that the clicks are compatible with: Wilson's interval at 95 %."""
    high: float
    """Greatest such rate."""


def clicks_path(folder: Path) -> Path:
    """Where a run's calibration is: beside it and not in it, since a run is replaced as a whole when it is trained again."""
    return folder.with_name(f"{folder.name}.clicks.json")


def judged_systems(cascade: Cascade) -> tuple[str, tuple[str, ...]]:
    """The last stage of the default chain that scores candidates one by one, and its systems."""
    for stage, action in zip(reversed(cascade.config.stages), reversed(cascade.config.default_chain.actions)):
        if not any(isinstance(cascade.systems[name], Reranker) for name in action.systems):
            return stage.name, action.systems
    raise ConfigError("the run has no stage that scores candidates, so there is nothing to calibrate")


def scores_of(page: Page, stage: str, systems: Sequence[str]) -> Float | None:
    """[n, S] raw scores of what a stage let through, request by request; None where a system gave none."""
    trace = next(trace for trace in page.traces if trace.name == stage)
    if any(name not in trace.system_scores for name in systems):
        return None
    return np.stack([trace.system_scores[name].cpu().numpy().astype(np.float64) for name in systems], axis=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """Items of validation requests with what became of them."""

    scores_nS: Float
    clicked_n: Float
    """0 or 1."""
    request_n: NDArray[np.int64]
    """Number of the request."""
    kind: Literal["impressions", "choices"]


def judge(cascade: Cascade, dataset: Dataset, config: ClickConfig | None = None) -> Judged:
    """Let the cascade, as it stood when the validation window began, score what that window's requests were shown."""
    config = config or ClickConfig()
    stage, systems = judged_systems(cascade)
    shown = None
    if dataset.logged is not None:
        requests, shown, _ = sample_shown(dataset, config.max_requests, config.seed, "valid")
    else:
        requests = sample(dataset.split.valid, config.max_requests, config.seed)
    if not len(requests):
        raise DataError("the run has no validation requests, so its scores can not be calibrated")
    scores, clicked, numbers = [], [], []
    for index in chunks(len(requests), dataset.num_items):
        asked = requests.select(index)
        given = None if shown is None else shown.select(torch.from_numpy(index))
        most = None if given is None else max(1, int(given.lengths.max()))
        page = cascade.run(make_batch(dataset, asked, cascade.max_history), k=most, candidates=given)
        found_nS = scores_of(page, stage, systems)
        if found_nS is None:
            raise DataError(f"{stage} gave no scores on validation requests, so they can not be calibrated")
        rows = next(trace.rows for trace in page.traces if trace.name == stage).to("cpu")
        scores.append(found_nS)
        clicked.append(labels_of(rows, asked)[0].numpy().astype(np.float64))
        numbers.append(index[rows.row_of_value.numpy()])
    return Judged(
        scores_nS=np.concatenate(scores),
        clicked_n=np.concatenate(clicked),
        request_n=np.concatenate(numbers),
        kind="choices" if shown is None else "impressions",
    )


def fit_calibration(run: Run, config: ClickConfig | None = None) -> tuple[Calibration, list[Bin]]:
    """The calibration of a run, and how reliable the same fit on half of the requests is on the other half.

    Raises DataError where the validation window has no clicks among what is judged, or nothing else.
    """
    config = config or ClickConfig()
    cascade = as_of(run, "valid")
    return calibrated(judge(cascade, run.dataset, config), judged_systems(cascade)[1], run.version, config)


def calibrated(
    judged: Judged, systems: tuple[str, ...], version: str, config: ClickConfig
) -> tuple[Calibration, list[Bin]]:
    """As `fit_calibration`, from what was judged."""
    fit_half = judged.request_n % 2 == 0
    half = fit(judged.scores_nS[fit_half], judged.clicked_n[fit_half], systems, version, judged.kind, config.method)
    chance_n, clicked_n = half.chances(judged.scores_nS[~fit_half]), judged.clicked_n[~fit_half]
    _check(clicked_n)
    rate = float(np.clip(clicked_n.mean(), LEAST, 1 - LEAST))
    held_out = {
        "logloss": logloss(clicked_n, chance_n),
        "logloss of the mean rate": logloss(clicked_n, np.full(len(clicked_n), rate)),
        "calibration error": expected_calibration_error(clicked_n, chance_n, spacing="mass"),
    }
    made = fit(judged.scores_nS, judged.clicked_n, systems, version, judged.kind, config.method, held_out)
    return made, reliability(chance_n, clicked_n)


def fit(
    scores_nS: Float,
    clicked_n: Float,
    systems: tuple[str, ...],
    version: str,
    kind: Literal["impressions", "choices"],
    method: Method = "platt",
    held_out: Mapping[str, float] | None = None,
) -> Calibration:
    """A calibration of raw scores against clicks; DataError unless some were clicked and some were not."""
    _check(clicked_n)
    mean_S, spread_S = scores_nS.mean(0), scores_nS.std(0)
    scale_S = np.where(spread_S > 1e-12, 1 / np.maximum(spread_S, 1e-12), 0.0)
    x_nS = (scores_nS - mean_S) * scale_S
    weight_S, bias = logistic(x_nS, clicked_n)
    z_X, chance_X = (np.zeros(0), np.zeros(0))
    if method == "isotonic":
        z_X, chance_X = rising(bias + x_nS @ weight_S, clicked_n)
    return Calibration(
        version=version,
        method=method,
        systems=systems,
        mean_S=tuple(mean_S.tolist()),
        scale_S=tuple(scale_S.tolist()),
        weight_S=tuple(weight_S.tolist()),
        bias=bias,
        z_X=tuple(z_X.tolist()),
        chance_X=tuple(chance_X.tolist()),
        rate=float(clicked_n.mean()),
        num_judged=len(clicked_n),
        num_clicked=int(clicked_n.sum()),
        judged=kind,
        held_out=dict(held_out or {}),
    )


def logistic(x_nS: Float, clicked_n: Float) -> tuple[Float, float]:
    """Weights [S] and bias of the logistic regression with Platt's targets (clicks + 1) / (clicks + 2) and 1 / (others + 2).

    Newton's method with halved steps; a small ridge keeps weights of scores that say the same finite.
    """
    num_clicked = clicked_n.sum()
    target_n = np.where(clicked_n > 0, (num_clicked + 1) / (num_clicked + 2), 1 / (len(clicked_n) - num_clicked + 2))
    x_n1 = np.column_stack([x_nS, np.ones(len(x_nS))])
    ridge = np.full(x_n1.shape[1], _RIDGE * len(x_n1))
    ridge[-1] = 0.0
    beta = np.zeros(x_n1.shape[1])
    rate = target_n.mean()
    beta[-1] = math.log(rate / (1 - rate))

    def loss(at: Float) -> float:
        z_n = x_n1 @ at
        return float((np.logaddexp(0.0, z_n) - target_n * z_n).sum() + 0.5 * (ridge * at**2).sum())

    now = loss(beta)
    for _ in range(_STEPS):
        chance_n = _sigmoid(x_n1 @ beta)
        slope = x_n1.T @ (chance_n - target_n) + ridge * beta
        curve = (x_n1 * (chance_n * (1 - chance_n))[:, None]).T @ x_n1 + np.diag(ridge)
        step = np.linalg.lstsq(curve, slope, rcond=None)[0]
        size = 1.0
        while loss(beta - size * step) > now and size > 1e-6:
            size /= 2
        beta = beta - size * step
        before, now = now, loss(beta)
        if before - now < 1e-10 * max(abs(now), 1.0):
            break
    return beta[:-1], float(beta[-1])


def rising(z_n: Float, clicked_n: Float) -> tuple[Float, Float]:
    """The rising step function nearest to the clicks in squared error, as points [X] to draw straight lines between: each step's mean z.

    Pool adjacent violators over equal z taken together. The ends keep half a click away from 0 and 1, so that no chance is certain.
    """
    order = np.argsort(z_n, kind="stable")
    z_s, start_s = np.unique(z_n[order], return_index=True)
    weight_s = np.diff(np.append(start_s, len(z_n))).astype(np.float64)
    clicks_s = np.add.reduceat(clicked_n[order], start_s)
    blocks: list[tuple[float, float, float]] = []  # clicks, items, sum of z
    for clicks, weight, z_sum in zip(clicks_s.tolist(), weight_s.tolist(), (z_s * weight_s).tolist()):
        blocks.append((clicks, weight, z_sum))
        while len(blocks) > 1 and blocks[-2][0] * blocks[-1][1] >= blocks[-1][0] * blocks[-2][1]:
            last, before = blocks.pop(), blocks.pop()
            blocks.append((before[0] + last[0], before[1] + last[1], before[2] + last[2]))
    clicks_X, weight_X, z_X = np.array(blocks).T
    edge = 0.5 / len(z_n)
    return z_X / weight_X, np.clip(clicks_X / weight_X, edge, 1 - edge)


def reliability(chance_n: Float, clicked_n: Float, num_bins: int = 10) -> list[Bin]:
    """Items in bins of about equal number by their chance, lowest first: what was promised and what came."""
    order = np.argsort(chance_n, kind="stable")
    bins = []
    for part in np.array_split(order, min(num_bins, len(order))):
        clicks, count = float(clicked_n[part].sum()), len(part)
        low, high = wilson(clicks, count)
        predicted = float(chance_n[part].mean())
        bins.append(Bin(num_judged=count, predicted=predicted, observed=clicks / count, low=low, high=high))
    return bins


def wilson(clicks: float, count: float, z: float = 1.96) -> tuple[float, float]:
    """Interval of a rate (Wilson, JASA 1927)."""
    rate = clicks / count
    middle = (rate + z * z / (2 * count)) / (1 + z * z / count)
    reach = z * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def reliability_lines(bins: Sequence[Bin]) -> list[str]:
    """A table for people."""
    head = f"{'items':>8} {'promised':>10} {'came':>10}   95 % of what came"
    rows = [f"{b.num_judged:>8,} {b.predicted:>10.4f} {b.observed:>10.4f}   {b.low:.4f} to {b.high:.4f}" for b in bins]
    return [head, *rows]


def _check(clicked_n: Float) -> None:
    if not len(clicked_n) or clicked_n.min() == clicked_n.max():
        raise DataError(
            f"of {len(clicked_n):,} judged items of the validation window {int(clicked_n.sum()):,} were clicked; a calibration needs some "
            "that were and some that were not"
        )


def _sigmoid(z_n: Float) -> Float:
    return 0.5 * (1.0 + np.tanh(0.5 * z_n))
