"""VISTA at a request against full target attention, from 500 to 1,000,000 past events; and what a refresh costs.

    python benchmarks/vista_serving.py            # prints tables, writes benchmarks/results/vista_serving.json

One user per length of history. Arms, for one request with its candidates. Within an arm the lengths take turns, so that a busy moment
and whatever the last work left in the processor's caches hit all lengths alike:

    cached    VISTA: the summary's record is found in a memory-mapped file, the newest events are read raw, candidates are scored
    encoded   VISTA without a summary: the whole history is streamed through the encoder first
    full      the same embeddings and the same stage 2 with every event as a token

`engine` is the whole way of a request with a cascade of popularity and VISTA: reading the past, retrieval, ranking, page; `swept` is
the same after 128 MiB of other work, so that nothing of the person is left in the caches, as on a server of many. The weights are not
trained: neither time nor bytes depend on them. Refresh: all users of a generated log, from memory-mapped arrays to the file in its
place. Encoder: quasi-linear attention alone beside softmax attention over the same events, forward, by length.

n events, D width, H heads, d = D / H, K summary tokens.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from shortlist.cascade.cascade import Cascade, stage_space
from shortlist.cascade.config import RunConfig
from shortlist.cascade.engine import Engine
from shortlist.cascade.live import Live
from shortlist.cascade.summaries import refresh, summary_path, whole_histories
from shortlist.data.dataset import Dataset, build_dataset
from shortlist.data.histories import Histories
from shortlist.data.jagged import Jagged
from shortlist.data.log import read
from shortlist.data.splits import DataConfig
from shortlist.evaluation.benchmarks import record
from shortlist.evaluation.evidence import machine_lock
from shortlist.layers.quasi_linear import quasi_linear_attention
from shortlist.models.base import RequestShape
from shortlist.models.ranking.vista import VISTA
from shortlist.store.summaries import SummaryStore

RESULT = Path(__file__).parent / "results" / "vista_serving.json"
LENGTHS = (500, 5_000, 50_000, 1_000_000)
NUM_ITEMS, SHORT_USERS = 5_000, 2_000
SWEPT_BYTES = 128 << 20
"""Read before each request of the arm `swept`: more than any cache holds."""
_K = TypeVar("_K")
RUN = """
[surface]
k = 10
repeats = "yes"
[stages.retrieval]
systems = ["popularity"]
keep = 100
[stages.ranking]
systems = ["vista"]
[systems.vista]
dim = 32
num_seeds = 32
max_history = 500
num_recent = 50
"""


def shop(lengths: tuple[int, ...], short_users: int) -> Dataset:
    """A log with one user per length and many short ones; items by a Zipf law, an event a minute."""
    import polars as pl

    rng = np.random.default_rng(0)
    sizes = np.concatenate([lengths, np.exp(rng.normal(4.5, 1.0, short_users)).clip(5, 5_000).astype(np.int64)])
    total = int(sizes.sum())
    share = 1 / np.arange(10, NUM_ITEMS + 10)
    user = np.repeat(np.arange(len(sizes)), sizes)
    place = np.arange(total) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    frame = pl.DataFrame(
        {
            "user_id": user,
            "item_id": rng.choice(NUM_ITEMS, total, p=share / share.sum()),
            "timestamp": 1_700_000_000 - 60 * (np.repeat(sizes, sizes) - place),
        }
    )
    return build_dataset(read(frame), DataConfig(repeats="yes", max_requests=1_000))


def served(dataset: Dataset, folder: Path) -> Live:
    """A cascade of popularity and VISTA over the log, not trained."""
    config = RunConfig.from_toml(RUN)
    view = dataset.view("end")
    systems = {}
    for stage in config.stages:
        for name in stage.systems:
            choice = config.systems[name]
            torch.manual_seed(0)
            systems[name] = choice.entry.cls(choice.settings, stage_space(config, view.space, stage.name))
            systems[name].prepare(view)
    return Live(dataset, Cascade(config, view.space, systems), "benchmark", folder)


def timed(
    arms: Mapping[_K, Callable[[], Any]], rounds: int, before: Callable[[], Any] = lambda: None
) -> dict[_K, tuple[float, float]]:
    """Median and fastest milliseconds per arm; arms take turns, the first round warms up; over 2 s, three rounds are enough.

    `before` is done before each of them, and not timed.
    """
    seconds: dict[_K, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name, work in arms.items():
            if turn > 3 and seconds[name][0] > 2:
                continue
            before()
            started = time.perf_counter()
            work()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: (1e3 * median(times), 1e3 * min(times)) for name, times in seconds.items()}


def at_length(
    live: Live, model: VISTA, store: SummaryStore, engine: Engine, user: int, num_candidates: int
) -> dict[str, Callable[[], Any]]:
    """The arms for one user."""
    rows = live.users([user])
    whole = whole_histories(live, [user], rows, None)
    newest = replace(whole, history=whole.history.last(model.max_history))
    drawn = torch.randperm(live.dataset.num_items, generator=torch.Generator().manual_seed(user))[:num_candidates] + 1
    candidates = Jagged.from_lengths(drawn, torch.tensor([num_candidates]))
    zeros = {f.name: torch.zeros(num_candidates) for f in model.space.pair_fields}
    asked = newest.with_candidates(candidates, zeros).candidates
    assert asked is not None

    def cached() -> Any:
        state, _ = model.recall(newest, store.get([str(user)]))
        return model.score_candidates(state, asked)

    def encoded() -> Any:
        return model.score_candidates(model.state(model.stream(whole.history), newest), asked)

    def full() -> Any:
        kept, model.max_history = model.max_history, 1 << 40
        try:
            return model.score_candidates(model.full_state(whole), asked)
        finally:
            model.max_history = kept

    def whole_way() -> Any:
        return engine.recommend(user)

    return {"cached": cached, "encoded": encoded, "full": full, "engine": whole_way, "swept": whole_way}


def full_flops(model: VISTA, length: int, num_candidates: int) -> float:
    """FLOPs of attention of all candidates over all events, and of their keys and values."""
    attention = model.attention
    return num_candidates * (attention.candidate_flops + 4 * model.config.dim * length) + length * attention.token_flops


def encoder_table(lengths: tuple[int, ...], rounds: int) -> list[dict[str, float]]:
    """Attention alone, forward, one history, 2 heads of 16: quasi-linear against PyTorch's fused softmax attention."""
    table = []
    for n in lengths:
        q, k, v = (torch.randn(2, n, 16) for _ in range(3))
        arms: dict[str, Callable[[], Any]] = {
            "quasi-linear": lambda q=q, k=k, v=v: quasi_linear_attention([q, k, v]),  # type: ignore[misc]
            "softmax": lambda q=q, k=k, v=v: scaled_dot_product_attention(q[None], k[None], v[None]),  # type: ignore[misc]
        }
        table.append({"events": n, **{name: round(ms, 3) for name, (ms, _) in timed(arms, rounds).items()}})
    return table


def slope(table: list[dict[str, float]], name: str) -> float:
    """Of log time over log length, by least squares."""
    x = np.log([row["events"] for row in table])
    return float(np.polyfit(x, np.log([row[name] for row in table]), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50, help="timed requests per arm and length")
    parser.add_argument("--candidates", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--quick", action="store_true", help="short histories, few rounds; nothing is written unless --out is given"
    )
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    lengths, short_users, encoder_lengths = LENGTHS, SHORT_USERS, (512, 1_024, 2_048, 4_096, 8_192, 16_384)
    if given.quick:
        given.rounds, lengths, short_users, encoder_lengths = 5, (500, 20_000), 100, (512, 2_048)
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as scratch, machine_lock(), torch.inference_mode():
        dataset = shop(lengths, short_users)
        dataset.histories.save(Path(scratch) / "histories")
        object.__setattr__(
            dataset, "histories", Histories.load(Path(scratch) / "histories")
        )  # memory-mapped, as in a run
        live = served(dataset, Path(scratch) / "run")
        model = live.cascade.systems["vista"]
        assert isinstance(model, VISTA)
        (done,) = refresh(live, Path(scratch) / "run")
        store = SummaryStore.open(summary_path(Path(scratch) / "run", "vista"), version=live.version)
        table = []
        other_work = np.ones(SWEPT_BYTES // 8)
        with Engine(live) as engine:
            arms = [at_length(live, model, store, engine, user, given.candidates) for user in range(len(lengths))]
            by_arm = {
                name: timed(
                    {length: arms[user][name] for user, length in enumerate(lengths)},
                    given.rounds,
                    before=other_work.sum if name == "swept" else lambda: None,
                )
                for name in arms[0]
            }
            for length in lengths:
                ms = {name: of_length[length] for name, of_length in by_arm.items()}
                shape = RequestShape(num_history=length, num_candidates=given.candidates)
                row = {"events": length, **{f"{name}_ms": round(value, 3) for name, (value, _) in ms.items()}}
                row |= {f"{name}_fastest": round(value, 3) for name, (_, value) in ms.items()}
                row["cached_mflop"] = round(model.cost(shape, cached=True).flops(given.candidates) / 1e6, 2)
                row["full_mflop"] = round(full_flops(model, length, given.candidates) / 1e6, 2)
                table.append(row)
        encoder = encoder_table(encoder_lengths, max(3, given.rounds // 5))
    print(f"{'events':>10}" + "".join(f"{name:>17}" for name in list(table[0])[1:]))
    for row in table:
        print(f"{row['events']:>10,}" + "".join(f"{value:>17}" for value in list(row.values())[1:]))
    growth = {name: round(table[-1][f"{name}_ms"] / table[0][f"{name}_ms"], 3) for name in by_arm}
    told = {
        "users": done.num_users,
        "events": done.num_events,
        "users_per_second": round(done.users_per_second),
        "events_per_second": round(done.events_per_second),
        "bytes_per_user": done.bytes_per_user,
    }
    slopes = {name: round(slope(encoder, name), 2) for name in ("quasi-linear", "softmax")}
    print(f"time at {lengths[-1]:,} events against {lengths[0]:,}: {growth} (bar: cached, engine and swept <= 1.1)")
    print(f"refresh: {told}")
    print(f"encoder, ms by events: {encoder}; log-log slopes {slopes}")
    figures = {
        "settings": {"rounds": given.rounds, "candidates": given.candidates, "threads": given.threads},
        "arms": table,
        "growth": growth,
        "refresh": told,
        "encoder": encoder,
        "encoder_slopes": slopes,
    }
    written = record(RESULT, figures, quick=given.quick, out=given.out)
    print(f"written to {written}" if written else "quick: nothing written")


if __name__ == "__main__":
    main()
