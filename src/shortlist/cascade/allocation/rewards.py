"""What a chain is worth to a request: models learned from past requests.

    model = RewardModel("recursive", RewardConfig(), chains, num_features)
    model.fit(outcomes)                  rows of all chains by replay, or one chain per request with the chance it had
    model.predict(contexts_RF)           [R, J]

Linear on features x one-hot chain (closed form, then made monotone; the value model that DCAF served with), GreenFlow's recursive one, and
what both are compared with. "Monotone" ones never predict that a chain with the same models and nowhere fewer candidates is worth less.

R requests, F features, J chains, K stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shortlist.cascade.allocation.base import ChainSet, Float, Int, Outcomes
from shortlist.cascade.allocation.reward_nets import Additive, Join, Monotone, Plain, Recursive, Shared
from shortlist.errors import ConfigError, DataError
from shortlist.registry import nearest

Kind = Literal["linear", "recursive", "log", "monotone", "additive", "plain"]
MONOTONE: tuple[Kind, ...] = ("linear", "recursive", "log", "monotone")
"""Models without violations of monotonicity."""
RIDGES = (1.0, 10.0, 100.0, 1000.0)
"""Strengths of which the linear model takes the best on the requests that validate."""
FAR = 8.0
"""Standard deviations from its mean at which a feature is cut, so that a strange request gets no strange price."""
AT_ONCE = 4096
"""Requests that a network sees at a time: the plain one holds a hidden vector for each of their chains."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig:
    """How a value model learns; the linear one reads `valid_share`, `most_weight`, `shrink` and `seed` alone."""

    join: Join = "product"
    """How recursive ones join a stage's gain to what earlier stages let through: their product or their soft minimum."""
    loss: Literal["squared", "poisson"] = "squared"
    """Squared error, for any reward; poisson where rewards are counts or vary in proportion to their size. Both aim at the mean."""
    dim: int = 64
    """Hidden width of networks."""
    epochs: int = 100
    """Most passes over the requests."""
    patience: int = 10
    """Passes without a better loss on the requests that validate, after which training stops."""
    batch_size: int = 256
    """Requests per step."""
    lr: float = 2e-3
    """Step size of Adam."""
    valid_share: float = 0.15
    """Share of users whose requests validate."""
    most_weight: float = 100.0
    """Weights 1 / propensity are cut at so many times their median: a little bias against a lot of variance."""
    shrink: bool = True
    """Whether what sets a request apart is believed only as far as it came true on the requests that validate: see `trust`."""
    seed: int = 0
    """Of the split, the first weights and the order of batches."""

    def __post_init__(self) -> None:
        for name in ("dim", "epochs", "patience", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.valid_share < 1:
            raise ConfigError(f"valid_share must be between 0 and 1, got {self.valid_share}")
        if not self.lr > 0 or not self.most_weight >= 1:
            raise ConfigError(f"lr must be above 0 and most_weight at least 1, got {self.lr} and {self.most_weight}")


class CountOrder:
    """The partial order of chains that have the same models: one is above another if no stage scores fewer candidates.

    Args:
        chains: J of them.
    """

    def __init__(self, chains: ChainSet) -> None:
        _, model_J = np.unique(chains.model_JK, axis=0, return_inverse=True)
        self.model_J: Int = model_J.reshape(-1)
        self.count_JK = chains.count_JK
        places = [np.unique(chains.count_JK[:, k], return_inverse=True)[1] for k in range(len(chains.stages))]
        self.shape = (int(self.model_J.max()) + 1, *(int(p.max()) + 1 for p in places))
        self.cell_J = np.ravel_multi_index((self.model_J, *places), self.shape)

    def raised(self, values_RJ: Float) -> Float:
        """[R, J]: every value at least as large as those below it in the order: the running maximum along each stage's counts.

        On a grid of all counts of all stages, where cells without a chain start empty; values that are in order come back bit for bit.
        """
        grid_XR = np.full((int(np.prod(self.shape)), len(values_RJ)), -np.inf)
        grid_XR[self.cell_J] = values_RJ.T
        grid = grid_XR.reshape(*self.shape, len(values_RJ))
        for axis, size in enumerate(self.shape[1:], start=1):
            along = np.moveaxis(grid, axis, 0)
            for i in range(1, size):  # many times faster than np.maximum.accumulate
                np.maximum(along[i], along[i - 1], out=along[i])
        return np.ascontiguousarray(grid_XR[self.cell_J].T)

    def pairs(self) -> tuple[Int, Int]:
        """Numbers of all pairs (below, above) of different chains."""
        below_JJ = (self.count_JK[:, None] <= self.count_JK[None]).all(2)
        below_JJ &= (self.model_J[:, None] == self.model_J[None]) & ~np.eye(len(self.model_J), dtype=bool)
        below, above = np.nonzero(below_JJ)
        return below, above

    def violations(self, values_RJ: Float) -> float:
        """Share of (request, ordered pair) in which the chain above has the smaller value; 0 where no chains are ordered."""
        below, above = self.pairs()
        if not len(below):
            return 0.0
        return float(np.mean([(row_J[below] > row_J[above]).mean() for row_J in values_RJ]))


@dataclass(frozen=True, kw_only=True)
class _Lesson:
    """What a model learns from: features in units of their deviation, rewards in units of their mean, and how much each counts."""

    x_RF: NDArray[np.float32]
    reward_RJ: Float
    """0 where unknown."""
    weight_RJ: Float
    """0 where unknown, 1 on average elsewhere."""
    valid_R: NDArray[np.bool_]


class RewardModel:
    """Predicts the row of all chains' rewards from what is known of a request.

    Args:
        kind: linear; recursive: GreenFlow's; log: the same with a single logarithmic basis; monotone, plain: networks; additive: by stage.
        config: settings.
        chains: J chains.
        num_features: F.

    Raises ConfigError for another kind.
    """

    def __init__(self, kind: Kind, config: RewardConfig, chains: ChainSet, num_features: int) -> None:
        if kind not in get_args(Kind):
            raise ConfigError(f"no value model named {kind!r}: {nearest(kind, list(get_args(Kind)))}")
        self.kind: Kind = kind
        self.config, self.chains, self.num_features = config, chains, num_features
        self.order = CountOrder(chains)
        self.mean_F = np.zeros(num_features, dtype=np.float32)
        self.deviation_F = np.ones(num_features, dtype=np.float32)
        self.scale = 1.0
        self.valid_loss = float("nan")
        """Loss on the requests that validated, in units of the mean reward; NaN before fitting."""
        self.typical_J: Float = np.zeros(len(chains))
        """What is predicted on average, in units of the mean reward."""
        self.trust = 1.0
        """Share of a request's difference from the typical one that is believed."""
        self._weight_GJ: Float = np.zeros((num_features + 1, len(chains)))
        self._net = None if kind == "linear" else _net(kind, config, chains, num_features)
        self._shared: list[Shared] | None = None

    def fit(self, outcomes: Outcomes) -> None:
        """Learn from past requests; same seed and data, same model. Requests of one user stay on one side of the validating split.

        Rewards that are NaN are unknown and do not count; where chains were drawn, each counts 1 / propensity.

        Raises DataError: shapes that do not fit, no reward known, a known one below 0 or of propensity 0, fewer than two users.
        """
        lesson = self._lesson(outcomes)
        if self._net is None:
            self._weight_GJ, self.valid_loss = _ridge(lesson)
        else:
            self._net, self.valid_loss = _train(
                _net(self.kind, self.config, self.chains, self.num_features), self.config, lesson
            )
            self._shared = None
        if self.config.shrink:
            value_RJ = np.concatenate(
                [self._raw(part) for part in np.array_split(lesson.x_RF, -(-len(lesson.x_RF) // AT_ONCE))]
            )
            self.typical_J = value_RJ[~lesson.valid_R].mean(0)
            self.trust = trust(value_RJ - self.typical_J, lesson.reward_RJ, lesson.weight_RJ, lesson.valid_R)

    def predict(self, contexts_RF: NDArray[np.float32]) -> Float:
        """float64 [R, J]: expected rewards. DataError for another number of features."""
        if contexts_RF.ndim != 2 or contexts_RF.shape[1] != self.num_features:
            raise DataError(f"this model reads {self.num_features} features per request, got {contexts_RF.shape}")
        parts = [self._rows(contexts_RF[i : i + AT_ONCE]) for i in range(0, max(len(contexts_RF), 1), AT_ONCE)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _rows(self, contexts_RF: NDArray[np.float32]) -> Float:
        values_RJ = self._raw(self._scaled(contexts_RF))
        if self.trust < 1:  # between two values in order is a value in order
            values_RJ = self.typical_J + self.trust * (values_RJ - self.typical_J)
        return values_RJ * self.scale

    def _raw(self, x_RF: NDArray[np.float32]) -> Float:
        """[R, J] from scaled features, in units of the mean reward."""
        if self._net is None:
            values_RJ = x_RF @ self._weight_GJ[1:] + self._weight_GJ[0]
        else:
            with torch.inference_mode():
                values_RJ = self._forward(torch.from_numpy(x_RF)).numpy().astype(np.float64)
        return self.order.raised(values_RJ) if self.kind in MONOTONE else values_RJ

    def state(self) -> dict[str, Float]:
        """Arrays that `load_state` restores."""
        arrays: dict[str, Float] = {
            "mean": self.mean_F.astype(np.float64),
            "deviation": self.deviation_F.astype(np.float64),
            "scale": np.array([self.scale]),
            "typical": self.typical_J,
            "trust": np.array([self.trust]),
        }
        if self._net is None:
            return arrays | {"linear": self._weight_GJ}
        return arrays | {f"net.{n}": np.array(p.numpy(), dtype=np.float64) for n, p in self._net.state_dict().items()}

    def load_state(self, state: Mapping[str, Float]) -> None:
        """Restore what `state` gave; DataError names the first array that is missing or of another shape, and nothing changes."""
        for name, have in self.state().items():
            if name not in state or state[name].shape != have.shape:
                found = state[name].shape if name in state else "none"
                raise DataError(
                    f"the value model's state needs {name} of shape {have.shape}, found {found}; calibrate again"
                )
        self.mean_F = state["mean"].astype(np.float32)
        self.deviation_F = state["deviation"].astype(np.float32)
        self.scale = float(state["scale"][0])
        self.typical_J, self.trust = np.array(state["typical"], dtype=np.float64), float(state["trust"][0])
        self._shared = None
        if self._net is None:
            self._weight_GJ = np.array(state["linear"], dtype=np.float64)
        else:
            kept = self._net.state_dict()
            self._net.load_state_dict({n: torch.tensor(state[f"net.{n}"], dtype=p.dtype) for n, p in kept.items()})

    def _forward(self, x_RF: Tensor) -> Tensor:
        if isinstance(self._net, Recursive):
            if self._shared is None:
                self._shared = self._net.shared()
            return self._net(x_RF, self._shared)
        assert self._net is not None
        return self._net(x_RF)

    def _scaled(self, contexts_RF: NDArray[np.float32]) -> NDArray[np.float32]:
        x_RF = (contexts_RF.astype(np.float32, copy=False) - self.mean_F) / self.deviation_F
        return np.clip(x_RF, -FAR, FAR)

    def _lesson(self, outcomes: Outcomes) -> _Lesson:
        """Checks and scales; sets what scales."""
        size = (len(outcomes), len(self.chains))
        if outcomes.rewards_RJ.shape != size or outcomes.contexts_RF.shape != (size[0], self.num_features):
            raise DataError(
                f"rewards {size} and features {(size[0], self.num_features)} are needed, got {outcomes.rewards_RJ.shape} and "
                f"{outcomes.contexts_RF.shape}"
            )
        if not np.isfinite(outcomes.contexts_RF).all():
            raise DataError("features of past requests hold NaN or infinities; give a number for what is unknown")
        weight_RJ = known_weights(outcomes, self.config.most_weight)
        reward_RJ = np.where(weight_RJ > 0, outcomes.rewards_RJ, 0.0)
        valid_R = _validating(outcomes.users_R, self.config)
        if not (weight_RJ[valid_R].any() and weight_RJ[~valid_R].any()):
            raise DataError("no reward is known of the users who validate, or of the others; log more requests")
        self.mean_F = outcomes.contexts_RF.mean(0, dtype=np.float64).astype(np.float32)
        deviation_F = outcomes.contexts_RF.std(0, dtype=np.float64).astype(np.float32)
        self.deviation_F = np.where(deviation_F > 1e-6, deviation_F, np.float32(1.0))
        self.scale = float((reward_RJ * weight_RJ).sum() / weight_RJ.sum()) or 1.0
        return _Lesson(
            x_RF=self._scaled(outcomes.contexts_RF),
            reward_RJ=reward_RJ / self.scale,
            weight_RJ=weight_RJ,
            valid_R=valid_R,
        )


def known_weights(outcomes: Outcomes, most: float = np.inf) -> Float:
    """[R, J]: how much each reward counts: 0 where unknown, else 1 or 1 / propensity; 1 on average.

    Args:
        outcomes: of past requests.
        most: weights above so many times their median are cut.

    Raises DataError: no reward known, or a known one below 0, infinite, or of propensity 0.
    """
    known_RJ = ~np.isnan(outcomes.rewards_RJ)
    known = outcomes.rewards_RJ[known_RJ]
    if not len(known):
        raise DataError("no reward of any chain is known; replay requests or log chains first")
    if not (np.isfinite(known).all() and (known >= 0).all()):
        raise DataError("rewards of chains must be numbers of 0 or above")
    weight_RJ = known_RJ.astype(np.float64)
    if outcomes.propensity_RJ is not None:
        chance = outcomes.propensity_RJ[known_RJ]
        if not ((chance > 0) & (chance <= 1)).all():
            raise DataError("a reward is known of a chain whose propensity is not above 0 and at most 1")
        weight = 1.0 / chance
        weight_RJ[known_RJ] = np.minimum(weight, most * np.median(weight))
    return weight_RJ / weight_RJ[known_RJ].mean()


def mean_rewards(outcomes: Outcomes, num_chains: int) -> Float:
    """[J]: mean reward of each chain over all requests, weighed by 1 / propensity where chains were drawn; NaN for one never tried.

    Raises DataError as `known_weights` does, and for another number of chains.
    """
    if outcomes.rewards_RJ.shape != (len(outcomes), num_chains):
        raise DataError(f"{num_chains} chains need as many rewards per request, got {outcomes.rewards_RJ.shape}")
    weight_RJ = known_weights(outcomes)
    total_J = weight_RJ.sum(0)
    summed_J = np.where(weight_RJ > 0, outcomes.rewards_RJ, 0.0) * weight_RJ
    return np.divide(summed_J.sum(0), total_J, out=np.full(len(total_J), np.nan), where=total_J > 0)


def trust(own_RJ: Float, reward_RJ: Float, weight_RJ: Float, valid_R: NDArray[np.bool_]) -> float:
    """How far predicted differences between chains come true, request by request: from 0, not at all, to 1.

    The slope of the regression, through the origin, of what chains really brought beyond their mean on what was predicted beyond the
    typical request's, both centred within the request, since only differences between its chains matter to a choice; on requests that
    validate and know two chains or more. A model that found nothing gets 0 and all requests are then treated alike, which keeps an
    allocator from buying the luckiest of many noisy predictions.

    Args:
        own_RJ: predicted, less what is predicted on average.
        reward_RJ: 0 where unknown.
        weight_RJ: 0 where unknown.
        valid_R: requests to look at; the means of chains are those of the others.

    Returns 1 where no request knows two chains.
    """
    learn_R = ~valid_R
    total_J = weight_RJ[learn_R].sum(0)
    mean_J = (weight_RJ * reward_RJ)[learn_R].sum(0) / np.maximum(total_J, 1e-12)
    weight_VJ = weight_RJ[valid_R] * (total_J > 0)
    weight_VJ = weight_VJ * ((weight_VJ > 0).sum(1) > 1)[:, None]
    share_VJ = weight_VJ / np.maximum(weight_VJ.sum(1, keepdims=True), 1e-12)
    predicted_VJ, true_VJ = own_RJ[valid_R], reward_RJ[valid_R] - mean_J
    predicted_VJ = predicted_VJ - (share_VJ * predicted_VJ).sum(1, keepdims=True)
    true_VJ = true_VJ - (share_VJ * true_VJ).sum(1, keepdims=True)
    if not weight_VJ.any():
        return 1.0
    spread = float((weight_VJ * predicted_VJ**2).sum())
    return float(np.clip((weight_VJ * predicted_VJ * true_VJ).sum() / spread, 0.0, 1.0)) if spread > 0 else 1.0


def _validating(users_R: Int, config: RewardConfig) -> NDArray[np.bool_]:
    """bool [R]: requests of a random share of the users, at least one user and not all."""
    users, user_R = np.unique(users_R, return_inverse=True)
    if len(users) < 2:
        raise DataError(
            f"a value model needs requests of at least two users, one of them to validate; found {len(users)}"
        )
    number = min(max(round(config.valid_share * len(users)), 1), len(users) - 1)
    chosen = np.random.default_rng(config.seed).permutation(len(users)) < number
    valid_R: NDArray[np.bool_] = chosen[user_R.reshape(-1)]
    return valid_R


def _ridge(lesson: _Lesson) -> tuple[Float, float]:
    """Weights [1 + F, J] on (1, features), and their squared error on the requests that validate.

    Closed form twice: what all chains share, then each chain's own difference from it, which few observations leave near 0. The strength
    is the best of `RIDGES` there; then all requests are used.
    """
    x_RG = np.concatenate([np.ones((len(lesson.x_RF), 1)), lesson.x_RF], 1)
    train_R = ~lesson.valid_R
    errors = []
    for ridge in RIDGES:
        weight_GJ = _solved(x_RG[train_R], lesson.reward_RJ[train_R], lesson.weight_RJ[train_R], ridge)
        w_RJ = lesson.weight_RJ[lesson.valid_R]
        error_RJ = (x_RG[lesson.valid_R] @ weight_GJ - lesson.reward_RJ[lesson.valid_R]) ** 2
        errors.append(float((error_RJ * w_RJ).sum() / max(w_RJ.sum(), 1e-12)))
    best = int(np.argmin(errors))
    return _solved(x_RG, lesson.reward_RJ, lesson.weight_RJ, RIDGES[best]), errors[best]


def _solved(x_RG: Float, reward_RJ: Float, weight_RJ: Float, ridge: float) -> Float:
    eye_GG = ridge * np.eye(x_RG.shape[1])
    shared_G = np.linalg.solve((x_RG.T * weight_RJ.sum(1)) @ x_RG + eye_GG, x_RG.T @ (weight_RJ * reward_RJ).sum(1))
    left_RJ = reward_RJ - (x_RG @ shared_G)[:, None]
    if (weight_RJ == weight_RJ[:, :1]).all():  # as by replay: one matrix for all chains
        own_GJ = np.linalg.solve((x_RG.T * weight_RJ[:, 0]) @ x_RG + eye_GG, x_RG.T @ (weight_RJ * left_RJ))
    else:
        columns = [
            np.linalg.solve((x_RG.T * w_R) @ x_RG + eye_GG, x_RG.T @ (w_R * left_R))
            for w_R, left_R in zip(weight_RJ.T, left_RJ.T)
        ]
        own_GJ = np.stack(columns, 1)
    return shared_G[:, None] + own_GJ


def _net(kind: Kind, config: RewardConfig, chains: ChainSet, num_features: int) -> nn.Module:
    """The network with its first weights, the same for the same seed; torch's own generator is left as it was."""
    model_JK, count_JK, dim = chains.model_JK, chains.count_JK, config.dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        match kind:
            case "recursive":
                return Recursive(num_features, model_JK, count_JK, dim=dim, join=config.join)
            case "log":
                return Recursive(num_features, model_JK, count_JK, dim=dim, join=config.join, bases=("log",))
            case "monotone":
                return Monotone(num_features, model_JK, count_JK, dim=dim)
            case "additive":
                return Additive(num_features, model_JK, count_JK, dim=dim)
            case _:
                return Plain(num_features, len(chains), dim=dim)


def _loss(config: RewardConfig, value_BJ: Tensor, reward_BJ: Tensor, weight_BJ: Tensor) -> Tensor:
    """Mean over what is known. Poisson: deviance up to what does not depend on the value."""
    squared = config.loss == "squared"
    error_BJ = (value_BJ - reward_BJ) ** 2 if squared else value_BJ - reward_BJ * (value_BJ + 1e-8).log()
    return (error_BJ * weight_BJ).sum() / weight_BJ.sum().clamp(min=1e-12)


def _train(net: nn.Module, config: RewardConfig, lesson: _Lesson) -> tuple[nn.Module, float]:
    """The network with the weights that were best on the requests that validate, and their loss there. float32 on the CPU."""
    x_RF = torch.from_numpy(lesson.x_RF)
    reward_RJ = torch.from_numpy(lesson.reward_RJ).float()
    weight_RJ = torch.from_numpy(lesson.weight_RJ).float()
    learn = np.flatnonzero(~lesson.valid_R & (lesson.weight_RJ > 0).any(1))
    valid = torch.from_numpy(np.flatnonzero(lesson.valid_R))
    optimiser = torch.optim.Adam(net.parameters(), lr=config.lr)
    rng = np.random.default_rng((config.seed, 1))
    best_loss, best, waited = float("inf"), _weights(net), 0
    for _ in range(config.epochs):
        order = torch.from_numpy(rng.permutation(learn))
        for rows in order.split(config.batch_size):
            loss = _loss(config, net(x_RF[rows]), reward_RJ[rows], weight_RJ[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.inference_mode():
            parts = [_loss(config, net(x_RF[r]), reward_RJ[r], weight_RJ[r]) for r in valid.split(AT_ONCE)]
            sizes = [weight_RJ[r].sum() for r in valid.split(AT_ONCE)]
            now = float(sum(p * s for p, s in zip(parts, sizes)) / max(float(sum(sizes)), 1e-12))
        waited += 1
        if now < best_loss:
            best_loss, best, waited = now, _weights(net), 0
        if waited >= config.patience:
            break
    net.load_state_dict(best)
    return net.eval(), best_loss


def _weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in net.state_dict().items()}
