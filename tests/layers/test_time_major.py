"""Sequences of different lengths stepping together: the layout by hand, states against one sequence at a time."""

import pytest
import torch
from torch import nn

from shortlist.data.jagged import Jagged
from shortlist.layers.time_major import TimeMajor, run_recurrent


def test_layout_by_hand():
    """a b c | d | | e f: the longest first, step by step: a e d, then b f, then c; the empty sequence takes no step."""
    layout = TimeMajor.of(Jagged.from_lengths(torch.zeros(6), torch.tensor([3, 1, 0, 2])))
    assert layout.sizes == (3, 2, 1)
    assert ["abcdef"[i] for i in layout.order] == list("aedbfc")
    assert layout.row_order.tolist() == [0, 3, 1, 2]
    assert layout.row_place.tolist() == [0, 2, 3, 1]
    assert layout.order[layout.place].tolist() == list(range(6))


def nets():
    torch.manual_seed(0)
    return {"gru": nn.GRU(3, 4), "lstm": nn.LSTM(3, 4), "both ways": nn.LSTM(3, 4, bidirectional=True)}


@pytest.mark.parametrize("name", nets())
def test_states_are_those_of_each_sequence_alone(name):
    net, lengths = nets()[name], [3, 0, 5, 1, 5, 0]
    x = Jagged.from_lengths(torch.randn(14, 3), torch.tensor(lengths))
    alone = [net(part[:, None])[0][:, 0] for part in x.values.split(lengths) if len(part)]
    torch.testing.assert_close(run_recurrent(net, x), torch.cat(alone))


def test_a_start_is_read_by_its_own_sequence():
    net, lengths = nets()["gru"], [2, 0, 4]
    x, start = Jagged.from_lengths(torch.randn(6, 3), torch.tensor(lengths)), torch.randn(3, 4)
    alone = [
        net(part[:, None], start[None, i, None])[0][:, 0] for i, part in enumerate(x.values.split(lengths)) if len(part)
    ]
    torch.testing.assert_close(run_recurrent(net, x, start), torch.cat(alone))


def test_nothing_at_all():
    nothing = Jagged.from_lengths(torch.zeros(0, 3), torch.zeros(2, dtype=torch.int64))
    assert run_recurrent(nets()["both ways"], nothing).shape == (0, 8)
    assert TimeMajor.of(nothing).sizes == ()
