"""FM, DeepFM, DCN V2 and FAT: formulas over all fields of one candidate at a time, splits, planted pairs, tabular rows, costs."""

from dataclasses import replace

import pytest
import torch

from interaction_support import flops_counted, flops_stated, pairs_batch, pairs_space
from ranking_support import rich_batch, rich_space, share_right, space_of, train
from shortlist.cascade.config import RunConfig
from shortlist.data.schema import Categorical
from shortlist.embeddings.base import TableChoice
from shortlist.errors import ConfigError
from shortlist.layers.field_attention import FieldBlockConfig
from shortlist.layers.field_matrix import FieldsConfig
from shortlist.layers.interactions import plain_field_pairs
from shortlist.layers.scoring import HeadConfig
from shortlist.models.base import Ranker
from shortlist.models.ranking.dcnv2 import DCNv2Config
from shortlist.models.ranking.fat import FATConfig
from shortlist.models.ranking.fm import FMConfig
from shortlist.registry import find

PAST, OFFERED = [[1, 2, 3, 4], [], [5, 5], [6]], [[1, 7, 9], [2, 11], [], [3, 12, 8, 4]]
FIELDS = FieldsConfig(dim=4, max_history=3)
HEAD = HeadConfig(widths=(6,), activation="relu", dropout=0.0, id_dropout=0.0, use_user_ids=True, pair_bins=2)
BLOCKS = FieldBlockConfig(width=6, num_heads=2, ffn_width=8)


def made(name: str, space=None, **settings) -> Ranker:
    torch.manual_seed(0)
    head = replace(HEAD, widths=()) if name == "fm" else HEAD
    entry = find(name)
    if name == "fat":
        settings.setdefault("blocks", BLOCKS)
    return entry.cls(entry.config({"fields": FIELDS, "head": head, **settings}), space or rich_space()).eval()


def whole_vectors(model: Ranker, batch) -> torch.Tensor:
    """All field vectors of each candidate, request fields first: [t, F, D]."""
    request = model.fields.request(batch)[batch.candidate_rows.row_of_value]
    return torch.cat([request, model.fields.candidate(batch.candidates)], 1)


def whole_linear(model: Ranker, batch) -> torch.Tensor:
    linear = model.linear
    return linear.request(batch)[batch.candidate_rows.row_of_value] + linear.candidate(batch.candidates)


@torch.no_grad()
def test_fm_is_the_sum_over_all_pairs():
    model, batch = made("fm", rich_space(tasks=("a", "b"))), rich_batch(PAST, OFFERED)
    model.scale_TD.normal_()
    pairs = plain_field_pairs(whole_vectors(model, batch))
    linear = whole_linear(model, batch)
    for number, task in enumerate(("a", "b")):
        torch.testing.assert_close(model.score(batch)[task], linear[:, number] + pairs @ model.scale_TD[number])


@torch.no_grad()
def test_with_one_task_the_pairs_are_inner_products():
    model, batch = made("fm"), rich_batch(PAST, OFFERED)
    v = whole_vectors(model, batch)
    by_hand = sum((v[:, i] * v[:, j]).sum(1) for i in range(v.shape[1]) for j in range(i + 1, v.shape[1]))
    torch.testing.assert_close(model.score(batch)["target"], whole_linear(model, batch)[:, 0] + by_hand)
    assert not model.scale_TD.requires_grad


@torch.no_grad()
def test_without_pairs_fm_is_logistic_regression():
    model, batch = made("fm", pairs=False), rich_batch(PAST, OFFERED)
    torch.testing.assert_close(model.score(batch)["target"], whole_linear(model, batch)[:, 0])


@torch.no_grad()
def test_deepfm_is_both_parts_over_the_same_vectors():
    model, batch = made("deepfm"), rich_batch(PAST, OFFERED)
    v = whole_vectors(model, batch)
    expected = whole_linear(model, batch)[:, 0] + plain_field_pairs(v).sum(1) + model.deep.tower.mlp(v.flatten(1))[:, 0]
    torch.testing.assert_close(model.score(batch)["target"], expected)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("structure", ["parallel", "stacked", "cross"])
@torch.no_grad()
def test_dcn_by_its_formula(structure, rank):
    model, batch = made("dcnv2", structure=structure, rank=rank), rich_batch(PAST, OFFERED)
    x0 = whole_vectors(model, batch).flatten(1)
    x = x0
    for number, up in enumerate(model.cross.up):
        low = x if not rank else x @ model.cross.down[number].weight.T
        x = x0 * (low @ up.weight.T + up.bias) + x
    expected = {
        "parallel": lambda: model.out(x) + model.deep.tower.mlp(x0),
        "stacked": lambda: model.stack.mlp(x),
        "cross": lambda: model.out(x),
    }[structure]()
    torch.testing.assert_close(model.score(batch)["target"], expected[:, 0])


@torch.no_grad()
def test_fat_by_its_formula():
    model, batch = made("fat", blocks=replace(BLOCKS, num_bases=5, active_bases=2)), rich_batch(PAST, OFFERED)
    assert model.blocks[0].query.composed
    model.bias_FD.normal_()
    expected = []
    for field_FE in whole_vectors(model, batch):
        x_FD = field_FE @ model.widen.weight.T + model.bias_FD
        for block in model.blocks:
            x_FD = block.plain(x_FD, model.meta_Fk)
        expected.append(model.tower.mlp(x_FD.sum(0) / len(x_FD) ** 0.5))
    torch.testing.assert_close(model.score(batch)["target"], torch.cat(expected))


NAMES = ("fm", "deepfm", "dcnv2", "fat")


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_kept_state_serves_other_candidates(name):
    model, batch = made(name), rich_batch(PAST, OFFERED)
    other = rich_batch(PAST, [[4], [5, 6], [7, 8], []])
    scores = model.score_candidates(model.user_state(batch), other.candidates)["target"]
    torch.testing.assert_close(scores, model.score(other)["target"])
    assert model.score(rich_batch([[], []], [[], []]))["target"].shape == (0,)


@pytest.mark.parametrize("name", NAMES)
def test_pairs_of_fields_are_learned_where_single_fields_say_nothing(name):
    head = replace(HEAD, widths=() if name == "fm" else (16,), use_user_ids=False)
    model = made(name, pairs_space(), head=head, fields=FieldsConfig(dim=8))
    train(model, pairs_batch, steps=100, lr=0.02)
    assert share_right(model, pairs_batch(400, torch.Generator().manual_seed(9))) > 0.95


def test_one_field_at_a_time_learns_nothing_there():
    model = made("fm", pairs_space(), head=replace(HEAD, widths=(), use_user_ids=False), pairs=False)
    train(model, pairs_batch, steps=100, lr=0.02)
    assert share_right(model, pairs_batch(400, torch.Generator().manual_seed(9))) < 0.6


@pytest.mark.parametrize("name", NAMES)
def test_several_tasks_and_their_losses(name):
    head = replace(HEAD, loss="bce", widths=() if name == "fm" else (6,))
    model = made(name, rich_space(tasks=("click", "buy")), head=head)
    batch = rich_batch(PAST, OFFERED, click=[1.0, 0, 1, 0, 1, 1, 0, 0, 1], buy=[0.0] * 9)
    losses = model.losses(batch)
    for task in ("click", "buy"):
        by_hand = torch.nn.functional.binary_cross_entropy_with_logits(model.score(batch)[task], batch.labels[task])
        torch.testing.assert_close(losses[task], by_hand)
    sum(losses.values()).backward()
    idle = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_history", [2, 20])
def test_stated_costs_are_what_is_computed(name, num_history):
    """Torch counts matrix products alone, so sums and element-wise products make the stated number a little larger."""
    settings = {"blocks": replace(BLOCKS, width=32)} if name == "fat" else {}
    head = replace(HEAD, widths=() if name == "fm" else (64, 32))
    model = made(name, fields=FieldsConfig(dim=16, max_history=30), head=head, **settings)
    stated, counted = flops_stated(model, num_history, 40), flops_counted(model, num_history, 40)
    if name == "fm":  # the rest is sums
        assert stated[1] >= counted[1]
        return
    assert stated[1] == pytest.approx(counted[1], rel=0.2)
    assert stated[0] >= 0.9 * counted[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_tabular_log_without_past_or_users(name):
    """Rows of one candidate whose fields all stand in the context, read by names of the user's choice."""
    space = space_of(
        1, context_fields=(Categorical(name="a", size=24), Categorical(name="hour", size=24)), has_clock=False
    )
    fields = FieldsConfig(dim=4, names=("context.a", "context.hour"))
    model = made(name, space, fields=fields)
    assert model.fields.num_candidate == 0
    batch = rich_batch([[]] * 3, [[1]] * 3, target=[1.0, 0.0, 1.0])
    batch = replace(batch, context={"a": torch.tensor([1, 2, 3]), "hour": torch.tensor([3, 4, 5])})
    assert model.score(batch)["target"].unique().numel() == 3
    sum(model.losses(batch).values()).backward()


@pytest.mark.parametrize("name", NAMES)
def test_sparse_tables_move_on_rows_of_the_batch_alone(name):
    model = made(name, fields=replace(FIELDS, table=TableChoice(sparse=True)))
    sum(model.losses(rich_batch(PAST, OFFERED, target=[1.0, 0, 0, 1, 0, 1, 0, 0, 0])).values()).backward()
    gradient = model.fields.matrix.item_ids.rows.weight.grad.coalesce()
    # Item 1 of the first history is cut off, but offered; 11 and 12 have no row of their own; 10 is nowhere.
    assert set(gradient.indices()[0].tolist()) == {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}


def test_settings_are_reached_from_a_cascade_s_toml():
    run = RunConfig.from_toml(
        """
        [stages.retrieval]
        systems = ["popularity"]
        keep = 50
        [stages.ranking]
        systems = ["dcnv2", "fat"]
        keep = 10
        [systems.dcnv2]
        structure = "stacked"
        fields.dim = 10
        head.widths = [400, 400]
        head.gates.senet = true
        head.apg = { mode = "shared", rank = 4, condition = "group", fields = ["user"] }
        [systems.fat.blocks]
        num_bases = 8
        """
    )
    dcn = run.systems["dcnv2"].settings
    assert dcn.fields.dim == 10
    assert dcn.head.gates.senet
    assert dcn.head.apg.fields == ("user",)
    assert run.override("fat.blocks.width=64").systems["fat"].settings.blocks.width == 64
    assert RunConfig.from_toml(run.to_toml()).to_toml() == run.to_toml()


def test_settings_out_of_range_are_refused_by_name():
    with pytest.raises(ConfigError, match="fm has no tower"):
        FMConfig(head=HEAD)
    with pytest.raises(ConfigError, match=r"dcnv2: num_cross"):
        DCNv2Config(num_cross=0)
    with pytest.raises(ConfigError, match=r"fat: fields.dim"):
        FATConfig(fields=FieldsConfig(dim=0))
