"""The second phase of FSCD begins where the first ended: how many steps does that save against training the chosen fields from scratch?

`shortlist prove fscd_warm_start` (wants SHORTLIST_DATA); resumes where it was stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch

from _ctr import criteo_sample, source_of
from _planted_fields import priced_log
from _pre_ranking import Log, Plan, over, pre_ranker, public_log, row_auc
from fscd_criteo import BUDGET
from fscd_criteo import PLAN as OF_CRITEO
from fscd_planted import KEEP, NUM_ROWS, priced
from fscd_planted import PLAN as OF_PLANTED
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab, hold_if
from shortlist.layers.selection import ChoiceConfig, GatesConfig
from shortlist.models.base import Phase
from shortlist.models.ranking.cold import COLD
from shortlist.models.ranking.fscd import FSCD
from shortlist.training.context import deterministic
from shortlist.training.optimisers import build_optimisers, clip_gradients

EVERY_STEPS, EPOCHS, NEAR = 10, 4, 0.001

CLAIM = Claim(
    name="fscd_warm_start",
    systems=("fscd",),
    claim="Started from the first phase's weights, the chosen fields need at most half the steps that they need from scratch.",
    data="The planted log of fscd_planted, another one per seed, and the Criteo sample",
    protocol=f"Settings as in fscd_planted (8 fields of 24) and fscd_criteo ({BUDGET:.0%} of the cost of 39), cost weight .003. "
    f"Both starts train the same fields with the same batches for {EPOCHS} epochs; validation AUC is taken before the first step and after "
    f"every {EVERY_STEPS}. Steps are those until AUC is within {NEAR} of the best that the start from scratch reaches in its run; a start "
    "that never is there counts all its steps. The steps of the first phase are not counted: they are spent on the choice",
    bar="On both logs, means of the seeds, the warm start takes <= half the steps, and its best AUC is no more than .001 lower",
    published={"paper": "the warm start shortens training markedly; no figure at hand"},
)  # fmt: skip


def run(lab: Lab) -> None:
    """Both starts on both logs with every seed."""
    criteo = public_log(lab, criteo_sample(None if lab.quick else lab.data_root))
    of_criteo = ChoiceConfig(epochs=OF_CRITEO.select_epochs, budget=0.7 if lab.quick else BUDGET)
    of_planted = ChoiceConfig(epochs=1 if lab.quick else OF_PLANTED.select_epochs, keep=KEEP)
    for seed in lab.seeds:
        planted = priced(priced_log(6_000 if lab.quick else NUM_ROWS, seed=seed))
        for name, log, plan, choice in (
            ("planted", planted, OF_PLANTED, of_planted),
            ("Criteo", criteo, OF_CRITEO, of_criteo),
        ):
            lab.measure(name, seed, partial(starts, log, plan, choice, seed))


def starts(log: Log, plan: Plan, choice: ChoiceConfig, seed: int) -> dict[str, float]:
    """Steps and best AUC of both starts."""
    gates: GatesConfig = replace(plan.gates, weight=3e-3)
    warm = pre_ranker(log, plan, seed, gates=gates, choice=choice)
    warm.prepare(log.world.view)
    select, tune = warm.phases()
    for _ in walked(warm, select, log, plan, seed, choice.epochs):
        pass
    assert tune.before is not None
    tune.before(log.world.view)
    few = over(log, warm.body.fields.names)
    scratch = pre_ranker(few, plan, seed, choice=ChoiceConfig(epochs=0))
    curves = {}
    for name, system, phase, own in (("warm", warm, tune, log), ("scratch", scratch, scratch.phases()[0], few)):
        curves[name] = list(walked(system, phase, own, plan, seed, EPOCHS, watch=True))
    best = {name: max(auc for _, auc in curve) for name, curve in curves.items()}
    found = {f"{name}_auc": auc for name, auc in best.items()}
    for name, curve in curves.items():
        there = [step for step, auc in curve if auc >= best["scratch"] - NEAR]
        found[f"{name}_steps"] = float(there[0] if there else curve[-1][0])
    return found


def walked(
    system: FSCD | COLD, phase: Phase, log: Log, plan: Plan, seed: int, epochs: int, *, watch: bool = False
) -> Iterator[tuple[int, float]]:
    """Train a phase as the trainer would; steps done and validation AUC, before the first step and after every tenth, where watched."""
    source, judge = source_of(log.world, plan.trainer.batch_size, seed), row_auc(log.world)
    optimisers = build_optimisers(system, plan.trainer)
    step = 0
    if watch:
        yield 0, judge(system)
    with deterministic(True):
        for epoch in range(epochs):
            for batch in source.batches(epoch):
                system.train()
                loss = torch.stack(list(phase.losses(batch).values())).sum()
                system.zero_grad(set_to_none=True)
                loss.backward()
                clip_gradients(system.parameters(), plan.trainer.clip_norm or torch.inf)
                for optimiser in optimisers:
                    optimiser.step()
                step += 1
                if watch and step % EVERY_STEPS == 0:
                    yield step, judge(system)


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bar."""
    value = {name: {m: found.mean for m, found in arms[name].metrics.items()} for name in ("planted", "Criteo")}
    shown = "; ".join(
        f"{name}: {v['warm_steps']:.0f} steps against {v['scratch_steps']:.0f}, best AUC {v['warm_auc']:.4f} against {v['scratch_auc']:.4f}"
        for name, v in value.items()
    )
    holds = all(
        v["warm_steps"] <= 0.5 * v["scratch_steps"] and v["warm_auc"] >= v["scratch_auc"] - 0.001
        for v in value.values()
    )
    return hold_if(holds, f"{shown}.")
