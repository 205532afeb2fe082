"""SASRec's training step at the shape of ML-1M: jagged and supervised positions only, beside the usual padded form, in one run.

    python benchmarks/sasrec_step.py            # prints a table, writes benchmarks/results/sasrec_step.json

All arms have the same weights, the same batches (drawn with the length profile of ML-1M: 20 to 2,314 events, median 96, cut at 200)
and, checked before anything is timed, the same loss without dropout. Arms take turns, so that a busy moment hits all of them.

B sequences, L longest, D width, P supervised positions, n items.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from shortlist.data.batches import Batch, next_event_batch
from shortlist.data.histories import Histories
from shortlist.data.jagged import Jagged
from shortlist.data.schema import FieldTable, Space
from shortlist.evaluation.benchmarks import record
from shortlist.evaluation.evidence import machine_lock
from shortlist.layers.attention import LengthClasses, causal_attention
from shortlist.models.retrieval.sasrec import SASRec, SASRecConfig

NUM_ITEMS, NUM_USERS = 3_416, 512
RESULT = Path(__file__).parent / "results" / "sasrec_step.json"


class PaddedSASRec(nn.Module):
    """The usual form: left-padded blocks through PyTorch's multi-head attention, logits for every cell of the block.

    `only_supervised` leaves the padding out of the softmax, the first thing one would improve.
    """

    def __init__(self, model: SASRec, *, only_supervised: bool = False) -> None:
        super().__init__()
        self.model = model
        self.only_supervised = only_supervised
        self.attentions = nn.ModuleList()
        for block in model.blocks:
            ours, D = block.attention, model.config.dim
            theirs = nn.MultiheadAttention(D, model.config.num_heads, batch_first=True)
            with torch.no_grad():
                theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key_value.weight]))
                theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key_value.bias]))
                theirs.out_proj.load_state_dict(ours.out.state_dict())
            self.attentions.append(theirs)

    def forward(self, input_BL: Tensor, target_BL: Tensor) -> Tensor:
        """Mean cross-entropy over the positions whose target is not 0."""
        model, L = self.model, input_BL.shape[1]
        items_ND = model.items.ids.weight()
        is_real_BL1 = (input_BL > 0)[:, :, None]
        x_BLD = model.items.ids(input_BL) * model.config.dim**0.5 + model.positions.weight[:L].flip(0)
        x_BLD = model.dropout(x_BLD) * is_real_BL1
        later_LL = torch.ones(L, L, dtype=torch.bool).triu(1)
        for block, attention in zip(model.blocks, self.attentions):
            normed_BLD = block.norm_attention(x_BLD)
            # Each cell sees itself, padding too: a row that sees nothing would give NaN.
            mask = (later_LL | ~is_real_BL1.transpose(1, 2)) & ~torch.eye(L, dtype=torch.bool)
            mask = mask.repeat_interleave(model.config.num_heads, 0)
            mixed_BLD, _ = attention(normed_BLD, normed_BLD, normed_BLD, attn_mask=mask, need_weights=False)
            x_BLD = x_BLD + block.dropout(mixed_BLD)
            x_BLD = (x_BLD + block.dropout(block.ffn(block.norm_ffn(x_BLD)))) * is_real_BL1
        query_BLD = model.norm(x_BLD)
        if self.only_supervised:
            is_target_BL = target_BL > 0
            return cross_entropy(query_BLD[is_target_BL] @ items_ND[1:].T, target_BL[is_target_BL] - 1)
        logits_BLN = query_BLD @ items_ND[1:].T
        return cross_entropy(logits_BLN.flatten(0, 1), target_BL.flatten() - 1, ignore_index=-1)


def shop(seed: int) -> tuple[Histories, FieldTable, Space]:
    """Users with the length profile of ML-1M and items by a Zipf law; every event is a group of its own."""
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.normal(4.56, 0.95, NUM_USERS)).clip(20, 2_314).astype(np.int64)
    total = int(lengths.sum())
    item = rng.choice(NUM_ITEMS, total, p=(p := 1 / np.arange(10, NUM_ITEMS + 10)) / p.sum()) + 1
    ones, clock = np.ones(total, dtype=np.int64), np.arange(total)
    offsets = np.concatenate([[0, 0], np.cumsum(lengths)])
    histories = Histories(
        offsets=offsets, item=item, time=clock, group=clock, action=ones, value=ones.astype(np.float32)
    )
    known = torch.arange(NUM_ITEMS + 1) > 0
    space = Space(items=FieldTable(NUM_ITEMS + 1), known_items=known, num_users=NUM_USERS)
    return histories, FieldTable(NUM_USERS + 1), space


def padded(batch: Batch) -> tuple[Tensor, Tensor]:
    """Inputs and targets [B, L], padded with 0 on the left; every event is supervised."""
    assert batch.targets is not None
    rows = batch.history.items
    L = int(rows.lengths.max())
    column_T = L - rows.lengths[rows.row_of_value] + rows.position_of_value
    input_BL, target_BL = torch.zeros(2, rows.num_rows, L, dtype=torch.int64)
    input_BL[rows.row_of_value, column_T] = rows.values
    at = batch.targets.position
    target_BL[rows.row_of_value[at], column_T[at]] = batch.targets.items.values
    return input_BL, target_BL


def kept_bytes(loss: Callable[[], Tensor]) -> int:
    """Bytes of distinct tensors that a forward pass keeps for the backward pass."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss()
    return sum(seen.values())


def attention_table(rounds: int, batch_size: int, max_history: int, dim: int) -> list[dict[str, object]]:
    """Attention alone, forward and backward, by width of the length classes: 1 = one class per length, L = one padded block."""
    generator = np.random.default_rng(2)
    table: list[dict[str, object]] = []
    for profile, (center, spread, least) in {"ml-1m": (4.56, 0.95, 20), "shop": (2.5, 1.1, 1)}.items():
        lengths = np.exp(generator.normal(center, spread, batch_size)).clip(least, max_history).astype(np.int64)
        rows = Jagged.from_lengths(torch.zeros(int(lengths.sum())), torch.from_numpy(lengths))
        qkv = [torch.randn(int(lengths.sum()), 1, dim, requires_grad=True) for _ in range(3)]
        layouts = {width: LengthClasses.of(rows, width) for width in (1, 8, 16, 32, 64, max_history)}
        seconds: dict[int, list[float]] = {width: [] for width in layouts}
        for step in range(rounds + 1):
            for width, classes in layouts.items():
                started = time.perf_counter()
                causal_attention(qkv[0], qkv[1], qkv[2], classes).sum().backward()
                if step:
                    seconds[width].append(time.perf_counter() - started)
        fastest = {width: round(1e3 * min(times), 2) for width, times in seconds.items()}
        print(f"attention alone, {profile} lengths, fastest ms by class width: {fastest}")
        table += [{"profile": profile, "class_width": width, "fastest_ms": ms} for width, ms in fastest.items()]
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="timed steps per arm")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--max-history", type=int, default=200)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument(
        "--quick", action="store_true", help="small batches, one step; nothing is written unless --out is given"
    )
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.batch_size, arguments.max_history, arguments.dim = 1, 16, 50, 16
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    histories, users, space = shop(seed=0)
    config = SASRecConfig(dim=arguments.dim, max_history=arguments.max_history, dropout=0.2)
    model = SASRec(config, space)
    arms: dict[str, nn.Module] = {
        "padded": PaddedSASRec(model),
        "padded, softmax at supervised positions": PaddedSASRec(model, only_supervised=True),
        "jagged, supervised positions": model,
    }
    batches = [
        next_event_batch(histories, users, rows, max_history=arguments.max_history)
        for rows in np.random.default_rng(1).permutation(np.arange(1, NUM_USERS + 1)).reshape(-1, arguments.batch_size)
    ]

    def loss_of(name: str, batch: Batch) -> Tensor:
        return model.losses(batch)["next"] if arms[name] is model else arms[name](*padded(batch))

    model.eval()
    with torch.no_grad():
        losses = {name: float(loss_of(name, batches[0])) for name in arms}
    assert max(losses.values()) - min(losses.values()) < 1e-4, f"the arms do not compute the same loss: {losses}"
    for arm in arms.values():
        arm.train()

    seconds: dict[str, list[float]] = {name: [] for name in arms}
    with machine_lock():
        for step in range(arguments.rounds + 1):
            for name in arms:
                model.zero_grad()
                started = time.perf_counter()
                loss_of(name, batches[step % len(batches)]).backward()
                if step:  # the first round warms up
                    seconds[name].append(time.perf_counter() - started)
    memory = {name: kept_bytes(lambda name=name: loss_of(name, batches[0])) for name in arms}  # type: ignore[misc]

    base = median(seconds["padded"])
    rows = batches[0].history.items
    share = 1 - len(rows.values) / (rows.num_rows * int(rows.lengths.max()))
    print(f"batch {arguments.batch_size}, length {arguments.max_history}, {share:.0%} of the padded block is padding")
    print(f"{'arm':42} {'ms per step':>12} {'speed':>7} {'kept MiB':>9}")
    table = []
    for name, times in seconds.items():
        row = {
            "arm": name,
            "ms_per_step": round(1e3 * median(times), 1),
            "fastest_ms": round(1e3 * min(times), 1),
            "speed_against_padded": round(base / median(times), 2),
            "kept_for_backward_mib": round(memory[name] / 2**20, 1),
        }
        print(f"{name:42} {row['ms_per_step']:12} {row['speed_against_padded']:6}x {row['kept_for_backward_mib']:9}")
        table.append(row)
    with machine_lock():
        attention = attention_table(3 * arguments.rounds, arguments.batch_size, arguments.max_history, arguments.dim)
    settings = {name: value for name, value in vars(arguments).items() if name not in ("quick", "out")}
    figures = {"settings": settings, "share_of_padding": round(share, 3), "arms": table, "attention": attention}
    written = record(RESULT, figures, quick=arguments.quick, out=arguments.out)
    print(f"written to {written}" if written else "quick: nothing written")


if __name__ == "__main__":
    main()
