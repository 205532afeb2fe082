"""Search: items whose text matches what somebody typed, in an order that also knows who is asking.

    text       BM25 over titles and fields, beside it the sentence encoder where vectors were made      store/text_index.py
    stages     the run's own stages order what was found, as if the caller had brought the candidates
    blend      score = (1 - personal) x match / best match + personal x (1 - place / last place)

Rankers are trained on clicks and know no query, so the match leads and the stages decide among what matches about equally. Words are
indexed when the first query comes; vectors take longer and are made by `shortlist search RUN`. Both stand in RUN.search beside the run.
n items, m matches, k items of a page.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from shortlist.cascade.cascade import Page, StageTrace
from shortlist.cascade.knowing import Known, rulings_of
from shortlist.data.dataset import Dataset
from shortlist.data.fields import WORDS, FittedField
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Column
from shortlist.errors import ConfigError, DataError, SnapshotError
from shortlist.store.text_encoder import MiniLM, TextEncoder
from shortlist.store.text_index import Int, Matches, Query, TextConfig, TextIndex

if TYPE_CHECKING:
    from shortlist.cascade.live import Live
    from shortlist.cascade.questions import Asked

LOG = logging.getLogger(__name__)
SEARCH, BLEND = "search", "blend"
"""Names of the first and the last stage of an answer to a query; the first is also the chain of one that nothing matches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """How queries are answered."""

    num_candidates: int = 100
    """Best matches that the stages order; at least a page."""
    personal: float = 0.2
    """Weight of the stages' order beside the match: 0 = the match alone, 1 = their order of what matches."""
    max_query_chars: int = 1_000
    """Longest query."""
    text: TextConfig = field(default_factory=TextConfig)
    """How item text is matched."""

    def __post_init__(self) -> None:
        if not 0 <= self.personal <= 1:
            raise ConfigError(f"personal must be from 0 to 1, got {self.personal}")
        for name in ("num_candidates", "max_query_chars"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What matches the query of one request."""

    rows: Tensor
    """int64 [m] catalogue rows that its rules permit, best match first."""
    match: Tensor
    """float32 [m] from 1, the best one, down."""
    personal: float
    """As in SearchConfig."""
    systems: tuple[str, ...]
    num_items: int
    spent_ms: float
    flops: float

    def page(self, made: Page | None, k: int, excluded: Jagged | None = None) -> Page:
        """The page of k items.

        Args:
            made: by the stages, of all m matches: their order counts, and what they left out stays out. None = they made none.
            excluded: what the user must not see, where the stages made no page.
        """
        began = time.perf_counter()
        rows, scores = self.rows, self.match
        if made is not None:
            rows, scores = self._blended(made.rows[0].cpu())
        elif excluded is not None:
            kept = ~torch.isin(rows, excluded.values.cpu())
            rows, scores = rows[kept], scores[kept]
        order = scores.argsort(descending=True, stable=True)
        rows, scores = rows[order], scores[order]
        empty = max(k - len(rows), 0)
        blended = self._trace(BLEND, (), rows, scores, len(self.rows), (time.perf_counter() - began) * 1e3, 0.0)
        searched = self._trace(SEARCH, self.systems, self.rows, self.match, self.num_items, self.spent_ms, self.flops)
        return Page(
            rows=torch.nn.functional.pad(rows[:k], (0, empty))[None],
            scores=torch.nn.functional.pad(scores[:k], (0, empty), value=-torch.inf)[None],
            traces=(searched, *(() if made is None else made.traces), blended),
            chain=SEARCH if made is None else made.chain,
        )

    def _blended(self, made_m: Tensor) -> tuple[Tensor, Tensor]:
        """Rows that the stages kept, in order of match, and their blended scores."""
        made_m = made_m[made_m > 0]
        # Row by row the place that the stages gave it; what they left out is at the end.
        place_N = torch.full((self.num_items + 1,), -1, dtype=torch.int64)
        place_N[made_m] = torch.arange(len(made_m))
        kept = place_N[self.rows] >= 0
        rows, match = self.rows[kept], self.match[kept]
        share = 1 - place_N[rows] / max(len(made_m) - 1, 1)
        return rows, (1 - self.personal) * match + self.personal * share.float()

    def _trace(
        self, name: str, systems: tuple[str, ...], rows: Tensor, scores: Tensor, received: int, ms: float, flops: float
    ) -> StageTrace:
        return StageTrace(
            name=name,
            systems=systems,
            rows=Jagged(rows, torch.tensor([0, len(rows)])),
            scores=scores,
            system_scores={},
            num_received=torch.tensor([received]),
            spent_ms=ms,
            flops=flops,
        )


def find(live: Live, asked: Asked, config: SearchConfig) -> Asked:
    """The question with the items that match its query as candidates.

    Its rules count what they took of the best matches. Items already seen may be found unless the rules drop them: who searches for a
    thing they know wants to find it.

    Raises:
        ConfigError: the query is empty or too long, or the extra is not installed.
        DataError: the run's items have no text.
    """
    began = time.perf_counter()
    text = check_query(asked.query or "", config)
    index = text_index(live, config.text)
    query = index.read(text)
    count = max(config.num_candidates, asked.k)
    brought = _only(asked.candidates, live.dataset.num_items)
    looked = index.best(query, count, brought)
    permitted = looked
    # What was seen is left to the stages: who asks is not known here.
    ruling = rulings_of(live, asked, Known(batch=None, num_history=[0], moments=[0]))[0]
    if ruling.allowed is not None:
        allowed = ruling.allowed.numpy()
        permitted = index.best(query, count, allowed if brought is None else allowed & brought)
    keeps = asked.rules.seen is None and asked.rules.seen_days is None
    rules = replace(asked.rules, seen="keep") if keeps else asked.rules
    flops = index.encoder.flops(text) if query.vector_D is not None and index.encoder is not None else 0.0
    flops += 2.0 * index.vectors.numel() if query.vector_D is not None and index.vectors is not None else 0.0
    found = Found(
        rows=torch.from_numpy(permitted.rows),
        match=torch.from_numpy(permitted.scores / permitted.scores.max(initial=1e-9)).float(),
        personal=config.personal,
        systems=index.systems,
        num_items=live.dataset.num_items,
        spent_ms=(time.perf_counter() - began) * 1e3,
        flops=flops,
    )
    candidates = np.union1d(looked.rows, permitted.rows)
    return replace(asked, candidates=candidates, found=found, rules=rules, note=told(query, looked, index))


def check_query(text: str, config: SearchConfig) -> str:
    """The query without blanks around it; ConfigError where nothing is left or it is too long."""
    text = text.strip()
    if not text:
        raise ConfigError("the query is empty; give at least one word")
    if len(text) > config.max_query_chars:
        raise ConfigError(f"the query has {len(text):,} characters; at most {config.max_query_chars:,} are taken")
    return text


def told(query: Query, matches: Matches, index: TextIndex) -> str | None:
    """What the caller should know of how the query was read; None when there is nothing to say."""
    notes = [f"{word!r} was read as {other!r}" for word, other in query.corrected.items()]
    if query.unknown:
        notes.append(f"no item's text has {', '.join(map(repr, query.unknown))}")
    if not len(matches.rows):
        notes.append("nothing matches the query")
    if index.vectors is not None and index.encoder is None:
        notes.append(
            "words alone were searched: the sentence encoder is not installed (pip install 'shortlist[search]')"
        )
    return "; ".join(notes) or None


def _only(rows: Int | None, num_items: int) -> NDArray[np.bool_] | None:
    """bool [n + 1]: True at the rows; None for None."""
    if rows is None:
        return None
    mask = np.zeros(num_items + 1, dtype=bool)
    mask[rows] = True
    return mask


# -- the index of a run -----------------------------------------------------------------------------------------------


def search_path(folder: Path) -> Path:
    """Where a run's text index is: beside it and not in it, since a run is replaced as a whole when it is trained again."""
    return folder.with_name(f"{folder.name}.search")


def text_index(live: Live, config: TextConfig) -> TextIndex:
    """The run's index: opened, or made of its words, when it is first asked for; DataError where its items have no text."""
    with live.texts_lock:
        if live.texts is None or live.texts.config.built_in != config.built_in:
            live.texts = _opened(live, config)
        elif live.texts.config != config:
            live.texts = live.texts.with_config(config)
        return live.texts


def prepare(
    live: Live,
    config: TextConfig | None = None,
    *,
    encoder: TextEncoder | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> TextIndex:
    """Make everything that search uses, vectors included where there is an encoder, and keep it beside the run.

    Args:
        encoder: None = the packaged one where it is installed.
        tell: gets a line about each part.

    Raises:
        DataError: the items have no text. ConfigError: the library of BM25 is not installed.
        SnapshotError: the index can not be written where it belongs.
    """
    config = config or TextConfig()
    if encoder is None and MiniLM.is_installed():
        encoder = MiniLM(config.max_tokens)
    index = _built(live, config)
    tell(f"words: {len(index.words.tokens):,} different ones in the texts of {index.num_items:,} items")
    if encoder is None:
        tell("vectors: none, since the sentence encoder is not installed (pip install 'shortlist[search]')")
    else:
        began = time.perf_counter()
        texts = item_texts(live.dataset)
        num_texts = len(texts)
        index = index.with_vectors(
            encoder, texts, lambda done: tell(f"vectors: {done:,} of {num_texts:,}") if done < num_texts else None
        )
        tell(f"vectors: {index.num_items:,} by {encoder.name} in {time.perf_counter() - began:.0f} s")
    if live.folder is not None:
        with _alone(search_path(live.folder)):
            index.save(search_path(live.folder))
        tell(f"written to {search_path(live.folder)}")
    with live.texts_lock:
        live.texts = index
    return index


def _opened(live: Live, config: TextConfig) -> TextIndex:
    """The index beside the run where it is of the run's texts, else a new one of words, which is put there."""
    if live.folder is not None:
        path = search_path(live.folder)
        try:
            with _alone(path):
                index = _read(live, path, config)
                if index is None:
                    index = _built(live, config)
                    index.save(path)
                return index
        except (OSError, SnapshotError) as error:
            LOG.warning("the text index can not be kept and lives as long as this process: %s", error)
    return _built(live, config)


def _built(live: Live, config: TextConfig) -> TextIndex:
    texts = item_texts(live.dataset)
    return TextIndex.build(texts, config, {"version": live.version, "texts": _digest(texts)})


def _read(live: Live, path: Path, config: TextConfig) -> TextIndex | None:
    """The index in a folder; None where there is none, it is damaged, or it is of other texts or settings."""
    try:
        index = TextIndex.load(path, config, num_items=live.dataset.num_items)
    except SnapshotError:
        return None
    # A run that was trained again on the same catalogue has the same texts, and their vectors take long to make.
    if index.about.get("version") != live.version and index.about.get("texts") != _digest(item_texts(live.dataset)):
        return None
    if index.vectors is None or not MiniLM.is_installed():
        return index
    encoder = MiniLM(int(index.about.get("max_tokens", config.max_tokens)))
    return index.with_encoder(encoder) if encoder.name == index.about.get("encoder") else index


def _digest(texts: pl.Series) -> str:
    """Of all texts, in the order of their rows."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Inside the block no other process makes the same index."""
    with path.with_name(f"{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# -- texts of items ---------------------------------------------------------------------------------------------------


def item_texts(dataset: Dataset) -> pl.Series:
    """String [n]: what search reads of catalogue rows 1..n: the title, then texts, then names of categories and tags.

    Numbers and codes are left out: a category whose values are all numbers says nothing that anybody would type.
    Raises DataError where no item has any text.
    """
    parts = [] if dataset.titles is None else [pl.Series(dataset.titles[1:], dtype=pl.String)]
    fields = [f for f in dataset.schema.of("item") if f.column != dataset.schema.title]
    texts = {f.column for f in fields if f.kind == "Text"}
    for f in sorted(fields, key=lambda f: f.kind != "Text"):
        if f.kind == "Text" or (f.kind in ("Categorical", "Sequence") and not (f.split == WORDS and f.column in texts)):
            said = _said(f, dataset.space.items.columns[f.name])
            if said is not None:
                parts.append(said)
    named = pl.DataFrame([part.alias(str(number)) for number, part in enumerate(parts)])
    joined = named.select(text=pl.concat_str(pl.all(), separator=" ", ignore_nulls=True)) if parts else pl.DataFrame()
    if joined.is_empty() or not joined["text"].str.strip_chars().str.len_bytes().sum():
        raise DataError(
            "the items of this run have no text to search; train it with a table of items that has titles (--items)"
        )
    return joined["text"]


def _said(f: FittedField, column: Column) -> pl.Series | None:
    """What a field says of each item [n], null where nothing; None where it has no words at all."""
    if f.kind == "Text":
        assert isinstance(column, Jagged)
        raw, ends = column.values.numpy().tobytes(), column.offsets.tolist()
        texts = [raw[start:end].decode("utf-8", "replace") for start, end in pairwise(ends[1:])]
        return pl.Series(texts, dtype=pl.String)
    if f.vocabulary is None or not len(f.vocabulary):
        return None
    names = f.vocabulary.ids.cast(pl.String)
    if not names.str.to_lowercase().is_in(["true", "false"]).not_().any() or not names.str.contains(r"\p{L}").any():
        return None
    words = pl.concat([pl.Series([None], dtype=pl.String), names])
    if isinstance(column, Tensor):
        return words.gather(column[1:].numpy())
    flat = pl.DataFrame({"row": column.row_of_value.numpy(), "word": words.gather(column.values.numpy())})
    joined = flat.group_by("row").agg(pl.col("word").str.join(" "))
    rows = pl.DataFrame({"row": np.arange(1, column.num_rows, dtype=np.int64)})
    return rows.join(joined, on="row", how="left", maintain_order="left")["word"]
