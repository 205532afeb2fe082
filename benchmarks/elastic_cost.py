"""One ELASTIC layer beside softmax attention over histories of growing length: time and memory, forward and backward, in one run.

    python benchmarks/elastic_cost.py            # prints a table, writes benchmarks/results/elastic_cost.json

Softmax attention stands twice: with its matrix written out, as many libraries still do, and by PyTorch's fused kernel, whose memory
is linear too. All arms have the same width, residual and feed-forward; they take turns, so that a busy moment hits all of them. Slopes are
of log time against log length from 1,024 events on: 1 is linear, 2 quadratic.

N events, D width.
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
from torch.nn.functional import scaled_dot_product_attention

from shortlist.data.jagged import Jagged
from shortlist.evaluation.benchmarks import record
from shortlist.evaluation.evidence import machine_lock
from shortlist.layers.towers import MLP
from shortlist.models.retrieval.elastic import Chunks, ElasticBlock, ElasticConfig, Sums

RESULT = Path(__file__).parent / "results" / "elastic_cost.json"
EXPLICIT, FUSED, EXPERTS = "softmax, matrix written out", "softmax, fused kernel", "ELASTIC"


class SoftmaxBlock(nn.Module):
    """Pre-norm causal self-attention with one head and feed-forward."""

    def __init__(self, dim: int, *, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.norm, self.ffn_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query_key_value, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.ffn = MLP(dim, (dim,), dim)

    def forward(self, x_ND: Tensor) -> Tensor:
        """float32 [N, D]."""
        q, k, v = (part[None, None] for part in self.query_key_value(self.norm(x_ND)).chunk(3, 1))
        if self.fused:
            read = scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            later_NN = torch.ones(len(x_ND), len(x_ND), dtype=torch.bool).triu(1)
            score = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).masked_fill(later_NN, -torch.inf)
            read = score.softmax(-1) @ v
        x_ND = x_ND + self.out(read[0, 0])
        return x_ND + self.ffn(self.ffn_norm(x_ND))


class LargestLive:
    """Peak bytes of tensors alive during a call, by PyTorch's own allocator events."""

    def __init__(self, run: Callable[[], None]) -> None:
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run()
        live = peak = 0
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        for event in sorted(events, key=lambda e: e.start_ns()):
            live += event.nbytes()
            peak = max(peak, live)
        self.bytes = peak


def slope(lengths: list[int], seconds: list[float]) -> float:
    """Of log seconds against log length."""
    return float(np.polyfit(np.log(lengths), np.log(seconds), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--rounds", type=int, default=5, help="timed passes per arm and length")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument(
        "--quick", action="store_true", help="short histories; nothing is written unless --out is given"
    )
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.lengths, arguments.rounds = [256, 1024, 2048], 1
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    dim = arguments.dim
    experts = ElasticBlock(ElasticConfig(dim=dim, max_history=max(arguments.lengths)))
    softmax = {EXPLICIT: SoftmaxBlock(dim, fused=False), FUSED: SoftmaxBlock(dim, fused=True)}
    softmax[FUSED].load_state_dict(softmax[EXPLICIT].state_dict())
    x = torch.randn(arguments.lengths[0], dim)
    torch.testing.assert_close(softmax[FUSED](x), softmax[EXPLICIT](x), atol=1e-4, rtol=1e-4)

    def forward(name: str, x_ND: Tensor) -> Tensor:
        if name != EXPERTS:
            return softmax[name](x_ND)
        rows = Jagged.from_lengths(torch.zeros(len(x_ND)), torch.tensor([len(x_ND)]))
        config = experts.num_heads, len(experts.experts_kD), dim // experts.num_heads
        nothing = Sums(torch.zeros(1, *config), torch.zeros(1, *config[:2]))
        return experts(x_ND, Chunks.of(rows, 16), nothing)[0]

    def step(name: str, x_ND: Tensor) -> None:
        forward(name, x_ND).square().mean().backward()

    table = []
    with machine_lock():
        for length in arguments.lengths:
            x_ND = torch.randn(length, dim, requires_grad=True)
            inference: dict[str, list[float]] = {name: [] for name in (*softmax, EXPERTS)}
            training: dict[str, list[float]] = {name: [] for name in (*softmax, EXPERTS)}
            for turn in range(arguments.rounds + 1):
                for name in inference:
                    with torch.inference_mode():
                        started = time.perf_counter()
                        forward(name, x_ND)
                        inference[name] += [time.perf_counter() - started] if turn else []
                    started = time.perf_counter()
                    step(name, x_ND)
                    training[name] += [time.perf_counter() - started] if turn else []
            for name in inference:
                table.append(
                    {
                        "arm": name,
                        "length": length,
                        "inference_ms": round(1e3 * median(inference[name]), 3),
                        "training_ms": round(1e3 * median(training[name]), 3),
                        "peak_mib": round(LargestLive(lambda n=name, x=x_ND: step(n, x)).bytes / 2**20, 2),  # type: ignore[misc]
                    }
                )
    print(f"{'arm':30} {'length':>7} {'inference ms':>13} {'training ms':>12} {'peak MiB':>9}")
    for row in table:
        print(f"{row['arm']:30} {row['length']:7} {row['inference_ms']:13} {row['training_ms']:12} {row['peak_mib']:9}")
    long = [length for length in arguments.lengths if length >= 1024]
    slopes = {
        name: {
            kind: round(slope(long, [float(r[kind]) for r in table if r["arm"] == name and r["length"] in long]), 2)
            for kind in ("inference_ms", "training_ms", "peak_mib")
        }
        for name in inference
    }
    last = {str(row["arm"]): row for row in table if row["length"] == arguments.lengths[-1]}
    against = {
        name: {
            kind: round(float(last[name][kind]) / float(last[EXPERTS][kind]), 2)
            for kind in ("inference_ms", "training_ms", "peak_mib")
        }
        for name in softmax
    }
    print(f"slopes from 1,024 events on: {slopes}")
    print(f"at {arguments.lengths[-1]:,} events, against ELASTIC: {against}")
    settings = {name: value for name, value in vars(arguments).items() if name not in ("quick", "out")}
    figures = {"settings": settings, "table": table, "slopes": slopes, "times_elastic_at_longest": against}
    written = record(RESULT, figures, quick=arguments.quick, out=arguments.out)
    print(f"written to {written}" if written else "quick: nothing written")


if __name__ == "__main__":
    main()
