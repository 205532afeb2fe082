"""GreenFlow: models and candidates of every stage, by what the request is worth.

"GreenFlow: A Computation Allocation Framework for Building Environmentally Sound Recommendation System", Lu et al., IJCAI 2023. A request
gets the chain with the most predicted value after its price; prices minimise the dual of all requests together:

    chain(i) = argmax_j (value_ij - prices . cost_j)        prices = argmin  prices . budget + mean_i max_j (value_ij - prices . cost_j)

The value model (reward_nets.py) follows stages, weighs increasing bases of the counts by request and models, and so never predicts that
more candidates are worth less. Differences: the full paper could not be had, so the model's formulas and the near-line update of prices
(a share rho of a window's own) are reconstructed from published descriptions; there is one price per resource, where the paper has one
budget; newcomers get a floor.

J chains j, R requests i.
"""

from __future__ import annotations

from shortlist.cascade.allocation.body import Chooser, PricedConfig
from shortlist.registry import system


@system("greenflow", stage="allocation", paper="Lu et al., IJCAI 2023", cold_users=True)
class GreenFlow(Chooser):
    """Chooses for each request which models act and how many candidates every stage scores: any of the chains.

    Args:
        config: settings.
        chains: to choose from.
        num_features: F.
    """

    Config = PricedConfig
