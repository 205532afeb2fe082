"""Pre-ranking inside a cascade: how many of the ranker's own ten best films of 500 survive, FSCD against the product of two vectors.

`shortlist prove fscd_cascade` (wants SHORTLIST_DATA); resumes where it was stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from _pre_ranking import HEAD, Plan, VectorProduct, VectorProductConfig, fitted, in_turns, seeded
from _ranking_lab import Training, World, films, scores, trained
from shortlist.data.batches import Batch
from shortlist.data.jagged import Jagged
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab
from shortlist.layers.field_matrix import FieldsConfig
from shortlist.layers.selection import ChoiceConfig, CostConfig
from shortlist.metrics import gauc
from shortlist.models.base import Ranker
from shortlist.models.ranking.cold import COLD, COLDConfig
from shortlist.models.ranking.fscd import FSCD, FSCDConfig
from shortlist.training.config import TrainerConfig

RETRIEVED, KEPT, SHOWN, NUM_REQUESTS, TIMED, NUM_USERS, HISTORY = 500, 50, 10, 300, 16, 1_000, 50
PLAN = Plan(
    trainer=TrainerConfig(epochs=6, batch_size=256, lr=1e-3, weight_decay=1e-4, patience=1),
    select_epochs=3,
    max_history=HISTORY,
)
FIELDS = FieldsConfig(dim=16, max_history=HISTORY)
EVERY, OURS, SCORES, POPULAR = "all fields", "FSCD", "COLD", "popularity"
PRODUCTS = {"vector product": ((64, 32), 32), "vector product, wide": ((256,), 256)}
"""Hidden widths and width of the vectors; the wide one has time to spend that FSCD spends on fields."""
BUDGET = 0.5

CLAIM = Claim(
    name="fscd_cascade",
    systems=("fscd", "cold"),
    claim="Of the ranker's ten best of 500 films, more survive a pre-ranker with crosses and few fields than one that multiplies two "
    "vectors, at no more time.",
    data=f"ML-1M in the order of each user, {NUM_USERS:,} users drawn; liked = rated 4 or 5",
    protocol="Ranker: DIN, trained on blocks of eight rated films. Pre-rankers learn from the same rows in the same way: hidden layers of "
    f"64 and 32, vectors of 16, AdamW {PLAN.trainer.lr}, batch {PLAN.trainer.batch_size}, up to {PLAN.trainer.epochs} epochs stopped by "
    f"validation GAUC; FSCD (weight .003, {BUDGET:.0%} of the measured cost of all fields) and COLD (as many fields) choose for "
    f"{PLAN.select_epochs} epochs before. The wide product has a hidden layer and vectors of 256. {NUM_REQUESTS} test requests with "
    f"{RETRIEVED} films each, drawn by popularity from those the user has not rated; {KEPT} pass. Time: {TIMED} requests at once, medians "
    "of 51 runs; items' vectors of the products are kept, of the others nothing is",
    bar="FSCD lets through a share of the ranker's ten that is >= both vector products' + .02, means of the seeds, in no more time than "
    "the wide one; partly where the share alone holds",
    published={"the authors' service": "95 % of the ranker's own items survive FSCD; definition not at hand"},
)  # fmt: skip


def run(lab: Lab) -> None:
    """Every arm with every seed."""
    world = films(None if lab.quick else lab.data_root, num_users=None if lab.quick else NUM_USERS)
    for seed in lab.seeds:
        course = Course(lab, world, seed)
        ours = lab.measure(OURS, seed, course.fscd)
        keep = int(ours["fields"])  # type: ignore[arg-type]
        lab.measure(SCORES, seed, lambda course=course, keep=keep: course.cold(keep))  # type: ignore[misc]
        lab.measure(EVERY, seed, course.every)
        for name in PRODUCTS:
            lab.measure(name, seed, lambda course=course, name=name: course.product(name))  # type: ignore[misc]
        lab.measure(POPULAR, seed, course.popular)


class Course:
    """One seed: its ranker, its requests, and what pre-rankers do there."""

    def __init__(self, lab: Lab, world: World, seed: int) -> None:
        self.world, self.seed, self.quick = world, seed, lab.quick
        self.retrieved = 60 if lab.quick else RETRIEVED
        self.kept = 15 if lab.quick else KEPT
        self.plan = PLAN
        if lab.quick:
            self.plan = replace(PLAN, trainer=replace(PLAN.trainer, epochs=3, batch_size=64, lr=1e-2), select_epochs=1)
        self.batch = self._requests(20 if lab.quick else NUM_REQUESTS)
        self.best = cache(self._best)

    def _requests(self, number: int) -> Batch:
        """Test requests with candidates drawn by popularity, without repetition, outside of the user's past."""
        world, rng = self.world, np.random.default_rng(self.seed)
        asked = np.sort(rng.choice(len(world.test.requests), number, replace=False))
        batch = world.test.batch(world, asked, 1 << 30)
        count_N = torch.bincount(
            torch.from_numpy(world.view.histories.item.copy()), minlength=world.space.num_items + 1
        )
        draw = torch.Generator().manual_seed(self.seed)
        noise_BN = -(-torch.rand(number, len(count_N), generator=draw).log()).log()
        drawn_BN = count_N.float().log() + noise_BN  # the k largest are drawn in proportion to the counts (Gumbel)
        past = batch.history.items
        drawn_BN[past.row_of_value, past.values] = -torch.inf
        rows_BC = drawn_BN.topk(self.retrieved, dim=1).indices
        return batch.with_candidates(Jagged.from_padded(rows_BC, torch.ones_like(rows_BC, dtype=torch.bool)))

    def _best(self) -> Tensor:
        """int64 [B, 10]: places of the ranker's ten best among the candidates."""
        training = Training(
            epochs=self.plan.trainer.epochs,
            batch_size=self.plan.trainer.batch_size,
            lrs=(self.plan.trainer.lr,),
            patience=1,
            max_history=HISTORY,
        )
        ranker, _ = trained("din", {"loss": "bce", "dim": 16}, self.world, training, self.seed)
        return self._scores(ranker).topk(SHOWN, dim=1).indices

    @torch.inference_mode()
    def _scores(self, system: Ranker) -> Tensor:
        """float32 [B, C], few requests at a time."""
        system.eval()
        found = []
        for part in torch.arange(self.batch.size).split(8):
            found.append(system.score(few(self.batch, part))["target"].view(len(part), -1))
        return torch.cat(found)

    def survived(self, score_BC: Tensor) -> dict[str, float]:
        """Share of the ranker's ten that a pre-ranker's best hold."""
        kept = torch.zeros_like(score_BC, dtype=torch.bool)
        kept.scatter_(1, score_BC.topk(self.kept, dim=1).indices, True)
        return {"survived": float(kept.gather(1, self.best()).float().mean())}

    def _learned(self, system: Ranker) -> Ranker:
        valid = self.world.valid
        return fitted(
            system,
            self.world,
            self.plan,
            self.seed,
            lambda trained: gauc(valid.label, scores(trained, self.world, valid), valid.user_of_row),
        )

    def _told(self, system: Ranker) -> dict[str, float]:
        sixteen = few(self.batch, torch.arange(min(TIMED, self.batch.size)))
        spent = in_turns([system], sixteen, 5 if self.quick else 51)[0] / sixteen.size
        test = self.world.test
        return {
            **self.survived(self._scores(system)),
            "gauc": gauc(test.label, scores(system, self.world, test), test.user_of_row),
            "ms": spent,
        }

    def fscd(self) -> dict[str, float]:
        """FSCD by the clock."""
        choice = ChoiceConfig(epochs=self.plan.select_epochs, budget=BUDGET)
        config = FSCDConfig(fields=FIELDS, head=HEAD, choice=choice, costs=CostConfig(measured=True))
        system = self._learned(seeded(FSCD, config, self.world.space, self.seed))
        assert isinstance(system, FSCD)
        chosen = system.body.choice
        return {
            **self._told(system),
            "fields": float(len(chosen.kept_names())),
            "cost_share": chosen.kept_share(),
            **{f"cost:keeps {name}": float(name in chosen.kept_names()) for name in chosen.names},
        }

    def cold(self, keep: int) -> dict[str, float]:
        """COLD with as many fields."""
        choice = ChoiceConfig(epochs=self.plan.select_epochs, keep=keep)
        config = COLDConfig(fields=FIELDS, head=HEAD, choice=choice)
        return self._told(self._learned(seeded(COLD, config, self.world.space, self.seed)))

    def every(self) -> dict[str, float]:
        """The same network over all fields."""
        config = FSCDConfig(fields=FIELDS, head=HEAD, choice=ChoiceConfig(epochs=0))
        return self._told(self._learned(seeded(FSCD, config, self.world.space, self.seed)))

    def product(self, name: str) -> dict[str, float]:
        """Two towers, items' vectors kept."""
        widths, out = PRODUCTS[name]
        config = VectorProductConfig(fields=FIELDS, head=replace(HEAD, widths=widths), match=False, out=out)
        system = self._learned(seeded(VectorProduct, config, self.world.space, self.seed))
        assert isinstance(system, VectorProduct)
        system.cache()
        return self._told(system)

    def popular(self) -> dict[str, float]:
        """The most popular fifty."""
        count_N = torch.bincount(
            torch.from_numpy(self.world.view.histories.item.copy()), minlength=self.world.space.num_items + 1
        )
        return self.survived(count_N[self.batch.candidate_rows.values].float().view(self.batch.size, -1))


def few(batch: Batch, index: Tensor) -> Batch:
    """Some requests of a batch, with their candidates."""
    history, where = batch.history, batch.history.items.value_index(index)
    return replace(
        batch,
        user=batch.user[index],
        time=batch.time[index],
        history=replace(
            history,
            items=history.items.select(index),
            **{name: getattr(history, name)[where] for name in ("time", "action", "value", "group")},
        ),
    ).with_candidates(batch.candidate_rows.select(index))


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bar."""
    mean: Callable[[str, str], float] = lambda name, metric: arms[name].metrics[metric].mean  # noqa: E731
    shown = "; ".join(
        f"{name} {100 * mean(name, 'survived'):.1f} %" + (f" in {mean(name, 'ms'):.2f} ms" if name != POPULAR else "")
        for name in (EVERY, OURS, SCORES, *PRODUCTS, POPULAR)
    )
    lead = min(mean(OURS, "survived") - mean(name, "survived") for name in PRODUCTS)
    in_time = mean(OURS, "ms") <= mean("vector product, wide", "ms")
    return Judgement(
        "holds" if lead >= 0.02 and in_time else "partly" if lead >= 0.02 else "fails",
        f"Of the ranker's ten survive: {shown}. FSCD leads the better product by {100 * lead:+.1f} points with "
        f"{mean(OURS, 'fields'):.1f} fields at {100 * mean(OURS, 'cost_share'):.0f} % of their measured cost.",
    )
