"""What a chain costs a request: FLOPs as its systems state them, and milliseconds measured on this machine.

    MFLOP           sum over the stages of cost().user_flops + cost().item_flops * candidates, on real requests (the meter's figure)
    milliseconds    wall time of whole chains on one core, on real requests one at a time and in batches of 16, in random order so that
                    no chain has the quiet minutes to itself; the median of three times, the mean over requests

FLOPs are no latency: gathers and calls weigh most in small systems. So both are kept, a budget may limit either, and how well they
agree is reported. Measured time is made monotone: among chains of the same systems, one that scores more candidates at every stage
never costs less. Nothing is remembered of a user between requests here, so a server whose systems remember may spend less; what it
really spends is what near-line control goes by.

R requests, J chains, K stages, C resources, P passes over the same requests, T batches that are timed.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from shortlist.cascade.allocation.base import ChainSet, Float, Int
from shortlist.cascade.cascade import Cascade
from shortlist.cascade.config import Chain, RunConfig
from shortlist.cascade.lessons import make_batch
from shortlist.data.batches import Batch
from shortlist.data.dataset import Dataset
from shortlist.data.histories import Requests
from shortlist.errors import DataError
from shortlist.machine import cpu_name

BATCH = 16
"""Requests that are answered together when the cost of a full server is measured."""
PASSES = 3
Tell = Callable[[str, int, int], None]
"""Told of progress: what, how far, of how much."""
Measured = Literal["alone", "batched"]
"""Which milliseconds count: those of a request that is answered alone, or its share of a batch."""


@dataclass(frozen=True, kw_only=True)
class ChainCosts:
    """Costs of J chains, in the order in which they were given."""

    names: tuple[str, ...]
    mflop_J: Float
    """1e6 FLOPs of a request."""
    alone_J: Float
    """Milliseconds of a request answered alone, monotone in candidates."""
    batched_J: Float
    """Milliseconds of a request in a batch of 16, monotone in candidates."""
    measured_alone_J: Float
    """As the clock said."""
    measured_batched_J: Float
    agreement: Mapping[str, float]
    """Rank correlations; see `agreement`."""
    num_requests: int
    """That were timed."""
    machine: Mapping[str, Any]

    def ms_J(self, measured: Measured) -> Float:
        """Milliseconds that count."""
        return self.alone_J if measured == "alone" else self.batched_J

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        columns = ("mflop_J", "alone_J", "batched_J", "measured_alone_J", "measured_batched_J")
        return {
            "chains": list(self.names),
            **{name.removesuffix("_J"): getattr(self, name).tolist() for name in columns},
            "agreement": dict(self.agreement),
            "num_requests": self.num_requests,
            "machine": dict(self.machine),
        }


def measure_costs(
    cascade: Cascade,
    dataset: Dataset,
    requests: Requests,
    chains: Sequence[Chain],
    *,
    num_alone: int = 24,
    num_batches: int = 4,
    seed: int = 0,
    tell: Tell = lambda what, done, of: None,
) -> ChainCosts:
    """Count and time every chain on requests drawn from those given.

    Args:
        cascade: with all systems of the chains.
        requests: held-out ones, with the histories that requests of this log have.
        num_alone: requests that are timed one at a time, of which at least 2.
        num_batches: batches of 16 that are timed, at least 2; fewer where there are fewer requests.
        seed: of the draw and of the order.

    Raises DataError where a stage fails or there are no requests.
    """
    if not len(requests):
        raise DataError("no request to measure costs on; give calibration a longer validation window")
    rng = np.random.default_rng([seed, len(requests)])
    alone = _batches(dataset, requests, num_alone, 1, cascade, rng)
    batched = _batches(dataset, requests, num_batches, BATCH, cascade, rng)
    model_JK, count_JK = describe(cascade.config, dataset.num_items, chains)
    mflop_J = count_flops(cascade, batched, chains)
    alone_TJ = time_chains(cascade, alone, chains, rng, lambda done, of: tell("timing single requests", done, of))
    batched_TJ = time_chains(cascade, batched, chains, rng, lambda done, of: tell("timing batches", done, of))
    fitted = [monotone(ms_TJ.mean(0), model_JK, count_JK) for ms_TJ in (alone_TJ, batched_TJ)]
    return ChainCosts(
        names=tuple(chain.name for chain in chains),
        mflop_J=mflop_J,
        alone_J=fitted[0],
        batched_J=fitted[1],
        measured_alone_J=alone_TJ.mean(0),
        measured_batched_J=batched_TJ.mean(0),
        agreement=agreement(mflop_J, alone_TJ, batched_TJ, model_JK, count_JK),
        num_requests=len(alone) + sum(batch.size for batch in batched),
        machine=machine(),
    )


def describe(config: RunConfig, num_items: int, chains: Sequence[Chain]) -> tuple[Int, Int]:
    """Chains in numbers.

    Returns: model [J, K], which of the stage's different sets of systems acts, in the order of its actions; count [J, K], candidates
    that the stage scores: what the stage before lets through, of the first stage what it finds; no more than the catalogue holds.
    """
    k = config.surface.k
    sets = [list(dict.fromkeys(action.systems for action in stage.actions)) for stage in config.stages]
    model_JK = [[sets[n].index(action.systems) for n, action in enumerate(chain.actions)] for chain in chains]
    keep_JK = np.array([[max(action.keep or k, k) for action in chain.actions] for chain in chains], dtype=np.int64)
    count_JK = np.minimum(np.concatenate([keep_JK[:, :1], keep_JK[:, :-1]], 1), num_items)
    return np.array(model_JK, dtype=np.int64), count_JK


def chain_set(
    config: RunConfig, num_items: int, chains: Sequence[Chain], costs: ChainCosts, *, measured: Measured = "alone"
) -> tuple[ChainSet, Int]:
    """The chains by rising milliseconds, and the place [J] in `chains` of each."""
    model_JK, count_JK = describe(config, num_items, chains)
    costs_JC = np.stack([costs.mflop_J, costs.ms_J(measured)], 1)
    order_J = np.lexsort((costs_JC[:, 0], costs_JC[:, 1]))
    whole = ChainSet(
        names=costs.names,
        stages=tuple(stage.name for stage in config.stages),
        model_JK=model_JK,
        count_JK=count_JK,
        costs_JC=costs_JC,
    )
    return whole.select(order_J), order_J


def count_flops(cascade: Cascade, batches: Sequence[Batch], chains: Sequence[Chain]) -> Float:
    """[J] 1e6 FLOPs of a request by chain, mean over all requests; DataError where a stage fails."""
    place = {chain.name: j for j, chain in enumerate(chains)}
    total_J = np.zeros(len(chains))
    for batch in batches:
        for chain, page in cascade.pages(batch, chains):
            check_page(page.traces)
            total_J[place[chain.name]] += batch.size * sum(trace.flops for trace in page.traces) / 1e6
    return total_J / max(sum(batch.size for batch in batches), 1)


def time_chains(
    cascade: Cascade,
    batches: Sequence[Batch],
    chains: Sequence[Chain],
    rng: np.random.Generator,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> Float:
    """[T, J] milliseconds per request of each batch by each chain, on one thread.

    In each pass over a batch the chains come in a new random order; the median of the passes is taken, so that what else the machine
    does now and then counts for no chain.
    """
    taken_TPJ = np.zeros((len(batches), PASSES, len(chains)))
    with one_thread():
        for chain in chains:
            cascade.run(batches[0], chain=chain)  # what is made on first use
        for t, batch in enumerate(batches):
            for p in range(PASSES):
                for j in rng.permutation(len(chains)):
                    began = time.perf_counter()
                    cascade.run(batch, chain=chains[j])
                    taken_TPJ[t, p, j] = (time.perf_counter() - began) * 1e3 / batch.size
            tell(t + 1, len(batches))
    return np.median(taken_TPJ, axis=1)


def monotone(cost_J: Float, model_JK: Int, count_JK: Int) -> Float:
    """The nearest costs [J], by their largest change, that never fall when a chain of the same systems scores more.

    Half the way between the dearest chain that asks for no more and the cheapest one that asks for no less: of all monotone costs,
    these change the measured ones least in the worst case (isotonic regression in the maximum norm on a partial order).
    """
    same_JJ = (model_JK[:, None] == model_JK).all(-1)
    below_JJ = same_JJ & (count_JK[:, None] <= count_JK).all(-1)  # [i, j]: i asks for no more than j
    dearest_J = np.where(below_JJ, cost_J[:, None], -np.inf).max(0)
    cheapest_J = np.where(below_JJ, cost_J, np.inf).min(1)
    fitted_J: Float = (dearest_J + cheapest_J) / 2
    return fitted_J


def agreement(mflop_J: Float, alone_TJ: Float, batched_TJ: Float, model_JK: Int, count_JK: Int) -> dict[str, float]:
    """Rank correlations (Spearman) over chains; NaN where all chains cost the same.

    mflop_alone, mflop_batched      stated FLOPs and measured time
    again_alone, again_batched      time as calibrated on half of the requests, and as measured on the other half
    """
    found = {}
    for name, ms_TJ in (("alone", alone_TJ), ("batched", batched_TJ)):
        found[f"mflop_{name}"] = rank_correlation(mflop_J, ms_TJ.mean(0))
        halves = (ms_TJ[::2], ms_TJ[1::2]) if len(ms_TJ) > 1 else (ms_TJ, ms_TJ)
        predicted_J = monotone(halves[0].mean(0), model_JK, count_JK)
        found[f"again_{name}"] = rank_correlation(predicted_J, halves[1].mean(0))
    return found


def rank_correlation(a_J: Float, b_J: Float) -> float:
    """Spearman's coefficient of two columns [J], equals sharing their mean rank; NaN where one column is all the same."""
    ranks = [_ranks(column) for column in (a_J, b_J)]
    deviations = [rank_J - rank_J.mean() for rank_J in ranks]
    norm = float(np.sqrt((deviations[0] ** 2).sum() * (deviations[1] ** 2).sum()))
    return float((deviations[0] * deviations[1]).sum() / norm) if norm else float("nan")


def _ranks(column_J: Float) -> Float:
    """Place of each number among all, equals at the middle of their places."""
    _, group_J, count_G = np.unique(column_J, return_inverse=True, return_counts=True)
    middle_G = np.cumsum(count_G) - (count_G - 1) / 2
    ranks: Float = middle_G[group_J]
    return ranks


def check_page(traces: Sequence[Any]) -> None:
    """DataError where a stage of a page was passed over: neither its cost nor its page would be the chain's."""
    for trace in traces:
        for problem in trace.problems:
            raise DataError(f"stage {trace.name} does not work: {problem.reason}; mend or train the run first")


def machine() -> dict[str, Any]:
    """What was measured on."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": 1,
        "load": round(os.getloadavg()[0], 2),
        "platform": platform.platform(),
        "torch": torch.__version__,
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _batches(
    dataset: Dataset, requests: Requests, count: int, size: int, cascade: Cascade, rng: np.random.Generator
) -> list[Batch]:
    """So many batches of requests drawn without putting back; the last ones are missing where there are too few, but never all."""
    drawn = rng.permutation(len(requests))[: count * size]
    whole: NDArray[np.int64] = drawn[: len(drawn) // size * size]
    parts = whole.reshape(-1, size) if len(whole) else [drawn]
    return [make_batch(dataset, requests.select(part), cascade.max_history).to(cascade.device) for part in parts]
