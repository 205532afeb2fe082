"""Search, attention, hashes and windows of long pasts against hand-made cases and brute force."""

import math

import pytest
import torch

from ranking_support import batch_of, rich_space, space_of
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Categorical, Sequence
from shortlist.errors import ConfigError
from shortlist.layers import search as s

PAST = Jagged.from_rows([[1, 2, 3, 1, 2], [], [2, 2], [3]])
OFFERED = Jagged.from_rows([[1, 2, 9], [1], [2], []])


def relevance_of(table_BCL):
    return lambda first, stop: table_BCL[:, first:stop]


@pytest.mark.parametrize("pairs_at_once", [1, 1_000])
def test_search_prefers_real_events_of_negative_relevance_and_the_newer_of_equals(pairs_at_once):
    table = torch.full((4, 3, 5), -2.0)
    table[0, 0] = torch.tensor([-1.0, -3, -1, -1, -5])
    table[1:, :, :] = torch.tensor([-2.0, -2, 9, 9, 9])  # padding would win
    chosen = s.search(relevance_of(table), PAST, OFFERED, 2, pairs_at_once=pairs_at_once)
    assert chosen.event[0].tolist() == [3, 2]  # of three at -1 the two newest
    assert chosen.event[1].tolist() == [4, 3]
    assert chosen.is_real[3].tolist() == [False, False]  # nobody's past
    assert chosen.event[4].tolist() == [6, 5]  # places in the batch, not in the request
    assert chosen.is_real[4].all()


def test_search_agrees_with_sorting_by_hand():
    draw = torch.Generator().manual_seed(0)
    lengths = torch.tensor([7, 0, 30, 1])
    past = Jagged.from_lengths(torch.zeros(38, dtype=torch.int64), lengths)
    rows = Jagged.from_lengths(torch.zeros(9, dtype=torch.int64), torch.tensor([3, 2, 0, 4]))
    table = torch.randint(-3, 4, (4, 4, 30), generator=draw).float()
    chosen = s.search(relevance_of(table), past, rows, 6, pairs_at_once=50)
    for t, (b, c) in enumerate(zip(rows.row_of_value.tolist(), rows.position_of_value.tolist())):
        order = sorted(range(int(lengths[b])), key=lambda i: (-table[b, c, i].item(), -i))[:6]
        assert chosen.event[t][chosen.is_real[t]].tolist() == [int(past.offsets[b]) + i for i in order]


def test_keys_order_floats_as_they_are():
    x = torch.tensor([3.5, -0.0, 0.0, -7.25, 1e-30, -1e-30, float("inf"), -torch.inf])
    keys = s.sort_keys(x, torch.ones(8, dtype=torch.bool))
    assert keys.argsort().tolist() == [7, 3, 5, 1, 2, 4, 0, 6]


def test_nothing_to_search():
    empty = Jagged.from_rows([[]] * 4)
    assert s.search(relevance_of(None), empty, OFFERED, 3, pairs_at_once=9).event.shape == (5, 0)
    assert s.search(relevance_of(None), PAST, Jagged.from_rows([[]] * 4), 3, pairs_at_once=9).event.shape == (0, 3)


def test_index_equals_a_scan():
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(0, 60, (12,), generator=draw)
    attribute_E = torch.randint(0, 6, (int(lengths.sum()),), generator=draw)
    past = Jagged.from_lengths(attribute_E, lengths)
    wanted = Jagged.from_lengths(torch.randint(0, 7, (36,), generator=draw), torch.full((12,), 3))
    index = s.BehaviourIndex.of(past.row_of_value, attribute_E, 7)
    for k in (1, 4, 100):
        fast = index.newest(wanted.row_of_value, wanted.values, k)
        plain = s.newest_by_scan(past, attribute_E, wanted, wanted.values, k)
        for t in range(36):
            assert fast.event[t][fast.is_real[t]].tolist() == plain.event[t][plain.is_real[t]].tolist()
    assert not fast.is_real[wanted.values == 0].any()  # unknown matches nothing, not even itself
    assert not fast.is_real[wanted.values == 6].any()


def test_index_by_hand():
    index = s.BehaviourIndex.of(PAST.row_of_value, PAST.values, 10)
    found = index.newest(torch.tensor([0, 0, 0, 1, 2]), torch.tensor([1, 2, 9, 1, 2]), 2)
    assert found.event.tolist() == [[3, 0], [4, 1], [0, 0], [0, 0], [6, 5]]
    assert found.is_real.sum(1).tolist() == [2, 2, 0, 0, 2]
    assert index.newest(torch.tensor([0]), torch.tensor([9]), 2).event.shape == (1, 0)


def test_attribute_by_name():
    space = rich_space()
    assert torch.equal(s.item_attribute(space, "auto")[0], space.items.columns["category"])
    words, size = s.item_attribute(space, "words")
    assert words[:4].tolist() == [0, 1, 2, 3]
    assert size == 5
    assert s.item_attribute(space_of(3), "auto")[0].tolist() == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match="colour"):
        s.item_attribute(space, "colour")
    only_words = space_of(1, item_fields=(Sequence(name="w", size=2),), item_columns={"w": Jagged.from_rows([[], [2]])})
    assert s.item_attribute(only_words, "auto")[0].tolist() == [0, 2]
    both = space_of(
        1,
        item_fields=(Sequence(name="w", size=2), Categorical(name="c", size=4)),
        item_columns={"w": Jagged.from_rows([[], [2]]), "c": torch.tensor([0, 4])},
    )
    assert s.item_attribute(both, "auto")[0].tolist() == [0, 4]


@torch.no_grad()
@pytest.mark.parametrize("value_map", [True, False])
def test_attention_agrees_with_the_formula(value_map):
    torch.manual_seed(0)
    attention = s.TargetAttention(8, 2, value_map=value_map)
    for p in attention.parameters():
        p.normal_()
    item, event = torch.randn(5, 8), torch.randn(9, 8)
    chosen = s.Chosen(torch.randint(9, (5, 4)), torch.rand(5, 4) > 0.4)
    chosen.is_real[2] = False
    found = attention(item, event, chosen)
    torch.testing.assert_close(found, attention.plain(item, event, chosen), rtol=1e-4, atol=1e-5)
    assert found.shape == (5, attention.out_width)
    assert (found[2] == 0).all()
    torch.testing.assert_close(s.attend(attention, item, event, chosen, 8), found)


def test_attention_by_hand():
    """One head of one dimension, maps 1: events 1 and 2 for candidate 3 weigh e^3 and e^6."""
    attention = s.TargetAttention(1, 1)
    chosen = s.Chosen(torch.tensor([[0, 1, 0]]), torch.tensor([[True, True, False]]))
    found = attention(torch.tensor([[3.0]]), torch.tensor([[1.0], [2.0]]), chosen)
    a, b = math.exp(3), math.exp(6)
    assert found.item() == pytest.approx((a + 2 * b) / (a + b))


def test_newest_events_of_each_request():
    encoder = s.PastEncoder(space_of(9), s.LongHistoryConfig(dim=4, id_dropout=0.0)).eval()
    past = encoder.past(batch_of([[1, 2, 3], [], [4]], [[1], [1], [1]]), 50)
    newest = past.newest(2)
    assert newest.event.tolist() == [[2, 1], [0, 0], [3, 0]]
    assert newest.is_real.tolist() == [[True, True], [False, False], [True, False]]
    assert encoder.past(batch_of([[1, 2, 3]], [[1]]), 2).items.values.tolist() == [2, 3]


def test_kept_rows_are_dropped_when_training_goes_on():
    calls = []
    kept = s.KeptRows(5).eval()
    table = torch.arange(5.0)

    def compute(rows):
        calls.append(len(rows))
        return table[rows]

    with torch.no_grad():
        assert kept(torch.tensor([4, 1]), compute).tolist() == [4, 1]
        kept(torch.tensor([2]), compute)
        assert calls == [5]
        table += 1
        kept.train()
        assert kept(torch.tensor([2]), compute).tolist() == [3]
        kept.eval()
        assert kept(torch.tensor([2]), compute).tolist() == [3]
    kept(torch.tensor([2, 2]), compute)  # a gradient may be wanted
    assert calls == [5, 1, 5, 2]


def test_hamming_distance_counts_differing_bits():
    draw = torch.Generator().manual_seed(0)
    one, other = torch.rand(7, 1, 100, generator=draw) > 0.5, torch.rand(1, 5, 100, generator=draw) > 0.5
    words = [s.packed(x.view(-1, 100)).view(*x.shape[:2], 2) for x in (one, other)]
    assert torch.equal(s.hamming(*words), (one != other).sum(2).int())


def test_popcounts_agree():
    words = torch.cat([torch.tensor([0, -1, 1 << 62, -(1 << 63)]), torch.randint(-(1 << 62), 1 << 62, (100,))])
    expected = [bin(w & (1 << 64) - 1).count("1") for w in words.tolist()]
    assert s.popcount(words).tolist() == expected
    assert s._popcount_by_sums(words).tolist() == expected


def test_hash_bits_differ_as_the_angle_says():
    """SimHash: the share of differing bits is the angle by pi."""
    x, y = torch.tensor([[1.0, 0]]), torch.tensor([[math.cos(0.9), math.sin(0.9)]])
    normals = s.planes(2, 40_000, 3)
    share = (s.sign_bits(x, normals) != s.sign_bits(y, normals)).float().mean()
    assert share.item() == pytest.approx(0.9 / math.pi, abs=0.01)
    assert torch.equal(normals, s.planes(2, 40_000, 3))


def test_signatures_are_runs_of_bits():
    normals = s.planes(3, 6, 0)
    bits = s.sign_bits(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), normals)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    expected = [[sum(int(b) << i for i, b in enumerate(row[g : g + 3])) for g in (0, 3)] for row in bits.tolist()]
    assert s.signatures(x, normals, 3).tolist() == expected


@pytest.mark.parametrize(
    ("old", "new", "dropped", "fits"),
    [
        ([1, 2, 3], [1, 2, 3], 0, True),
        ([1, 2, 3], [1, 2, 3, 4, 5], 0, True),
        ([1, 2, 3], [2, 3, 4], 1, True),
        ([1, 2, 3], [3, 9], 2, True),
        ([1, 2, 3], [1, 9, 3], None, False),
        ([1, 2, 3], [7, 8], None, False),
        ([1, 2, 3], [1, 2], None, False),  # an event is gone from the end
        ([1, 2, 3], [], None, False),
        ([], [1], None, False),
    ],
)
def test_windows_overlap(old, new, dropped, fits):
    filler = [5, 6]
    columns = [[Jagged.from_rows([filler, part, []])] * 3 for part in (old, new)]
    found_dropped, found_fits = s.overlap(*columns)
    assert found_fits.tolist() == [True, fits, False]
    if fits:
        assert found_dropped[1] == dropped


def test_what_lies_between_two_windows():
    old, new = batch_of([[1, 2, 3], [4], [7]], [[], [], []]), batch_of([[1, 2, 3, 5], [6], [7]], [[], [], []])
    step = s.continued(new.history.last(3), s.window_of(old.history))
    assert step.fits_B.tolist() == [True, False, True]
    assert step.dropped.items.values.tolist() == [1]
    assert step.added.items.values.tolist() == [5, 6]
    assert step.added.items.lengths.tolist() == [1, 1, 0]
    assert step.added.time.tolist() == [3 * 3600, 0]
    nothing = s.continued(new.history, [None, None, None])
    assert nothing.added.items.values.tolist() == [1, 2, 3, 5, 6, 7]
