"""The page laid out by rules, place by place, from a longer list than is shown.

    pinned item?                              it stands there
    else the best of what is left, by         value = (1 - w) * v(i) - w * KL(past || page with i)            mix of weight w
                                              v(i)  = l * relevance(i) - (1 - l) * likeness to those above   diversity of relevance l
    among those that the quotas let through   at most: not more than so many; at least: as many places kept free as are still owed

Likeness and relevance are those of models/ranking/mmr.py. The divergence is that of "Calibrated Recommendations", Steck, RecSys 2018,
equations 3 to 7: KL = sum over values g of p(g) log(p(g) / q~(g)), q~ = 0.99 q + 0.01 p, with p(g) the mean over the past events of each
item's share 1 / (number of its values), and q(g) the same over the page so far and the item in question. Items that only fill up the
list (without a score) come after all others, whatever their value.

B requests, L items of a list, k places, S most values of an item, M most distinct values of a past, P pins, X items added to a list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from shortlist.cascade.attributes import Attributes
from shortlist.cascade.candidates import Blocked, first_permitted
from shortlist.cascade.cascade import Page
from shortlist.cascade.knowing import Known, reason_of
from shortlist.cascade.live import Live
from shortlist.cascade.questions import Asked
from shortlist.cascade.rules import Diversity, Mix, Quota, Rules
from shortlist.cascade.ruling import Ruling
from shortlist.data.jagged import Jagged
from shortlist.models.ranking.mmr import relevance

TIMES, MORE, LONGEST, ADDED = 4, 20, 2_000, 200
"""A list has so many times the page's places, so many more at least, and at most so many unless the page itself is longer; where quotas
limit, so many of the most popular items stand ready behind it."""
ALPHA = 0.01
"""Share of the past in q~, so that a value that the page lacks has a finite price (Steck, section 3.1)."""
MOST_VALUES = 256
"""Values of a past that are looked at: the most frequent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ground:
    """What a page is laid out on."""

    attributes: Attributes
    popular: Tensor
    """int64 catalogue rows, best first: where items are looked for that quotas need and the list lacks; empty = nowhere."""
    blocked: Blocked
    """What each request may not see."""
    past: Jagged
    """Catalogue rows of each request's history."""


def list_length(rules: Rules, k: int, num_candidates: int | None = None) -> int:
    """Items that the last stage should leave, so that there is something to lay a page of k items out from."""
    if not (rules.quotas or rules.diversity or rules.mix):
        return k
    wanted = max(k, min(max(TIMES * k, k + MORE), LONGEST))
    return wanted if num_candidates is None else max(k, min(max(wanted, num_candidates), LONGEST))


def arrange(
    page: Page, k: int, rules: Rules, pins: Mapping[int, int], ground: Ground
) -> tuple[Page, list[dict[str, int]]]:
    """Pages of k places from the lists of a longer page, and how many places each rule filled with another item than would stand there.

    Args:
        page: rows and scores [B, L], best first.
        k: places.
        rules: what to do.
        pins: catalogue row by place, from 0; these may be shown.
        ground: the rest.
    """
    pins = {place: row for place, row in pins.items() if place < k}
    board = _Board.of(page, rules, pins, ground)
    likeness = None if rules.diversity is None else _Likeness(rules.diversity, ground.attributes, board)
    mix = None if rules.mix is None else _Mix(rules.mix, ground, board)
    quotas = [_quota(quota, ground.attributes, board) for quota in rules.quotas or ()]
    moved = {name: torch.zeros_like(board.rows_BL[:, 0]) for name in _names(rules)}
    plain_Bk = pad(page.rows.cpu(), (0, max(k - page.rows.shape[1], 0)))
    shown: list[Tensor] = []
    for place in range(k):
        if place in pins:
            best_B1 = board.pin(pins[place])
            moved["pins"] += pins[place] != plain_Bk[:, place]
        else:
            places_left = sum(later not in pins for later in range(place, k))
            best_B1 = _best(board, likeness, mix, quotas, places_left, moved)
        found_B1 = best_B1 >= 0
        best_B1 = best_B1.clamp(min=0)
        shown.append(torch.where(found_B1, best_B1, -1))
        board.open_BL = board.open_BL.scatter(1, best_B1, board.open_BL.gather(1, best_B1) & ~found_B1)
        for part in (
            *([likeness] if likeness else []),
            *([mix] if mix else []),
            *(quotas if place not in pins else []),
        ):
            part.show(best_B1, found_B1)
    return _laid_out(page, board, torch.cat(shown, 1)), _counts(moved)


def _best(
    board: _Board,
    likeness: _Likeness | None,
    mix: _Mix | None,
    quotas: Sequence[_Limit | _Share],
    places_left: int,
    moved: dict[str, Tensor],
) -> Tensor:
    """int64 [B, 1]: column of the item for the next place, -1 where there is none; counts whose doing it is."""
    value_BL = board.order_BL
    best_B1 = board.choose(value_BL)
    if likeness is not None:
        value_BL = likeness.value()
        before_B1, best_B1 = best_B1, board.choose(value_BL)
        moved["diversity"] += (best_B1 != before_B1)[:, 0]
    if mix is not None:
        value_BL = mix.value(board.relevance_BL if likeness is None else value_BL)
        before_B1, best_B1 = best_B1, board.choose(value_BL)
        moved["mix"] += (best_B1 != before_B1)[:, 0]
    if quotas:
        before_B1, best_B1 = best_B1, board.choose(value_BL, _within(board, quotas, places_left))
        moved["quotas"] += (best_B1 != before_B1)[:, 0]
    return best_B1


def _within(board: _Board, quotas: Sequence[_Limit | _Share], places_left: int) -> Tensor:
    """bool [B, L]: open items that the quotas let take the next place."""
    fine_BL = board.open_BL
    for quota in quotas:
        fine_BL = fine_BL & ~quota.full()
    shares = [quota for quota in quotas if isinstance(quota, _Share) and quota.quota.least]
    if not shares:
        return fine_BL
    owed_QB = torch.stack([quota.owed(fine_BL) for quota in shares])
    wanted_BL = (torch.stack([quota.has_BL for quota in shares]) & (owed_QB > 0)[:, :, None]).any(0) & fine_BL
    must_B = (owed_QB.sum(0) >= places_left) & wanted_BL.any(1)
    return torch.where(must_B[:, None], wanted_BL, fine_BL)


@dataclass(slots=True)
class _Board:
    """The lists that pages are made from. Pinned items stand in columns of their own at the end and are never open."""

    rows_BL: Tensor
    scores_BL: Tensor
    open_BL: Tensor
    """bool: may still be chosen."""
    listed_BL: Tensor
    """bool: has a score, so that it comes before those that only fill up."""
    order_BL: Tensor
    """float32: falls along the list."""
    relevance_BL: Tensor
    """float32 in 0..1."""
    pins: Sequence[int]

    @classmethod
    def of(cls, page: Page, rules: Rules, pins: Mapping[int, int], ground: Ground) -> _Board:
        rows_BL, scores_BL = page.rows.cpu(), page.scores.cpu().float()
        added_X = _added(rules, ground)
        if len(added_X):
            both = torch.cat([rows_BL, added_X.expand(len(rows_BL), -1)], 1)
            longer_BL = first_permitted(both, ground.blocked, both.shape[1])
            # What was on the list stays where it was, since it is permitted and distinct.
            scores_BL = pad(scores_BL, (0, longer_BL.shape[1] - scores_BL.shape[1]), value=-torch.inf)
            rows_BL = longer_BL
        open_BL = rows_BL > 0
        pinned_P = torch.tensor(list(pins.values()), dtype=torch.int64)
        if len(pinned_P):
            same_BLP = rows_BL[:, :, None] == pinned_P
            score_BP = scores_BL[:, :, None].masked_fill(~same_BLP, -torch.inf).amax(1)
            open_BL = open_BL & ~same_BLP.any(2)
            rows_BL = torch.cat([rows_BL, pinned_P.expand(len(rows_BL), -1)], 1)
            scores_BL = torch.cat([scores_BL, score_BP], 1)
            open_BL = pad(open_BL, (0, len(pinned_P)), value=False)
        return cls(
            rows_BL=rows_BL,
            scores_BL=scores_BL,
            open_BL=open_BL,
            listed_BL=torch.isfinite(scores_BL),
            order_BL=-torch.arange(rows_BL.shape[1], dtype=torch.float32).expand_as(scores_BL),
            relevance_BL=relevance(scores_BL, open_BL),
            pins=pinned_P.tolist(),
        )

    def pin(self, row: int) -> Tensor:
        """int64 [B, 1]: the column of a pinned item."""
        at = self.rows_BL.shape[1] - len(self.pins) + self.pins.index(row)
        return torch.full_like(self.rows_BL[:, :1], at)

    def choose(self, value_BL: Tensor, fine_BL: Tensor | None = None) -> Tensor:
        """int64 [B, 1]: the open column of highest value, those with a score first; -1 where none is open. Equals keep their order."""
        fine_BL = self.open_BL if fine_BL is None else fine_BL
        first_BL = fine_BL & self.listed_BL
        fine_BL = torch.where(first_BL.any(1, keepdim=True), first_BL, fine_BL)
        best_B1 = value_BL.masked_fill(~fine_BL, -torch.inf).argmax(1, keepdim=True)
        return torch.where(fine_BL.any(1, keepdim=True), best_B1, -1)


class _Likeness:
    """Maximal marginal relevance."""

    def __init__(self, rule: Diversity, attributes: Attributes, board: _Board) -> None:
        self.weight, self.relevance_BL = rule.relevance, board.relevance_BL
        self.parts = attributes.compared(rule.fields)
        self.features = [part.features(board.rows_BL) for part in self.parts]
        self.closest_BL = torch.zeros_like(board.relevance_BL)

    def value(self) -> Tensor:
        """float32 [B, L]."""
        return self.weight * self.relevance_BL - (1 - self.weight) * self.closest_BL

    def show(self, best_B1: Tensor, found_B1: Tensor) -> None:
        """An item was put on the page."""
        each = [part.likeness(feature, best_B1) for part, feature in zip(self.parts, self.features)]
        like_BL = torch.stack(each).mean(0).masked_fill(~found_B1, 0)
        self.closest_BL = torch.maximum(self.closest_BL, like_BL)


class _Mix:
    """The calibrated mix: p of the past over M values, and what each item of the list adds to q."""

    def __init__(self, rule: Mix, ground: Ground, board: _Board) -> None:
        self.weight = rule.weight
        sets = ground.attributes.sets(rule.field)
        value_BM, self.p_BM = shares_of_past(ground.past, sets)
        members_BLS = _members(sets, board.rows_BL)
        size_BL = (members_BLS > 0).sum(2).clamp(min=1)
        share_BLM = torch.zeros(*board.rows_BL.shape, value_BM.shape[1])
        for members_BL in members_BLS.unbind(2):  # one at a time: all of them at once would be a large tensor
            share_BLM += (members_BL[:, :, None] == value_BM[:, None]) & (members_BL > 0)[:, :, None]
        self.share_BLM = share_BLM / size_BL[:, :, None]
        self.sum_BM = torch.zeros_like(self.p_BM)
        self.num_B = torch.zeros(len(self.p_BM))

    def value(self, relevance_BL: Tensor) -> Tensor:
        """float32 [B, L]."""
        return (1 - self.weight) * relevance_BL - self.weight * self.divergence()

    def divergence(self) -> Tensor:
        """float32 [B, L]: KL between the past and the page with each item; 0 for a person without a past."""
        q_BLM = (self.sum_BM[:, None] + self.share_BLM) / (self.num_B + 1)[:, None, None]
        p_B1M = self.p_BM[:, None]
        q_BLM = (1 - ALPHA) * q_BLM + ALPHA * p_B1M
        return torch.where(p_B1M > 0, p_B1M * (p_B1M / q_BLM).log(), 0.0).sum(2)

    def show(self, best_B1: Tensor, found_B1: Tensor) -> None:
        """An item was put on the page."""
        index = best_B1[:, :, None].expand(-1, 1, self.share_BLM.shape[2])
        self.sum_BM = self.sum_BM + self.share_BLM.gather(1, index)[:, 0] * found_B1
        self.num_B = self.num_B + found_B1[:, 0]


def shares_of_past(past: Jagged, sets: Jagged) -> tuple[Tensor, Tensor]:
    """What a person's events were of: values int64 [B, M], most frequent first, 0 = none, and their shares float32 [B, M].

    An event counts 1, divided among its item's values; events with items that have none are left out, and the shares add up to 1.

    Args:
        past: catalogue rows of B people's events.
        sets: distinct values of each item, n + 1 rows.
    """
    index, lengths = sets.where(past.values)
    weight = (1.0 / lengths.clamp(min=1).double()).repeat_interleave(lengths)
    width = int(sets.values.max()) + 1 if len(sets.values) else 1
    person = past.row_of_value.repeat_interleave(lengths)
    key, which = (person * width + sets.values[index]).unique(return_inverse=True)
    mass = torch.zeros(len(key), dtype=torch.float64).index_add_(0, which, weight)
    owner, value = key // width, key % width
    total_B = torch.zeros(past.num_rows, dtype=torch.float64).index_add_(0, owner, mass)
    share = mass / total_B[owner]
    order = share.argsort(descending=True, stable=True)
    order = order[owner[order].argsort(stable=True)]
    counts_B = torch.bincount(owner, minlength=past.num_rows)
    ordered = Jagged.from_lengths(value[order], counts_B)
    value_BM, _ = ordered.padded()
    share_BM, _ = ordered.with_values(share[order].float()).padded()
    return value_BM[:, :MOST_VALUES], share_BM[:, :MOST_VALUES]


class _Limit:
    """At most so many items of any one value."""

    def __init__(self, quota: Quota, attributes: Attributes, board: _Board) -> None:
        self.quota = quota
        assert quota.most is not None
        self.most = quota.most
        self.members_BLS = _members(attributes.sets(quota.field), board.rows_BL)
        self.used_BLS = torch.zeros_like(self.members_BLS)
        yes_B1 = torch.ones_like(board.rows_BL[:, :1], dtype=torch.bool)
        for row in board.pins:
            self.show(board.pin(row), yes_B1)

    def full(self) -> Tensor:
        """bool [B, L]: items of which there are enough."""
        return ((self.used_BLS >= self.most) & (self.members_BLS > 0)).any(2)

    def show(self, best_B1: Tensor, found_B1: Tensor) -> None:
        """An item was put on the page."""
        best_BS = self.members_BLS[torch.arange(len(best_B1)), best_B1[:, 0]]
        for member_B in best_BS.unbind(1):
            same_BLS = (self.members_BLS == member_B[:, None, None]) & (member_B > 0)[:, None, None]
            self.used_BLS = self.used_BLS + (same_BLS & found_B1[:, :, None])


class _Share:
    """At most or at least so many items of one value."""

    def __init__(self, quota: Quota, attributes: Attributes, board: _Board) -> None:
        self.quota = quota
        self.has_BL = _has(quota, attributes)[board.rows_BL]
        pinned_B = self.has_BL[:, self.has_BL.shape[1] - len(board.pins) :].sum(1)
        self.num_B = pinned_B

    def full(self) -> Tensor:
        """bool [B, L]: items of which there are enough."""
        if self.quota.most is None:
            return torch.zeros_like(self.has_BL)
        return self.has_BL & (self.num_B >= self.quota.most)[:, None]

    def owed(self, fine_BL: Tensor) -> Tensor:
        """int64 [B]: items that are still wanted, as far as there are any."""
        return torch.minimum(((self.quota.least or 0) - self.num_B).clamp(min=0), (self.has_BL & fine_BL).sum(1))

    def show(self, best_B1: Tensor, found_B1: Tensor) -> None:
        """An item was put on the page."""
        self.num_B = self.num_B + (self.has_BL.gather(1, best_B1) & found_B1)[:, 0]


def _quota(quota: Quota, attributes: Attributes, board: _Board) -> _Limit | _Share:
    return (_Limit if quota.value is None else _Share)(quota, attributes, board)


def _has(quota: Quota, attributes: Attributes) -> Tensor:
    """bool [n + 1]: items with the value of a quota; none where no item of the training log had it."""
    sets = attributes.sets(quota.field)
    mask = torch.zeros(sets.num_rows, dtype=torch.bool)
    assert quota.value is not None
    wanted = int(attributes.ids(quota.field, [quota.value])[0])
    if wanted:
        mask[sets.row_of_value[sets.values == wanted]] = True
    return mask


def _added(rules: Rules, ground: Ground) -> Tensor:
    """int64 [X]: items that quotas may need beyond the list: the most popular of a value that is wanted, then of all."""
    if not rules.quotas or not len(ground.popular):
        return ground.popular[:0]
    blocked = ground.blocked
    popular = ground.popular if blocked.allowed is None else ground.popular[blocked.allowed[ground.popular]]
    most = 0 if blocked.excluded is None else int(blocked.excluded.lengths.max())
    parts = []
    for quota in rules.quotas:
        if quota.least:
            parts.append(popular[_has(quota, ground.attributes)[popular]][: quota.least + most])
    if any(quota.most is not None for quota in rules.quotas):
        parts.append(popular[: ADDED + most])
    return torch.cat(parts) if parts else popular[:0]


def _members(sets: Jagged, rows_BL: Tensor) -> Tensor:
    """int64 [B, L, S]: values of the items, 0 where there are fewer."""
    members, _ = sets.select(rows_BL.flatten()).padded()
    return members.view(*rows_BL.shape, members.shape[1])


def _laid_out(page: Page, board: _Board, column_Bk: Tensor) -> Page:
    """The page of the chosen columns, -1 = none, without gaps."""
    found_Bk = column_Bk >= 0
    order_Bk = (~found_Bk).long().argsort(dim=1, stable=True)
    found_Bk, column_Bk = found_Bk.gather(1, order_Bk), column_Bk.gather(1, order_Bk).clamp(min=0)
    rows_Bk = board.rows_BL.gather(1, column_Bk).masked_fill(~found_Bk, 0)
    scores_Bk = board.scores_BL.gather(1, column_Bk).masked_fill(~found_Bk, -torch.inf)
    return replace(page, rows=rows_Bk, scores=scores_Bk)


def _names(rules: Rules) -> list[str]:
    """Rules that act, as the answer names them."""
    return [name for name in ("pins", "diversity", "mix", "quotas") if getattr(rules, name)]


def _counts(moved: Mapping[str, Tensor]) -> list[dict[str, int]]:
    """By request."""
    columns = {name: counts_B.tolist() for name, counts_B in moved.items()}
    num_requests = len(next(iter(columns.values()), []))
    return [{name: counts[i] for name, counts in columns.items()} for i in range(num_requests)]


# -- in the engine --------------------------------------------------------------------------------------------------


def longer(asked: Asked) -> Asked:
    """The same questions for the list that a page of them is laid out from."""
    if not asked.rules.arranges:
        return asked
    return replace(
        asked, k=list_length(asked.rules, asked.k, None if asked.candidates is None else len(asked.candidates))
    )


def laid_out(
    live: Live, asked: Asked, known: Known, ruling: Ruling, page: Page, problems: list[str]
) -> tuple[Page, list[dict[str, int]]]:
    """The page of `asked.k` places from the longer one that `longer(asked)` got, and what each rule did; never fails."""
    nothing: list[dict[str, int]] = [{} for _ in asked.users]
    if not asked.rules.arranges:
        return page, nothing
    try:
        return arrange(page, asked.k, asked.rules, ruling.pins, _ground(live, asked, known, ruling))
    except Exception as error:  # a request always gets a page
        problems.append(reason_of("the page could not be laid out", error))
        return replace(page, rows=page.rows[:, : asked.k], scores=page.scores[:, : asked.k]), nothing


def _ground(live: Live, asked: Asked, known: Known, ruling: Ruling) -> Ground:
    nobody = torch.zeros(len(asked.users), dtype=torch.int64)
    batch, popular = known.batch, live.cascade.popular.cpu()
    return Ground(
        attributes=live.attributes,
        popular=popular if asked.candidates is None else popular[:0],
        blocked=Blocked(live.dataset.num_items, None if batch is None else batch.excluded, ruling.allowed),
        past=Jagged.from_lengths(nobody[:0], nobody) if batch is None else batch.history.items,
    )
