"""`shortlist calibrate`: what every chain of a run costs and brings becomes an allocator beside the run."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from shortlist.cli._bar import bars
from shortlist.cli._options import Json, Quiet, RunFolder, Settings


def command(
    run: RunFolder,
    budget_ms: Annotated[
        float | None, typer.Option(help="Milliseconds that a request may cost on average; default: the run's.")
    ] = None,
    budget_mflop: Annotated[
        float | None, typer.Option(help="1e6 FLOPs that a request may cost on average; default: the run's.")
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="Allocator: greenflow, dcaf, fixed ...; default: the run's.")
    ] = None,
    max_requests: Annotated[
        int | None, typer.Option(help="Validation requests that are answered by every chain.")
    ] = None,
    settings: Settings = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")] = False,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Time every chain of a run and replay the validation window by each, then fit the allocator that the run's [allocation] names.

    The result stands beside the run, in RUN.allocation, and belongs to this version of it: after training again, calibrate again. With
    --set, only settings of allocation can be changed; stages and their offers need another training.

    Example: shortlist calibrate RUN --budget-ms 1.5
    """
    from shortlist.cascade.allocation.calibration import allocation_path, calibrate, save_allocation
    from shortlist.cascade.run import load_run
    from shortlist.errors import ConfigError
    from shortlist.evaluation.chains import account_table, chain_table, sentence
    from shortlist.evaluation.chains import markdown as as_markdown
    from shortlist.evaluation.tables import aligned
    from shortlist.store.snapshot import check_writable

    given = {"system": system, "budget_ms": budget_ms, "budget_mflop": budget_mflop, "max_requests": max_requests}
    changes = [*(settings or ()), *(f"allocation.{name}={value}" for name, value in given.items() if value is not None)]
    for change in changes:
        if not change.startswith("allocation."):
            raise ConfigError(
                f"--set {change} is no setting of the allocation; change it in the run's settings and train again"
            )
    folder = run.absolute()
    out = allocation_path(folder)
    loaded = load_run(folder)
    check_writable(out)
    loaded = replace(loaded, config=loaded.config.override(*changes))
    with bars(shown=not quiet) as tell:
        found = calibrate(loaded, tell=tell)
    save_allocation(out, found)
    if json_:
        typer.echo((out / "summary.json").read_text().rstrip())
        return
    tables = (chain_table(found, loaded.config), account_table(found))
    parts = [as_markdown(rows) if markdown else "\n".join(aligned(rows)) for rows in tables]
    agreement = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in found.costs.agreement.items())
    typer.echo(
        "\n\n".join(
            [*parts, sentence(found), f"Rank correlation of costs: {agreement}.", f"The allocation is in {out}."]
        )
    )
