"""M-FALCON: many candidates behind one history, in micro-batches over kept keys and values, beside scoring them one by one.

    python benchmarks/m_falcon.py            # prints tables, writes benchmarks/results/m_falcon.json

All arms are the same model with the same weights; that they give the same scores is checked before anything is timed. Arms take
turns, so that a busy moment hits all of them.

    one by one                 per candidate the whole history and the candidate behind it
    batched, not cached        per micro-batch the whole history and the micro-batch behind it
    batched, cached            the history once, then only the micro-batches
    second request, memory     the same user one event later: one event and the micro-batches

n history events, m candidates, b micro-batch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from shortlist.data.batches import Batch, Candidates, History
from shortlist.data.jagged import Jagged
from shortlist.data.schema import FieldTable, Space
from shortlist.evaluation.benchmarks import record
from shortlist.evaluation.evidence import machine_lock
from shortlist.layers.hstu import HSTUBlockConfig
from shortlist.models.base import Memory, RequestShape
from shortlist.models.ranking.hstu_ranker import HSTURanker, HSTURankerConfig

NUM_ITEMS, ACTIONS = 10_000, ("view", "like", "buy")
RESULT = Path(__file__).parent / "results" / "m_falcon.json"
EXACT = 1e-5
Arms = dict[str, Callable[[], Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """What is timed."""

    tokens: str
    layers: int
    history: int
    candidates: int
    dim: int
    heads: int
    requests: int = 1
    micro_batch: int = 128


def model_of(size: Size) -> HSTURanker:
    """The ranker with random weights, biases of the order of a trained one's."""
    torch.manual_seed(0)
    block = HSTUBlockConfig(num_blocks=size.layers, num_heads=size.heads)
    config = HSTURankerConfig(
        dim=size.dim,
        tokens=size.tokens,  # type: ignore[arg-type]
        max_history=size.history + 1,
        learning="both",  # so that the next item's score is part of the logits
        layers=block,
        micro_batch=size.micro_batch,
    )
    known = torch.arange(NUM_ITEMS + 1) > 0
    space = Space(items=FieldTable(NUM_ITEMS + 1), known_items=known, num_users=1, actions=ACTIONS)
    model = HSTURanker(config, space).eval()
    spread = {"project.weight": 0.1, "position_bias": 0.5, "time_bias": 0.5}
    for name, parameter in model.stack.named_parameters():
        for ending, std in spread.items():
            if name.endswith(ending):
                torch.nn.init.normal_(parameter, std=std)
    return model


def requests_of(size: Size, num_events: int) -> Batch:
    """Requests whose histories are the first `num_events` of longer ones, the request an hour after."""
    draw = torch.Generator().manual_seed(1)
    shape = (size.requests, size.history + 1)
    item = torch.randint(1, NUM_ITEMS + 1, shape, generator=draw)
    gap = torch.randint(60, 400_000, shape, generator=draw)
    action = torch.randint(1, len(ACTIONS) + 1, shape, generator=draw)
    moment = gap.cumsum(1)
    lengths = torch.full((size.requests,), num_events)
    history = History(
        items=Jagged.from_lengths(item[:, :num_events].flatten(), lengths),
        time=moment[:, :num_events].flatten(),
        action=action[:, :num_events].flatten(),
        value=torch.ones(size.requests * num_events),
        group=torch.arange(size.requests * num_events),
    )
    offered = torch.randint(1, NUM_ITEMS + 1, (size.requests * size.candidates,), generator=draw)
    rows = Jagged.from_lengths(offered, torch.full((size.requests,), size.candidates))
    time_B = moment[:, num_events - 1] + 3_600
    return Batch(user=torch.ones(size.requests, dtype=torch.int64), time=time_B, history=history).with_candidates(rows)


def part_of(rows: Jagged, first: int, count: int) -> Candidates:
    """The candidates at places first .. first + count of every request."""
    place = rows.position_of_value
    lengths = (rows.lengths - first).clamp(0, count)
    return Candidates(rows=Jagged.from_lengths(rows.values[(place >= first) & (place < first + count)], lengths))


def arms_of(model: HSTURanker, size: Size) -> tuple[Arms, Arms]:
    """The arms of a first request and those of the second, each giving scores [requests, candidates]."""
    first, second = requests_of(size, size.history), requests_of(size, size.history + 1)
    task = model.space.tasks[0]

    def alone(batch: Batch, count: int) -> Tensor:
        assert batch.candidates is not None
        parts = [
            model.score_candidates(model.user_state(batch), part_of(batch.candidates.rows, start, count))[task]
            for start in range(0, size.candidates, count)
        ]
        return torch.cat([part.view(size.requests, -1) for part in parts], dim=1)

    def cached(batch: Batch) -> Tensor:
        return model.score(batch)[task].view(size.requests, -1)

    kept: list[Memory | None] = model.recall(first, [None] * size.requests)[1]

    def remembered() -> Tensor:
        state, _ = model.recall(second, kept)
        assert second.candidates is not None
        return model.score_candidates(state, second.candidates)[task].view(size.requests, -1)

    firsts = {
        "one by one": lambda: alone(first, 1),
        "batched, not cached": lambda: alone(first, size.micro_batch),
        "batched, cached": lambda: cached(first),
    }
    seconds = {"second request, anew": lambda: cached(second), "second request, memory": remembered}
    return firsts, seconds


def check(arms: Arms) -> float:
    """The largest difference between an arm and the first one, in standard deviations of the scores; above EXACT an assertion."""
    reference, *others = (arm() for arm in arms.values())
    worst = max(float((other - reference).abs().max() / reference.std()) for other in others)
    assert worst <= EXACT, f"the arms do not give the same scores: they differ by {worst:.1e} standard deviations"
    return worst


def timed(arms: Arms, rounds: int, slow: str | None = None) -> dict[str, float]:
    """Median milliseconds by arm, arms taking turns; the arm `slow` runs in the first two rounds alone."""
    spent: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds):
        for name, arm in arms.items():
            if name == slow and turn > 1:
                continue
            began = time.perf_counter()
            arm()
            spent[name].append(1e3 * (time.perf_counter() - began))
    return {name: median(times) for name, times in spent.items()}


def measured(size: Size, rounds: int) -> dict[str, object]:
    """One size: exactness, times, and what the stated cost says of them."""
    model = model_of(size)
    firsts, seconds = arms_of(model, size)
    worst = max(check(firsts), check(seconds))
    ms = timed({**firsts, **seconds}, rounds, slow="one by one")
    shape = RequestShape(num_history=size.history, num_candidates=size.candidates, num_items=NUM_ITEMS)
    cost, cached = model.cost(shape), model.cost(shape, cached=True)
    row: dict[str, object] = {
        "tokens": size.tokens,
        "layers": size.layers,
        "requests": size.requests,
        "largest_difference": worst,
        "ms": {name: round(value, 2) for name, value in ms.items()},
        "speed_against_one_by_one": round(ms["one by one"] / ms["batched, cached"], 1),
        "speed_of_memory": round(ms["second request, anew"] / ms["second request, memory"], 2),
        "mflop": {
            "one by one": round(size.candidates * (cost.user_flops + cost.item_flops) / 1e6, 1),
            "batched, cached": round(cost.flops(size.candidates) / 1e6, 1),
            "second request, memory": round(cached.flops(size.candidates) / 1e6, 1),
        },
    }
    print(f"{size.tokens}, {size.layers} layers, {size.requests} request(s): largest difference {worst:.1e}")
    for name, value in ms.items():
        print(f"    {name:26} {value:10.2f} ms")
    print(f"    {row['speed_against_one_by_one']}x one by one; memory {row['speed_of_memory']}x anew")
    return row


def sweep(size: Size, rounds: int) -> dict[str, float]:
    """Milliseconds of a whole request by micro-batch."""
    model = model_of(size)
    batch = requests_of(size, size.history)
    reference = model.score(batch)[model.space.tasks[0]]
    arms: Arms = {}
    for width in sorted({1, 8, 32, 64, 128, size.candidates}):
        other = HSTURanker(replace(model.config, micro_batch=width), model.space).eval()
        other.load_state_dict(model.state_dict())
        arms[str(width)] = lambda other=other: other.score(batch)[model.space.tasks[0]]  # type: ignore[misc]
    check({"reference": lambda: reference, **arms})
    ms = {width: round(value, 2) for width, value in timed(arms, rounds, slow="1").items()}
    print(f"milliseconds by micro-batch, {size.tokens}, {size.layers} layers: {ms}")
    return ms


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timed turns per arm")
    parser.add_argument("--history", type=int, default=512)
    parser.add_argument("--candidates", type=int, default=256)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument(
        "--quick", action="store_true", help="small, two turns; nothing is written unless --out is given"
    )
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.quick:
        given.rounds, given.history, given.candidates, given.dim = 2, 64, 32, 16
    torch.set_num_threads(given.threads)
    base = Size(
        tokens="merged",
        layers=2,
        history=given.history,
        candidates=given.candidates,
        dim=given.dim,
        heads=given.heads,
        micro_batch=min(128, given.candidates // 2),
    )
    sizes = [base, replace(base, layers=4), replace(base, tokens="interleaved"), replace(base, requests=4)]
    with machine_lock():
        table = [measured(size, given.rounds) for size in sizes]
        swept = [{"layers": layers, "ms": sweep(replace(base, layers=layers), given.rounds)} for layers in (2, 4)]
    settings = {name: value for name, value in vars(given).items() if name not in ("quick", "out")}
    written = record(RESULT, {"settings": settings, "arms": table, "sweep": swept}, quick=given.quick, out=given.out)
    print(f"written to {written}" if written else "quick: nothing written")


if __name__ == "__main__":
    main()
