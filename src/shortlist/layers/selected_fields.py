"""The body that pre-rankers which choose their fields share: fields as vectors, gates while it is chosen, a tower over the kept ones.

    phase 1, select    logit = tower(gates([v_1; ...; v_M]))       all M fields, gates in between
    phase 2, tune      logit = tower'([v_j; j kept])               no gates; tables of kept fields, their columns of the first layer and
                                                                   the rest of the tower begin as phase 1 left them

After the first phase what was not kept is gone: it is neither gathered nor multiplied, the first layer is as wide as the kept fields,
and the request's share of it is made once per request. Saved weights say which fields were kept; the body that loads them narrows first.

Fields are named as in layers/field_matrix.py, and besides

    match, match.NAME   share of the past events that have the candidate's item, or its value of an item field (of several: their mean)
    pair.NAME           a user-item field that an earlier stage made

Both are numbers that become vectors by a curve per dimension, and are computed field by field for all candidates at once.

B requests, t candidates end to end, M = Fr + Fc fields of request and candidate, D width of a vector, S codes of a past (of all match
fields), W first hidden layer of the tower, T tasks.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from shortlist.data.batches import Batch, Candidates, History
from shortlist.data.histories import View
from shortlist.data.jagged import Jagged, segment_mean
from shortlist.data.schema import Categorical, Column, Field, Numeric, Space, Vector
from shortlist.data.schema import Sequence as SequenceField
from shortlist.errors import ConfigError
from shortlist.layers.field_matrix import FieldMatrix, FieldsConfig, ItemColumns, field_names
from shortlist.layers.field_tower import PairVectors
from shortlist.layers.scoring import SplitMLP, TowerConfig, dense_bytes, task_losses
from shortlist.layers.selection import ChoiceConfig, CostConfig, FieldChoice, FieldGates, choose, facts_of, field_costs
from shortlist.layers.selection import linear_log as squashed
from shortlist.registry import nearest

MEASURED_CANDIDATES = 1_000
"""Candidates for which a field's time is measured, as in a pre-ranking request."""
MEASURED_TIMES = 15
"""Runs of each field, of which the median counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreRankingConfig:
    """Settings that pre-rankers which choose their fields share."""

    fields: FieldsConfig = FieldsConfig()  # noqa: RUF009  (frozen)
    """Fields to choose from, and how wide their vectors are; empty names = all, those of match and pair included."""
    match: bool = True
    """Offer the match fields; for empty `fields.names` alone."""
    head: TowerConfig = TowerConfig(widths=(64, 32), activation="relu", dropout=0.0)  # noqa: RUF009  (frozen)
    """The tower."""
    costs: CostConfig = CostConfig()  # noqa: RUF009  (frozen)
    """What a field costs."""
    choice: ChoiceConfig = ChoiceConfig()  # noqa: RUF009  (frozen)
    """How many fields stay."""

    def check(self, system: str) -> None:
        """Raises ConfigError, in the name of `system`, for what can not be."""
        self.fields.check(system)
        self.head.check(system)


class State(NamedTuple):
    """The request's side, made once."""

    request_BX: Tensor
    """Its share of the first layer [B, W]; while fields are chosen, its fields' vectors end to end [B, Fr D]."""
    past_BS: Tensor
    """int64: distinct codes of what the past holds, ascending, see MatchFields."""
    share_BS: Tensor
    """float32: share of the past events that have each code."""


class MatchFields(nn.Module):
    """Share of the past events that have the candidate's item, or its value of an item field, counted for all candidates at once.

    Args:
        space: whose item fields are compared: ids and sets.
        names: of the match fields, "match" for the item itself.
        max_history: newest events that are read.

    Every value of every field has a code of its own. A request's past is its distinct codes, sorted, with their shares; a candidate's value
    is found among them by binary search.
    """

    def __init__(self, space: Space, names: Sequence[str], max_history: int) -> None:
        super().__init__()
        self.names, self.max_history = tuple(names), max_history
        sizes = match_sizes(space)
        self.first = {name: sum(list(sizes.values())[:i]) + i for i, name in enumerate(sizes)}
        self.num_codes = sum(sizes.values()) + len(sizes) + 1
        self.columns = ItemColumns(space, [f for f in space.items.fields if f"match.{f.name}" in names])

    def keep(self, names: Collection[str]) -> None:
        """Count only these fields from now on."""
        self.names = tuple(name for name in self.names if name in names)
        self.columns.keep({name.removeprefix("match.") for name in self.names})

    def past(self, history: History, num_requests: int) -> tuple[Tensor, Tensor]:
        """`past_BS` and `share_BS` of State; S is 0 where nothing is compared."""
        items = history.last(self.max_history).items
        if not self.names:
            nothing = items.values.new_zeros(num_requests, 0)
            return nothing, nothing.float()
        request_E, places = items.row_of_value, []
        for name in self.names:
            code, event = self._codes(name, items.values)
            places.append((request_E[event] * self.num_codes + code)[code > self.first[name]])  # value 0 is unknown
        place, count = torch.cat(places).sort().values.unique_consecutive(return_counts=True)
        request = torch.div(place, self.num_codes, rounding_mode="floor")
        codes = Jagged.from_lengths(place % self.num_codes, torch.bincount(request, minlength=num_requests))
        share = count / items.lengths[request]
        return codes.padded(fill=self.num_codes - 1)[0], codes.with_values(share).padded()[0]

    def forward(self, state: State, rows: Jagged) -> dict[str, Tensor]:
        """By name, float32 [t]: the share, moved from 0..1 to -1..1; -1 where there is no past."""
        found: dict[str, Tensor] = {}
        if not self.names:
            return found
        request_B1 = torch.arange(len(state.past_BS), device=rows.values.device)[:, None]
        sorted_all = (request_B1 * self.num_codes + state.past_BS).flatten()
        share_all, request_t = state.share_BS.flatten(), rows.row_of_value
        for name in self.names:
            code, candidate = self._codes(name, rows.values)
            wanted = request_t[candidate] * self.num_codes + code
            place = torch.searchsorted(sorted_all, wanted).clamp(max=len(sorted_all) - 1)
            share = torch.where(sorted_all[place] == wanted, share_all[place], 0.0)
            found[name] = 2 * segment_mean(share, candidate, len(rows.values)) - 1
        return found

    def _codes(self, name: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of the values that catalogue rows [n] have in a field, end to end, and whose they are."""
        column: Column = rows if name == "match" else self.columns.column(name.removeprefix("match."), rows)
        if isinstance(column, Jagged):
            return self.first[name] + column.values, column.row_of_value
        return self.first[name] + column, torch.arange(len(rows), device=rows.device)


def match_sizes(space: Space) -> dict[str, int]:
    """Match fields that a log offers, with the number of their values."""
    own = {f"match.{f.name}": f.size for f in space.items.fields if isinstance(f, Categorical | SequenceField)}
    return {"match": space.num_items, **own}


class SelectableFields(nn.Module):
    """All fields of a request and a candidate as vectors, of which any may be left out.

    Args:
        space: what the log offers.
        config: which fields; ConfigError names one that the log lacks.
    """

    def __init__(self, space: Space, config: PreRankingConfig) -> None:
        super().__init__()
        own = field_names(space, user=config.head.use_user_ids, history=config.fields.use_history)
        matched, pairs = tuple(match_sizes(space)), tuple(f"pair.{f.name}" for f in space.pair_fields)
        names = config.fields.names or (*own, *(matched if config.match else ()), *pairs)
        of_matrix = field_names(space, user=True, history=True)
        offered = (*of_matrix, *matched, *pairs)
        for name in names:
            if name not in offered:
                raise ConfigError(f"the log has no field {name!r}: {nearest(name, list(offered))}")
        self.dim = config.fields.dim
        self.matrix = FieldMatrix(
            space,
            self.dim,
            [name for name in names if name in of_matrix],
            max_history=config.fields.max_history,
            id_dropout=config.head.id_dropout,
            table=config.fields.table,
        )
        self.match = MatchFields(space, [name for name in matched if name in names], config.fields.max_history)
        bins = config.head.pair_bins
        of_match = space.with_pairs(tuple(Numeric(name=name) for name in self.match.names))
        of_pair = space.with_pairs(tuple(f for f in space.pair_fields if f"pair.{f.name}" in names))
        self.match_vectors = PairVectors(of_match, bins, self.dim)
        self.pair_vectors = PairVectors(of_pair, bins, self.dim)

    @property
    def request_names(self) -> tuple[str, ...]:
        """Fr of them, in order."""
        return self.matrix.request_names

    @property
    def candidate_names(self) -> tuple[str, ...]:
        """Fc of them, in order."""
        return (*self.matrix.candidate_names, *self.match.names, *(f"pair.{n}" for n in self.pair_vectors.pair.names))

    @property
    def names(self) -> tuple[str, ...]:
        """All M, in the order of their vectors."""
        return (*self.request_names, *self.candidate_names)

    def keep(self, names: Collection[str]) -> None:
        """Read only the fields of these names from now on."""
        self.matrix.keep(names)
        self.match.keep(names)
        self.match_vectors.keep(names)
        self.pair_vectors.keep({name.removeprefix("pair.") for name in names if name.startswith("pair.")})

    def request(self, batch: Batch) -> Tensor:
        """float32 [B, Fr, D]."""
        return self.matrix.request(batch)

    def candidate(self, state: State, candidates: Candidates) -> Tensor:
        """float32 [t, Fc, D]; of the state only the past is read."""
        rows = candidates.rows
        vectors = [
            self.matrix.candidate(rows.values),
            self.match_vectors(self.match(state, rows), len(rows.values)),
            self.pair_vectors(candidates.pair, len(rows.values)),
        ]
        return torch.cat(vectors, dim=1)

    def vectors(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of the batch's requests and of its candidates, [B, Fr, D] and [t, Fc, D]: all that serving does before the tower."""
        assert batch.candidates is not None
        request_BFD = self.request(batch)
        state = State(request_BFD.flatten(1), *self.match.past(batch.history, batch.size))
        return request_BFD, self.candidate(state, batch.candidates)

    @property
    def candidate_flops(self) -> int:
        """Per candidate."""
        return self.matrix.candidate_flops + self.match_vectors.flops + self.pair_vectors.flops

    def bytes_read(self, num_history: int, num_candidates: int, *, cached: bool) -> float:
        """Rows of tables as float32, and the values that match fields compare as int64."""
        num_past = min(num_history, self.matrix.max_history)
        compared = len(self.match.names) * (num_candidates + (0 if cached else num_past))
        return 4.0 * self.dim * self.matrix.rows_read(num_history, num_candidates, cached=cached) + 8.0 * compared


class PreRankingBody(nn.Module):
    """See the top of this file.

    Args:
        space: what the log offers.
        config: settings.
        make_gates: from the number of fields and D; called where a choice is made.
        squash: put all numbers that enter the tower through `linear_log`.
    """

    def __init__(
        self,
        space: Space,
        config: PreRankingConfig,
        make_gates: Callable[[int, int], FieldGates],
        *,
        squash: bool = False,
    ) -> None:
        super().__init__()
        self.space, self.config, self.squash = space, config, squash
        self.fields = SelectableFields(space, config)
        D, names = config.fields.dim, self.fields.names
        head = config.head
        self.tower = SplitMLP(
            len(self.fields.request_names) * D,
            len(self.fields.candidate_names) * D,
            head.widths,
            len(space.tasks),
            activation=head.activation,
            dropout=head.dropout,
            norm=head.norm,
        )
        self.choice = FieldChoice(names, field_costs(facts_of(space, names), D, config.costs))
        self.gates: FieldGates | None = make_gates(len(names), D) if config.choice.epochs else None

    # --- what is chosen ---

    @property
    def needed_M(self) -> Tensor:
        """bool [M]: fields of the candidate, without one of which all candidates of a request would be equal."""
        return torch.tensor([name in self.fields.candidate_names for name in self.choice.names])

    def price(self, view: View) -> None:
        """Before training: measure what fields cost, where that is asked for; ConfigError where the budget allows none of them."""
        config, names = self.config, self.choice.names
        if self.gates is None:
            return
        if config.costs.measured:
            o_M = measure_field_costs(self.fields, sample_request(view, self.space, config.fields.max_history))
            self.choice.cost_M = field_costs(facts_of(self.space, names), config.fields.dim, config.costs, o_M)
        choose(torch.ones(len(names)), self.choice.cost_M.cpu(), config.choice, self.needed_M)

    def settle(self, view: View) -> None:
        """Between the phases: choose by what the gates have learned, and narrow. Nothing where there are no gates; `view` is not read."""
        if self.gates is None:
            return
        self.choice.importance_M = self.gates.importance()
        self.narrow(choose(self.choice.importance_M.cpu(), self.choice.cost_M.cpu(), self.config.choice, self.needed_M))

    def narrow(self, kept_M: Tensor) -> None:
        """Drop all other fields and the gates; what stays keeps its weights.

        Args:
            kept_M: bool [M].
        """
        self.choice.kept_M = kept_M.to(self.choice.cost_M.device)
        names, D = self.choice.kept_names(), self.fields.dim
        columns = kept_M.repeat_interleave(D).nonzero()[:, 0].to(self.choice.cost_M.device)
        self.fields.keep(names)
        self.tower.keep(columns, len(self.fields.request_names) * D)
        self.gates = None

    def take_shape(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        """Narrow to the fields that saved weights were narrowed to; ValueError where those are of other fields.

        Args:
            tensors: by name in the system; those that are missing are left to the loader to report.
            prefix: of this body in the system, such as "body.".
        """
        names, kept_M = (tensors.get(f"{prefix}choice.{name}") for name in ("names_utf8", "kept_M"))
        if names is None or kept_M is None:
            return
        self.choice.check_names(names)
        has_gates = any(name.startswith(f"{prefix}gates.") for name in tensors)
        if self.gates is not None and not has_gates:
            self.narrow(kept_M.cpu())

    # --- scores ---

    def user_state(self, batch: Batch) -> State:
        """See State."""
        past = self.fields.match.past(batch.history, batch.size)
        request_BX = self._entering(self.fields.request(batch).flatten(1))
        return State(request_BX if self.gates is not None else self.tower.request_side(request_BX), *past)

    def score_candidates(self, state: State, candidates: Candidates) -> dict[str, Tensor]:
        """Logits [t] per task."""
        return self._logits(state, candidates)[0]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """By task, and while fields are chosen what their gates pay."""
        assert batch.candidates is not None
        scores, paid = self._logits(self.user_state(batch), batch.candidates)
        return {**task_losses(scores, batch, self.config.head.loss), **({} if paid is None else {"field costs": paid})}

    def _logits(self, state: State, candidates: Candidates) -> tuple[dict[str, Tensor], Tensor | None]:
        row_t = candidates.rows.row_of_value
        side_tX = self._entering(self.fields.candidate(state, candidates).flatten(1))
        if self.gates is None:
            logit_tT, paid = self.tower(state.request_BX, side_tX, row_t), None
        else:
            x_tX = torch.cat([state.request_BX[row_t], side_tX], dim=1)
            gated_tMD, paid = self.gates(x_tX.view(-1, len(self.choice.names), self.fields.dim), self.choice.cost_M)
            logit_tT = self.tower.mlp(gated_tMD.flatten(1))
        return dict(zip(self.space.tasks, logit_tT.unbind(1), strict=True)), paid

    def _entering(self, x: Tensor) -> Tensor:
        return squashed(x) if self.squash else x

    # --- what it costs ---

    def request_flops(self, num_history: int) -> float:
        """Once per request."""
        of_tower = self.tower.request_flops if self.gates is None else 0
        return float(self.fields.matrix.request_flops(num_history) + of_tower)

    @property
    def candidate_flops(self) -> float:
        """Per candidate; while fields are chosen the whole tower."""
        tower = self.tower.candidate_flops if self.gates is None else self.tower.mlp.flops_per_row
        return float(self.fields.candidate_flops + tower)

    def bytes_read(self, num_history: int, num_candidates: int, *, cached: bool) -> float:
        """Once per request: all dense weights, and the rows of tables that it reads."""
        return dense_bytes(self) + self.fields.bytes_read(num_history, num_candidates, cached=cached)


# --- what a field costs, by the clock ---


def sample_request(view: View, space: Space, max_history: int, num_candidates: int = MEASURED_CANDIDATES) -> Batch:
    """One request with so many random candidates and the newest events of the log as its past; context and pair fields are 0.

    For times alone: which values stand in it does not matter. `space` is the system's, with the pair fields of its stage.
    """
    histories = view.histories
    newest = slice(max(0, histories.num_events - max_history), None)
    item, moment, action, value, group = (
        torch.from_numpy(column[newest].copy())
        for column in (histories.item, histories.time, histories.action, histories.value, histories.group)
    )
    user = torch.tensor([min(1, view.users.num_rows - 1)])
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, space.num_items + 1, (num_candidates,), generator=generator)
    return Batch(
        user=user,
        time=torch.tensor([view.now]),
        history=History(
            items=Jagged(item, torch.tensor([0, len(item)])), time=moment, action=action, value=value, group=group
        ),
        user_fields=view.users.gather(user),
        context={f.name: _empty(f) for f in space.context_fields},
        candidates=Candidates(
            rows=Jagged(rows, torch.tensor([0, num_candidates])),
            pair={f.name: torch.zeros(num_candidates) for f in space.pair_fields},
        ),
    )


def _empty(f: Field) -> Column:
    """A column of one row."""
    match f:
        case Categorical():
            return torch.zeros(1, dtype=torch.int64)
        case Numeric():
            return torch.zeros(1)
        case Vector():
            return torch.zeros(1, f.dim)
        case _:
            return Jagged(torch.zeros(1, dtype=torch.int64), torch.tensor([0, 1]))


@torch.inference_mode()
def measure_field_costs(fields: SelectableFields, batch: Batch, times: int = MEASURED_TIMES) -> Tensor:
    """o_j, float32 [M] microseconds: building and looking up each field alone for the batch, on the serving path, less what no field takes.

    The batch is a request with all its candidates, or as many requests with one candidate each as serving has rows. Fields take turns, so
    that a slow moment of the machine meets all of them; the median of `times` runs counts, 0.1 at least.
    """
    batch = batch.to(fields.matrix.known_items.device)
    alone = [_with_only(fields, [name]) for name in fields.names]
    none = _with_only(fields, [])
    seconds: list[list[float]] = [[] for _ in range(len(alone) + 1)]
    for _ in range(times + 2):
        for number, part in enumerate([none, *alone]):
            began = time.perf_counter()
            part.vectors(batch)
            seconds[number].append(time.perf_counter() - began)
    middle = [statistics.median(runs[2:]) for runs in seconds]  # the first two warm up
    return torch.tensor([max(1e6 * (taken - middle[0]), 0.1) for taken in middle[1:]])


def _with_only(fields: SelectableFields, names: Collection[str]) -> SelectableFields:
    """The same fields in evaluation mode, only these of them, with the same tensors."""
    tensors = (*fields.parameters(), *fields.buffers())
    other = copy.deepcopy(fields, {id(tensor): tensor for tensor in tensors})
    other.keep(names)
    return other.eval()
