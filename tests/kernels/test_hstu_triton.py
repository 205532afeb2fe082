"""The Triton kernels against the formula as it stands, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

INSIDE = os.environ.get("SHORTLIST_TRITON_TEST") == "1"
"""Triton reads TRITON_INTERPRET when its kernels are defined, so that these tests run in a process of their own."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.skipif(INSIDE, reason="this is that process")
def test_the_kernels_agree_in_a_process_of_their_own():
    environment = {**os.environ, "SHORTLIST_TRITON_TEST": "1"}
    if DEVICE == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", str(Path(__file__))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


inside = pytest.mark.skipif(not INSIDE, reason="runs in the interpreter's own process")


def problem(lengths, queries, history, *, heads=1, d=6, e=5, seed=0):
    from shortlist.kernels.hstu_attention import RelativeBias, Sequences

    generator = torch.Generator().manual_seed(seed)
    cut = [torch.tensor([0, *torch.tensor(x).cumsum(0).tolist()]) for x in (lengths, queries)]
    num_keys, num_queries = sum(lengths), sum(queries)
    draw = lambda *shape: torch.randn(*shape, generator=generator, requires_grad=True)  # noqa: E731
    time = torch.randint(0, 3_000_000, (num_keys,), generator=generator)
    sequences = Sequences(
        cut[0].to(DEVICE),
        cut[1].to(DEVICE),
        torch.tensor(history).to(DEVICE),
        torch.cat([torch.arange(n) for n in lengths]).clamp(max=9).to(DEVICE),
        time.to(DEVICE),
        torch.randint(0, 3_000_000, (num_queries,), generator=generator).to(DEVICE),
    )
    tensors = [draw(num_queries, heads, d), draw(num_keys, heads, d), draw(num_keys, heads, e), draw(15), draw(40)]
    tensors = [t.detach().to(DEVICE).requires_grad_() for t in tensors]
    return tensors, sequences, RelativeBias(tensors[3], tensors[4])


@inside
@pytest.mark.parametrize(
    ("lengths", "queries", "history", "biased"),
    [
        ([5], [5], [5], False),
        ([19, 0, 1, 3], [19, 0, 1, 3], [19, 0, 1, 3], True),
        ([22, 17], [22, 17], [14, 0], True),  # candidates at the end
        ([35, 9], [4, 5], [33, 9], True),  # keys from a cache, with and without candidates
    ],
)
def test_values_and_all_gradients(lengths, queries, history, biased, monkeypatch):
    from shortlist.kernels import hstu_triton
    from shortlist.kernels.hstu_attention import RelativeBias, hstu_attention_reference
    from shortlist.kernels.hstu_triton import hstu_attention_triton

    for name in ("TILE_QUERIES", "TILE_KEYS"):
        monkeypatch.setattr(hstu_triton, name, 16)
    tensors, sequences, bias = problem(lengths, queries, history)
    if not biased:
        tensors, bias = tensors[:3], RelativeBias(None, None)
    ours = hstu_attention_triton(*tensors[:3], sequences, bias.position, bias.time, alpha=0.7, divisor=20.0)
    theirs = hstu_attention_reference(*tensors[:3], sequences, bias, alpha=0.7, divisor=20.0)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    back = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    grads = [torch.autograd.grad((out * back).sum(), tensors) for out in (ours, theirs)]
    for mine, reference in zip(*grads):
        torch.testing.assert_close(mine, reference, atol=1e-4, rtol=1e-3)


@inside
def test_half_precision_keeps_float32_sums():
    from shortlist.kernels.hstu_attention import hstu_attention_reference
    from shortlist.kernels.hstu_triton import hstu_attention_triton

    tensors, sequences, bias = problem([20, 3], [20, 3], [20, 3], heads=2)
    half = [t.detach().half() for t in tensors[:3]]
    ours = hstu_attention_triton(*half, sequences, bias.position, bias.time, alpha=1.0, divisor=50.0)
    theirs = hstu_attention_reference(*tensors[:3], sequences, bias, alpha=1.0, divisor=50.0)
    assert ours.dtype == torch.float16
    torch.testing.assert_close(ours.float(), theirs, atol=1e-2, rtol=1e-2)


@inside
def test_buckets_begin_where_the_formula_says():
    from shortlist.kernels.hstu_attention import time_bucket
    from shortlist.kernels.hstu_triton import thresholds

    starts = torch.tensor(thresholds(129)[1:61])  # no whole second falls into bucket 1
    bucket = torch.arange(1, 61)
    assert (time_bucket(starts, 129) >= bucket).all()
    assert (time_bucket(starts - 1, 129) < bucket).all()
