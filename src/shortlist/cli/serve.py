"""`shortlist serve`: a trained run behind HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shortlist.cli._options import Threads


def command(
    run: Annotated[
        Path,
        typer.Argument(help="Folder of a run, or a place of `shortlist publish`, whose current run is followed."),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 = any free one.")] = 8000,
    events: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|URL",
            help="SQLite file for events, or postgresql://user:password@host/name for several servers; "
            "default: RUN.events.db beside the run.",
        ),
    ] = None,
    memories: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|URL",
            help="File in which what systems remember of users outlasts a restart, or redis://host:6379/0 to share it "
            "among servers; default: it is forgotten.",
        ),
    ] = None,
    memory_mib: Annotated[
        int, typer.Option(min=0, help="Bound of what systems remember of users in this process, in MiB.")
    ] = 256,
    memories_mib: Annotated[
        int, typer.Option(min=1, help="Bound of the file or the Redis of --memories, in MiB.")
    ] = 1_024,
    request_log: Annotated[
        Path | None, typer.Option(help="SQLite file for the request log; default: RUN.requests.db beside the run.")
    ] = None,
    deadline_ms: Annotated[
        float | None, typer.Option(help="Time after which no stage is waited for; default: wait.")
    ] = None,
    time_limit_ms: Annotated[
        float | None, typer.Option(help="Time within which a page is given or refused; default: wait.")
    ] = None,
    at_once: Annotated[int, typer.Option(help="Batches of requests worked on at once; others wait.")] = 2,
    max_batch: Annotated[int, typer.Option(help="Requests that wait together and are answered in one pass.")] = 16,
    allocate: Annotated[
        bool, typer.Option(help="Let the calibrated allocator choose chains (shortlist calibrate).")
    ] = True,
    budget_ms: Annotated[
        float | None, typer.Option(help="Milliseconds that a request may cost on average; default: as calibrated.")
    ] = None,
    budget_mflop: Annotated[
        float | None, typer.Option(help="1e6 FLOPs that a request may cost on average; default: as calibrated.")
    ] = None,
    capacity_ms: Annotated[
        float | None,
        typer.Option(help="Milliseconds of work that all requests of a second may cost; prices then follow traffic."),
    ] = None,
    target_ms: Annotated[
        float | None, typer.Option(help="Latency to keep to under overload, by giving up the dearest chains first.")
    ] = None,
    keys: Annotated[
        Path | None, typer.Option(help="File of API keys (shortlist keys); needed to listen beyond this machine.")
    ] = None,
    admin_port: Annotated[
        int | None,
        typer.Option(help="Port that /metrics, /v1/admin and /v1/experiments move to; default: none of their own."),
    ] = None,
    admin_host: Annotated[str, typer.Option(help="Address of that port.")] = "127.0.0.1",
    cors: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Site whose web pages may ask, such as https://shop.example; repeat."),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Requests a second that one key, or one address, may keep up; default: any.")
    ] = None,
    burst: Annotated[
        int | None, typer.Option(help="Requests that one caller may send at once; default: those of two seconds.")
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that share the port, the events and the snapshot.")
    ] = 1,
    experiments: Annotated[
        Path | None, typer.Option(metavar="FILE", help="TOML file with [experiments.NAME] to run.")
    ] = None,
    shadow: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Another run that answers a share of the traffic unseen.")
    ] = None,
    shadow_share: Annotated[float, typer.Option(help="Share of the requests that the shadow run answers too.")] = 0.1,
    admin: Annotated[
        bool, typer.Option("--admin", help="Offer /v1/admin: see and change the snapshot that is served.")
    ] = False,
    log_requests: Annotated[
        bool, typer.Option("--log-requests", help="Log a JSON line per request, without personal data.")
    ] = False,
    threads: Threads = None,
) -> None:
    """Serve a trained run over HTTP until it is told to stop (Ctrl-C or SIGTERM).

    Example: shortlist serve RUN --port 8000
    """
    from shortlist.errors import ConfigError
    from shortlist.serving.settings import ServerConfig, bind, bind_admin
    from shortlist.serving.workers import Opening, serve, serve_many

    config = ServerConfig(
        host=host,
        port=port,
        keys=keys,
        admin_port=admin_port,
        admin_host=admin_host,
        cors=tuple(cors or ()),
        rate_per_s=rate,
        burst=burst,
        admin=admin,
        log_requests=log_requests,
        num_workers=at_once,
        max_batch=max_batch,
        time_limit_ms=time_limit_ms,
    )
    if memories is not None and "://" not in memories and workers > 1:
        raise ConfigError("a file of memories belongs to one process; with --workers give --memories redis://...")
    folder = run.absolute()
    opening = Opening(
        folder=folder,
        # Beside the run and not in it: a run is replaced as a whole when it is trained again.
        events=events or folder.with_name(f"{folder.name}.events.db"),
        request_log=request_log or folder.with_name(f"{folder.name}.requests.db"),
        config=config,
        memories=memories,
        memory_mib=memory_mib,
        memories_mib=memories_mib,
        deadline_ms=deadline_ms,
        allocate=allocate,
        budget_ms=budget_ms,
        budget_mflop=budget_mflop,
        capacity_ms=capacity_ms,
        target_ms=target_ms,
        experiments=experiments,
        shadow=shadow,
        shadow_share=shadow_share,
    )
    # The ports first, since a taken one should not cost the time that loading takes.
    with bind(config) as listener, bind_admin(config) as inner:
        if workers == 1:
            serve(opening, listener, inner, typer.echo)
        else:
            serve_many(opening, listener, inner, workers, typer.echo)
