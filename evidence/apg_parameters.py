"""APG's hidden layers against ordinary and against static low-rank ones: parameters and time of a wide tower, and AUC on Frappe.

`shortlist prove apg_parameters` (wants SHORTLIST_DATA); resumes where it was stopped.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from _ctr import Recipe, frappe, num_parameters, quality, trained, world_of
from _ranking_lab import World
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab, hold_if
from shortlist.layers.adaptive import APGConfig
from shortlist.layers.field_matrix import FieldsConfig
from shortlist.layers.scoring import HeadConfig
from shortlist.layers.towers import MLP
from shortlist.models.ranking.deepfm import DeepFM

WIDE = (393, (1024, 512, 256))
ROWS, REPEATS = 512, 20
STATIC, LOW, SHARED, OVER, GENERATED = (
    "ordinary",
    "static low rank",
    "APG, shared",
    "APG, shared, over 32",
    "APG, generated",
)
MODES: dict[str, APGConfig] = {
    STATIC: APGConfig(),
    LOW: APGConfig(mode="static", rank=4),
    SHARED: APGConfig(mode="shared", rank=4),
    OVER: APGConfig(mode="shared", rank=4, over=32),
    GENERATED: APGConfig(mode="generated", rank=4),
}
RANKED = (STATIC, LOW, SHARED, OVER)
HEAD = HeadConfig(
    widths=(400, 400),
    activation="relu",
    dropout=0.2,
    norm="batch",
    use_user_ids=True,
    id_dropout=0.0,
    pair_bins=0,
    loss="bce",
)

CLAIM = Claim(
    name="apg_parameters",
    systems=("apg", "deepfm"),
    claim="Hidden layers of which only a 4 x 4 core is made per row need a tenth of ordinary ones' parameters or less, and rank as well.",
    data="The wide tower: random inputs. Frappe_x1: 202,027 / 57,722 / 28,860 rows; training negatives redrawn, so figures are near "
    "published ones, not equal",
    protocol="Wide tower 393-1024-512-256-1, self condition, rank 4, shared bias: parameters without and with Adam's two moments, and the "
    f"median of {REPEATS} forward passes of {ROWS} rows in one run, factors folded. Frappe: DeepFM with a tower of 400-400, "
    "embeddings of 10 and the leaderboard's rule of training for all arms; the static low-rank tower has APG's U and V without a "
    "generated core",
    bar="At most 10 % of the wide tower's parameters; on Frappe at most 10 % of the tower's parameters and a mean AUC of shared, over "
    "32 at least that of ordinary layers less .0005. That generation itself helps is claimed only where APG leads static low rank "
    "by two standard errors",
    published={
        "parameters of 393-1024-512-256": {"static (MB)": 12.91, "v3 (MB)": 3.22, "v4 (MB)": 0.44},
        "independent replications (BARS, AUC, TaobaoAd)": {"DCN V2": 0.649458, "APG_DCNv2": 0.649595},
    },
)  # fmt: skip


def run(lab: Lab) -> None:
    """The wide tower, then the ranker with every kind of layer and seed."""
    for name, apg in MODES.items():
        if name != GENERATED or not lab.quick:
            lab.measure(f"wide tower: {name}", 0, lambda apg=apg: wide(apg))  # type: ignore[misc]
    world = world_of(frappe(None if lab.quick else lab.data_root))
    for seed in lab.seeds:
        for name in RANKED:
            lab.measure(f"DeepFM: {name}", seed, lambda name=name, seed=seed: ranked(lab, world, MODES[name], seed))  # type: ignore[misc]


@torch.no_grad()
def wide(apg: APGConfig) -> dict[str, float]:
    """Parameters and time of the wide tower."""
    torch.manual_seed(0)
    tower = MLP(WIDE[0], WIDE[1], 1, apg=apg).eval()
    x = torch.randn(ROWS, WIDE[0])
    tower.gated(x, None)
    spent = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        tower.gated(x, None)
        spent.append(1000 * (time.perf_counter() - started))
    stored = sum(p.numel() for p in tower.parameters())
    served = stored
    if apg.over:  # what is stored after folding the factors
        served = sum(p.numel() for p in MLP(WIDE[0], WIDE[1], 1, apg=replace(apg, over=0)).parameters())
    return {
        "parameters": float(served),
        "mb_with_adam": 12 * stored / 1e6,
        "forward_ms": float(np.median(spent)),
        "mflop_per_row": tower.flops_per_row / 1e6,
    }


def ranked(lab: Lab, world: World, apg: APGConfig, seed: int) -> dict[str, float]:
    """DeepFM with such layers, trained by the rule and tested once."""
    head, fields = replace(HEAD, apg=apg), FieldsConfig(dim=10, use_history=False, max_history=1)
    recipe = Recipe()
    if lab.quick:
        head = replace(head, widths=(32, 16))
        recipe = Recipe(table_l2=0.0, batch_size=256, epochs=2, lr=1e-2, init_std=None)
    system, course = trained("deepfm", {"fields": fields, "head": head}, world, recipe, seed)
    folded = replace(apg, over=0)
    assert isinstance(system, DeepFM)
    tower = trained_size(replace(head, apg=folded), system.deep.tower.mlp.in_width)
    return {
        **quality(system, world, world.test),
        "tower_parameters": float(tower),
        "cost:dense_parameters": float(num_parameters(system, dense=True)),
        "cost:best_epoch": float(course.best_epoch),
    }


def trained_size(head: HeadConfig, in_width: int) -> int:
    """Parameters of the tower as it is stored after training."""
    tower = MLP(in_width, head.widths, 1, norm=head.norm, apg=head.apg)
    return sum(p.numel() for p in tower.parameters())


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bar, and whether generation adds to low rank."""
    wides = {name: arms[f"wide tower: {name}"].metrics for name in MODES if f"wide tower: {name}" in arms}
    auc = {name: np.array(arms[f"DeepFM: {name}"].per_seed["auc"]) for name in RANKED}
    size = {name: arms[f"DeepFM: {name}"].metrics["tower_parameters"].mean for name in RANKED}
    wide_share = wides[SHARED]["parameters"].mean / wides[STATIC]["parameters"].mean
    share = size[OVER] / size[STATIC]
    gain = auc[OVER] - auc[LOW]
    error = gain.std(ddof=1) / len(gain) ** 0.5 if len(gain) > 1 else float("nan")
    of_wide = "; ".join(
        f"{name} {m['parameters'].mean:,.0f} parameters, {m['mb_with_adam'].mean:.2f} MB with Adam's moments, "
        f"{m['forward_ms'].mean:.2f} ms"
        for name, m in wides.items()
    )
    of_frappe = "; ".join(f"{name} {auc[name].mean():.4f}, {size[name]:,.0f} in the tower" for name in RANKED)
    helps = "leads" if gain.mean() > 2 * error else "does not lead"
    return hold_if(
        wide_share <= 0.1 and share <= 0.1 and bool(auc[OVER].mean() >= auc[STATIC].mean() - 0.0005),
        f"Wide tower: {of_wide}; shared has {wide_share:.4f} of the ordinary one's. Frappe, AUC: {of_frappe}; shared has {share:.3f} of "
        f"the ordinary tower's. APG {helps} static low rank by two standard errors ({gain.mean():+.4f}, error {error:.4f}).",
    )
