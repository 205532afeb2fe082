"""SIM: hard search by hand, soft search against sorting, the auxiliary task."""

from dataclasses import replace

import pytest
import torch

from ranking_support import rich_batch, rich_space, space_of
from shortlist.errors import ConfigError
from shortlist.layers.scoring import HeadConfig
from shortlist.layers.search import newest_by_scan
from shortlist.models.ranking.sim import SIM, SIMConfig

HARD = SIMConfig(
    dim=8, num_found=2, short_history=2, max_history=8, id_dropout=0.0, head=HeadConfig(widths=(16,), dropout=0.0)
)
SOFT = replace(HARD, search="soft", search_dim=4)
PAST = [[1, 2, 3, 4, 3, 2, 1, 6], [], [5, 5], [6]]
OFFERED = [[1, 7, 9], [2, 11], [], [3, 12, 8, 4]]


def made(config, space=None):
    torch.manual_seed(0)
    model = SIM(config, space or rich_space())
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    return model.eval()


def found(model, batch):
    rows = batch.candidate_rows
    return model.found(model.user_state(batch), rows, model.encoder(rows.values))


@torch.no_grad()
def test_hard_search_by_hand():
    """Categories repeat 1 2 3 over the items: 1, 4 and 7 are of one, 3 and 6 and 9 of another."""
    chosen = found(made(HARD), rich_batch(PAST, OFFERED))
    assert chosen.event[0].tolist() == [6, 3]  # candidate 1: the newest 1 and the 4, not the older 1
    assert chosen.event[1].tolist() == [6, 3]  # candidate 7 likewise
    assert chosen.event[2].tolist() == [7, 4]  # candidate 9: 6 and the newer 3
    assert not chosen.is_real[3:5].any()
    assert chosen.event[5].tolist() == [10, 0]  # candidate 3 of the last request: its only event
    assert chosen.is_real[5].tolist() == [True, False]


@torch.no_grad()
@pytest.mark.parametrize("attribute", ["category", "words", "item"])
def test_hard_search_equals_a_scan(attribute):
    model, batch = made(replace(HARD, attribute=attribute, num_found=3)), rich_batch(PAST, OFFERED)
    rows, past = batch.candidate_rows, batch.history.items
    code = model.attribute_N
    plain = newest_by_scan(past, code[past.values], rows, code[rows.values], 3)
    fast = found(model, batch)
    for t in range(len(rows.values)):
        assert fast.event[t][fast.is_real[t]].tolist() == plain.event[t][plain.is_real[t]].tolist()


def test_an_attribute_that_is_not_there():
    with pytest.raises(ConfigError, match="colour"):
        made(replace(HARD, attribute="colour"))
    with pytest.raises(ConfigError, match="search"):
        replace(HARD, search="medium")


@torch.no_grad()
def test_without_fields_the_item_itself_is_searched():
    model = made(HARD, space_of(9))
    chosen = found(model, rich_batch([[1, 2, 1, 3]], [[1, 3]]))
    assert chosen.event[0].tolist() == [2, 0]
    assert chosen.is_real[1].tolist() == [True, False]


@torch.no_grad()
@pytest.mark.parametrize("pairs_at_once", [1, 1_000_000])
def test_soft_search_is_the_highest_inner_products(pairs_at_once):
    model, batch = made(replace(SOFT, pairs_at_once=pairs_at_once, num_found=3)), rich_batch(PAST, OFFERED)
    chosen, rows = found(model, batch), batch.candidate_rows
    past = batch.history.items
    for t, (row, item) in enumerate(zip(rows.row_of_value.tolist(), rows.values.tolist())):
        a, b = past.offsets[row : row + 2].tolist()
        keys = model.soft.event(model.encoder(past.values[a:b]))
        relevance = keys @ model.soft.item(model.encoder(torch.tensor([item])))[0]
        order = sorted(range(b - a), key=lambda i: (-round(relevance[i].item(), 4), -i))[:3]
        assert chosen.event[t][chosen.is_real[t]].tolist() == [a + i for i in order]


@torch.no_grad()
def test_summary_is_the_mean_by_relevance():
    model, batch = made(SOFT), rich_batch(PAST, OFFERED)
    state, rows = model.user_state(batch), batch.candidate_rows
    item = model.encoder(rows.values)
    fast = model.soft.summary(state.key_ES, state.past, item, rows.row_of_value)
    for t, row in enumerate(rows.row_of_value.tolist()):
        a, b = batch.history.items.offsets[row : row + 2].tolist()
        past = state.past.item_ED[a:b]
        relevance = model.soft.event(past) @ model.soft.item(item[t])
        torch.testing.assert_close(fast[t], relevance @ past / max(b - a, 1))


def test_only_its_own_loss_teaches_the_soft_search():
    batch = rich_batch(PAST, OFFERED, target=[1.0, 0, 0, 1, 0, 1, 0, 0, 0])
    for weight in (0.0, 0.5):
        model = made(replace(SOFT, search_loss=weight)).train()
        model.losses(batch)["target"].backward()
        grads = [p.grad for p in model.soft.parameters()]
        assert all((g is not None) == (weight > 0) for g in grads)
    assert all(g.abs().sum() > 0 for g in grads[:2])
    assert made(HARD).soft is None


@torch.no_grad()
def test_its_own_loss_is_added_with_its_weight():
    batch = rich_batch(PAST, OFFERED, target=[1.0, 0, 0, 1, 0, 1, 0, 0, 0])
    losses = [made(replace(SOFT, search_loss=w)).losses(batch)["target"] for w in (0.0, 1.0, 2.0)]
    torch.testing.assert_close(losses[2] - losses[0], 2 * (losses[1] - losses[0]))
    assert losses[1] > losses[0]
