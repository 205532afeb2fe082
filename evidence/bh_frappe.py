"""Binary codes on real ids: Frappe's apps in a table of a quarter to a 128th of its size, against other schemes at equal bytes.

`shortlist prove bh_frappe` (wants SHORTLIST_DATA); resumes where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial

from _ctr import Recipe, frappe, world_of
from _ranking_lab import World
from _tables import INIT_STD, Maker, chosen, fits, measured, sized
from shortlist.embeddings.base import TableChoice
from shortlist.embeddings.bh import BHConfig
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab, Verdict
from shortlist.metrics import Interval

SIZES = (3.9, 31, 127)
DECAYS = (0.05, 0.005)
FULL, BH, SCRAMBLED = "a row per id", "BH, succession", "BH, succession, ids scrambled"
NAMES = ("hashing trick", "quotient-remainder, added", BH)
SLACK = 0.0009

CLAIM = Claim(
    name="bh_frappe",
    systems=("bh", "hashed", "quotient-remainder"),
    claim="On Frappe's 4,082 apps binary-code hashing is at no size below the hashing trick or quotient-remainder.",
    data="Frappe_x1, valid and test the benchmark's own, training negatives redrawn; the ids allow sizes down to about 1/128, where BH "
    "has 32 rows for the apps.",
    protocol="Rules of the BARS leaderboards (batch 4096, Adam 1e-3, whole-table decay, best epoch on valid AUC - logloss), DNN with one "
    "hidden layer of 200 and width 10; only the table of apps is compressed, to BH's rows. Each arm's decay, .05 or .005, "
    "is chosen on validation with seed 0. Multiplied quotient-remainder is left out: whole-table decay pulls both factors to zero. "
    "Codes of apps rise with their first appearance; a scrambled arm shows what that order is worth.",
    bar="BH's mean test AUC is at least that of every other scheme at the same size, less one standard error of a test AUC (.0009).",
    published={"BARS, DNN with a row per id (AUC)": 0.9833},
)  # fmt: skip


def run(lab: Lab) -> None:
    """Every scheme at every size; decay first."""
    world = world_of(frappe(None if lab.quick else lab.data_root))
    arms: dict[str, Maker] = {FULL: chosen(TableChoice(init_std=INIT_STD))}
    for size in SIZES[:1] if lab.quick else SIZES:
        for scheme in NAMES:
            if fits(scheme, world.space.num_items, size):
                arms[f"{scheme}, 1/{size:.0f}"] = sized(scheme, size)
        scrambled = BHConfig(compression=size, scramble=True, init_std=INIT_STD)
        arms[f"{SCRAMBLED}, 1/{size:.0f}"] = chosen(scrambled)

    @cache
    def tuned(arm: str) -> tuple[float, dict[str, float | Interval]]:
        """The better decay on validation with seed 0, and that run's figures."""
        runs = [(decay, one(lab, world, 0, arms[arm], decay)) for decay in (DECAYS[:1] if lab.quick else DECAYS)]
        return max(runs, key=lambda pair: float(pair[1]["valid_auc"]))  # type: ignore[arg-type]

    def figures(arm: str, seed: int) -> dict[str, float | Interval]:
        decay, found = tuned(arm)
        found = found if seed == 0 else one(lab, world, seed, arms[arm], decay)
        return {**found, "cost:decay": decay}

    for arm in arms:
        for seed in lab.seeds:
            lab.measure(arm, seed, partial(figures, arm, seed))


def one(lab: Lab, world: World, seed: int, make: Maker, decay: float) -> dict[str, float | Interval]:
    """A DNN with that table of apps."""
    settings = {
        "dim": 10,
        "widths": (32,) if lab.quick else (200,),
        "norm": "batch",
        "dropout": 0.2,
        "id_dropout": 0.0,
        "use_user_ids": True,
    }
    recipe = Recipe(table_l2=decay, init_std=None, epochs=2 if lab.quick else 25, batch_size=512 if lab.quick else 4096)
    return measured(settings, world, recipe, seed, make, users=False)[1]


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """BH against every scheme at its size, on means over seeds."""
    auc = {name: arm.metrics["auc"].mean for name, arm in arms.items()}
    failures, checks = [], 0
    for size in (f"1/{size:.0f}" for size in SIZES):
        for scheme in NAMES:
            if scheme != BH and f"{scheme}, {size}" in auc:
                checks += 1
                ours, theirs = auc[f"{BH}, {size}"], auc[f"{scheme}, {size}"]
                if ours < theirs - SLACK:
                    failures.append(f"at {size} BH has {ours:.4f}, {scheme} {theirs:.4f}")
    verdict: Verdict = "holds" if not failures else "fails" if len(failures) == checks else "partly"
    shown = "; ".join(
        f"{name} {value:.4f} with {arms[name].cost.get('id_floats', 0):,.0f} floats" for name, value in auc.items()
    )
    return Judgement(verdict, ". ".join([*failures, shown]) + ".")
