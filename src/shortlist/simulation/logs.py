"""The world plays: a policy shows pages, people answer, and what happened is written down as a log that can be trained on.

    user_id  item_id  timestamp  action      request_id  position  value  bid   propensity  click  bought  source
    ann      a        10:00      impression  r0          1         0      0.8   0.9         0      0       simulated
    ann      b        10:00      click       r0          2         0      1.1   0.9         1      0       simulated
    ann      b        11:20      purchase    r0          2         19.90  1.1   0.9         1      1       simulated

A row per item that was shown, clicked or not, and one more per purchase, at the moment of the purchase. `click` is the label that makes a
row a choice, so by default histories hold clicks and purchases. Purchases later than the end of the traffic have not been seen yet and
stand in the truth alone, as in real logs. R requests, K places.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from shortlist.data.histories import Int
from shortlist.data.log import SIMULATED, EventLog, read
from shortlist.data.roles import Roles
from shortlist.errors import DataError
from shortlist.simulation.policies import Policy, Shown
from shortlist.simulation.traffic import Arrivals
from shortlist.simulation.world import Response, World

Float = NDArray[np.float64]
ROLES = Roles(
    user="user_id", item="item_id", timestamp="timestamp", action="action", request="request_id", basket="", position="position",
    value="value", bid="bid", query="", propensity="propensity", labels=("click",),
)  # fmt: skip
"""Of the columns of a simulated log; `read` guesses the same."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Simulated:
    """What happened, and what was likely to happen."""

    log: EventLog
    """As above; `note` of every dataset made from it says that it is simulated."""
    truth: pl.DataFrame
    """A row per place of a page: request_id, user_id, item_id, timestamp, position, propensity; examination, click_chance,
    conversion_chance (of a click), expected_value as known to the world; click, purchase, delay_s (null without a purchase), value as they
    happened, seen or not; source."""

    def summary(self) -> pl.DataFrame:
        """By place: impressions, true and realised click rate, how far apart they are in standard errors (z), and money per impression.

        The standard error is that of the realised rate given the true chances: sqrt(sum p (1 - p)) / impressions.
        """
        chance, variance = pl.col("click_chance"), pl.col("click_chance") * (1 - pl.col("click_chance"))
        gap = (pl.col("click").sum() - chance.sum()) / variance.sum().sqrt()
        return (
            self.truth.group_by("position")
            .agg(
                pl.len().alias("impressions"),
                chance.mean().alias("true_ctr"),
                pl.col("click").mean().alias("realised_ctr"),
                gap.alias("z"),
                pl.col("expected_value").mean().alias("true_value"),
                pl.col("value").mean().alias("realised_value"),
            )
            .sort("position")
            .with_columns(source=pl.lit(SIMULATED))
        )

    def totals(self) -> dict[str, int | float | str]:
        """What was expected and what happened, over all requests; `purchases_logged` are those that came before the log ends."""
        truth, requests = self.truth, self.truth["request_id"].n_unique()
        bought = truth["click_chance"] * truth["conversion_chance"]
        return {
            "source": SIMULATED,
            "requests": requests,
            "impressions": truth.height,
            "clicks": int(truth["click"].sum()),
            "expected_clicks": float(truth["click_chance"].sum()),
            "purchases": int(truth["purchase"].sum()),
            "expected_purchases": float(bought.sum()),
            "purchases_logged": self.log.events.filter(pl.col("action") == "purchase").height,
            "value_per_request": float(truth["value"].sum()) / requests,
            "expected_value_per_request": float(truth["expected_value"].sum()) / requests,
        }


def simulate(
    world: World,
    policy: Policy,
    arrivals: Arrivals,
    *,
    seed: int,
    items: pl.DataFrame | None = None,
    users: pl.DataFrame | None = None,
) -> Simulated:
    """Let the policy answer all arrivals.

    Args:
        seed: of exploration and of people's luck. The same arguments give the same log.
        items: table of the log's items, passed on to the new log.
        users: table of its users, likewise.

    Raises DataError where there is nothing to write: no arrivals, or empty pages.
    """
    if not len(arrivals):
        raise DataError("no request arrived, so there is nothing to log; simulate more seconds or a higher rate")
    rng = np.random.default_rng(seed)
    shown = policy.show(arrivals.user, arrivals.time, world.num_items, rng)
    response = world.respond(arrivals.user, shown.pages, arrivals.time, rng)
    truth = _truth(world, arrivals, shown, response)
    if not truth.height:
        raise DataError("the policy left every page empty; give one that shows something")
    events = _events(truth, end=arrivals.end)
    log = read(events, items=items, users=users, roles=ROLES)
    return Simulated(log=log, truth=truth.drop("row", "bid"))


def _truth(world: World, arrivals: Arrivals, shown: Shown, response: Response) -> pl.DataFrame:
    """The table of `Simulated.truth`, with `row` (the place's number) and `bid` beside."""
    pages, k = shown.pages, shown.pages.shape[1]
    z_args = (arrivals.user, pages, arrivals.time)
    request = np.repeat(np.arange(len(arrivals)), k)
    filled = pages.ravel() > 0

    def flat(table_RK: NDArray[np.generic]) -> NDArray[np.generic]:
        return table_RK.ravel()[filled]

    user, item = arrivals.user[request][filled], flat(pages)
    delay = flat(response.delay_s)
    return pl.DataFrame(
        {
            "row": np.arange(len(item)),
            "request_id": request[filled],
            "user_id": _ids(world.user_ids.ids, user, "user"),
            "item_id": _ids(world.item_ids.ids, item.astype(np.int64), "item"),
            "timestamp": (arrivals.time[request][filled] * 1_000).astype(np.int64),
            "position": np.tile(np.arange(1, k + 1), len(arrivals))[filled],
            "propensity": flat(shown.propensity),
            "bid": world.bid_I[item],
            "examination": np.tile(world.examination(k), len(arrivals))[filled],
            "click_chance": flat(world.click_chance(*z_args)),
            "conversion_chance": flat(world.conversion(*z_args)),
            "expected_value": flat(world.true_value(*z_args)),
            "click": flat(response.clicks).astype(np.int8),
            "purchase": flat(response.converted).astype(np.int8),
            "delay_s": delay,
            "value": flat(response.value),
        }
    ).with_columns(
        pl.format("r{}", "request_id").alias("request_id"),
        pl.col("timestamp").cast(pl.Datetime("ms", "UTC")),
        pl.when(pl.col("delay_s").is_finite()).then("delay_s").alias("delay_s"),
        source=pl.lit(SIMULATED),
    )


def _events(truth: pl.DataFrame, *, end: float) -> pl.DataFrame:
    """Rows of the log, in order of time; within a request by place."""
    action = pl.when(pl.col("click") == 1).then(pl.lit("click")).otherwise(pl.lit("impression"))
    shown = truth.select(
        "row", "user_id", "item_id", "timestamp", action.alias("action"), "request_id", "position", pl.lit(0.0).alias("value"), "bid",
        "propensity", "click", pl.lit(0, dtype=pl.Int8).alias("bought"), "source",
    )  # fmt: skip
    bought_at = pl.col("timestamp") + pl.duration(milliseconds=(pl.col("delay_s") * 1_000).cast(pl.Int64))
    bought = (
        truth.filter(pl.col("purchase") == 1)
        .with_columns(timestamp=bought_at, action=pl.lit("purchase"), bought=pl.lit(1, dtype=pl.Int8))
        .filter(pl.col("timestamp").dt.epoch("ms") <= end * 1_000)
    )
    rows = pl.concat([shown, bought.select(shown.columns)])
    return rows.sort("timestamp", "row", maintain_order=True).drop("row")


def _ids(ids: pl.Series, rows: Int, what: str) -> pl.Series:
    """Ids of rows; DataError where one is the unknown row, which has none."""
    if len(rows) and rows.min() < 1:
        raise DataError(f"a log names every {what}, and row 0 has no id; draw arrivals from known users")
    return ids.gather(rows - 1)
