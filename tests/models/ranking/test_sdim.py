"""SDIM: look-up against the direct form, the closed form of its kernel, tables that go on from request to request."""

import math
from dataclasses import replace

import pytest
import torch

from ranking_support import rich_batch, rich_space, space_of
from shortlist.errors import ConfigError
from shortlist.layers.scoring import HeadConfig
from shortlist.models.ranking.sdim import SDIM, SDIMConfig

TINY = SDIMConfig(
    dim=8, num_bits=12, short_history=2, max_history=6, id_dropout=0.0, head=HeadConfig(widths=(16,), dropout=0.0)
)
PAST = [[1, 2, 3, 4, 3, 2, 1, 6], [], [5, 5], [6]]
OFFERED = [[1, 7, 9], [2, 11], [], [3, 12, 8, 4]]


def made(**changes):
    torch.manual_seed(0)
    model = SDIM(replace(TINY, **changes), rich_space(actions=("view", "buy")))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    return model.eval()


@torch.no_grad()
def test_by_hand():
    """Planes along two axes, one sign each: the candidate (1, 1) shares the first sign with (3, 4), the second with (-6, 8) as well."""
    torch.manual_seed(0)
    model = SDIM(replace(TINY, dim=2, num_bits=2, signature_bits=1), space_of(3)).eval()
    model.encoder.items.ids.rows.weight.copy_(torch.tensor([[0.0, 0.0], [3.0, 4.0], [-6.0, 8.0], [1.0, 1.0]]))
    model.planes_Dm.copy_(torch.eye(2))
    batch = rich_batch([[1, 2]], [[3]])
    found = model.interest(model.user_state(batch).bucket_BGUD, batch.candidate_rows, torch.tensor([[1.0, 1.0]]))
    first, second = (3 / 5, 4 / 5), (-3 / math.hypot(3, 12), 12 / math.hypot(3, 12))
    assert found[0].tolist() == pytest.approx([(a + b) / 2 for a, b in zip(first, second)])


@torch.no_grad()
@pytest.mark.parametrize("signature_bits", [1, 3, 6])
def test_look_up_equals_the_direct_form(signature_bits):
    model, batch = made(signature_bits=signature_bits), rich_batch(PAST, OFFERED)
    rows = batch.candidate_rows
    fast = model.interest(model.user_state(batch).bucket_BGUD, rows, model.encoder(rows.values))
    torch.testing.assert_close(fast, model.plain_interest(batch), rtol=1e-5, atol=1e-5)
    assert (fast[3:5] == 0).all()  # nobody's past


def test_look_up_has_the_direct_form_s_gradient():
    grads = []
    for plain in (False, True):
        model, batch = made().train(), rich_batch(PAST, OFFERED)
        rows = batch.candidate_rows
        found = (
            model.plain_interest(batch)
            if plain
            else model.interest(model.user_state(batch).bucket_BGUD, rows, model.encoder(rows.values))
        )
        found.sin().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() != set()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("cosine", [-0.9, 0.0, 0.5, 0.9])
@pytest.mark.parametrize("tau", [1, 3])
def test_signatures_agree_as_often_as_the_closed_form_says(cosine, tau):
    """(1 - arccos / pi) ** tau (equation 11), over 6,000 signatures: three standard errors are .02 at most."""
    torch.manual_seed(0)
    model = SDIM(replace(TINY, dim=16, num_bits=6_000 * tau, signature_bits=tau), space_of(3)).eval()
    x, other = torch.linalg.qr(torch.randn(16, 2))[0].T
    pair = torch.stack([x * 3, cosine * x + math.sqrt(1 - cosine**2) * other])
    one, two = model.hash(pair)
    expected = (1 - math.acos(cosine) / math.pi) ** tau
    assert (one == two).float().mean().item() == pytest.approx(expected, abs=0.02)


PASTS = [
    [[1, 2], [], [7, 7]],
    [[1, 2, 3], [4], [7, 7]],
    [[1, 2, 3, 4, 5, 6, 7, 8], [4, 1], [7, 7, 2]],  # longer than the window: two events fall out
    [[1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5], [4, 1], [2, 7, 7]],  # another past than was remembered
    [[9], [4, 1, 1], [2, 7, 7]],
]


@torch.no_grad()
def test_a_table_goes_on_as_if_made_anew():
    model, memories = made(), [None] * 3
    for past in PASTS:
        batch = rich_batch(past, [[1, 2], [3], [4, 5]])
        state, memories = model.recall(batch, memories)
        anew = model.user_state(batch)
        torch.testing.assert_close(state.bucket_BGUD, anew.bucket_BGUD, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            model.score_candidates(state, batch.candidates)["target"], model.score(batch)["target"]
        )


@torch.no_grad()
def test_a_cell_that_all_events_left_is_empty():
    """What rounding leaves behind has a direction too: the count says that there is nothing."""
    model = made(num_bits=48)
    past, memories = [1 + (i * 7) % 9 for i in range(200)], [None]
    for end in range(1, 200, 3):
        state, memories = model.recall(rich_batch([past[:end]], [[1]]), memories)
    anew = model.user_state(rich_batch([past[:end]], [[1]]))
    assert torch.equal(state.bucket_BGUD == 0, anew.bucket_BGUD == 0)
    torch.testing.assert_close(state.bucket_BGUD, anew.bucket_BGUD, rtol=1e-5, atol=1e-6)
    assert memories[0]["sum"].shape == (16, 8, 8)  # whatever the length of the past


@torch.no_grad()
def test_only_new_events_are_read(monkeypatch):
    model = made()
    _, memories = model.recall(rich_batch([[1, 2, 3]], [[1]]), [None])
    read = []
    buckets = model.buckets
    monkeypatch.setattr(
        model,
        "buckets",
        lambda history, time, **dtype: read.extend(history.items.values.tolist()) or buckets(history, time, **dtype),
    )
    model.recall(rich_batch([[1, 2, 3, 4]], [[1]]), memories)
    assert read == [4]


def test_no_gradient_passes_through_the_hash():
    model = made().train()
    assert not model.hash(model.encoder(torch.tensor([1]))).requires_grad


@pytest.mark.parametrize("wrong", [{"num_bits": 47}, {"signature_bits": 5}, {"signature_bits": 24}])
def test_settings_that_do_not_divide(wrong):
    with pytest.raises(ConfigError, match="signature_bits"):
        replace(SDIMConfig(), **wrong)
