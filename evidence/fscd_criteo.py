"""FSCD on the Criteo sample: all fields' AUC at a quarter of their measured cost? Beside cost-blind gates, COLD, random fields, two towers.

`shortlist prove fscd_criteo` (wants SHORTLIST_DATA); resumes where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping

from _ctr import criteo_sample
from _pre_ranking import PUBLISHED, Plan, bar, compared, protocol, public_log, run_rows
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab
from shortlist.layers.selection import GatesConfig
from shortlist.training.config import TrainerConfig

BUDGET = 0.25
PLAN = Plan(
    # One pass chooses: on rows that are seen for the first time, no field is wanted for what it has learned by heart.
    trainer=TrainerConfig(epochs=6, batch_size=256, lr=1e-3, weight_decay=0.1, patience=2),
    select_epochs=1,
    gates=GatesConfig(rate=20.0),
)

CLAIM = Claim(
    name="fscd_criteo",
    systems=("fscd", "cold"),
    claim="FSCD's choice of fields has the AUC of all 39 at a quarter of their cost.",
    data="80,000 rows of Criteo, 13 numbers in logarithmic buckets and 26 categories, split 8:1:1 at random",
    protocol=protocol(PLAN, BUDGET, "towers over every other field, since nobody knows which are the item's"),
    bar=bar(BUDGET),
    published=PUBLISHED,
)


def run(lab: Lab) -> None:
    """Every arm with every seed, on the same split."""
    log = public_log(lab, criteo_sample(None if lab.quick else lab.data_root))
    run_rows(lab, log, PLAN, 0.7 if lab.quick else BUDGET, log.names[::2])


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bar."""
    return compared(arms, BUDGET)
