import json
import shutil
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from shortlist.cascade import build, lessons
from shortlist.cascade.build import load_run, train_cascade, train_unsaved
from shortlist.cascade.config import RunConfig
from shortlist.cascade.fitting import check_fits, default_config, fits, offers
from shortlist.cascade.lessons import chunks, collect, make_batch
from shortlist.cascade.run import save_run
from shortlist.cascade.sharing import Kept, Shared
from shortlist.data.dataset import Dataset, build_dataset
from shortlist.data.histories import Histories
from shortlist.data.log import read
from shortlist.errors import ConfigError, DataError, SnapshotError
from shortlist.models.base import Ranker
from shortlist.registry import find
from support import planted_histories

FUNNEL = """
[surface]
k = 4
[trainer]
epochs = 2
batch_size = 32
lr = 0.02
[stages.retrieval]
systems = ["tiny-counting", "tiny-closed-form", "tiny-two-phases"]
keep = 14
[stages.pre-ranking]
systems = ["light"]
keep = 10
[stages.ranking]
systems = ["tiny-pairs"]
keep = 6
[stages.re-ranking]
systems = ["tiny-reverse"]
[systems.light]
system = "tiny-pairs"
dim = 2
"""


def shop_log(histories: Histories) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "user_id": histories.user_of_event,
            "item_id": histories.item,
            "timestamp": histories.time + 1_600_000_000,
            "value": 1.0 + histories.item,
        }
    )


@pytest.fixture(scope="module")
def histories():
    """The planted shop, its users starting on different days."""
    whole = planted_histories(90, seed=1)
    shift = np.random.default_rng(0).integers(0, 15, 92) * 86_400
    return replace(whole, time=whole.time + shift[whole.user_of_event])


@pytest.fixture(scope="module")
def dataset(histories):
    return build_dataset(read(shop_log(histories)))


@pytest.fixture(scope="module")
def config(own_systems):
    return RunConfig.from_toml(FUNNEL)


@pytest.fixture(scope="module")
def trained(dataset, config, tmp_path_factory):
    """A whole run; tests copy its folder before they harm it."""
    return train(dataset, config, tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture
def folder(trained, tmp_path):
    shutil.copytree(trained.folder, tmp_path / "run")
    return tmp_path / "run"


def train(dataset: Dataset, config: RunConfig, out, **options):
    return train_cascade(dataset, config, out, progress=False, **options)


def asked(dataset: Dataset, run):
    return make_batch(dataset, dataset.split.test, run.cascade.max_history)


def weights(run) -> dict[str, dict[str, torch.Tensor]]:
    return {name: system.state_dict() for name, system in run.cascade.systems.items()}


def same_weights(one, other) -> bool:
    return all(
        torch.equal(tensor, weights(other)[name][key])
        for name, own in weights(one).items()
        for key, tensor in own.items()
    )


# -- the whole -------------------------------------------------------------------------------------------------------


def test_a_run_is_trained_written_and_read_back_alike(dataset, trained, folder):
    run = trained
    assert [(s["stage"], s["name"]) for s in run.metrics["systems"]] == [
        ("retrieval", "tiny-counting"),
        ("retrieval", "tiny-closed-form"),
        ("retrieval", "tiny-two-phases"),
        ("pre-ranking", "light"),
        ("ranking", "tiny-pairs"),
        ("re-ranking", "tiny-reverse"),
    ]
    assert [p.name for p in run.folder.parent.iterdir()] == ["run"]  # the training state is gone
    assert sum(run.metrics["validation"]["lost_at"].values()) == pytest.approx(1)
    again = load_run(folder)
    assert again.version == run.version
    assert again.config == run.config
    assert again.metrics == json.loads(json.dumps(run.metrics))
    old, new = run.cascade.run(asked(dataset, run)), again.cascade.run(asked(again.dataset, again))
    assert torch.equal(old.rows, new.rows)
    assert torch.equal(old.scores, new.scores)
    assert (old.rows > 0).all()


def test_the_same_settings_give_the_same_run(dataset, config, trained, tmp_path):
    assert same_weights(train(dataset, config, tmp_path / "other"), trained)


def test_a_ranker_beats_the_order_it_was_given(dataset, config, tmp_path):
    """The shop repeats a cluster, which pair fields show; counts of all people do not."""
    config = config.override(
        "trainer.epochs=12", "trainer.batch_size=8", 'retrieval.systems=["tiny-counting"]', "retrieval.keep=20"
    )
    metrics = train(dataset, config, tmp_path / "run").metrics
    ndcg = {s["name"]: s["ndcg"] for s in metrics["systems"]}
    assert ndcg["tiny-pairs"] > 1.5 * ndcg["tiny-counting"]


# -- what may be seen ------------------------------------------------------------------------------------------------


def test_nothing_is_learned_from_the_test_window(histories, dataset, config, trained, tmp_path):
    """Other items in the test window change no weight, no count and no validation figure."""
    hidden = dataset.plan.now["test"]
    moved = histories.time + 1_600_000_000 >= hidden
    assert 20 < moved.sum() < len(moved) / 3
    other_items = np.where(moved, 1 + (histories.item + 6) % 20, histories.item)
    other = build_dataset(read(shop_log(replace(histories, item=other_items))), config.data_settings)
    assert not np.array_equal(other.split.test.target, dataset.split.test.target)
    one, two = trained, train(other, config, tmp_path / "two")
    assert same_weights(one, two)
    assert torch.equal(one.cascade.popular, two.cascade.popular)
    assert one.metrics["validation"]["ndcg@4"] == two.metrics["validation"]["ndcg@4"]


@pytest.mark.parametrize(("refresh", "window"), [("true", "test"), ("false", "fit")])
def test_served_counts_are_of_everything_before_the_test_window(dataset, config, tmp_path, refresh, window):
    run = train(dataset, config.override(f"learning.refresh={refresh}"), tmp_path / "run")
    counts = np.bincount(dataset.view(window).histories.item, minlength=dataset.num_items + 1)
    assert load_run(tmp_path / "run").cascade.systems["tiny-counting"].counts_N.tolist() == counts.tolist()
    assert run.cascade.popular.tolist() == sorted(range(1, dataset.num_items + 1), key=lambda i: (-counts[i], i))


def test_later_stages_learn_on_what_earlier_ones_let_through(dataset, config, tmp_path, monkeypatch):
    seen = {}

    def spy(cascade, data, requests, stage, **options):
        part = collect(cascade, data, requests, stage, **options)
        seen.setdefault((stage, options["most"]), []).append((cascade, requests, part))
        return part

    monkeypatch.setattr(build, "collect", spy)
    train(dataset, config.override("learning.max_candidates=8", "learning.slices=3"), tmp_path / "run")
    assert {stage for stage, _ in seen} == {"pre-ranking", "ranking", "re-ranking"}
    learned = seen["ranking", 8]
    assert len(learned) == 3  # slices of the fit window, each with counts of what came before it
    assert sum(len(requests) for _, requests, _ in learned) == len(dataset.split.fit)
    for cascade, requests, part in learned:
        view = dataset.view_before(int(requests.time.min()))
        counts = np.bincount(view.histories.item, minlength=dataset.num_items + 1)
        assert cascade.systems["tiny-counting"].counts_N.tolist() == counts.tolist()
        let_through = cascade.until(make_batch(dataset, requests, cascade.max_history), "ranking").candidates.rows
        for r in range(len(requests)):
            got = part.rows.values[part.rows.offsets[r] : part.rows.offsets[r + 1]].tolist()
            all_of_them = let_through.values[let_through.offsets[r] : let_through.offsets[r + 1]].tolist()
            targets = requests.target[requests.target_offsets[r] : requests.target_offsets[r + 1]].tolist()
            assert len(got) == 8
            assert got == [item for item in all_of_them if item in got]  # thinned out, in the old order
            assert set(targets) & set(all_of_them) <= set(got)
            labels = part.label[part.rows.offsets[r] : part.rows.offsets[r + 1]].tolist()
            assert labels == [float(item in targets) for item in got]


def shown_log(histories: Histories, seed: int = 0) -> pl.DataFrame:
    """The shop's choices, each on a page with two other items that were not chosen, and pages on which nothing was."""
    rng = np.random.default_rng(seed)
    bought = shop_log(histories).with_columns(page=pl.int_range(pl.len()), click=pl.lit(1))
    extra = bought.sample(fraction=0.3, seed=seed).with_columns(page=pl.col("page") + bought.height)
    pages = pl.concat([bought, bought, extra, extra]).with_columns(click=pl.lit(0))
    other = 1 + (pages["item_id"].to_numpy() + rng.integers(1, 19, pages.height)) % 20  # never the item itself
    shown = pages.with_columns(item_id=pl.Series(other), timestamp=pl.col("timestamp") - 1)
    bought = bought.with_columns(timestamp=pl.col("timestamp") - 1)
    return pl.concat([bought, shown.select(bought.columns)]).rename({"page": "request_id"})


def test_rankers_learn_on_logged_pages_when_asked(histories, config, tmp_path, monkeypatch):
    data = build_dataset(read(shown_log(histories)))
    assert data.logged is not None
    learned = []
    made = build.candidate_source
    monkeypatch.setattr(
        build, "candidate_source", lambda *a, **k: learned.append((a[0], made(*a, **k))) or learned[-1][1]
    )
    run = train(data, config.override("learning.candidates=logged", "learning.slices=3"), tmp_path / "run")
    assert load_run(run.folder).config.learning.candidates == "logged"
    requests, shown, labels = data.impressions("fit")
    excluded = not data.repeats
    expected = {}
    for r in range(len(requests)):
        a, b = shown.offsets[r : r + 2].tolist()
        past = set(data.histories.item[requests.start[r] : requests.end[r]].tolist()) if excluded else set()
        page = dict(zip(shown.values[a:b].tolist(), labels["click"][a:b].tolist()))
        key = (int(requests.user[r]), int(requests.time[r]), int(requests.end[r]), tuple(sorted(page)))
        expected[key] = {item: label for item, label in page.items() if item not in past}
    lesson, source = learned[-1]
    assert any(not any(page.values()) for page in expected.values())
    assert len(lesson.requests) == len(requests)
    found = [
        dict(zip(lesson.rows.values[a:b].tolist(), lesson.label[a:b].tolist()))
        for a, b in zip(lesson.rows.offsets.tolist(), lesson.rows.offsets[1:].tolist())
    ]
    in_order = lambda pages: sorted(sorted(page.items()) for page in pages)  # noqa: E731
    assert in_order(found) == in_order(expected.values())
    assert {"score_tiny-counting", "rank_light", "pair_seen"} <= lesson.pair.keys()
    taught = sum(batch.size for batch in source.batches(0))
    assert taught == sum(bool(page) for page in expected.values())  # also where nothing was chosen


def test_logged_pages_are_asked_of_the_log_before_anything_is_trained(dataset, config, tmp_path):
    with pytest.raises(DataError, match="no impressions: every row is a choice"):
        train(dataset, config.override("learning.candidates=logged"), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="candidates"):
        config.override("learning.candidates=all")


def test_by_value_each_choice_weighs_its_worth(dataset, config, tmp_path, monkeypatch):
    sources = []
    made = lessons.candidate_source
    monkeypatch.setattr(
        build, "candidate_source", lambda *a, **k: sources.append((a[0], made(*a, **k))) or sources[-1][1]
    )
    train(dataset, config.override("surface.objective=value"), tmp_path / "run")
    learned, source = sources[0]
    item_value = torch.from_numpy(np.asarray([0.0] + [1.0 + int(i) for i in dataset.item_ids.decode(range(1, 21))]))
    mean = float(item_value[learned.rows.values[learned.label > 0]].mean())
    for batch in source.batches(0):
        label, weight = batch.labels["target"], batch.weight
        assert list(batch.labels) == ["target"]
        expected = torch.where(label > 0, item_value[batch.candidate_rows.values] / mean, 1.0)
        torch.testing.assert_close(weight, expected.float(), rtol=1e-4, atol=1e-4)


# -- interruption and damage -----------------------------------------------------------------------------------------


class Stopped(KeyboardInterrupt):
    pass


def test_a_stopped_training_goes_on_and_ends_alike(dataset, config, trained, tmp_path, monkeypatch):
    steps = []
    original = find("tiny-two-phases").cls.losses
    monkeypatch.setattr(find("tiny-two-phases").cls, "losses", lambda self, b: steps.append(1) or original(self, b))
    ranker = find("tiny-pairs").cls
    ranked, losses = [], ranker.losses

    def stop_later(self, batch):
        ranked.append(1)
        if len(ranked) == 3:
            raise Stopped
        return losses(self, batch)

    monkeypatch.setattr(ranker, "losses", stop_later)
    with pytest.raises(Stopped):
        train(dataset, config, tmp_path / "cut")
    assert steps
    assert not (tmp_path / "cut").exists()
    assert (tmp_path / "cut.training").is_dir()
    steps.clear()
    run = train(dataset, config, tmp_path / "cut")
    assert not steps  # the retriever was not trained again
    assert same_weights(run, trained)
    assert not (tmp_path / "cut.training").exists()


def test_other_settings_of_a_late_stage_keep_the_early_ones(dataset, config, tmp_path, monkeypatch):
    train(dataset, config, tmp_path / "run", keep_training=True)
    steps = []
    original = find("tiny-two-phases").cls.losses
    monkeypatch.setattr(find("tiny-two-phases").cls, "losses", lambda self, b: steps.append(1) or original(self, b))
    train(dataset, config.override("tiny-pairs.dim=3"), tmp_path / "run", keep_training=True)
    assert not steps
    train(dataset, config.override("tiny-two-phases.dim=3"), tmp_path / "run", keep_training=True)
    assert steps


def test_shared_work_is_made_once_and_changes_nothing(dataset, config, trained, tmp_path, monkeypatch):
    shared, made = Shared(), []
    collected, counting = build.collect, find("tiny-counting").cls
    prepare = counting.prepare
    monkeypatch.setattr(build, "collect", lambda *given, **rest: made.append("lessons") or collected(*given, **rest))
    monkeypatch.setattr(counting, "prepare", lambda self, view: made.append("counted") or prepare(self, view))
    first = train(dataset, config, tmp_path / "first", shared=shared)
    assert same_weights(first, trained)
    assert first.metrics["validation"]["ndcg@4"] == trained.metrics["validation"]["ndcg@4"]
    assert set(made) == {"lessons", "counted"}
    made.clear()
    again = train_unsaved(dataset, config, tmp_path / "again", shared=shared)
    assert not made
    assert same_weights(again, trained)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "first"]
    # Another pre-ranker: what it learns from stays, what comes after it does not.
    train_unsaved(dataset, config.override("light.dim=3"), tmp_path / "again", shared=shared)
    slices = config.learning.slices
    assert made == ["lessons"] * (slices + 2)  # ranking; of re-ranking, which learns nothing, validation alone
    # Retrieval that counts otherwise changes all.
    made.clear()
    train_unsaved(dataset, config.override("retrieval.keep=12"), tmp_path / "again", shared=shared)
    assert "lessons" in made
    assert "counted" not in made


def test_what_is_kept_fits_its_room():
    kept, made = Kept(len, most_bytes=5), []

    def get(key):
        return kept.get(key, lambda: made.append(key) or key * 2)

    assert [get("a"), get("b"), get("a"), get("c")] == ["aa", "bb", "aa", "cc"]  # b has waited longest and goes
    get("a")
    assert made == ["a", "b", "c"]
    get("b")
    assert made == ["a", "b", "c", "b"]
    assert get("much too long") == "much too longmuch too long"  # the newest always stays
    assert len(kept) == 1


def test_a_failed_training_leaves_the_old_run(dataset, config, trained, folder, monkeypatch):
    def fail(self, batch):
        raise RuntimeError("no")

    monkeypatch.setattr(Ranker, "score", fail)
    with pytest.raises(RuntimeError, match="no"):
        train(dataset, config, folder)
    assert load_run(folder).version == trained.version


@pytest.mark.parametrize(
    "name", ["cascade.toml", "metrics.json", "popular.safetensors", "systems/light.safetensors", "dataset/dataset.json"]
)
def test_a_damaged_run_is_refused_by_the_file_s_name(folder, name):
    path = folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(SnapshotError, match=path.name):
        load_run(folder)
    path.unlink()
    with pytest.raises(SnapshotError, match=f"{path.name} is missing"):
        load_run(folder, verify=False)


def test_weights_of_another_shape_are_refused_by_the_file_s_name(dataset, folder, trained):
    smaller = trained.config.override("tiny-pairs.dim=3")
    save_run(folder, dataset, smaller, trained.cascade, {})
    with pytest.raises(SnapshotError, match=r"tiny-pairs.safetensors does not fit the system 'tiny-pairs'"):
        load_run(folder)


# -- what a log can serve --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare(histories):
    """Users and items, no times, no values."""
    return build_dataset(read(shop_log(histories).select("user_id", "item_id")))


def test_a_log_without_times_serves_no_system_that_needs_an_order(bare, dataset):
    assert "order" not in offers(bare)
    assert {"order", "clock", "history", "context"} <= offers(dataset)
    assert fits(find("sasrec"), dataset) is None
    assert fits(find("sasrec"), bare) == "the log has no times, so nobody knows what came first"
    assert fits(find("ease"), bare) is None
    text = '[stages.retrieval]\nsystems = ["popularity", "sasrec"]\nkeep = 15'
    with pytest.raises(
        ConfigError, match=r"sasrec can not be used here: the log has no times.*choose another retriever.*ease"
    ):
        check_fits(RunConfig.from_toml(text), bare)
    check_fits(RunConfig.from_toml(text), dataset)


def test_needs_are_named_one_by_one(dataset):
    entry = find("tiny-counting")
    for need in ("text", "image", "item_fields", "user_fields"):
        assert fits(replace(entry, needs=frozenset({need})), dataset)
    for need in ("clock", "order", "history", "context", "pair"):
        assert fits(replace(entry, needs=frozenset({need})), dataset) is None


@pytest.mark.parametrize("which", ["bare", "dataset"])
def test_the_default_cascade_fits_its_log(request, which):
    data = request.getfixturevalue(which)
    config = default_config(data)
    check_fits(config, data)
    assert [stage.name for stage in config.stages][:3] == ["retrieval", "pre-ranking", "ranking"]
    assert ("personal-frequency" in config.systems) == (which == "dataset")
    assert RunConfig.from_toml(config.to_toml()) == config


def test_a_base_keeps_its_sections_and_its_stages(dataset, config):
    base = RunConfig.from_toml("[surface]\nk = 7\n[trainer]\nepochs = 1")
    chosen = default_config(dataset, base)
    assert chosen.surface == base.surface
    assert chosen.trainer == base.trainer
    assert default_config(dataset, config) is config


def test_a_surface_that_contradicts_its_dataset_is_refused(dataset, config, tmp_path):
    other = "no" if dataset.repeats else "yes"
    with pytest.raises(ConfigError, match="the dataset was built the other way"):
        train(dataset, config.override(f"surface.repeats={other}"), tmp_path / "run")
    assert config.override(f"surface.repeats={other}").data_settings.repeats == other


def test_what_can_not_be_learned_is_said(dataset, tmp_path):
    """A retriever that keeps one item, and fit requests that never chose it."""
    text = FUNNEL.replace('"tiny-counting", "tiny-closed-form", "tiny-two-phases"', '"tiny-counting"').replace(
        "k = 4", "k = 1"
    )
    for old in ("keep = 14", "keep = 10", "keep = 6"):
        text = text.replace(old, "keep = 1")
    requests = dataset.split.fit
    first = int(np.bincount(dataset.view("fit").histories.item).argmax())
    chose_it = np.bincount(
        np.repeat(np.arange(len(requests)), np.diff(requests.target_offsets)), requests.target == first
    )
    without = replace(dataset, split=replace(dataset.split, fit=requests.select(np.flatnonzero(chose_it == 0))))
    with pytest.raises(DataError, match="positive candidate"):
        train(without, RunConfig.from_toml(text).override("learning.slices=1"), tmp_path / "run")


def test_chunks_cover_all_requests_and_shrink_with_the_catalogue():
    assert np.concatenate(list(chunks(1000, 10))).tolist() == list(range(1000))
    assert max(len(c) for c in chunks(100, 10_000_000)) == 3
    assert len(next(iter(chunks(5, 10**9)))) == 1


def test_a_trainer_setting_that_was_asked_for_reaches_the_chosen_systems():
    dataset = build_dataset(read(shop_log(planted_histories(30))))
    asked = default_config(dataset, RunConfig().override("trainer.epochs=1"))
    assert {asked.trainer_of(name).epochs for name in asked.systems} == {1}
    assert {default_config(dataset).trainer_of(name).epochs for name in ("light",)} != {1}


def test_a_cascade_below_its_own_retriever_is_told(tmp_path, capsys):
    """The last stage turns every page round, so the retriever alone is better."""
    dataset = build_dataset(read(shop_log(planted_histories(60))))
    upside_down = RunConfig.from_toml(FUNNEL).override('stages.re-ranking.systems=["tiny-reverse"]', "trainer.epochs=1")
    run = train_cascade(dataset, upside_down, tmp_path / "run", progress=True)
    valid = run.metrics["validation"]
    assert valid["best_alone"]["ndcg@4"] == max(s["ndcg"] for s in run.metrics["systems"] if s["stage"] == "retrieval")
    told = f"note: {valid['best_alone']['name']} alone makes better pages" in capsys.readouterr().err
    assert told == (valid["best_alone"]["ndcg@4"] > valid["ndcg@4"])
