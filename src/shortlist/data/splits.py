"""Training and held-out parts of a log, and the requests asked of each. Groups are never cut; the target of a request is a whole group.

    time          |---------- train ----------|--- fit ---|- valid -|--- test ---|
    last stage read     retrieval learns here   later stages  selection   once

N events, G groups, R requests, U users. This file needs numpy alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shortlist.data.histories import Histories, Int, Requests, ranges
from shortlist.data.sorting import first_of_equal
from shortlist.errors import ConfigError, DataError

Protocol = Literal["time", "last-group", "user", "leave-last-out-as-published"]
Window = Literal["fit", "valid", "test", "end"]
PROTOCOLS: tuple[Protocol, ...] = ("time", "last-group", "user", "leave-last-out-as-published")
WINDOW_NUMBER: dict[Window, int] = {"fit": 1, "valid": 2, "test": 3, "end": 4}
"""A view of a window sees the events whose window number is smaller; training events have number 0."""
REPEAT_SHARE = 0.10
"""Above this share of repeated events, a log is taken as one of a surface on which items may be shown again."""
HOURS, WEEKDAYS = 24, 7
_HOUR_S, _DAY_S = 3_600, 86_400

Bools = NDArray[np.bool_]
Small = NDArray[np.int8]
Columns = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """How a log is cut and read."""

    protocol: Protocol = "time"
    """Which events are held out; see `plan_split`."""
    fit_share: float = 0.25
    """Share of the events (of the users for "user") on which later stages are trained."""
    valid_share: float = 0.05
    """Share on which systems are selected."""
    test_share: float = 0.10
    """Share that is looked at once."""
    requests_per_user: Literal["first", "all"] = "all"
    """Whether every group of a user inside a window is a request, or only the first."""
    max_requests: int | None = None
    """Requests kept per window, drawn at random; None = all."""
    target_actions: tuple[str, ...] = ()
    """Actions worth predicting; empty = all. The others stay in the history."""
    target_label: str = "auto"
    """Label that says whether a row is a choice: a column; "" = every row is one; "auto" = the log's only label if it is 0/1."""
    target_min: float | None = None
    """Least value of that label that counts; none = 1 for a label of 0 and 1. Rows below stand in no history: they were shown only."""
    kcore: int = 0
    """Keep users and items with at least so many events; 0 = all."""
    repeats: Literal["auto", "yes", "no"] = "auto"
    """Whether items already seen may be shown again; "auto" guesses from the share of repeats in the log."""
    context: tuple[str, ...] = ()
    """Event columns that are known before the event, such as device or place: they become context fields."""
    seed: int = 0
    """For numbering, drawing users and drawing requests."""

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ConfigError(f"protocol {self.protocol!r} is unknown; choose from {', '.join(PROTOCOLS)}")
        shares = {name: getattr(self, name) for name in ("fit_share", "valid_share", "test_share")}
        for name, share in shares.items():
            if not 0 < share < 1:
                raise ConfigError(f"{name} must lie between 0 and 1, got {share}")
        if sum(shares.values()) >= 1:
            raise ConfigError(
                f"fit_share, valid_share and test_share add up to {sum(shares.values()):.2f}; leave something to train on"
            )
        if self.requests_per_user not in ("first", "all"):
            raise ConfigError(f"requests_per_user must be 'first' or 'all', got {self.requests_per_user!r}")
        if self.repeats not in ("auto", "yes", "no"):
            raise ConfigError(f"repeats must be 'auto', 'yes' or 'no', got {self.repeats!r}")
        if self.max_requests is not None and self.max_requests < 1:
            raise ConfigError(f"max_requests must be at least 1, got {self.max_requests}; leave it out for all")
        if self.target_min is not None and not (self.target_label and np.isfinite(self.target_min)):
            raise ConfigError(
                f"target_min = {self.target_min} wants a number and a label to compare with it, got target_label {self.target_label!r}"
            )
        if self.kcore < 0:
            raise ConfigError(f"kcore must be 0 or more, got {self.kcore}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """The requests of each window; they point into the dataset's `histories` of ALL events."""

    protocol: str
    """Its name, to be written beside every figure."""
    note: str
    """What was held out, in words; belongs under every table."""
    fit: Requests
    """Later stages are trained on these."""
    valid: Requests
    """Systems and settings are chosen on these."""
    test: Requests
    """Looked at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What each event is for."""

    window_of_event: Small
    """[N]: 0 = training; 1, 2, 3 = first hidden from the views "fit", "valid", "test". Never falls within a user."""
    request_of_event: Small
    """[N]: 1, 2, 3 = the event's group is asked for in that window; 0 = in none. The same for a whole group."""
    now: Mapping[Window, int]
    """Seconds: the moment at which each view ends."""
    note: str
    """The protocol in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """Runs of events that happened together, in the order of the histories."""

    start: Int
    """[G] first event."""
    end: Int
    """[G] one past the last event."""
    user: Int
    """[G] user row."""

    @classmethod
    def of(cls, histories: Histories) -> Groups:
        """Find them: a group ends where the group number or the user changes."""
        user, group = histories.user_of_event, histories.group
        first = np.ones(histories.num_events, dtype=bool)
        first[1:] = (group[1:] != group[:-1]) | (user[1:] != user[:-1])
        start = np.flatnonzero(first)
        return cls(start=start, end=np.append(start[1:], histories.num_events)[: len(start)], user=user[start])

    def from_last(self, chosen: Bools) -> Int:
        """[G] int64: how many chosen groups of the same user stand behind this one; -1 where it is not chosen itself."""
        at = np.flatnonzero(chosen)
        user = self.user[at]
        place = np.full(len(chosen), -1, dtype=np.int64)
        place[at] = np.searchsorted(user, user, side="right") - 1 - np.arange(len(at))
        return place

    def to_events(self, per_group: Small) -> Small:
        """[N]: the value of each event's group."""
        return np.repeat(per_group, self.end - self.start)


# -- protocols ----------------------------------------------------------------------------------------------------


def plan_split(histories: Histories, config: DataConfig, is_target: Bools, *, order_known: bool = True) -> Plan:
    """Decide what each event is for.

    time: the shares are quantiles of the event times. Training events are before t_fit <= fit requests < t_valid <= valid < t_test <= test.
        A request sees all of its user's earlier groups, also those inside its window; without any it is cold, and kept.
    last-group: per user the last group is tested, the one before validates, the one before that is for fitting. One group always
        stays for training, so users with 1, 2 or 3 groups take part in training alone, in test too, in test and validation too.
    user: whole users are held out; the last group of each is asked for.
    leave-last-out-as-published: every event counts alone: last = test, last but one = valid, all others train, as in the tables of
        many papers. The fit requests are the last training events: no event is left that retrieval has not seen.

    Args:
        is_target: [N] events worth predicting; groups without any are never asked for.
        order_known: False where the order within users is arbitrary (a log without times).

    Raises DataError when a part would be empty.
    """
    groups = Groups.of(histories)
    num_targets = np.add.reduceat(is_target.astype(np.int64), groups.start) if len(groups.start) else groups.start
    has_target = num_targets > 0
    if config.protocol == "time":
        plan = _by_time(histories, groups, has_target, config)
    elif config.protocol == "user":
        plan = _by_user(histories, groups, has_target, config)
    else:
        plan = _by_place(
            histories, groups, has_target, published=config.protocol != "last-group", order_known=order_known
        )
    for window, number in (("training", 0), ("fit", 1), ("valid", 2), ("test", 3)):
        filled = (plan.request_of_event == number).any() if number else (plan.window_of_event == 0).any()
        if not filled:
            raise DataError(
                f"the split by {config.protocol!r} leaves the {window} part empty ({histories.num_events:,} events of "
                f"{histories.num_users:,} users in {len(groups.start):,} groups); choose another protocol or other shares"
            )
    return plan


def _by_time(histories: Histories, groups: Groups, has_target: Bools, config: DataConfig) -> Plan:
    ordered = np.sort(histories.time)
    held_out = np.cumsum([config.test_share, config.valid_share, config.fit_share])[::-1]
    return plan_of_cuts(
        histories, groups, has_target, ordered[np.floor(len(ordered) * (1 - held_out)).astype(np.int64)]
    )


def plan_of_cuts(histories: Histories, groups: Groups, has_target: Bools, cuts: Int) -> Plan:
    """What each event is for where the log is cut by time.

    Args:
        has_target: [G] groups with an event worth predicting.
        cuts: [3] seconds at which the fit, validation and test windows begin.
    """
    # A group shares one time, so a comparison with the cuts never splits one.
    window = np.searchsorted(cuts, histories.time[groups.start], side="right").astype(np.int8)
    asked = np.where(has_target, window, 0).astype(np.int8)
    fit, valid, test = (str(np.datetime64(int(cut), "s")).replace("T", " ") for cut in cuts)
    return Plan(
        window_of_event=groups.to_events(window),
        request_of_event=groups.to_events(asked),
        now={"fit": int(cuts[0]), "valid": int(cuts[1]), "test": int(cuts[2]), "end": int(histories.time.max()) + 1},
        note=f"By time: training before {fit}, fit from there, validation from {valid}, test from {test} (UTC). Whole groups are predicted "
        "from all earlier groups of the user; users without any are kept.",
    )


def _by_user(histories: Histories, groups: Groups, has_target: Bools, config: DataConfig) -> Plan:
    users = np.unique(groups.user[has_target])
    shuffled = np.random.default_rng([config.seed, 1]).permutation(users)
    held_out = np.cumsum([config.test_share, config.valid_share, config.fit_share])
    test, valid, fit = np.split(shuffled, np.round(len(users) * held_out).astype(np.int64))[:3]
    part_of_user = np.zeros(histories.num_users + 1, dtype=np.int8)
    for number, part in ((1, fit), (2, valid), (3, test)):
        part_of_user[part] = number
    window = part_of_user[groups.user]
    asked = np.where(groups.from_last(has_target) == 0, window, 0).astype(np.int8)
    window_of_event = groups.to_events(window)
    return Plan(
        window_of_event=window_of_event,
        request_of_event=groups.to_events(asked),
        now=_newest(histories, window_of_event),
        note=f"By user: {len(fit):,} users for fitting, {len(valid):,} for validation, {len(test):,} for the test have no event "
        "in training. The last group of each is predicted from the earlier ones; times of the parts overlap.",
    )


def _by_place(histories: Histories, groups: Groups, has_target: Bools, *, published: bool, order_known: bool) -> Plan:
    """Per user from the end: with `published`, groups are single events and the fit request is still a training event."""
    place = groups.from_last(has_target)
    # Number of groups of the user up to this one, so that one always stays for training.
    earlier = np.arange(len(groups.user)) - np.searchsorted(groups.user, groups.user)
    asked = np.select([(place == 0), (place == 1), (place == 2)], [3, 2, 1], 0).astype(np.int8)
    if published:
        short = np.bincount(groups.user, weights=has_target, minlength=histories.num_users + 1)[groups.user] < 3
        asked[short | (earlier == 0)] = 0
        held = np.where(asked == 1, 0, asked).astype(np.int8)
    else:
        asked[earlier == 0] = 0
        held = asked
    window_of_event = groups.to_events(_never_falling(held, groups.user))
    if published:
        note = (
            "Leave-last-out as published: each user's last event is the test, the last but one validates, all others train. "
            "Ties in time are cut by file order, so a basket can be split and a sort inside it be learned: comparable with published "
            "tables only. Users with fewer than 3 events only train. The fit requests are each user's last training event, which "
            "retrieval has seen."
        )
    elif order_known:
        note = (
            "Last group out: of each user's groups the last is the test, the one before validates, the one before that is for fitting; the "
            "first always trains. Times of the parts overlap between users."
        )
    else:
        note = "The log has no times: of each user's groups, in random order, one is the test, one validates, one is for fitting."
    return Plan(
        window_of_event=window_of_event,
        request_of_event=groups.to_events(asked),
        now=_newest(histories, window_of_event),
        note=note,
    )


def _never_falling(held: Small, user: Int) -> Small:
    """Running maximum within each user: what follows a hidden group is hidden with it."""
    return (np.maximum.accumulate(user * 4 + held) - user * 4).astype(np.int8)


def _newest(histories: Histories, window_of_event: Small) -> dict[Window, int]:
    return {
        window: int(histories.time[window_of_event < number].max(initial=0)) for window, number in WINDOW_NUMBER.items()
    }


# -- requests -----------------------------------------------------------------------------------------------------


def split_requests(
    histories: Histories,
    plan: Plan,
    config: DataConfig,
    *,
    is_target: Bools,
    repeats: bool,
    context: Columns | None = None,
) -> Split:
    """The requests of each window.

    Args:
        is_target: [N] events worth predicting.
        repeats: False drops targets that stand in the history already, and requests that have no other.
        context: encoded columns [N] of what is known before each event.
    """
    groups = Groups.of(histories)
    asked = plan.request_of_event[groups.start]
    parts = {}
    for number, window in ((1, "fit"), (2, "valid"), (3, "test")):
        chosen = np.flatnonzero(asked == number)
        if config.requests_per_user == "first":
            chosen = chosen[np.unique(groups.user[chosen], return_index=True)[1]]
        requests = _requests(histories, groups.start[chosen], groups.end[chosen], is_target, repeats, context)
        if config.max_requests is not None and len(requests) > config.max_requests:
            drawn = np.random.default_rng([config.seed, number]).choice(
                len(requests), config.max_requests, replace=False
            )
            requests = requests.select(np.sort(drawn))
        if not len(requests):
            raise DataError(
                f"the {window} window has no request left: every target stands in its user's history and repeats are off; "
                "set repeats = 'yes' or choose larger shares"
            )
        parts[window] = requests
    cold = float(np.mean(parts["test"].start == parts["test"].end))
    seen = "may be shown again" if repeats else "are never shown again, and left out of the targets"
    note = f"{plan.note} Items already seen {seen}. {cold:.1%} of the test requests have no history."
    return Split(protocol=config.protocol, note=note, **parts)


def past_requests(
    histories: Histories,
    *,
    min_history: int = 0,
    max_per_user: int | None = None,
    seed: int = 0,
    ends: Int | None = None,
    repeats: bool = True,
    context: Columns | None = None,
) -> Requests:
    """Every group of the histories as a request, with its distinct items as targets.

    Args:
        min_history: events that must stand before the group.
        max_per_user: groups kept per user, drawn at random; None = all.
        ends: [U + 1] per user row, one past the last event to be used; None = all events.
        repeats: False drops targets that stand in the history already, and requests that have no other.
        context: encoded columns [N] of what is known before each event; hour and weekday are always added.
    """
    groups = Groups.of(histories)
    keep = groups.start - histories.offsets[groups.user] >= min_history
    if ends is not None:
        keep &= groups.end <= np.asarray(ends)[groups.user]
    chosen = np.flatnonzero(keep)
    if max_per_user is not None:
        lot = np.random.default_rng([seed, 2]).random(len(chosen))
        chosen = chosen[np.lexsort((lot, groups.user[chosen]))]
        user = groups.user[chosen]
        rank = np.arange(len(user)) - np.searchsorted(user, user)
        chosen = np.sort(chosen[rank < max_per_user])
    return _requests(histories, groups.start[chosen], groups.end[chosen], None, repeats, context)


def _requests(
    histories: Histories, start: Int, end: Int, is_target: Bools | None, repeats: bool, context: Columns | None
) -> Requests:
    """Ask for the groups start[r] .. end[r], each from all that its user did before."""
    event, lengths = ranges(start, end)
    request = np.repeat(np.arange(len(start)), lengths)
    keep = np.ones(len(event), dtype=bool) if is_target is None else np.array(is_target[event])
    if not repeats:
        keep &= first_occurrence(histories)[event] >= np.repeat(start, lengths)
    item, value = histories.item[event[keep]], histories.value[event[keep]].astype(np.float64)
    # Values are summed in the order of their size, so that the order of the lines does not matter.
    order = np.lexsort((value, item, request[keep]))
    item, value, owner = item[order], value[order], request[keep][order]
    fresh = np.ones(len(item), dtype=bool)
    fresh[1:] = (item[1:] != item[:-1]) | (owner[1:] != owner[:-1])
    first = np.flatnonzero(fresh)
    summed = np.add.reduceat(value, first) if len(first) else value
    counts = np.bincount(owner[first], minlength=len(start))
    user = histories.user_of_event[start] if len(start) else start
    time = histories.time[start]
    columns: dict[str, NDArray[np.generic]] = dict(time_context(time))
    for name, column in (context or {}).items():
        # The largest value of the group, so that the order of its lines does not matter.
        columns[name] = np.maximum.reduceat(column[event], np.cumsum(lengths) - lengths) if len(event) else column[:0]
    requests = Requests(
        user=user,
        time=time,
        start=histories.offsets[user],
        end=start,
        target_offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        target=item[first],
        target_value=summed.astype(np.float32),
        context=columns,
    )
    return requests if counts.all() else requests.select(np.flatnonzero(counts))


def first_occurrence(histories: Histories) -> Int:
    """[N]: index of the first event of the same user with the same item."""
    return first_of_equal(histories.item, histories.user_of_event)


def repeat_share(histories: Histories) -> float:
    """Share of the events outside each user's first group whose item stands in an earlier group; 0 where there are none."""
    groups = Groups.of(histories)
    start = np.repeat(groups.start, groups.end - groups.start)
    later = start > histories.offsets[histories.user_of_event]
    if not later.any():
        return 0.0
    return float(np.mean((first_occurrence(histories) < start)[later]))


def time_context(time_s: Int) -> dict[str, Int]:
    """Hour of the day 1..24 and day of the week 1..7 (Monday first) of UTC seconds [R]: the context fields of every log with a clock."""
    time_s = np.asarray(time_s, dtype=np.int64)
    # 1 January 1970 was a Thursday.
    return {"hour": time_s % _DAY_S // _HOUR_S + 1, "weekday": (time_s // _DAY_S + 3) % WEEKDAYS + 1}
