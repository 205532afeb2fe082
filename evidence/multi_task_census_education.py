"""Census-income, education of at least college beside never married: do gates and experts help against one shared network of the same size?

`shortlist prove multi_task_census_education` (wants SHORTLIST_DATA); resumes where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping

import _census_table as table
import _multi_task as tables
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab

TASKS = (tables.EDUCATION, tables.SINGLE)

CLAIM = Claim(
    name="multi_task_census_education",
    systems=("mmoe", "shared-bottom", "ple"),
    claim="On census-income, MMoE tells education of at least college better than a shared bottom of the "
    "same size, and never married no worse.",
    data=tables.DATA,
    protocol=table.PROTOCOL,
    bar=table.BAR,
    published={
        "mean AUC of 400 runs, first task, other rows and tuned sizes": {
            "single task": 0.8792,
            "shared-bottom": 0.8813,
            "OMoE": 0.8813,
            "MMoE": 0.8826,
        },
    },
)


def run(lab: Lab) -> None:
    """All networks, all seeds."""
    table.run_table(lab, TASKS)


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bar."""
    return table.judge_table(arms, TASKS)
