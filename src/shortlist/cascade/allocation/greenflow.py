"""GreenFlow: models and candidates of every stage, by what the request is worth.

"GreenFlow: A Computation Allocation Framework for Building Environmentally Sound Recommendation System", Lu et al., IJCAI 2023. The value
model (reward_nets.Recursive) and the near-line update are reconstructed from published descriptions.
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
