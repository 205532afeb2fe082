"""MMR: build the page item by item, each time the one that is relevant and unlike what already stands there; rules of the shop on top.

"The Use of MMR, Diversity-Based Reranking for Reordering Documents and Producing Summaries", Carbonell and Goldstein, SIGIR 1998:

    next = argmax over candidates i not yet shown of   lambda * relevance(i) - (1 - lambda) * max over shown j of similarity(i, j)

Similarity is the mean over item fields: equality for a category, Jaccard overlap for a set of words or tags, cosine (0 when negative)
for a vector. Relevance is the ranker's score brought to 0..1 within the request, since logits and similarities have no common scale.

Rules are settings: `pins` come first, `boosts` add to the value of single items, `max_per` limits how many items of one category a
page holds. They only choose among the request's candidates: nothing else enters a page.

B requests, C most candidates of a request (sorted by score), k places, S most members of a set, d width of a vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor, nn

from shortlist.data.batches import Batch
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Categorical, Field, Sequence, Space, Vector
from shortlist.errors import ConfigError
from shortlist.models.base import Cost, RequestShape, Reranker, Retrieved
from shortlist.registry import system

PAGE = 10  # places assumed by cost(), since the shape of a request does not say how many are shown


@dataclass(frozen=True, kw_only=True, slots=True)
class MMRConfig:
    """Settings of MMR and the rules of the page."""

    relevance: float = 0.8
    """lambda: 1 is the ranker's order, 0 only avoids likeness."""
    fields: tuple[str, ...] = ()
    """Item fields that make items alike; empty = all categories, sets and vectors of the catalogue."""
    scale: Literal["range", "rank", "none"] = "range"
    """How scores become relevance: range = 0 for the request's lowest and 1 for its highest, rank = by place, none = as they are."""
    max_per: Mapping[str, int] = field(default_factory=dict)
    """Most items on a page that share a value of a categorical item field, by field name; unknown values are not limited."""
    fill: bool = True
    """Fill the page beyond `max_per` when nothing else is left; False leaves the places empty."""
    pins: tuple[int, ...] = ()
    """Catalogue rows that come first, in this order, where they are among the candidates; they count for `max_per` but pass it."""
    boosts: Mapping[int, float] = field(default_factory=dict)
    """Added to the value of catalogue rows, in units of relevance; below 0 demotes."""

    def __post_init__(self) -> None:
        if not 0 <= self.relevance <= 1:
            raise ConfigError(f"mmr: relevance must be from 0 to 1, got {self.relevance}")
        if self.scale not in ("range", "rank", "none"):
            raise ConfigError(f"mmr: scale must be range, rank or none, got {self.scale!r}")
        for name, most in self.max_per.items():
            if most < 1:
                raise ConfigError(f"mmr: max_per must be at least 1, got {most} for {name!r}")
        if len(set(self.pins)) < len(self.pins):
            raise ConfigError(f"mmr: pins must be distinct, got {list(self.pins)}")


class SetLikeness(nn.Module):
    """Jaccard overlap of items by their members of one field; a category is a set of one. Items without members are like nothing."""

    values: Tensor
    offsets: Tensor

    def __init__(self, column: Tensor | Jagged) -> None:
        super().__init__()
        members = column if isinstance(column, Jagged) else Jagged.from_padded(column[:, None], column[:, None] > 0)
        members = distinct_sets(members)
        self.mean_size = len(members.values) / max(members.num_rows, 1)
        self.register_buffer("values", members.values, persistent=False)
        self.register_buffer("offsets", members.offsets, persistent=False)

    def features(self, rows_BC: Tensor) -> Tensor:
        """Members of the candidates, int64 [B, C, S], 0 where there are fewer."""
        members, _ = Jagged(self.values, self.offsets).select(rows_BC.flatten()).padded()
        return members.view(*rows_BC.shape, members.shape[1])

    def likeness(self, members_BCS: Tensor, best_B1: Tensor) -> Tensor:
        """float32 [B, C] in 0..1: of every candidate to the one at place `best_B1` [B, 1]."""
        best_BS = _pick(members_BCS, best_B1)
        shared_BCS = (members_BCS[:, :, :, None] == best_BS[:, None, None, :]).any(3) & (members_BCS > 0)
        shared_BC = shared_BCS.sum(2)
        union_BC = (members_BCS > 0).sum(2) + (best_BS > 0).sum(1, keepdim=True) - shared_BC
        return shared_BC / union_BC.clamp(min=1)

    @property
    def flops(self) -> float:
        """Comparisons of two sets."""
        return self.mean_size**2


class VectorLikeness(nn.Module):
    """Cosine of items by one vector field, 0 where negative or missing."""

    unit_Nd: Tensor

    def __init__(self, column_Nd: Tensor) -> None:
        super().__init__()
        self.register_buffer("unit_Nd", nn.functional.normalize(column_Nd, dim=1), persistent=False)

    def features(self, rows_BC: Tensor) -> Tensor:
        """Unit vectors of the candidates, float32 [B, C, d]."""
        return self.unit_Nd[rows_BC]

    def likeness(self, unit_BCd: Tensor, best_B1: Tensor) -> Tensor:
        """float32 [B, C] in 0..1: of every candidate to the one at place `best_B1` [B, 1]."""
        return torch.bmm(unit_BCd, _pick(unit_BCd, best_B1)[:, :, None]).squeeze(2).clamp(0, 1)

    @property
    def flops(self) -> float:
        """One inner product."""
        return 2.0 * self.unit_Nd.shape[1]


@system(
    "mmr",
    stage="re-ranking",
    paper="Carbonell and Goldstein, SIGIR 1998",
    needs={"item_fields"},
    cold_users=True,
    cold_items=True,
)
class MMR(Reranker):
    """Maximal marginal relevance over item fields, with pins, boosts and a limit per category."""

    Config = MMRConfig

    boost_N: Tensor
    pin_N: Tensor

    def __init__(self, config: MMRConfig, space: Space) -> None:
        super().__init__(config, space)
        by_name = {f.name: f for f in space.items.fields}
        for name in (*config.fields, *config.max_per):
            if name not in by_name:
                raise ConfigError(f"mmr: items have no field {name!r}; known are {', '.join(by_name) or 'none'}")
        chosen = [by_name[name] for name in config.fields] or [f for f in space.items.fields if comparable(f)]
        self.parts = nn.ModuleList(likeness_of(f, space.items.columns[f.name]) for f in chosen)
        for name in config.max_per:
            if not isinstance(by_name[name], Categorical):
                raise ConfigError(f"mmr: max_per needs a categorical field, {name!r} is {type(by_name[name]).__name__}")
            category_N = cast(Tensor, space.items.columns[name])
            self.register_buffer(f"category_of_{name}", category_N, persistent=False)
        self.register_buffer("boost_N", torch.zeros(space.num_items + 1), persistent=False)
        self.register_buffer("pin_N", torch.zeros(space.num_items + 1), persistent=False)
        for row in (*config.pins, *config.boosts):
            if not 1 <= row <= space.num_items:
                raise ConfigError(f"mmr: no item in row {row}; pins and boosts take rows 1 to {space.num_items}")
        for row, boost in config.boosts.items():
            self.boost_N[row] = boost
        for place, row in enumerate(config.pins):
            # The first pin weighs most, 0 is no pin; likeness takes 1 at most, so that steps of 2 keep the order.
            self.pin_N[row] = 2 * (len(config.pins) - place)

    def rerank(self, batch: Batch, scores: Tensor, k: int) -> Retrieved:
        """The page, greedily; ties keep the ranker's order. NaN ranks last.

        The page's scores are the values by which items were chosen, pins at the highest value there can be; where `fill` had to pass a
        limit they are held at the last value, so that they never rise down the page.
        """
        rows_BC, score_BC, open_BC = _by_score(batch.candidate_rows, scores)
        relevant_BC = self.config.relevance * relevance(score_BC, open_BC, self.config.scale) + self.boost_N[rows_BC]
        pin_BC = self.pin_N[rows_BC]
        top_B1 = relevant_BC.masked_fill(~open_BC, -torch.inf).amax(1, keepdim=True)
        relevant_BC = torch.where(pin_BC > 0, top_B1 + pin_BC, relevant_BC)
        features = [part.features(rows_BC) for part in self._parts]
        categories = {name: getattr(self, f"category_of_{name}")[rows_BC] for name in self.config.max_per}
        used = {name: torch.zeros_like(rows_BC) for name in categories}
        closest_BC = torch.zeros_like(relevant_BC)
        shown: list[Tensor] = []
        values: list[Tensor] = []
        for _ in range(min(k, rows_BC.shape[1])):
            value_BC = relevant_BC - (1 - self.config.relevance) * closest_BC
            allowed_BC = self._allowed(open_BC, pin_BC, used)
            value_B1, best_B1 = value_BC.masked_fill(~allowed_BC, -torch.inf).max(1, keepdim=True)
            found_B1 = allowed_BC.any(1, keepdim=True)
            shown.append(rows_BC.gather(1, best_B1).masked_fill(~found_B1, 0))
            values.append(torch.minimum(value_B1, top_B1))
            open_BC = open_BC.scatter(1, best_B1, False)
            closest_BC = torch.maximum(closest_BC, self._likeness(features, best_B1, closest_BC))
            for name, category_BC in categories.items():
                best_category_B1 = category_BC.gather(1, best_B1)
                used[name] += found_B1 & (category_BC == best_category_B1) & (category_BC > 0)
        missing = (0, k - len(shown))
        rows_Bk = nn.functional.pad(torch.cat(shown, 1), missing)
        return Retrieved(rows_Bk, nn.functional.pad(torch.cat(values, 1), missing, value=-torch.inf).cummin(1).values)

    def _allowed(self, open_BC: Tensor, pin_BC: Tensor, used: Mapping[str, Tensor]) -> Tensor:
        """bool [B, C]: candidates that may take the next place."""
        allowed_BC = open_BC
        for name, used_BC in used.items():
            allowed_BC = allowed_BC & ((used_BC < self.config.max_per[name]) | (pin_BC > 0))
        if self.config.fill:
            allowed_BC = torch.where(allowed_BC.any(1, keepdim=True), allowed_BC, open_BC)
        return allowed_BC

    def _likeness(self, features: list[Tensor], best_B1: Tensor, like_BC: Tensor) -> Tensor:
        """float32 [B, C] in 0..1: mean over the fields of each candidate's likeness to the one at `best_B1`."""
        if not features:
            return torch.zeros_like(like_BC)
        each = [part.likeness(feature, best_B1) for part, feature in zip(self._parts, features)]
        return torch.stack(each).mean(0)

    @property
    def _parts(self) -> list[SetLikeness | VectorLikeness]:
        return cast(list[SetLikeness | VectorLikeness], list(self.parts))

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """For a page of ten: at each place, every candidate against the item just shown."""
        flops = sum(part.flops for part in self._parts)
        read = sum(b.numel() * b.element_size() for b in self.buffers()) / (shape.num_items + 1)
        return Cost(item_flops=PAGE * (flops + 3.0), bytes=read * shape.num_candidates)


def relevance(score_BC: Tensor, open_BC: Tensor, scale: Literal["range", "rank", "none"] = "range") -> Tensor:
    """float32 [B, C] from scores, which "rank" takes as sorted; what is not open gets any finite value, -inf the lowest finite one."""
    if scale == "rank":
        place_C = torch.arange(score_BC.shape[1], device=score_BC.device)
        return 1 - place_C / (open_BC.sum(1, keepdim=True) - 1).clamp(min=1)
    known_BC = open_BC & torch.isfinite(score_BC)
    low_B1 = score_BC.masked_fill(~known_BC, torch.inf).amin(1, keepdim=True).nan_to_num(posinf=0)
    score_BC = torch.maximum(score_BC, low_B1)
    if scale == "none":
        return score_BC
    high_B1 = score_BC.amax(1, keepdim=True)
    return (score_BC - low_B1) / (high_B1 - low_B1).clamp(min=torch.finfo(score_BC.dtype).tiny)


def _by_score(candidates: Jagged, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates best first: rows and scores [B, C], and a mask [B, C], False beside what is no item. Ties keep their order."""
    finite = scores.float().nan_to_num(nan=-torch.inf, posinf=torch.finfo(torch.float32).max, neginf=-torch.inf)
    rows_BC, open_BC = candidates.padded()
    open_BC = open_BC & (rows_BC > 0)
    score_BC, _ = candidates.with_values(finite).padded(fill=-torch.inf)
    # Two stable sorts: by score, then real items before padding, whose -inf may tie with theirs.
    order_BC = score_BC.masked_fill(~open_BC, -torch.inf).argsort(dim=1, descending=True, stable=True)
    last_BC = (~open_BC).gather(1, order_BC).to(torch.uint8).argsort(dim=1, stable=True)
    order_BC = order_BC.gather(1, last_BC)
    return rows_BC.gather(1, order_BC), score_BC.gather(1, order_BC), open_BC.gather(1, order_BC)


def likeness_of(f: Field, column: Tensor | Jagged) -> SetLikeness | VectorLikeness:
    """How alike items are by one field and its column [n + 1]; ConfigError where it can not be compared."""
    if isinstance(f, Vector):
        assert isinstance(column, Tensor)
        return VectorLikeness(column)
    if isinstance(f, Categorical | Sequence):
        return SetLikeness(column)
    raise ConfigError(
        f"mmr: field {f.name!r} of type {type(f).__name__} can not be compared; name categories, sets or vectors"
    )


def comparable(f: Field) -> bool:
    """Whether items can be alike by the field."""
    return isinstance(f, Categorical | Sequence | Vector)


def distinct_sets(sets: Jagged) -> Jagged:
    """The same sets with each member once."""
    width = int(sets.values.max()) + 1 if len(sets.values) else 1
    key = (sets.row_of_value * width + sets.values).unique()
    return Jagged.from_lengths(key % width, torch.bincount(key // width, minlength=sets.num_rows))


def _pick(features_BCx: Tensor, best_B1: Tensor) -> Tensor:
    """[B, x]: the features of the candidate at `best_B1` [B, 1]."""
    return features_BCx[torch.arange(len(best_B1), device=best_B1.device), best_B1[:, 0]]
