"""What the HSTU ranker keeps between requests: over many requests of a user, exact, and never more than it may."""

from dataclasses import replace

import pytest
import torch

from hstu_support import FORMS, SMALL_PRODUCTION, events, made, rich, with_candidates
from shortlist.data.batches import Batch, History
from shortlist.data.jagged import Jagged
from shortlist.models.base import Remembering
from shortlist.models.ranking.hstu_ranker import HSTURanker


class Watched:
    """A model, its memories by user, and how many tokens its layers were given at the last request."""

    def __init__(self, model: HSTURanker) -> None:
        self.model, self.kept, self.num_new = model, {}, 0
        model.stack.register_forward_pre_hook(lambda module, given: setattr(self, "num_new", len(given[0])))

    def ask(self, batch: Batch, names: list[str]) -> int:
        """A request for these users, checked against no memory at all; the tokens that were made anew."""
        state, kept = self.model.recall(batch, [self.kept.get(name) for name in names])
        num_new = self.num_new
        self.kept |= dict(zip(names, kept))
        fresh = self.model.user_state(batch)
        for mine, theirs in zip(
            (*state[1:], *(t for kv in state.known for t in kv)), (*fresh[1:], *(t for kv in fresh.known for t in kv))
        ):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
        offered = with_candidates(batch, [[3, 9, 11]] * batch.size).candidates
        torch.testing.assert_close(
            self.model.score_candidates(state, offered)["target"],
            self.model.score_candidates(fresh, offered)["target"],
            rtol=0,
            atol=1e-5,
        )
        return num_new


@torch.no_grad()
@pytest.mark.parametrize("form", ["merged", "interleaved", "prefix", "interleaved prefix", "production layer"])
def test_memories_over_a_user_s_requests(form):
    """max_history is 6; tokens made anew are counted in events of k tokens, and F for the prefix where all is made anew."""
    watched, batch = Watched(made(FORMS[form])), rich()
    k, F = watched.model.tokens.per_event, watched.model.num_prefix
    assert isinstance(watched.model, Remembering)

    def ask(cut: slice, later: int = 0) -> int:
        return watched.ask(events(batch, [(4, cut)], later), ["ann"])

    assert ask(slice(0, 3)) == 3 * k + F  # nothing known yet
    assert ask(slice(0, 4)) == 2 * k  # one event more: it, and the last one before
    assert ask(slice(0, 4)) == k  # the same again: the last event looks ahead to the request
    assert ask(slice(0, 4), later=999) == k  # the same later
    assert ask(slice(0, 6)) == 3 * k  # two events more
    assert ask(slice(0, 5)) == k  # the newest one is gone
    assert ask(slice(0, 6)) == 2 * k
    assert ask(slice(1, 7)) == 6 * k + F  # the window slid: all anew
    assert ask(slice(1, 7), later=5) == k
    assert ask(slice(0, 0)) == F  # everything is gone
    assert watched.kept["ann"] is None
    assert ask(slice(0, 1)) == k + F
    assert ask(slice(0, 2)) == 2 * k + F  # of one event nothing was kept


@torch.no_grad()
@pytest.mark.parametrize("form", ["merged", "interleaved"])
def test_memories_notice_what_changed_in_the_past(form):
    watched = Watched(made(FORMS[form]))
    k, batch = watched.model.tokens.per_event, events(rich(), [(4, slice(0, 6))])
    watched.ask(batch, ["ann"])
    history = batch.history
    at = torch.arange(6)
    changes = [
        (4, replace(history, items=history.items.with_values(history.items.values + (at == 2)))),  # events 2 to 5
        (3, replace(history, action=torch.where(at == 3, history.action % 3 + 1, history.action))),
        # The event before a moved one looks ahead to another time: 3, 4 and 5.
        (3, replace(history, time=history.time + (at >= 4))),
        (5, replace(history, value=history.value + (at == 1))),
    ]
    for num_events, changed in changes:
        watched.ask(batch, ["ann"])
        assert watched.ask(replace(batch, history=changed), ["ann"]) == num_events * k
    keep = at != 2
    columns = {name: getattr(history, name)[keep] for name in ("time", "action", "value", "group")}
    gone = History(items=Jagged.from_lengths(history.items.values[keep], torch.tensor([5])), **columns)
    watched.ask(batch, ["ann"])
    assert watched.ask(replace(batch, history=gone), ["ann"]) == 4 * k  # the event before the gap, and three after it


@torch.no_grad()
@pytest.mark.parametrize("form", ["merged", "interleaved prefix"])
def test_memories_of_a_batch_are_each_user_s_own(form):
    watched, batch = Watched(made(FORMS[form])), rich()
    names = ["a", "b", "c", "d", "e"]
    whole = [slice(0, 3), slice(None), slice(0, 1), slice(None), slice(0, 5)]
    watched.ask(events(batch, list(enumerate(whole))), names)
    assert [name for name in names if watched.kept[name] is not None] == ["a", "e"]
    new = watched.ask(events(batch, list(enumerate([slice(None)] * 5))), names)
    k, F = watched.model.tokens.per_event, watched.model.num_prefix
    # a: 4 events, 2 known; b: none; c: 2 new; d: 1 new; e: 8 events of which the window keeps 6 others.
    assert new == k * (2 + 0 + 2 + 1 + 6) + 4 * F
    stranger = watched.ask(
        events(batch, [(0, slice(None)), (3, slice(None))]), ["nobody", "a"]
    )  # a's memory is not d's past
    assert stranger == k * (4 + 1) + 2 * F


@torch.no_grad()
def test_another_context_makes_a_prefix_anew():
    watched, batch = Watched(made(FORMS["prefix"])), events(rich(), [(0, slice(None))])
    watched.ask(batch, ["ann"])
    assert watched.ask(batch, ["ann"]) == 1
    hour = replace(batch, context={**batch.context, "hour": batch.context["hour"] + 1})
    assert watched.ask(hour, ["ann"]) == 4 + watched.model.num_prefix
    assert Watched(made()).ask(hour, ["ann"]) == 4  # without a prefix the tower alone reads it


@torch.no_grad()
def test_a_memory_holds_no_more_than_it_says():
    _, kept = made(FORMS["interleaved"]).recall(rich(), [None] * 5)
    for memory in filter(None, kept):
        for tensor in memory.values():
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@torch.no_grad()
def test_marks_of_the_request_leave_nothing_to_keep():
    model, batch = made(SMALL_PRODUCTION), rich()
    state, kept = model.recall(batch, [None] * 5)
    assert kept == [None] * 5
    torch.testing.assert_close(state.user_BD, model.user_state(batch).user_BD)
