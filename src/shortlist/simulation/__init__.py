"""A world with known truth on top of a real log: who would click what at which place, what comes of it and when, and who asks when.

    world = World.from_log(read("events.csv"), WorldConfig(seed=1))
    policy = popular(world, k=10)
    made = simulate(world, policy, arrivals, seed=1)        # made.log can be trained on, made.truth says what was likely
    world.value_of(policy, arrivals.user, arrivals.time)    # what the policy is worth, exactly

Everything drawn here is marked `source = "simulated"`, and every table made from it says so.
"""

from shortlist.simulation.auctions import Auction, generalised_second_price, market_auction, spend
from shortlist.simulation.config import WorldConfig
from shortlist.simulation.logs import Simulated, simulate
from shortlist.simulation.policies import Policy, Shown, best, popular, uniform
from shortlist.simulation.prices import PriceHistogram, lognormal, pareto
from shortlist.simulation.traffic import Arrivals, Audience, Constant, Diurnal, Rate, Spikes, Steps, Sum, arrive
from shortlist.simulation.world import Response, World

__all__ = [
    "Arrivals",
    "Auction",
    "Audience",
    "Constant",
    "Diurnal",
    "Policy",
    "PriceHistogram",
    "Rate",
    "Response",
    "Shown",
    "Simulated",
    "Spikes",
    "Steps",
    "Sum",
    "World",
    "WorldConfig",
    "arrive",
    "best",
    "generalised_second_price",
    "lognormal",
    "market_auction",
    "pareto",
    "popular",
    "simulate",
    "spend",
    "uniform",
]
