"""The stages at work: from all items to a page, for any number of requests at once, whatever goes wrong on the way.

    retrieval      every retriever searches; lists are merged; every retriever scores all that was found
    scoring        pre-ranking, ranking, ...: candidates are scored and the best kept
    re-ranking     the page is made, looking at the items together

What earlier stages thought of a candidate reaches later ones as pair fields: `score_NAME` and `rank_NAME`, standardised within the
request, beside those of `data/pairs.py`. Training sees them through `until`, which is the same code, so they can not skew.

A stage that raises, is late, or gives scores that are no numbers is passed over for the requests concerned: the order before it
stands, and the report says so. B requests, k items of a page, total = all candidates of the batch end to end.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from shortlist.cascade.acting import Recall, score, score_flops, search, search_flops
from shortlist.cascade.candidates import (
    Blocked,
    best_first,
    by_item,
    choose,
    contained,
    finite,
    first_permitted,
    mean_score,
    merge,
    standardise,
    take,
)
from shortlist.cascade.config import Action, Chain, RunConfig
from shortlist.cascade.meter import StageReport
from shortlist.cascade.watch import LeftBehind, Problem, Watch
from shortlist.data.batches import Batch
from shortlist.data.histories import Float, Int
from shortlist.data.jagged import Jagged
from shortlist.data.pairs import PAIR_FIELDS, pair_fields
from shortlist.data.schema import Numeric, Space
from shortlist.errors import ConfigError
from shortlist.models.base import Ranker, Remembering, Reranker, Retrieved, System
from shortlist.store.memories import Memories
from shortlist.store.vector_index import VectorIndex

PAIR_HISTORY = 500
"""Events at least that pair fields look back on."""


def stage_space(config: RunConfig, space: Space, stage: str) -> Space:
    """The space that systems of a stage are built on: with the run's tasks and the pair fields that reach it."""
    earlier: list[str] = []
    for other in config.stages:
        if other.name == stage:
            break
        earlier += other.systems
    names = [f"{kind}_{name}" for name in dict.fromkeys(earlier) for kind in ("score", "rank")]
    space = replace(space, tasks=config.learning.tasks or space.tasks)
    return space.with_pairs((*PAIR_FIELDS, *(Numeric(name=name) for name in names)) if earlier else ())


@dataclass(frozen=True, kw_only=True)
class StageTrace:
    """What one stage did for a batch."""

    name: str
    systems: tuple[str, ...]
    rows: Jagged
    """Catalogue rows that it let through, best first."""
    scores: Tensor
    """float32 [total]: what it ordered them by."""
    system_scores: Mapping[str, Tensor]
    """float32 [total] by system: raw scores of what was let through, of this stage's systems."""
    num_received: Tensor
    """int64 [B]."""
    spent_ms: float
    """Wall time of the whole batch."""
    flops: float
    """Per request, mean of the batch."""
    problems: tuple[Problem, ...] = ()
    found: Mapping[str, Retrieved] = field(default_factory=dict)
    """Of a search: each system's own list [B, K], before the lists were merged."""

    @cached_property
    def _arrays(self) -> tuple[list[int], Int, Float]:
        """Offsets, rows and scores in plain memory."""
        rows = self.rows
        return rows.offsets.tolist(), rows.values.cpu().numpy(), self.scores.cpu().numpy()

    def of(self, request: int) -> tuple[Int, Float]:
        """Rows and scores [C] of one request's candidates, best first."""
        offsets, rows, scores = self._arrays
        mine = slice(offsets[request], offsets[request + 1])
        return rows[mine], scores[mine]

    def degraded(self, request: int) -> str | None:
        """What went wrong for a request of the batch; None when nothing did."""
        return "; ".join(p.reason for p in self.problems if p.concerns(request)) or None


@dataclass(frozen=True, kw_only=True)
class Page:
    """Answers to a batch of requests."""

    rows: Tensor
    """int64 [B, k] catalogue rows, best first; 0 where the catalogue has no more permitted items."""
    scores: Tensor
    """float32 [B, k] by the last stage; -inf beside row 0 and beside items that were filled in without one."""
    traces: tuple[StageTrace, ...]
    chain: str

    @cached_property
    def reports(self) -> list[list[StageReport]]:
        """By request, then by stage."""
        num_requests = len(self.rows)
        received = [trace.num_received.tolist() for trace in self.traces]
        return [
            [
                StageReport(
                    stage=trace.name,
                    systems=trace.systems,
                    num_received=of_stage[request],
                    num_kept=len(trace.of(request)[0]),
                    spent_ms=trace.spent_ms / num_requests,
                    spent_mflop=trace.flops / 1e6,
                    degraded=trace.degraded(request) if trace.problems else None,
                )
                for trace, of_stage in zip(self.traces, received)
            ]
            for request in range(num_requests)
        ]


@dataclass(slots=True)
class _Funnel:
    """Where a batch stands between two stages."""

    batch: Batch
    blocked: Blocked
    rows: Jagged
    """Candidates, best first."""
    scores: Tensor
    """What they were last ordered by."""
    wants_pairs: bool = False
    """Whether a later stage reads pair fields."""
    pair_names: tuple[str, ...] = ()
    """Pair fields so far, P of them; of two with one name the later holds."""
    pair_PT: Tensor | None = None
    """float32 [P, total]: in one piece, so that candidates are cut by one operation; None = no fields."""
    raw: dict[str, Tensor] = field(default_factory=dict)
    """Scores by system, [total] each."""
    found: dict[str, Retrieved] = field(default_factory=dict)
    """Lists of the search by system."""

    def cut(self, index: Tensor, scores: Tensor) -> None:
        """Keep the candidates at `index`, which runs request by request, ordered by `scores` [total before]."""
        self.rows, self.scores = take(self.rows, index), scores.index_select(0, index)
        self.pair_PT = None if self.pair_PT is None else self.pair_PT.index_select(1, index)
        self.raw = {name: column.index_select(0, index) for name, column in self.raw.items()}

    def note(self, raw: Mapping[str, Tensor]) -> None:
        """Keep the scores of systems, and make their pair fields."""
        self.raw |= raw
        if raw and self.wants_pairs:
            value_ST, place_ST = standardise(self.rows, torch.stack(list(raw.values())))
            self.add_pairs([f"score_{name}" for name in raw], value_ST)
            self.add_pairs([f"rank_{name}" for name in raw], place_ST)

    def add_pairs(self, names: Sequence[str], column_PT: Tensor) -> None:
        """More pair fields, float32 [P, total]."""
        self.pair_names = (*self.pair_names, *names)
        self.pair_PT = column_PT if self.pair_PT is None else torch.cat([self.pair_PT, column_PT])

    def fork(self) -> _Funnel:
        """The same, to go another way from here; tensors are shared, since stages make new ones."""
        return replace(self, raw=dict(self.raw))

    def candidates(self, space: Space) -> Batch:
        """The batch with its candidates and the pair fields that a system reads; those that no stage made are 0."""
        zeros = torch.zeros_like(self.scores)
        made = {} if self.pair_PT is None else dict(zip(self.pair_names, self.pair_PT.unbind()))
        return self.batch.with_candidates(self.rows, {f.name: made.get(f.name, zeros) for f in space.pair_fields})


class Cascade:
    """A run's stages with their systems, ready to answer.

    Args:
        config: with stages; says what each may do.
        space: the catalogue.
        systems: by the names of the config, on `device`; they are put into evaluation mode.
        popular: int64 [n] all catalogue rows, best first: what fills a page when nothing else can. None = catalogue order.
        device: where batches are moved.
        indexes: of vector retrievers of the first stage, by their names; not used where `device` is no CPU, since there a product with
            every item is fast.
        partial: systems of later stages may still be missing; only `until` can be asked then. For training stage by stage.
    """

    def __init__(
        self,
        config: RunConfig,
        space: Space,
        systems: Mapping[str, System],
        *,
        popular: Tensor | None = None,
        device: torch.device | str = "cpu",
        indexes: Mapping[str, VectorIndex] | None = None,
        partial: bool = False,
    ) -> None:
        missing = [name for stage in config.stages for name in stage.systems if name not in systems]
        if not config.stages or (missing and not partial):
            raise ConfigError(f"the cascade lacks {'system ' + repr(missing[0]) if missing else 'stages'}")
        self.config, self.space, self.systems = config, space, dict(systems)
        self.device, self.indexes = torch.device(device), dict(indexes or {})
        rows = torch.arange(1, space.num_items + 1) if popular is None else popular
        self.popular = rows.to(self.device)
        self._left = LeftBehind()
        self.memories: Memories | None = None
        """Where systems remember the users that batches name; None = nowhere. An engine sets it."""
        for system in self.systems.values():
            system.eval()
        # Asking a protocol takes longer than scoring a few candidates.
        self._remembering = {name for name, system in self.systems.items() if isinstance(system, Remembering)}

    @property
    def max_history(self) -> int:
        """Newest events that a batch should hold: what the systems read, and enough for pair fields to be what training saw."""
        return max(PAIR_HISTORY, *(system.max_history for system in self.systems.values()))

    @torch.no_grad()
    def run(
        self,
        batch: Batch,
        *,
        k: int | None = None,
        candidates: Jagged | None = None,
        allowed: Tensor | None = None,
        chain: str | Chain | None = None,
        deadline_ms: float | None = None,
    ) -> Page:
        """Pages for B requests.

        Args:
            batch: requests without candidates; `batch.excluded` is honoured everywhere.
            k: items of a page; None = as the surface says. Stages that keep fewer keep k.
            candidates: the only items to choose from, per request; nothing else is searched or filled in.
            allowed: bool [n + 1], items that may be shown; None = all.
            chain: which action of each stage; None = the default chain.
            deadline_ms: time from now after which no stage is waited for; the page is made of what there is.
        """
        started = time.perf_counter()
        deadline = None if deadline_ms is None else started + deadline_ms / 1e3
        chosen, k = self._chain(chain), self._page_size(k)
        funnel = self._start(batch, allowed)
        last_reader = self._last_reader(chosen)
        traces = []
        for number, action in enumerate(chosen.actions):
            funnel.wants_pairs = number < last_reader
            watch = Watch(deadline=deadline, left=self._left)
            traces.append(self._stage(funnel, number, action, max(action.keep or k, k), watch, given=candidates))
        rows, scores = self._page(funnel, traces, k, may_search=candidates is None)
        return Page(rows=rows, scores=scores, traces=tuple(traces), chain=chosen.name)

    @torch.no_grad()
    def pages(
        self,
        batch: Batch,
        chains: Sequence[str | Chain],
        *,
        k: int | None = None,
        allowed: Tensor | None = None,
    ) -> Iterator[tuple[Chain, Page]]:
        """The page that `run` makes by each of the chains, one after the other; what chains begin with in common is done once.

        Chains that begin alike come one after the other, else in the given order. Traces of a common beginning are the same objects in
        all pages, with the time that it took once. Arguments as in `run`.
        """
        chosen = [self._chain(chain) for chain in chains]
        yield from self._branches(self._start(batch, allowed), chosen, (), self._page_size(k))

    def _branches(
        self, funnel: _Funnel, chains: Sequence[Chain], traces: tuple[StageTrace, ...], k: int
    ) -> Iterator[tuple[Chain, Page]]:
        """Pages of chains whose stages so far, those of `traces`, were the same."""
        number = len(traces)
        if number == len(self.config.stages):
            rows, scores = self._page(funnel, traces, k, may_search=True)
            for chain in chains:
                yield chain, Page(rows=rows, scores=scores, traces=traces, chain=chain.name)
            return
        alike: dict[tuple[tuple[str, ...], int], list[Chain]] = {}
        for chain in chains:
            action = chain.actions[number]
            alike.setdefault((action.systems, max(action.keep or k, k)), []).append(chain)
        for (_, keep), same in alike.items():
            branch = funnel.fork()
            branch.wants_pairs = any(number < self._last_reader(chain) for chain in same)
            trace = self._stage(branch, number, same[0].actions[number], keep, Watch())
            yield from self._branches(branch, same, (*traces, trace), k)

    @torch.no_grad()
    def until(self, batch: Batch, stage: str, *, candidates: Jagged | None = None) -> Batch:
        """The batch as a stage gets it in the default chain: with candidates, best first, and pair fields. Failures are raised.

        `candidates`, such as what a logged page showed, stand in place of a search: all that are permitted reach the stage.
        """
        number = [s.name for s in self.config.stages].index(stage)
        if not number:
            raise ConfigError(f"nothing comes before {stage}, the first stage")
        funnel = self._start(batch, None)
        funnel.wants_pairs = True
        k = self.config.surface.k
        if candidates is not None and len(candidates.values):
            k = max(k, int(candidates.lengths.max()))
        for n, action in enumerate(self.config.default_chain.actions[:number]):
            self._stage(funnel, n, action, max(action.keep or k, k), Watch(strict=True), given=candidates)
        return funnel.candidates(stage_space(self.config, self.space, stage))

    # -- stages --------------------------------------------------------------------------------------------------

    def _stage(
        self, funnel: _Funnel, number: int, action: Action, keep: int, watch: Watch, *, given: Jagged | None = None
    ) -> StageTrace:
        """One stage: narrows the funnel and says what it did."""
        began = time.perf_counter()
        num_received = funnel.rows.lengths
        if number == 0 and given is None:
            num_received = torch.full_like(funnel.batch.user, self.space.num_items)
            self._retrieve(funnel, action, keep, watch)
        elif number == 0 and given is not None:
            num_received = given.lengths.to(self.device)
            self._receive(funnel, action, given.to(self.device), watch)
        elif isinstance(self.systems[action.systems[0]], Reranker):
            self._rerank(funnel, action.systems[0], keep, watch)
        else:
            self._rank(funnel, action, keep, watch)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return StageTrace(
            name=self.config.stages[number].name,
            systems=action.systems,
            rows=funnel.rows,
            scores=funnel.scores,
            system_scores={name: funnel.raw[name] for name in action.systems if name in funnel.raw},
            num_received=num_received,
            spent_ms=(time.perf_counter() - began) * 1e3,
            flops=watch.flops,
            problems=tuple(watch.problems),
            found=funnel.found if number == 0 else {},
        )

    def _retrieve(self, funnel: _Funnel, action: Action, keep: int, watch: Watch) -> None:
        """Search with every system, merge, and let every system score all that was found."""
        searches = {}
        indexes = self.indexes if self.device.type == "cpu" else {}
        for name in action.systems:
            index = indexes.get(name)
            found = watch.attempt(
                name,
                partial(
                    search, self.systems[name], funnel.batch, keep, funnel.blocked, index, self._recall(name, watch)
                ),
            )
            if found is not None:
                searches[name] = found
                watch.note_bad(name, found.bad_B)
        funnel.found = {name: found.best for name, found in searches.items()}
        if searches:
            funnel.rows, funnel.scores = merge(list(funnel.found.values()), keep)
            fine = funnel.blocked.permits(funnel.rows.row_of_value, funnel.rows.values)
            if not bool(fine.all()):
                funnel.cut(fine.nonzero()[:, 0], funnel.scores)
        else:
            funnel.rows, funnel.scores = self._most_popular(funnel.blocked, funnel.batch.size, keep)
        self._add_pairs(funnel)
        raw = {}
        for name, found in searches.items():
            given = watch.attempt(name, partial(found.score, funnel.rows))
            if given is not None:
                raw[name], _ = finite(funnel.rows, given)
            watch.flops += search_flops(self.systems[name], *self._sizes(funnel), indexes.get(name))
        funnel.note(raw)

    def _receive(self, funnel: _Funnel, action: Action, given: Jagged, watch: Watch) -> None:
        """Take the caller's candidates in place of a search; every system scores them, and the merged order is the first one."""
        most = int(given.lengths.max()) if len(given.values) else 1
        rows_BC = first_permitted(given.padded()[0], funnel.blocked, most)
        funnel.rows = Jagged.from_padded(rows_BC, rows_BC > 0)
        funnel.scores = torch.zeros(len(funnel.rows.values), device=self.device)
        self._add_pairs(funnel)
        raw, _ = self._scores(funnel, action.systems, watch)
        funnel.note(raw)
        if raw:
            orders = [take(funnel.rows, best_first(funnel.rows, scores)).padded()[0] for scores in raw.values()]
            rows, scores = merge([Retrieved(order_BC, order_BC.float()) for order_BC in orders], most)
            # Both lists hold the same items; sorting by (request, item) brings them together.
            there, here = (by_item(lists).argsort() for lists in (rows, funnel.rows))
            index = torch.empty_like(there)
            index[there] = here
            funnel.scores[index] = scores
            funnel.cut(index, funnel.scores)

    def _rank(self, funnel: _Funnel, action: Action, keep: int, watch: Watch) -> None:
        """Score the candidates and keep the best. Several systems count alike, each standardised within the request."""
        raw, bad = self._scores(funnel, action.systems, watch)
        funnel.note(raw)
        scores = funnel.scores
        if raw:
            scores = mean_score(funnel.rows, list(raw.values()), [bad[name] for name in raw], scores)
        funnel.cut(best_first(funnel.rows, scores, keep), scores)

    def _rerank(self, funnel: _Funnel, name: str, keep: int, watch: Watch) -> None:
        """Let a re-ranker make the page; where it fails, the best candidates in the order before."""
        system = self.systems[name]
        assert isinstance(system, Reranker)
        batch = funnel.candidates(system.space)
        watch.flops += score_flops(system, *self._sizes(funnel))
        page = watch.attempt(name, lambda: system.rerank(batch, funnel.scores, keep))
        shown, bad_B = None, torch.ones_like(funnel.batch.user, dtype=torch.bool)
        if page is not None:
            real_BK = page.rows > 0
            rows, scores = shown = Jagged.from_padded(page.rows, real_BK), page.scores[real_BK]
            wrong = ~contained(rows, funnel.rows) | ~torch.isfinite(scores)
            bad_B = torch.zeros_like(bad_B)
            bad_B[rows.row_of_value[wrong]] = True
            watch.note_bad(name, bad_B, "items that are no candidates, or scores that are no numbers")
        if shown is None or bool(bad_B.any()):
            plain = best_first(funnel.rows, funnel.scores, keep)
            before = take(funnel.rows, plain), funnel.scores[plain]
            shown = before if shown is None else choose(bad_B, before, shown)
        (funnel.rows, funnel.scores), funnel.raw = shown, {}
        funnel.pair_names, funnel.pair_PT = (), None

    def _scores(
        self, funnel: _Funnel, names: Sequence[str], watch: Watch
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Finite scores [total] of the candidates by system, and for which requests they are none [B]; failed systems are left out."""
        raw, bad = {}, {}
        for name in names:
            if name in funnel.raw:  # scored these very items in an earlier stage
                raw[name], bad[name] = funnel.raw[name], torch.zeros_like(funnel.batch.user, dtype=torch.bool)
                continue
            system = self.systems[name]
            recall = self._recall(name, watch)
            given = watch.attempt(
                name, partial(score, system, funnel.candidates(system.space), recall, self.config.surface)
            )
            remembered = 0.0 if recall is None else recall.share
            watch.flops += score_flops(system, *self._sizes(funnel), remembered=remembered)
            if given is not None:
                raw[name], bad[name] = finite(funnel.rows, given)
                watch.note_bad(name, bad[name])
        return raw, bad

    # -- parts ---------------------------------------------------------------------------------------------------

    def _start(self, batch: Batch, allowed: Tensor | None) -> _Funnel:
        batch = batch if batch.user.device == self.device else batch.to(self.device)
        if allowed is not None and allowed.shape != (self.space.num_items + 1,):
            raise ConfigError(
                f"allowed must say yes or no for {self.space.num_items + 1} catalogue rows, got {len(allowed)}"
            )
        blocked = Blocked(self.space.num_items, batch.excluded, None if allowed is None else allowed.to(self.device))
        nothing = Jagged(batch.user[:0], batch.user.new_zeros(batch.size + 1))
        return _Funnel(batch, blocked, nothing, torch.zeros(0, device=self.device))

    def _recall(self, name: str, watch: Watch) -> Recall | None:
        return Recall(name, self.memories, watch) if self.memories is not None and name in self._remembering else None

    def _add_pairs(self, funnel: _Funnel) -> None:
        if funnel.wants_pairs:
            columns = pair_fields(funnel.batch, funnel.rows, has_clock=self.space.has_clock)
            funnel.add_pairs(tuple(columns), torch.stack(list(columns.values())))

    def _chain(self, chain: str | Chain | None) -> Chain:
        if chain is None:
            return self._default_chain
        return chain if isinstance(chain, Chain) else self.config.chain(chain)

    def _page_size(self, k: int | None) -> int:
        k = self.config.surface.k if k is None else k
        if k < 1:
            raise ConfigError(f"k must be at least 1, got {k}")
        return k

    def _last_reader(self, chain: Chain) -> int:
        """Number of the last stage that reads pair fields; 0 where none does."""
        readers = self._pair_readers
        return max((n for n, action in enumerate(chain.actions) if not readers.isdisjoint(action.systems)), default=0)

    @cached_property
    def _default_chain(self) -> Chain:
        return self.config.default_chain

    @cached_property
    def _pair_readers(self) -> frozenset[str]:
        """Systems that read pair fields: rankers always may; others say so."""
        choices = {name: choice for name, choice in self.config.systems.items() if name in self.systems}
        return frozenset(
            n for n, c in choices.items() if isinstance(self.systems[n], Ranker) or "pair" in c.entry.needs
        )

    def _sizes(self, funnel: _Funnel) -> tuple[float, float, int]:
        """Mean events and mean candidates of a request, and the catalogue's size."""
        num_requests = max(funnel.batch.size, 1)
        events, candidates = len(funnel.batch.history.items.values), len(funnel.rows.values)
        return events / num_requests, candidates / num_requests, self.space.num_items

    def _most_popular(self, blocked: Blocked, num_requests: int, keep: int) -> tuple[Jagged, Tensor]:
        """What stands in for a search: the most popular permitted items, scored by their place."""
        rows_BK = first_permitted(self._popular_columns(blocked, keep).expand(num_requests, -1), blocked, keep)
        place_BK = torch.arange(keep, 0, -1, device=self.device, dtype=torch.float32).expand_as(rows_BK)
        return Jagged.from_padded(rows_BK, rows_BK > 0), place_BK[rows_BK > 0]

    def _popular_columns(self, blocked: Blocked, count: int) -> Tensor:
        """[C] so many of the most popular items that `count` are left for every request."""
        popular = self.popular if blocked.allowed is None else self.popular[blocked.allowed[self.popular]]
        excluded = 0 if blocked.excluded is None else int(blocked.excluded.lengths.max())
        return popular[: count + excluded]

    def _page(
        self, funnel: _Funnel, traces: Sequence[StageTrace], k: int, *, may_search: bool
    ) -> tuple[Tensor, Tensor]:
        """The first k items of every request; gaps are filled from the stages before, then by popularity."""
        rows, scores, offsets = funnel.rows.values, funnel.scores, funnel.rows.offsets
        # Where a request has no more, the index is that of what is put behind all candidates.
        index_Bk = offsets[:-1, None] + torch.arange(k, device=self.device)
        index_Bk = index_Bk.masked_fill_(index_Bk >= offsets[1:, None], len(scores))
        rows_Bk = torch.cat([rows, rows.new_zeros(1)])[index_Bk]
        scores_Bk = torch.cat([scores, scores.new_full((1,), -torch.inf)])[index_Bk]
        gaps_Bk = rows_Bk == 0
        if bool(gaps_Bk.any()):
            short = gaps_Bk.any(1).nonzero()[:, 0]
            columns = [rows_Bk[short], *(trace.rows.select(short).padded()[0] for trace in reversed(traces))]
            if may_search:
                count = sum(part.shape[1] for part in columns) + k
                columns.append(self._popular_columns(funnel.blocked, count).expand(len(short), -1))
            excluded = funnel.blocked.excluded
            blocked = replace(funnel.blocked, excluded=None if excluded is None else excluded.select(short))
            rows_Bk[short] = first_permitted(torch.cat(columns, 1), blocked, k)
        return rows_Bk, scores_Bk
