"""Rankers of the DIN family: a request of many candidates, fused against the straightforward forms, in one run.

    python benchmarks/target_attention.py       # prints two tables, writes benchmarks/results/target_attention.json

First DIN's attention alone: candidate by candidate, all pairs through the formula as it stands, and the fused form, for one request of
256 candidates over 100 events and for a training step. Then whole requests of DIN, DIEN, DSIN and BST: every candidate as a request of its
own, all candidates together, and together with the user's side remembered. All forms agree before anything is timed. Arms take turns, so
that a busy moment hits all of them.

B requests, C candidates of one, L events of the past, D width, p pairs of candidate and event.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from shortlist.data.batches import Batch, Candidates, History
from shortlist.data.jagged import Jagged
from shortlist.data.schema import FieldTable, Space
from shortlist.evaluation.benchmarks import record
from shortlist.evaluation.evidence import machine_lock
from shortlist.models.base import Ranker, RequestShape
from shortlist.models.ranking.bst import BST, BSTConfig
from shortlist.models.ranking.dien import DIEN, DIENConfig
from shortlist.models.ranking.din import DIN, DINConfig, DINState
from shortlist.models.ranking.dsin import DSIN, DSINConfig

NUM_ITEMS = 10_000
RESULT = Path(__file__).parent / "results" / "target_attention.json"


def space_of() -> Space:
    """A catalogue without fields."""
    return Space(items=FieldTable(NUM_ITEMS + 1), known_items=torch.arange(NUM_ITEMS + 1) > 0, num_users=1_000)


def requests(B: int, C: int, L: int, seed: int = 0) -> Batch:
    """Requests with pasts of L events, ten minutes apart with a pause after every eighth."""
    draw = torch.Generator().manual_seed(seed)
    past = Jagged.from_lengths(torch.randint(1, NUM_ITEMS + 1, (B * L,), generator=draw), torch.full((B,), L))
    place = past.position_of_value
    offered = torch.randint(1, NUM_ITEMS + 1, (B * C,), generator=draw)
    label = torch.zeros(B, C)
    label[:, 0] = 1
    return Batch(
        user=torch.arange(1, B + 1),
        time=torch.full((B,), 600 * L + 86_400 * (L // 8 + 1)),
        history=History(
            items=past,
            time=600 * place + 86_400 * (place // 8),
            action=torch.ones(B * L, dtype=torch.int64),
            value=torch.ones(B * L),
            group=torch.arange(B * L),
        ),
        candidates=Candidates(rows=Jagged.from_lengths(offered, torch.full((B,), C))),
        labels={"target": label.flatten()},
    )


def all_pairs(model: DIN, state: DINState, items: Jagged) -> Tensor:
    """DIN's attention as libraries write it: candidates and past repeated to all pairs, [q, k, q - k, q * k] laid out in full."""
    item_BCD, is_item_BC = items.padded()
    shape = (*is_item_BC.shape, state.past_BLD.shape[1], item_BCD.shape[2])
    query, key = item_BCD[:, :, None].expand(shape), state.past_BLD[:, None].expand(shape)
    output_BCL = model.unit.plain(query.reshape(-1, shape[3]), key.reshape(-1, shape[3])).view(shape[:3])
    is_pair_BLC = state.is_real_BL[:, :, None] & is_item_BC[:, None, :]
    weight_BLC = model._weights(output_BCL.transpose(1, 2), is_pair_BLC)
    return (weight_BLC.transpose(1, 2) @ state.past_BLD)[is_item_BC]


def timed(arms: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round of each arm, in turns, after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for step in range(rounds + 1):
        for name, run in arms.items():
            started = time.perf_counter()
            run()
            if step:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def table(seconds: dict[str, list[float]], base: str) -> list[dict[str, object]]:
    """Milliseconds and speed against one arm; printed too."""
    against = median(seconds[base])
    rows = []
    for name, times in seconds.items():
        ms, speed = 1e3 * median(times), against / median(times)
        print(f"  {name:44} {ms:10.3f} ms {speed:8.1f} x")
        rows.append(
            {"arm": name, "ms": round(ms, 3), "fastest_ms": round(1e3 * min(times), 3), "speed": round(speed, 2)}
        )
    return rows


def agree(values: dict[str, Tensor]) -> float:
    """The largest difference between any form and the first; an AssertionError above 1e-5 of the largest value."""
    first = next(iter(values.values()))
    gap = max(float((value - first).abs().max()) for value in values.values())
    assert gap <= 1e-5 * max(1.0, float(first.abs().max())), f"the forms differ by {gap}"
    return gap


def attention_alone(rounds: int, C: int, L: int, dim: int) -> dict[str, object]:
    """DIN's interest for one request, and forward with backward for a batch of 64 requests of 16 candidates."""
    torch.manual_seed(0)
    model = DIN(DINConfig(dim=dim, max_history=L), space_of()).eval()
    batch = requests(1, C, L)
    with torch.no_grad():
        state, rows = model.user_state(batch), batch.candidate_rows
        items = rows.with_values(model.items(rows.values))
        forms: dict[str, Callable[[], Tensor]] = {
            "candidate by candidate": lambda: model.plain_interest(state, items),
            "all pairs laid out": lambda: all_pairs(model, state, items),
            "fused": lambda: model.interest(state, items),
        }
        gap = agree({name: form() for name, form in forms.items()})
        print(f"DIN's attention, one request, {C} candidates, {L} events (forms agree to {gap:.1e})")
        serving = table(timed(dict(forms), rounds), "candidate by candidate")

    many = requests(8 if rounds < 3 else 64, 16, L)
    model.train()

    def step(form: Callable[[DINState, Jagged], Tensor]) -> None:
        model.zero_grad()
        state, rows = model.user_state(many), many.candidate_rows
        form(state, rows.with_values(model.items(rows.values))).sum().backward()

    print(f"DIN's attention, forward and backward, {many.size} requests of 16 candidates")
    arms = {
        "all pairs laid out": lambda: step(lambda state, items: all_pairs(model, state, items)),
        "fused": lambda: step(model.interest),
    }
    training = table(timed(dict(arms), rounds), "all pairs laid out")
    return {"candidates": C, "events": L, "largest_difference": gap, "serving": serving, "training": training}


def whole_request(name: str, model: Ranker, rounds: int, C: int, L: int) -> dict[str, object]:
    """One request of C candidates through a whole model."""
    model.eval()
    batch = requests(1, C, L)
    singles = [batch.with_candidates(Jagged(row[None], torch.tensor([0, 1]))) for row in batch.candidate_rows.values]
    assert batch.candidates is not None
    candidates = batch.candidates
    with torch.no_grad():
        state = model.user_state(batch)
        forms: dict[str, Callable[[], Tensor]] = {
            "each candidate a request": lambda: torch.cat([model.score(single)["target"] for single in singles]),
            "together": lambda: model.score(batch)["target"],
            "together, user's side at hand": lambda: model.score_candidates(state, candidates)["target"],
        }
        if isinstance(model, DIEN):
            _, kept = model.recall(batch, [None])
            forms["together, from memory"] = lambda: model.score_candidates(model.recall(batch, kept)[0], candidates)[
                "target"
            ]
        gap = agree({form: run() for form, run in forms.items()})
        print(f"{name}, whole request, {C} candidates, {L} events (forms agree to {gap:.1e})")
        rows = table(timed(dict(forms), rounds), "each candidate a request")
    cost = model.cost(RequestShape(num_history=L, num_candidates=C))
    mflop = {"user_mflop": cost.user_flops / 1e6, "candidates_mflop": C * cost.item_flops / 1e6}
    return {"system": name, "candidates": C, "events": L, "largest_difference": gap, "arms": rows, **mflop}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds per arm")
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument(
        "--quick", action="store_true", help="few candidates, two rounds; nothing is written unless --out is given"
    )
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rounds, C, L = (2, 32, 20) if arguments.quick else (arguments.rounds, 256, 100)
    torch.set_num_threads(arguments.threads)
    space, D = space_of(), arguments.dim
    models: dict[str, tuple[Ranker, int, int]] = {
        "din": (DIN(DINConfig(dim=D, max_history=L), space), C, L),
        "dien": (DIEN(DIENConfig(dim=D, hidden=D, max_history=50), space), min(C, 100), min(L, 50)),
        "dsin": (DSIN(DSINConfig(dim=D, max_history=50), space), min(C, 100), min(L, 50)),
        "bst": (BST(BSTConfig(dim=D), space), min(C, 100), 20),
    }
    with machine_lock():
        attention = attention_alone(rounds, C, L, D)
        whole = [whole_request(name, model, rounds, *shape) for name, (model, *shape) in models.items()]
    settings = {name: value for name, value in vars(arguments).items() if name not in ("quick", "out")}
    figures = {"settings": settings, "din_attention": attention, "requests": whole}
    written = record(RESULT, figures, quick=arguments.quick, out=arguments.out)
    print(f"written to {written}" if written else "quick: nothing written")


if __name__ == "__main__":
    main()
