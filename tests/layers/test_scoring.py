"""Parts that rankers share, each against its formula written out."""

import math

import pytest
import torch

from ranking_support import batch_of, rich_batch, rich_space, space_of
from shortlist.data.schema import Numeric
from shortlist.errors import ConfigError, DataError
from shortlist.layers.scoring import (
    EventMarks,
    PairFeatures,
    RequestEncoder,
    SplitMLP,
    dense_bytes,
    linear_flops,
    task_losses,
)

PAST, OFFERED = [[1, 2], [], [3]], [[4, 5], [6], [7, 8, 9]]


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
def test_split_tower_is_the_plain_tower_on_the_joined_input(norm):
    torch.manual_seed(0)
    split = SplitMLP(3, 4, (6, 5), 2, activation="dice", norm=norm).train()
    request, candidate, row = torch.randn(2, 3), torch.randn(7, 4), torch.tensor([0, 0, 1, 1, 1, 0, 1])
    joined = split.mlp(torch.cat([request[row], candidate], 1))
    torch.testing.assert_close(split(split.request_side(request), candidate, row), joined)
    assert split.request_flops + split.candidate_flops == 2 * (7 * 6 + 6 * 5 + 5 * 2)


def test_a_request_without_any_field_gives_the_bias_alone():
    split = SplitMLP(0, 4, (6,), 1)
    torch.testing.assert_close(split.request_side(torch.zeros(3, 0)), split.mlp.layers[0].bias.expand(3, 6))


def test_ramps_of_a_pair_field_by_hand():
    pair = PairFeatures((Numeric(name="x"),), num_bins=4)
    made = pair({"x": torch.tensor([-3.0, -0.75, 0.1, 5.0])}, 4)
    ramps = [[0, 0, 0, 0], [0.5, 0, 0, 0], [1, 1, 0.2, 0], [1, 1, 1, 1]]  # bins of width 0.5 from -1 to 1
    torch.testing.assert_close(made, torch.tensor([[x, *r] for x, r in zip([-3.0, -0.75, 0.1, 5.0], ramps)]))
    assert pair.width == 5
    with pytest.raises(DataError, match=r"lack pair fields \['x'\]"):
        pair({"y": torch.zeros(4)}, 4)


def test_without_pair_fields_or_bins_nothing_is_added():
    assert PairFeatures((), 8)({}, 3).shape == (3, 0)
    torch.testing.assert_close(PairFeatures((Numeric(name="x"),), 0)({"x": torch.ones(2)}, 2), torch.ones(2, 1))


def test_request_side_holds_user_context_and_user_id_in_order():
    encoder = RequestEncoder(rich_space(), 4, use_user_ids=True)
    batch = rich_batch(PAST, OFFERED)
    made = encoder(batch)
    assert made.shape == (3, encoder.width) == (3, 16)
    torch.testing.assert_close(made[:, :4], encoder.user_fields.maps[0].weight[batch.user_fields["country"]])
    torch.testing.assert_close(made[:, 12:], encoder.user_ids.weight()[batch.user])


@pytest.mark.parametrize(("recency", "bucket"), [("position", [1, 0, 0]), ("gap", [1, 1, 1])])
def test_events_are_marked_by_action_and_recency(recency, bucket):
    """Requests come an hour after the last event: gaps of 2, 1 and 1 hours, places 1, 0 and 0 from the end."""
    marks = EventMarks(space_of(9, actions=("view", "buy")), 4, recency)
    batch = batch_of(PAST, OFFERED)
    expected = marks.actions.weight[1] + marks.ages.weight[torch.tensor(bucket)]
    torch.testing.assert_close(marks(torch.zeros(3, 4), batch.history, batch.time), expected)


def test_one_action_and_no_recency_add_nothing():
    batch = batch_of(PAST, OFFERED)
    item = torch.randn(3, 4)
    assert EventMarks(space_of(9), 4)(item, batch.history, batch.time) is item
    with pytest.raises(ConfigError, match="position"):
        EventMarks(space_of(9, has_clock=False), 4, "gap")


def test_losses_by_hand_and_weights_count():
    scores = torch.tensor([1.0, 3.0, 0.0, 2.0])
    batch = batch_of([[1], [1]], [[2, 3], [4, 5]], labels={"t": torch.tensor([1.0, 0.0, 0.0, 1.0])})
    first, second = math.log(1 + math.exp(2)), math.log(1 + math.exp(-2))
    assert task_losses({"t": scores}, batch, "softmax")["t"].item() == pytest.approx((first + second) / 2)
    bce = [math.log(1 + math.exp(-1)), math.log(1 + math.exp(3)), math.log(2), math.log(1 + math.exp(-2))]
    assert task_losses({"t": scores}, batch, "bce")["t"].item() == pytest.approx(sum(bce) / 4)
    heavy = type(batch)(
        user=batch.user,
        time=batch.time,
        history=batch.history,
        candidates=batch.candidates,
        labels=batch.labels,
        weight=torch.tensor([3.0, 1.0, 1.0, 1.0]),
    )
    assert task_losses({"t": scores}, heavy, "softmax")["t"].item() == pytest.approx((3 * first + second) / 4)
    assert task_losses({"t": scores}, heavy, "bce")["t"].item() == pytest.approx((3 * bce[0] + sum(bce[1:])) / 6)


def test_rows_with_one_candidate_take_the_logistic_loss():
    batch = batch_of([[1], [1]], [[2], [3]], labels={"t": torch.tensor([1.0, 0.0])})
    loss = task_losses({"t": torch.tensor([2.0, -1.0])}, batch, "softmax")["t"]
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))) / 2)
    with pytest.raises(DataError, match=r"no labels for \['u'\]"):
        task_losses({"u": torch.zeros(2)}, batch, "bce")


def test_counts_of_flops_and_bytes_leave_tables_out():
    module = torch.nn.Sequential(torch.nn.Embedding(100, 4), torch.nn.Linear(4, 3), torch.nn.ReLU())
    assert linear_flops(module) == 24
    assert dense_bytes(module) == 4 * (12 + 3)
