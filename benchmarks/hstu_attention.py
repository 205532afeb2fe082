"""HSTU's attention, forward and backward, on histories of very different lengths: jagged kernel, padded form, PyTorch's own attention.

    python benchmarks/hstu_attention.py            # on a GPU: Triton, up to 4,096 events; on a CPU: blocks, up to 1,024
    python benchmarks/hstu_attention.py --quick    # small; nothing is written

Lengths follow a Zipf law, cut at --max-length. Arms of HSTU have the position bias that the public code has; PyTorch's attention
(softmax, no bias) does less and stands there for scale: padded to the longest, and as a jagged nested tensor where that runs. TFLOP/s
count the pairs that causality leaves (two products forward, five backward), and are set against a large matrix product measured in the
same run. Values and gradients are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from shortlist.data.jagged import Jagged
from shortlist.evaluation.benchmarks import record
from shortlist.evaluation.evidence import machine_lock
from shortlist.kernels.hstu_attention import RelativeBias, Sequences, hstu_attention

RESULTS = Path(__file__).parent / "results"
RESULT = RESULTS / "hstu_attention.json"
OURS, PADDED, SOFTMAX, VARLEN = "HSTU, jagged", "HSTU, padded", "softmax, padded (PyTorch)", "softmax, jagged (PyTorch)"


def zipf_lengths(count: int, longest: int, seed: int) -> Tensor:
    """int64 [count]: lengths by a Zipf law of exponent 1.2, at least 16, the longest among them."""
    generator = np.random.default_rng(seed)
    lengths = np.minimum(16 * generator.zipf(1.2, count), longest)
    lengths[0] = longest
    return torch.from_numpy(lengths.astype(np.int64))


def padded_hstu(q: Tensor, k: Tensor, v: Tensor, position: Tensor, divisor: float) -> Tensor:
    """As libraries ship it: [B, L, H, d] blocks, the whole matrix of weights, mask after SiLU."""
    length = q.shape[1]
    place = torch.arange(length, device=q.device)
    score = torch.einsum("bihd,bjhd->bhij", q, k) + position[place - place[:, None] + (len(position) - 1) // 2]
    weight = silu(score) / divisor * torch.ones_like(score[0, 0], dtype=torch.bool).tril()
    return torch.einsum("bhij,bjhe->bihe", weight, v)


def seconds_of(run: Callable[[], object], device: str) -> float:
    """Wall seconds of one call, the device's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=4096 if on_gpu else 1024)
    parser.add_argument("--heads", type=int, default=4 if on_gpu else 1)
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--rounds", type=int, default=20 if on_gpu else 5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument("--quick", action="store_true", help="small; nothing is written unless --out is given")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.batch_size, arguments.max_length, arguments.rounds = 8, 128, 1
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = "cuda" if on_gpu else "cpu"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    heads, width, longest = arguments.heads, arguments.width, arguments.max_length

    lengths = zipf_lengths(arguments.batch_size, longest, seed=0).to(device)
    rows = Jagged.from_lengths(torch.zeros(int(lengths.sum()), device=device), lengths)
    place, clock = rows.position_of_value, torch.zeros_like(rows.position_of_value)
    sequences = Sequences(rows.offsets, rows.offsets, lengths, place, clock, clock)
    shape = (len(rows.values), heads, width)
    jagged = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    position = (torch.randn(2 * longest - 1, device=device) * 0.02).requires_grad_()
    back = torch.randn(shape, device=device, dtype=dtype)
    bias = RelativeBias(position, None)

    def padded(values: Tensor) -> Tensor:
        out = values.new_zeros(arguments.batch_size, longest, heads, width)
        return out.index_put((rows.row_of_value, place), values)

    blocks = [padded(t.detach()).requires_grad_() for t in jagged]
    heads_first = [b.detach().transpose(1, 2).contiguous().requires_grad_() for b in blocks]
    padded_back = padded(back)

    def ours() -> tuple[Tensor, ...]:
        out = hstu_attention(*jagged, sequences, bias, alpha=1.0, divisor=float(longest))
        return out.detach(), *torch.autograd.grad(out, [*jagged, position], back)

    def padded_form() -> tuple[Tensor, ...]:
        out = padded_hstu(*blocks, position.to(dtype), float(longest))
        return out.detach(), *torch.autograd.grad(out, [*blocks, position], padded_back)

    def softmax_padded() -> None:
        out = scaled_dot_product_attention(*heads_first, is_causal=True)
        torch.autograd.grad(out, heads_first, padded_back.transpose(1, 2))

    arms: dict[str, Callable[[], object]] = {OURS: ours, PADDED: padded_form, SOFTMAX: softmax_padded}
    if on_gpu:
        nested = [
            torch.nested.nested_tensor_from_jagged(t.detach(), rows.offsets, max_seqlen=longest).requires_grad_()
            for t in jagged
        ]

        def varlen() -> None:
            out = scaled_dot_product_attention(*(t.transpose(1, 2) for t in nested), is_causal=True)
            torch.autograd.grad(out.transpose(1, 2).values(), nested, back)

        arms[VARLEN] = varlen

    real = rows.row_of_value, place
    for mine, theirs in zip(ours(), padded_form()):
        theirs = theirs[real] if theirs.dim() == 4 else theirs
        tolerance = 2e-2 * float(theirs.abs().max()) if on_gpu else 1e-4
        torch.testing.assert_close(mine.float(), theirs.float(), atol=tolerance, rtol=1e-2)

    seconds: dict[str, list[float]] = {name: [] for name in arms}
    with machine_lock():
        for turn in range(arguments.rounds + 2):
            for name, run in arms.items():
                spent = seconds_of(run, device)
                if turn > 1:
                    seconds[name].append(spent)
        size = 8192 if on_gpu else 1024
        square = torch.randn(size, size, device=device, dtype=dtype)
        ceiling = 2 * size**3 / min(seconds_of(lambda: square @ square, device) for _ in range(5))

    pairs = float((lengths * (lengths + 1) / 2).sum())
    flops = 7 * 2 * pairs * heads * width
    table = [
        {
            "arm": name,
            "ms": round(1e3 * median(spent), 3),
            "times_ours": round(median(spent) / median(seconds[OURS]), 2),
            "gflops_per_s": round(flops / median(spent) / 1e9, 1),
            "share_of_matmul": round(flops / median(spent) / ceiling, 4),
        }
        for name, spent in seconds.items()
    ]
    filled = float(lengths.sum()) / (arguments.batch_size * longest)
    print(
        f"{device}, {arguments.batch_size} histories up to {longest:,} events, {filled:.0%} of the padded block filled"
    )
    print(f"{'arm':28} {'ms':>10} {'x ours':>7} {'GFLOP/s':>9} {'of matmul':>10}")
    for row in table:
        print(
            f"{row['arm']:28} {row['ms']:10} {row['times_ours']:7} {row['gflops_per_s']:9} {row['share_of_matmul']:10.1%}"
        )
    settings = {name: value for name, value in vars(arguments).items() if name not in ("quick", "out")}
    figures = {
        "settings": settings,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "share_filled": round(filled, 3),
        "matmul_gflops_per_s": round(ceiling / 1e9, 1),
        "arms": table,
    }
    target = RESULTS / "hstu_attention_gpu.json" if on_gpu else RESULT
    written = record(target, figures, quick=arguments.quick, out=arguments.out)
    print(f"written to {written}" if written else "quick: nothing written")


if __name__ == "__main__":
    main()
