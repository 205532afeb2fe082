"""Field-aware attention: the formula token by token, composition, what starts how, and what decay must not touch."""

import pytest
import torch

from shortlist.errors import ConfigError
from shortlist.layers.field_attention import FieldBlockConfig, FieldMatrices, FieldTransformerBlock
from shortlist.training.config import TrainerConfig
from shortlist.training.optimisers import build_optimisers

SMALL = {"width": 6, "num_heads": 2, "ffn_width": 5, "meta_dim": 3}


def block(num_fields: int = 5, **settings) -> tuple[FieldTransformerBlock, torch.Tensor]:
    torch.manual_seed(0)
    made = FieldTransformerBlock(num_fields, FieldBlockConfig(**SMALL, **settings)).double().eval()
    if made.scalars is not None:
        torch.nn.init.normal_(made.scalars)
    return made, torch.randn(num_fields, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"two_residuals": True},
        {"num_bases": 3, "active_bases": 2},
        {"field_qkv": False},
        {"field_ffn": False, "pair_scalars": False},
        {"field_qkv": False, "field_ffn": False, "pair_scalars": False},
    ],
)
@torch.no_grad()
def test_a_block_is_its_formula_token_by_token(settings):
    made, meta = block(**settings)
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    whole = made(made.project(x, meta, slice(None)), meta)
    torch.testing.assert_close(whole, torch.stack([made.plain(row, meta) for row in x]))


@torch.no_grad()
def test_tokens_can_be_projected_apart():
    made, meta = block()
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    whole = made.project(x, meta, slice(None))
    parts = [made.project(x[:, :2], meta, slice(0, 2)), made.project(x[:, 2:], meta, slice(2, None))]
    for one, *two in zip(whole, *parts):
        torch.testing.assert_close(one, torch.cat(two, 1))


@torch.no_grad()
def test_the_pair_weight_is_directed_and_multiplies_the_logit():
    made, meta = block(num_fields=2)
    x = torch.randn(1, 2, 6, dtype=torch.float64)
    before = made(made.project(x, meta, slice(None)), meta)
    made.scalar_hFF[:, 0, 1] += 1.0
    after = made(made.project(x, meta, slice(None)), meta)
    assert not torch.allclose(before[:, 0], after[:, 0])
    torch.testing.assert_close(before[:, 1], after[:, 1])  # how field 1 looks at field 0 is another number


@torch.no_grad()
def test_the_plain_transformer_does_not_know_the_field():
    made, meta = block(field_qkv=False, field_ffn=False, pair_scalars=False)
    x, order = torch.randn(2, 5, 6, dtype=torch.float64), torch.tensor([3, 0, 4, 1, 2])
    straight = made(made.project(x, meta, slice(None)), meta)
    torch.testing.assert_close(made(made.project(x[:, order], meta, slice(None)), meta), straight[:, order])
    aware, meta = block()
    straight = aware(aware.project(x, meta, slice(None)), meta)
    assert not torch.allclose(aware(aware.project(x[:, order], meta, slice(None)), meta), straight[:, order])


def test_composition_keeps_k_bases_whose_shares_add_up():
    torch.manual_seed(0)
    matrices = FieldMatrices(9, (4, 2), own=True, num_bases=5, active_bases=3, meta_dim=3)
    meta = torch.randn(9, 3)
    alpha = matrices.alpha(meta)
    assert (alpha > 0).sum(1).tolist() == [3] * 9
    torch.testing.assert_close(alpha.sum(1), torch.ones(9))
    logits = matrices.router(meta)
    assert all(set(alpha[f].nonzero().flatten().tolist()) == set(logits[f].topk(3).indices.tolist()) for f in range(9))
    by_hand = torch.stack([sum(alpha[f, m] * matrices.weight[m] for m in range(5)) for f in range(9)])
    torch.testing.assert_close(matrices(meta), by_hand)


def test_composed_matrices_are_kept_outside_training_and_bit_equal():
    matrices = FieldMatrices(9, (4, 2), own=True, num_bases=5, active_bases=3, meta_dim=3)
    meta = torch.randn(9, 3)
    on_the_fly = matrices(meta)
    matrices.eval()
    with torch.no_grad():
        assert torch.equal(matrices(meta), on_the_fly)
        assert matrices(meta) is matrices(meta)
        matrices.train()
        matrices.weight.mul_(2)
        assert torch.equal(matrices.eval()(meta), 2 * on_the_fly)


def test_few_fields_get_free_matrices():
    """With as many bases as fields composing would cost parameters."""
    few, many = (FieldMatrices(f, (4, 4), own=True, num_bases=5, active_bases=3, meta_dim=3) for f in (5, 6))
    assert not few.composed
    assert len(few.weight) == 5
    assert many.composed
    assert sum(p.numel() for p in many.parameters()) == 5 * 16 + 3 * 5
    shared = FieldMatrices(6, (4, 4), own=False, num_bases=5, active_bases=3, meta_dim=3)
    assert shared.weight.shape == (1, 4, 4)


def test_attention_starts_plain_or_uniform():
    one = FieldTransformerBlock(4, FieldBlockConfig(**SMALL)).scalar_hFF
    near_zero = FieldTransformerBlock(4, FieldBlockConfig(**SMALL, scalar_init="normal")).scalar_hFF
    assert (one - 1).abs().max() < 0.1
    assert near_zero.abs().max() < 0.1
    assert not torch.equal(one, one.transpose(1, 2))


def test_decay_leaves_the_pair_weights_alone():
    made = FieldTransformerBlock(4, FieldBlockConfig(**SMALL))
    (optimiser,) = build_optimisers(made, TrainerConfig(weight_decay=0.1))
    decayed = [id(p) for group in optimiser.param_groups if group["weight_decay"] for p in group["params"]]
    assert id(made.scalars) not in decayed
    assert id(made.query.weight) in decayed


@pytest.mark.parametrize("wrong", [{"width": 5}, {"num_bases": 2}, {"scalar_init": "zero"}, {"num_blocks": 0}])
def test_settings_that_do_not_go_together_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        FieldBlockConfig(**wrong)
