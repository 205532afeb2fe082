"""FSCD on Frappe's ten fields: what half of their measured cost can do. Beside cost-blind gates, COLD, random fields, two towers.

`shortlist prove fscd_frappe` (wants SHORTLIST_DATA); resumes where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping

from _ctr import frappe
from _pre_ranking import PUBLISHED, Plan, bar, compared, protocol, public_log, run_rows
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab
from shortlist.training.config import TrainerConfig

BUDGET = 0.5
PLAN = Plan(trainer=TrainerConfig(epochs=10, batch_size=2048, lr=3e-3, weight_decay=1e-2, patience=2), select_epochs=4)

CLAIM = Claim(
    name="fscd_frappe",
    systems=("fscd", "cold"),
    claim="FSCD's choice of fields has the AUC of all ten at half of their cost.",
    data="Frappe_x1 (training negatives redrawn): user, app, and eight fields of context",
    protocol=protocol(PLAN, BUDGET, "the app and its cost against the rest"),
    bar=bar(BUDGET),
    published=PUBLISHED,
)


def run(lab: Lab) -> None:
    """Every arm with every seed."""
    log = public_log(lab, frappe(None if lab.quick else lab.data_root))
    run_rows(lab, log, PLAN, 0.7 if lab.quick else BUDGET, ("context.cost",))


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bar."""
    return compared(arms, BUDGET)
