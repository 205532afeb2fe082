"""A shop whose clicks have known chances, for tests of ads: an engine with a store, and a calibration made by hand."""

from __future__ import annotations

from engine_support import FIRST_ITEM, shop_live
from shortlist.cascade.ads import AdsConfig
from shortlist.cascade.click_chance import Calibration, judged_systems
from shortlist.cascade.engine import Engine, EngineConfig
from shortlist.cascade.live import Live
from shortlist.store.ads import Campaign
from shortlist.store.events import EventStore

ITEMS = tuple(str(FIRST_ITEM + n) for n in range(4))


def by_hand(version: str, systems: tuple[str, ...], *, weight: float = 0.0, bias: float = -2.0) -> Calibration:
    """sigmoid(bias + weight x raw score of the first system); without a weight, everybody clicks alike."""
    num = len(systems)
    return Calibration(
        version=version,
        method="platt",
        systems=systems,
        mean_S=(0.0,) * num,
        scale_S=(1.0,) * num,
        weight_S=(weight, *(0.0,) * (num - 1)),
        bias=bias,
        rate=0.1,
        num_judged=100,
        num_clicked=10,
        judged="choices",
        held_out={},
    )


def ads_engine(folder, *, weight: float = 0.0, config: AdsConfig | None = None, live: Live | None = None) -> Engine:
    """An engine over the small shop, or another run, that keeps campaigns in `folder`."""
    live = live or shop_live()
    engine = Engine(
        live, events=EventStore(folder / "events.db"), config=EngineConfig(ads=config or AdsConfig(), memory_mib=0)
    )
    engine.ads.use(by_hand(live.version, judged_systems(live.cascade)[1], weight=weight))
    return engine


def campaign(name: str, *, budget: float = 10.0, bid: float = 1.0, **more) -> Campaign:
    """A campaign of the shop's first items."""
    return Campaign(**{"campaign": name, "budget": budget, "bid": bid, "items": ITEMS, **more})
