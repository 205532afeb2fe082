"""The text index against formulas worked out by hand, and what becomes of odd words, odd files and missing libraries."""

import json
import math
import sys
from collections import Counter

import numpy as np
import polars as pl
import pytest

from shortlist.errors import ConfigError, SnapshotError
from shortlist.store import text_index
from shortlist.store.text_index import Bm25, TextConfig, TextIndex, grams_of, words_of
from text_support import KnownEncoder

pytest.importorskip("bm25s", reason="pip install 'shortlist[search]'")

TEXTS = pl.Series(
    [
        "Red mug",
        "Blue cup with a red handle",
        "Reading lamp",
        "Bluetooth speaker, portable",
        "Café crème",
        "咖啡杯 红色",
        None,
        "Red red red paint",
    ]
)


def index(texts=TEXTS, encoder=None, **settings):
    made = TextIndex.build(texts, TextConfig(**settings))
    return made if encoder is None else made.with_vectors(encoder, texts)


def found(made, text, count=10, allowed=None):
    return made.best(made.read(text), count, allowed)


def bm25_by_hand(lists, query, k1, b):
    """Lucene's BM25, term by term."""
    mean = sum(map(len, lists)) / len(lists)
    scores = []
    for words in lists:
        score = 0.0
        for word in query:
            frequency = sum(word in other for other in lists)
            times = Counter(words)[word]
            weight = math.log(1 + (len(lists) - frequency + 0.5) / (frequency + 0.5))
            score += weight * times / (times + k1 * (1 - b + b * len(words) / mean)) if times else 0.0
        scores.append(score)
    return np.array(scores)


# -- words -----------------------------------------------------------------------------------------------------------


def test_words_are_lower_case_without_accents_and_without_marks():
    given = pl.Series(["Café CRÈME-brûlée 12x", "咖啡 abc", "Привет, мир!", "हिन्दी", "  ", None, "…!?"])
    assert words_of(given).to_list() == [
        ["cafe", "creme", "brulee", "12x"],
        ["咖", "啡", "abc"],
        ["привет", "мир"],
        ["हिन्दी"],
        [],
        [],
        [],
    ]


@pytest.mark.parametrize(("k1", "b"), [(1.2, 0.75), (0.6, 0.0), (2.0, 1.0)])
def test_bm25_is_what_the_formula_says(k1, b):
    rng = np.random.default_rng(0)
    lists = [[f"w{i}" for i in rng.integers(0, 12, rng.integers(0, 9))] for _ in range(30)]
    made = Bm25.build(pl.Series(lists, dtype=pl.List(pl.String)), k1=k1, b=b)
    for query in (["w1"], ["w1", "w2", "w2"], ["w3", "nowhere", "w11"]):
        np.testing.assert_allclose(made.scores(query), bm25_by_hand(lists, query, k1, b), rtol=1e-5, atol=1e-6)
    assert made.scores(["nowhere"]).tolist() == [0.0] * 30
    assert [made.num_with(row) for row in (1, 2)] == [
        sum(made.tokens.ids[i] in words for words in lists) for i in (0, 1)
    ]


def test_the_best_match_comes_first_and_scores_are_over_the_best():
    by_hand = bm25_by_hand(words_of(TEXTS).to_list(), ["red", "mug"], 1.2, 0.75)
    order = [place + 1 for place in np.argsort(-by_hand, kind="stable") if by_hand[place] > 0]
    matches = found(index(), "red mug")
    assert matches.rows.tolist() == order
    np.testing.assert_allclose(matches.scores, by_hand[matches.rows - 1] / by_hand.max(), rtol=1e-5)
    assert found(index(), "red mug", count=2).rows.tolist() == order[:2]


def test_unicode_is_found_as_people_type_it():
    assert found(index(), "cafe creme").rows.tolist() == [5]
    assert found(index(), "CAFÉ").rows.tolist() == [5]
    assert found(index(), "咖啡").rows.tolist() == [6]


def test_only_allowed_items_are_found():
    allowed = np.ones(len(TEXTS) + 1, dtype=bool)
    allowed[[0, 1, 8]] = False
    assert found(index(), "red", allowed=allowed).rows.tolist() == [2]
    vectors = index(encoder=KnownEncoder(), meaning=0.5)
    assert found(vectors, "red mug", allowed=allowed).rows.tolist() == [2]


def test_equal_matches_stand_in_order_of_rows_and_the_cut_keeps_it():
    made = index(pl.Series(["same words"] * 50))
    assert found(made, "same", count=7).rows.tolist() == list(range(1, 8))


# -- spelling --------------------------------------------------------------------------------------------------------


def test_trigrams_mark_both_ends():
    assert grams_of("mug") == ["^mu", "mug", "ug$"]


def test_a_word_that_no_item_has_is_read_as_the_nearest_that_some_item_has():
    query = index().read("blutooth speeker")
    assert query.corrected == {"blutooth": "bluetooth", "speeker": "speaker"}
    assert index().best(query, 3).rows.tolist() == [4]


@pytest.mark.parametrize("word", ["mgu", "blu2tooth", "xylophone", "zzzz"])
def test_short_words_codes_and_words_like_none_are_not_corrected(word):
    query = index().read(word)
    assert query.unknown == (word,)
    assert not query.words
    assert not query.score_N.any()


def test_spelling_can_be_left_as_it_is():
    assert index(correct_spelling=False).read("blutooth").unknown == ("blutooth",)


def test_of_equally_near_words_the_more_frequent_is_taken():
    made = index(pl.Series(["stone", "stove", "stove"]), min_likeness=0.5)
    assert made.read("stoxe").corrected == {"stoxe": "stove"}


# -- meaning ---------------------------------------------------------------------------------------------------------


def test_meaning_finds_what_words_do_not():
    made = index(encoder=KnownEncoder(), meaning=1.0)
    assert made.by_meaning
    assert found(made, "tasse").rows.tolist() == [1, 2]
    assert not len(found(index(encoder=KnownEncoder(), meaning=0.0), "tasse").rows)
    assert not len(found(made, "paint").rows), "a query without meaning is near nothing"


def test_fused_scores_are_the_weighted_sum_of_both_over_their_best():
    made = index(encoder=KnownEncoder(), meaning=0.25)
    words = bm25_by_hand(words_of(TEXTS).to_list(), ["red", "cup"], 1.2, 0.75)
    cosine = (KnownEncoder().encode(TEXTS.fill_null("").to_list()) @ KnownEncoder().encode(["red cup"])[0]).numpy()
    wanted = 0.75 * words / words.max() + 0.25 * cosine / cosine.max()
    matches = found(made, "red cup")
    assert set(matches.rows.tolist()) == {1, 2, 8}
    np.testing.assert_allclose(matches.scores, np.sort(wanted[wanted > 0])[::-1], rtol=1e-5)


def test_fused_ranks_are_reciprocal_rank_fusion():
    texts = pl.Series(["mug lamp", "cup", "red red paint", "red cup lamp book"])
    by_words = found(index(texts), "red cup").rows.tolist()
    assert sorted(by_words) == [2, 3, 4]
    by_meaning = [2, 1, 4, 3]  # cosines 1, 0.71, 0.58 and, for the one that only shares a word, 0
    matches = found(index(texts, KnownEncoder(), meaning=0.25, fusion="ranks"), "red cup")
    wanted = {row: 0.25 * 61 / (61 + place) for place, row in enumerate(by_meaning)}
    for place, row in enumerate(by_words):
        wanted[row] += 0.75 * 61 / (61 + place)
    assert matches.rows.tolist() == sorted(wanted, key=lambda row: -wanted[row])
    np.testing.assert_allclose(matches.scores, sorted(wanted.values(), reverse=True), rtol=1e-5)


def test_what_is_too_far_in_meaning_is_no_match():
    texts = pl.Series(["mug lamp book", "mug"])
    assert found(index(texts, KnownEncoder(), meaning=1.0, min_similarity=0.5), "cup").rows.tolist() == [2, 1]
    assert found(index(texts, KnownEncoder(), meaning=1.0, min_similarity=0.6), "cup").rows.tolist() == [2]


# -- files -----------------------------------------------------------------------------------------------------------


def test_an_index_comes_back_from_its_folder_and_finds_the_same(tmp_path):
    made = index(encoder=KnownEncoder(), meaning=0.5)
    made.save(tmp_path / "search")
    back = TextIndex.load(tmp_path / "search", TextConfig(meaning=0.5), num_items=len(TEXTS))
    assert not back.by_meaning, "the encoder is the caller's"
    back = back.with_encoder(KnownEncoder())
    for text in ("red cup", "blutooth", "tasse", "nothing"):
        ours, theirs = found(made, text), found(back, text)
        assert ours.rows.tolist() == theirs.rows.tolist()
        np.testing.assert_allclose(ours.scores, theirs.scores)


def test_files_of_other_settings_or_items_and_damaged_ones_are_refused(tmp_path):
    folder = tmp_path / "search"
    index().save(folder)
    with pytest.raises(SnapshotError, match="num_items 8 where 9 is wanted"):
        TextIndex.load(folder, TextConfig(), num_items=9)
    with pytest.raises(SnapshotError, match="settings"):
        TextIndex.load(folder, TextConfig(k1=2.0), num_items=len(TEXTS))
    (folder / "words.data.npy").write_bytes(b"\x93NUMPY" + b"x" * ((folder / "words.data.npy").stat().st_size - 6))
    with pytest.raises(SnapshotError, match=r"words\.data\.npy is damaged"):
        TextIndex.load(folder, TextConfig(), num_items=len(TEXTS))


def test_vectors_of_another_encoder_are_refused():
    made = index(encoder=KnownEncoder())
    other = KnownEncoder()
    other.name = "other"
    with pytest.raises(ConfigError, match="are by known, not by other"):
        made.with_encoder(other)


def test_nothing_saved_can_run_code(tmp_path):
    index(encoder=KnownEncoder()).save(tmp_path / "search")
    kinds = {path.suffix for path in (tmp_path / "search").iterdir()}
    assert kinds == {".npy", ".parquet", ".json"}
    for path in (tmp_path / "search").glob("*.npy"):
        assert np.load(path, allow_pickle=False).dtype.kind in "fi"
    assert json.loads((tmp_path / "search" / "about.json").read_text())["encoder"] == "known"


def test_a_catalogue_without_any_word_finds_nothing():
    made = index(pl.Series(["", None, "!!"], dtype=pl.String))
    assert not len(found(made, "anything").rows)
    assert made.read("anything").unknown == ("anything",)


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ConfigError, match=r"pip install 'shortlist\[search\]'"):
        text_index.Bm25.build(pl.Series([["a"]]), k1=1.2, b=0.75)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"meaning": 1.5}, "meaning must be from 0 to 1"),
        ({"fusion": "sum"}, "fusion must be"),
        ({"k1": -1.0}, "k1 must be at least 0"),
        ({"max_words": 0}, "max_words must be at least 1"),
    ],
)
def test_settings_are_checked(settings, said):
    with pytest.raises(ConfigError, match=said):
        TextConfig(**settings)
