"""A trained run as a policy of a simulated world: it shows what it would serve, from what its own log says of each user.

R requests, K places, n items of the run, m items of the world.
"""

from __future__ import annotations

import numpy as np
import torch

from shortlist.cascade.lessons import chunks
from shortlist.cascade.run import Run
from shortlist.data.batches import request_batch
from shortlist.data.histories import Int
from shortlist.errors import DataError
from shortlist.simulation.policies import Policy
from shortlist.simulation.world import Times, World


def policy_of(run: Run, world: World, *, k: int | None = None, explore: float = 0.0) -> Policy:
    """The run's pages for the world's users, matched by id. What happens in the world is not told to the run.

    Args:
        k: places of a page; None = the run's.
        explore: share of requests that get a random page.

    Items that the world does not know are left out of the pages. Raises DataError where the two share no item.
    """
    dataset, size = run.dataset, run.config.surface.k if k is None else k
    user_of_world = np.concatenate([[0], dataset.user_ids.encode(world.user_ids.ids)])
    item_of_run = np.concatenate([[0], world.item_ids.encode(dataset.item_ids.ids)])
    if not item_of_run.any():
        raise DataError(f"{run.folder} knows no item of this log; give a run that was trained on it")
    allowed = torch.from_numpy(item_of_run > 0)
    wish = run.config.surface.repeats
    repeats = dataset.repeats if wish == "auto" else wish == "yes"

    def pages(users: Int, times: Times) -> Int:
        rows, moments = user_of_world[users], times.astype(np.int64)
        found = np.zeros((len(users), size), dtype=np.int64)
        for part in chunks(len(users), dataset.num_items):
            histories, requests = dataset.requests_for([None] * len(part), rows=rows[part], at=moments[part])
            batch = request_batch(
                histories,
                dataset.users,
                requests,
                max_history=run.cascade.max_history,
                exclude_history=not repeats,
            )
            with torch.inference_mode():
                page = run.cascade.run(batch.to(run.cascade.device), k=size, allowed=allowed)
            shown = item_of_run[page.rows.cpu().numpy()]
            found[part, : shown.shape[1]] = shown
        return found

    return Policy(pages=pages, k=size, explore=explore)
