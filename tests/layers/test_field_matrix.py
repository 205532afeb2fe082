"""All fields as vectors: names, order, what a history is, unknown ids."""

import pytest
import torch

from ranking_support import batch_of, rich_batch, rich_space, space_of
from shortlist.data.schema import Categorical, FieldTable
from shortlist.embeddings.base import TableChoice, tables_of
from shortlist.errors import ConfigError
from shortlist.layers.field_matrix import FieldMatrix, FieldsConfig, field_names
from shortlist.layers.field_tower import FieldBlock, LinearPart, PairVectors
from shortlist.layers.scoring import HeadConfig

PAST, OFFERED = [[1, 2, 3], [], [5, 5]], [[4, 12], [6], []]


def made(*names: str, **settings) -> FieldMatrix:
    torch.manual_seed(0)
    return FieldMatrix(rich_space(), 4, names or field_names(rich_space(), user=True, history=True), **settings).eval()


@torch.no_grad()
def test_every_field_stands_under_its_name():
    matrix, batch = made(max_history=2), rich_batch(PAST, OFFERED)
    request, candidate = matrix.request(batch), matrix.candidate(batch.candidate_rows.values)
    at = {name: request[:, i] for i, name in enumerate(matrix.request_names)}
    of = {name: candidate[:, i] for i, name in enumerate(matrix.candidate_names)}
    assert set(at) == {
        "user",
        "user.country",
        "context.hour",
        "context.rain",
        "history",
        *[f"history.{n}" for n in ("category", "price", "words")],
    }
    torch.testing.assert_close(at["user"], matrix.user_ids.weight()[batch.user])
    torch.testing.assert_close(at["context.hour"], matrix.context_fields.maps[0].weight[batch.context["hour"]])
    ids, columns = matrix.item_ids.weight(), rich_space().items.columns
    torch.testing.assert_close(at["history"][0], ids[[2, 3]].mean(0))  # the last two
    assert not at["history"][1].any()
    torch.testing.assert_close(of["item"], ids[[4, 0, 6]])  # 12 had no training events
    category = matrix.item_fields.maps[0].weight
    torch.testing.assert_close(of["item.category"], category[columns["category"][[4, 12, 6]]])
    torch.testing.assert_close(at["history.category"][2], category[columns["category"][5]])
    words = matrix.item_fields.maps[2].weight
    torch.testing.assert_close(of["item.words"][0], words[columns["words"].select(torch.tensor([4])).values].mean(0))


@torch.no_grad()
def test_a_part_of_the_fields_in_any_order():
    batch = rich_batch(PAST, OFFERED)
    some = made("item.price", "history.category", "context.hour")
    assert some.request_names == ("context.hour", "history.category")
    assert some.candidate_names == ("item.price",)
    assert some.request(batch).shape == (3, 2, 4)
    assert some.candidate(batch.candidate_rows.values).shape == (3, 1, 4)
    assert some.item_ids is None
    assert made("user").candidate(batch.candidate_rows.values).shape == (3, 0, 4)
    assert made("item").request(batch).shape == (3, 0, 4)


def test_a_field_that_is_not_there_is_named_with_its_neighbours():
    with pytest.raises(ConfigError, match=r"no field 'context.hours': did you mean context.hour"):
        made("context.hours")


def test_the_same_name_on_two_sides_is_two_fields():
    space = space_of(
        3,
        item_fields=(Categorical(name="country", size=2),),
        item_columns={"country": torch.tensor([0, 1, 2, 1])},
        user_fields=(Categorical(name="country", size=4),),
    )
    matrix = FieldMatrix(space, 2, field_names(space, user=False, history=False))
    assert matrix.request_names + matrix.candidate_names == ("user.country", "item", "item.country")
    batch = batch_of([[]], [[1, 2]], user_fields={"country": torch.tensor([4])})
    assert matrix.request(batch).shape == (1, 1, 2)
    assert isinstance(space.items, FieldTable)


def test_ids_are_dropped_in_training_alone():
    matrix, rows = made("item", id_dropout=0.9), torch.full((200,), 3)
    assert (matrix.candidate(rows) == matrix.item_ids.weight()[3]).all()
    dropped = (matrix.train().candidate(rows)[:, 0] == matrix.item_ids.weight()[0]).all(1)
    assert 0.8 < dropped.float().mean() < 1


@torch.no_grad()
def test_pair_fields_as_vectors_by_hand():
    torch.manual_seed(0)
    space, pair = rich_space(), {"seen": torch.tensor([0.1, -3.0]), "since": torch.tensor([0.5, 1.0])}
    vectors = PairVectors(space, 2, 4)
    made = vectors(pair, 2)
    assert made.shape == (2, 2, 4)
    seen = torch.tensor([[0.1, 1.0, 0.1], [-3.0, 0.0, 0.0]])  # the number, ramps -1..0 and 0..1
    torch.testing.assert_close(made[:, 0], seen @ vectors.weight_PKD[0])
    assert PairVectors(space_of(3), 2, 4)({}, 5).shape == (5, 0, 4)
    linear = PairVectors(space, 0, 4)
    torch.testing.assert_close(linear(pair, 2)[:, 1], pair["since"][:, None] * linear.weight_PKD[1])


@torch.no_grad()
def test_the_linear_part_adds_up_one_weight_per_value():
    linear = LinearPart(rich_space(tasks=("a", "b")), FieldsConfig(), HeadConfig(use_user_ids=True)).eval()
    linear.bias_T.copy_(torch.tensor([1.0, 2.0]))
    batch = rich_batch(PAST, OFFERED)
    both = linear.request(batch)[batch.candidate_rows.row_of_value] + linear.candidate(batch.candidates)
    block = linear.weights
    whole = torch.cat([block.request(batch)[batch.candidate_rows.row_of_value], block.candidate(batch.candidates)], 1)
    assert whole.shape == (3, block.num_fields, 2)
    torch.testing.assert_close(both, whole.sum(1) + torch.tensor([1.0, 2.0]))


def test_tables_are_of_the_chosen_kind():
    head, fields = HeadConfig(use_user_ids=True), FieldsConfig(table=TableChoice(sparse=True))
    block = FieldBlock(rich_space(), 4, fields, head)
    assert len(tables_of(block)) == 2
    assert all(table.rows.sparse for table in tables_of(block))
    with pytest.raises(ConfigError, match="dim"):
        FieldsConfig(dim=0).check("x")
    with pytest.raises(ConfigError, match="twice"):
        FieldsConfig(names=("item", "item")).check("x")
