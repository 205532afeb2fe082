"""What must teach nothing teaches nothing: the order of events inside groups, a sort of the file, and everything that is not past yet."""

from collections import Counter
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import polars as pl
import pytest

from cli_support import LIGHT, succeeds
from shortlist.cascade.run import load_run
from shortlist.data.dataset import build_dataset
from shortlist.data.log import read
from shortlist.data.splits import DataConfig
from shortlist.evaluation.evaluate import compare
from shortlist.evaluation.runs import evaluate_counted, evaluate_run
from shortlist.models.ranking.dnn import DNN
from shortlist.models.ranking.mmr import MMR
from shortlist.models.retrieval.counts import Counts
from shortlist.models.retrieval.popularity import Popularity
from shortlist.models.retrieval.sasrec import SASRec
from shortlist.models.retrieval.two_tower import TwoTower
from support import shop_frames

WITH_SEQUENCES = LIGHT.replace('"two-tower"]', '"two-tower", "sasrec"]') + (
    "[systems.sasrec]\ndim = 16\nnum_blocks = 1\n"
)
CLOSED_FORMS = ("popularity", "personal-frequency", "counts", "item-knn", "ease")


def train(folder, events, items, settings=WITH_SEQUENCES, *more):
    folder.mkdir(exist_ok=True)
    events.write_csv(folder / "events.csv")
    items.write_csv(folder / "items.csv")
    (folder / "settings.toml").write_text(settings)
    tables = ("--items", folder / "items.csv", "--config", folder / "settings.toml")
    succeeds("train", folder / "events.csv", *tables, "--out", folder / "run", "--quiet", *more)
    return folder / "run"


# -- order inside groups ------------------------------------------------------------------------------------------------


def test_permuting_events_inside_groups_changes_no_metric_beyond_noise(tmp_path):
    """Counts and closed forms see sets, so their pages are the same to the last row. Systems trained by gradient add the same numbers
    in another order, and a sequence model has positions, so their pages may differ by what a paired test over users takes for noise."""
    events, items, _ = shop_frames(150)
    key = ["user_id", "timestamp"]
    lot = pl.Series("lot", np.random.default_rng(4).random(events.height))
    place = pl.int_range(pl.len()).over(key)
    permuted = events.with_columns(lot).sort("lot").with_columns(place=place).sort([*key, "place"]).drop("lot", "place")
    in_order = events.with_columns(place=place).sort([*key, "place"]).drop("place")
    assert permuted.sort(permuted.columns).equals(in_order.sort(in_order.columns))
    assert (permuted["item_id"] != in_order["item_id"]).mean() > 0.3
    one, other = (load_run(train(tmp_path / name, e, items)) for name, e in (("one", in_order), ("other", permuted)))
    for name in CLOSED_FORMS:
        pages = [evaluate_counted(name, run.dataset, k=4).rows for run in (one, other)]
        assert np.array_equal(*pages), name
    reports = [evaluate_run(run, name=name).report for name, run in (("one", one), ("other", other))]
    test = compare(reports).tests["other"]["ndcg@4"]
    assert test["p_value"] > 0.01, test
    assert abs(test["difference"]) < 0.05, test
    assert reports[0].metrics["ndcg@4"].mean > 0.3  # it did learn something that could have changed


def runs_of_items(sort, num_users=200, num_items=40, seed=0):
    """Baskets of five neighbours on a ring, from a random place: nothing is to be known of the next basket, all of the next line."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(num_users):
        for day in range(6):
            basket = (rng.integers(num_items) + np.arange(5)) % num_items
            moment = 1_700_000_000 + day * 86_400 + user
            lot = rng.permutation(5)
            rows += [(user, int(item), moment) for item in (basket if sort else basket[lot])]
    return pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")


def test_a_next_in_file_model_gains_nothing_from_sorted_ties():
    """Directed counts learn what follows what. Under the protocols of the house a sort of the file is invisible to them; under the
    published one, which cuts baskets, the same model finds it, so this test could see it."""

    def ndcg(sort, protocol):
        dataset = build_dataset(read(runs_of_items(sort)), DataConfig(protocol=protocol, repeats="yes"))
        report = evaluate_counted("counts", dataset, settings={"max_gap": 1, "num_groups": 1}, k=5)
        return report.metrics["ndcg@5"].mean, report.rows

    for protocol in ("time", "last-group"):
        (in_sort, rows), (shuffled, other_rows) = ndcg(True, protocol), ndcg(False, protocol)
        assert in_sort == shuffled
        assert np.array_equal(rows, other_rows)
        assert in_sort < 0.2
    published = "leave-last-out-as-published"
    assert ndcg(True, published)[0] > 0.9 > ndcg(False, published)[0] + 0.3


def test_check_names_sorted_ties(tmp_path):
    for sort, words in ((True, "are sorted by id"), (False, "are not sorted by id")):
        runs_of_items(sort).sort(
            "user_id", "timestamp", "item_id" if sort else "user_id", maintain_order=True
        ).write_csv(tmp_path / "log.csv")
        assert words in succeeds("check", tmp_path / "log.csv").out


# -- labels and vocabularies --------------------------------------------------------------------------------------------


def test_check_names_the_column_that_is_the_label_in_disguise(tmp_path):
    events, _, _ = shop_frames(100)
    rng = np.random.default_rng(0)
    click = rng.integers(0, 2, events.height)
    events.with_columns(
        click=pl.Series(click),
        checkout_step=pl.Series(np.where(click == 1, rng.choice(["pay", "done"], len(click)), "browse")),
        refund_id=pl.Series([str(n) if c else None for n, c in enumerate(click)]),
        device=pl.Series(rng.choice(["phone", "desk"], len(click))),
        dwell=pl.Series(click + rng.normal(0, 1.5, len(click))),  # tells something, as a good feature may
    ).write_csv(tmp_path / "log.csv")
    words = succeeds("check", tmp_path / "log.csv").out
    assert "Column checkout_step gives click away" in words
    assert "Whether refund_id is missing gives click away" in words
    leaks = succeeds("check", tmp_path / "log.csv", "--json").json["leaks"]
    assert {leak["column"] for leak in leaks} == {"checkout_step", "refund_id"}


def test_what_only_test_events_know_is_unknown(tmp_path):
    """An item, a category, a word, a user, an action and a device that occur in the last days alone leave no trace in what is learned."""
    events, items, _ = shop_frames(100)
    events = events.with_columns(action=pl.lit("buy"), device=pl.lit("phone")).with_columns(
        device=pl.when(pl.int_range(pl.len()) % 2 == 0).then(pl.lit("desk")).otherwise("device")
    )
    last = events["timestamp"].max()
    late = pl.DataFrame(
        [("newcomer", "late-item", last + n, 1.0, "gift", "watch") for n in range(3)]
        + [("newcomer", "i3", last + 9, 1.0, "gift", "watch")],
        schema=events.schema,
        orient="row",
    )
    listed = items.vstack(
        pl.DataFrame([("late-item", "unheard zeppelin zeppelin", "c-late", 2.0)], schema=items.schema, orient="row")
    )
    run = load_run(train(tmp_path / "log", events.vstack(late), listed, LIGHT, "--set", 'data.context=["device"]'))
    dataset = run.dataset
    (row,) = dataset.item_ids.encode(["late-item"])
    (user,) = dataset.user_ids.encode(["newcomer"])
    assert row > 0
    assert user > dataset.space.num_users
    for space in (dataset.space, *(system.space for system in run.cascade.systems.values())):
        assert not space.known_items[row]
        assert user > space.num_users
    columns = dataset.space.items.columns
    assert columns["cluster"][row] == 0
    words = columns["title_words"]
    assert not words.values[words.offsets[row] : words.offsets[row + 1]].any()
    assert dataset.space.actions == ("buy",)
    where = slice(*dataset.histories.offsets[user : user + 2])
    assert dataset.histories.action[where].tolist() == [0, 0, 0, 0]
    asked = dataset.split.test.user == user
    assert asked.any()
    assert not dataset.split.test.context["device"][asked].any()
    assert dataset.split.test.context["device"][~asked].all()
    for name in ("cluster", "device"):
        sizes = {
            f.name: f.size for f in (*dataset.space.items.fields, *dataset.space.context_fields) if hasattr(f, "size")
        }
        assert sizes[name] == {"cluster": 4, "device": 2}[name]


# -- the future ---------------------------------------------------------------------------------------------------------


@dataclass
class Clairvoyant:
    """Looks at everything that systems are offered while a real cascade is trained and evaluated, in search of the future."""

    views: list = field(default_factory=list)
    trained: dict = field(default_factory=dict)
    """By system: batches with which it was trained."""
    asked: dict = field(default_factory=dict)
    """By system: batches for which it was asked."""

    def watch(self, monkeypatch, cls, method, seen):
        real = getattr(cls, method)

        def spy(system, batch, *more):
            seen.setdefault(cls.__name__, []).append((batch, system.max_history))
            return real(system, batch, *more)

        monkeypatch.setattr(cls, method, spy)

    def watch_prepare(self, monkeypatch, cls):
        real = cls.prepare

        def spy(system, view):
            self.views.append(view)
            return real(system, view)

        monkeypatch.setattr(cls, "prepare", spy)


@pytest.fixture
def clairvoyant(monkeypatch):
    eyes = Clairvoyant()
    for cls in (TwoTower, SASRec, DNN):
        eyes.watch(monkeypatch, cls, "losses", eyes.trained)
    ways = {
        TwoTower: "encode_user",
        SASRec: "encode_user",
        DNN: "user_state",
        MMR: "rerank",
        Popularity: "score_all",
        Counts: "score_all",
    }
    for cls, method in ways.items():
        eyes.watch(monkeypatch, cls, method, eyes.asked)
        eyes.watch_prepare(monkeypatch, cls)
    return eyes


def check_past(batch, max_history, events, item_ids):
    """The histories of a batch are what its users did before its moments, by brute force on the raw table; the newest events of it
    where the system reads fewer."""
    history = batch.history
    bounds = history.items.offsets.tolist()
    for r, moment in enumerate(batch.time.tolist()):
        (user,) = events.filter(pl.col("timestamp") == moment)["user_id"].unique()  # moments tell users apart
        past = events.filter((pl.col("user_id") == user) & (pl.col("timestamp") < moment))
        expected = Counter(zip(past["timestamp"], item_ids.encode(past["item_id"]).tolist()))
        span = slice(bounds[r], bounds[r + 1])
        given = Counter(zip(history.time[span].tolist(), history.items.values[span].tolist()))
        assert given <= expected
        assert given.total() >= min(max_history, expected.total())


def check_next(batch, events, item_ids):
    """Each supervised position asks for the items of the user's next moment, no more and no fewer."""
    targets, history = batch.targets, batch.history
    for n, position in enumerate(targets.position.tolist()):
        moment = history.time[position].item()
        (user,) = events.filter(pl.col("timestamp") == moment)["user_id"].unique()
        later = events.filter((pl.col("user_id") == user) & (pl.col("timestamp") > moment))
        following = later.filter(pl.col("timestamp") == pl.col("timestamp").min())
        wanted = set(item_ids.encode(following["item_id"]).tolist())
        assert set(targets.items.values[targets.items.offsets[n] : targets.items.offsets[n + 1]].tolist()) == wanted


def times(batches):
    return np.concatenate([batch.time.numpy() for batch, _ in batches])


def test_no_batch_of_any_stage_holds_anything_of_its_own_group_or_later(clairvoyant, tmp_path):
    events, items, _ = shop_frames(40)
    assert events.group_by("timestamp").agg(pl.col("user_id").n_unique())["user_id"].max() == 1
    one_epoch = WITH_SEQUENCES.replace("epochs = 2", "epochs = 1")
    run = load_run(train(tmp_path / "log", events, items, one_epoch))
    now, ids = run.dataset.plan.now, run.dataset.item_ids
    in_training = {name: list(batches) for name, batches in clairvoyant.asked.items()}
    clairvoyant.asked.clear()
    evaluate_run(run)

    seen = [part.values() for part in (clairvoyant.trained, in_training, clairvoyant.asked)]
    for batch, max_history in chain.from_iterable(chain.from_iterable(seen)):
        check_past(batch, max_history, events, ids)
    for batch, _ in clairvoyant.trained["SASRec"]:
        check_next(batch, events, ids)
    # Each window is used for what it is for: nothing of the test window is seen before evaluation, and then without answers.
    for name in ("TwoTower", "SASRec"):
        assert times(clairvoyant.trained[name]).max() < now["fit"]
    ranker = times(clairvoyant.trained["DNN"])
    assert now["fit"] <= ranker.min()
    assert ranker.max() < now["valid"]
    for name, batches in in_training.items():
        assert times(batches).max() < now["test"], name
        assert (times(batches) >= now["valid"]).any(), name
    assert set(clairvoyant.asked) == set(in_training) == {"TwoTower", "SASRec", "DNN", "MMR", "Popularity", "Counts"}
    for batches in clairvoyant.asked.values():
        assert times(batches).min() >= now["test"]
        assert all(not batch.labels and batch.targets is None and batch.weight is None for batch, _ in batches)
    # What is prepared sees a past as well, and no array of it is a window onto a larger one that holds the rest.
    assert {view.now for view in clairvoyant.views} >= {now["fit"], now["test"]}
    for view in clairvoyant.views:
        assert view.now <= now["test"]
        for name in ("item", "time", "group", "action", "value"):
            array = getattr(view.histories, name)
            assert array.base is None or array.base.size == array.size, name
        assert view.histories.time.max(initial=0) < view.now
        assert view.histories.num_events == events.filter(pl.col("timestamp") < view.now).height
