"""ETA: distances against unpacked bits, ties, hashes that follow the embeddings."""

from dataclasses import replace

import pytest
import torch

from ranking_support import rich_batch, rich_space, space_of
from shortlist.layers.scoring import HeadConfig
from shortlist.layers.search import sign_bits
from shortlist.models.base import load_weights
from shortlist.models.ranking.eta import ETA, ETAConfig

TINY = ETAConfig(
    dim=8, num_bits=70, num_found=3, short_history=2, max_history=8, id_dropout=0.0, head=HeadConfig(widths=(16,))
)
PAST = [[1, 2, 3, 4, 3, 2, 1, 6], [], [5, 5], [6]]
OFFERED = [[1, 7, 9], [2, 11], [], [3, 12, 8, 4]]


def made(config=TINY, space=None):
    torch.manual_seed(0)
    model = ETA(config, space or rich_space())
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    return model.eval()


def found(model, batch):
    rows = batch.candidate_rows
    return model.found(model.user_state(batch), rows, model.encoder(rows.values))


@torch.no_grad()
@pytest.mark.parametrize("num_bits", [4, 64, 70])
@pytest.mark.parametrize("pairs_at_once", [1, 1_000_000])
def test_the_nearest_by_differing_bits_the_newer_of_equals(num_bits, pairs_at_once):
    model, batch = made(replace(TINY, num_bits=num_bits, pairs_at_once=pairs_at_once)), rich_batch(PAST, OFFERED)
    chosen, rows, past = found(model, batch), batch.candidate_rows, batch.history.items
    bits = sign_bits(model.encoder(torch.arange(13)), model.planes_Dm)
    for t, (row, item) in enumerate(zip(rows.row_of_value.tolist(), rows.values.tolist())):
        a, b = past.offsets[row : row + 2].tolist()
        distance = [(bits[item] != bits[e]).sum().item() for e in past.values[a:b].tolist()]
        order = sorted(range(b - a), key=lambda i: (distance[i], -i))[:3]
        assert chosen.event[t][chosen.is_real[t]].tolist() == [a + i for i in order]


@torch.no_grad()
def test_by_hand():
    """Two dimensions, planes along the axes: signs are the quadrant, so the event in the candidate's quadrant is found."""
    model = made(replace(TINY, dim=2, num_bits=2, num_found=1), space_of(4))
    model.encoder.items.ids.rows.weight.copy_(
        torch.tensor([[0.0, 0.0], [1.0, 2.0], [-1.0, 1.0], [-3.0, -1.0], [0.5, 0.1]])
    )
    model.planes_Dm.copy_(torch.eye(2))
    batch = rich_batch([[1, 2, 3]], [[4]])
    assert found(model, batch).event.tolist() == [[0]]
    assert model.user_state(batch).code_Ew.tolist() == [[3], [2], [0]]


def test_hashes_follow_the_embeddings():
    """Made anew in every training batch, and after training ends: a stale hash would search another space."""
    model, batch = made(), rich_batch(PAST, OFFERED)
    with torch.no_grad():
        before = model.user_state(batch).code_Ew
        model.train()
        model.encoder.items.ids.rows.weight.mul_(-1)
        model.encoder.items.mix.weight.mul_(-1)
        model.encoder.items.mix.weight.requires_grad_(True)
        in_training = model.user_state(batch).code_Ew
        model.eval()
        after = model.user_state(batch).code_Ew
    assert not torch.equal(before, in_training)
    assert torch.equal(in_training, after)


def test_planes_are_fixed_and_go_with_the_weights():
    model = made()
    assert "planes_Dm" in model.state_dict()
    assert not any(p is model.planes_Dm for p in model.parameters())
    other = made(replace(TINY, hash_seed=5))
    assert not torch.equal(other.planes_Dm, model.planes_Dm)
    load_weights(other, {name: t.clone() for name, t in model.state_dict().items()})
    with torch.no_grad():
        batch = rich_batch(PAST, OFFERED)
        assert torch.equal(other.user_state(batch).code_Ew, model.user_state(batch).code_Ew)


def test_no_gradient_passes_through_the_hash():
    model, batch = made().train(), rich_batch(PAST, OFFERED)
    assert not model.user_state(batch).code_Ew.requires_grad
