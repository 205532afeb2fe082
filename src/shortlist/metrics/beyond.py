"""What pages are like besides being right: reach over the catalogue, novelty, concentration, variety inside a page.

All read `rows` [R, K], the recommended item rows with 0 for an empty place, and tables indexed by item row, so a table
has N + 1 rows for items 1..N and its row 0 is never read. Metrics of a page return float64 [R], NaN where the page is
too short to have one; metrics of the whole catalogue return a float.

Shapes: R requests, K places, N items, D vector width, G genres, C requests of one chunk.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from shortlist.errors import DataError
from shortlist.metrics._arrays import Array, Floats, Integers, chunks, finite, integers, positive, to_numpy


def exposure(rows: Array, num_items: int) -> Integers:
    """How often each item was shown, int64 [N]: entry i - 1 is item row i. Raises DataError on a row above N."""
    row_RK = integers("rows", rows, ndim=2)
    positive("num_items", num_items)
    _check_reach(row_RK, num_items + 1, "the catalogue")
    return np.bincount(row_RK.ravel(), minlength=num_items + 1)[1:].astype(np.int64)


def coverage(rows: Array, num_items: int) -> float:
    """Share of the N items that stand on at least one page."""
    return float((exposure(rows, num_items) > 0).mean())


def gini(rows: Array, num_items: int) -> float:
    """Gini coefficient of exposure over all N items, those never shown included.

    0: every item is shown equally often; 1 - 1/N: one item takes every place. Raises DataError if all pages are empty.
    """
    shown_N = np.sort(exposure(rows, num_items)).astype(np.float64)
    if not shown_N.sum() > 0:
        raise DataError("all pages are empty, so exposure has no distribution; give pages with at least one item.")
    rank_N = np.arange(1, num_items + 1)
    return float(((2 * rank_N - num_items - 1) @ shown_N) / (num_items * shown_N.sum()))


def novelty(rows: Array, counts: Array, total: float | None = None) -> Floats:
    """Mean self-information of a page's items, -log2(count / total), in bits; [R], NaN for an empty page.

    `counts` [N + 1]: training events of each item row; `total` is their sum if not given. With the number of users who
    took each item and `total` users, this is the novelty of Zhou et al. (PNAS 2010). An item never seen counts as seen
    once, which keeps it finite and the most novel of all.
    """
    row_RK = integers("rows", rows, ndim=2)
    count_M = finite("counts", counts)
    _check_reach(row_RK, len(count_M), "counts")
    count_M = count_M[1:]
    total = float(count_M.sum()) if total is None else float(total)
    if (count_M < 0).any() or total < max(1.0, count_M.max(initial=0.0)):
        raise DataError(f"counts must be at least 0 and total ({total:g}) at least 1 and the largest count.")
    information_M = np.append(0.0, -np.log2(np.maximum(count_M, 1.0) / total))  # an empty place adds 0
    num_shown_R = (row_RK > 0).sum(1)
    return _ratio_or_nan(information_M[row_RK].sum(1), num_shown_R)


def intra_list_diversity(rows: Array, vectors: Array) -> Floats:
    """Mean of 1 - cosine over the pairs of a page, from item `vectors` [N + 1, D]; [R] in [0, 2], NaN below two items.

    (Ziegler et al., WWW 2005, as a mean.) The sum over pairs follows from the length of the summed unit vectors, so a
    page costs K x D, not K x K x D. A vector of zeros is at distance 1 from all others.
    """
    row_RK = integers("rows", rows, ndim=2)
    vector_MD = _table("vectors", vectors, row_RK)
    similarity_R = np.zeros(len(row_RK))
    for part in chunks(len(row_RK), row_RK.shape[1] * vector_MD.shape[1]):
        vector_CKD = vector_MD[row_RK[part]].astype(np.float64)
        vector_CKD[row_RK[part] == 0] = 0.0
        length_CK1 = np.linalg.norm(vector_CKD, axis=-1, keepdims=True)
        if not np.isfinite(length_CK1).all():
            raise DataError(
                "vectors of recommended items hold NaN or infinity; find the items whose vectors are broken."
            )
        counted_CK1 = length_CK1 > 0
        unit_CKD = np.divide(vector_CKD, length_CK1, out=np.zeros_like(vector_CKD), where=counted_CK1)
        # Twice the sum over pairs = |sum of units|^2 - sum of |unit|^2.
        similarity_R[part] = (unit_CKD.sum(1) ** 2).sum(1) - counted_CK1.sum((1, 2))
    return 1.0 - _ratio_or_nan(similarity_R, _num_ordered_pairs(row_RK))


def category_diversity(rows: Array, codes: Array) -> Floats:
    """Share of a page's pairs whose categories differ, from `codes` integers [N + 1]; [R], NaN below two items.

    Codes are compared as they are: two items of unknown category (0) count as alike.
    """
    row_RK = integers("rows", rows, ndim=2)
    code_M = integers("codes", codes, ndim=1)
    _check_reach(row_RK, len(code_M), "codes")
    # Sorted codes of a page make runs; empty places get codes of their own (-1, -2, ...), so they are alike with none.
    own_K = -1 - np.arange(row_RK.shape[1], dtype=np.int64)
    code_RK = np.sort(np.where(row_RK > 0, code_M[row_RK], own_K), axis=1)
    start_RK = np.ones(code_RK.shape, dtype=bool)
    start_RK[:, 1:] = code_RK[:, 1:] != code_RK[:, :-1]
    place_K = np.arange(code_RK.shape[1])
    # A place finds (its distance from the start of its run) equals before it.
    alike_R = (place_K - np.maximum.accumulate(np.where(start_RK, place_K, 0), axis=1)).sum(1)
    return 1.0 - _ratio_or_nan(2.0 * alike_R, _num_ordered_pairs(row_RK))


def genre_diversity(rows: Array, genres: Array) -> Floats:
    """Mean Jaccard distance over the pairs of a page, from multi-hot `genres` [N + 1, G]; [R], NaN below two items.

    1 - (genres shared / genres of either). Items without any genre are alike among themselves and unlike the others.
    """
    row_RK = integers("rows", rows, ndim=2)
    genre_MG = _table("genres", genres, row_RK)
    if not np.isin(genre_MG[1:], (0, 1)).all():
        raise DataError("genres must be multi-hot (0 and 1 only); give one column per genre.")
    distance_R = np.zeros(len(row_RK))
    num_places = row_RK.shape[1]
    for part in chunks(len(row_RK), num_places * max(genre_MG.shape[1], num_places)):
        genre_CKG = genre_MG[row_RK[part]].astype(np.float64)
        shared_CKK = genre_CKG @ genre_CKG.transpose(0, 2, 1)
        size_CK = genre_CKG.sum(-1)
        either_CKK = size_CK[:, :, None] + size_CK[:, None, :] - shared_CKK
        distance_CKK = 1.0 - np.divide(shared_CKK, either_CKK, out=np.ones_like(shared_CKK), where=either_CKK > 0)
        real_CK = row_RK[part] > 0
        distance_CKK *= real_CK[:, :, None] & real_CK[:, None, :]
        # An item is at distance 0 from itself, so the diagonal adds nothing.
        distance_R[part] = distance_CKK.sum((1, 2))
    return _ratio_or_nan(distance_R, _num_ordered_pairs(row_RK))


def _table(name: str, values: Array, row_RK: Integers) -> NDArray[Any]:
    """A table of numbers that all rows can read, in the dtype it came in. Raises DataError otherwise."""
    table = to_numpy(values)
    if table.ndim != 2 or table.dtype.kind not in "biuf":
        raise DataError(f"{name} must be numbers [items + 1, columns], got shape {table.shape} of {table.dtype}.")
    _check_reach(row_RK, len(table), name)
    return table


def _check_reach(row_RK: Integers, num_rows: int, name: str) -> None:
    """Raise DataError where a recommended row lies outside a table of `num_rows` rows (row 0 included)."""
    if (largest := int(row_RK.max(initial=0))) >= num_rows:
        raise DataError(
            f"rows hold item row {largest}, but {name} ends at row {num_rows - 1}; use the catalogue's own rows."
        )


def _num_ordered_pairs(row_RK: Integers) -> Integers:
    """n (n - 1) for the n items of each page; [R]."""
    num_shown_R = (row_RK > 0).sum(1)
    return num_shown_R * (num_shown_R - 1)


def _ratio_or_nan(numerator_R: Floats, denominator_R: Integers) -> Floats:
    """numerator / denominator, NaN where the denominator is 0; float64 [R]."""
    out_R = np.full(len(denominator_R), np.nan)
    return np.divide(numerator_R, denominator_R, out=out_R, where=denominator_R > 0)
