"""What the claims about pre-ranking share: one training for all arms, the vector-product pre-ranker, times taken in turns.

R rows, B requests, t candidates end to end, D width of a field's vector, d width of a tower's output.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from _ctr import Table, batch_of, embeddings_of, quality, world_of
from _ranking_lab import World
from shortlist.data.batches import Batch, Candidates
from shortlist.data.schema import Space
from shortlist.evaluation.evidence import Arm, Judgement, Lab
from shortlist.layers.field_matrix import FieldsConfig
from shortlist.layers.scoring import TowerConfig, dense_bytes, task_losses
from shortlist.layers.selected_fields import PreRankingConfig, SelectableFields, State, measure_field_costs
from shortlist.layers.selection import ChoiceConfig, CostConfig, GatesConfig, facts_of
from shortlist.layers.towers import MLP
from shortlist.models.base import Cost, Losses, Ranker, RequestShape, Scores
from shortlist.models.ranking.cold import COLD, COLDConfig
from shortlist.models.ranking.fscd import FSCD, FSCDConfig
from shortlist.training.config import TrainerConfig
from shortlist.training.sources import CandidateSource
from shortlist.training.trainer import fit

WEIGHTS = (1e-3, 3e-3, 1e-2)
"""Of the cost term; validation decides. Tried alike for cost-aware and cost-blind gates."""
AS_GOOD = 0.002
"""Tries whose validation AUC is so near the best one's are as good; of these the cheapest is taken."""
HEAD = TowerConfig(
    widths=(64, 32), activation="relu", dropout=0.0, use_user_ids=True, id_dropout=0.0, pair_bins=0, loss="bce"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How every arm of a claim is trained."""

    trainer: TrainerConfig
    """Of the last phase; all arms may take as many epochs, those that choose fields beside the epochs of choosing."""
    select_epochs: int
    gates: GatesConfig = GatesConfig()  # noqa: RUF009  (frozen)
    max_history: int = 1


# --- training ---


def fitted(system: Ranker, world: World, plan: Plan, seed: int, validate: Callable[[Ranker], float]) -> Ranker:
    """The system trained by the product's own trainer, at its best epoch on validation."""
    source = CandidateSource(
        world.histories,
        world.users,
        world.train.requests,
        Candidates(rows=world.train.rows),
        {"target": world.train.label},
        batch_size=plan.trainer.batch_size,
        max_history=plan.max_history,
        only_chosen=False,
        seed=seed,
    )

    def score(trained: Any) -> float:
        return validate(trained)

    config = replace(plan.trainer, seed=seed)
    fit(system, world.view, lambda phase: source, config=config, validate=score, progress=False)
    return system


def seeded(cls: Callable[[Any, Space], Ranker], config: Any, space: Space, seed: int) -> Ranker:
    """A new system with seeded first weights."""
    torch.manual_seed(seed)
    return cls(config, space)


def row_auc(world: World) -> Callable[[Ranker], float]:
    """Validation AUC over all rows of a tabular log."""
    return lambda system: quality(system, world, world.valid)["auc"]


class Log(NamedTuple):
    """A tabular log with what its fields cost."""

    world: World
    names: tuple[str, ...]
    """Fields to choose from."""
    work: Mapping[str, float]
    """o_j by name: declared, or microseconds."""
    keys: float = 0.0
    """Weight of a key beside them."""
    dim: int = 10
    """D."""

    @property
    def costs(self) -> CostConfig:
        """As settings."""
        return CostConfig(declared=self.work, width=0.0, keys=self.keys)

    def price(self, name: str) -> float:
        """c_j before it is scaled."""
        return self.work[name] + self.keys * facts_of(self.world.space, [name])[0].num_keys


def names_of(table: Table) -> tuple[str, ...]:
    """The table's columns as fields of a pre-ranker."""
    own = {table.user: "user", table.item: "item"}
    return tuple(own.get(column, f"context.{column}") for column in table.columns)


def microseconds(world: World, names: Sequence[str], dim: int = 10) -> dict[str, float]:
    """Measured o_j of each field for 1,000 rows, each a request with its candidate, by name."""
    config = PreRankingConfig(fields=FieldsConfig(dim=dim, names=tuple(names)), match=False, head=HEAD)
    fields = SelectableFields(world.space, config)
    measured = measure_field_costs(fields, thousand(world), times=51)
    return dict(zip(fields.names, measured.tolist(), strict=True))


def thousand(world: World) -> Batch:
    """The first 1,000 test rows as one batch."""
    return batch_of(world, world.test, np.arange(min(1_000, len(world.test.requests))))


def pre_ranker(log: Log, plan: Plan, seed: int, *, cold: bool = False, **settings: Any) -> FSCD | COLD:
    """A new FSCD or COLD over the log's fields; `settings` over the shared ones."""
    shared = {
        "fields": FieldsConfig(dim=log.dim, names=log.names, use_history=False, max_history=1),
        "match": False,
        "head": HEAD,
        "costs": log.costs,
        **settings,
    }
    made = (
        seeded(COLD, COLDConfig(**shared), log.world.space, seed)
        if cold
        else seeded(FSCD, FSCDConfig(**shared), log.world.space, seed)
    )
    assert isinstance(made, FSCD | COLD)
    return made


def best_by_weight(log: Log, plan: Plan, seed: int, choice: ChoiceConfig, *, cost_aware: bool) -> tuple[FSCD, float]:
    """Trained once per weight of the cost term: of those nearly as good as the best on validation the cheapest, and its weight."""
    tries = []
    for weight in WEIGHTS:
        gates = replace(plan.gates, weight=weight, cost_aware=cost_aware)
        system = pre_ranker(log, plan, seed, gates=gates, choice=choice)
        fitted(system, log.world, plan, seed, row_auc(log.world))
        tries.append((row_auc(log.world)(system), system, weight))
    best = max(auc for auc, _, _ in tries)
    _, chosen, weight = min(
        ((-auc, system, weight) for auc, system, weight in tries if auc >= best - AS_GOOD),
        key=lambda found: (found[1].body.choice.kept_share(), found[0]),
    )
    assert isinstance(chosen, FSCD)
    return chosen, weight


def over(log: Log, names: Iterable[str]) -> Log:
    """The log with fewer fields."""
    kept = tuple(name for name in log.names if name in set(names))
    return log._replace(names=kept, work={name: log.work[name] for name in kept})


def told(system: Ranker, log: Log) -> dict[str, float]:
    """AUC and logloss on the test rows, number and cost of the fields that are read (in units of the log's costs), bytes of tables."""
    found = quality(system, log.world, log.world.test)
    if isinstance(system, FSCD | COLD):
        names = system.body.fields.names
        found["cost"] = sum(log.price(name) for name in names)
        found["fields"] = float(len(names))
    found["table_bytes"] = float(sum(weight.numel() * 4 for weight in embeddings_of(system)))
    return found


def at_random(log: Log, plan: Plan, seed: int, number: int, draws: int) -> dict[str, float]:
    """Means over so many draws of `number` fields, and the spread of their AUC."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        few = over(log, rng.choice(log.names, number, replace=False))
        system = pre_ranker(few, plan, seed, choice=ChoiceConfig(epochs=0))
        found.append(told(fitted(system, few.world, plan, seed, row_auc(few.world)), few))
    means = {metric: float(np.mean([f[metric] for f in found])) for metric in found[0]}
    return {**means, "auc_sd": float(np.std([f["auc"] for f in found], ddof=1))}


# --- arms on public logs of rows ---

ROW_ARMS = ("all fields", "FSCD", "FSCD, cost-blind", "COLD", "random", "vector product")
EVERY, OURS, BLIND, SCORES, RANDOM, PRODUCT = ROW_ARMS
NUM_RANDOM = 5
KEY_MICROSECONDS = 1e-3
"""What a key of a table costs beside the time of its look-ups: a thousand keys as much as a microsecond per 1,000 candidates."""


def protocol(plan: Plan, budget: float, sides: str) -> str:
    """How `run_rows` compares, in words."""
    trainer = plan.trainer
    return (
        "A field's cost is the measured time to build and look it up for 1,000 rows alone (microseconds, on the serving path, measured "
        f"once for all arms) + {KEY_MICROSECONDS} per key. Vectors of 10, hidden layers of 64 and 32, AdamW {trainer.lr}, decay "
        f"{trainer.weight_decay}, batch {trainer.batch_size}, up to {trainer.epochs} epochs stopped by validation AUC; choosing takes "
        f"{plan.select_epochs} epochs before. FSCD fills {budget:.0%} of the cost of all fields; cost-blind gates, COLD and {NUM_RANDOM} "
        f"random draws take as many fields as it did. Weights of the cost term {', '.join(map(str, WEIGHTS))}: the cheapest of those "
        f"within {AS_GOOD} of the best validation AUC, for both kinds of gates. Vector product: {sides}. Times: medians of 51 turns with "
        "the network over all fields, 1,000 rows"
    )


def bar(budget: float) -> str:
    """What `compared` asks for, in words."""
    return (
        f"FSCD's AUC >= that of all fields - .002 at <= {budget:.0%} of the cost and <= 50 % of the time, > random + 2 of its standard "
        "deviations, > vector product; means of the seeds; partly where AUC and cost alone hold"
    )


PUBLISHED = {"the authors' log": "vector product .695, FSCD .737 AUC"}


def public_log(lab: Lab, table: Table) -> Log:
    """The table with measured costs; they are kept with the claim's measurements, so that all arms and seeds have the same."""
    world = world_of(table)
    names = names_of(table)
    measured = lab.measure(
        "microseconds per 1,000 candidates",
        0,
        lambda: {f"cost:{name}": spent for name, spent in microseconds(world, names).items()},
    )
    work = {name: float(measured[f"cost:{name}"]) for name in names}  # type: ignore[arg-type]
    return Log(world, names, work, keys=KEY_MICROSECONDS)


def run_rows(lab: Lab, log: Log, plan: Plan, budget: float, item_side: tuple[str, ...]) -> None:
    """Every arm with every seed. COLD, cost-blind gates and random choices take as many fields as FSCD's budget gave it."""
    if lab.quick:
        plan = replace(plan, trainer=replace(plan.trainer, epochs=2), select_epochs=1)
    for seed in lab.seeds:
        every = pre_ranker(log, plan, seed, choice=ChoiceConfig(epochs=0))

        def arm(name: str, run: Callable[[], dict[str, float]], seed: int = seed) -> Mapping[str, Any]:
            return lab.measure(name, seed, run)

        choice = ChoiceConfig(epochs=plan.select_epochs, budget=budget)
        ours = arm(OURS, lambda: by_weight(log, plan, seed, choice, every, cost_aware=True))  # noqa: B023
        keep = int(ours["fields"])
        same = ChoiceConfig(epochs=plan.select_epochs, keep=keep)
        arm(EVERY, lambda: plainly(log, plan, seed, every, choice=ChoiceConfig(epochs=0)))  # noqa: B023
        arm(BLIND, lambda: by_weight(log, plan, seed, same, every, cost_aware=False))  # noqa: B023
        arm(SCORES, lambda: plainly(log, plan, seed, every, cold=True, choice=same))  # noqa: B023
        arm(RANDOM, lambda: at_random(log, plan, seed, keep, NUM_RANDOM))  # noqa: B023
        arm(PRODUCT, lambda: products(log, plan, seed, every, item_side))  # noqa: B023


def by_weight(
    log: Log, plan: Plan, seed: int, choice: ChoiceConfig, every: Ranker, *, cost_aware: bool
) -> dict[str, float]:
    """FSCD with the weight that validation chose, tested once."""
    system, weight = best_by_weight(log, plan, seed, choice, cost_aware=cost_aware)
    counts = system.body.choice.histogram()
    return {
        **told(system, log),
        **timed(system, every, thousand(log.world)),
        "cost:weight": weight,
        "cost:gates_from_.3_to_.7": sum(counts[3:7]) / sum(counts),
    }


def plainly(log: Log, plan: Plan, seed: int, every: Ranker, **settings: Any) -> dict[str, float]:
    """One training, tested once."""
    system = fitted(pre_ranker(log, plan, seed, **settings), log.world, plan, seed, row_auc(log.world))
    return {**told(system, log), **timed(system, every, thousand(log.world))}


def products(log: Log, plan: Plan, seed: int, every: Ranker, item_side: tuple[str, ...]) -> dict[str, float]:
    """The vector product over all fields, tested once."""
    fields = FieldsConfig(dim=log.dim, names=log.names, use_history=False, max_history=1)
    config = VectorProductConfig(fields=fields, match=False, head=HEAD, item_side=item_side)
    system = fitted(seeded(VectorProduct, config, log.world.space, seed), log.world, plan, seed, row_auc(log.world))
    return {**told(system, log), **timed(system, every, thousand(log.world))}


def _told(found: Mapping[str, float]) -> str:
    read = [f"{found['fields']:.0f} fields, cost {found['cost']:.0f}"] if "cost" in found else []
    return ", ".join([*read, *([f"{found['ms']:.2f} ms"] if "ms" in found else [])])


def compared(arms: Mapping[str, Arm], most: float) -> Judgement:
    """FSCD within .002 of all fields at no more than the share `most` of their cost and half of their time, above random choices by
    two of their standard deviations, and above the vector product."""
    value = {name: {m: found.mean for m, found in arms[name].metrics.items()} for name in arms}
    ours, every, random = value[OURS], value[EVERY], value[RANDOM]
    shown = "; ".join(f"{name} {value[name]['auc']:.4f} ({_told(value[name])})" for name in ROW_ARMS)
    share = ours["cost"] / every["cost"]
    checks = {
        "AUC": ours["auc"] >= every["auc"] - 0.002,
        "cost": share <= most + 1e-6,
        "time": ours["time_share"] <= 0.5,
        "random": ours["auc"] > random["auc"] + 2 * random["auc_sd"],
        "vector product": ours["auc"] > value[PRODUCT]["auc"],
    }
    missed = [name for name, good in checks.items() if not good]
    reason = (
        f"AUC: {shown}. FSCD against all fields {ours['auc'] - every['auc']:+.4f} at {100 * share:.0f} % of the cost and "
        f"{100 * ours['time_share']:.0f} % of the time, against cost-blind gates {ours['auc'] - value[BLIND]['auc']:+.4f}; random choices "
        f"spread by {random['auc_sd']:.4f}." + (f" Missed: {', '.join(missed)}." if missed else "")
    )
    return Judgement("holds" if not missed else "partly" if checks["AUC"] and checks["cost"] else "fails", reason)


# --- time ---


@torch.inference_mode()
def in_turns(systems: Sequence[Ranker], batch: Batch, times: int = 51) -> list[float]:
    """Milliseconds that each system takes to score the batch, the median of so many runs; systems take turns, so that a slow moment of
    the machine meets all of them."""
    spent: list[list[float]] = [[] for _ in systems]
    for _ in range(times + 3):
        for number, system in enumerate(systems):
            system.eval()
            began = time.perf_counter()
            system.score(batch)
            spent[number].append(1e3 * (time.perf_counter() - began))
    return [statistics.median(runs[3:]) for runs in spent]


def timed(system: Ranker, every: Ranker, batch: Batch) -> dict[str, float]:
    """Milliseconds for the batch, and as a share of what the network over all fields takes."""
    own, whole = in_turns([system, every], batch)
    return {"ms": own, "time_share": own / whole}


# --- the vector-product pre-ranker ---


@dataclass(frozen=True, kw_only=True, slots=True)
class VectorProductConfig(PreRankingConfig):
    """Settings of the two towers; `head.widths` are the hidden widths of either."""

    item_side: tuple[str, ...] = ()
    """Fields of the request that the item's tower reads, for logs that name no items; empty = the candidate's own fields alone."""
    out: int = 32
    """d."""


class TowerState(NamedTuple):
    """The request's side."""

    user_Bd: Tensor
    own_BX: Tensor
    """Vectors of the request's fields that belong to the item's tower."""


class VectorProduct(Ranker):
    """The product of a user's and an item's vector, each a tower over its own fields: what pre-ranking was before FSCD and COLD.

    It learns from the same labelled rows as they do. Items' vectors can be kept (`cache`), as every such system does when serving.
    """

    Config = VectorProductConfig
    config: VectorProductConfig

    def __init__(self, config: VectorProductConfig, space: Space) -> None:
        super().__init__(config, space)
        self.max_history = config.fields.max_history
        self.fields = SelectableFields(space, config)
        D, names = config.fields.dim, self.fields.request_names
        self.of_user = [i for i, name in enumerate(names) if name not in config.item_side]
        self.of_item = [i for i, name in enumerate(names) if name in config.item_side]
        width = len(self.of_item) + len(self.fields.candidate_names)
        self.user_tower = MLP(len(self.of_user) * D, config.head.widths, config.out)
        self.item_tower = MLP(width * D, config.head.widths, config.out)
        self.bias = nn.Parameter(torch.zeros(()))
        self.kept_Nd: Tensor | None = None

    @torch.no_grad()
    def cache(self) -> None:
        """Make all items' vectors now, for serving."""
        assert not self.of_item
        rows = torch.arange(self.space.num_items + 1)
        self.kept_Nd = self.item_tower(self.fields.matrix.candidate(rows).flatten(1))

    def user_state(self, batch: Batch) -> TowerState:
        """See TowerState."""
        request_BFD = self.fields.request(batch)
        user_Bd = self.user_tower(request_BFD[:, self.of_user].flatten(1))
        return TowerState(user_Bd, request_BFD[:, self.of_item].flatten(1))

    def score_candidates(self, state: TowerState, candidates: Candidates) -> Scores:
        """Logits [t]."""
        rows = candidates.rows
        row_t = rows.row_of_value
        if self.kept_Nd is not None:
            item_td = self.kept_Nd[rows.values]
        else:
            nothing = State(state.own_BX, rows.values.new_zeros(0, 0), state.own_BX.new_zeros(0, 0))
            own_tX = self.fields.candidate(nothing, candidates).flatten(1)
            item_td = self.item_tower(torch.cat([state.own_BX[row_t], own_tX], dim=1))
        return {self.space.tasks[0]: (state.user_Bd[row_t] * item_td).sum(1) + self.bias}

    def losses(self, batch: Batch) -> Losses:
        """As `config.head.loss` says."""
        return task_losses(self.score(batch), batch, self.config.head.loss)

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """Items' vectors at hand: one product of width d per candidate."""
        user = self.fields.matrix.request_flops(shape.num_history) + self.user_tower.flops_per_row
        return Cost(
            user_flops=0.0 if cached else float(user),
            item_flops=2.0 * self.config.out,
            bytes=dense_bytes(self.user_tower),
        )
