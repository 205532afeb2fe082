"""An index in the place of an exact search: nobody sees what is blocked, no page comes short, and recall is what it is said to be."""

import logging

import numpy as np
import pytest
import torch

from shortlist.cascade import indexing
from shortlist.cascade.candidates import Blocked
from shortlist.cascade.indexing import find_nearest, load_indexes, recall_of, save_indexes
from shortlist.data.jagged import Jagged
from shortlist.errors import SnapshotError
from shortlist.models.base import nearest
from shortlist.store.vector_index import IndexConfig, VectorIndex

N, D, B, K = 3000, 12, 24, 15
APPROXIMATE = ("hnsw", "ivf")


@pytest.fixture(scope="module")
def vectors():
    rng = np.random.default_rng(0)
    centre = rng.normal(size=(40, D))
    item = centre[rng.integers(40, size=N + 1)] + 0.7 * rng.normal(size=(N + 1, D))
    user = centre[rng.integers(40, size=B)] + 0.7 * rng.normal(size=(B, D))
    return torch.from_numpy(user).float(), torch.from_numpy(item).float()


@pytest.fixture(scope="module")
def indexes(vectors):
    effort = {"flat": 1, "hnsw": 32, "ivf": 12}
    return {
        kind: VectorIndex.build(kind, vectors[1], IndexConfig(effort=effort[kind]), num_threads=1) for kind in effort
    }


def order_by_hand(user, item):
    return np.argsort(-(user.double() @ item[1:].double().T).numpy(), axis=1) + 1


def shares(found, truth):
    return [len(set(a) & set(b) - {0}) / len(set(b) - {0}) for a, b in zip(found.tolist(), truth.tolist())]


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_what_is_blocked_is_never_found_and_the_rest_nearly_is(vectors, indexes, kind):
    user, item = vectors
    order = order_by_hand(user, item)
    excluded = Jagged.from_rows([row[: 3 * r : 2].tolist() for r, row in enumerate(order)])
    allowed = torch.rand(N + 1, generator=torch.Generator().manual_seed(1)) < 0.5
    blocked = Blocked(N, excluded, allowed)
    found, bad_B = find_nearest(indexes[kind], user, item, K, blocked)
    assert not bad_B.any()
    truth = []
    for r, row in enumerate(order):
        barred = set(row[: 3 * r : 2].tolist())
        fine = [n for n in row.tolist() if n not in barred and allowed[n]]
        assert set(found.rows[r].tolist()) <= set(fine)
        truth.append(fine[:K])
    assert found.rows.shape == (B, K)
    assert (found.rows > 0).all()
    assert all(len(set(row)) == K for row in found.rows.tolist())
    assert (found.scores.diff(dim=1) <= 0).all()
    assert torch.allclose(found.scores, (user[:, None] * item[found.rows]).sum(-1), atol=1e-4)
    assert np.mean(shares(found.rows, np.array(truth))) > 0.8


@pytest.mark.parametrize("kind", APPROXIMATE)
@pytest.mark.parametrize("near", [K + 1, 600, N - K, N - 3, N])
def test_when_all_near_items_are_excluded_the_next_ones_are_found_exactly(vectors, indexes, kind, near):
    user, item = vectors
    order = order_by_hand(user, item)
    excluded = Jagged.from_rows([row[:near].tolist() for row in order])
    found, _ = find_nearest(indexes[kind], user, item, K, Blocked(N, excluded))
    left = min(K, N - near)
    assert torch.equal((found.rows > 0).sum(1), torch.full((B,), left))
    assert torch.equal(found.scores == -torch.inf, found.rows == 0)
    if near >= 600:  # far more than is fetched beside the wanted ones: only an exact search can serve it
        assert np.array_equal(found.rows[:, :left].numpy(), order[:, near : near + left])


@pytest.mark.parametrize("kind", APPROXIMATE)
@pytest.mark.parametrize("count", [0, 3, 40])
def test_few_allowed_items_are_searched_exactly(vectors, indexes, kind, count):
    user, item = vectors
    allowed = torch.zeros(N + 1, dtype=torch.bool)
    allowed[torch.randperm(N, generator=torch.Generator().manual_seed(3))[:count] + 1] = True
    found, _ = find_nearest(indexes[kind], user, item, K, Blocked(N, None, allowed))
    exact = nearest(user, item, K, None, allowed).best
    assert torch.equal(found.rows, exact.rows)
    assert int((found.rows > 0).sum()) == B * min(count, K)


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_more_items_wanted_than_there_are(vectors, indexes, kind):
    user, item = vectors
    found, _ = find_nearest(indexes[kind], user[:2], item, N + 5, Blocked(N))
    assert np.array_equal(found.rows[:, :N].numpy(), order_by_hand(user[:2], item))
    assert not found.rows[:, N:].any()


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_a_request_gets_the_same_alone_and_beside_others(vectors, indexes, kind):
    user, item = vectors
    order = order_by_hand(user, item)
    excluded = Jagged.from_rows([row[: 40 * (r % 4)].tolist() for r, row in enumerate(order)])
    together, _ = find_nearest(indexes[kind], user, item, K, Blocked(N, excluded))
    for r in range(B):
        alone, _ = find_nearest(indexes[kind], user[r : r + 1], item, K, Blocked(N, excluded.select(torch.tensor([r]))))
        assert torch.equal(alone.rows[0], together.rows[r])


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_a_vector_that_is_no_number_spoils_no_other_request(vectors, indexes, kind):
    user, item = vectors
    broken = user.clone()
    broken[3, 5], broken[7] = torch.nan, torch.inf
    found, bad_B = find_nearest(indexes[kind], broken, item, K, Blocked(N))
    clean, _ = find_nearest(indexes[kind], user, item, K, Blocked(N))
    assert bad_B.nonzero()[:, 0].tolist() == [3, 7]
    assert torch.equal(found.rows[~bad_B], clean.rows[~bad_B])
    assert not found.rows[bad_B].any()


@pytest.mark.parametrize("kind", ["flat", *APPROXIMATE])
def test_measured_recall_is_what_comparing_by_hand_gives(vectors, indexes, kind):
    user, item = vectors
    order = order_by_hand(user, item)
    excluded = Jagged.from_rows([row[: r % 7].tolist() for r, row in enumerate(order)])
    asked = [(user[a:b], Blocked(N, excluded.select(torch.arange(a, b)))) for a, b in ((0, 10), (10, B))]
    measured, exact_share = recall_of(indexes[kind], item, asked, K)
    assert exact_share == 0
    found, _ = find_nearest(indexes[kind], user, item, K, Blocked(N, excluded))
    truth = np.array([row[r % 7 : r % 7 + K] for r, row in enumerate(order)])
    assert measured == pytest.approx(np.mean(shares(found.rows, truth)))
    assert measured == 1.0 if kind == "flat" else 0.5 < measured < 1.0


def test_an_index_gets_no_credit_for_what_an_exact_search_finds(vectors):
    user, item = vectors
    tiny_lists = VectorIndex.build("ivf", item, IndexConfig(lists=1500, effort=1), num_threads=1)
    order = order_by_hand(user, item)
    found, exact_share = recall_of(tiny_lists, item, [(user, Blocked(N))], K)
    assert exact_share == 1.0  # one list of about two items leaves every request short,
    assert np.array_equal(
        find_nearest(tiny_lists, user, item, K, Blocked(N)).best.rows.numpy(), order[:, :K]
    )  # but not the page
    alone = tiny_lists.search(user, K).rows
    assert found == pytest.approx(np.mean(shares(alone, order[:, :K])))
    assert found < 0.5


def test_indexes_in_a_folder_and_back(vectors, indexes, tmp_path):
    user, item = vectors
    save_indexes(tmp_path, indexes)
    again = load_indexes(tmp_path)
    assert set(again) == set(indexes)
    for name, index in again.items():
        one, other = (find_nearest(i, user, item, K, Blocked(N)).best for i in (index, indexes[name]))
        assert torch.equal(one.rows, other.rows)
    save_indexes(tmp_path / "none", {})
    assert load_indexes(tmp_path / "none") == {}
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("file", ["ivf.faiss", "indexes.json"])
def test_damaged_files_are_refused_by_name(indexes, tmp_path, file):
    save_indexes(tmp_path, indexes)
    path = tmp_path / "indexes" / file
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(SnapshotError, match=file.replace(".", r"\.")):
        load_indexes(tmp_path)


def test_without_the_library_a_snapshot_is_searched_exactly_and_says_so_once(indexes, tmp_path, monkeypatch, caplog):
    save_indexes(tmp_path, indexes)
    monkeypatch.setattr(indexing, "installed", lambda _: False)
    with caplog.at_level(logging.WARNING, "shortlist"):
        assert load_indexes(tmp_path) == {}
    assert len(caplog.messages) == 1
    assert "pip install 'shortlist[ann]'" in caplog.text
