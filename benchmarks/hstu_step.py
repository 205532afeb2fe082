"""HSTU's training step at the shape of ML-1M: jagged blocks and shared negatives beside the padded form that libraries ship, in one run.

    python benchmarks/hstu_step.py            # prints tables, writes benchmarks/results/hstu_step.json

All arms have the same weights and batches (length profile of ML-1M, 20 to 2,314 events, median 96, cut at 200; events come in bursts).
A step is loss, gradients and optimiser. The padded arms hold scores, weights and bias as B x L x L tensors, as the formula stands; "own
negatives" draws 128 for every position, as the authors' code does. Before anything is timed, the padded and the jagged form must give the
same loss for the same negatives. Arms take turns, so that a busy moment hits all of them. Attention alone is timed beside PyTorch's
scaled-dot-product attention, which has no relative bias.

B sequences, L longest, D width, P supervised positions, k negatives, n items.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from sasrec_step import kept_bytes
from shortlist.data.batches import Batch, next_event_batch
from shortlist.data.histories import Histories
from shortlist.data.jagged import Jagged
from shortlist.data.schema import FieldTable, Space
from shortlist.embeddings.base import TableChoice
from shortlist.evaluation.benchmarks import record
from shortlist.evaluation.evidence import machine_lock
from shortlist.kernels.hstu_attention import RelativeBias, Sequences, hstu_attention
from shortlist.layers.attention import LengthClasses, causal_attention
from shortlist.layers.hstu import HSTUBlock, HSTUBlockConfig
from shortlist.layers.losses import hide_hits, sampled_softmax_loss, unit
from shortlist.models.retrieval.hstu import HSTU, HSTUConfig
from shortlist.training.config import TrainerConfig
from shortlist.training.optimisers import build_optimisers

NUM_ITEMS, NUM_USERS, NUM_NEGATIVES = 3_416, 512, 128
RESULT = Path(__file__).parent / "results" / "hstu_step.json"
BASE = "padded, own negatives"


class PaddedHSTU(nn.Module):
    """The usual form over right-padded blocks [B, L], with the weights of `model`."""

    def __init__(self, model: HSTU, *, own_negatives: bool) -> None:
        super().__init__()
        self.model, self.own_negatives = model, own_negatives

    def forward(self, batch: Batch) -> Tensor:
        """Mean sampled softmax over the supervised positions."""
        model, targets = self.model, batch.targets
        assert targets is not None
        events = model._events(batch)
        rows_BL, is_real_BL = events.rows.padded()
        key_time_BL, _ = events.rows.with_values(events.time_T).padded()
        query_time_BL, _ = events.rows.with_values(events.query_time_T).padded()
        L = rows_BL.shape[1]
        x_BLD = model.items.ids(rows_BL) * model.config.dim**0.5 + model.places.weight[:L]
        x_BLD = model.dropout(x_BLD) * is_real_BL[:, :, None]
        for block in model.stack.blocks:
            x_BLD = padded_block(block, x_BLD, query_time_BL, key_time_BL) * is_real_BL[:, :, None]  # type: ignore[arg-type]
        query_PD = unit(x_BLD[is_real_BL][targets.position])
        if not self.own_negatives:
            return model.objective(model.items, query_PD, targets, events.rows)
        query_PD = query_PD / model.config.temperature
        positive_P = (query_PD * unit(model.items.ids(targets.items.values))).sum(-1)
        negative_Pk = torch.randint(1, NUM_ITEMS + 1, (len(query_PD), NUM_NEGATIVES))
        score_Pk = torch.einsum("pd,pkd->pk", query_PD, unit(model.items.ids(negative_Pk)))
        score_Pk = hide_hits(score_Pk, negative_Pk, targets.items)
        return sampled_softmax_loss(positive_P, score_Pk, targets.items, targets.weight)


def padded_block(block: HSTUBlock, x_BLD: Tensor, query_time_BL: Tensor, key_time_BL: Tensor) -> Tensor:
    """One layer of the research variant with one head, as the authors' public code computes it."""
    width = block.e
    u, v, q, k = silu(block.project(block.norm_in(x_BLD))).split([width, width, block.d, block.d], dim=-1)
    assert block.position_bias is not None
    assert block.time_bias is not None
    bias = RelativeBias(block.position_bias, block.time_bias)
    av_BLD = padded_attention(q, k, v, query_time_BL, key_time_BL, bias, block.divisor)
    return x_BLD + block.out(block.dropout(u * block.norm_out(av_BLD)))


def padded_attention(
    q_BLd: Tensor,
    k_BLd: Tensor,
    v_BLe: Tensor,
    query_time_BL: Tensor,
    key_time_BL: Tensor,
    bias: RelativeBias,
    n: float,
) -> Tensor:
    """The formula over B x L x L tensors; logarithms in float32 as in the public code."""
    L = q_BLd.shape[1]
    place_L = torch.arange(L)
    assert bias.position is not None
    assert bias.time is not None
    reach = len(bias.position) // 2
    apart_LL = (place_L - place_L[:, None]).clamp(-reach, reach) + reach
    seconds_BLL = (query_time_BL[:, :, None] - key_time_BL[:, None]).abs().clamp(min=1)
    bucket_BLL = (seconds_BLL.float().log() / 0.301).long().clamp(max=len(bias.time) - 1)
    rab_BLL = bias.position[apart_LL] + bias.time[bucket_BLL]
    weight_BLL = silu(torch.einsum("bid,bjd->bij", q_BLd, k_BLd) + rab_BLL) / n
    return torch.einsum("bij,bje->bie", weight_BLL * torch.ones(L, L).tril(), v_BLe)


def bursts(seed: int) -> tuple[Histories, FieldTable, Space]:
    """Users with the length profile of ML-1M, items by a Zipf law; sittings of some ten events, days apart."""
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.normal(4.56, 0.95, NUM_USERS)).clip(20, 2_314).astype(np.int64)
    total = int(lengths.sum())
    item = rng.choice(NUM_ITEMS, total, p=(p := 1 / np.arange(10, NUM_ITEMS + 10)) / p.sum()) + 1
    gap = np.where(rng.random(total) < 0.9, rng.exponential(30, total), np.exp(rng.normal(13, 2, total)))
    ones, number = np.ones(total, dtype=np.int64), np.arange(total)
    offsets = np.concatenate([[0, 0], np.cumsum(lengths)])
    first_of_user = np.repeat(gap.cumsum()[offsets[1:-1]], lengths)
    clock = (gap.cumsum() - first_of_user).astype(np.int64) + 1_000_000_000
    histories = Histories(
        offsets=offsets, item=item, time=clock, group=number, action=ones, value=ones.astype(np.float32)
    )
    known = torch.arange(NUM_ITEMS + 1) > 0
    space = Space(items=FieldTable(NUM_ITEMS + 1), known_items=known, num_users=NUM_USERS)
    return histories, FieldTable(NUM_USERS + 1), space


def attention_table(rounds: int, batch_size: int, max_history: int, dim: int) -> list[dict[str, object]]:
    """Attention alone, forward and backward, over lengths of ML-1M and over long Zipf lengths."""
    rng = np.random.default_rng(2)
    table: list[dict[str, object]] = []
    long = max_history * 5
    profiles = {
        "ml-1m": np.exp(rng.normal(4.56, 0.95, batch_size)).clip(20, max_history),
        f"zipf up to {long}": (long / rng.permutation(np.arange(1, batch_size // 8 + 1)) ** 0.5).clip(1, long),
    }
    for profile, drawn in profiles.items():
        rows = Jagged.from_lengths(
            torch.zeros(int(drawn.astype(np.int64).sum())), torch.from_numpy(drawn.astype(np.int64))
        )
        total, lengths = len(rows.values), rows.lengths
        q, k, v = (torch.randn(total, 1, dim, requires_grad=True) for _ in range(3))
        bias = RelativeBias(*(torch.randn(m, requires_grad=True) for m in (2 * long - 1, 129)))
        key_time = torch.from_numpy(np.exp(rng.normal(5, 3, total)).astype(np.int64).cumsum())
        query_time = key_time + 60

        def in_blocks(rows: Jagged = rows, q: Tensor = q, k: Tensor = k, v: Tensor = v, bias: RelativeBias = bias,
                      key_time: Tensor = key_time, query_time: Tensor = query_time) -> Tensor:  # fmt: skip
            sequences = Sequences(
                rows.offsets, rows.offsets, rows.lengths, rows.position_of_value, key_time, query_time
            )
            return hstu_attention(q, k, v, sequences, bias, alpha=1.0, divisor=float(long))

        def padded(rows: Jagged = rows, q: Tensor = q, k: Tensor = k, v: Tensor = v, bias: RelativeBias = bias,
                   key_time: Tensor = key_time, query_time: Tensor = query_time) -> Tensor:  # fmt: skip
            qkv, times = (q[:, 0], k[:, 0], v[:, 0]), (query_time, key_time)
            blocks = [rows.with_values(x).padded()[0] for x in (*qkv, *times)]
            out_BLe = padded_attention(*blocks, bias, float(long))  # type: ignore[call-arg, arg-type]
            return out_BLe[rows.padded()[1]][:, None]

        def padded_sdpa(rows: Jagged = rows, q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            blocks = [rows.with_values(x).padded()[0].transpose(1, 2) for x in (q, k, v)]
            out_BHLd = scaled_dot_product_attention(blocks[0], blocks[1], blocks[2], is_causal=True)
            return out_BHLd.transpose(1, 2)[rows.padded()[1]]

        def classes_sdpa(rows: Jagged = rows, q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return causal_attention(q, k, v, LengthClasses.of(rows))

        forms = {
            "HSTU, padded": padded,
            "HSTU, blocks": in_blocks,
            "softmax without bias, padded, PyTorch's kernel": padded_sdpa,
            "softmax without bias, length classes, PyTorch's kernel": classes_sdpa,
        }
        # Logarithms in float32 put a pair at the edge of a bucket into the one beside it.
        torch.testing.assert_close(padded(), in_blocks(), rtol=1e-2, atol=1e-2)
        seconds: dict[str, list[float]] = {name: [] for name in forms}
        for step in range(rounds + 1):
            for name, form in forms.items():
                started = time.perf_counter()
                form().sum().backward()
                if step:
                    seconds[name].append(time.perf_counter() - started)
        pairs = int((lengths * (lengths + 1)).sum()) // 2
        print(f"attention alone, forward and backward, {profile}: {len(lengths)} sequences, {pairs:,} pairs")
        for name, times in seconds.items():
            ms = round(1e3 * median(times), 2)
            print(f"  {name:56} {ms:10} ms  kept {kept_bytes(forms[name]) / 2**20:8.1f} MiB")
            table.append(
                {"profile": profile, "form": name, "ms": ms, "kept_mib": round(kept_bytes(forms[name]) / 2**20, 1)}
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="timed steps per arm")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--max-history", type=int, default=200)
    parser.add_argument("--dim", type=int, default=50)
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

    histories, users, space = bursts(seed=0)
    batches = [
        next_event_batch(histories, users, rows, max_history=arguments.max_history)
        for rows in np.random.default_rng(1).permutation(np.arange(1, NUM_USERS + 1)).reshape(-1, arguments.batch_size)
    ]

    def model_of(*, sparse: bool = False) -> HSTU:
        torch.manual_seed(0)
        config = HSTUConfig(
            dim=arguments.dim,
            max_history=arguments.max_history,
            loss="sampled_softmax",
            num_negatives=NUM_NEGATIVES,
            normalise=True,
            temperature=0.05,
            layers=HSTUBlockConfig(num_blocks=2, num_heads=1),
            table=TableChoice(sparse=sparse),
        )
        return HSTU(config, space)

    models = {name: model_of() for name in (BASE, "padded, shared negatives", "jagged blocks, shared negatives")}
    models["the same, row-wise Adam on the item table"] = model_of(sparse=True)
    padded = {name: PaddedHSTU(models[name], own_negatives=name == BASE) for name in (BASE, "padded, shared negatives")}
    losses = {
        name: padded[name] if name in padded else lambda batch, m=model: m.losses(batch)["next"]
        for name, model in models.items()
    }
    optimisers = {name: build_optimisers(model, TrainerConfig(weight_decay=0.0)) for name, model in models.items()}

    checked = {}
    for name in [n for n in models if n != BASE]:
        models[name].eval()
        torch.manual_seed(7)
        with torch.no_grad():
            checked[name] = float(losses[name](batches[0]))
        models[name].train()
    assert max(checked.values()) - min(checked.values()) < 1e-4, f"the arms do not compute the same loss: {checked}"

    seconds: dict[str, list[float]] = {name: [] for name in models}
    with machine_lock():
        for step in range(arguments.rounds + 1):
            for name, model in models.items():
                started = time.perf_counter()
                losses[name](batches[step % len(batches)]).backward()
                for optimiser in optimisers[name]:
                    optimiser.step()
                model.zero_grad()
                if step:  # the first round warms up
                    seconds[name].append(time.perf_counter() - started)
    memory = {name: kept_bytes(lambda name=name: losses[name](batches[0])) for name in models}  # type: ignore[misc]

    base = median(seconds[BASE])
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
            "speed_against_own_negatives": round(base / median(times), 2),
            "kept_for_backward_mib": round(memory[name] / 2**20, 1),
        }
        print(
            f"{name:42} {row['ms_per_step']:12} {row['speed_against_own_negatives']:6}x {row['kept_for_backward_mib']:9}"
        )
        table.append(row)
    with machine_lock():
        attention = attention_table(arguments.rounds, arguments.batch_size, arguments.max_history, arguments.dim)
    settings = {name: value for name, value in vars(arguments).items() if name not in ("quick", "out")}
    figures = {"settings": settings, "share_of_padding": round(share, 3), "arms": table, "attention": attention}
    written = record(RESULT, figures, quick=arguments.quick, out=arguments.out)
    print(f"written to {written}" if written else "quick: nothing written")


if __name__ == "__main__":
    main()
