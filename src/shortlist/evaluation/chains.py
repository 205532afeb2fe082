"""A run's chains for people: a table of what each costs, brings and is given, and the figure of quality against cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shortlist.cascade.allocation.base import RESOURCES
from shortlist.cascade.allocation.calibration import Account, Calibration
from shortlist.cascade.allocation.solver import envelope
from shortlist.cascade.config import Chain, RunConfig
from shortlist.evaluation.figures import ACCENT, INK, OTHER, WIDTH, empty_figure, inline

UNITS = {"mflop": "MFLOP", "ms": "ms"}
WORTHS = {"choice": "gain", "value": "value"}
"""How tables call what a page is worth."""


def chain_table(calibration: Calibration, config: RunConfig) -> list[list[str]]:
    """Rows of text, the first one the heads: every chain by rising milliseconds, with what each stage does.

    A stage is written as its systems and how many candidates it scores; worth and share are those of the requests that nothing was
    learned from. A share of "-" says that the chain was dropped, since another costs no more and brings no less.
    """
    chains = calibration.chains
    worth_J = np.nanmean(calibration.judged.rewards_RJ, axis=0)
    kept = set(calibration.kept_J.tolist())
    word = WORTHS[calibration.config.worth]
    rows = [["chain", *chains.stages, *(UNITS[name] for name in RESOURCES), word, "share"]]
    for j, name in enumerate(chains.names):
        mark = " (default)" if j == calibration.default else ""
        rows.append(
            [
                f"{name}{mark}",
                *stage_words(config.chain(name), chains.count_JK[j].tolist()),
                *(f"{cost:.3f}" for cost in chains.costs_JC[j].tolist()),
                f"{worth_J[j]:.4f}",
                f"{calibration.shares_J[j]:.1%}" if j in kept else "-",
            ]
        )
    return rows


def stage_words(chain: Chain, counts: Sequence[int]) -> list[str]:
    """What each stage does: "din+dnn 60" scores 60 candidates with two systems; a search says how many it finds."""
    return [f"{'+'.join(action.systems)} {count:,}" for action, count in zip(chain.actions, counts)]


def account_table(calibration: Calibration) -> list[list[str]]:
    """Rows of text: the allocator, and beside it the best mixture of chains, the best single one, and the default chain."""
    accounts = {
        f"{calibration.config.system} (allocator)": calibration.chosen,
        f"{calibration.mixture.name} (best random mixture within the budget)": calibration.mixture,
        f"{calibration.fixed.name} (best single chain within the budget)": calibration.fixed,
        f"{calibration.standard.name} (default chain)": calibration.standard,
    }
    heads = ["per request", *(UNITS[name] for name in RESOURCES), WORTHS[calibration.config.worth], "against default"]
    return [heads, *([name, *_cells(account, calibration.standard)] for name, account in accounts.items())]


def sentence(calibration: Calibration) -> str:
    """What the allocator does, in one sentence, with the interval of its gain."""
    made, standard = calibration.chosen, calibration.standard
    cost = ", ".join(
        f"{mine:.3f} {UNITS[name]} for {theirs:.3f}"
        for name, mine, theirs in zip(RESOURCES, made.costs_C, standard.costs_C)
    )
    limits = " and ".join(
        f"{limit:.3f} {UNITS[name]}"
        for name, limit in zip(RESOURCES, calibration.allocation.budget.limits_C.tolist())
        if np.isfinite(limit)
    )
    text = (
        f"At a budget of {limits} a request, {calibration.config.system} takes {cost} of the default chain "
        f"and brings {made.worth:.4f} for {standard.worth:.4f}"
    )
    if calibration.gain is not None:
        gain = calibration.gain
        text += f" ({gain.difference:+.4f}, 95 % interval {gain.low:+.4f} to {gain.high:+.4f})"
    return f"{text}, on {len(calibration.judged):,} validation requests of people it did not learn from."


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as a Markdown table, the first one its head."""
    head, *others = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *others])


def chains_figure(calibration: Calibration, key: str, *, resource: str = "ms") -> str:
    """Quality of every chain against its cost as SVG: dropped chains grey, the line that mixtures of single chains can reach, the
    allocator's point in the accent colour.

    Args:
        key: distinguishes this figure from the others of its page.
        resource: "ms" or "mflop".
    """
    column = RESOURCES.index(resource)
    cost_J, worth_J = calibration.chains.costs_JC[:, column], np.nanmean(calibration.judged.rewards_RJ, axis=0)
    kept = calibration.kept_J
    dropped = np.setdiff1d(np.arange(len(cost_J)), kept)
    made, unit, word = calibration.chosen, UNITS[resource], WORTHS[calibration.config.worth]
    figure, (axis,) = empty_figure(0.8 * WIDTH, 1)
    axis.plot(cost_J[dropped], worth_J[dropped], "o", color=OTHER, alpha=0.45, markersize=4, label="dropped")
    axis.plot(cost_J[kept], worth_J[kept], "o", color=INK, markersize=4, label="chain")
    hull = np.flatnonzero(envelope(worth_J[None], cost_J)[0])
    hull = hull[np.argsort(cost_J[hull])]
    axis.plot(cost_J[hull], worth_J[hull], color=OTHER, linewidth=1, label="best mixture of chains")
    axis.plot(made.costs_C[column], made.worth, "D", color=ACCENT, markersize=7, label=made.name)
    limit = float(calibration.allocation.budget.limits_C[column])
    if np.isfinite(limit):
        axis.axvline(limit, color=INK, linestyle=":", linewidth=1)
    axis.set_xlabel(f"{unit} per request" + (" (dotted: budget)" if np.isfinite(limit) else ""))
    axis.set_ylabel(f"{word} per request")
    axis.legend(frameon=False, fontsize=8, labelcolor=INK)
    words = ", ".join(f"{n} {c:.3f} {unit} {w:.4f}" for n, c, w in zip(calibration.chains.names, cost_J, worth_J))
    alt = f"{word} against {unit} per request: {words}; {made.name} {made.costs_C[column]:.3f} {unit} {made.worth:.4f}."
    return inline(figure, alt=alt, key=key)


def _cells(account: Account, standard: Account) -> list[str]:
    share = f"{account.worth / standard.worth - 1:+.1%}" if standard.worth else "-"
    return [*(f"{cost:.3f}" for cost in account.costs_C.tolist()), f"{account.worth:.4f}", share]
