import numpy as np
import pytest
import torch

from ranking_support import batch_of, rich_batch, rich_space, share_right, space_of
from shortlist import extras
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Categorical, Image, Numeric, Sequence, Text, Vector
from shortlist.errors import ConfigError, DataError
from shortlist.models.base import RequestShape, load_weights
from shortlist.models.ranking.lambdamart import (
    LambdaMART,
    LambdaMARTConfig,
    codes,
    columns_of,
    lesson_of,
    mean_comparisons,
)

SMALL = LambdaMARTConfig(num_trees=40, num_leaves=8, lr=0.2, min_leaf=5)


def corner_batch(size: int, seed: int):
    """Six candidates with two numbers each; the chosen one is where both have the same sign, which no linear map can tell."""
    draw = torch.Generator().manual_seed(seed)
    pair = torch.rand(size, 6, 2, generator=draw) * 2 - 1
    pair[:, 0, 1] = pair[:, 0, 1].abs() * pair[:, 0, 0].sign()
    pair[:, 1:, 1] = -pair[:, 1:, 1].abs() * pair[:, 1:, 0].sign()
    label = torch.zeros(size, 6)
    label[:, 0] = 1
    columns = {"a": pair[..., 0].flatten(), "b": pair[..., 1].flatten()}
    return batch_of([[1]] * size, [[1, 2, 3, 4, 5, 6]] * size, pair=columns, labels={"target": label.flatten()})


def learned(batches, space, config=SMALL) -> LambdaMART:
    model = LambdaMART(config, space)
    (phase,) = model.phases()
    model.last_losses = phase.learn(batches)  # type: ignore[assignment]
    return model.eval()


def test_learns_a_preference_that_no_linear_map_can():
    model = learned([corner_batch(150, 0), corner_batch(150, 1)], space_of(6, pairs=("a", "b")))
    test = corner_batch(200, 2)
    assert share_right(model, test) > 0.95
    x = torch.stack([test.candidates.pair["a"], test.candidates.pair["b"]], 1).numpy()
    linear = np.linalg.lstsq(x, test.labels["target"].numpy(), rcond=None)[0]
    label = test.labels["target"].view(-1, 6).numpy()
    score = (x @ linear).reshape(-1, 6)
    assert (score[:, :1] > score[:, 1:]).mean() < 0.7, "even fitted to the test itself"
    assert label[:, 0].all()
    assert float(model.last_losses["target"]) < 0.1


def test_trees_are_the_librarys_and_scored_in_one_call(monkeypatch):
    lightgbm = pytest.importorskip("lightgbm")
    model = learned([corner_batch(100, 0)], space_of(6, pairs=("a", "b")))
    booster = lightgbm.Booster(model_str=bytes(model.trees_0.tolist()).decode())
    test = corner_batch(50, 3)
    x = np.stack([test.candidates.pair["a"].numpy(), test.candidates.pair["b"].numpy()], 1)
    expected = booster.predict(x, raw_score=True)
    calls = []
    real = lightgbm.Booster.predict
    monkeypatch.setattr(lightgbm.Booster, "predict", lambda self, *a, **k: calls.append(1) or real(self, *a, **k))
    np.testing.assert_allclose(model.score(test)["target"].numpy(), expected, atol=1e-6)
    assert len(calls) == 1


def test_comparisons_are_counted_as_the_rows_walk_them():
    """Each training row walked from root to leaf by hand, in the library's dump."""
    import json

    lightgbm = pytest.importorskip("lightgbm")
    batch = corner_batch(100, 0)
    config = LambdaMARTConfig(num_trees=7, num_leaves=6, min_leaf=5, valid_share=0.0)
    model = learned([batch], space_of(6, pairs=("a", "b")), config)
    text = bytes(model.trees_0.tolist()).decode()
    x = np.stack([batch.candidates.pair["a"].numpy(), batch.candidates.pair["b"].numpy()], 1)
    dump = json.loads(json.dumps(lightgbm.Booster(model_str=text).dump_model()))
    walked = 0
    for tree in dump["tree_info"]:
        for row in x:
            node = tree["tree_structure"]
            while "threshold" in node:
                walked += 1
                node = node["left_child"] if row[node["split_feature"]] <= node["threshold"] else node["right_child"]
    assert len(dump["tree_info"]) == 7
    assert mean_comparisons(text) == pytest.approx(walked / len(x), rel=1e-6)
    assert model.cost(RequestShape()).item_flops == pytest.approx(walked / len(x), rel=1e-5)


def test_held_out_requests_stop_the_growing():
    """Labels that are noise: trees help nobody, so few are kept; without held-out requests all are grown."""
    batch = corner_batch(200, 0)
    noise = batch.with_candidates(
        batch.candidate_rows,
        batch.candidates.pair,
        {"target": (torch.rand(1200, generator=torch.Generator().manual_seed(1)) < 0.2).float()},
    )
    space = space_of(6, pairs=("a", "b"))
    few, all_of_them = (
        bytes(
            learned(
                [noise], space, LambdaMARTConfig(num_trees=60, patience=5, min_leaf=5, valid_share=share)
            ).trees_0.tolist()
        )
        for share in (0.3, 0.0)
    )
    assert few.count(b"Tree=") < 40
    assert all_of_them.count(b"Tree=") == 60


def test_fields_become_columns_by_hand():
    fields = (
        Categorical(name="kind", size=3),
        Numeric(name="price"),
        Sequence(name="words", size=9),
        Text(name="title"),
        Image(name="photo"),
        Vector(name="look", dim=2),
    )
    columns = {
        "kind": torch.tensor([0, 2]),
        "price": torch.tensor([0.5, -1.0]),
        "words": Jagged.from_rows([[], [7, 3]]),
        "look": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    }
    assert columns_of(fields, columns, 2).tolist() == [[0, 0.5, 0, 0, 1, 2], [2, -1, 2, 7, 3, 4]]
    assert [code for f in fields for code in codes(f)] == [True, False, False, True, False, False]
    assert columns_of((), {}, 2).shape == (2, 0)


def test_user_context_and_item_columns_are_read():
    """The choice is decided by the item's category alone, in the second case by the hour and the category together."""
    draw = np.random.default_rng(0)
    past, offered = [[1]] * 240, [draw.permutation(12)[:4] + 1 for _ in range(240)]
    labels = [
        float((1 + (row - 1) % 3) == 1 + (request % 24 >= 12)) for request in range(240) for row in offered[request]
    ]
    batch = rich_batch(past, [o.tolist() for o in offered], target=labels)
    model = learned([batch], rich_space(), LambdaMARTConfig(num_trees=60, num_leaves=8, lr=0.2, min_leaf=5))
    score, label = model.score(batch)["target"], batch.labels["target"]
    row = batch.candidate_rows.row_of_value
    right = (score[:, None] > score) & (row[:, None] == row) & (label[:, None] > label)
    assert right.sum() / ((row[:, None] == row) & (label[:, None] > label)).sum() > 0.97


def test_every_task_has_its_trees_and_tabular_rows_a_logistic_loss():
    """One candidate per request: nothing to swap, so the score is the logit of a rate, checked against the counted rate."""
    draw = torch.Generator().manual_seed(0)
    a = torch.randint(2, (4000,), generator=draw).float()
    click = (torch.rand(4000, generator=draw) < 0.2 + 0.5 * a).float()
    batch = batch_of([[1]] * 4000, [[1]] * 4000, pair={"a": a}, labels={"click": click, "stay": 1 - click})
    config = LambdaMARTConfig(num_trees=80, num_leaves=2, lr=0.2, l2=0.0, valid_share=0.0)
    model = learned([batch], space_of(1, pairs=("a",), tasks=("click", "stay")), config)
    scores = model.score(batch)
    for value in (0, 1):
        counted = float(click[a == value].mean())
        assert float(torch.sigmoid(scores["click"][a == value]).mean()) == pytest.approx(counted, abs=0.01)
        assert float(torch.sigmoid(scores["stay"][a == value]).mean()) == pytest.approx(1 - counted, abs=0.01)


def test_same_batches_same_bytes_and_new_weights_replace_the_kept_trees():
    space = space_of(6, pairs=("a", "b"))
    one, two = (learned([corner_batch(100, 0)], space) for _ in range(2))
    assert torch.equal(one.trees_0, two.trees_0)
    other = learned([corner_batch(100, 9)], space)
    test = corner_batch(20, 5)
    before = other.score(test)["target"]
    load_weights(other, dict(one.state_dict()))
    assert not torch.equal(other.score(test)["target"], before)
    assert torch.equal(other.score(test)["target"], one.score(test)["target"])


def test_weights_of_candidates_count():
    """Two items, each chosen in half of the requests; those where the second is chosen weigh ten times as much."""
    size = 200
    label = torch.zeros(size, 2)
    label[::2, 0], label[1::2, 1] = 1, 1
    weight = torch.ones(size, 2)
    weight[1::2] = 10
    kinds = {"kind": torch.tensor([0, 1, 2])}
    space = space_of(2, item_fields=(Categorical(name="kind", size=2),), item_columns=kinds)
    batch = batch_of([[1]] * size, [[1, 2]] * size, labels={"target": label.flatten()})
    from dataclasses import replace

    model = learned([replace(batch, weight=weight.flatten())], space)
    score = model.score(batch)["target"].view(-1, 2)
    assert (score[:, 1] > score[:, 0]).all()


def test_what_is_missing_is_named(monkeypatch):
    space = space_of(6, pairs=("a", "b"))
    batch = corner_batch(20, 0)
    with pytest.raises(DataError, match="no labels for"):
        learned([batch.with_candidates(batch.candidate_rows, batch.candidates.pair)], space)
    nothing = {"target": torch.zeros(120)}
    with pytest.raises(DataError, match="no candidate has a label"):
        learned([batch.with_candidates(batch.candidate_rows, batch.candidates.pair, nothing)], space)
    with pytest.raises(DataError, match=r"lack pair fields \['b'\]"):
        learned([batch.with_candidates(batch.candidate_rows, {"a": torch.zeros(120)}, batch.labels)], space)
    with pytest.raises(ConfigError, match="num_leaves must be at least 2, got 1"):
        LambdaMARTConfig(num_leaves=1)

    def missing(name):
        raise ImportError(name)

    model = learned([batch], space)
    monkeypatch.setattr(extras, "import_module", missing)
    for use in (lambda: model.learn([batch]), lambda: model.score(batch)):
        with pytest.raises(
            ConfigError, match=r"lambdamart needs the library 'lightgbm'.*pip install 'shortlist\[baselines\]'"
        ):
            use()


def test_candidates_whose_label_is_not_known_are_left_out():
    label = torch.tensor([1.0, torch.nan, 0.0, torch.nan, 1.0])
    batch = batch_of([[], [], []], [[1, 2, 3], [4], [5]], labels={"buy": label})
    x = np.arange(10, dtype=np.float32).reshape(5, 2)
    lesson = lesson_of([(batch, x), (batch, x + 10)], "buy")
    assert lesson.label.tolist() == [1, 0, 1] * 2
    assert lesson.x[:, 0].tolist() == [0, 4, 8, 10, 14, 18]
    assert lesson.lengths.tolist() == [2, 1] * 2
