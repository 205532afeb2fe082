import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from shortlist.cascade.candidates import standardise
from shortlist.cascade.meter import Meter
from shortlist.cascade.watch import MOST_LEFT, LeftBehind, Watch
from shortlist.data.jagged import Jagged
from shortlist.data.pairs import PAIR_FIELDS, pair_fields
from shortlist.errors import ConfigError, DataError
from shortlist.models.base import RETRIEVAL_TASK, Retrieved
from support import NUM_ITEMS, one_request, planted_batch

FUNNEL = """
[surface]
k = 5
[stages.retrieval]
systems = ["tiny-counting", "tiny-closed-form", "tiny-trie"]
keep = 15
[stages.pre-ranking]
systems = ["tiny-two-phases", "tiny-closed-form"]
keep = 10
offers = [{systems = ["tiny-graph"], keep = 8}]
[stages.ranking]
systems = ["tiny-pairs"]
keep = 8
[stages.re-ranking]
systems = ["tiny-reverse"]
"""
CANDIDATE_STAGES = ("pre-ranking", "ranking", "re-ranking")


@pytest.fixture
def cascade(make_cascade):
    return make_cascade(FUNNEL)


@pytest.fixture
def batch():
    return planted_batch()


def rows_of(rows: Jagged) -> list[list[int]]:
    return [rows.values[a:b].tolist() for a, b in zip(rows.offsets.tolist(), rows.offsets[1:].tolist())]


def broken(cascade, name: str, method: str, work) -> None:
    """Put a fault into one system."""
    object.__setattr__(cascade.systems[name], method, work)


def raising(*_):
    raise RuntimeError("out of order")


# -- what the stages do ----------------------------------------------------------------------------------------------


def test_every_stage_is_what_its_systems_say(cascade, batch):
    """The whole funnel again for one request, with plain sorts."""
    page = cascade.run(batch)
    retrieval, pre_ranking, ranking, _ = page.traces
    for request in (0, 23, 59):
        one = one_request(batch, request)
        # Retrieval: reciprocal ranks of three lists.
        fused: dict[int, tuple[float, tuple[int, int]]] = {}
        for number, name in enumerate(cascade.config.stages[0].systems):
            for place, item in enumerate(cascade.systems[name].retrieve(one, 15).rows[0].tolist()):
                weight, first = fused.get(item, (0.0, (99, 99)))
                fused[item] = (weight + 1 / (61 + place), min(first, (place, number)))
        found = sorted(fused, key=lambda i: (-round(fused[i][0], 12), fused[i][1]))[:15]
        assert rows_of(retrieval.rows)[request] == found
        # Pre-ranking: mean of two standardised scores.
        with_found = one.with_candidates(Jagged.from_rows([found]))
        raw = {n: s.score(with_found)[RETRIEVAL_TASK] for n, s in cascade.systems.items() if s.kind == "retriever"}
        means = standardise(with_found.candidate_rows, torch.stack([raw["tiny-two-phases"], raw["tiny-closed-form"]]))[
            0
        ]
        order = means.mean(0).argsort(descending=True, stable=True)[:10]
        kept = [found[i] for i in order]
        assert rows_of(pre_ranking.rows)[request] == kept
        # Ranking: pair fields are the past's and those of every earlier system, made over what was retrieved.
        names = ["tiny-counting", "tiny-closed-form", "tiny-trie", "tiny-two-phases"]
        value, place = standardise(with_found.candidate_rows, torch.stack([raw[n] for n in names]))
        pair = {n: column[order] for n, column in pair_fields(one, with_found.candidate_rows).items()}
        for n, v, p in zip(names, value, place):
            pair |= {f"score_{n}": v[order], f"rank_{n}": p[order]}
        pair |= {"score_tiny-graph": torch.zeros(10), "rank_tiny-graph": torch.zeros(10)}  # an offer that did not act
        score = cascade.systems["tiny-pairs"].score(one.with_candidates(Jagged.from_rows([kept]), pair))["target"]
        best = score.argsort(descending=True, stable=True)[:8]
        assert rows_of(ranking.rows)[request] == [kept[i] for i in best]
        # Re-ranking: the best five, worst first.
        assert page.rows[request].tolist() == [kept[i] for i in best[:5]][::-1]
        torch.testing.assert_close(page.scores[request], score[best[:5]].flip(0), rtol=1e-4, atol=1e-5)


def test_a_request_gets_the_same_page_alone_and_in_a_batch(cascade, batch):
    together = cascade.run(batch)
    for request in (0, 31, 59):
        assert torch.equal(cascade.run(one_request(batch, request)).rows[0], together.rows[request])


def test_given_candidates_reach_a_stage_as_found_ones_do(cascade, batch):
    """The very items that were found, in another order, get the same pair fields; and more of them than a stage keeps all arrive."""
    stage = "pre-ranking"
    found = cascade.until(batch, stage).candidates
    lot = torch.rand(len(found.rows.values), generator=torch.Generator().manual_seed(0))
    order = lot.argsort()
    order = order[found.rows.row_of_value[order].argsort(stable=True)]
    given = cascade.until(batch, stage, candidates=found.rows.with_values(found.rows.values[order])).candidates
    assert torch.equal(given.rows.offsets, found.rows.offsets)
    assert found.pair.keys() == given.pair.keys()
    one, two = (c.rows.row_of_value * 1000 + c.rows.values for c in (found, given))
    for name in found.pair:
        torch.testing.assert_close(given.pair[name][two.argsort()], found.pair[name][one.argsort()])

    every = Jagged.from_rows([list(range(1, NUM_ITEMS + 1 - r % 3)) for r in range(batch.size)])
    assert NUM_ITEMS > 10 + 3  # what pre-ranking keeps
    given = cascade.until(batch, "ranking", candidates=every).candidates
    assert [sorted(rows) for rows in rows_of(given.rows)] == rows_of(every)
    assert all(given.pair[f"score_{name}"].abs().sum() > 0 for name in ("tiny-closed-form", "tiny-two-phases"))


def test_until_gives_what_the_stage_is_served(cascade, batch):
    seen = {}
    ranker = cascade.systems["tiny-pairs"]
    served = ranker.score_candidates
    broken(cascade, "tiny-pairs", "score_candidates", lambda state, c: seen.update(c=c) or served(state, c))
    cascade.run(batch)
    trained = cascade.until(batch, "ranking").candidates
    assert torch.equal(trained.rows.values, seen["c"].rows.values)
    assert list(trained.pair) == [f.name for f in ranker.space.pair_fields] == list(seen["c"].pair)
    assert all(torch.equal(trained.pair[name], seen["c"].pair[name]) for name in trained.pair)
    assert {f.name for f in PAIR_FIELDS} < set(trained.pair)
    with pytest.raises(ConfigError, match="nothing comes before"):
        cascade.until(batch, "retrieval")


def test_a_chain_chooses_its_actions(cascade, batch):
    page = cascade.run(batch, chain="a0-b1-c0-d0")
    assert page.chain == "a0-b1-c0-d0"
    assert page.traces[1].systems == ("tiny-graph",)
    assert page.traces[1].rows.lengths.unique().tolist() == [8]
    with pytest.raises(ConfigError, match="no chain"):
        cascade.run(batch, chain="a0-b7-c0-d0")


def test_a_page_may_be_longer_than_the_stages_keep(cascade, batch):
    page = cascade.run(batch, k=18)
    assert page.rows.shape == (60, 18)
    assert (page.rows > 0).all()
    assert all(len(set(row)) == 18 for row in page.rows.tolist())


def test_a_page_longer_than_the_catalogue_holds_it_all(cascade, batch):
    page = cascade.run(batch, k=NUM_ITEMS + 7)
    assert [sorted(row) for row in page.rows[:, :NUM_ITEMS].tolist()] == [list(range(1, NUM_ITEMS + 1))] * 60
    assert not page.rows[:, NUM_ITEMS:].any()
    assert (page.scores[:, NUM_ITEMS:] == -torch.inf).all()


def test_someone_without_history_gets_a_page(cascade, batch):
    one = one_request(batch, 0)
    nothing = torch.zeros(0, dtype=torch.int64)
    empty = type(one.history)(
        items=Jagged(nothing, torch.zeros(2, dtype=torch.int64)),
        time=nothing,
        action=nothing,
        value=torch.zeros(0),
        group=nothing,
    )
    page = cascade.run(replace(one, user=torch.zeros(1, dtype=torch.int64), history=empty))
    assert (page.rows > 0).all()
    assert not page.traces[0].problems


# -- what must not be shown ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [5, NUM_ITEMS])
def test_excluded_and_denied_items_pass_no_stage(cascade, batch, k):
    batch = replace(batch, excluded=batch.history.items)
    allowed = torch.ones(NUM_ITEMS + 1, dtype=torch.bool)
    allowed[[1, 6, 11, 16]] = False
    page = cascade.run(batch, allowed=allowed, k=k)
    for request, excluded in enumerate(rows_of(batch.excluded)):
        forbidden = {*excluded, 1, 6, 11, 16}
        for trace in page.traces:
            assert not forbidden & set(rows_of(trace.rows)[request])
        shown = set(page.rows[request].tolist()) - {0}
        assert not forbidden & shown
        assert len(shown) == min(k, NUM_ITEMS - len(forbidden))


@pytest.mark.parametrize("name", ["tiny-counting", "tiny-closed-form", "tiny-trie"])
def test_exclusion_holds_for_every_kind_of_retriever_and_for_the_filling(cascade, batch, name):
    batch = replace(batch, excluded=batch.history.items)
    allowed = torch.zeros(NUM_ITEMS + 1, dtype=torch.bool)
    allowed[4:] = True
    for other in {"tiny-counting", "tiny-closed-form", "tiny-trie"} - {name}:
        broken(cascade, other, "score_all" if other != "tiny-trie" else "retrieve", raising)
    page = cascade.run(batch, allowed=allowed, k=12)
    for request, excluded in enumerate(rows_of(batch.excluded)):
        shown = [row for row in page.rows[request].tolist() if row]
        assert not {*excluded, 1, 2, 3} & set(shown)
        assert len(shown) == min(12, len(set(range(4, NUM_ITEMS + 1)) - set(excluded)))


def test_a_wrong_allow_list_is_refused(cascade, batch):
    with pytest.raises(ConfigError, match="21 catalogue rows, got 5"):
        cascade.run(batch, allowed=torch.ones(5, dtype=torch.bool))


# -- candidates from the caller --------------------------------------------------------------------------------------


def test_given_candidates_replace_the_search(cascade, batch):
    rng = np.random.default_rng(0)
    given = [rng.choice(np.arange(NUM_ITEMS + 1), rng.integers(0, 12)).tolist() for _ in range(60)]
    batch = replace(batch, excluded=Jagged.from_rows([[2, 3]] * 60))
    for name in ("tiny-counting", "tiny-closed-form"):
        broken(cascade, name, "retrieve", raising)
    page = cascade.run(batch, candidates=Jagged.from_rows(given), k=6)
    for request, row in enumerate(given):
        fine = set(row) - {0, 2, 3}
        shown = [item for item in page.rows[request].tolist() if item]
        assert set(rows_of(page.traces[0].rows)[request]) == fine
        assert len(shown) == len(set(shown)) == min(6, len(fine))
        assert set(shown) <= fine
    assert page.traces[0].num_received.tolist() == [len(row) for row in given]
    assert not any(trace.problems for trace in page.traces)


def test_all_found_items_given_as_candidates_get_the_same_page(cascade, batch):
    page = cascade.run(batch)
    again = cascade.run(batch, candidates=page.traces[0].rows)
    assert torch.equal(page.rows, again.rows)
    torch.testing.assert_close(page.scores, again.scores)


def test_no_candidates_at_all_give_an_empty_page(cascade, batch):
    page = cascade.run(batch, candidates=Jagged.from_rows([[]] * 60))
    assert not page.rows.any()


# -- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-counting", "tiny-trie"])
def test_a_failed_retriever_is_left_out(cascade, batch, name):
    broken(cascade, name, "score_all" if name == "tiny-counting" else "retrieve", raising)
    page = cascade.run(batch)
    assert (page.rows > 0).all()
    report = page.reports[0]
    assert report[0].degraded == f"{name} failed (RuntimeError: out of order)"
    assert [r.degraded for r in report[1:]] == [None] * 3
    assert name not in page.traces[0].system_scores


def test_without_any_retriever_the_most_popular_stand_in(make_cascade, batch):
    cascade = make_cascade(FUNNEL)
    cascade.popular = torch.arange(NUM_ITEMS, 0, -1)
    for name in ("tiny-counting", "tiny-closed-form"):
        broken(cascade, name, "score_all", raising)
    broken(cascade, "tiny-trie", "retrieve", raising)
    allowed = torch.ones(NUM_ITEMS + 1, dtype=torch.bool)
    allowed[NUM_ITEMS - 1] = False
    page = cascade.run(batch, allowed=allowed)
    expected = [i for i in range(NUM_ITEMS, 0, -1) if i != NUM_ITEMS - 1][:15]
    assert rows_of(page.traces[0].rows) == [expected] * 60
    assert page.reports[7][0].degraded.count("out of order") == 3
    assert (page.rows > 0).all()


@pytest.mark.parametrize("stage", CANDIDATE_STAGES)
def test_a_failed_stage_keeps_the_order_before_it(cascade, batch, stage):
    number = [s.name for s in cascade.config.stages].index(stage)
    for name in cascade.config.stages[number].actions[0].systems:
        broken(cascade, name, "rerank" if stage == "re-ranking" else "score", raising)
        if name == "tiny-closed-form":  # it was scored in retrieval already, so only failing there takes it out
            broken(cascade, name, "score_all", raising)
    page = cascade.run(batch)
    before, after = page.traces[number - 1 : number + 1]
    keep = after.rows.lengths.unique().item()
    assert rows_of(after.rows) == [row[:keep] for row in rows_of(before.rows)]
    assert "failed (RuntimeError: out of order)" in page.reports[3][number].degraded
    assert (page.rows > 0).all()


def test_what_was_scored_before_is_not_scored_again(cascade, batch):
    broken(cascade, "tiny-closed-form", "score", raising)
    assert not any(trace.problems for trace in cascade.run(batch).traces)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scores_that_are_no_numbers_degrade_only_their_requests(cascade, batch, value):
    ranker = cascade.systems["tiny-pairs"]
    served = ranker.score_candidates
    good = cascade.run(batch)

    def sick(state, candidates):
        scores = served(state, candidates)["target"].clone()
        scores[candidates.rows.offsets[4]] = value
        return {"target": scores}

    broken(cascade, "tiny-pairs", "score_candidates", sick)
    page = cascade.run(batch)
    assert [r for r in range(60) if page.reports[r][2].degraded] == [4]
    assert page.reports[4][2].degraded == "tiny-pairs gave scores that are no numbers"
    others = [r for r in range(60) if r != 4]
    assert torch.equal(page.rows[others], good.rows[others])
    assert rows_of(page.traces[2].rows)[4] == rows_of(page.traces[1].rows)[4][:8]


def test_a_retriever_with_nan_is_left_out_for_its_request(cascade, batch):
    counting = cascade.systems["tiny-counting"].score_all

    def sick(batch):
        scores = counting(batch)
        scores[2, 5] = torch.nan
        return scores

    broken(cascade, "tiny-counting", "score_all", sick)
    page = cascade.run(batch)
    assert [r for r in range(60) if page.reports[r][0].degraded] == [2]
    assert (page.rows > 0).all()


def test_a_reranker_that_invents_items_is_passed_over(cascade, batch):
    def inventing(batch, scores, k):
        return Retrieved(torch.full((batch.size, k), 99), torch.zeros(batch.size, k))

    broken(cascade, "tiny-reverse", "rerank", inventing)
    page = cascade.run(batch)
    assert page.reports[0][3].degraded.startswith("tiny-reverse gave items that are no candidates")
    assert page.rows.tolist() == [row[:5] for row in rows_of(page.traces[2].rows)]


def test_a_reranker_that_shows_too_little_is_topped_up_by_the_stage_before(cascade, batch):
    def short(batch, scores, k):
        rows = batch.candidate_rows.padded()[0][:, [2, 1]]
        return Retrieved(rows, torch.ones(rows.shape))

    broken(cascade, "tiny-reverse", "rerank", short)
    page = cascade.run(batch)
    for request, ranked in enumerate(rows_of(page.traces[2].rows)):
        assert page.rows[request].tolist() == [ranked[2], ranked[1], ranked[0], ranked[3], ranked[4]]
        assert page.scores[request].isfinite().tolist() == [True, True, False, False, False]


def test_training_does_not_hide_faults(cascade, batch):
    broken(cascade, "tiny-two-phases", "encode_user", raising)
    with pytest.raises(RuntimeError, match="out of order"):
        cascade.until(batch, "ranking")
    broken(cascade, "tiny-two-phases", "encode_user", lambda b: torch.full((b.size, 8), torch.nan))
    with pytest.raises(DataError, match="tiny-two-phases gave scores that are no numbers, for 60 of 60"):
        cascade.until(batch, "ranking")


def slow(work, seconds: float):
    def later(*arguments):
        time.sleep(seconds)
        return work(*arguments)

    return later


def test_a_late_stage_is_not_waited_for(cascade, batch):
    good = cascade.run(batch, deadline_ms=60_000)
    assert not any(trace.problems for trace in good.traces)
    broken(cascade, "tiny-pairs", "score_candidates", slow(cascade.systems["tiny-pairs"].score_candidates, 3.0))
    started = time.perf_counter()
    page = cascade.run(batch, deadline_ms=700)
    assert time.perf_counter() - started < 2.5
    assert "tiny-pairs was late" in page.reports[0][2].degraded
    assert "tiny-reverse was not started" in page.reports[0][3].degraded
    assert page.rows.tolist() == [row[:5] for row in rows_of(page.traces[1].rows)]
    assert torch.equal(page.traces[1].rows.values, good.traces[1].rows.values)


def test_with_no_time_at_all_there_is_still_a_page(cascade, batch):
    page = cascade.run(batch, deadline_ms=0)
    assert (page.rows > 0).all()
    assert all("was not started" in report.degraded for report in page.reports[0])
    assert page.traces[0].rows.lengths.unique().tolist() == [15]


def test_faults_in_a_thread_are_told_like_others(cascade, batch):
    broken(cascade, "tiny-pairs", "score_candidates", raising)
    assert "failed (RuntimeError" in cascade.run(batch, deadline_ms=60_000).reports[0][2].degraded


# -- accounts --------------------------------------------------------------------------------------------------------


def test_reports_count_candidates_and_state_costs(cascade, batch):
    page = cascade.run(batch)
    assert [(r.num_received, r.num_kept) for r in page.reports[11]] == [(20, 15), (15, 10), (10, 8), (8, 5)]
    assert all(r.spent_ms > 0 for r in page.reports[11])
    events = len(batch.history.items.values) / 60
    closed_form, trie, two = (
        2.0 * round(events) * 20,
        2 * (2.0 * 8 * 30) + 15,
        2.0 * 64 + 8 * round(events) + 2.0 * 8 * 15,
    )
    assert page.reports[0][0].spent_mflop * 1e6 == pytest.approx(20 + closed_form + trie)
    assert page.reports[0][1].spent_mflop * 1e6 == pytest.approx(two)  # the closed form's scores are at hand
    assert page.reports[0][3].spent_mflop * 1e6 == 8


def test_a_meter_adds_up_stages_and_chains(cascade, batch):
    meter = Meter()
    first, second = cascade.run(batch), cascade.run(one_request(batch, 0), chain="a0-b1-c0-d0")
    meter.add(first.chain, first.reports, [1.0] * 60)
    meter.add(second.chain, second.reports)
    meter.credit(second.chain, 2.5)
    summary = meter.summary()
    assert [s.stage for s in summary.stages] == ["retrieval", "pre-ranking", "ranking", "re-ranking"]
    assert summary.num_requests == 61
    assert [(c.chain, c.num_requests, c.value) for c in summary.chains] == [
        ("a0-b0-c0-d0", 60, 60.0),
        ("a0-b1-c0-d0", 1, 2.5),
    ]
    assert summary.stages[1].num_received == 61 * 15
    assert summary.stages[1].num_kept == 60 * 10 + 8
    assert summary.spent_ms == pytest.approx(sum(t.spent_ms for p in (first, second) for t in p.traces))
    assert summary.spent_mflop == pytest.approx(sum(s.spent_mflop for s in summary.stages))
    assert summary.stages[0].mean_ms == pytest.approx(summary.stages[0].spent_ms / 61)
    assert not any(s.num_degraded for s in summary.stages)
    assert meter.reset() == summary
    assert meter.summary().num_requests == 0


def test_a_cascade_needs_all_its_systems(cascade):
    systems = {name: s for name, s in cascade.systems.items() if name != "tiny-graph"}
    with pytest.raises(ConfigError, match="lacks system 'tiny-graph'"):
        type(cascade)(cascade.config, cascade.space, systems)


def test_late_calls_that_still_run_are_counted_and_bound():
    gate, started = threading.Event(), []
    left = LeftBehind()

    def hang():
        started.append(1)
        gate.wait(10)

    for number in range(MOST_LEFT + 3):
        watch = Watch(deadline=time.perf_counter() + 0.005, left=left)
        assert watch.attempt("it", hang) is None
        wanted = "was late" if number < MOST_LEFT else f"{MOST_LEFT} late calls of it still run"
        assert wanted in watch.problems[0].reason
    assert len(started) == MOST_LEFT
    assert Watch(deadline=time.perf_counter() + 5, left=left).attempt("another", lambda: 7) == 7
    gate.set()
    time.sleep(0.05)
    assert Watch(deadline=time.perf_counter() + 5, left=left).attempt("it", lambda: 8) == 8
