"""Search over a product catalogue: BM25, a sentence encoder, and the two together. Icecat's products, judged for 135 queries.

`shortlist prove search_icecat` (wants SHORTLIST_DATA and `pip install 'shortlist[search]'`); resumes where it was stopped. Without the
encoder its arms are left out, and the verdict says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from shortlist.data.datasets import load
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab
from shortlist.metrics import Interval, bootstrap_interval, paired_difference
from shortlist.store.text_encoder import MiniLM
from shortlist.store.text_index import TextConfig, TextIndex, words_of

Float = NDArray[np.float64]
K = 10
MAX_TOKENS = 24
DEPTH = 500
"""Places down to which judged products are looked for."""
WORDS, MEANING = "BM25", "encoder"
FUSIONS: dict[str, Literal["ranks", "scores"]] = {"fusion of ranks": "ranks", "fusion of scores": "scores"}
BM25 = [
    TextConfig(meaning=0.0, k1=k1, b=b, max_tokens=MAX_TOKENS) for k1, b in product((0.6, 1.2, 2.0), (0.0, 0.4, 0.75))
]
"""Settings of BM25 that are tried on validation queries."""
WEIGHTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Weights of the encoder that are tried on validation queries, of either fusion."""

CLAIM = Claim(
    name="search_icecat",
    systems=(),
    claim="BM25 and a small sentence encoder together find products better than either alone.",
    data="Chorus/Icecat: 19,406 products (title and short description), 3,188 judgments (grades 0-3) of 135 queries, of which the "
    "116 with at least one relevant product are asked. Unjudged products count as irrelevant",
    protocol="Half of the queries choose settings, the other half are asked once; three random halves. BM25: 9 settings of k1 and b. "
    "Fusion: 9 weights of each kind, over the BM25 that was chosen. The encoder (all-MiniLM-L6-v2, as packaged, never trained on this) "
    "has nothing to choose. All arms run the product's index, the spelling of queries corrected in all. NDCG@10 with gains 2^grade - 1; "
    "`judged` is the share of the first ten that somebody judged; `judged only` is NDCG@10 of the judged products in each arm's order. "
    "Intervals are over queries",
    bar="The better fusion on validation has a higher NDCG@10 than BM25 and than the encoder, and the interval of its gain over the better "
    "of the two excludes 0, pooled over the three halves",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """Texts of n items and Q queries with what was judged of them."""

    texts: pl.Series
    queries: Sequence[str]
    grades: Sequence[Mapping[int, int]]
    """By query: grade of each judged catalogue row (from 1)."""


def icecat(root: Path) -> Judged:
    """Products and judgments; queries in order, those without a relevant product left out."""
    folder = root / "search-chorus-icecat"
    products = pl.read_parquet(folder / "products.parquet")
    judgments = pl.read_parquet(folder / "judgments.parquet").select(
        "query", id="docid", grade=pl.col("final_rating").cast(pl.Int64)
    )
    rows = products.select("id", row=pl.int_range(1, pl.len() + 1, dtype=pl.Int64))
    table = judgments.join(rows, on="id").filter(pl.col("grade").max().over("query") > 0).sort("query", "row")
    grouped = table.group_by("query", maintain_order=True).agg("row", "grade")
    texts = products.select(pl.concat_str("title", "short_description", separator=" ", ignore_nulls=True)).to_series()
    grades = [dict(zip(*pair)) for pair in zip(grouped["row"].to_list(), grouped["grade"].to_list())]
    return Judged(texts=texts, queries=grouped["query"].to_list(), grades=grades)


def built_in() -> Judged:
    """For the quick form: items of the built-in shop, two words of a title as query, what has both of them as relevant."""
    items = load("builtin").items
    assert items is not None
    texts = items["title"].drop_nulls().unique(maintain_order=True).head(400)
    words = [set(found) for found in words_of(texts)]
    rng = np.random.default_rng(0)
    wordy = [sorted(found) for found in words if len(found) >= 3]
    pairs = [tuple(rng.choice(wordy[place], 2, replace=False)) for place in rng.permutation(len(wordy))[:24]]
    grades = [{row: 3 for row, found in enumerate(words, start=1) if set(pair) <= found} for pair in pairs]
    return Judged(texts=texts, queries=[" ".join(pair) for pair in pairs], grades=grades)


def run(lab: Lab) -> None:
    """Every arm on the test half of every split, with the settings that were best on the other half."""
    judged = built_in() if lab.quick else icecat(lab.data_root)
    indexes = [TextIndex.build(judged.texts, config) for config in (BM25[:2] if lab.quick else BM25)]
    by_words = [found(index, judged, [index.config])[0] for index in indexes]
    encoder = MiniLM(MAX_TOKENS) if MiniLM.is_installed() else None
    vectors = None if encoder is None else vectors_of(lab.scratch, encoder, judged.texts)
    for seed in lab.seeds:
        valid, test = halves(len(judged.queries), seed)
        at = int(np.argmax([each["ndcg@10"][valid].mean() for each in by_words]))
        arms, best = {WORDS: by_words[at]}, indexes[at]
        chosen = {WORDS: {"cost:k1": best.config.k1, "cost:b": best.config.b}}
        if encoder is not None and vectors is not None:
            index = TextIndex(best.words, best.grams, best.config, vectors=vectors, encoder=encoder)
            arms[MEANING] = found(index, judged, [replace(best.config, meaning=1.0, min_similarity=-1.0)])[0]
            for name, fusion in FUSIONS.items():
                each = found(index, judged, [replace(best.config, meaning=w, fusion=fusion) for w in WEIGHTS])
                scores = [one["ndcg@10"][valid].mean() for one in each]
                at = int(np.argmax(scores))
                arms[name], chosen[name] = each[at], {"cost:weight": WEIGHTS[at], "validation": float(scores[at])}
        for name in arms:
            lab.measure(name, seed, partial(told, name, arms, chosen.get(name, {}), test))


def halves(num_queries: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places of validation and of test queries."""
    order = np.random.default_rng(seed).permutation(num_queries)
    return np.sort(order[: num_queries // 2]), np.sort(order[num_queries // 2 :])


def vectors_of(scratch: Path | None, encoder: MiniLM, texts: pl.Series) -> torch.Tensor:
    """float32 [n + 1, D] of the items; kept in the claim's folder, since they take minutes."""
    path = None if scratch is None else scratch / "vectors.npy"
    if path is not None and path.exists():
        kept = torch.from_numpy(np.load(path, allow_pickle=False))
        if kept.shape == (len(texts) + 1, encoder.dim):
            return kept
    made = torch.cat([torch.zeros(1, encoder.dim), encoder.encode(texts.to_list())])
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, made.numpy(), allow_pickle=False)
    return made


def found(index: TextIndex, judged: Judged, configs: Sequence[TextConfig]) -> list[dict[str, Float]]:
    """By setting, how good what is found is. All settings read the query in the same way: by words, by meaning, or by both."""
    searched = [index.with_config(config) for config in configs]
    pages: list[list[list[int]]] = [[] for _ in configs]
    for text in judged.queries:
        query = searched[0].read(text)
        for page, one in zip(pages, searched):
            page.append(one.best(query, DEPTH).rows.tolist())
    return [quality(judged, page) for page in pages]


def quality(judged: Judged, pages: Sequence[Sequence[int]]) -> dict[str, Float]:
    """[Q] of each measure, from what was found for each query, best first."""
    both = list(zip(pages, judged.grades))
    return {
        "ndcg@10": np.array([ndcg(rows, grades) for rows, grades in both]),
        "judged only": np.array([ndcg([row for row in rows if row in grades], grades) for rows, grades in both]),
        "judged": np.array([sum(row in grades for row in rows[:K]) / K for rows, grades in both]),
    }


def ndcg(rows: Sequence[int], grades: Mapping[int, int]) -> float:
    """Discounted gain of the first ten over that of the best possible ten (Burges et al., ICML 2005: 2^grade - 1)."""
    discount = 1 / np.log2(np.arange(2, K + 2))
    gain = np.zeros(K)
    gain[: len(rows[:K])] = [2.0 ** grades.get(row, 0) - 1 for row in rows[:K]]
    best = np.zeros(K)
    ideal = sorted((2.0**grade - 1 for grade in grades.values()), reverse=True)[:K]
    best[: len(ideal)] = ideal
    return float((gain * discount).sum() / (best * discount).sum())


def told(
    name: str,
    arms: Mapping[str, Mapping[str, Float]],
    chosen: Mapping[str, float],
    test: NDArray[np.int64],
) -> dict[str, float | Interval]:
    """What is recorded of an arm: its measures on the test queries, what a fusion gains over each part, and what was chosen."""
    made: dict[str, float | Interval] = {
        measure: bootstrap_interval(value[test], seed=0) for measure, value in arms[name].items()
    }
    for other in (WORDS, MEANING) if name in FUSIONS else ():
        gain = paired_difference(arms[name]["ndcg@10"][test], arms[other]["ndcg@10"][test], seed=0)
        made[f"over {other}"] = Interval(gain.difference, gain.low, gain.high)
    return made | dict(chosen)


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bar for the fusion that was better on validation queries."""
    shown = "; ".join(
        f"{name} {arm.metrics['ndcg@10'].mean:.4f} (judged only {arm.metrics['judged only'].mean:.4f}, "
        f"judged {arm.metrics['judged'].mean:.2f})"
        for name, arm in arms.items()
    )
    if MEANING not in arms:
        return Judgement(
            "partly", f"The sentence encoder was not installed, so only BM25 was measured. NDCG@10: {shown}."
        )
    best = max(FUSIONS, key=lambda name: arms[name].metrics["validation"].mean)
    fused = arms[best].metrics
    other = max((WORDS, MEANING), key=lambda name: arms[name].metrics["ndcg@10"].mean)
    gain = fused[f"over {other}"]
    above = all(fused["ndcg@10"].mean > arms[name].metrics["ndcg@10"].mean for name in (WORDS, MEANING))
    verdict = "holds" if above and gain.low > 0 else "partly" if above else "fails"
    reason = (
        f"NDCG@10: {shown}. {best} was better on validation and gains {gain.mean:+.4f} ({gain.low:+.4f} to {gain.high:+.4f}) over {other}, "
        f"the better of the two."
    )
    return Judgement(verdict, reason)
