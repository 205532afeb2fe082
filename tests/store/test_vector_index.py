"""FAISS indexes of item vectors against sorting all products, and their files."""

import sys

import numpy as np
import pytest
import torch

from shortlist.errors import ConfigError, SnapshotError
from shortlist.store.vector_index import IndexConfig, VectorIndex

N, D, B, K = 3000, 16, 40, 20
KINDS = ("flat", "hnsw", "ivf")


@pytest.fixture(scope="module")
def vectors():
    """Items around 30 centres, of different lengths, as trained tables are; row 0 would win every product."""
    rng = np.random.default_rng(0)
    centre = rng.normal(size=(30, D))
    item = centre[rng.integers(30, size=N + 1)] + 0.7 * rng.normal(size=(N + 1, D))
    item *= np.exp(0.3 * rng.normal(size=(N + 1, 1)))
    item[0] = 1e6
    user = centre[rng.integers(30, size=B)] + 0.7 * rng.normal(size=(B, D))
    return torch.from_numpy(user).float(), torch.from_numpy(item).float()


def built(kind, item, **settings):
    return VectorIndex.build(kind, item, IndexConfig(**settings), num_threads=1)


def best_by_hand(user, item, k=K):
    return np.argsort(-(user.double() @ item[1:].double().T).numpy(), axis=1)[:, :k] + 1


def recall(rows, truth):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(rows.tolist(), truth.tolist())])


@pytest.mark.parametrize(("kind", "least"), [("flat", 1.0), ("hnsw", 0.9), ("ivf", 0.9)])
def test_finds_what_sorting_finds_with_the_true_scores(vectors, kind, least):
    user, item = vectors
    found = built(kind, item, effort={"flat": 1, "hnsw": 256, "ivf": 60}[kind]).search(user, K)
    assert recall(found.rows, best_by_hand(user, item)) >= least
    assert found.rows.min() >= 1
    assert torch.allclose(found.scores, (user[:, None] * item[found.rows]).sum(-1), rtol=1e-4, atol=1e-4)
    assert (found.scores.diff(dim=1) <= 0).all()


def test_all_lists_of_ivf_are_an_exact_search(vectors):
    user, item = vectors
    index = built("ivf", item, lists=50)
    index.effort = index.most_effort
    assert index.effort == 50
    assert recall(index.search(user, K).rows, best_by_hand(user, item)) == 1.0


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_more_effort_finds_more_and_costs_more(vectors, kind):
    user, item = vectors
    index, truth, seen = built(kind, item), best_by_hand(user, item), []
    for effort in (1, 8, 64):
        index.effort = effort
        seen.append((recall(index.search(user, K).rows, truth), index.measure_cost(user, K)))
    assert [r for r, _ in seen] == sorted(r for r, _ in seen)
    assert seen[0][0] < seen[-1][0]
    assert seen[0][1] < seen[-1][1] < 2 * N


def test_cost_of_ivf_is_its_centres_and_the_items_of_the_lists_it_reads(vectors):
    user, item = vectors
    index = built("ivf", item, lists=50, effort=50)
    assert index.measure_cost(user, K) == N + 50


@pytest.mark.parametrize("kind", KINDS)
def test_where_fewer_are_found_the_rest_is_empty(kind):
    item = torch.eye(6)
    index = built(kind, item, lists=5, effort=1)
    found = index.search(torch.ones(2, 6), 9)
    assert found.rows.shape == (2, 5)
    assert torch.equal(found.rows == 0, found.scores == -torch.inf)
    assert (found.rows > 0).any(1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_written_and_read_back_it_finds_the_same(vectors, kind, tmp_path):
    user, item = vectors
    index = built(kind, item, effort=7)
    index.save(tmp_path / "inner" / "x.faiss")
    again = VectorIndex.load(tmp_path / "inner" / "x.faiss", kind=kind, num_items=N, dim=D, num_scored=5.0)
    assert (again.kind, again.effort, again.num_items, again.dim) == (kind, index.effort, N, D)
    assert again.num_scored == 5.0
    one, other = index.search(user, K), again.search(user, K)
    assert torch.equal(one.rows, other.rows)
    assert torch.equal(one.scores, other.scores)


def test_built_twice_it_is_the_same_file(vectors, tmp_path):
    _, item = vectors
    for kind in KINDS:
        for name in "ab":
            built(kind, item).save(tmp_path / name)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes(), kind


@pytest.mark.parametrize("damage", ["missing", "cut", "text", "another"])
def test_a_damaged_file_is_refused_by_name(vectors, damage, tmp_path):
    _, item = vectors
    path = tmp_path / "towers.faiss"
    built("ivf", item).save(path)
    match damage:
        case "missing":
            path.unlink()
        case "cut":
            path.write_bytes(path.read_bytes()[:1000])
        case "text":
            path.write_text("no index at all, but long enough to be one")
        case "another":
            built("flat", item).save(path)
    with pytest.raises(SnapshotError, match=r"towers\.faiss"):
        VectorIndex.load(path, kind="ivf", num_items=N, dim=D, num_scored=1.0)


@pytest.mark.parametrize("wrong", [{"num_items": N - 1}, {"dim": D + 1}, {"kind": "hnsw"}, {"kind": "tree"}])
def test_an_index_of_something_else_is_refused(vectors, wrong, tmp_path):
    built("flat", vectors[1]).save(tmp_path / "x.faiss")
    facts = {"kind": "flat", "num_items": N, "dim": D, "num_scored": 1.0} | wrong
    with pytest.raises(SnapshotError, match=r"where a .* index of"):
        VectorIndex.load(tmp_path / "x.faiss", **facts)


def test_vectors_that_are_no_numbers_are_refused(vectors):
    item = vectors[1].clone()
    item[7, 3] = torch.nan
    with pytest.raises(ConfigError, match="NaN or infinite"):
        built("flat", item)


def test_without_the_library_it_says_how_to_install_it(vectors, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"pip install 'shortlist\[ann\]'"):
        built("flat", vectors[1])


def test_searches_run_on_as_many_threads_as_torch(vectors):
    import faiss

    index = built("flat", vectors[1])
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            index.search(vectors[0], K)
            assert faiss.omp_get_max_threads() == count
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "settings", [{"recall": 0.0}, {"recall": 1.5}, {"links": 1}, {"effort": 0}, {"lists": 0}, {"min_items": 0}]
)
def test_settings_out_of_range(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        IndexConfig(**settings)


def test_which_catalogues_get_an_index():
    auto = IndexConfig(min_items=1000)
    assert auto.kind_for(999) is None
    assert auto.kind_for(1000) is not None
    assert IndexConfig(kind="exact").kind_for(10**9) is None
    assert IndexConfig(kind="hnsw").kind_for(1) == "hnsw"
