"""Co-action units by hand and against the formula; ids of pairs; the dictionary of Cartesian crosses."""

import pytest
import torch

from ranking_support import rich_batch, rich_space
from shortlist.errors import ConfigError
from shortlist.layers.co_action import CoAction, CoActionConfig, powers
from shortlist.layers.id_pairs import CrossTable, IdPairs

PAST, OFFERED = [[1, 2, 3], [], [5, 5]], [[4, 12], [6], [7]]


def test_a_micro_network_by_hand():
    unit = CoAction(CoActionConfig(feed_dim=2, widths=(1, 2), orders=2, bias=True))
    weight = torch.tensor([1.0, -1.0, 0.5, 2.0, 3.0, 0.0, 1.0])  # w1 = [1; -1], b1 = .5, w2 = [2 3], b2 = [0 1]
    feed = torch.tensor([2.0, 1.0])
    first = torch.tanh(torch.tensor([2.0 - 1 + 0.5, 4.0 - 1 + 0.5]))  # orders 1 and 2
    expected = torch.stack([first, 2 * first, 3 * first + 1], dim=1).flatten()
    made = unit(weight[None, None], powers(feed, 2)[None, None, None], torch.ones(1, 1, 1, dtype=torch.bool))
    torch.testing.assert_close(made[0, 0], expected)
    torch.testing.assert_close(unit.plain(weight, [feed]), expected)


def test_one_layer_of_one_output_is_an_inner_product():
    unit = CoAction(CoActionConfig(feed_dim=4, widths=(1,), orders=1))
    weight, feed = torch.randn(3, 1, 4), torch.randn(3, 1, 1, 4)
    made = unit(weight, powers(feed, 1), torch.ones(3, 1, 1, dtype=torch.bool))
    torch.testing.assert_close(made[:, 0, 0], (weight[:, 0] * feed[:, 0, 0]).sum(1))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("combine", ["concat", "sum"])
@pytest.mark.parametrize("order_independence", [False, True])
def test_all_pairs_at_once_are_each_pair_by_the_formula(bias, combine, order_independence):
    config = CoActionConfig(
        feed_dim=3, widths=(4, 2), bias=bias, combine=combine, order_independence=order_independence
    )
    torch.manual_seed(0)
    unit, t, M, S = CoAction(config), 5, 2, 4
    weight, feed = torch.randn(t, M, config.induction_width), torch.randn(t, M, S, 3)
    real = torch.rand(t, M, S) < 0.6
    made = unit(weight, powers(feed, 3), real)
    assert made.shape == (t, M, config.out_width)
    for i in range(t):
        for m in range(M):
            expected = unit.plain(weight[i, m], list(feed[i, m][real[i, m]]))
            torch.testing.assert_close(made[i, m], expected)


def test_padding_gives_nothing_even_with_biases():
    config = CoActionConfig(feed_dim=2, widths=(2,), bias=True)
    unit, weight = CoAction(config), torch.randn(1, 1, config.induction_width)
    feed = torch.zeros(1, 1, 3, 2)
    assert not unit(weight, powers(feed, 3), torch.zeros(1, 1, 3, dtype=torch.bool)).any()
    assert unit(weight, powers(feed, 3), torch.ones(1, 1, 3, dtype=torch.bool)).any()


def test_parameters_of_the_default_unit_are_the_paper_s():
    config = CoActionConfig()
    assert config.num_weights == config.induction_width == 16 * 8 + 8 * 4 == 160
    assert config.out_width == 3 * (8 + 4)
    assert CoActionConfig(order_independence=True).induction_width == 480
    for wrong in ({"orders": 0}, {"widths": ()}, {"combine": "max"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            CoActionConfig(**wrong)


def test_ids_of_both_sides():
    space, batch = rich_space(), rich_batch(PAST, OFFERED)
    ids = IdPairs(space, ("item*history", "item.category*history.category", "item*context.hour", "item*user"), 2)
    candidate = ids.candidate(batch.candidate_rows.values)
    assert candidate["item"].tolist() == [4, 0, 6, 7]  # 12 had no training events
    assert candidate["item.category"].tolist() == space.items.columns["category"][[4, 12, 6, 7]].tolist()
    request = ids.request(batch)
    assert request["history"].ids_BL.tolist() == [[2, 3], [0, 0], [5, 5]]
    assert request["history"].is_real_BL.tolist() == [[True, True], [False, False], [True, True]]
    assert request["context.hour"].ids_BL.tolist() == [[h] for h in batch.context["hour"].tolist()]
    assert request["user"].is_real_BL.all()


@pytest.mark.parametrize(
    ("pair", "word"),
    [
        ("item", "CANDIDATE"),
        ("history*item", "history"),
        ("item*item", "item"),
        ("item.price*user", "price"),
        ("item.words*user", "words"),
    ],
)
def test_pairs_that_are_none_are_refused(pair, word):
    with pytest.raises(ConfigError, match=word):
        IdPairs(rich_space(), (pair,), 5)


def keys_of(table: CrossTable, pairs: list[tuple[int, int]], pair: int = 0) -> torch.Tensor:
    candidate, request = torch.tensor(pairs).T
    return table.key(pair, candidate, request[:, None])


@torch.no_grad()
def test_a_dictionary_of_crosses_knows_the_pairs_of_training_alone():
    ids = IdPairs(rich_space(), ("item*user", "item*context.hour"), 5)
    table = CrossTable(ids, 4, num_rows=10)
    seen, others = [(1, 2), (2, 1), (3, 3)], [(1, 1), (2, 2), (12, 10)]
    assert not table.rows(keys_of(table, seen)).any()  # nothing is known yet
    table.learn([keys_of(table, seen).flatten(), keys_of(table, seen[:1], pair=1).flatten()])
    rows = table.rows(torch.cat([keys_of(table, seen), keys_of(table, seen[:1], pair=1)]))
    assert sorted(rows.flatten().tolist()) == [
        1,
        2,
        3,
        4,
    ]  # each its own row: the same ids in another pair are another pair
    assert not table.rows(keys_of(table, others)).any()
    assert table.num_used == 5 * 4
    real = torch.tensor([[True, True, False]])
    both = torch.cat([keys_of(table, [s]) for s in (seen[0], others[0], seen[1])], dim=1)
    weight = table.table.weight()
    torch.testing.assert_close(table(both, real)[0], weight[rows[0, 0]] + weight[0])


def test_the_most_frequent_pairs_are_kept_and_rows_keep_their_meaning():
    table = CrossTable(IdPairs(rich_space(), ("item*user",), 5), 4, num_rows=2)
    table.learn(
        [keys_of(table, [(1, 1), (2, 2), (2, 2)]).flatten(), keys_of(table, [(3, 3), (3, 3), (3, 3)]).flatten()]
    )
    assert table.rows(keys_of(table, [(1, 1), (2, 2), (3, 3)])).flatten().tolist() == [0, 1, 2]
    table.learn([keys_of(table, [(1, 1)] * 9).flatten()])
    assert table.rows(keys_of(table, [(1, 1), (2, 2), (3, 3)])).flatten().tolist() == [0, 1, 2]


def test_no_two_pairs_share_a_key():
    space = rich_space()
    ids = IdPairs(space, ("item*user", "item.category*context.hour", "item*history"), 5)
    table, keys = CrossTable(ids, 2, 5), []
    for m, (candidate, request) in enumerate(ids.pairs):
        grid = torch.cartesian_prod(
            torch.arange(ids.candidate_sizes[candidate] + 1), torch.arange(ids.request_sizes[request] + 1)
        )
        keys.append(table.key(m, grid[:, 0], grid[:, 1:]).flatten())
    whole = torch.cat(keys)
    assert len(whole.unique()) == len(whole)
