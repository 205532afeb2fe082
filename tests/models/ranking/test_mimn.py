"""MIMN: an update by hand, jagged pasts against one by one, memories that go on, and a planted taste."""

from dataclasses import replace

import pytest
import torch

from ranking_support import batch_of, rich_batch, rich_space, share_right, space_of, train
from shortlist.data.jagged import Jagged
from shortlist.layers.scoring import HeadConfig
from shortlist.models.ranking.mimn import MIMN, MemoryCell, MIMNConfig, Slots, unevenness

TINY = MIMNConfig(
    dim=8, num_slots=3, num_induced=1, short_history=2, max_history=6, id_dropout=0.0, head=HeadConfig(widths=(16,))
)


def made(**changes):
    torch.manual_seed(0)
    model = MIMN(replace(TINY, **changes), rich_space(actions=("view", "buy")))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    return model.eval()


@torch.no_grad()
def test_update_by_hand():
    """Controller output 0: all slots likely alike (key 0), erase a half, add 0; so each slot loses 1/2 of 1/2 of itself."""
    cell = MemoryCell(2, 2, 1)
    for p in cell.parameters():
        p.zero_()
    memory = torch.tensor([[[4.0, 0.0], [0.0, 8.0]]])
    slots = Slots(memory, torch.zeros(1, 2, 2), torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2))
    after = cell(slots, torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(after.read_BD, torch.tensor([[2.0, 4.0]]))  # the mean of both slots
    torch.testing.assert_close(after.memory_BmD, memory * 0.75)
    torch.testing.assert_close(after.usage_Bm, torch.tensor([[0.5, 0.5]]))
    cell.parameters_of.bias.copy_(torch.tensor([0, 0, 50.0, 50, 50, -50, 0]))  # erase all, add (1, -1)
    after = cell(slots, torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(after.memory_BmD, memory * 0.5 + torch.tensor([0.5, -0.5]))


@torch.no_grad()
def test_address_prefers_the_slot_that_is_like_the_key():
    cell = MemoryCell(2, 2, 1)
    for p in cell.parameters():
        p.zero_()
    cell.parameters_of.bias.copy_(torch.tensor([1.0, 0, 0, 0, 0, 0, 40]))
    memory = torch.tensor([[[0.0, 5.0], [0.1, 0.0]]])
    zeros = torch.zeros(1, 2)
    after = cell(Slots(memory, torch.zeros(1, 2, 2), zeros, zeros, zeros), torch.zeros(1, 2))
    torch.testing.assert_close(after.read_BD, torch.tensor([[0.1, 0.0]]))  # by angle, not by length


@torch.no_grad()
def test_only_addressed_induction_units_move():
    model = made(num_slots=3, num_induced=2)
    slots = model.cell.run(model.cell.empty(1), Jagged(torch.randn(1, 8), torch.tensor([0, 1])))
    moved = slots.induction_BmD.abs().sum(2) > 0
    assert moved.sum() == 2


@torch.no_grad()
def test_pasts_of_different_lengths_go_together():
    model = made()
    events = Jagged.from_lengths(torch.randn(9, 8), torch.tensor([5, 0, 1, 3]))
    together = model.cell.run(model.cell.empty(4), events)
    for row in range(4):
        alone = model.cell.empty(1)
        for event_D in events.select(torch.tensor([row])).values:
            alone = model.cell(alone, event_D[None])
        for part, other in zip(together, alone):
            torch.testing.assert_close(part[row], other[0])


def test_unevenness_by_hand():
    usage = torch.tensor([[3.0, 1.0], [2.0, 2.0], [0.0, 0.0]])  # nobody's memory does not count
    assert unevenness(usage).item() == pytest.approx((2 * 0.25**2 + 0) / 2)


def test_the_loss_spreads_writes():
    batch = rich_batch([[1, 2, 3], [4]], [[1, 2], [3]], target=[1.0, 0, 1])
    with_it, without = (made(utilisation=u).losses(batch)["target"] for u in (0.5, 0.0))
    usage = made().user_state(batch).slots.usage_Bm
    torch.testing.assert_close(with_it - without, 0.5 * unevenness(usage))


PASTS = [[[1, 2], [], [7, 7]], [[1, 2, 3], [4], [7, 7]], [[1, 2, 3, 4, 5], [4, 1], [7, 7, 2]], [[9], [4, 1], [7, 7, 2]]]


@torch.no_grad()
def test_a_memory_goes_on_as_if_made_anew():
    model, memories = made(), [None] * 3
    offered = [[1, 2], [3], [4, 5]]
    for past in PASTS:
        batch = rich_batch(past, offered)
        state, memories = model.recall(batch, memories)
        torch.testing.assert_close(
            model.score_candidates(state, batch.candidates)["target"], model.score(batch)["target"]
        )


@torch.no_grad()
def test_a_known_past_is_not_read_again(monkeypatch):
    model = made()
    _, memories = model.recall(rich_batch([[1, 2, 3]], [[1]]), [None])
    read = []
    step = model.cell.forward
    monkeypatch.setattr(model.cell, "forward", lambda slots, event: read.append(1) or step(slots, event))
    model.recall(rich_batch([[1, 2, 3, 4]], [[1]]), memories)
    assert len(read) == 1


@torch.no_grad()
@pytest.mark.parametrize("lifelong", [False, True])
def test_a_window_that_slid(lifelong):
    """Without `lifelong` the memory is made anew from the window; with it, it is that of all events ever seen."""
    model = made(lifelong=lifelong)
    first, then = rich_batch([[1, 2, 3, 4, 5, 6]], [[1]]), rich_batch([[1, 2, 3, 4, 5, 6, 7, 8]], [[1]])
    _, memories = model.recall(first, [None])
    state, _ = model.recall(then, memories)
    whole = made(max_history=8 if lifelong else 6).user_state(then)
    torch.testing.assert_close(state.slots.memory_BmD, whole.slots.memory_BmD)


def taste_batch(size, draw):
    """Two thirds of a past are of one of 6 groups, the last three events of another; the first candidate is of the former."""
    group = torch.rand(size, 6, generator=draw).argsort(1)
    past = torch.cat([group[:, :1].expand(-1, 6), group[:, 1:2].expand(-1, 3)], 1)
    past, offered = (1 + g * 4 + torch.randint(4, g.shape, generator=draw) for g in (past, group[:, [0, 1, 2, 3]]))
    label = torch.eye(4)[:1].repeat(size, 1)
    return batch_of(past.tolist(), offered.tolist(), labels={"target": label.flatten()})


def test_remembers_a_taste_that_the_newest_events_hide():
    torch.manual_seed(0)
    config = replace(TINY, dim=16, max_history=9, short_history=2, head=HeadConfig(widths=(32,), dropout=0.0))
    model = MIMN(config, space_of(24))
    train(model, taste_batch, steps=120, lr=0.02)
    assert share_right(model, taste_batch(200, torch.Generator().manual_seed(9))) > 0.9
