"""What every re-ranker must do, whoever wrote it."""

import pytest
import torch

from shortlist.registry import systems
from support import build, planted_batch, planted_view


@pytest.fixture(params=systems(kind="reranker"), ids=lambda entry: entry.name)
def model(request):
    return build(request.param, planted_view())


@torch.no_grad()
def test_page_holds_distinct_candidates_of_its_request(model):
    batch = planted_batch(candidates=8)
    scores = torch.rand(len(batch.candidate_rows.values), generator=torch.Generator().manual_seed(1))
    page = model.rerank(batch, scores, 5)
    assert page.rows.shape == page.scores.shape == (60, 5)
    for r, row in enumerate(page.rows.tolist()):
        a, b = batch.candidate_rows.offsets[r : r + 2].tolist()
        assert set(row) <= set(batch.candidate_rows.values[a:b].tolist()) | {0}
        real = [item for item in row if item]
        assert len(set(real)) == len(real) > 0


@torch.no_grad()
def test_k_above_the_candidates_fills_with_nothing(model):
    batch = planted_batch(candidates=2)
    page = model.rerank(batch, torch.zeros(len(batch.candidate_rows.values)), 30)
    assert page.rows.shape == (60, 30)
    assert (page.rows[:, -1] == 0).all()


@torch.no_grad()
def test_the_best_item_comes_first_where_nothing_speaks_against_it(model):
    batch = planted_batch(candidates=8)
    scores = torch.rand(len(batch.candidate_rows.values), generator=torch.Generator().manual_seed(1))
    page = model.rerank(batch, scores, 5)
    padded, _ = batch.candidate_rows.with_values(scores).padded(fill=-1)
    rows, _ = batch.candidate_rows.padded()
    best = rows.gather(1, padded.argmax(1, keepdim=True))[:, 0]
    assert (page.rows[:, 0] == best).float().mean() > 0.9
