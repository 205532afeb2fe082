"""An index of item texts: BM25 over their words, and beside it vectors of a sentence encoder.

    index = TextIndex.build(texts, TextConfig())
    index = index.with_vectors(MiniLM())                optional
    index.best(index.read("blutooth speaker"), 100)     rows and scores, best match first

    folder/about.json                                   for which texts and settings it was made
    folder/words.*  grams.*                             BM25 of items by words, and of words by their letters: for spelling
    folder/vectors.npy                                  float32 [n + 1, D], row 0 zero

Arrays are read from the files as they are needed (memory-mapped). A query's word that no item has is read as the nearest one that some
item has, found among the words themselves by BM25 on letters in twos and threes. n items, row 0 = no item; m matches.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from shortlist.data.manifest import read_json
from shortlist.data.vocabulary import Vocabulary
from shortlist.errors import ConfigError, SnapshotError
from shortlist.extras import library
from shortlist.models.base import nearest
from shortlist.store.snapshot import REMEDY, read_snapshot, write_snapshot
from shortlist.store.text_encoder import TEXTS_SORTED, TextEncoder, same_encoder

Int = NDArray[np.int64]
Float = NDArray[np.float32]
FORMAT = 1
RANK_CONSTANT = 60
"""Of reciprocal rank fusion (Cormack, Clarke and Büttcher, SIGIR 2009)."""
SHORTEST_CORRECTED = 4
NEAR_WORDS = 16
"""Words that share most letters in twos and threes with an unknown one and are compared with it letter by letter."""
_BY_LETTER = r"[\p{Han}\p{Hiragana}\p{Katakana}]"
_WORD = rf"{_BY_LETTER}|[[\p{{L}}\p{{M}}\p{{N}}]--{_BY_LETTER}]+"
_ACCENTS = "[\u0300-\u036f]"


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """How item text is searched."""

    meaning: float = 0.3
    """Weight of the sentence encoder beside BM25: 0 = words alone, 1 = meaning alone. Without vectors words count alone."""
    fusion: Literal["scores", "ranks"] = "scores"
    """scores: both scores over their best, weighted (Bruch, Gai and Ingber, TOIS 2023); ranks: weighted reciprocal rank fusion."""
    min_similarity: float = 0.3
    """Cosine below which an item that shares no word with the query is no match."""
    correct_spelling: bool = True
    """Read a word that no item has as the nearest one that some item has."""
    min_likeness: float = 0.75
    """How alike such a word must be: twice the letters in common, in order, over the letters of both."""
    k1: float = 1.2
    """BM25: how soon a word said again stops counting."""
    b: float = 0.75
    """BM25: how much longer texts are held down, from 0 to 1."""
    max_words: int = 256
    """Words of an item that are read; bounds the index."""
    max_tokens: int = 64
    """Word pieces of a text that the sentence encoder reads."""

    def __post_init__(self) -> None:
        for name in ("meaning", "min_likeness", "b"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if self.k1 < 0 or not -1 <= self.min_similarity <= 1:
            raise ConfigError(
                f"k1 must be at least 0 and min_similarity from -1 to 1, got {self.k1}, {self.min_similarity}"
            )
        if self.max_words < 1 or self.max_tokens < 3:
            raise ConfigError(
                f"max_words must be at least 1 and max_tokens at least 3, got {self.max_words}, {self.max_tokens}"
            )
        if self.fusion not in ("scores", "ranks"):
            raise ConfigError(f"fusion must be 'scores' or 'ranks', got {self.fusion!r}")

    @property
    def built_in(self) -> dict[str, Any]:
        """What an index is made with; the rest may change without making it again."""
        return {"k1": self.k1, "b": self.b, "max_words": self.max_words}


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """A query as the index understands it."""

    words: tuple[str, ...]
    """Those that some item has, corrections included, as often as the query says them."""
    corrected: Mapping[str, str] = field(default_factory=dict)
    """Words of the query that were read as another one."""
    unknown: tuple[str, ...] = ()
    """Words that no item has and that are like none."""
    score_N: Float
    """[n + 1] BM25 of every item; 0 = it has none of the words."""
    vector_D: Tensor | None = None
    """Of the query as it was typed; None where meaning is not searched."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Matches:
    """What answers a query, best first."""

    rows: Int
    """[m] catalogue rows."""
    scores: Float
    """[m] above 0."""


def words_of(texts: pl.Series) -> pl.Series:
    """The words of each text [n], as a list: lower case, without accents; Chinese and Japanese letter by letter."""
    plain = texts.cast(pl.String).fill_null("").str.normalize("NFKD").str.replace_all(_ACCENTS, "").str.to_lowercase()
    return plain.str.extract_all(_WORD)


def grams_of(word: str) -> list[str]:
    """Letters in twos and threes of a word with its two ends marked."""
    marked = f"^{word}$"
    return [marked[start : start + size] for size in (2, 3) for start in range(len(marked) - size + 1)]


class Bm25:
    """BM25 scores of n texts for every token, made once (Robertson and Zaragoza, 2009, in Lucene's form; the library bm25s).

    A text's score is the sum over the query's tokens of idf x tf / (tf + k1 (1 - b + b length / mean length)),
    idf = ln(1 + (n - df + 0.5) / (df + 0.5)).
    """

    def __init__(self, tokens: Vocabulary, arrays: Mapping[str, NDArray[Any]], num_texts: int) -> None:
        self.tokens, self._arrays, self.num_texts = tokens, arrays, num_texts
        self._model = _bm25s().BM25(method="lucene", dtype="float32")
        self._model.scores = {**arrays, "num_docs": num_texts}
        self._model.nonoccurrence_array = None

    @classmethod
    def build(cls, token_lists: pl.Series, *, k1: float, b: float) -> Bm25:
        """Of the tokens of each text: a column of lists [n]."""
        flat = token_lists.explode().drop_nulls()
        tokens = Vocabulary(flat.unique().sort())
        ids = (tokens.encode(flat) - 1).tolist()
        ends = np.cumsum(token_lists.list.len().to_numpy()).tolist()
        lists = [ids[start:end] for start, end in zip([0, *ends], ends)]
        arrays: dict[str, NDArray[Any]] = {
            "data": np.zeros(0, np.float32),
            "indices": np.zeros(0, np.int32),
            "indptr": np.zeros(1, np.int64),
        }
        if len(tokens):
            model = _bm25s().BM25(method="lucene", k1=k1, b=b, dtype="float32")
            vocabulary = {number: number for number in range(len(tokens))}
            model.index((lists, vocabulary), create_empty_token=False, show_progress=False)
            arrays = {name: model.scores[name] for name in arrays}
        return cls(tokens, arrays, len(token_lists))

    def scores(self, tokens: Sequence[str]) -> Float:
        """float32 [n]; tokens that no text has add nothing."""
        rows = self.tokens.encode(tokens)
        known = (rows[rows > 0] - 1).tolist()
        if not known:
            return np.zeros(self.num_texts, dtype=np.float32)
        made: Float = self._model.get_scores_from_ids(known)
        return made

    def num_with(self, token_row: int) -> int:
        """Texts that have the token at a row (from 1) of the vocabulary."""
        start, end = self._arrays["indptr"][token_row - 1 : token_row + 1]
        return int(end - start)

    def save(self, folder: Path, name: str) -> None:
        """Vocabulary as Parquet, arrays as npy."""
        self.tokens.save(folder / f"{name}.parquet")
        for part, array in self._arrays.items():
            np.save(folder / f"{name}.{part}.npy", array, allow_pickle=False)

    @classmethod
    def load(cls, folder: Path, name: str, num_texts: int) -> Bm25:
        """From files of `save`, arrays memory-mapped; SnapshotError names a missing or damaged one."""
        arrays = {part: load_array(folder / f"{name}.{part}.npy") for part in ("data", "indices", "indptr")}
        return cls(Vocabulary.load(folder / f"{name}.parquet"), arrays, num_texts)


class TextIndex:
    """Item texts, ready to be searched; safe to use from many threads.

    Args:
        words: items by words.
        grams: words by letters in twos and threes, for spelling.
        config: settings.
        vectors: float32 [n + 1, D] by the encoder; row 0 is never found.
        encoder: makes vectors of queries; without it, or without vectors, words are searched alone.
        about: what the index was made for, as it is saved.
    """

    def __init__(
        self,
        words: Bm25,
        grams: Bm25,
        config: TextConfig,
        *,
        vectors: Tensor | None = None,
        encoder: TextEncoder | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.words, self.grams, self.config = words, grams, config
        self.vectors, self.encoder, self.about = vectors, encoder, dict(about or {})

    @classmethod
    def build(cls, texts: pl.Series, config: TextConfig, about: Mapping[str, Any] | None = None) -> TextIndex:
        """Of the texts [n] of catalogue rows 1..n; `about` is kept with it."""
        words = Bm25.build(words_of(texts).list.head(config.max_words), k1=config.k1, b=config.b)
        spelt = [grams_of(word) for word in words.tokens.ids]
        grams = Bm25.build(pl.Series(spelt, dtype=pl.List(pl.String)), k1=config.k1, b=0.75)
        return cls(words, grams, config, about=about)

    @property
    def num_items(self) -> int:
        """n."""
        return self.words.num_texts

    @property
    def by_meaning(self) -> bool:
        """Whether meaning is searched too."""
        return self.vectors is not None and self.encoder is not None and self.config.meaning > 0

    @property
    def systems(self) -> tuple[str, ...]:
        """What searches, by name."""
        return ("bm25", self.encoder.name) if self.by_meaning and self.encoder is not None else ("bm25",)

    def with_vectors(
        self, encoder: TextEncoder, texts: pl.Series, tell: Callable[[int], None] = lambda done: None
    ) -> TextIndex:
        """The same with a vector of each text [n]; `tell` gets the number that is done, now and then."""
        texts = texts.fill_null("")
        vectors = torch.zeros(self.num_items + 1, encoder.dim)
        for start in range(0, self.num_items, TEXTS_SORTED):
            some = texts[start : start + TEXTS_SORTED]
            vectors[start + 1 : start + 1 + len(some)] = encoder.encode(some.to_list())
            tell(start + len(some))
        vectors[1:][torch.from_numpy((texts.str.strip_chars() == "").to_numpy())] = 0  # no text is near nothing
        about = {**self.about, "encoder": encoder.name, "dim": encoder.dim, "max_tokens": self.config.max_tokens}
        return TextIndex(self.words, self.grams, self.config, vectors=vectors, encoder=encoder, about=about)

    def with_config(self, config: TextConfig) -> TextIndex:
        """The same, searched in another way; ConfigError where it would have to be made again."""
        if config.built_in != self.config.built_in:
            raise ConfigError(f"the index was made with {self.config.built_in}; make it again for {config.built_in}")
        return TextIndex(self.words, self.grams, config, vectors=self.vectors, encoder=self.encoder, about=self.about)

    # -- search --------------------------------------------------------------------------------------------------

    def read(self, text: str) -> Query:
        """A query's words, put right, with the score of every item; and its vector."""
        said: list[str] = words_of(pl.Series([text]))[0].to_list()
        words, corrected, unknown = [], {}, []
        for word, row in zip(said, self.words.tokens.encode(said).tolist()):
            other = word if row else self.nearest_word(word)
            if other is None:
                unknown.append(word)
                continue
            words.append(other)
            if other != word:
                corrected[word] = other
        score_N = np.zeros(self.num_items + 1, dtype=np.float32)
        if self.config.meaning < 1 or not self.by_meaning:
            score_N[1:] = self.words.scores(words)
        vector_D = self.encoder.encode([text])[0] if self.by_meaning and self.encoder is not None else None
        return Query(
            words=tuple(words),
            corrected=corrected,
            unknown=tuple(dict.fromkeys(unknown)),
            score_N=score_N,
            vector_D=vector_D,
        )

    def nearest_word(self, word: str) -> str | None:
        """The word of the catalogue that is most like one that it lacks; None where none is like it, or it has a digit."""
        if not self.config.correct_spelling or len(word) < SHORTEST_CORRECTED or any(map(str.isdigit, word)):
            return None
        shared = self.grams.scores(grams_of(word))
        near = np.argsort(-shared, kind="stable")[:NEAR_WORDS]
        ids = self.words.tokens.ids
        best = max(
            ((SequenceMatcher(None, word, ids[place]).ratio(), self.words.num_with(place + 1), -place)
             for place in near[shared[near] > 0].tolist()),
            default=(0.0, 0, 0),
        )  # fmt: skip
        return ids[-best[2]] if best[0] >= self.config.min_likeness else None

    def best(self, query: Query, count: int, allowed: NDArray[np.bool_] | None = None) -> Matches:
        """The best `count` items for a query; fewer where fewer match.

        Args:
            allowed: bool [n + 1], items that may be found; None = all.
        """
        score_N = query.score_N if allowed is None else np.where(allowed, query.score_N, 0)
        by_words = _highest(score_N, count)
        if query.vector_D is None or self.vectors is None:
            return Matches(rows=by_words, scores=_over_best(score_N[by_words]))
        found = nearest(
            query.vector_D[None],
            self.vectors,
            min(count, self.num_items),
            allowed=None if allowed is None else torch.from_numpy(allowed),
        ).best
        rows, cosine = found.rows[0].numpy(), found.scores[0].numpy()
        is_near = (rows > 0) & ((cosine >= self.config.min_similarity) | (score_N[rows] > 0))
        by_meaning = rows[is_near]
        fuse = self._fused_ranks if self.config.fusion == "ranks" else self._fused_scores
        made = fuse(by_words, by_meaning, score_N, query.vector_D)
        order = np.argsort(-made.scores, kind="stable")
        order = order[made.scores[order] > 0][:count]
        return Matches(rows=made.rows[order], scores=made.scores[order])

    def _fused_scores(self, by_words: Int, by_meaning: Int, score_N: Float, vector_D: Tensor) -> Matches:
        """Every item of both lists by both scores, each over the best of them."""
        assert self.vectors is not None
        rows = np.union1d(by_words, by_meaning)
        cosine = (self.vectors[torch.from_numpy(rows)] @ vector_D).clamp(min=0).numpy()
        weight = self.config.meaning
        return Matches(rows=rows, scores=(1 - weight) * _over_best(score_N[rows]) + weight * _over_best(cosine))

    def _fused_ranks(self, by_words: Int, by_meaning: Int, score_N: Float, vector_D: Tensor) -> Matches:
        """Weighted reciprocal rank fusion, over what an item gets that is first in both lists."""
        rows = np.union1d(by_words, by_meaning)
        weight = self.config.meaning
        scores = np.zeros(len(rows), dtype=np.float32)
        for part, listed in ((1 - weight, by_words), (weight, by_meaning)):
            place = np.arange(len(listed), dtype=np.float32)
            scores[np.searchsorted(rows, listed)] += part * (RANK_CONSTANT + 1) / (RANK_CONSTANT + 1 + place)
        return Matches(rows=rows, scores=scores)

    # -- files ---------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write to the place of `folder`, whole or not at all; SnapshotError where something else stands there."""

        def write(beside: Path) -> None:
            self.words.save(beside, "words")
            self.grams.save(beside, "grams")
            if self.vectors is not None:
                np.save(beside / "vectors.npy", self.vectors.numpy(), allow_pickle=False)
            about = {
                "format": FORMAT,
                "num_items": self.num_items,
                "settings": self.config.built_in,
                "has_vectors": self.vectors is not None,
                **self.about,
            }
            (beside / "about.json").write_text(json.dumps(about, indent=1) + "\n")

        write_snapshot(folder, write)

    @classmethod
    def load(cls, folder: Path, config: TextConfig, *, num_items: int) -> TextIndex:
        """From a folder of `save`, without an encoder.

        Raises SnapshotError: missing, damaged, of other settings or another catalogue; names the file.
        """
        read_snapshot(folder)
        about = read_json(folder / "about.json", remedy=REMEDY)
        wanted = {"format": FORMAT, "num_items": num_items, "settings": config.built_in}
        for name, value in wanted.items():
            if about.get(name) != value:
                raise SnapshotError(f"{folder / 'about.json'} says {name} {about.get(name)} where {value} is wanted")
        vectors = torch.from_numpy(load_array(folder / "vectors.npy")) if about["has_vectors"] else None
        words = Bm25.load(folder, "words", num_items)
        own = {name: value for name, value in about.items() if name not in {*wanted, "has_vectors"}}
        return cls(words, Bm25.load(folder, "grams", len(words.tokens)), config, vectors=vectors, about=own)

    def with_encoder(self, encoder: TextEncoder) -> TextIndex:
        """The same with what makes vectors of queries; ConfigError where another encoder made those of the items."""
        if self.vectors is None or not same_encoder(encoder, self.about):
            raise ConfigError(
                f"the vectors of this index are by {self.about.get('encoder', 'no encoder')}, not by {encoder.name}"
            )
        made = self.with_config(self.config)
        made.encoder = encoder
        return made


def _highest(score_N: Float, count: int) -> Int:
    """Rows [<= count] with the highest scores above 0, best first; equals by row."""
    rows = np.flatnonzero(score_N > 0)
    if len(rows) > count:
        least = np.partition(score_N[rows], len(rows) - count)[len(rows) - count]
        rows = rows[score_N[rows] >= least]
    return rows[np.argsort(-score_N[rows], kind="stable")][:count]


def _over_best(scores: Float) -> Float:
    """Scores over the best of them; 0 where there is none above 0."""
    best = scores.max(initial=0.0)
    return scores / best if best > 0 else np.zeros_like(scores)


def load_array(path: Path) -> NDArray[Any]:
    """An npy file, mapped into memory; SnapshotError names one that is missing or damaged."""
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise SnapshotError(f"{path} is missing or damaged ({error}); make the index again") from error
    return array


def _bm25s() -> Any:
    return library("bm25s", extra="search", user="search by words")
