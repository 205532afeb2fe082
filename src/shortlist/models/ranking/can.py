"""CAN: each item carries the weights of a tiny network that the user's ids are fed through, in place of crosses of ids.

"CAN: Feature Co-Action for Click-Through Rate Prediction", Bian et al., WSDM 2022 (arXiv 2011.05625); the unit is in layers/co_action.py.

    logit = tower([all field vectors, {co-action of each pair}, {Cartesian cross of each pair}])

Co-action vectors have tables of their own, never shared with the fields' (parameter independence). `crosses` are what CAN stands in
for: a dictionary of the pairs of ids that training saw, with a vector each (layers/id_pairs.py), learned in one pass before the steps.
With `pairs` and `crosses` empty this is the DNN that both are compared with.

Differences from the paper: the tower has ReLU where the paper has PReLU; feeds and powers of the request are made once per request; the
sum over a past is of outputs, step by step, as in the authors' code (equation 10 of the text sums the feeds first).

B requests, t candidates end to end, F fields, D width of a field's vector, M pairs, S ids of a request, C orders, d width of a feed,
P parameters of a micro network, W first layer of the tower.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from shortlist.data.batches import Batch, Candidates
from shortlist.data.schema import Space
from shortlist.embeddings.base import TableChoice, dropped_ids, make_table
from shortlist.errors import ConfigError
from shortlist.layers.co_action import CoAction, CoActionConfig, powers
from shortlist.layers.field_matrix import FieldsConfig
from shortlist.layers.field_tower import DeepPart, FieldBlock
from shortlist.layers.id_pairs import CrossTable, IdPairs, RequestIds
from shortlist.layers.scoring import HeadConfig, dense_bytes, task_losses
from shortlist.models.base import Cost, Losses, Phase, Ranker, RequestShape, Scores
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True, slots=True)
class CANConfig:
    """Settings of CAN."""

    fields: FieldsConfig = FieldsConfig()  # noqa: RUF009  (frozen)
    """Which fields the tower reads, and how wide their vectors are."""
    pairs: tuple[str, ...] = ("item*history",)
    """Pairs with a co-action unit, CANDIDATE*REQUEST, such as item*user or item.genre*history.genre."""
    co_action: CoActionConfig = CoActionConfig()  # noqa: RUF009  (frozen)
    """The units."""
    crosses: tuple[str, ...] = ()
    """Pairs with a Cartesian cross."""
    cross_rows: int = 100_000
    """Crossed pairs with a vector of their own at most, the most frequent ones; the others share one."""
    cross_dim: int = 16
    """Width of a crossed pair's vector."""
    head: HeadConfig = HeadConfig(activation="relu")  # noqa: RUF009  (frozen)
    """The tower."""

    def __post_init__(self) -> None:
        self.fields.check("can")
        self.head.check("can")
        if self.cross_rows < 1 or self.cross_dim < 1:
            raise ConfigError(
                f"can: cross_rows and cross_dim must be at least 1, got {self.cross_rows} and {self.cross_dim}"
            )
        for name in ("pairs", "crosses"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ConfigError(f"can: {name} lists a pair twice: {list(getattr(self, name))}")


class CANState(NamedTuple):
    """The request's side, made once."""

    request_BW: Tensor
    """Its part of the tower's first layer."""
    powers: tuple[Tensor, ...]
    """Powers of its feeds [B, M, S, C, d], for the pairs with one id per request and those with many."""
    is_real: tuple[Tensor, ...]
    """bool [B, M, S] for each of these."""
    crossed: tuple[RequestIds, ...]
    """Ids of each cross."""


class CoActionPairs(nn.Module):
    """The co-action units of all pairs, with their tables. Pairs with as many ids per request run together."""

    def __init__(
        self, space: Space, pairs: tuple[str, ...], config: CoActionConfig, head: HeadConfig, fields: FieldsConfig
    ) -> None:
        super().__init__()
        self.ids = IdPairs(space, pairs, fields.max_history)
        self.config, self.id_dropout = config, head.id_dropout
        self.unit = CoAction(config)
        found = self.ids.pairs
        one = [m for m, (_, request) in enumerate(found) if not request.startswith("history")]
        many = [m for m in range(len(found)) if m not in one]
        self.groups = [group for group in (one, many) if group]
        choice = TableChoice(init_std=config.init_std, sparse=fields.table.sparse)
        self.slot = [self._slot(m) for m in range(len(found))]
        # A dot can not stand in a module's name.
        self.induction = nn.ModuleDict(
            {
                name.replace(".", "_"): make_table(
                    self.ids.candidate_sizes[name] + 1, config.induction_width * self._partners(0, name), choice
                )
                for name in dict.fromkeys(candidate for candidate, _ in found)
            }
        )
        self.feed = nn.ModuleDict(
            {
                name.replace(".", "_"): make_table(
                    self.ids.request_sizes[name] + 1, config.feed_dim * self._partners(1, name), choice
                )
                for name in dict.fromkeys(request for _, request in found)
            }
        )
        self.out_width = len(found) * config.out_width

    def _partners(self, side: int, name: str) -> int:
        """Slices of a name's vectors: one per partner where pairs are independent."""
        return sum(pair[side] == name for pair in self.ids.pairs) if self.config.pair_independence else 1

    def _slot(self, m: int) -> tuple[int, int]:
        """Which slice of the candidate's and of the request's vector pair m reads."""
        if not self.config.pair_independence:
            return 0, 0
        before, (candidate, request) = self.ids.pairs[:m], self.ids.pairs[m]
        return sum(pair[0] == candidate for pair in before), sum(pair[1] == request for pair in before)

    def request(self, batch: Batch) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Powers of feeds and masks by group; see CANState."""
        config, ids = self.config, self.ids.request(batch)
        made, masks = [], []
        for group in self.groups:
            feeds, real = [], []
            for m in group:
                name = self.ids.pairs[m][1]
                feed = self.feed[name.replace(".", "_")](self._dropped(ids[name].ids_BL))
                feeds.append(feed.unflatten(-1, (-1, config.feed_dim))[:, :, self.slot[m][1]])
                real.append(ids[name].is_real_BL)
            made.append(powers(torch.stack(feeds, dim=1), config.orders))
            masks.append(torch.stack(real, dim=1))
        return tuple(made), tuple(masks)

    def forward(self, made: tuple[Tensor, ...], masks: tuple[Tensor, ...], candidates: Candidates) -> Tensor:
        """float32 [t, out_width]: the outputs of all pairs end to end."""
        ids, row_t = self.ids.candidate(candidates.rows.values), candidates.rows.row_of_value
        weight = {
            name: self.induction[name.replace(".", "_")](self._dropped(column)).unflatten(
                -1, (-1, self.config.induction_width)
            )
            for name, column in ids.items()
        }
        outputs = []
        for group, power, real in zip(self.groups, made, masks, strict=True):
            weight_tMP = torch.stack([weight[self.ids.pairs[m][0]][:, self.slot[m][0]] for m in group], dim=1)
            outputs.append(self.unit(weight_tMP, power[row_t], real[row_t]).flatten(1))
        return torch.cat(outputs, dim=1)

    def _dropped(self, ids: Tensor) -> Tensor:
        return dropped_ids(ids, self.id_dropout if self.training else 0.0)

    def num_steps(self, num_history: int) -> int:
        """Micro networks run per candidate."""
        past = min(num_history, self.ids.max_history)
        return sum(past if request.startswith("history") else 1 for _, request in self.ids.pairs)


@system(
    "can",
    stage="ranking",
    paper="Bian et al., WSDM 2022",
    needs={"history"},
    cold_users=True,
    cold_items=True,
    tiny={
        "fields": FieldsConfig(dim=8, max_history=10),
        "co_action": CoActionConfig(feed_dim=4, widths=(4, 2), orders=2),
        "pairs": ("item*history",),
        "crosses": ("item*history",),
        "cross_rows": 500,
        "cross_dim": 4,
        "head": HeadConfig(widths=(16,), activation="relu", dropout=0.0),
    },
)
class CAN(Ranker):
    """Co-action units, and Cartesian crosses where wanted, beside all fields in a tower."""

    Config = CANConfig

    def __init__(self, config: CANConfig, space: Space) -> None:
        super().__init__(config, space)
        self.max_history = config.fields.max_history
        self.fields = FieldBlock(space, config.fields.dim, config.fields, config.head)
        self.co_action = (
            CoActionPairs(space, config.pairs, config.co_action, config.head, config.fields) if config.pairs else None
        )
        self.cross_ids = IdPairs(space, config.crosses, self.max_history) if config.crosses else None
        self.crosses = (
            CrossTable(self.cross_ids, config.cross_dim, config.cross_rows, sparse=config.fields.table.sparse)
            if self.cross_ids is not None
            else None
        )
        extra = [config.co_action.out_width] * len(config.pairs) + [config.cross_dim] * len(config.crosses)
        self.deep = DeepPart(space, self.fields, config.head, tuple(extra))

    def phases(self) -> tuple[Phase, ...]:
        """The dictionary of the crosses, where there are any, then the steps."""
        steps = Phase(name="train", feed="candidates", losses=self.losses)
        if self.crosses is None:
            return (steps,)
        return Phase(name="dictionary", feed="candidates", losses=self.losses, learn=self.learn), steps

    def learn(self, batches: Iterable[Batch]) -> Losses:
        """Which pairs of ids training has; see CrossTable."""
        assert self.crosses is not None
        self.crosses.learn(keys for batch in batches for keys in self._keys(batch))
        return {task: torch.zeros(()) for task in self.space.tasks}

    def _keys(self, batch: Batch) -> list[Tensor]:
        """Keys of the real pairs of a batch, int64 [n] per cross."""
        assert self.cross_ids is not None
        assert batch.candidates is not None
        state = tuple(self.cross_ids.request(batch)[request] for _, request in self.cross_ids.pairs)
        return [key_tL[real_tL] for key_tL, real_tL in self._pairs(state, batch.candidates)]

    def _pairs(self, crossed: tuple[RequestIds, ...], candidates: Candidates) -> list[tuple[Tensor, Tensor]]:
        """Keys [t, L] and masks [t, L] of each cross."""
        assert self.crosses is not None
        assert self.cross_ids is not None
        ids, row_t = self.cross_ids.candidate(candidates.rows.values), candidates.rows.row_of_value
        return [
            (self.crosses.key(m, ids[candidate], of_request.ids_BL[row_t]), of_request.is_real_BL[row_t])
            for m, ((candidate, _), of_request) in enumerate(zip(self.cross_ids.pairs, crossed, strict=True))
        ]

    def user_state(self, batch: Batch) -> CANState:
        """See CANState: the tower's share of the request (B, W), its units' weights and its ids."""
        made, masks = self.co_action.request(batch) if self.co_action is not None else ((), ())
        crossed: tuple[RequestIds, ...] = ()
        if self.cross_ids is not None:
            ids = self.cross_ids.request(batch)
            crossed = tuple(ids[request] for _, request in self.cross_ids.pairs)
        return CANState(self.deep.request(self.fields.request(batch), batch), made, masks, crossed)

    def score_candidates(self, state: CANState, candidates: Candidates) -> Scores:
        """Logits [t] per task."""
        extra = []
        if self.co_action is not None:
            extra.append(self.co_action(state.powers, state.is_real, candidates))
        if self.crosses is not None:
            extra += [self.crosses(*pair) for pair in self._pairs(state.crossed, candidates)]
        logit_tT = self.deep(state.request_BW, self.fields.candidate(candidates), candidates, *extra)
        return dict(zip(self.space.tasks, logit_tT.unbind(1), strict=True))

    def losses(self, batch: Batch) -> Losses:
        """By task, as `config.head.loss` says."""
        return task_losses(self.score(batch), batch, self.config.head.loss)

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """Per candidate: a micro network per pair and id of the past, the sums of crosses, the tower. Powers are made once."""
        fields, config = self.fields, self.config
        past = min(shape.num_history, self.max_history)
        each = fields.candidate_flops + self.deep.candidate_flops
        once = fields.request_flops(shape.num_history) + self.deep.request_flops
        read = fields.bytes_read(shape.num_history, shape.num_candidates, cached=cached)
        if self.co_action is not None:
            steps = self.co_action.num_steps(shape.num_history)
            each += steps * (config.co_action.flops + config.co_action.out_width)
            once += steps * config.co_action.feed_dim * (config.co_action.orders - 1)
            wide = config.co_action.induction_width * len(config.pairs)
            read += 4.0 * (shape.num_candidates * wide + (0 if cached else steps * config.co_action.feed_dim))
        for pair in config.crosses:
            steps = past if "*history" in pair else 1
            each += steps * config.cross_dim
            read += 4.0 * shape.num_candidates * steps * config.cross_dim
        return Cost(user_flops=0.0 if cached else float(once), item_flops=float(each), bytes=dense_bytes(self) + read)
