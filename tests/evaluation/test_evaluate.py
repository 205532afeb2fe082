from dataclasses import replace

import numpy as np
import pytest
import torch

from shortlist.data.schema import Sequence
from shortlist.data.splits import DataConfig
from shortlist.errors import ConfigError, DataError
from shortlist.evaluation.evaluate import (
    compare,
    diversity,
    evaluate,
    held_out,
    make_pages,
    over_users,
    pager_of,
    without_seen_targets,
)
from shortlist.evaluation.tables import comparison_markdown, comparison_text, losses_text, slices_text
from shortlist.registry import find
from support import last_baskets, shop_dataset


@pytest.fixture(scope="module")
def dataset():
    return shop_dataset()


@pytest.fixture(scope="module")
def popularity(dataset):
    entry = find("popularity")
    model = entry.cls(entry.config(), dataset.space)
    model.prepare(dataset.view("test"))
    return model.eval()


def truth(batch, requests):
    """Shows exactly what will be chosen, then nothing."""
    rows = torch.zeros(len(requests), 10, dtype=torch.int64)
    for r in range(len(requests)):
        chosen = requests.target[requests.target_offsets[r] : requests.target_offsets[r + 1]][:10]
        rows[r, : len(chosen)] = torch.from_numpy(chosen)
    return rows


def nothing(batch, requests):
    return torch.zeros(len(requests), 10, dtype=torch.int64)


def test_the_truth_scores_one_and_nothing_scores_zero(dataset):
    best, worst = (evaluate(pager, dataset, name="p") for pager in (truth, nothing))
    for metric in ("ndcg@10", "recall@10", "hr@10", "mrr@10", "map@10", "value@10"):
        assert best.metrics[metric].mean == pytest.approx(1.0), metric
        assert worst.metrics[metric].mean == 0.0, metric
    assert worst.metrics["coverage"].mean == 0.0


def test_popularity_agrees_with_counting_by_hand(dataset, popularity):
    report = evaluate(pager_of(popularity, 10), dataset, name="popularity", repeats=True)
    requests = dataset.split.test
    hits = [
        len(
            set(report.rows[r])
            & set(requests.target[requests.target_offsets[r] : requests.target_offsets[r + 1]].tolist())
        )
        > 0
        for r in range(len(requests))
    ]
    assert report.metrics["hr@10"].mean == pytest.approx(np.mean(hits))
    assert report.metrics["hr@10"].low <= np.mean(hits) <= report.metrics["hr@10"].high
    assert report.num_requests == len(requests)


def test_pages_do_not_depend_on_the_chunk(dataset, popularity):
    requests = held_out(dataset, "test")
    pages = [
        make_pages(pager_of(popularity, 5), dataset, requests, repeats=True, chunk=chunk) for chunk in (1, 7, 1000)
    ]
    assert np.array_equal(pages[0], pages[1])
    assert np.array_equal(pages[0], pages[2])


def test_without_repeats_no_page_shows_and_no_target_is_an_item_of_the_history():
    early = shop_dataset(
        config=DataConfig(fit_share=0.7, repeats="yes")
    )  # while people still have something new to find
    entry = find("popularity")
    model = entry.cls(entry.config(), early.space)
    model.prepare(early.view("fit"))
    requests = held_out(early, "fit", repeats=False)
    pages = make_pages(pager_of(model, 5), early, requests, repeats=False)
    for r in range(len(requests)):
        seen = set(early.histories.item[requests.start[r] : requests.end[r]].tolist())
        assert not seen & set(pages[r].tolist())
        assert not seen & set(requests.target[requests.target_offsets[r] : requests.target_offsets[r + 1]].tolist())


def test_seen_targets_are_dropped_with_their_values_and_empty_requests_go():
    histories, requests = last_baskets(num_users=12, seed=3)
    fresh = without_seen_targets(histories, requests)
    kept = {}
    for r in range(len(requests)):
        seen = set(histories.item[requests.start[r] : requests.end[r]].tolist())
        targets = requests.target[requests.target_offsets[r] : requests.target_offsets[r + 1]].tolist()
        left = [t for t in targets if t not in seen]
        if left:
            kept[int(requests.user[r])] = left
    assert {
        int(u): fresh.target[fresh.target_offsets[i] : fresh.target_offsets[i + 1]].tolist()
        for i, u in enumerate(fresh.user)
    } == kept
    assert len(fresh.target_value) == len(fresh.target)


def test_a_sample_is_seeded_and_says_so(dataset):
    one, two = (evaluate(nothing, dataset, name="n", max_requests=5, seed=s) for s in (1, 1))
    assert np.array_equal(one.users, two.users)
    assert "a sample of 5" in one.protocol


def test_an_empty_window_is_an_error(dataset):
    empty = dataset.split.test.select(np.zeros(0, dtype=np.int64))
    with pytest.raises(DataError, match="holds no request"):
        held_out(replace(dataset, split=replace(dataset.split, test=empty)), "test")


def test_a_ranker_alone_makes_no_pages(dataset):
    entry = find("dnn")
    with pytest.raises(ConfigError, match="only a retriever"):
        pager_of(entry.cls(entry.config(entry.tiny), dataset.space), 10)


def test_slices_cover_all_requests(dataset, popularity):
    report = evaluate(pager_of(popularity, 10), dataset, name="popularity")
    assert sum(s["requests"] for s in report.slices.values()) == report.num_requests
    assert "history" in slices_text(report)


def test_comparison_finds_a_real_difference_and_none_between_twins(dataset, popularity, tmp_path):
    reports = [evaluate(p, dataset, name=n) for n, p in (("truth", truth), ("popularity", pager_of(popularity, 10)))]
    twin = replace(reports[0], name="twin")
    comparison = compare([*reports, twin], reference="truth")
    tests = comparison.tests["popularity"]["ndcg@10"]
    assert tests["difference"] == pytest.approx(reports[0].metrics["ndcg@10"].mean - reports[1].metrics["ndcg@10"].mean)
    assert tests["low"] > 0
    assert tests["p_value"] < 0.05
    assert comparison.tests["twin"]["ndcg@10"]["p_value"] == 1.0
    text = comparison_text(comparison)
    (popular,) = [line for line in text.splitlines() if line.startswith("popularity")]
    (same,) = [line for line in text.splitlines() if line.startswith("twin")]
    assert "*" in popular
    assert "*" not in same
    assert "| popularity |" in comparison_markdown(comparison, ["ndcg@10"])
    comparison.save(tmp_path / "c.json")
    assert (tmp_path / "c.json").stat().st_size > 100


def test_reports_of_different_requests_are_not_compared(dataset):
    a = evaluate(nothing, dataset, name="a")
    b = evaluate(nothing, dataset, name="b", max_requests=4)
    with pytest.raises(DataError, match="different requests"):
        compare([a, b])
    with pytest.raises(ConfigError, match="no report is called"):
        compare([a], reference="c")


def test_diversity_by_category_or_by_words(dataset):
    """Items 1..5 are of one cluster in the planted shop; the words of two titles "thing number i" share two of four."""
    row = dataset.item_ids.encode([f"i{i}" for i in (1, 2, 6)])
    alike, mixed = np.array([[row[0], row[1]]]), np.array([[row[0], row[2]]])
    assert diversity(alike, dataset) == {"diversity:cluster": 0.0}
    assert diversity(mixed, dataset) == {"diversity:cluster": 1.0}
    items = dataset.space.items
    words = tuple(f for f in items.fields if isinstance(f, Sequence))
    only_words = replace(dataset, space=replace(dataset.space, items=replace(items, fields=words)))
    column = items.columns[words[0].name]
    a, b = (set(column.select(torch.tensor([r])).values.tolist()) for r in (row[0], row[1]))
    assert diversity(alike, only_words) == {f"diversity:{words[0].name}": pytest.approx(1 - len(a & b) / len(a | b))}
    assert diversity(np.array([[row[0], 0]]), dataset) == {}


def test_losses_read_as_words():
    assert "not let through by ranking" in losses_text({"retrieval": 0.5, "ranking": 0.2, "shown": 0.3})


def test_money_that_few_people_spend_gets_a_point_and_no_interval():
    """With 3 of 40 users paying, one draw in about 20 holds none of them; with 25 of 40 practically none."""
    users, spent = np.arange(40), np.zeros(40)
    spent[:3] = [2.0, 4.0, 6.0]
    few = over_users(spent / 2, spent, users, seed=0)
    assert few.low == few.mean == few.high == 0.5
    nothing = over_users(np.zeros(40), np.zeros(40), users, seed=0)
    assert nothing.low == nothing.mean == nothing.high == 0.0
    spent[:25] = 1.0
    many = over_users(np.where(users % 2 == 0, spent, 0.0), spent, users, seed=0)
    assert many.mean == 13 / 25
    assert many.low < many.mean < many.high
