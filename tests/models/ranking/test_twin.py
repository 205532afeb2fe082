"""TWIN: relevance against the formula, heads in turn, consistency of both stages, biases per event."""

from dataclasses import replace

import pytest
import torch

from ranking_support import rich_batch, rich_space
from shortlist.layers.scoring import HeadConfig
from shortlist.models.ranking.twin import TWIN, TWINConfig, take_turns

TINY = TWINConfig(
    dim=8, num_found=3, cross_dim=4, short_history=2, max_history=8, id_dropout=0.0, head=HeadConfig(widths=(16,))
)
PAST = [[1, 2, 3, 4, 3, 2, 1, 6], [], [5, 5], [6]]
OFFERED = [[1, 7, 9], [2, 11], [], [3, 12, 8, 4]]


def made(**changes):
    torch.manual_seed(0)
    model = TWIN(replace(TINY, **changes), rich_space(actions=("view", "buy")))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    return model.eval()


def alpha_of(model, state, item_D):
    """[H, E] by the formula, event by event."""
    relevance = model.relevance
    query = relevance.query(item_D).view(relevance.shape)
    rows = []
    for item_vector, bias_H in zip(state.past.item_ED, state.bias_EH):
        key = relevance.key(item_vector).view(relevance.shape)
        rows.append((query * key).sum(1) / relevance.shape[1] ** 0.5 + bias_H)
    return torch.stack(rows, 1)


def by_turns(alpha_HL, k):
    """The traversal as the paper tells it."""
    orders = [sorted(range(alpha_HL.shape[1]), key=lambda i: (-round(a[i].item(), 4), -i)) for a in alpha_HL]
    chosen = []
    for rank in range(alpha_HL.shape[1]):
        for order in orders:
            if order[rank] not in chosen and len(chosen) < k:
                chosen.append(order[rank])
    return chosen


@torch.no_grad()
@pytest.mark.parametrize("num_heads", [1, 2, 4])
@pytest.mark.parametrize("pairs_at_once", [1, 1_000_000])
def test_first_stage_lets_heads_take_turns(num_heads, pairs_at_once):
    model = made(num_heads=num_heads, pairs_at_once=pairs_at_once)
    batch = rich_batch(PAST, OFFERED)
    state, rows = model.user_state(batch), batch.candidate_rows
    item = model.encoder(rows.values)
    chosen = model.found(state, rows, item)
    for t, row in enumerate(rows.row_of_value.tolist()):
        a, b = batch.history.items.offsets[row : row + 2].tolist()
        expected = by_turns(alpha_of(model, state, item[t])[:, a:b], 3) if b > a else []
        assert chosen.event[t][chosen.is_real[t]].tolist() == [a + i for i in expected]


def test_turns_by_hand():
    """Head 1 names 0, 1, 2, 3; head 2 names 1, 0, 3, 2: the calls are 0 1 1 0 2 3 3 2."""
    alpha = torch.tensor([[4.0, 3, 2, 1], [3.0, 4, 1, 2]])[None, None]
    mask = torch.ones(1, 1, 4, dtype=torch.bool)
    assert take_turns(alpha, mask, 3).tolist() == [[[0, 1, 2]]]
    mask[0, 0, 0] = False
    assert take_turns(alpha, mask, 3)[0, 0].tolist() == [1, 2, 3]  # both name 1 first, then 2 and 3


@torch.no_grad()
def test_second_stage_agrees_with_the_formula():
    model, batch = made(), rich_batch(PAST, OFFERED)
    state, rows = model.user_state(batch), batch.candidate_rows
    item = model.encoder(rows.values)
    chosen = model.found(state, rows, item)
    exact = model.exact(state, item, chosen)
    for t in range(len(rows.values)):
        events = chosen.event[t][chosen.is_real[t]]
        weight = alpha_of(model, state, item[t])[:, events].softmax(1)
        torch.testing.assert_close(exact[t], model.value((weight @ state.past.event_ED[events]).flatten()))
    assert (exact[3:5] == 0).all()


@torch.no_grad()
def test_one_head_s_stages_agree_wholly():
    """The first stage hands over exactly what the second would rank first on the whole past (consistency 100 of 100)."""
    model, batch = made(num_heads=1), rich_batch(PAST, OFFERED)
    state, rows = model.user_state(batch), batch.candidate_rows
    item = model.encoder(rows.values)
    chosen = model.found(state, rows, item)
    exact = torch.stack([alpha_of(model, state, i)[0, :8] for i in item[:3]])
    for t in range(3):
        handed = exact[t][chosen.event[t]].sort(descending=True).values
        torch.testing.assert_close(handed, exact[t].sort(descending=True).values[:3], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_biases_are_one_per_event():
    """Not one per head for the whole past, which could change no ranking: age, action and how often the item stands there."""
    model, batch = made(), rich_batch([[1, 2, 2, 2, 2]], [[1]])
    bias = model.user_state(batch).bias_EH
    assert not torch.allclose(bias[0], bias[4])
    torch.testing.assert_close(bias[1], bias[2])  # 4 and 3 hours ago are one power of two, the rest is equal
    one = replace(batch.history, action=torch.tensor([1, 1, 2, 1, 1]))
    other = model.user_state(replace(batch, history=one)).bias_EH
    assert not torch.allclose(other[1], other[2])
    once = model.user_state(rich_batch([[3, 4, 2, 5, 6]], [[1]])).bias_EH
    assert not torch.allclose(once[2], bias[2])  # the same item at the same age, once for four times


def test_both_stages_learn_through_the_second():
    model, batch = made().train(), rich_batch(PAST, OFFERED, target=[1.0, 0, 0, 1, 0, 1, 0, 0, 0])
    model.losses(batch)["target"].backward()
    assert all(p.grad.abs().sum() > 0 for p in model.relevance.parameters())
