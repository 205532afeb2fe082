"""CAN: the formula pair by pair, tables of its own, crosses and their dictionary, unseen pairs, costs."""

from dataclasses import replace

import pytest
import torch

from interaction_support import ITEMS, flops_counted, flops_stated, pairs_batch, pairs_space
from ranking_support import batch_of, rich_batch, rich_space, share_right, space_of, train
from shortlist.data.schema import Categorical
from shortlist.errors import ConfigError
from shortlist.layers.co_action import CoActionConfig
from shortlist.layers.field_matrix import FieldsConfig
from shortlist.layers.id_pairs import IdPairs
from shortlist.layers.scoring import HeadConfig
from shortlist.models.ranking.can import CAN, CANConfig

PAST, OFFERED = [[1, 2, 3, 4], [], [5, 5], [6]], [[1, 7, 9], [2, 11], [], [3, 12, 8, 4]]
UNIT = CoActionConfig(feed_dim=3, widths=(4, 2), init_std=0.5)
TINY = CANConfig(
    fields=FieldsConfig(dim=4, max_history=3),
    co_action=UNIT,
    head=HeadConfig(widths=(6,), activation="relu", dropout=0.0, id_dropout=0.0),
)
MIXED = ("item*history", "item.category*history.category", "item*context.hour", "item.category*user")


def made(config: CANConfig = TINY, space=None) -> CAN:
    torch.manual_seed(0)
    return CAN(config, space or rich_space()).eval()


@pytest.mark.parametrize("independent", [False, True])
@torch.no_grad()
def test_the_outputs_pair_by_pair(independent):
    """One candidate and one pair at a time, by the plain unit; pairs of one id and of a past in one model."""
    model = made(replace(TINY, pairs=MIXED, co_action=replace(UNIT, pair_independence=independent)))
    pairs, batch, space = model.co_action, rich_batch(PAST, OFFERED), rich_space()
    output = pairs(*pairs.request(batch), batch.candidates)
    category = space.items.columns["category"]
    ind, feed = pairs.induction, pairs.feed
    slots = dict.fromkeys(MIXED, (0, 0))
    if independent:
        slots = {MIXED[0]: (0, 0), MIXED[1]: (0, 0), MIXED[2]: (1, 0), MIXED[3]: (1, 0)}

    def cut(row: torch.Tensor, slot: int, width: int) -> torch.Tensor:
        return row[slot * width : (slot + 1) * width]

    order = [MIXED[2], MIXED[3], MIXED[0], MIXED[1]]  # one id per request first
    for i, item in enumerate(batch.candidate_rows.values.tolist()):
        r = int(batch.candidate_rows.row_of_value[i])
        past = [p if p < 11 else 0 for p in PAST[r][-3:]]
        expected = []
        for name in order:
            weight = (
                ind["item_category"].weight()[category[item]]
                if "category*" in name
                else ind["item"].weight()[item if item < 11 else 0]
            )
            ids = {
                "history": past,
                "history.category": category[past].tolist(),
                "context.hour": [int(batch.context["hour"][r])],
                "user": [int(batch.user[r])],
            }[name.split("*")[1]]
            table = feed[name.split("*")[1].replace(".", "_")].weight()
            feeds = [cut(table[j], slots[name][1], UNIT.feed_dim) for j in ids]
            expected.append(pairs.unit.plain(cut(weight, slots[name][0], UNIT.induction_width), feeds))
        torch.testing.assert_close(output[i], torch.cat(expected))


@torch.no_grad()
def test_the_tower_reads_fields_units_and_crosses():
    model = made(replace(TINY, crosses=("item*history",), cross_rows=50, cross_dim=2))
    batch = rich_batch(PAST, OFFERED, target=[1.0, 0, 0, 1, 0, 1, 0, 0, 0])
    model.learn([batch])
    rows, state = batch.candidate_rows, model.user_state(batch)
    request = model.fields.request(batch).flatten(1)[rows.row_of_value]
    candidate = model.fields.candidate(batch.candidates).flatten(1)
    units = model.co_action(state.powers, state.is_real, batch.candidates)
    ((key, real),) = model._pairs(state.crossed, batch.candidates)
    known = model.crosses.rows(key)
    assert (known[real] > 0).all()
    crossed = torch.stack([model.crosses.table.weight()[known[i][real[i]]].sum(0) for i in range(len(key))])
    expected = model.deep.tower.mlp(torch.cat([request, candidate, units, crossed], 1))[:, 0]
    torch.testing.assert_close(model.score(batch)["target"], expected)


def test_co_action_tables_are_its_own():
    """Sharing them with the fields' embeddings is what the paper ablates away."""
    model = made()
    tables = {id(p) for p in model.co_action.parameters()}
    assert tables.isdisjoint(id(p) for p in model.fields.parameters())
    widths = {name: table.weight().shape[1] for name, table in model.co_action.induction.items()}
    assert widths == {"item": 3 * 4 + 4 * 2}
    independent = made(replace(TINY, pairs=MIXED, co_action=replace(UNIT, pair_independence=True)))
    assert independent.co_action.induction["item"].weight().shape[1] == 2 * UNIT.induction_width
    assert independent.co_action.feed["history"].weight().shape[1] == UNIT.feed_dim


def test_neither_pairs_nor_crosses_is_the_plain_tower():
    model, batch = made(replace(TINY, pairs=())), rich_batch(PAST, OFFERED)
    assert len(model.phases()) == 1
    whole = torch.cat(
        [model.fields.request(batch)[batch.candidate_rows.row_of_value], model.fields.candidate(batch.candidates)], 1
    )
    torch.testing.assert_close(model.score(batch)["target"], model.deep.tower.mlp(whole.flatten(1))[:, 0])


def trained(config: CANConfig, draw_batch) -> CAN:
    model = made(replace(config, fields=FieldsConfig(dim=4, names=("item", "context.noise"))), pairs_space())
    for phase in model.phases():
        if phase.learn is not None:
            draw = torch.Generator().manual_seed(5)
            phase.learn([draw_batch(64, draw) for _ in range(20)])
    train(model, draw_batch, steps=150, lr=0.02)
    return model


UNIT_ONLY = replace(
    TINY, pairs=("item*context.kind",), co_action=CoActionConfig(feed_dim=4, widths=(4, 2), orders=2, init_std=0.1)
)
CROSS_ONLY = replace(TINY, pairs=(), crosses=("item*context.kind",), cross_rows=200, cross_dim=4)


@pytest.mark.parametrize("config", [UNIT_ONLY, CROSS_ONLY], ids=["units", "crosses"])
def test_learns_pairs_that_the_tower_is_not_shown(config):
    model = trained(config, pairs_batch)
    assert share_right(model, pairs_batch(400, torch.Generator().manual_seed(9))) > 0.95


KINDS = 24


def cells(size: int, draw: torch.Generator):
    """Rows of one item and one context, positive where their angles are within 90 degrees; and which cells training never has."""
    angle = torch.Generator().manual_seed(3)
    of_item, of_kind = (2 * torch.pi * torch.rand(n + 1, generator=angle) for n in (ITEMS, KINDS))
    hidden = torch.rand(ITEMS + 1, KINDS + 1, generator=angle) < 0.2
    item = torch.randint(1, ITEMS + 1, (size,), generator=draw)
    kind = torch.randint(1, KINDS + 1, (size,), generator=draw)
    label = (torch.cos(of_item[item] - of_kind[kind]) > 0).float()
    batch = batch_of(
        [[]] * size,
        item[:, None].tolist(),
        context={"kind": kind, "noise": torch.ones_like(kind)},
        labels={"target": label},
    )
    return batch, hidden[item, kind]


def cells_of_training(size: int, draw: torch.Generator):
    batch, hidden = cells(4 * size, draw)
    return replace(batch, weight=(~hidden).float())


def test_on_pairs_that_training_lacked_crosses_know_nothing_and_units_do():
    """Units carry over what the two ids showed elsewhere; crosses have one row for all pairs that training lacked."""
    context = (Categorical(name="kind", size=KINDS), Categorical(name="noise", size=7))
    test, hidden = cells(2000, torch.Generator().manual_seed(9))
    right = {}
    for name, config in (("units", UNIT_ONLY), ("crosses", CROSS_ONLY)):
        fields = FieldsConfig(dim=4, names=("item", "context.noise"))
        model = made(replace(config, fields=fields, cross_rows=1000), space_of(ITEMS, context_fields=context))
        if model.crosses is not None:
            seen, unseen = cells(4000, torch.Generator().manual_seed(4))
            ids = IdPairs(model.space, ("item*context.kind",), 1)
            item = ids.candidate(seen.candidate_rows.values)["item"]
            key = model.crosses.key(0, item, seen.context["kind"][:, None])
            model.crosses.learn([key[~unseen]])
            assert not model.crosses.rows(key)[unseen].any()
        train(model, cells_of_training, steps=200, lr=0.02)
        with torch.no_grad():
            score, label = model.score(test)["target"], test.labels["target"] > 0
        for part, chosen in (("seen", ~hidden), ("unseen", hidden)):
            right[name, part] = float((score[chosen & label][:, None] > score[chosen & ~label]).float().mean())
    assert min(right["units", "seen"], right["crosses", "seen"]) > 0.95
    assert right["units", "unseen"] > 0.85
    assert right["units", "unseen"] > right["crosses", "unseen"] + 0.2


@pytest.mark.parametrize("pairs", [("item*history",), ("item*context.hour", "item*user")])
def test_stated_costs_are_what_is_computed(pairs):
    model = made(replace(TINY, pairs=pairs, co_action=CoActionConfig(), fields=FieldsConfig(dim=16, max_history=30)))
    stated, counted = flops_stated(model, 20, 40), flops_counted(model, 20, 40)
    assert stated[1] == pytest.approx(counted[1], rel=0.2)
    assert stated[0] >= 0.9 * counted[0]


def test_the_dictionary_is_saved_with_the_weights():
    config = replace(TINY, crosses=("item*history",), cross_rows=50)
    model, fresh = made(config), made(config)
    model.learn([rich_batch(PAST, OFFERED)])
    from shortlist.models.base import load_weights

    load_weights(fresh, model.state_dict())
    batch = rich_batch(PAST, OFFERED)
    with torch.no_grad():
        assert torch.equal(fresh.score(batch)["target"], model.score(batch)["target"])


def test_settings_out_of_range_are_refused_by_name():
    with pytest.raises(ConfigError, match="pairs lists a pair twice"):
        CANConfig(pairs=("item*user", "item*user"))
    with pytest.raises(ConfigError, match="cross_rows"):
        CANConfig(cross_rows=0)
    with pytest.raises(ConfigError, match=r"context\.hour"):
        made(replace(TINY, pairs=("item*context.hour",)), space_of(5))
    assert made(TINY, space_of(5)).score(batch_of([[1]], [[2, 3]]))["target"].shape == (2,)
