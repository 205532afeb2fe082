"""Weights of an earlier run: rows of users and items find their places, new ones keep their own, and what does not fit is said."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from shortlist.cascade.warm import FirstWeights
from shortlist.models.base import Phase
from shortlist.registry import find
from support import planted_view


def made(name, view, seed, **settings):
    entry = find(name)
    torch.manual_seed(seed)
    return entry.cls(entry.cls.Config(**settings), view.space).eval()


@pytest.fixture
def view():
    return planted_view()


def grown(view, users, items):
    """The space after so many users and items joined."""
    table = view.space.items
    more = torch.arange(table.num_rows + items).clamp(max=table.num_rows - 1)
    known = torch.cat([view.space.known_items, torch.zeros(items, dtype=torch.bool)])
    space = replace(
        view.space,
        items=type(table)(table.num_rows + items, table.fields, table.gather(more)),
        known_items=known,
        num_users=view.space.num_users + users,
    )
    return replace(view, space=space)


def identity(num, more=0):
    return np.concatenate([np.arange(num + 1), np.zeros(more)]).astype(np.int64)


def test_the_same_space_gets_the_same_weights(view):
    old, new = (made("sasrec", view, seed, dim=8) for seed in (0, 1))
    first = FirstWeights(version="v", systems={"s": old}, user_before=identity(view.space.num_users))
    assert first.obstacle("s", new) is None
    assert first.give("s", new) == "v"
    for name, tensor in new.named_parameters():
        assert torch.equal(tensor, old.state_dict()[name]), name


def test_rows_of_new_items_keep_their_own_first_weights(view):
    larger = grown(view, 0, 3)
    old, new, untouched = (
        made("sasrec", view, 0, dim=8),
        made("sasrec", larger, 1, dim=8),
        made("sasrec", larger, 1, dim=8),
    )
    FirstWeights(version="v", systems={"s": old}, user_before=identity(view.space.num_users)).give("s", new)
    before, fresh, num = old.state_dict(), untouched.state_dict(), view.space.num_items + 1
    grew = 0
    for name, tensor in new.named_parameters():
        if tensor.shape == before[name].shape:
            assert torch.equal(tensor, before[name])
        else:
            grew += 1
            assert torch.equal(tensor[:num], before[name])
            assert torch.equal(tensor[num:], fresh[name][num:])
    assert grew >= 1


class Table(torch.nn.Module):
    """A system with one weight per user and item, and nothing else."""

    def __init__(self, users, items, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.space = type("Space", (), {"num_users": users, "num_items": items})()
        self.user = torch.nn.Parameter(torch.rand(users + 1, 2))
        self.item = torch.nn.Parameter(torch.rand(items + 1, 2))
        self.register_buffer("seen", torch.rand(items + 1))

    def phases(self):
        return (Phase(name="train", feed="targets", losses=lambda batch: {}),)


def test_users_are_looked_up_by_their_old_rows():
    old, new, own = Table(4, 5, 0), Table(6, 5, 1), Table(6, 5, 1)
    before = np.array([0, 3, 1, 0, 4, 2, 0])
    FirstWeights(version="v", systems={"t": old}, user_before=before).give("t", new)
    for row, source in enumerate(before):
        wanted = old.user[source] if source or not row else own.user[row]
        assert torch.equal(new.user[row], wanted), row
    assert torch.equal(new.item, old.item)
    assert torch.equal(new.seen, old.seen)


def test_a_user_whom_training_did_not_know_begins_anew():
    """Row 5 was in the earlier run's log and not among those it had weights for."""
    old, new, own = Table(2, 5, 0), Table(3, 5, 1), Table(3, 5, 1)
    FirstWeights(version="v", systems={"t": old}, user_before=np.array([0, 1, 2, 5])).give("t", new)
    assert torch.equal(new.user[3], own.user[3])
    assert torch.equal(new.user[1:3], old.user[1:3])


def test_what_can_not_go_on_is_said_and_left_alone(view):
    old, new = Table(4, 5, 0), Table(4, 5, 1)
    old.user = torch.nn.Parameter(torch.rand(5, 3))
    first = FirstWeights(version="v", systems={"t": old}, user_before=identity(4))
    own = new.item.clone()
    assert first.give("t", new) == "its own"
    assert torch.equal(new.item, own)
    assert first.cold == {"t": "user was [5, 3] and is [5, 2]"}
    assert first.obstacle("other", new) == "the run before has no such system"
    assert first.obstacle("t", made("sasrec", view, 0, dim=8)) == "the run before has no such system"
    phase = new.phases()[0]
    new.phases = lambda: (phase, phase)
    assert "several steps" in FirstWeights(version="v", systems={"t": new}, user_before=identity(4)).obstacle("t", new)
