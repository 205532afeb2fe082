"""What chains bring: past requests answered by every chain, and which chains are worth keeping.

A replay gives the whole row of a request's rewards, not only that of the chain it happened to get, so nothing needs to be drawn at
random. What is held out decides: an item that the person would also have taken, had it been shown, counts as nothing.

    choice      sum over the held-out items on the page of 1 / log2(1 + place): discounted gain at k, not divided by the best page's
    value       sum over the held-out items on the page of their money, wherever on the page they stand: what `value_recovered` counts

R requests, J chains, K stages, C resources, B requests of a chunk, T held-out items of all requests, k places of a page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shortlist.cascade.allocation.base import ChainSet, Float, Int, Outcomes
from shortlist.cascade.allocation.contexts import Contexts
from shortlist.cascade.allocation.costs import Tell, check_page
from shortlist.cascade.cascade import Cascade
from shortlist.cascade.config import Chain
from shortlist.cascade.lessons import chunks, make_batch
from shortlist.data.dataset import Dataset
from shortlist.data.histories import Requests
from shortlist.errors import DataError
from shortlist.metrics import ranking

Worth = Literal["choice", "value"]


def replay(
    cascade: Cascade,
    dataset: Dataset,
    requests: Requests,
    chains: Sequence[Chain],
    *,
    worth: Worth = "choice",
    contexts: Contexts,
    k: int | None = None,
    tell: Tell = lambda what, done, of: None,
) -> Outcomes:
    """Answer held-out requests by every chain and say what each page was worth.

    Args:
        cascade: as it stood before the requests' window; of a run, `as_of(run, "valid")`.
        dataset: that the requests point into.
        requests: with targets; R of them.
        chains: J, in the order of the columns.
        worth: of a page.
        contexts: makes the features, which go into the outcomes standardised.
        k: places of the page; None = as the surface says.
        tell: told of progress.

    Returns rewards [R, J], all of them known. Raises DataError where a stage fails or a target is worth less than 0.
    """
    k = cascade.config.surface.k if k is None else k
    place = {chain.name: j for j, chain in enumerate(chains)}
    rewards_RJ = np.zeros((len(requests), len(chains)))
    contexts_RF = np.zeros((len(requests), len(contexts.mean_F)), dtype=np.float32)
    for index in chunks(len(requests), dataset.num_items):
        asked = requests.select(index)
        batch = make_batch(dataset, asked, cascade.max_history)
        contexts_RF[index] = contexts(batch)
        for chain, page in cascade.pages(batch.to(cascade.device), chains, k=k):
            check_page(page.traces)
            rewards_RJ[index, place[chain.name]] = page_worth(page.rows.cpu().numpy(), asked, k, worth)
        tell("replaying", int(index[-1]) + 1, len(requests))
    return Outcomes(
        contexts_RF=contexts_RF, rewards_RJ=rewards_RJ, users_R=np.array(requests.user), times_R=np.array(requests.time)
    )


def page_worth(rows_Bk: Int, requests: Requests, k: int, worth: Worth) -> Float:
    """[B] worth of the first k places of each request's page; 0 stands for an empty place."""
    judged = ranking.judge(rows_Bk, requests.target, requests.target_offsets)
    if worth == "value":
        return ranking.value_recovered(judged, requests.target_value, k)[0]
    gain_B: Float = (judged.hits_RK[:, :k] / np.log2(np.arange(2, k + 2))).sum(1)
    return gain_B


def dominated(costs_JC: Float, worth_J: Float) -> NDArray[np.bool_]:
    """bool [J]: another chain costs no more of any resource and brings no less, and one of these differs; of equals the first stays."""
    no_dearer_JJ = (costs_JC[:, None] <= costs_JC).all(-1)  # [i, j]: i against j
    no_worse_JJ = worth_J[:, None] >= worth_J
    better_JJ = (costs_JC[:, None] < costs_JC).any(-1) | (worth_J[:, None] > worth_J)
    first_JJ = np.arange(len(worth_J))[:, None] < np.arange(len(worth_J))
    return np.asarray((no_dearer_JJ & no_worse_JJ & (better_JJ | first_JJ)).any(0))


def prune(chains: ChainSet, outcomes: Outcomes, *, resources: Sequence[int] | None = None, least: int = 6) -> Int:
    """Numbers of the chains worth keeping, rising: those that are not dominated in cost and mean reward.

    A chain that is dominated on average may still be best for a few requests, but what an allocator has to learn grows with every chain.
    The cheapest chain always stays. Where fewer than `least` would be left, the dominated ones that lose least come back: those that fall
    the least short, in worth, of the best chain that costs no more. Twins never do: chains that cost no less than another one and bring
    the same to every single request.

    Args:
        chains: J.
        outcomes: of calibration requests, never of those on which the choice is judged.
        resources: numbers of the resources that count, those under a budget; None = all.
        least: chains that stay at least, where so many are no twins.
    """
    if not len(outcomes):
        raise DataError("chains can not be compared without requests")
    worth_J = np.nanmean(outcomes.rewards_RJ, axis=0)
    costs_JC = chains.costs_JC if resources is None else chains.costs_JC[:, list(resources)]
    falls_J = dominated(costs_JC, worth_J)
    falls_J[0] = False
    affordable_JJ = (costs_JC[:, None] <= costs_JC).all(-1)
    short_J = np.where(affordable_JJ, worth_J[:, None], -np.inf).max(0) - worth_J
    group_J = np.unique(outcomes.rewards_RJ, axis=1, return_inverse=True)[1].ravel()
    first_JJ = np.arange(len(chains))[:, None] < np.arange(len(chains))
    twin_J = falls_J & ((group_J[:, None] == group_J) & affordable_JJ & first_JJ).any(0)
    order_J = np.lexsort((short_J, falls_J, twin_J))
    num_kept = max(int((~falls_J).sum()), min(least, int((~twin_J).sum())))
    return np.sort(order_J[:num_kept])


def best_within(chains: ChainSet, outcomes: Outcomes, limits_C: Float) -> int:
    """Number of the one chain for all requests that brings most within the limits; the cheapest where none fits."""
    worth_J = np.nanmean(outcomes.rewards_RJ, axis=0)
    return int(np.where(chains.within_J(limits_C), worth_J, -np.inf).argmax())


def split_parts(requests: Requests, *, by_time: bool, share: float = 2 / 3, seed: int = 0) -> tuple[Int, Int]:
    """Requests to learn from and requests to aim and judge on: other people, and later.

    Args:
        requests: of one window.
        by_time: whether times can be compared between users, as in a log with a clock that was cut by time.
        share: of users, and of the time, that the first part may have.
        seed: of the draw of users.

    Returns: numbers of the requests of the first `share` of users before the moment that `share` of the requests come before, and of the
    others' after it. Requests of the first users that come later, and earlier ones of the others, are in neither. Where that leaves a part
    empty, users alone decide.

    Raises DataError where all requests are of one user.
    """
    users = np.unique(requests.user)
    if len(users) < 2:
        raise DataError(
            f"calibration needs requests of at least two people, the window has {len(requests)} of {len(users)}; "
            "give it a larger share of the log (data.valid_share)"
        )
    drawn = np.random.default_rng([seed, len(users)]).permutation(users)
    first_users = drawn[: min(max(round(share * len(users)), 1), len(users) - 1)]
    is_first_R = np.isin(requests.user, first_users)
    parts = is_first_R, ~is_first_R
    if by_time:
        is_early_R = requests.time < np.quantile(requests.time, share)
        timed = is_first_R & is_early_R, ~is_first_R & ~is_early_R
        parts = timed if timed[0].any() and timed[1].any() else parts
    return np.flatnonzero(parts[0]), np.flatnonzero(parts[1])


def pages_differ(outcomes: Outcomes) -> float:
    """Share of requests for which chains differ in worth: only these can gain by a choice."""
    if not len(outcomes):
        return 0.0
    return float((np.ptp(outcomes.rewards_RJ, axis=1) > 0).mean())
