"""Search in the engine: what is found, in which order, what rules and faults do to it, and where its index lives."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from engine_support import FIRST_ITEM, NUM_ITEMS, RUN, after, break_system, prepared_cascade, raising, shop_dataset
from shortlist.cascade import search
from shortlist.cascade.engine import Engine, EngineConfig
from shortlist.cascade.live import Live
from shortlist.cascade.questions import Question
from shortlist.cascade.request_log import RequestLog
from shortlist.cascade.rules import Pin, Rules
from shortlist.cascade.ruling import Availability
from shortlist.cascade.search import SearchConfig, item_texts, prepare, search_path
from shortlist.data.dataset import build_dataset
from shortlist.data.log import read
from shortlist.errors import ConfigError, DataError
from shortlist.store.text_index import TextConfig, TextIndex
from text_support import KnownEncoder

pytest.importorskip("bm25s", reason="pip install 'shortlist[search]'")

THINGS = ("red mug", "blue cup", "green lamp", "old book")


def named_live(folder=None, version="one", text=RUN):
    """The shop of engine_support with things that have names: item n is THINGS[n % 4], and its number."""
    dataset = shop_dataset()
    numbers = [int(item) - FIRST_ITEM for item in dataset.item_ids.ids]
    named = replace(dataset, titles=["", *(f"{THINGS[n % 4]} {n}" for n in numbers)])
    return Live(named, prepared_cascade(dataset, text), version, folder)


@pytest.fixture(scope="module")
def live():
    torch.set_num_threads(1)
    return named_live()


@pytest.fixture
def make(live):
    def make(**settings):
        return Engine(live, config=EngineConfig(search=SearchConfig(**settings)))

    return make


def ids(answer):
    return [item.item_id for item in answer.items]


def things(number):
    return [n for n in range(FIRST_ITEM, FIRST_ITEM + NUM_ITEMS + 3) if (n - FIRST_ITEM) % 4 == number]


# -- order -----------------------------------------------------------------------------------------------------------


def test_all_that_matches_is_found_and_nothing_else(make):
    answer = make().search("user-3", "mug", 43)
    assert sorted(ids(answer)) == things(0)
    assert answer.note is None
    assert answer.degraded is None
    assert [stage.stage for stage in answer.stages] == ["search", "retrieval", "ranking", "re-ranking", "blend"]


def test_among_equal_matches_the_order_is_the_stages(make, live):
    """All mugs match alike but for their number, so who asks decides; the stages say the same to the same candidates."""
    engine = make()
    for user in ("user-3", "user-17", None):
        wanted = engine.recommend(user, len(things(0)), candidates=things(0), rules=Rules(seen="keep"))
        assert ids(engine.search(user, "mug", 11)) == ids(wanted)
    assert ids(engine.search("user-3", "mug", 11)) != ids(engine.search("user-17", "mug", 11))


def test_the_exact_match_leads_whoever_asks(make):
    for user in ("user-3", "user-17", None):
        assert ids(make().search(user, "mug 8", 3))[0] == FIRST_ITEM + 8


def test_the_blend_is_what_its_formula_says(make):
    """Places of the last stage and matches are in the answer, so the score can be worked out again."""
    answer = make(personal=0.4).search("user-3", "red mug 8 cup", 43)
    last = answer.stages[-2].stage
    by_stage = sorted(answer.items, key=lambda item: -item.scores[last])
    place = {item.item_id: number for number, item in enumerate(by_stage)}
    wanted = [0.6 * item.scores["search"] + 0.4 * (1 - place[item.item_id] / (len(place) - 1)) for item in answer.items]
    assert [item.score for item in answer.items] == pytest.approx(wanted, abs=1e-6)
    assert wanted == sorted(wanted, reverse=True)
    assert max(item.scores["search"] for item in answer.items) == 1.0


def test_at_its_ends_the_blend_is_the_match_or_the_stages(make):
    alone = make(personal=0.0).search("user-3", "red mug 8", 43)
    assert [item.scores["search"] for item in alone.items] == sorted(
        (item.scores["search"] for item in alone.items), reverse=True
    )
    stages = make(personal=1.0)
    wanted = stages.recommend("user-3", 11, candidates=things(0), rules=Rules(seen="keep"))
    assert ids(stages.search("user-3", "red mug 8", 11)) == ids(wanted)


def test_a_longer_page_than_candidates_is_still_full(make):
    assert len(make(num_candidates=3).search(None, "mug", 9).items) == 9
    assert len(make(num_candidates=3).search(None, "mug", 2).items) == 2


# -- queries ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("query", ["", "   ", "\n\t"])
def test_an_empty_query_is_refused_with_a_sentence(make, query):
    with pytest.raises(ConfigError, match="the query is empty; give at least one word"):
        make().search("user-3", query)


def test_a_query_beyond_the_limit_is_refused(make):
    with pytest.raises(ConfigError, match="the query has 11 characters; at most 10 are taken"):
        make(max_query_chars=10).search(None, "a" * 11)


@pytest.mark.parametrize("query", ["xylophone", "?!", "コーヒー", "\x00", "🙂"])
def test_nothing_matches_so_nothing_is_shown_and_the_note_says_so(make, query):
    answer = make().search("user-3", query)
    assert answer.items == ()
    assert "nothing matches the query" in answer.note
    assert answer.degraded is None
    assert answer.chain == "search"


def test_a_typing_error_is_put_right_and_told(make):
    answer = make().search(None, "grean lamp", 43)
    assert set(ids(answer)) == set(things(2))
    assert answer.note == "'grean' was read as 'green'"


def test_pages_without_a_query_have_no_note(make):
    assert make().recommend("user-3").note is None


# -- rules -----------------------------------------------------------------------------------------------------------


def test_rules_act_before_the_match_is_cut_and_are_counted(make):
    """The three best matches are denied: the page holds the next ones, not fewer."""
    engine = make(num_candidates=3, personal=0.0)
    best = ids(engine.search("user-3", "mug", 3))
    answer = engine.search("user-3", "mug", 3, rules=Rules(deny=best))
    assert len(answer.items) == 3
    assert not set(ids(answer)) & set(best)
    assert answer.removed["deny"] == 3
    few = engine.search("user-3", "mug", 3, rules=Rules(allow=[FIRST_ITEM + 4, FIRST_ITEM + 1]))
    assert ids(few) == [FIRST_ITEM + 4]
    assert make().search("user-3", "mug", rules=Rules(allow=[])).items == ()


def test_what_was_seen_is_found_unless_it_is_to_be_dropped(make, live):
    engine = make()
    seen = {item.item_id for item in engine.history("user-3", 100)}
    kept = set(ids(engine.search("user-3", "mug cup lamp book", 43)))
    assert seen <= kept
    dropped = engine.search("user-3", "mug cup lamp book", 43, rules=Rules(seen="drop"))
    assert set(ids(dropped)) == kept - seen
    assert dropped.removed["seen"] == len(seen)


def test_items_that_are_gone_are_not_found():
    live = named_live()
    gone = live.items(things(0)[:4])
    available = torch.ones(live.dataset.num_items + 1, dtype=torch.bool)
    available[torch.from_numpy(gone)] = False
    live.availability = Availability(available=available, num_gone=4)
    assert sorted(ids(Engine(live).search(None, "mug", 43))) == things(0)[4:]


def test_rules_that_lay_out_the_page_act_on_what_was_found(make):
    pinned = make().search("user-3", "mug", 4, rules=Rules(pins=(Pin(item=things(0)[5], position=2),)))
    assert ids(pinned)[1] == things(0)[5]
    assert set(ids(pinned)) <= set(things(0))


def test_a_search_among_candidates(make):
    engine = make()
    answer = engine.answer([Question(user=None, k=10, query="mug", candidates=[FIRST_ITEM, FIRST_ITEM + 1, "zz"])])[0]
    assert ids(answer) == [FIRST_ITEM]
    assert answer.ignored["candidates"] == 1


def test_queries_and_other_questions_are_answered_side_by_side(make):
    engine = make()
    questions = [
        Question(user="user-3", query="mug"),
        Question(user="user-3"),
        Question(user="user-4", query=" "),
        Question(user="user-4", query="lamp"),
    ]
    mug, plain, refused, lamp = engine.answer(questions)
    assert ids(mug) == ids(engine.search("user-3", "mug"))
    assert ids(plain) == ids(engine.recommend("user-3"))
    assert isinstance(refused, ConfigError)
    assert ids(lamp) == ids(engine.search("user-4", "lamp"))


# -- faults ----------------------------------------------------------------------------------------------------------


def test_when_the_stages_fail_the_match_makes_the_page():
    broken = named_live()
    broken.cascade.run = raising
    engine = Engine(broken, config=EngineConfig(search=SearchConfig(personal=0.5)))
    answer = engine.search("user-3", "mug 8", 5)
    assert ids(answer)[0] == FIRST_ITEM + 8
    assert "the cascade failed" in answer.degraded
    seen = {item.item_id for item in engine.history("user-3", 100)}
    assert not seen & set(ids(engine.search("user-3", "mug", 43, rules=Rules(seen="drop"))))


def test_a_broken_stage_is_passed_over_and_said():
    broken = named_live()
    break_system(broken, "mmr", raising)
    answer = Engine(broken).search("user-3", "mug", 5)
    assert len(answer.items) == 5
    assert "re-ranking" in answer.degraded


def test_who_could_not_be_answered_in_time_gets_no_popular_items(make):
    """Not even the index is touched: it may be what takes so long."""
    answer = make().last_resort(Question(user="user-3", query="mug"), "no answer within 5 ms")
    assert answer.items == ()
    assert answer.degraded == "no answer within 5 ms"
    assert make().last_resort(Question(user="user-3"), "late").items


def test_the_request_log_keeps_the_search(live, tmp_path):
    with Engine(live, request_log=RequestLog(tmp_path / "requests.db")) as engine:
        answer = engine.search("user-3", "mug", 4)
        nothing = engine.search("user-3", "xylophone")
    kept = RequestLog(tmp_path / "requests.db")
    assert kept.find(answer.request_id)["page"] == ids(answer)
    assert kept.find(nothing.request_id)["page"] == []
    kept.close()


# -- the index of a run ----------------------------------------------------------------------------------------------


def never(*_, **__):
    raise AssertionError("made again")


def test_the_index_is_kept_beside_the_run_and_used_by_the_next_process(tmp_path, monkeypatch):
    run = tmp_path / "run"
    answer = Engine(named_live(run)).search("user-3", "mug", 5)
    assert (search_path(run) / "words.data.npy").exists()
    monkeypatch.setattr(TextIndex, "build", never)
    assert ids(Engine(named_live(run)).search("user-3", "mug", 5)) == ids(answer)
    # Trained again on the same catalogue: the texts are the same, and so is their index.
    assert ids(Engine(named_live(run, "two")).search("user-3", "mug", 5)) == ids(answer)


def test_an_index_of_other_texts_or_a_damaged_one_is_made_again(tmp_path):
    run = tmp_path / "run"
    Engine(named_live(run)).search(None, "mug")
    other = named_live(run, "two")
    other.dataset = replace(other.dataset, titles=[title.replace("mug", "jar") for title in other.dataset.titles])
    assert len(Engine(other).search(None, "jar", 43).items) == len(things(0))
    assert not Engine(other).search(None, "mug").items or "was read as" in Engine(other).search(None, "mug").note
    (search_path(run) / "words.parquet").write_bytes(b"nothing")
    assert len(Engine(named_live(run, "three")).search(None, "mug", 43).items) == len(things(0))


def test_where_nothing_can_be_written_the_index_lives_in_memory(tmp_path, monkeypatch):
    def refused(path):
        raise PermissionError(13, "read-only", str(path))

    monkeypatch.setattr(search, "_alone", refused)
    assert Engine(named_live(tmp_path / "run")).search(None, "mug").items
    assert not list(tmp_path.iterdir())


def test_vectors_are_made_once_and_find_what_words_do_not(tmp_path, monkeypatch):
    run, said = tmp_path / "run", []
    config = EngineConfig(search=SearchConfig(text=TextConfig(meaning=0.5)))
    assert not Engine(named_live(run), config=config).search(None, "tasse").items
    live = named_live(run)
    prepare(live, config.search.text, encoder=KnownEncoder(), tell=said.append)
    answer = Engine(live, config=config).search(None, "tasse", 43)
    assert sorted(ids(answer)) == sorted(things(0) + things(1))
    assert answer.stages[0].systems == ("bm25", "known")
    assert answer.stages[0].spent_mflop > 0
    assert "vectors: 43 by known" in said[1]
    # Another process has the vectors, and words alone where it has no encoder that made them.
    monkeypatch.setattr(search.MiniLM, "is_installed", lambda: False)
    alone = Engine(named_live(run), config=config).search(None, "mug")
    assert alone.items
    assert "sentence encoder is not installed" in alone.note


def test_without_the_encoder_words_are_made_ready_and_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(search.MiniLM, "is_installed", lambda: False)
    said = []
    index = prepare(named_live(tmp_path / "run"), tell=said.append)
    assert not index.by_meaning
    assert "vectors: none, since the sentence encoder is not installed" in said[1]


def test_a_swap_brings_the_other_runs_texts(live):
    engine = Engine(live)
    assert engine.search(None, "mug").items
    other = named_live()
    other.dataset = replace(other.dataset, titles=[title.replace("mug", "jar") for title in other.dataset.titles])
    engine._live = other
    assert engine.search(None, "jar").items


# -- texts -----------------------------------------------------------------------------------------------------------


def test_an_items_text_is_its_title_its_texts_and_its_names():
    rng = np.random.default_rng(0)
    words = [f"word{i}" for i in range(40)]
    items = pl.DataFrame(
        {
            "item_id": [f"i{n}" for n in range(60)],
            "title": [f"thing {n} of {words[n % 40]}" for n in range(60)],
            "description": [" ".join(rng.choice(words, 6)) for _ in range(60)],
            "brand": [("acme", "Bölt")[n % 2] for n in range(60)],
            "tags": [
                "|".join(rng.choice(["warm", "dry", "soft", "new", "big", "tiny"], 3, replace=False)) for _ in range(60)
            ],
            "store": [n % 5 for n in range(60)],
            "fresh": [n % 2 == 0 for n in range(60)],
            "price": [1.5 * n for n in range(60)],
        }
    )
    events = pl.DataFrame(
        [(f"u{u}", f"i{(u + d) % 60}", 1_700_000_000 + 86_400 * d + 60 * u) for u in range(60) for d in range(24)],
        schema=["user_id", "item_id", "timestamp"],
        orient="row",
    )
    dataset = build_dataset(read(events, items=items))
    texts = dict(zip(dataset.item_ids.ids.to_list(), item_texts(dataset).to_list()))
    for row in items.iter_rows(named=True):
        text = texts[row["item_id"]]
        assert text.startswith(f"{row['title']} {row['description']}")
        assert sorted(text[len(row["title"]) + len(row["description"]) + 1 :].split()) == sorted(
            [row["brand"], *row["tags"].split("|")]
        )


def test_items_without_text_can_not_be_searched():
    dataset = shop_dataset()
    bare = replace(dataset, titles=None, schema=replace(dataset.schema, fields=(), title=None))
    with pytest.raises(DataError, match="have no text to search"):
        Engine(Live(bare, prepared_cascade(dataset), "one")).search(None, "mug")


def test_what_follows_is_known_to_search_too(make):
    """A person without a past still gets the match; one with a past gets what follows first among equals."""
    engine = make(personal=1.0)
    history = engine.history("user-3", 1)[0].item_id
    answer = engine.search("user-3", "mug cup lamp book", 3)
    assert after(history) in ids(answer)
