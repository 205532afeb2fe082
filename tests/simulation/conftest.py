"""The planted shop as a world: 80 users in four clusters, 22 items, two of which nobody bought."""

import numpy as np
import pytest

from shortlist.data.log import read
from shortlist.simulation import World, WorldConfig
from support import shop_frames


@pytest.fixture(scope="session")
def shop_log():
    events, items, users = shop_frames()
    return read(events, items=items, users=users)


@pytest.fixture(scope="session")
def world(shop_log):
    return World.from_log(shop_log, WorldConfig(seed=1))


@pytest.fixture(scope="session")
def drifting(shop_log):
    """Tastes turn a quarter in ten days, popularity swings weekly, values are the log's own."""
    return World.from_log(
        shop_log,
        WorldConfig(seed=1, taste_turn=np.pi / 20, popularity_swing=0.8, popularity_period_days=7.0, values="observed"),
    )
