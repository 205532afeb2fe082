"""Which items a model is trained against, and how likely each was to be drawn: the second half corrects the first.

n items, rows 1..n; row 0 (unknown) is never drawn. All draws take a torch.Generator on the device of the sampler's tensors; None is
torch's global one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shortlist.data.jagged import Jagged
from shortlist.errors import ConfigError, DataError


class Sampler(Protocol):
    """Draws catalogue rows independently, with replacement, and knows the chance of each."""

    def draw(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """int64 rows of the given shape."""
        ...

    def log_q(self, rows: Tensor) -> Tensor:
        """float32, like `rows`: log of the chance that one draw gives this row."""
        ...


@dataclass(frozen=True, slots=True)
class UniformSampler:
    """Every one of `rows` [m] int64 with the same chance."""

    rows: Tensor

    def __post_init__(self) -> None:
        if not len(self.rows) or bool((self.rows == 0).any()):
            raise DataError("a uniform sampler needs at least one item and not row 0; give the rows of known items")

    @classmethod
    def of_mask(cls, mask_N: Tensor) -> UniformSampler:
        """The rows where the mask, bool [n + 1], is True, row 0 apart: `UniformSampler.of_mask(space.known_items)`."""
        rows = mask_N.nonzero().squeeze(1)
        return cls(rows[rows != 0])

    def draw(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """See Sampler.draw."""
        return _at(self.rows, torch.randint(len(self.rows), shape, generator=generator, device=self.rows.device))

    def draw_distinct(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """`count` different rows, int64 [count]; all of them, in random order, where there are no more."""
        return self.rows[torch.randperm(len(self.rows), generator=generator, device=self.rows.device)[:count]]

    def log_q(self, rows: Tensor) -> Tensor:
        """See Sampler.log_q; the same for every row, drawn or not."""
        return -torch.full(rows.shape, float(len(self.rows)), device=rows.device).log()


@dataclass(frozen=True, slots=True)
class PopularitySampler:
    """Row i with a chance proportional to (how often it occurs) ** alpha; 1 is what other users' targets in a batch follow."""

    cumulative_N: Tensor
    """float64 [n + 1]: rising to 1; row 0 adds nothing."""

    @classmethod
    def of_counts(cls, counts_N: Tensor, alpha: float = 1.0) -> PopularitySampler:
        """From numbers of events [n + 1]; items without events are never drawn, whatever alpha is."""
        if alpha < 0:
            raise ConfigError(f"alpha must be 0 or above, got {alpha}")
        counts = counts_N.to(torch.float64).clone()
        counts[0] = 0
        mass_N = torch.where(counts > 0, counts.clamp(min=torch.finfo(torch.float64).tiny) ** alpha, 0.0)
        if not bool(mass_N.sum() > 0):
            raise DataError("a popularity sampler needs at least one item with events; all counts are 0")
        cumulative_N = (mass_N / mass_N.sum()).cumsum(0)
        return cls(cumulative_N / cumulative_N[-1])

    def draw(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """See Sampler.draw."""
        point = torch.rand(shape, generator=generator, device=self.cumulative_N.device, dtype=torch.float64)
        return torch.searchsorted(self.cumulative_N, point, right=True)

    def log_q(self, rows: Tensor) -> Tensor:
        """See Sampler.log_q; -inf for rows that are never drawn."""
        below = torch.where(rows > 0, _at(self.cumulative_N, (rows - 1).clamp(min=0)), 0.0)
        return (_at(self.cumulative_N, rows) - below).log().float()


@dataclass(frozen=True, slots=True)
class InBatchSampler:
    """The targets of the other requests serve as negatives; a row's chance is its share of all targets."""

    log_share_N: Tensor
    """float32 [n + 1]."""

    @classmethod
    def of_counts(cls, counts_N: Tensor, smoothing: float = 1.0) -> InBatchSampler:
        """From numbers of events [n + 1]; `smoothing` is added to each, so that a new item has a finite correction."""
        if smoothing <= 0:
            raise ConfigError(f"smoothing must be above 0, got {smoothing}")
        counts = counts_N.to(torch.float64) + smoothing
        return cls((counts / counts[1:].sum()).log().float())

    def log_q(self, rows: Tensor) -> Tensor:
        """See Sampler.log_q."""
        return _at(self.log_share_N, rows)


def _at(values_N: Tensor, index: Tensor) -> Tensor:
    """values_N[index] for an index of any shape, in a fraction of the time that brackets take."""
    return values_N.index_select(0, index.reshape(-1)).reshape(index.shape)


def mixed_log_expected(parts: list[tuple[int, Tensor]]) -> Tensor:
    """Log of how often each row is expected in a pool filled by several samplers: log sum of count * q.

    Args:
        parts: per sampler how many it drew, and `sampler.log_q(rows)` for ALL rows of the pool, float [M] each.
    """
    live = [log_q + torch.tensor(float(count), device=log_q.device).log() for count, log_q in parts if count]
    if not live:
        raise ConfigError("no sampler drew anything; ask for at least one negative")
    return torch.logsumexp(torch.stack(live), dim=0)


def draw_outside(
    sampler: Sampler,
    forbidden: Jagged,
    owner_P: Tensor,
    count: int,
    generator: torch.Generator | None = None,
    *,
    rounds: int = 8,
) -> Tensor:
    """Draws [P, count] that avoid each owner's own items, such as those of its training history.

    Hits are drawn again up to `rounds` times; what still hits then becomes row 0, which no loss counts. Forbid training items only:
    leaving out a user's later items would tell the model what they are.

    Args:
        forbidden: catalogue rows per owner.
        owner_P: int64 [P], row of `forbidden` for each line of draws.
    """
    drawn = sampler.draw((len(owner_P), count), generator)
    if not len(forbidden.values):
        return drawn
    width = int(torch.maximum(forbidden.values.max(), drawn.max() if drawn.numel() else forbidden.values.max())) + 1
    keys = (forbidden.row_of_value * width + forbidden.values).sort().values
    bad = _among(drawn, owner_P[:, None], keys, width)
    for _ in range(rounds):
        where = bad.nonzero(as_tuple=True)
        if not len(where[0]):
            return drawn
        again = sampler.draw((len(where[0]),), generator)
        drawn[where] = again
        bad[where] = _among(again, owner_P[where[0]], keys, width)
    return drawn.masked_fill(bad, 0)


def _among(rows: Tensor, owner: Tensor, keys: Tensor, width: int) -> Tensor:
    """Whether owner * width + row stands in the sorted keys; rows beyond the width never do."""
    key = owner * width + rows
    place = torch.searchsorted(keys, key).clamp(max=len(keys) - 1)
    return (keys[place] == key) & (rows < width)


def update_streaming_interval(last_step_N: Tensor, interval_N: Tensor, rows: Tensor, step: int, rate: float) -> None:
    """Learn from a stream how many steps lie between two occurrences of a row (Yi et al., RecSys 2019, algorithm 2), in place.

    1 / interval is the estimated chance of a row in a batch. Rows are dense here, so no hashing and no collisions.

    Args:
        last_step_N: int64 [n + 1], the step a row was last seen; start at 0.
        interval_N: float32 [n + 1], the estimate; start at a guess such as the number of batches in an epoch.
        rows: rows of this batch, any shape, repeats allowed.
        step: number of this batch, from 1.
        rate: weight of the newest interval, in (0, 1].
    """
    seen = rows.unique()
    interval_N[seen] = (1 - rate) * interval_N[seen] + rate * (step - last_step_N[seen]).to(interval_N.dtype)
    last_step_N[seen] = step
