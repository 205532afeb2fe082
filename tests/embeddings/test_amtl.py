"""AMTL and the tables of unequal lengths: masks, their gradients and their storage against formulas written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from shortlist.embeddings.amtl import AMTLConfig, AMTLTable, frequency_features
from shortlist.embeddings.frequency_filtered import FrequencyFilteredConfig, FrequencyFilteredTable
from shortlist.embeddings.frequency_steps import FrequencyStepsConfig, FrequencyStepsTable, step_lengths
from shortlist.embeddings.packed import PackedRows
from shortlist.errors import ConfigError

COUNTS = torch.tensor([0, 9, 1, 1, 4, 0, 100])
DIM = 4


def made(**settings) -> AMTLTable:
    """Prepared, with networks that are not at their start, so that lengths differ."""
    torch.manual_seed(0)
    table = AMTLTable(len(COUNTS), DIM, AMTLConfig(init_std=1.0, hidden=8, **settings))
    table.prepare(COUNTS)
    with torch.no_grad():
        for p in [*table.head.parameters(), *(table.tail.parameters() if table.tail else ())]:
            p.normal_()
    return table


def test_features_by_hand():
    log = [math.log(1 + c) for c in COUNTS[1:].tolist()]
    mean = sum(log) / 6
    std = math.sqrt(sum((x - mean) ** 2 for x in log) / 6)
    expected = [[0.0, 0.0], *[[(x - mean) / std, rank] for x, rank in zip(log, [0.8, 0.3, 0.3, 0.6, 0.0, 1.0])]]
    torch.testing.assert_close(frequency_features(COUNTS), torch.tensor(expected))
    assert frequency_features(torch.tensor([0, 5, 5]))[1:].tolist() == [[0, 0.5], [0, 0.5]]
    assert frequency_features(torch.tensor([3])).tolist() == [[0, 0]]


def test_nothing_is_masked_at_the_start():
    table = AMTLTable(len(COUNTS), DIM, AMTLConfig())
    table.prepare(COUNTS)
    assert table.lengths().tolist() == [DIM] * len(COUNTS)
    assert torch.equal(table.weight(), table.rows.weight)


def test_logits_mix_the_twins_by_frequency():
    table = made()
    feature = table.feature_N2
    alpha = torch.sigmoid(feature[:, 0])
    assert alpha[6] > alpha[1] > alpha[4] > alpha[2] > alpha[5]
    expected = alpha[:, None] * table.head(feature) + (1 - alpha[:, None]) * table.tail(feature)
    torch.testing.assert_close(table.logits(torch.arange(7)), expected)
    single = made(twins=False)
    torch.testing.assert_close(single.logits(torch.arange(7)), single.head(single.feature_N2))
    assert single.head[0].out_features == 2 * 8


def test_masks_are_prefixes_of_the_length_with_the_best_logit():
    table = made()
    ids = torch.arange(1, 7)
    mask, share = table.mask(ids)
    for i in range(6):
        k = int(table.logits(ids)[i].argmax()) + 1
        assert mask[i].tolist() == [1.0] * k + [0.0] * (DIM - k)
        assert share[i] == k / DIM
    assert len(set(table.lengths().tolist())) > 1, "the case should tell lengths apart"
    torch.testing.assert_close(table(ids), table.rows.weight[1:] * mask, rtol=0, atol=0)
    assert table.lengths()[0] == DIM  # the unknown id


@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_the_mask_s_gradient_is_that_of_the_tempered_softmax(temperature):
    """d loss / d z_j = sum_i (d loss / d m_i) d P(length >= i) / d z_j; the Jacobian is p_j (1 - p_j), -p_j p_k."""
    table = made(temperature=temperature)
    ids = torch.tensor([1, 3])
    logit = table.logits(ids).detach().requires_grad_()
    table.logits = lambda _: logit  # type: ignore[method-assign]
    weight = torch.randn(2, DIM)
    mask, _ = table.mask(ids)
    (mask * weight).sum().backward()
    for row in range(2):
        p = torch.softmax(logit[row].detach() / temperature, 0)
        jacobian = (torch.diag(p) - torch.outer(p, p)) / temperature
        triangle = torch.ones(DIM, DIM).triu()  # place i is kept by lengths j >= i
        torch.testing.assert_close(logit.grad[row], weight[row] @ triangle @ jacobian)


def test_a_low_temperature_freezes_the_lengths():
    """The gradient away from the best logit fades as exp(-gap / T)."""

    def size(temperature: float) -> float:
        table = made(temperature=temperature)
        (table(torch.arange(1, 7)) * torch.randn(6, DIM, generator=torch.Generator().manual_seed(1))).sum().backward()
        return float(table.head[2].weight.grad.norm())

    assert size(0.01) < 0.05 * size(1.0)


def test_rows_get_the_gradient_of_what_is_shown_alone():
    table = made()
    ids = torch.arange(1, 7)
    weight = torch.randn(6, DIM)
    (table(ids) * weight).sum().backward()
    mask, _ = table.mask(ids)
    torch.testing.assert_close(table.rows.weight.grad[1:], weight * mask.detach())


def test_an_id_s_mask_weighs_the_same_however_often_it_occurs():
    """Twins see the mean over occurrences: repeating the batch, or one id of it with the same gradient, changes nothing."""

    def gradient(ids: list[int]) -> Tensor:
        table = made()
        (table(torch.tensor(ids)) ** 2).sum().backward()
        return table.tail[0].weight.grad

    torch.testing.assert_close(gradient([1, 2, 2, 2, 2]), gradient([1, 2]))
    table = made()
    (table(torch.tensor([2, 2, 2])) ** 2).sum().backward()
    once = made()
    (once(torch.tensor([2])) ** 2).sum().backward()
    torch.testing.assert_close(table.rows.weight.grad, 3 * once.rows.weight.grad)


def test_the_size_weight_adds_its_gradient_and_nothing_to_the_values():
    """As if size_weight * mean share of kept dimensions of the distinct ids stood in the loss."""
    ids, grads, values = torch.tensor([1, 2, 2, 5]), [], []
    for built_in in (True, False):
        table = made(size_weight=0.7 if built_in else 0.0).train()
        out = table(ids)
        values.append(out.detach())
        loss = (out**2).sum()
        if not built_in:
            loss = loss + 0.7 * table.mask(torch.tensor([1, 2, 5]))[1].mean()
        loss.backward()
        grads.append([p.grad for p in (*table.head.parameters(), *table.tail.parameters())])
    assert torch.equal(*values)
    for ours, expected in zip(*grads):
        torch.testing.assert_close(ours, expected)


def test_lengths_shrink_where_dimensions_harm():
    """Dimensions 2.. of all ids add noise to the target that dimension 1 gives: the task's loss alone learns to drop them."""
    torch.manual_seed(0)
    counts = torch.tensor([0, *([3] * 40), *([300] * 40)])
    table = AMTLTable(81, DIM, AMTLConfig(hidden=16))
    table.prepare(counts)
    noise = torch.randn(81, DIM)
    noise[:, 0] = 1.0
    with torch.no_grad():
        table.rows.weight.copy_(noise)
    table.rows.weight.requires_grad_(False)
    optimiser = torch.optim.Adam([*table.head.parameters(), *table.tail.parameters()], lr=0.02)
    ids = torch.arange(1, 81)
    for _ in range(200):
        optimiser.zero_grad()
        (table(ids).square().sum(1) - 1).square().mean().backward()
        optimiser.step()
    assert table.lengths()[1:].float().mean() < 1.5
    table.finish()
    assert table.num_floats < 0.4 * 81 * DIM


@pytest.mark.parametrize("ids", [torch.arange(7), torch.tensor([[2, 0], [6, 6]])])
def test_packed_vectors_are_the_masked_ones(ids):
    table = made()
    expected, lengths = table(ids).detach(), table.lengths()
    table.finish()
    assert torch.equal(table(ids), expected)
    assert torch.equal(table.lengths(), lengths)
    # Kept numbers and an index of 32 bits per id; neither masked numbers nor networks are stored.
    total = int(lengths.sum())
    assert total < 7 * DIM
    assert table.num_floats == total
    assert sum(t.numel() for t in table.state_dict().values()) == total + 8
    assert table.bytes() == 4 * total + 4 * 8 + 8 * DIM  # the last: places 0..d-1, once per table


def test_packed_rows_by_hand():
    rows = PackedRows(3, sparse=False)
    assert not rows.is_filled
    rows.fill(torch.arange(1.0, 10.0).view(3, 3), torch.tensor([3, 1, 2]))
    assert rows.values.weight[:, 0].tolist() == [1, 2, 3, 4, 7, 8]
    assert rows.offsets.tolist() == [0, 3, 4, 6]
    assert rows(torch.tensor([2, 1])).tolist() == [[7, 8, 0], [4, 0, 0]]


def test_steps_by_hand():
    """Order of counts: 6, 1, 4, 2, 3, 5; bands of one, two and three ids keep 4, 2 and 1 of 4 dimensions."""
    lengths = step_lengths(COUNTS, 4, (1 / 6, 0.5, 1.0), (1.0, 0.5, 0.1))
    assert lengths.tolist() == [4, 2, 1, 1, 2, 1, 4]
    table = FrequencyStepsTable(7, 4, FrequencyStepsConfig(shares=(1 / 6, 0.5, 1.0), widths=(1.0, 0.5, 0.1)))
    before = table.rows.weight.detach().clone()
    table.prepare(COUNTS)
    assert table.num_floats == 15
    torch.testing.assert_close(table.weight(), before * (torch.arange(4) < lengths[:, None]))


def test_rare_ids_share_the_unknown_row():
    table = FrequencyFilteredTable(7, 2, FrequencyFilteredConfig(min_count=4))
    before = table.rows.weight.detach().clone()
    assert torch.equal(table.weight(), before)
    table.prepare(COUNTS)
    assert torch.equal(table.weight(), before[[0, 1, 0, 0, 4, 0, 6]])
    assert table.num_floats == 4 * 2
    assert table.bytes() == 4 * 8 + 4 * 7


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (AMTLConfig, {"temperature": 0.0}, "temperature must be above 0"),
        (AMTLConfig, {"hidden": 0}, "hidden must be at least 1"),
        (AMTLConfig, {"size_weight": -1.0}, "size_weight must not be below 0"),
        (FrequencyStepsConfig, {"shares": (0.5, 0.9), "widths": (1.0, 0.5)}, "shares must rise"),
        (FrequencyStepsConfig, {"shares": (1.0,)}, "one width each"),
        (FrequencyStepsConfig, {"widths": (1.0, 0.0, 0.5)}, "widths must be above 0"),
        (FrequencyFilteredConfig, {"min_count": 0}, "min_count must be at least 1"),
    ],
)
def test_unusable_settings_are_refused(config, values, message):
    with pytest.raises(ConfigError, match=message):
        config(**values)
