"""A late task in a cascade: when outcomes came, the rule's samples at the end of the fit window, and a run from log to page."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from shortlist.cascade import build, delayed
from shortlist.cascade.config import Learning, RunConfig
from shortlist.cascade.delayed import DelayedSource, delayed_lessons
from shortlist.cascade.lessons import Lessons, make_batch
from shortlist.cascade.run import load_run
from shortlist.cascade.schedule import UpdateConfig
from shortlist.cascade.tasks import DELAY, ActionLabels, ShownLabels, check_tasks
from shortlist.cascade.updating import update
from shortlist.data.dataset import build_dataset
from shortlist.data.jagged import Jagged
from shortlist.data.log import read
from shortlist.data.splits import WINDOW_NUMBER, DataConfig
from shortlist.errors import ConfigError, DataError
from shortlist.models.ranking.shared_bottom import SharedBottom, SharedBottomConfig
from shortlist.store.events import Event, EventStore
from shortlist.training.config import FeedbackChoice
from shortlist.training.feedback.base import (
    LATE,
    NEGATIVE,
    POSITIVE,
    SETTLED_NEGATIVE,
    SETTLED_POSITIVE,
    make_feedback,
)

HOUR = 3_600
TASKS = ("click", "purchase")


def clicks_and_purchases(
    seed: int = 0,
    *,
    num_events: int = 700,
    num_users: int = 12,
    num_items: int = 15,
    days: int = 60,
    delays: tuple[int, ...] = (0, 1_800, 20 * HOUR, 90 * HOUR),
) -> pl.DataFrame:
    """Clicks at random moments; half of them are followed by a purchase of the same item, after one of the delays in seconds."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(num_events):
        user, item, at = (
            f"u{rng.integers(num_users)}",
            f"i{rng.integers(num_items)}",
            1_600_000_000 + int(rng.integers(days * 24)) * HOUR,
        )
        rows.append((user, item, at, "click"))
        if rng.random() < 0.5:
            rows.append((user, item, at + int(rng.choice(delays)), "purchase"))
    return pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "action"], orient="row")


CONFIG = """
[data]
target_actions = ["click"]
[surface]
k = 3
combine = "product"
task_weights = {click = 1.0, purchase = 1.0}
[learning]
tasks = ["click", "purchase"]
chained = true
task_hours = 100.0
[learning.feedback]
rule = "defuse"
observation_hours = 1.0
auxiliary_epochs = 2
[trainer]
epochs = 2
batch_size = 32
[stages.retrieval]
systems = ["popularity"]
keep = 12
[stages.ranking]
systems = ["shared-bottom"]
[systems.shared-bottom]
widths = [8]
tower_widths = []
"""


@pytest.fixture(scope="module")
def dataset():
    return build_dataset(read(clicks_and_purchases()), DataConfig(target_actions=("click",), repeats="yes"))


def learning_of(rule: str, **given) -> Learning:
    feedback = FeedbackChoice(rule=rule, **given)
    return Learning(tasks=TASKS, task_hours=100.0, chained=True, feedback=feedback)


def rows_of(requests, seed=0):
    rng = np.random.default_rng(seed)
    return Jagged.from_rows([(rng.permutation(15)[:10] + 1).tolist() for _ in range(len(requests))])


def lessons_of(dataset, learning) -> Lessons:
    requests = dataset.split.fit
    rows = rows_of(requests)
    labels = ActionLabels(dataset, learning, "fit", "purchase")(requests, rows)
    total = len(rows.values)
    pair = {"number": torch.arange(total).float()}
    return Lessons(
        requests=requests, rows=rows, pair=pair, label=labels["click"], worth=torch.zeros(total), labels=labels
    )


def test_delays_against_plain_python(dataset):
    requests = dataset.split.fit
    rows = rows_of(requests)
    told = ActionLabels(dataset, learning_of("fnw"), "fit", "purchase")(requests, rows)
    plain = ActionLabels(dataset, learning_of("fnw"), "fit")(requests, rows)
    assert list(plain) == ["click", "purchase"]
    for task in TASKS:
        np.testing.assert_array_equal(told[task], plain[task])
    h, number = dataset.histories, dataset.space.actions.index("purchase") + 1
    at = 0
    for r in range(len(requests)):
        waited = {}
        for e in range(requests.end[r], h.offsets[requests.user[r] + 1]):
            d = int(h.time[e] - requests.time[r])
            if h.action[e] == number and d <= 100 * HOUR and dataset.plan.window_of_event[e] <= WINDOW_NUMBER["fit"]:
                waited.setdefault(int(h.item[e]), d)
        soon = {
            int(h.item[e])
            for e in range(requests.end[r], h.offsets[requests.user[r] + 1])
            if h.action[e] != number
            and h.time[e] <= requests.time[r] + HOUR
            and dataset.plan.window_of_event[e] <= WINDOW_NUMBER["fit"]
        }
        for row in rows.values[rows.offsets[r] : rows.offsets[r + 1]].tolist():
            np.testing.assert_equal(told[DELAY][at].item(), float(waited.get(row, np.nan)))
            assert told["click"][at] == (row in soon)
            at += 1
    clicked = told["click"] == 1
    assert (told[DELAY][clicked].isnan() == (told["purchase"][clicked] == 0)).all()
    assert told[DELAY].nan_to_num().max() > 80 * HOUR


@pytest.mark.parametrize("rule", ["vanilla", "fnw", "fsiw", "es-dfm", "defer", "defuse"])
def test_samples_against_plain_python(dataset, rule):
    """Of every candidate what the rule's stream has emitted by the end of the window, and what stands in for the rest."""
    learning = learning_of(rule)
    lessons = lessons_of(dataset, learning)
    made = delayed_lessons(lessons, dataset, learning, make_feedback(learning.feedback))
    now = dataset.plan.now["valid"] - 1
    found = {}
    new, at = made.lessons, 0
    for r in range(len(new.requests)):
        for _ in range(int(new.rows.lengths[r])):
            number = int(new.pair["number"][at])
            label, sample = new.labels["purchase"][at].item(), int(made.sample[at])
            kind = -1 if sample < 0 else int(made.emitted.kind[sample])
            assert np.isnan(label) == (sample < 0)
            assert int(new.rows.values[at]) == int(lessons.rows.values[number])
            assert int(lessons.rows.row_of_value[number]) == r
            found.setdefault(number, []).append((kind, label, new.labels["click"][at].item()))
            at += 1
    assert at == len(new.rows.values)
    for number, copies in found.items():
        assert copies[0][2] == lessons.labels["click"][number].item()
        assert all(np.isnan(click) for _, _, click in copies[1:])
        kinds = [kind for kind, _, _ in copies if kind >= 0]
        clicked, delay = lessons.labels["click"][number] == 1, lessons.labels[DELAY][number].item()
        age = now - int(lessons.requests.time[lessons.rows.row_of_value[number]])
        assert kinds == _plainly(rule, bool(clicked), delay, age)
    assert len(found) == len(lessons.rows.values)
    assert (made.emitted.emitted_at <= now).all()


def _plainly(rule, clicked, delay, age):
    """Kinds of samples of a candidate of that age, in the order of emission."""
    if not clicked or (rule != "fnw" and age < HOUR):
        return []
    bought = not np.isnan(delay)
    if rule == "fnw":
        return [NEGATIVE] + [LATE] * bought
    first = POSITIVE if bought and delay <= HOUR else NEGATIVE
    late = bought and delay > HOUR
    if rule == "vanilla":
        return [first]
    if rule == "fsiw":
        return [LATE if late else first]
    # Of a click whose attribution window is open the copies that may still come stand in for themselves.
    is_open = age < 100 * HOUR + 1
    kinds = [first] + [LATE] * (late or (is_open and first == NEGATIVE))
    if rule == "defer" and not late:
        kinds.append(SETTLED_POSITIVE if first == POSITIVE else SETTLED_NEGATIVE)
    return kinds


def _times_plainly(rule, delay, clicked_at):
    """(emitted at, kind) of what the stream sends of a click, ever."""
    bought = not np.isnan(delay)
    came = clicked_at + int(delay) if bought else None
    if rule == "fnw":
        return [(clicked_at, NEGATIVE)] + [(came, LATE)] * bought
    is_quick = bought and delay <= HOUR
    sent = [(clicked_at + HOUR, POSITIVE if is_quick else NEGATIVE)]
    if bought and not is_quick and rule in ("es-dfm", "defer", "defuse"):
        sent.append((came, LATE))
    elif rule == "defer":
        sent.append((clicked_at + 100 * HOUR + 1, SETTLED_POSITIVE if is_quick else SETTLED_NEGATIVE))
    return sent


@pytest.mark.parametrize("rule", ["vanilla", "fnw", "fsiw", "es-dfm", "defer", "defuse"])
def test_a_ranker_that_goes_on_learns_what_was_sent_since(dataset, rule):
    """Late positives of clicks before that moment are there, their first samples are not; nothing stands in for what may come."""
    learning = learning_of(rule)
    lessons, now = lessons_of(dataset, learning), dataset.plan.now["valid"] - 1
    since = int(np.median(lessons.requests.time))
    made = delayed_lessons(lessons, dataset, learning, make_feedback(learning.feedback), since)
    assert made.num_known == len(made.emitted)
    new = made.lessons
    owner, found = new.rows.row_of_value.tolist(), {}
    for at, number in enumerate(new.pair["number"].long().tolist()):
        copies = found.setdefault(number, [])
        sample, click = int(made.sample[at]), new.labels["click"][at].item()
        np.testing.assert_equal(click, np.nan if copies else lessons.labels["click"][number].item())
        assert np.isnan(new.labels["purchase"][at].item()) == (sample < 0)
        copies.append((int(made.emitted.emitted_at[sample]), int(made.emitted.kind[sample])) if sample >= 0 else None)
        assert owner[at] == int(lessons.rows.row_of_value[number])
    assert len(found) == len(lessons.rows.values)
    late_of_before = 0
    for number, copies in found.items():
        clicked_at = int(lessons.requests.time[lessons.rows.row_of_value[number]])
        sent = []
        if lessons.labels["click"][number] == 1:
            sent = _times_plainly(rule, lessons.labels[DELAY][number].item(), clicked_at)
        assert [copy for copy in copies if copy] == [one for one in sent if since < one[0] <= now]
        late_of_before += clicked_at + HOUR <= since and any(copy and copy[1] == LATE for copy in copies)
    assert (late_of_before > 3) == (rule in ("fnw", "es-dfm", "defer", "defuse"))


def test_nothing_sent_since_is_refused(dataset, tmp_path):
    learning, config = learning_of("defuse"), RunConfig.from_toml(CONFIG)
    system = SharedBottom(SharedBottomConfig(), replace(dataset.space, tasks=TASKS))
    with pytest.raises(DataError, match="too few new events for task 'purchase'"):
        delayed.delayed_source(
            lessons_of(dataset, learning),
            dataset,
            system,
            dataset.view("fit"),
            learning,
            config.trainer,
            folder=tmp_path,
            progress=False,
            since=dataset.plan.now["valid"],
        )


def test_batches_hand_the_task_to_the_rule(dataset, tmp_path):
    """Labels of the late task are gone, a criterion stands for them; its loss is the rule's over the samples of the batch."""
    config = RunConfig.from_toml(CONFIG)
    seen, made = [], build.delayed_source

    def spied(*args, **kwargs):
        seen.append(made(*args, **kwargs))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "delayed_source", spied)
        run = build.train_unsaved(dataset, config, tmp_path / "state", progress=False)
    (source,) = seen
    assert isinstance(source, DelayedSource)
    (system,) = (s for name, s in run.cascade.systems.items() if name == "shared-bottom")
    batch = next(iter(source.batches(0)))
    assert list(batch.labels) == ["click"]
    (criterion,) = batch.criteria
    asked = batch.sample_kind >= 0
    assert torch.equal(asked, ~criterion.seen.label.isnan())
    assert ((batch.emitted_at >= 0) == asked).all()
    with torch.no_grad():
        scores, losses = system.score(batch), system.losses(batch)
    each = source.rule.losses(scores["purchase"][asked][:, None], criterion.seen.select(asked))
    share = criterion.share[asked]
    torch.testing.assert_close(losses["purchase"], (each * share).sum() / share.sum())
    never = criterion.seen.auxiliary["f_rn"][asked]
    waits = share != 1
    assert waits.any()
    torch.testing.assert_close(share[waits], 1 - never[waits])
    assert (criterion.seen.kind[asked][waits] == LATE).all()
    assert set(criterion.seen.auxiliary) == {"f_dp", "f_rn"}
    told = next(s["tasks"] for s in run.metrics["systems"] if s["name"] == "shared-bottom")
    assert told["purchase"]["candidates"] > 0


def test_a_run_is_saved_and_makes_pages(dataset, tmp_path):
    """Also where training was killed twice: in the auxiliary network and in the ranker."""
    config = RunConfig.from_toml(CONFIG)
    whole, left = SharedBottom.losses, [0]

    def losses(self, batch):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("killed")
        return whole(self, batch)

    config = config.override(
        "trainer.checkpoint_seconds=0", "trainer.device=cpu", "trainer.epochs=1", "learning.feedback.auxiliary_epochs=1"
    )
    build.train_cascade(dataset, config, tmp_path / "run", progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SharedBottom, "losses", losses)
        for steps in (2, 4):
            left[0] = steps
            with pytest.raises(RuntimeError, match="killed"):
                build.train_cascade(dataset, config, tmp_path / "other", progress=False)
    build.train_cascade(dataset, config, tmp_path / "other", progress=False)
    one, other = load_run(tmp_path / "run"), load_run(tmp_path / "other")
    assert one.config.learning.feedback == config.learning.feedback
    weights = [run.cascade.systems["shared-bottom"].state_dict() for run in (one, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    page = one.cascade.run(make_batch(dataset, dataset.split.test.select(np.arange(4)), 20))
    assert page.rows.shape == (4, 3)
    assert (page.rows > 0).all()
    assert not [problem for trace in page.traces for problem in trace.problems]


def test_an_update_follows_the_stream_where_the_run_stopped(tmp_path):
    """A purchase of a click before the update, made since, is learned as a late positive, once; what was sent before is not sent again."""
    frame = clicks_and_purchases(3, num_events=900)
    later = 1_600_000_000 + 45 * 24 * HOUR
    events = EventStore(tmp_path / "events.db", sync="normal")
    new = frame.filter(pl.col("timestamp") >= later)
    events.append([Event(user=u, item=i, timestamp=float(t), action=a) for u, i, t, a in new.iter_rows()])
    config = RunConfig.from_toml(CONFIG).override("trainer.epochs=1", "retrieval.keep=15")
    known = build_dataset(read(frame.filter(pl.col("timestamp") < later)), config.data_settings)
    made = []

    def spied(*args, **kwargs):
        made.append(delayed_lessons(*args, **kwargs))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delayed, "delayed_lessons", spied)
        build.train_cascade(known, config, tmp_path / "run", progress=False)
        done = update(tmp_path / "run", events, config=UpdateConfig(margin=1.0), progress=False)
        assert (done.outcome, done.retrained) == ("updated", {})
    events.close()
    first, second = made
    assert first.now < second.now
    assert first.num_known < len(first.emitted)
    assert second.num_known == len(second.emitted)
    assert second.emitted.emitted_at.min() > first.now
    windows = known.plan.now, load_run(tmp_path / "run").dataset.plan.now
    assert windows[1]["fit"] == max(windows[0]["fit"], first.now - 100 * HOUR)

    def purchases(one, start, end):
        """(user, item, time of the purchase, of the request) of late positives emitted in a window, by ids."""
        emitted = one.emitted.select(np.arange(one.num_known)).between(start, end)
        late = emitted.kind == LATE
        click = emitted.click[late]
        asked, item = one.clicks.requests.select(click), one.clicks.candidates.rows.values.numpy()[click]
        data = known if one is first else load_run(tmp_path / "run").dataset
        names = data.user_ids.ids.to_list(), data.item_ids.ids.to_list()
        rows = zip(asked.user, item, emitted.emitted_at[late], asked.time, strict=True)
        return [(names[0][u - 1], names[1][i - 1], int(t), int(asked_at)) for u, i, t, asked_at in rows]

    before, since = purchases(first, 0, first.now + 1), purchases(second, 0, second.now + 1)
    assert len(since) == len(set(since)) > 10
    assert not set(before) & set(since)
    bought = set(frame.filter(pl.col("action") == "purchase").select("user_id", "item_id", "timestamp").iter_rows())
    assert {one[:3] for one in since} <= bought
    assert any(asked_at + HOUR <= first.now < t for _, _, t, asked_at in since)


def test_the_chance_of_a_late_purchase_is_not_too_low(tmp_path):
    """Half of all clicks end in a purchase, three of four after 80 hours, where the fit window has some six days: what rankers say.

    Without a rule what has not come by its end is taken for none, and vanilla loses all that comes after the hour.
    """
    frame = clicks_and_purchases(1, num_events=1_500, num_users=60, num_items=40, days=12, delays=(0, *[80 * HOUR] * 3))
    dataset = build_dataset(read(frame), DataConfig(target_actions=("click",), repeats="yes", fit_share=0.5))
    told, seen = {}, {}
    for rule in ("none", "vanilla", "defuse"):
        config = RunConfig.from_toml(CONFIG).override(
            f"learning.feedback.rule={rule}",
            "retrieval.keep=40",
            "trainer.epochs=6",
            "trainer.lr=0.02",
            "trainer.device=cpu",
            "learning.feedback.auxiliary_epochs=6",
        )
        with pytest.MonkeyPatch.context() as patch:
            for name in ("delayed_source", "candidate_source"):
                made = getattr(build, name)
                patch.setattr(build, name, lambda *a, made=made, **k: seen.update(lessons=a[0]) or made(*a, **k))
            run = build.train_unsaved(dataset, config, tmp_path / rule, progress=False)
        lessons, system = seen["lessons"], run.cascade.systems["shared-bottom"]
        batch = make_batch(dataset, lessons.requests, 20).with_candidates(lessons.rows, lessons.pair)
        known, truth = (
            ActionLabels(dataset, learning_of("defuse"), window)(lessons.requests, lessons.rows)["purchase"]
            for window in ("fit", "test")
        )
        clicked = ~truth.isnan()
        with torch.no_grad():
            told[rule] = system.score(batch)["purchase"].sigmoid()[clicked].mean().item()
    known, truth = known[clicked].mean().item(), truth[clicked].mean().item()
    assert known < truth - 0.12
    assert told["vanilla"] < 0.3, told
    assert told["none"] < (known + truth) / 2, told
    assert abs(told["defuse"] - truth) < 0.5 * (truth - known), told


def test_logged_pages_tell_hours():
    shown = Jagged.from_rows([[3, 1], [7]])
    columns = {
        "click": torch.tensor([1.0, 1, 1]),
        "purchase": torch.tensor([1.0, 0, 1]),
        "hours": torch.tensor([2.5, 9, 0]),
    }
    learning = Learning(tasks=TASKS, candidates="logged", feedback=FeedbackChoice(rule="fnw", delay="hours"))
    rows = Jagged.from_rows([[7], [1, 3]])
    told = ShownLabels(learning, shown, columns, "purchase")(np.array([1, 0]), rows)
    np.testing.assert_array_equal(told[DELAY], [0, np.nan, 9_000])
    assert list(ShownLabels(learning, shown, columns)(np.array([1, 0]), rows)) == ["click", "purchase"]


def test_settings_survive_the_file():
    config = RunConfig.from_toml(CONFIG)
    assert RunConfig.from_toml(config.to_toml()) == config
    assert config.learning.late_task == "purchase"
    assert config.override("learning.feedback.rule=none").learning.late_task == ""


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        (["learning.feedback.rule=defus"], "defuse"),
        (["learning.feedback.rule=dfm"], "streaming trainer alone"),
        (["learning.feedback.rule=label-oracle"], "before they are there"),
        (["learning.feedback.task=buy"], "buy"),
        (["learning.feedback.observation_hours=100.5"], "shorter than"),
        (["surface.objective=value"], "objective"),
        (["learning.chained=false", "learning.num_negatives=4"], "num_negatives"),
        (["learning.candidates=logged"], "delay"),
        (["learning.feedback.settings={posterior='x'}"], "posterior"),
    ],
)
def test_wrong_settings_are_refused(changes, word):
    with pytest.raises(ConfigError, match=word):
        RunConfig.from_toml(CONFIG).override(*changes)


def test_a_log_that_does_not_tell_times_is_refused():
    dataset = build_dataset(read(clicks_and_purchases(num_events=200).drop("timestamp")), DataConfig(repeats="yes"))
    with pytest.raises(ConfigError, match="moments"):
        check_tasks(RunConfig.from_toml(CONFIG), dataset)
