"""Generative training: outcomes at all positions of one sequence per user, beside one row per impression, in examples per second.

    python benchmarks/generative_training.py            # prints a table, writes benchmarks/results/generative_training.json

One model, interleaved tokens, the same examples: every event of a user of 200 events, with all events before it, and whether it was
liked. That the arms compute the same loss is checked before anything is timed. A step is forward, backward and Adam.

    one row per impression     each example a request with its own history and one candidate
    ten targets per row        as the authors' ranking example: ten impressions share the history before the first of them, so they
                               are not quite the same examples
    one sequence per user      all examples of a user in one pass

B rows of a step, t examples of a step.
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
from shortlist.layers.hstu import HSTUBlockConfig
from shortlist.layers.scoring import HeadConfig
from shortlist.models.base import Losses
from shortlist.models.ranking.hstu_ranker import HSTURanker, HSTURankerConfig

NUM_ITEMS, ACTIONS = 3_706, ("pass", "like")
RESULT = Path(__file__).parent / "results" / "generative_training.json"


def model_of(dim: int, layers: int, length: int) -> HSTURanker:
    """Without dropout, so that the arms can be compared; it would cost all of them the same share."""
    torch.manual_seed(0)
    config = HSTURankerConfig(
        dim=dim,
        tokens="interleaved",
        learning="generative",
        max_history=length,
        layers=HSTUBlockConfig(num_blocks=layers, block_dropout=0.0),
        dropout=0.0,
        id_dropout=0.0,
        head=HeadConfig(widths=(64,), activation="relu", dropout=0.0, id_dropout=0.0, loss="bce"),
    )
    known = torch.arange(NUM_ITEMS + 1) > 0
    space = Space(items=FieldTable(NUM_ITEMS + 1), known_items=known, num_users=1, tasks=("like",), actions=ACTIONS)
    return HSTURanker(config, space)


def sequences(num_users: int, length: int) -> Batch:
    """Users with `length` events each, items by a Zipf law."""
    draw = torch.Generator().manual_seed(1)
    share = 1 / torch.arange(10, NUM_ITEMS + 10, dtype=torch.float64)
    total = num_users * length
    item = torch.multinomial(share, total, replacement=True, generator=draw) + 1
    time_ = torch.randint(60, 200_000, (num_users, length), generator=draw).cumsum(1)
    history = History(
        items=Jagged.from_lengths(item, torch.full((num_users,), length)),
        time=time_.flatten(),
        action=torch.randint(1, 3, (total,), generator=draw),
        value=torch.ones(total),
        group=torch.arange(total),
    )
    return Batch(user=torch.ones(num_users, dtype=torch.int64), time=time_[:, -1] + 60, history=history)


def impressions(whole: Batch, user: Tensor, place: Tensor, targets: int) -> Batch:
    """Requests [B] of the given users, with the events before `place` as history and the `targets` from there on as candidates."""
    history, length = whole.history, int(whole.history.items.lengths[0])
    first = user * length
    past = Jagged.from_lengths(torch.zeros(int(place.sum()), dtype=torch.int64), place)
    index = first[past.row_of_value] + past.position_of_value
    asked = (first + place)[:, None] + torch.arange(targets)
    cut = History(
        items=past.with_values(history.items.values[index]),
        time=history.time[index],
        action=history.action[index],
        value=history.value[index],
        group=history.group[index],
    )
    rows = Jagged.from_lengths(history.items.values[asked].flatten(), torch.full((len(user),), targets))
    return Batch(
        user=whole.user[user],
        time=history.time[first + place],
        history=cut,
        candidates=Candidates(rows=rows),
        labels={"like": (history.action[asked].flatten() == 2).float()},
    )


def check(model: HSTURanker, length: int) -> float:
    """The difference of the mean loss over all examples of two users between the arms; an assertion where it is above 1e-5."""
    whole = sequences(2, length)
    user, place = torch.arange(2).repeat_interleave(length), torch.arange(length).repeat(2)
    with torch.no_grad():
        one = float(model.generative_losses(whole)["like"])
        parts = [
            float(model.losses(impressions(whole, user[part], place[part], 1))["like"]) * len(part)
            for part in torch.arange(2 * length).split(100)
        ]
    other = sum(parts) / (2 * length)
    assert abs(one - other) < 1e-5, f"the arms do not compute the same loss: {one} and {other}"
    return abs(one - other)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="timed steps per arm")
    parser.add_argument("--users", type=int, default=16, help="sequences per step")
    parser.add_argument("--rows", type=int, default=64, help="impressions, or rows of ten, per step")
    parser.add_argument("--length", type=int, default=200)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument(
        "--quick", action="store_true", help="short, one step; nothing is written unless --out is given"
    )
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.quick:
        given.rounds, given.users, given.rows, given.length, given.dim = 1, 4, 16, 40, 16
    torch.set_num_threads(given.threads)
    model = model_of(given.dim, given.layers, given.length).train()
    difference = check(model, given.length)

    draw = torch.Generator().manual_seed(2)
    whole = sequences(given.users, given.length)

    def drawn(targets: int) -> Batch:
        user = torch.randint(given.users, (given.rows,), generator=draw)
        place = torch.randint(given.length - targets + 1, (given.rows,), generator=draw)
        return impressions(whole, user, place, targets)

    ones, tens = drawn(1), drawn(10)
    arms: dict[str, tuple[int, Callable[[], Losses]]] = {
        "one row per impression": (given.rows, lambda: model.losses(ones)),
        "ten targets per row": (10 * given.rows, lambda: model.losses(tens)),
        "one sequence per user": (given.users * given.length, lambda: model.generative_losses(whole)),
    }
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-5)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    with machine_lock():
        for turn in range(given.rounds + 1):
            for name, (_, losses) in arms.items():
                began = time.perf_counter()
                optimiser.zero_grad()
                losses()["like"].backward()
                optimiser.step()
                if turn:  # the first round warms up
                    seconds[name].append(time.perf_counter() - began)

    rate = {name: arms[name][0] / median(times) for name, times in seconds.items()}
    base = rate["one row per impression"]
    table = []
    print(f"length {given.length}, {given.layers} layers, width {given.dim}: the same loss to {difference:.0e}")
    for name, times in seconds.items():
        row = {
            "arm": name,
            "examples_per_step": arms[name][0],
            "ms_per_step": round(1e3 * median(times), 1),
            "examples_per_second": round(rate[name], 1),
            "speed_against_rows": round(rate[name] / base, 1),
        }
        print(f"{name:26} {row['examples_per_second']:12,} examples/s {row['speed_against_rows']:8}x")
        table.append(row)
    settings = {name: value for name, value in vars(given).items() if name not in ("quick", "out")}
    figures = {"settings": settings, "difference_of_loss": difference, "arms": table}
    written = record(RESULT, figures, quick=given.quick, out=given.out)
    print(f"written to {written}" if written else "quick: nothing written")


if __name__ == "__main__":
    main()
