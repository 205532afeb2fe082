"""Settings of the trainer: what is the same whatever the system."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from shortlist.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleChoice:
    """How the gradients of several tasks become one step; part of the trainer's settings."""

    rule: str = "sum"
    """Registered name of the gradient rule: sum, pcgrad, gradvac, cagrad, mgda, imtl-g, nash-mtl, gradops, or one of your own."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Its settings by name, such as {alpha = -1} for gradops."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedbackChoice:
    """How a task is learned whose outcome comes late, such as a purchase hours after the click."""

    rule: str = "none"
    """Registered name of the feedback rule: vanilla, fnw, fsiw, es-dfm, defer, defuse, or one of your own; none = labels are final as
    they stand. A rule whose scores are no logits of a chance by themselves (fnc, dfm, bi-defuse) works in the streaming trainer alone."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Its settings by name, such as {posterior = "current"} for defuse."""
    task: str = ""
    """In a cascade: which of `learning.tasks` comes late; empty = the last of them."""
    delay: str = ""
    """In a cascade with logged candidates: label column with the hours from the page to the outcome, read where the task's label is above
    0. Where tasks are actions, the log's own times tell."""
    observation_hours: float = 1.0
    """How long a click waits for its conversion before it is learned from as one without."""
    auxiliary_epochs: int = 5
    """Passes of the networks that tell how likely a conversion is still to come, before training proper."""

    def __post_init__(self) -> None:
        if not self.observation_hours >= 0:
            raise ConfigError(f"observation_hours must not be negative, got {self.observation_hours}")
        if self.auxiliary_epochs < 1:
            raise ConfigError(f"auxiliary_epochs must be at least 1, got {self.auxiliary_epochs}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerConfig:
    """How a system is trained."""

    epochs: int = 20
    """Passes over the training examples at most, per phase; a phase may set its own."""
    batch_size: int = 256
    """Sequences or requests per step; read by whoever builds the sources."""
    lr: float = 1e-3
    """Learning rate of everything but sparse tables."""
    weight_decay: float = 0.0
    """Decay of matrices; biases, norms and sparse tables are never decayed."""
    clip_norm: float | None = 5.0
    """Largest Euclidean norm of all gradients together; None = no clipping."""
    patience: int | None = 3
    """Validations without a new best score before the last phase stops; None = never."""
    validate_every: int = 1
    """Epochs between validations."""
    seed: int = 0
    """Of dropout, sampling and the order of examples."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto = a GPU where there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 computes the losses under autocast; weights and optimiser state stay float32. Helps where the hardware has it."""
    optimiser: Literal["adamw", "adam", "adagrad", "sgd"] = "adamw"
    """For everything but sparse tables."""
    table_optimiser: Literal["adagrad", "adam"] = "adam"
    """Row-wise rule for sparse tables."""
    table_lr: float | None = None
    """Learning rate of sparse tables; None = lr."""
    max_seconds: float | None = None
    """Budget of wall time for the whole training, interruptions not counted; None = no limit."""
    checkpoint_seconds: float = 60.0
    """Time between checkpoints inside an epoch; one is also written at the end of every epoch. 0 = after every step."""
    deterministic: bool = True
    """Same seed, same machine, same result: operations that add in an undefined order are replaced by slower ones."""
    gradients: RuleChoice = field(default_factory=RuleChoice)
    """What becomes of the tasks' gradients of shared parameters, where a system has several losses."""
    task_weights: tuple[float, ...] = ()
    """Weight of each task's loss, in the order of the tasks; empty = all 1."""
    task_decay: tuple[float, ...] = ()
    """Factor by which each task's weight changes from one epoch to the next (PLE, section 4.3); empty = none."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "validate_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "clip_norm", "table_lr", "max_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be above 0, got {value}")
        for name in ("weight_decay", "checkpoint_seconds", "seed"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.patience is not None and self.patience < 1:
            raise ConfigError(f"patience must be at least 1, got {self.patience}; leave it out to train all epochs")
        for name in ("task_weights", "task_decay"):
            if any(not value > 0 for value in getattr(self, name)):
                raise ConfigError(f"{name} must all be above 0, got {list(getattr(self, name))}")

    def deciding(self) -> dict[str, Any]:
        """Settings by name that decide a training's result, as plain tables. What came later than checkpoints and folders of training
        state stands there only where it is set, so that older ones still fit."""
        table = asdict(self)
        plain = TrainerConfig()
        for name in LATER:
            if getattr(self, name) == getattr(plain, name):
                del table[name]
        return table


LATER = ("gradients", "task_weights", "task_decay")
"""Settings added after the first release of checkpoints."""
