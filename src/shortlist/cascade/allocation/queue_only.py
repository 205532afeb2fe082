"""Queue lengths of all stages, models fixed.

After "Computation Resource Allocation Solution in Recommender Systems" (CRAS), Yang et al., arXiv 2103.02259: the queue lengths of several
stages at once. Its fitted revenue function is the value model here, and its constraints are the budget's; the paper was read in summary.
"""

from __future__ import annotations

import numpy as np

from shortlist.cascade.allocation.base import Budget, Float, Int
from shortlist.cascade.allocation.body import Chooser, PricedConfig
from shortlist.cascade.allocation.solver import best_mixture
from shortlist.registry import system


@system("queue-only", stage="allocation", paper="after CRAS, Yang et al., 2021", cold_users=True)
class QueueOnly(Chooser):
    """Chooses for each request how many candidates every stage scores; all requests get the same models.

    Those models are the ones whose chains, mixed at random, have the best past rewards within the budget.

    Args:
        config: settings.
        chains: to choose from.
        num_features: F.
    """

    Config = PricedConfig

    def aim_at(self, budget: Budget, values_RJ: Float, kind_R: Int) -> None:
        """First the models, then prices."""
        models_MK, model_J = np.unique(self.chains.model_JK, axis=0, return_inverse=True)
        value_J = np.where(np.isnan(self.mean_J), -np.inf, self.mean_J)
        best, best_value = np.ones(len(self.chains), dtype=bool), -np.inf
        for m in range(len(models_MK)):
            own_J = model_J.reshape(-1) == m
            own_J[0] = True
            share_J = best_mixture(np.where(own_J, value_J, -np.inf), self.chains.costs_JC, budget.limits_C)
            reached = float(share_J @ np.where(share_J > 0, value_J, 0.0))
            if reached > best_value:
                best, best_value = own_J, reached
        self.own_J = best
        super().aim_at(budget, values_RJ, kind_R)
