"""From a trained run to an allocator that serving can load: `shortlist calibrate RUN`.

    chains of the run  ->  what each costs  ->  what each brings to validation requests  ->  those worth keeping
      ->  the allocator learns on one part of the requests, and finds its prices on another: other people, and later

    RUN.allocation/allocation.json            the version of the run that it belongs to, and the names of the features
    RUN.allocation/allocator/                 the allocator with its chains and what it learned; see saved.py
    RUN.allocation/contexts.safetensors       statistics of the features, and those of the requests it was aimed on
    RUN.allocation/costs.json                 costs of all chains as stated and as measured, and the machine
    RUN.allocation/summary.json               what was chosen, and what it cost and brought
    RUN.allocation/manifest.json              see store/snapshot.py

It stands beside the run, which is replaced as a whole when it is trained again, and belongs to one version of it.

R requests, J chains, C resources, F features.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shortlist.cascade.allocation.base import RESOURCES, Allocator, Budget, ChainSet, Float, Int, Outcomes
from shortlist.cascade.allocation.contexts import CONTEXT_NAMES, Contexts, popularity
from shortlist.cascade.allocation.costs import ChainCosts, Tell, chain_set, measure_costs
from shortlist.cascade.allocation.outcomes import best_within, prune, replay, split_parts
from shortlist.cascade.allocation.saved import load_allocator, save_allocator
from shortlist.cascade.allocation.solver import best_mixture
from shortlist.cascade.config import AllocationConfig, Chain, RunConfig
from shortlist.cascade.lessons import chunks, make_batch, sample
from shortlist.cascade.run import Run, as_of
from shortlist.cascade.settings import plain
from shortlist.data.dataset import Dataset
from shortlist.data.histories import Requests
from shortlist.data.manifest import read_json
from shortlist.errors import ConfigError, ShortlistError, SnapshotError
from shortlist.metrics.intervals import PairedTest, paired_difference
from shortlist.registry import find
from shortlist.store.snapshot import Manifest, load_tensors, read_snapshot, save_tensors, write_snapshot

MOST_CHAINS = 400
"""Chains that are calibrated at most; each is timed, and answers every request."""
LEARN_SHARE = 0.75
"""Of `max_requests`, those that the allocator learns on; the others are for its prices and for the account."""
ABOUT, ALLOCATOR, CONTEXTS, ROWS = "allocation.json", "allocator", "contexts.safetensors", "rows"
REMEDY = "run `shortlist calibrate` again"


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What chooses a chain for a request: `allocator.choose(contexts(batch))` gives numbers of `chains`."""

    allocator: Allocator
    chains: ChainSet
    contexts: Contexts
    budget: Budget
    """That the allocator was aimed at."""
    rows_RF: NDArray[np.float32]
    """Features of the requests on which it was aimed, so that it can be aimed at another budget."""


@dataclass(frozen=True, kw_only=True)
class Account:
    """What some way to choose cost and brought, per request, on the requests that nothing was learned from."""

    name: str
    costs_C: Float
    worth: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"name": self.name, **dict(zip(RESOURCES, self.costs_C.tolist())), "worth": self.worth}


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a calibration found; chains are numbered by rising milliseconds."""

    allocation: Allocation
    config: AllocationConfig
    version: str
    """Of the run."""
    chains: ChainSet
    """All J."""
    costs: ChainCosts
    """Of all chains, in the order of the run's settings."""
    kept_J: Int
    """Numbers of those that the allocator chooses from."""
    default: int
    """Number of the default chain."""
    learned: Outcomes
    """Of all chains, on the requests that the allocator learned from."""
    judged: Outcomes
    """Of all chains, on the requests on which it was aimed and judged."""
    shares_J: Float
    """Of the judged requests, those that get each chain; 0 for chains that were not kept."""
    expected: float
    """Worth of a request as the allocator expects it; NaN where it expects nothing in particular."""
    chosen: Account
    """The allocator."""
    fixed: Account
    """The one chain that is best within the budget, chosen on the requests that were learned from."""
    mixture: Account
    """The mixture of chains, drawn at random for any request, that is best within the budget: the fair rival of an allocator."""
    standard: Account
    """The default chain."""
    gain: PairedTest | None
    """Worth of the allocator minus that of the default chain, with an interval over users."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        worth_J = np.nanmean(self.judged.rewards_RJ, axis=0)
        kept = set(self.kept_J.tolist())
        return {
            "version": self.version,
            "system": self.config.system,
            "worth": self.config.worth,
            "budget": asdict(self.allocation.budget),
            "prices": dict(zip(RESOURCES, self.allocation.allocator.prices_C.tolist())),
            "requests": {"learned": len(self.learned), "judged": len(self.judged)},
            "agreement": _json(self.costs.agreement),
            "chains": [
                {
                    "name": name,
                    **dict(zip(RESOURCES, self.chains.costs_JC[j].tolist())),
                    "worth": float(worth_J[j]),
                    "kept": j in kept,
                    "share": float(self.shares_J[j]),
                }
                for j, name in enumerate(self.chains.names)
            ],
            "expected": _json(self.expected),
            "chosen": self.chosen.as_dict(),
            "best_fixed": self.fixed.as_dict(),
            "best_mixture": self.mixture.as_dict(),
            "default": self.standard.as_dict(),
            "gain": None if self.gain is None else asdict(self.gain),
        }


def allocation_path(folder: Path) -> Path:
    """Where a run's allocation is."""
    return folder.with_name(f"{folder.name}.allocation")


def calibrate(run: Run, *, seed: int = 0, tell: Tell = lambda what, done, of: None) -> Calibration:
    """Cost and replay every chain of a run, and make the allocator that its settings name.

    Args:
        run: read from its folder, or just trained; `run.config.allocation` says what to do.
        seed: of every draw.
        tell: told of progress.

    Raises:
        ConfigError: the run offers one chain or far too many. DataError: a stage fails, or there are too few requests.
    """
    config, settings, dataset = run.config, run.config.allocation, run.dataset
    listed = offered_chains(config)
    cascade = as_of(run, "valid")  # no system has counted the answers
    learn, judge = _parts(dataset, settings.max_requests, seed)
    costs = measure_costs(cascade, dataset, learn, listed, seed=seed, tell=tell)
    chains, order_J = chain_set(config, dataset.num_items, listed, costs, measured=settings.measured)
    ordered = [listed[j] for j in order_J.tolist()]

    popularity_N = popularity(dataset.view("valid").histories.item, dataset.num_items)
    batches = (
        make_batch(dataset, learn.select(index), cascade.max_history) for index in chunks(len(learn), dataset.num_items)
    )
    contexts = Contexts.measured(batches, popularity_N, has_clock=dataset.space.has_clock)
    learned, judged = (
        replay(cascade, dataset, part, ordered, worth=settings.worth, contexts=contexts, tell=tell)
        for part in (learn, judge)
    )
    default = chains.names.index(config.default_chain.name)
    budget = settings.budget
    if not np.isfinite(budget.limits_C).any():
        budget = Budget(ms=float(chains.costs_JC[default, RESOURCES.index("ms")]))
    kept_J = prune(chains, learned, resources=np.flatnonzero(np.isfinite(budget.limits_C)).tolist())

    tell("learning", 0, 1)
    entry = find(settings.system)
    chosen = settings.settings if settings.settings is not None else entry.config()
    allocator: Allocator = entry.cls(chosen, chains.select(kept_J), len(CONTEXT_NAMES))
    allocator.fit(_of_chains(learned, kept_J))
    allocator.aim(budget, judged.contexts_RF)
    tell("learning", 1, 1)
    return _judged(
        allocation=Allocation(
            allocator=allocator,
            chains=allocator.chains,
            contexts=contexts,
            budget=budget,
            rows_RF=judged.contexts_RF,
        ),
        config=settings,
        version=run.version,
        costs=costs,
        chains=chains,
        kept_J=kept_J,
        default=default,
        parts=(learned, judged),
        seed=seed,
    )


def offered_chains(config: RunConfig) -> list[Chain]:
    """All chains of a run; ConfigError where there is one alone, or more than can be calibrated."""
    chains = list(config.chains())
    if len(chains) < 2:
        raise ConfigError(
            "the run has one chain, so there is nothing to choose; give a stage further actions under `offers` and train again "
            "(examples/budget.toml)"
        )
    if len(chains) > MOST_CHAINS:
        raise ConfigError(
            f"the stages' offers make {len(chains):,} chains and at most {MOST_CHAINS} are calibrated; leave some offers out"
        )
    return chains


def save_allocation(folder: Path, calibration: Calibration) -> Manifest:
    """Write a calibration to `folder`, replacing an earlier one whole; see `write_snapshot` for what is raised."""
    made, config = calibration.allocation, calibration.config
    about = {
        "version": calibration.version,
        "context_names": list(CONTEXT_NAMES),
        "has_clock": made.contexts.has_clock,
        "config": plain(config),
    }
    texts = {ABOUT: about, "costs.json": calibration.costs.as_dict(), "summary.json": calibration.as_dict()}

    def write(beside: Path) -> None:
        for name, content in texts.items():
            (beside / name).write_text(json.dumps(_json(content), indent=1) + "\n")
        save_allocator(beside / ALLOCATOR, made.allocator)
        known = {**made.contexts.state(), ROWS: made.rows_RF}
        save_tensors(beside / CONTEXTS, {key: torch.from_numpy(array) for key, array in known.items()})

    return write_snapshot(folder, write)


def load_allocation(folder: Path, *, version: str) -> Allocation:
    """What `save_allocation` wrote.

    Args:
        folder: of `allocation_path`.
        version: of the run that it must belong to.

    Raises:
        SnapshotError: missing, damaged, of another run, or of an allocator that is not there any more; says what to do.
    """
    read_snapshot(folder)
    about = read_json(folder / ABOUT, remedy=REMEDY)
    try:
        if about["version"] != version:
            raise SnapshotError(f"it was calibrated on another run (version {about['version']}, this one is {version})")
        if about["context_names"] != list(CONTEXT_NAMES):
            raise SnapshotError("its features are not those of this version")
        allocator = load_allocator(folder / ALLOCATOR)
        state = {name: tensor.numpy() for name, tensor in load_tensors(folder / CONTEXTS).items()}
        return Allocation(
            allocator=allocator,
            chains=allocator.chains,
            contexts=Contexts.of_state(state, has_clock=bool(about["has_clock"])),
            budget=allocator.budget,
            rows_RF=state[ROWS],
        )
    except (ValueError, KeyError, TypeError) as error:  # ShortlistError is a ValueError
        reason = str(error) if isinstance(error, ShortlistError) else f"{type(error).__name__}: {error}"
        raise SnapshotError(f"{folder} can not be used: {reason}; {REMEDY}") from error


def _parts(dataset: Dataset, most: int, seed: int) -> tuple[Requests, Requests]:
    """Validation requests to learn from, and those to aim and judge on."""
    window = dataset.split.valid
    by_time = dataset.split.protocol == "time" and dataset.space.has_clock
    num_learn = max(1, round(LEARN_SHARE * most))
    counts = (num_learn, max(1, most - num_learn))
    first, second = (
        sample(window.select(index), count, seed)
        for index, count in zip(split_parts(window, by_time=by_time, seed=seed), counts)
    )
    return first, second


def _of_chains(outcomes: Outcomes, kept_J: Int) -> Outcomes:
    """The columns of some chains."""
    return Outcomes(
        contexts_RF=outcomes.contexts_RF,
        rewards_RJ=outcomes.rewards_RJ[:, kept_J],
        users_R=outcomes.users_R,
        times_R=outcomes.times_R,
    )


def _judged(
    *,
    allocation: Allocation,
    config: AllocationConfig,
    version: str,
    costs: ChainCosts,
    chains: ChainSet,
    kept_J: Int,
    default: int,
    parts: tuple[Outcomes, Outcomes],
    seed: int,
) -> Calibration:
    """The account of an allocator on the requests that it did not learn from."""
    learned, judged = parts
    choice = allocation.allocator.choose(judged.contexts_RF, rng=np.random.default_rng(seed))
    chain_R, row_R = kept_J[choice.chain_R], np.arange(len(judged))
    best = int(kept_J[best_within(allocation.chains, _of_chains(learned, kept_J), allocation.budget.limits_C)])
    mixture = _mixture(chains, learned, judged, allocation.budget)

    def account(name: str, of_R: Int) -> Account:
        worth = float(judged.rewards_RJ[row_R, of_R].mean())
        return Account(name=name, costs_C=chains.costs_JC[of_R].mean(0), worth=worth)

    worth_R = judged.rewards_RJ[row_R, chain_R]
    gain = None
    if len(np.unique(judged.users_R)) > 1:
        gain = paired_difference(worth_R, judged.rewards_RJ[:, default], judged.users_R, seed=seed)
    known = np.isfinite(choice.value_R)
    return Calibration(
        allocation=allocation,
        config=config,
        version=version,
        costs=costs,
        chains=chains,
        kept_J=kept_J,
        default=default,
        learned=learned,
        judged=judged,
        shares_J=np.bincount(chain_R, minlength=len(chains)) / len(judged),
        expected=float(choice.value_R[known].mean()) if known.any() else float("nan"),
        chosen=account(config.system, chain_R),
        fixed=account(chains.names[best], np.full(len(judged), best)),
        mixture=mixture,
        standard=account(chains.names[default], np.full(len(judged), default)),
        gain=gain,
    )


def _mixture(chains: ChainSet, learned: Outcomes, judged: Outcomes, budget: Budget) -> Account:
    """The best mixture by what chains brought where was learned, and what it brings where is judged."""
    share_J = best_mixture(np.nanmean(learned.rewards_RJ, axis=0), chains.costs_JC, budget.limits_C)
    name = " + ".join(f"{share_J[j]:.0%} {chains.names[j]}" for j in np.flatnonzero(share_J > 1e-9).tolist())
    worth = float(np.nanmean(judged.rewards_RJ, axis=0) @ share_J)
    return Account(name=name, costs_C=share_J @ chains.costs_JC, worth=worth)


def _json(value: Any) -> Any:
    """The same with NaN, which JSON does not know, as null."""
    match value:
        case Mapping():
            return {name: _json(inner) for name, inner in value.items()}
        case list() | tuple():
            return [_json(inner) for inner in value]
        case float() if np.isnan(value):
            return None
    return value
