"""The report of a run: whole, honest about its numbers, safe against what stands in the data, and readable without anything else."""

import html
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import polars as pl
import pytest

from shortlist.cascade.build import train_cascade
from shortlist.cascade.config import RunConfig
from shortlist.cascade.run import load_run
from shortlist.data.check import check
from shortlist.data.dataset import build_dataset
from shortlist.data.log import read
from shortlist.errors import DataError
from shortlist.evaluation import report as report_module
from shortlist.evaluation.figures import bars, curve_figure, funnel_figure
from shortlist.evaluation.report import examples, judge, report_training, write_report
from support import shop_frames

EVIL = '<script>alert("x")</script> & $\\frac$'
SETTINGS = """
[surface]
k = 3
[trainer]
epochs = 2
batch_size = 64
[learning]
slices = 1
[stages.retrieval]
systems = ["popularity", "personal-frequency"]
keep = 12
[stages.ranking]
systems = ["dnn"]
keep = 6
[systems.dnn]
dim = 4
widths = [8]
"""
BARE = """
[surface]
k = 1
[stages.retrieval]
systems = ["popularity", "item-knn"]
keep = 8
[stages.ranking]
systems = ["item-knn"]
"""
QUICK = ("popularity", "personal-frequency")
SECTIONS = {
    "The data", "How the log was split", "Settings", "Learning curves", "Validation requests", "Examples", "Surroundings",
    "Quality beside simple systems", "Where held-out items were lost", "What each stage cost", "Quality by length of history",
}  # fmt: skip
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """What a page is made of; unbalanced tags are the test's failure."""

    def __init__(self, content):
        super().__init__()
        self.open, self.tags, self.headings, self.words, self.attributes = [], [], [], [], []
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        assert len(dict(attributes)) == len(attributes), f"an attribute stands twice in <{tag}>"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append(data)

    def values(self, name):
        """Every value of an attribute."""
        return [value for _, key, value in self.attributes if key == name]

    @property
    def text(self):
        return " ".join(self.words)


def train(folder, log, settings):
    config = RunConfig.from_toml(settings)
    return train_cascade(build_dataset(log, config.data_settings), config, folder / "<b>run", progress=False)


@pytest.fixture(scope="module")
def log():
    """The planted shop with titles that would like to be more than text."""
    events, items, users = shop_frames()
    return read(events, items=items.with_columns(title=pl.lit(f"{EVIL} ") + pl.col("title")), users=users)


@pytest.fixture(scope="module")
def run(tmp_path_factory, log):
    return train(tmp_path_factory.mktemp("report"), log, SETTINGS)


@pytest.fixture(scope="module")
def written(run, log):
    """The path of the report that training ends in."""
    return report_training(run, health=check(log).sentences(), command=f"shortlist train '{EVIL}'", seconds=12.34)


@pytest.fixture(scope="module")
def page(written):
    return Page(written.read_text())


@pytest.fixture(scope="module")
def numbers(written):
    return json.loads((written.parent / "report.json").read_text())


def test_every_section_is_there_under_headings_in_order(page):
    assert set(page.headings) >= SECTIONS
    assert page.tags.count("h1") == 1
    levels = [int(tag[1]) for tag in page.tags if re.fullmatch(r"h\d", tag)]
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))
    anchors = {value[1:] for tag, key, value in page.attributes if (tag, key) == ("a", "href")}
    assert anchors <= set(page.values("id"))
    assert len(anchors) >= 7


def test_it_stands_beside_the_run_which_stays_whole(run, written):
    assert written == run.folder.absolute().parent / "<b>run-report" / "report.html"
    assert load_run(run.folder).version == run.version


def test_nothing_is_fetched_and_nothing_runs(written, page):
    content = written.read_text()
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", content)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not [key for _, key, _ in page.attributes if key.startswith("on")]
    assert all(value.startswith("#") for value in [*page.values("href"), *page.values("src")])
    assert "prefers-color-scheme: dark" in content
    assert "width=device-width" in content


def test_text_of_the_data_is_escaped_and_still_readable(written, page):
    assert "<script" not in written.read_text()
    assert "<b>run" not in written.read_text()
    assert EVIL in page.text
    assert "Report of <b>run" in page.headings


def test_ids_are_unique_and_every_figure_is_described(page):
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    figures = page.tags.count("svg")
    assert figures == page.tags.count("figure") == page.tags.count("figcaption") >= 6
    labels = [value for tag, key, value in page.attributes if (tag, key) == ("svg", "aria-label")]
    assert len(labels) == figures
    assert all(re.search(r"\d", label) for label in labels)
    used = [value[1:] for tag, key, value in page.attributes if (tag, key) == ("use", "href")]
    assert used
    assert set(used) <= set(ids)


def test_numbers_of_the_page_are_those_of_the_json(page, numbers, run):
    (judged,) = numbers["judged"]
    comparison = judged["comparisons"][0]
    assert comparison["reports"][0]["name"] == "cascade"
    for report in comparison["reports"]:
        for metric in ("ndcg@3", "recall@3", "hr@3"):
            interval = report["metrics"][metric]
            assert f"{interval['mean']:.4f}" in page.text
            if interval["low"] < interval["high"]:
                assert f"[{interval['low']:.4f}, {interval['high']:.4f}]" in page.text
    for share in judged["cascade"]["lost_at"].values():
        assert f"{share:.1%}" in page.text
    for cost in judged["cascade"]["cost"].values():
        assert f"{cost['ms']:.3f}" in page.text
    for values in judged["cascade"]["slices"].values():
        assert f"{values['ndcg@3']:.4f}" in page.text
    for sentence in (*numbers["health"], *judged["verdicts"]):
        assert sentence.replace("`", "").split("(")[0] in page.text.replace("  ", " ")
    assert numbers["settings"] in page.text
    assert "12.3" in page.text
    # And those of training, which measured the same cascade on the same requests.
    measured = run.metrics["validation"]
    assert judged["cascade"]["metrics"]["ndcg@3"]["mean"] == pytest.approx(measured["ndcg@3"], abs=1e-6)
    assert judged["cascade"]["lost_at"] == pytest.approx(measured["lost_at"])


def test_curves_come_from_training(run, numbers, page):
    (made,) = [s for s in run.metrics["systems"] if s["name"] == "dnn"]
    assert list(numbers["curves"]) == ["dnn"]
    points = numbers["curves"]["dnn"]
    assert [p["epoch"] for p in points] == [1, 2]
    assert points[made["best_epoch"] - 1]["score"] == pytest.approx(made["ndcg"])
    label = next(v for v in page.values("aria-label") if v.startswith("Learning curves of dnn"))
    assert f"from {points[0]['loss']:.4f} to {points[-1]['loss']:.4f} in 2 epochs" in label
    assert load_run(run.folder).metrics["curves"] == run.metrics["curves"]


def test_training_reads_validation_alone(run, monkeypatch, tmp_path):
    asked = []
    evaluate_run = report_module.evaluate_run

    def noted(*arguments, window, **more):
        asked.append(window)
        return evaluate_run(*arguments, window=window, **more)

    monkeypatch.setattr(report_module, "evaluate_run", noted)
    written = report_training(run)
    assert asked == ["valid"]
    assert "The test window was not read" in written.read_text()


def test_examples_are_what_was_known_shown_and_chosen(run):
    judged = judge(run, "valid", names=("popularity",))
    dataset, requests = run.dataset, run.dataset.split.valid
    assert 1 < len(judged.examples) <= 4
    assert len({example.user for example in judged.examples}) == len(judged.examples)
    title_of = dict(enumerate(dataset.titles))
    users = [str(user) for user in dataset.user_ids.decode(requests.user)]
    for example in judged.examples:
        r = next(
            r
            for r, user in enumerate(users)
            if user == example.user and requests.end[r] - requests.start[r] == example.num_past
        )
        past = dataset.histories.item[requests.start[r] : requests.end[r]].tolist()
        target = requests.target[requests.target_offsets[r] : requests.target_offsets[r + 1]].tolist()
        page = judged.cascade.report.rows[r, :3].tolist()
        assert list(example.recent) == [title_of[row] for row in past[::-1][:6]]
        assert [p.title for p in example.page] == [title_of[row] for row in page]
        assert [p.seen for p in example.page] == [row in past for row in page]
        assert [p.chosen for p in example.page] == [row in target for row in page]
        assert sorted(example.chosen) == sorted(title_of[row] for row in target)
    again = examples(dataset, requests, judged.cascade.report)
    assert tuple(again) == judged.examples


def test_baselines_already_counted_give_the_same_numbers(run):
    """The report takes the run's own popularity where it has just been counted; a run read from disk counts anew."""
    here, anew = judge(run, "valid", names=QUICK), judge(load_run(run.folder), "valid", names=QUICK)
    for a, b in zip(here.comparisons[0].reports, anew.comparisons[0].reports):
        assert a.name == b.name
        assert a.metrics == b.metrics


def test_without_time_left_baselines_are_named_and_left_out(run):
    judged = judge(run, "valid", seconds=0.0)
    assert [r.name for r in judged.comparisons[0].reports] == ["cascade"]
    assert judged.verdicts == ()
    assert {"popularity", "ease"} <= set(judged.left_out)
    page = Page(write_report(run, [judged]).read_text())
    assert "Not measured, to save time: popularity" in page.text


def test_a_folder_alone_keeps_what_was_said_of_the_log(run, log, tmp_path):
    loaded = load_run(run.folder)
    judged = [judge(loaded, window, names=("popularity",), max_requests=9) for window in ("valid", "test")]
    write_report(loaded, judged, health=["A log."])
    page = Page(write_report(loaded, judged).read_text())
    assert "A log." in page.text
    assert "Test requests" in page.headings
    assert "was not read" not in page.text
    # Of another version of the run nothing is known.
    numbers = run.folder.with_name("<b>run-report") / "report.json"
    numbers.write_text(numbers.read_text().replace(run.version, "another"))
    assert "The log was not at hand" in Page(write_report(loaded, judged).read_text()).text


def test_a_window_that_can_not_be_judged_is_told_and_stops_nothing(run):
    """Everybody in the planted shop soon knows all items of their cluster, so no new item is left to be held out."""
    with pytest.raises(DataError) as refused:
        judge(run, "valid", surfaces=(False,))
    new_only = replace(run, dataset=replace(run.dataset, repeats=False))
    page = Page(report_training(new_only).read_text())
    assert str(refused.value) in page.text
    assert {"The data", "Settings", "Surroundings"} <= set(page.headings)
    assert "Validation requests" not in page.headings


def test_a_log_of_two_columns_and_a_page_of_one(tmp_path):
    """No times, titles, items table or values; nothing is trained by gradient."""
    events, _, _ = shop_frames()
    bare = read(events.select("user_id", "item_id"))
    run = train(tmp_path, bare, BARE)
    page = Page(report_training(run, health=check(bare).sentences()).read_text())
    assert {"Validation requests", "Examples"} <= set(page.headings)
    assert "Nothing was trained by gradient" in page.text
    assert "ndcg@1" in page.text
    assert "value@1" not in page.text
    assert re.search(r"item i\d+", page.text)
    both = judge(run, "valid", surfaces=(True, False), names=("popularity",))
    assert [("filtered" in c.reports[0].protocol) for c in both.comparisons] == [False, True]
    assert [sentence.partition(":")[0] for sentence in both.verdicts] == list(report_module.SURFACES.values())
    assert Page(write_report(run, [both]).read_text()).text.count("Means of the page metrics") == 2


def test_figures_are_inline_and_take_names_as_they_are():
    names = {"$x$ & <y>": 0.25, "plain": 0.5}
    drawn = bars(names, label="$a$", alt='say "it"', key="one", spans={n: (v / 2, v * 2) for n, v in names.items()})
    assert html.escape("$x$ & <y>", quote=False) in drawn
    assert "$a$" in drawn
    assert drawn.startswith('<svg role="img" aria-label="say &quot;it&quot;" viewBox=')
    assert "xmlns" not in drawn
    assert "#0" not in drawn  # every stand-in colour became the page's
    assert "var(--ink)" in drawn
    assert drawn == bars(
        names, label="$a$", alt='say "it"', key="one", spans={n: (v / 2, v * 2) for n, v in names.items()}
    )
    Page(drawn)


def test_the_funnel_says_what_is_left_after_each_stage():
    drawn = funnel_figure({"retrieval": 0.5, "ranking": 0.2, "shown": 0.3}, "f")
    assert "held out 100.0%, after retrieval 50.0%, after ranking 30.0%" in drawn
    assert drawn.count("30.0%") == 2  # in the description and beside the bar


def test_curves_of_several_phases_with_and_without_scores():
    points = [
        {"phase": phase, "epoch": epoch, "loss": 2.0 - n / 4, "score": score}
        for n, (phase, epoch, score) in enumerate([("a", 1, None), ("b", 1, 0.25), ("b", 2, 0.125)])
    ]
    drawn = curve_figure("x", points, 1, "c")
    assert "2.0000 to 1.5000 in 3 epochs; validation score 0.2500 at 2, 0.1250 at 3" in drawn
    assert "dotted: kept" in drawn
    alone = curve_figure("x", points[:1], None, "c")
    assert "validation" not in alone
    Page(alone)
