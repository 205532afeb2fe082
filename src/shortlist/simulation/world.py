"""The world: who finds what attractive, where they look, what they buy, when, and what it is worth. All of it known, none of it logged.

    click       needs a look at the place and an attraction:  P(click of item i at place p) = p ** -decay * a_ui(t)
                (position-based model: Craswell et al., "An Experimental Comparison of Click Position-Bias Models", WSDM 2008)
    attraction  a_ui(t) = sigmoid(bias + taste z_ui(t) + popularity f_i + swing sin(2 pi (t / period + phase_i)))
    purchase    P(purchase | click) = sigmoid(bias' + w z_ui(t) + v g_i), after a delay: exponential or lognormal, times exp(d z + e g)
    drift       z_ui(t) is the affinity of the item and a taste that has turned by angle = turn * days, from the user's own vector
                towards an orthogonal one, so that it keeps its length

z is affinity, f the item's log frequency in the log, g its log value, each in standard deviations over users and items drawn as often as
they occur in the log. Everything but `respond` is a closed form.

R requests, K places of a page (or K items), n items, U users, D directions. Rows are those of `item_ids` and `user_ids`, 0 = unknown; a
page's row 0 is an empty place. Times are seconds since 1970.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from shortlist.data.dataset import Dataset
from shortlist.data.encode import encode_events
from shortlist.data.histories import Histories, Int
from shortlist.data.ingested import Ingested, Log
from shortlist.data.splits import DataConfig
from shortlist.data.targets import target_rule
from shortlist.data.vocabulary import Vocabulary
from shortlist.errors import ConfigError, DataError
from shortlist.simulation.config import WorldConfig
from shortlist.simulation.factors import tastes
from shortlist.simulation.prices import PriceHistogram, lognormal, pareto

if TYPE_CHECKING:
    from shortlist.simulation.policies import Policy

Float = NDArray[np.float64]
Bools = NDArray[np.bool_]
Times = NDArray[np.float64] | NDArray[np.int64]
"""Seconds since 1970."""
Aim = Literal["value", "clicks"]
DAY_S = 86_400.0
NO_CLOCK_START = 1_704_067_200
"""Where the world begins when the log has no clock: 2024-01-01."""
CELLS_AT_ONCE = 1 << 22
"""Numbers in one [R, n] matrix over the whole catalogue."""
_PAIRS = 50_000


class Response(NamedTuple):
    """What people did with pages."""

    clicks: Bools
    """[R, K]."""
    converted: Bools
    """[R, K]: the click became a purchase."""
    delay_s: Float
    """[R, K] seconds from click to purchase; infinite where there is none."""
    value: Float
    """[R, K] money of the purchase; 0 where there is none."""


@dataclass(frozen=True, kw_only=True, eq=False)
class World:
    """Known truth over the users and items of a log. Made by `from_log`; the same log and settings make the same world."""

    config: WorldConfig
    item_ids: Vocabulary
    user_ids: Vocabulary
    start: int
    """Seconds since 1970: one second after the log's last event. Drift is counted from here."""
    user_UD: Float
    """[U + 1, D] tastes at the start, of length 1; 0 for users without events, who go by popularity alone."""
    later_UD: Float
    """[U + 1, D] where the tastes turn: of the same length, orthogonal to `user_UD`."""
    item_ID: Float
    """[n + 1, D]."""
    affinity_scale: float
    """1 / sd of the inner products of users and items."""
    frequency_I: Float
    """[n + 1] log(1 + events) in sd."""
    phase_I: Float
    """[n + 1] where in its swing each item is at the start, 0 to 1."""
    log_value_I: Float
    """[n + 1] in sd."""
    value_I: Float
    """[n + 1] money of a purchase, 0 for row 0."""
    bid_I: Float
    """[n + 1] what is offered for a click, 0 for row 0."""
    events_I: Int
    """[n + 1] events of each item in the log."""
    events_U: Int
    """[U + 1] events of each user in the log."""
    attraction_bias: float
    conversion_bias: float

    @classmethod
    def from_log(cls, log: Dataset | Log, config: WorldConfig | None = None) -> World:
        """Fit tastes and popularity on all choices of a log or dataset, draw the rest, and set the means that the settings ask for.

        A log's rows are numbered by ids alone, so they differ from those of a dataset made from it.

        Raises DataError for a log without choices; ConfigError where `values = "observed"` meets a log without values.
        """
        config = config or WorldConfig()
        histories, item_ids, user_ids, has_clock, has_value = _choices(log)
        num_items = len(item_ids)
        found = tastes(histories, num_items, dim=config.dim, seed=config.seed)
        events_I = np.bincount(histories.item, minlength=num_items + 1)
        events_U = np.diff(histories.offsets)
        value_I = _values(config, histories, num_items, has_value)
        rng = np.random.default_rng([config.seed, 2])
        user = rng.choice(len(events_U), _PAIRS, p=events_U / events_U.sum())
        item = rng.choice(len(events_I), _PAIRS, p=events_I / events_I.sum())
        affinity = np.einsum("nd,nd->n", found.users[user], found.items[item])
        spread = float(affinity.std())
        scale = 1.0 / spread if spread > 0 else 0.0
        frequency_I = _in_sd(np.log1p(events_I), events_I)
        log_value_I = _in_sd(np.log(np.where(value_I > 0, value_I, 1.0)), events_I)
        likes = config.taste * scale * affinity + config.popularity * frequency_I[item]
        buys = config.conversion_taste * scale * affinity + config.conversion_value * log_value_I[item]
        attraction_bias = _bias(likes, config.attraction, np.ones(_PAIRS))
        return cls(
            config=config,
            item_ids=item_ids,
            user_ids=user_ids,
            start=int(histories.time.max()) + 1 if has_clock else NO_CLOCK_START,
            user_UD=found.users,
            later_UD=_turned_to(found.users, config.seed),
            item_ID=found.items,
            affinity_scale=scale,
            frequency_I=frequency_I,
            phase_I=np.random.default_rng([config.seed, 4]).random(num_items + 1),
            log_value_I=log_value_I,
            value_I=value_I,
            bid_I=_bids(config, num_items),
            events_I=events_I,
            events_U=events_U,
            attraction_bias=attraction_bias,
            conversion_bias=_bias(buys, config.conversion, _sigmoid(attraction_bias + likes)),
        )

    @property
    def num_items(self) -> int:
        """n."""
        return len(self.item_ids)

    @property
    def num_users(self) -> int:
        """U."""
        return len(self.user_ids)

    # -- truth --------------------------------------------------------------------------------------------------------

    def examination(self, num_places: int) -> Float:
        """[K] chance that each place is looked at, from the top."""
        return np.arange(1, num_places + 1, dtype=np.float64) ** -self.config.position_decay

    def affinity(self, users: Int, items: Int, times: Times) -> Float:
        """[R, K] how near each user's taste at the time is to each item, in sd.

        Args:
            users: [R] rows.
            items: [R, K] rows, or [K] that are the same for all requests.
            times: [R] seconds.
        """
        angle = (self.config.taste_turn / DAY_S * (times - self.start))[:, None]
        taste_RD = np.cos(angle) * self.user_UD[users] + np.sin(angle) * self.later_UD[users]
        shared = items.ndim == 1
        product = taste_RD @ self.item_ID[items].T if shared else np.einsum("rd,rkd->rk", taste_RD, self.item_ID[items])
        return self.affinity_scale * product

    def attraction(self, users: Int, items: Int, times: Times) -> Float:
        """[R, K] chance that an item is clicked once it is looked at; arguments as for `affinity`."""
        return self._attraction(self.affinity(users, items, times), items, times)

    def conversion(self, users: Int, items: Int, times: Times) -> Float:
        """[R, K] chance that a click becomes a purchase, sooner or later; arguments as for `affinity`."""
        return self._conversion(self.affinity(users, items, times), items)

    def click_chance(self, users: Int, pages: Int, times: Times) -> Float:
        """[R, K] chance of a click at each place of the pages [R, K]; 0 at empty places."""
        return self.examination(pages.shape[1]) * self.attraction(users, pages, times) * (pages > 0)

    def true_value(self, users: Int, pages: Int, times: Times) -> Float:
        """[R, K] expected money from each place of the pages [R, K], however late it comes."""
        z = self.affinity(users, pages, times)
        clicked = self.examination(pages.shape[1]) * self._attraction(z, pages, times)
        return clicked * self._conversion(z, pages) * self.value_I[pages]

    def converted_by(self, users: Int, items: Int, times: Times, seconds: float) -> Float:
        """[R, K] chance that a click has become a purchase so many seconds later; `conversion` times the share of delays up to there."""
        z, config = self.affinity(users, items, times), self.config
        wait = seconds / self._delay_factor(z, items)
        fast = -np.expm1(-wait / config.fast_mean_s)
        with np.errstate(divide="ignore"):
            slow = _normal_cdf(np.log(wait / config.slow_median_s) / config.slow_spread)
        return self._conversion(z, items) * (config.fast_share * fast + (1 - config.fast_share) * slow)

    def worth(self, users: Int, items: Int, times: Times, aim: Aim = "value") -> Float:
        """[R, K] what a look at each item brings: money, or clicks; arguments as for `affinity`."""
        if aim == "clicks":
            return self.attraction(users, items, times)
        z = self.affinity(users, items, times)
        return self._attraction(z, items, times) * self._conversion(z, items) * self.value_I[items]

    def value_of(self, policy: Policy, users: Int, times: Times, aim: Aim = "value") -> Float:
        """[R] what the policy's page is expected to bring at each request: money, or clicks. Exact, by the position-based model: an item at
        a place brings the same whatever stands around it, so a page drawn at random brings the mean over the catalogue at every place.
        """
        total = np.zeros(len(users))
        if policy.explore < 1:
            pages = policy.pages_of(users, times)
            places = self.worth(users, pages, times, aim) * self.examination(policy.k) * (pages > 0)
            total += (1 - policy.explore) * places.sum(1)
        if policy.explore > 0:
            by_chance = self.over_catalogue(users, times, lambda worth_Rn: worth_Rn.mean(1), aim)
            total += policy.explore * self.examination(policy.k).sum() * by_chance
        return total

    def over_catalogue(
        self, users: Int, times: Times, reduce: Callable[[Float], NDArray[np.generic]], aim: Aim = "value"
    ) -> NDArray[np.generic]:
        """`reduce` of the worth [chunk, n] of items 1..n, for all requests, in chunks that memory holds; its results end to end."""
        items = np.arange(1, self.num_items + 1)
        parts = [reduce(self.worth(users[part], items, times[part], aim)) for part in self._chunks(len(users))]
        return np.concatenate(parts)

    # -- what happens -------------------------------------------------------------------------------------------------

    def respond(self, users: Int, pages: Int, times: Times, rng: np.random.Generator) -> Response:
        """What people do with the pages [R, K]. As many numbers are drawn for any pages of a size, so that worlds and pages that differ
        little meet the same luck.

        Raises DataError where shapes or rows do not fit.
        """
        self.check(users, pages, times)
        z, config = self.affinity(users, pages, times), self.config
        click_u, buy_u, kind_u = rng.random((3, *pages.shape))
        fast = config.fast_mean_s * rng.standard_exponential(pages.shape)
        slow = config.slow_median_s * np.exp(config.slow_spread * rng.standard_normal(pages.shape))
        chance = self.examination(pages.shape[1]) * self._attraction(z, pages, times) * (pages > 0)
        clicks = click_u < chance
        converted = clicks & (buy_u < self._conversion(z, pages))
        delay = np.where(kind_u < config.fast_share, fast, slow) * self._delay_factor(z, pages)
        return Response(
            clicks=clicks,
            converted=converted,
            delay_s=np.where(converted, delay, np.inf),
            value=np.where(converted, self.value_I[pages], 0.0),
        )

    def check(self, users: Int, pages: Int, times: Times) -> None:
        """DataError where requests and pages do not fit each other or this world."""
        if pages.ndim != 2 or not len(users) == len(pages) == len(times):
            raise DataError(
                f"{len(users)} users and {len(times)} times want pages [{len(users)}, K], got {list(pages.shape)}"
            )
        for name, rows, most in (("user", users, self.num_users), ("item", pages, self.num_items)):
            if len(rows) and (rows.min() < 0 or rows.max() > most):
                raise DataError(f"{name} rows run from 0 to {most} here, got {rows.min()} to {rows.max()}")

    # -- parts --------------------------------------------------------------------------------------------------------

    def _attraction(self, z: Float, items: Int, times: Times) -> Float:
        config = self.config
        logit = self.attraction_bias + config.taste * z + config.popularity * self.frequency_I[items]
        if config.popularity_swing:
            turns = ((times - self.start) / (config.popularity_period_days * DAY_S))[:, None]
            logit += config.popularity_swing * np.sin(2 * np.pi * (turns + self.phase_I[items]))
        return _sigmoid(logit)

    def _conversion(self, z: Float, items: Int) -> Float:
        config = self.config
        return _sigmoid(
            self.conversion_bias + config.conversion_taste * z + config.conversion_value * self.log_value_I[items]
        )

    def _delay_factor(self, z: Float, items: Int) -> Float:
        return np.exp(self.config.delay_taste * z + self.config.delay_value * self.log_value_I[items])

    def _chunks(self, num_requests: int) -> Iterator[slice]:
        size = max(1, CELLS_AT_ONCE // (self.num_items + 1))
        return (slice(start, start + size) for start in range(0, max(num_requests, 1), size))


# -- making one ---------------------------------------------------------------------------------------------------


def _choices(log: Dataset | Log) -> tuple[Histories, Vocabulary, Vocabulary, bool, bool]:
    """Choices of all users, ids of items and users, and whether the log has a clock and values."""
    if isinstance(log, Dataset):
        return log.histories, log.item_ids, log.user_ids, log.space.has_clock, "value" in log.schema.roles
    if isinstance(log, Ingested):
        item_ids, user_ids, shown = log.item_ids, log.user_ids, log.encoded
    else:
        listed = [] if log.items is None else [log.items["item_id"]]
        item_ids = Vocabulary.build(log.events["item_id"], *listed)
        user_ids = Vocabulary.build(log.events["user_id"])
        shown = encode_events(log, item_ids, user_ids)
    rule = target_rule(log, DataConfig())
    if rule.label is not None:
        shown = shown.keep(rule.chosen(log.events).to_numpy()[shown.row], has_clock=log.has_clock)
    return shown.histories, item_ids, user_ids, log.has_clock, "value" in log.events.columns


def _values(config: WorldConfig, histories: Histories, num_items: int, has_value: bool) -> Float:
    """[n + 1] money of a purchase of each item, 0 for row 0."""
    rng = np.random.default_rng([config.seed, 3])
    if config.values == "lognormal":
        drawn = lognormal(rng, num_items, median=config.value_median, spread=config.value_spread)
    elif config.values == "pareto":
        drawn = pareto(rng, num_items, median=config.value_median, tail=config.value_tail)
    else:
        paid = histories.value > 0
        if not has_value or not paid.any():
            raise ConfigError("values = 'observed' wants a log whose events have values; choose lognormal or pareto")
        item = histories.item[paid]
        count = np.bincount(item, minlength=num_items + 1)[1:]
        total = np.bincount(item, weights=histories.value[paid].astype(np.float64), minlength=num_items + 1)[1:]
        mean = total / np.maximum(count, 1)
        drawn = np.where(count > 0, mean, np.median(mean[count > 0]))
    return np.concatenate([[0.0], drawn])


def _bids(config: WorldConfig, num_items: int) -> Float:
    """[n + 1] bid of each item, 0 for row 0."""
    rng = np.random.default_rng([config.seed, 5])
    if config.bids == "lognormal":
        drawn = lognormal(rng, num_items, median=config.bid_median, spread=config.bid_spread)
    elif config.bids == "pareto":
        drawn = pareto(rng, num_items, median=config.bid_median, tail=config.bid_tail)
    else:
        prices = PriceHistogram.load(config.bid_prices)
        if not prices.median:
            raise DataError(f"{config.bid_prices}: half of the prices are 0, so they can not be scaled to a median bid")
        drawn = prices.sample(rng, num_items) * config.bid_median / prices.median
    return np.concatenate([[0.0], drawn])


def _turned_to(vectors_UD: Float, seed: int) -> Float:
    """Where each taste turns: what is orthogonal to it in somebody else's, in the same length; 0 stays 0."""
    rng = np.random.default_rng([seed, 6])
    known = np.flatnonzero(vectors_UD.any(1))
    own = vectors_UD[known]
    # A little of a random direction, so that nobody turns towards a taste that is exactly their own.
    other = vectors_UD[rng.permutation(known)] + 1e-3 * rng.standard_normal(own.shape)
    other -= (other * own).sum(1, keepdims=True) * own
    length = np.linalg.norm(other, axis=1, keepdims=True)
    later = np.zeros_like(vectors_UD)
    later[known] = np.where(length > 1e-9, other / np.maximum(length, 1e-9), 0.0)
    return later


def _in_sd(values: Float, weights: Int) -> Float:
    """Standardised by mean and standard deviation under the weights; row 0, and all where nothing varies, becomes 0."""
    mean = np.average(values, weights=weights)
    spread = np.sqrt(np.average((values - mean) ** 2, weights=weights))
    scaled = (values - mean) / spread if spread > 1e-9 else np.zeros_like(values)
    scaled[0] = 0.0
    return scaled


def _bias(logits: Float, wanted: float, weights: Float) -> float:
    """What must be added to the logits [N] so that their chances have the wanted mean under the weights; by bisection."""
    low, high = -60.0 - float(logits.max()), 60.0 - float(logits.min())
    for _ in range(80):
        middle = 0.5 * (low + high)
        if np.average(_sigmoid(logits + middle), weights=weights) < wanted:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)


def _sigmoid(x: Float) -> Float:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def _normal_cdf(x: Float) -> Float:
    cdf: Float = torch.special.ndtr(torch.from_numpy(np.asarray(x))).numpy()
    return cdf
