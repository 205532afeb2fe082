"""The contract of feedback rules: what a sample of a stream teaches, when its label is only what was known as it was emitted.

Of a click, p is the chance that it converts within the attribution window, h that a conversion comes after the observation window, and
dp = p h. Samples of a stream with late positives, and their mass per click:

    kind       label   truth   mass           a rule's loss of one sample with the network's chance f of a conversion
    POSITIVE   1       1       p (1 - h)          up * -log f + down * -log (1 - f)
    NEGATIVE   0       1       dp             up and down are constants to the gradient: they may be made of f, but are not
    NEGATIVE   0       0       1 - p          differentiated. A network that reads the same x for all these samples ends where the
    LATE       1       1       dp             masses times up and down balance: f = up / (up + down).

n samples, H outputs of the network (1 for most rules).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from shortlist.layers.losses import weighted_mean
from shortlist.training.choice import chosen
from shortlist.training.config import FeedbackChoice
from shortlist.training.feedback.targets import Auxiliary

Stream = Literal["final", "observed", "late", "fake-negatives", "settled"]
"""What is emitted of a click; see `streams.emit`."""
NEGATIVE, POSITIVE, LATE, SETTLED_NEGATIVE, SETTLED_POSITIVE = range(5)
"""`sample_kind`: without a conversion when first emitted; with one; the copy of a conversion that came later; and the copies of clicks
that are emitted once more when the attribution window closes."""
DAY_S = 86_400.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What is known of n samples as they are emitted."""

    label: Tensor
    """float32 [n]."""
    kind: Tensor
    """int64 [n]: NEGATIVE, POSITIVE, LATE, SETTLED_NEGATIVE, SETTLED_POSITIVE."""
    elapsed: Tensor
    """float32 [n] seconds between click and emission."""
    delay: Tensor
    """float32 [n] seconds between click and conversion; NaN where none had come."""
    auxiliary: Mapping[str, Tensor] = field(default_factory=dict)
    """float32 [n] chances by name, from the rule's frozen auxiliary network."""

    def select(self, which: Tensor) -> Seen:
        """The samples where a mask bool [n] holds, or those with the numbers int64 [m]."""
        return Seen(
            label=self.label[which],
            kind=self.kind[which],
            elapsed=self.elapsed[which],
            delay=self.delay[which],
            auxiliary={name: chance[which] for name, chance in self.auxiliary.items()},
        )


class FeedbackRule:
    """Turns what is seen of clicks into losses. `Config` is its settings dataclass. A rule writes `targets`, or `losses` where its loss is
    no weighted cross-entropy."""

    kind: ClassVar[str] = "feedback-rule"
    Config: ClassVar[type]
    heads: ClassVar[tuple[str, ...]] = ("chance",)
    """The network's outputs: names of the H tasks that a ranker is built on."""
    auxiliary: Auxiliary | None = None
    """The network that must be trained before, on clicks that are old enough."""
    as_known: ClassVar[bool] = False
    """A label may stand for any time since the click: where all is learned at one moment, clicks are read as known then, once each."""
    own_chance: ClassVar[bool] = True
    """The sigmoid of the first output is the chance; else only `chance` can tell it, and a cascade, which serves scores as they are, can
    not use the rule."""
    realisable: ClassVar[bool] = True
    """False where labels are read before they are there."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def stream(self) -> Stream:
        """What is emitted of a click."""
        return "late"

    def targets(self, chance_n: Tensor, seen: Seen) -> tuple[Tensor, Tensor]:
        """`up` and `down` [n] for the network's chances [n], which carry no gradient."""
        raise TypeError(f"the loss of {type(self).__name__} is no weighted cross-entropy; call losses")

    def losses(self, logit_nH: Tensor, seen: Seen) -> Tensor:
        """float [n]: the loss of each sample."""
        logit_n = logit_nH[:, 0]
        with torch.no_grad():
            up_n, down_n = self.targets(logit_n.sigmoid(), seen)
        return cross_entropy(logit_n, up_n, down_n)

    def first_losses(self, logit_nH: Tensor, seen: Seen) -> Tensor:
        """float [n]: the loss of old clicks, once each, labelled as known now: how training begins before there is a stream."""
        return cross_entropy(logit_nH[:, 0], seen.label, 1 - seen.label)

    def chance(self, logit_nH: Tensor) -> Tensor:
        """float [n] in 0..1: of a conversion."""
        return logit_nH[:, 0].sigmoid()


def cross_entropy(logit_n: Tensor, up_n: Tensor, down_n: Tensor) -> Tensor:
    """up * -log f + down * -log (1 - f), f the sigmoid of the logits; all float [n]."""
    return up_n * softplus(-logit_n) + down_n * softplus(logit_n)


def by_label(seen: Seen, positive_n: Tensor, negative_n: Tensor) -> tuple[Tensor, Tensor]:
    """`up` and `down` where samples count as labelled, with these weights."""
    return seen.label * positive_n, (1 - seen.label) * negative_n


def make_feedback(choice: FeedbackChoice) -> FeedbackRule | None:
    """The chosen rule; None for "none". ConfigError: no rule of that name, or a setting that it does not have or refuses."""
    if choice.rule == "none":
        return None
    return chosen(choice.rule, choice.settings, FeedbackRule, "feedback rule")


@dataclass(frozen=True, kw_only=True, slots=True)
class Delayed:
    """A rule at work on the candidates of one batch, t of them; a `Criterion` of the batch."""

    rule: FeedbackRule
    tasks: tuple[str, ...]
    """The ranker's tasks that are the rule's outputs, in their order."""
    seen: Seen
    """n = t; where the label is NaN nothing is asked."""
    first: bool = False
    """Old clicks, before there is a stream."""
    share: Tensor | None = None
    """float32 [t]: what a sample counts, where some only stand for what may still come; None = 1."""

    def __call__(self, scores: Mapping[str, Tensor], weight: Tensor | None) -> Tensor:
        """The mean loss, a scalar, from logits [t] by task and weights [t]; 0 where nothing is asked."""
        asked = ~self.seen.label.isnan()
        logit_nH = torch.stack([scores[task] for task in self.tasks], 1)[asked]
        loss_n = (self.rule.first_losses if self.first else self.rule.losses)(logit_nH, self.seen.select(asked))
        if self.share is not None:
            weight = self.share if weight is None else weight * self.share
        return weighted_mean(loss_n, None if weight is None else weight[asked])
