"""Several tasks: labels against plain Python, chains, what orders the page, settings, and lessons of both kinds of log."""

import numpy as np
import polars as pl
import pytest
import torch

from shortlist.cascade.acting import score
from shortlist.cascade.config import Learning, RunConfig, Surface
from shortlist.cascade.tasks import (
    ActionLabels,
    ShownLabels,
    chained,
    check_tasks,
    in_words,
    mean_auc,
    page_scores,
    task_quality,
)
from shortlist.data.dataset import build_dataset
from shortlist.data.jagged import Jagged
from shortlist.data.log import read
from shortlist.data.splits import WINDOW_NUMBER, DataConfig
from shortlist.errors import ConfigError
from shortlist.metrics.classification import auc, gauc

HOUR = 3_600
TASKS = ("click", "purchase")


def two_actions(seed: int = 0, *, num_events: int = 900) -> pl.DataFrame:
    """Clicks at random moments; a third of them is followed by a purchase of the same item, at once or up to 30 hours later."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(num_events):
        user, item, at = (
            f"u{rng.integers(12)}",
            f"i{rng.integers(15)}",
            1_600_000_000 + int(rng.integers(100 * 24)) * HOUR,
        )
        rows.append((user, item, at, "click"))
        if rng.random() < 0.33:
            rows.append((user, item, at + int(rng.choice([0, 1, 20, 30])) * HOUR, "purchase"))
    return pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "action"], orient="row")


@pytest.fixture(scope="module")
def dataset():
    return build_dataset(read(two_actions()), DataConfig(target_actions=("click",), repeats="yes"))


@pytest.mark.parametrize("window", ["fit", "valid", "test"])
@pytest.mark.parametrize("hours", [0.0, 24.0, 1e6])
def test_labels_by_action_against_plain_python(dataset, window, hours):
    """1 where the user did it in the request's group or within the hours after, in no later window: an unending reach sees no further."""
    requests = getattr(dataset.split, window)
    rng = np.random.default_rng(0)
    rows = Jagged.from_rows(
        [rng.permutation(15)[: rng.integers(0, 9)].__add__(1).tolist() for _ in range(len(requests))]
    )
    labels = ActionLabels(dataset, Learning(tasks=TASKS, task_hours=hours), window)(requests, rows)
    h, names = dataset.histories, dataset.space.actions
    at = 0
    for r in range(len(requests)):
        done = {
            (names[h.action[e] - 1], int(h.item[e]))
            for e in range(requests.end[r], h.offsets[requests.user[r] + 1])
            if h.time[e] <= requests.time[r] + hours * HOUR and dataset.plan.window_of_event[e] <= WINDOW_NUMBER[window]
        }
        for row in rows.values[rows.offsets[r] : rows.offsets[r + 1]].tolist():
            assert [labels[task][at].item() for task in TASKS] == [float((task, row) in done) for task in TASKS]
            at += 1
    assert at == len(labels["click"])
    assert labels["purchase"].sum() > 0 or not hours


def test_labels_of_a_log_without_times_are_those_of_the_group():
    frame = two_actions(num_events=300).drop("timestamp")
    dataset = build_dataset(read(frame), DataConfig(repeats="yes"))
    assert not dataset.space.has_clock
    requests = dataset.split.valid
    rows = Jagged.from_rows([list(range(1, 16))] * len(requests))
    labels = ActionLabels(dataset, Learning(tasks=TASKS), "valid")(requests, rows)
    done = (labels["click"] + labels["purchase"]).view(len(requests), -1).sum(1)
    assert torch.equal(done, torch.from_numpy(np.diff(requests.target_offsets)).float())


def test_labels_by_column_follow_the_items():
    """Candidates in another order than shown, and some left out: labels go by request and item."""
    shown = Jagged.from_rows([[3, 1], [7], [2, 9, 4]])
    columns = {
        "click": torch.tensor([1.0, 0, 0, 0, 2, 1]),
        "purchase": torch.tensor([0.0, 0, 0, 0, 1, 0]),
        "x": torch.ones(6),
    }
    rows = Jagged.from_rows([[4, 9], [1, 3]])
    labels = ShownLabels(Learning(tasks=TASKS, candidates="logged"), shown, columns)(np.array([2, 0]), rows)
    assert {task: label.tolist() for task, label in labels.items()} == {"click": [1, 1, 0, 1], "purchase": [0, 1, 0, 0]}
    linked = ShownLabels(Learning(tasks=TASKS, chained=True), shown, columns)(np.array([2, 0]), rows)["purchase"]
    assert linked.isnan().tolist() == [False, False, True, False]


def test_a_chain_of_three():
    labels = {"a": torch.tensor([0.0, 1, 1, 1]), "b": torch.tensor([1.0, 0, 1, 1]), "c": torch.tensor([1.0, 1, 0, 1])}
    found = chained(labels)
    assert found["a"].tolist() == [0, 1, 1, 1]
    assert found["b"].isnan().tolist() == [True, False, False, False]
    assert found["c"].isnan().tolist() == [True, True, False, False]
    assert found["c"][2:].tolist() == [0, 1]


def test_what_orders_the_page():
    scores = {"click": torch.tensor([2.0, 0.0, -1.0]), "purchase": torch.tensor([-4.0, 0.0, 3.0])}
    first = page_scores(scores, TASKS, Surface())
    assert torch.equal(first, scores["click"])
    assert torch.equal(page_scores(scores, TASKS, None), scores["click"])
    chance = {task: 1 / (1 + np.exp(-s.numpy())) for task, s in scores.items()}
    total = page_scores(scores, TASKS, Surface(task_weights={"click": 1.0, "purchase": 5.0}))
    np.testing.assert_allclose(total, chance["click"] + 5 * chance["purchase"], rtol=1e-6)
    product = page_scores(scores, TASKS, Surface(task_weights={"click": 1.0, "purchase": 0.5}, combine="product"))
    np.testing.assert_allclose(product.exp(), chance["click"] * chance["purchase"] ** 0.5, rtol=1e-6)


def test_quality_by_task_against_the_metrics():
    rng = np.random.default_rng(0)
    label, known, user = rng.integers(0, 2, 60).astype(np.float32), rng.random(60) < 0.7, rng.integers(0, 5, 60)
    values = rng.normal(size=60).astype(np.float32)
    labels = {"a": torch.from_numpy(np.where(known, label, np.nan).astype(np.float32)), "b": torch.zeros(60)}
    told = task_quality({"a": torch.from_numpy(values), "b": torch.from_numpy(values)}, labels, user)
    assert told["a"]["auc"] == auc(label[known], values[known])
    assert told["a"]["gauc"] == gauc(label[known], values[known], user[known])
    assert told["a"]["candidates"] == known.sum()
    assert told["b"] == {"candidates": 60.0, "positives": 0.0}
    assert in_words(told).endswith("b has one class only (0 of 60)")


# --- settings ---

CONFIG = """
[data]
target_actions = ["click"]
[surface]
k = 3
task_weights = {click = 1.0, purchase = 2.0}
combine = "product"
[learning]
tasks = ["click", "purchase"]
chained = true
[trainer]
epochs = 2
task_weights = [1.0, 0.5]
[trainer.gradients]
rule = "cagrad"
settings = {c = 0.4}
[trainer.mmoe]
lr = 0.01
gradients = {rule = "pcgrad"}
[stages.retrieval]
systems = ["popularity"]
keep = 9
[stages.ranking]
systems = ["mmoe"]
[systems.mmoe]
num_experts = 2
expert_widths = [8]
tower_widths = []
[systems.mmoe.input]
dim = 4
"""


def test_settings_survive_the_file():
    config = RunConfig.from_toml(CONFIG)
    assert RunConfig.from_toml(config.to_toml()) == config
    assert config.override("surface.combine=sum").surface.combine == "sum"
    changed = config.override("trainer.gradients.rule=sum", "trainer.gradients.settings={}")
    assert changed.trainer.gradients.rule == "sum"
    assert changed.trainer_of("mmoe").gradients.rule == "pcgrad"
    assert changed.trainer_of("mmoe").task_weights == (1.0, 0.5)
    assert config.surface.task_weights == {"click": 1.0, "purchase": 2.0}


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("purchase = 2.0", "purchas = 2.0", "did you mean 'purchase'"),
        ("purchase = 2.0", "purchase = -2.0", "task_weights"),
        ('tasks = ["click", "purchase"]', 'tasks = ["click", "click"]', "different names"),
        ("chained = true", "task_hours = -1.0", "task_hours"),
        ('rule = "cagrad"', 'rule = "cagrat"', "cagrad"),
        ("{c = 0.4}", "{c = 4.0}", "c must be"),
        ('{rule = "pcgrad"}', '{role = "pcgrad"}', "role"),
    ],
)
def test_wrong_settings_are_refused_by_name(old, new, word):
    with pytest.raises(ConfigError, match=word):
        RunConfig.from_toml(CONFIG.replace(old, new))


def test_tasks_that_the_log_does_not_know(dataset):
    config = RunConfig.from_toml(CONFIG)
    check_tasks(config, dataset)
    with pytest.raises(ConfigError, match=r"'buy'.*click, purchase"):
        check_tasks(config.override("learning.tasks=['click', 'buy']", "surface.task_weights={}"), dataset)
    with pytest.raises(ConfigError, match="label columns"):
        check_tasks(config.override("learning.candidates=logged"), dataset)


def test_a_system_of_one_task_is_scored_as_ever(dataset):
    from shortlist.cascade.lessons import make_batch
    from shortlist.models.base import RETRIEVAL_TASK
    from shortlist.registry import find

    system = find("popularity").cls(find("popularity").config(), dataset.space)
    system.prepare(dataset.view())
    batch = make_batch(dataset, dataset.split.test, 10)
    batch = batch.with_candidates(Jagged.from_rows([[1, 2, 3]] * batch.size))
    surface = Surface(task_weights={"click": 1.0})
    assert torch.equal(score(system, batch, surface=surface), system.score(batch)[RETRIEVAL_TASK])


# --- a log of what pages showed ---


def shown_log(seed: int = 0) -> pl.DataFrame:
    """Pages of five items; the first letter's items are clicked more, the dear ones of them bought less."""
    rng = np.random.default_rng(seed)
    rows = []
    for request in range(500):
        at = 1_600_000_000 + request * HOUR
        for item in rng.permutation(12)[:5].tolist():
            click = int(rng.random() < (0.8 if item < 6 else 0.2))
            rows.append(
                (
                    f"u{rng.integers(2) + 2 * (request % 9)}",
                    f"i{item}",
                    at,
                    f"r{request}",
                    click,
                    int(click and item % 2),
                )
            )
    schema = ["user_id", "item_id", "timestamp", "request_id", "click", "purchase"]
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    return frame.with_columns(user_id=pl.col("user_id").first().over("request_id"))


def test_a_log_of_shown_pages_teaches_its_label_columns(tmp_path, monkeypatch):
    """Two label columns become two tasks; lessons have the log's labels, and both are judged on the pages of the validation window."""
    from shortlist.cascade import build
    from shortlist.data.roles import Roles

    config = RunConfig.from_toml(CONFIG).override(
        "data.target_actions=[]", "data.target_label=click", "learning.candidates=logged", "surface.repeats=yes"
    )
    log = read(shown_log(), roles=Roles(labels=("click", "purchase")))
    dataset = build_dataset(log, config.data_settings)
    seen, made = [], build.candidate_source
    monkeypatch.setattr(build, "candidate_source", lambda *a, **k: seen.append(a[0]) or made(*a, **k))
    run = build.train_unsaved(dataset, config, tmp_path / "state", progress=False)
    (lessons,) = seen
    requests, shown, columns = dataset.impressions("fit")
    expected = {
        (r, i): (c, p)
        for r, i, c, p in zip(
            shown.row_of_value.tolist(), shown.values.tolist(), columns["click"].tolist(), columns["purchase"].tolist()
        )
    }
    place = {(u, t): r for r, (u, t) in enumerate(zip(requests.user.tolist(), requests.time.tolist()))}
    owner = [place[u, t] for u, t in zip(lessons.requests.user.tolist(), lessons.requests.time.tolist())]
    rows = lessons.rows
    assert len(rows.values) == len(expected)
    for r, item, click, purchase in zip(
        rows.row_of_value.tolist(),
        rows.values.tolist(),
        lessons.labels["click"].tolist(),
        lessons.labels["purchase"].tolist(),
    ):
        assert click == expected[owner[r], item][0]
        assert purchase == expected[owner[r], item][1] if click else np.isnan(purchase)
    told = next(s["tasks"] for s in run.metrics["systems"] if s["name"] == "mmoe")
    _, shown, columns = dataset.impressions("valid")
    assert told["click"]["candidates"] == len(shown.values)
    assert told["purchase"]["positives"] == columns["purchase"].sum()
    assert told["purchase"]["candidates"] == columns["click"].sum()
    assert {"auc", "gauc"} <= told["click"].keys()


# --- what decides the best epoch ---


def test_the_mean_counts_tasks_alike_and_leaves_out_those_of_one_class():
    told = {"a": {"auc": 0.6, "candidates": 1e6}, "b": {"auc": 0.9, "candidates": 10.0}, "c": {"candidates": 5.0}}
    assert mean_auc(told) == pytest.approx(0.75)
    assert mean_auc({"c": told["c"]}) is None
    assert mean_auc({}) is None


def trained_on_pages(tmp_path, *changes: str):
    """The metrics of a run on the log of shown pages, and every epoch's validation score."""
    from shortlist.cascade import build
    from shortlist.data.roles import Roles

    config = RunConfig.from_toml(CONFIG).override(
        "data.target_actions=[]",
        "data.target_label=click",
        "learning.candidates=logged",
        "surface.repeats=yes",
        *changes,
    )
    dataset = build_dataset(read(shown_log(), roles=Roles(labels=("click", "purchase"))), config.data_settings)
    run = build.train_unsaved(dataset, config, tmp_path / "state", progress=False)
    (system,) = [s for s in run.metrics["systems"] if s["name"] == "mmoe"]
    return system, [point["score"] for point in run.metrics["curves"]["mmoe"]]


def test_several_tasks_are_stopped_by_their_mean_auc(tmp_path):
    """The kept epoch is the one with the best mean AUC, and the report's AUCs, measured after training, are those of that epoch."""
    system, scores = trained_on_pages(tmp_path, "trainer.epochs=4")
    assert system["best_epoch"] == 1 + int(np.argmax(scores))
    assert max(scores) == pytest.approx(np.mean([told["auc"] for told in system["tasks"].values()]), abs=1e-6)
    assert system["ndcg"] != pytest.approx(max(scores), abs=1e-6)  # the report's NDCG stays one


def test_one_task_is_stopped_by_ndcg(tmp_path):
    one = ("learning.tasks=['click']", "learning.chained=false", "trainer.task_weights=[]", "surface.task_weights={}")
    system, scores = trained_on_pages(tmp_path, *one)
    assert system["ndcg"] == max(scores)
