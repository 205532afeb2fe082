"""What all counting retrievers promise, whatever they count."""

import pytest
import torch

from shortlist.models.base import ItemScorer
from shortlist.models.retrieval.counts import Counts
from shortlist.models.retrieval.ease import EASE
from shortlist.models.retrieval.item_knn import ItemKNN
from shortlist.models.retrieval.personal_frequency import PersonalFrequency
from shortlist.models.retrieval.popularity import Popularity

SYSTEMS = [Popularity, PersonalFrequency, Counts, ItemKNN, EASE]


def prepared(cls: type[ItemScorer], view, **settings) -> ItemScorer:
    model = cls(cls.Config(**settings), view.space)
    model.prepare(view)
    return model.eval()


@pytest.mark.parametrize("cls", SYSTEMS, ids=lambda cls: cls.__name__)
class TestEveryCountingRetriever:
    def test_order_inside_baskets_means_nothing(self, cls, make_view, make_batch, random_users, shuffled_in_baskets):
        a = prepared(cls, make_view(random_users, 22)).score_all(make_batch(random_users))
        b = prepared(cls, make_view(shuffled_in_baskets, 22)).score_all(make_batch(shuffled_in_baskets))
        torch.testing.assert_close(a[:, 1:], b[:, 1:])

    def test_excluded_and_unknown_items_never_come(self, cls, make_view, make_batch, random_users):
        model = prepared(cls, make_view(random_users, 22))
        batch = make_batch(random_users, exclude_history=True)
        found = model.retrieve(batch, 8)
        assert (found.rows > 0).all(), "there must always be k items while enough are left"
        for request, rows in enumerate(found.rows.tolist()):
            seen = batch.excluded.values[batch.excluded.offsets[request] : batch.excluded.offsets[request + 1]]
            assert not set(rows) & set(seen.tolist())
            assert len(set(rows)) == 8

    def test_no_history_gives_popularity(self, cls, make_view, make_batch, random_users):
        view = make_view(random_users, 22)
        model = prepared(cls, view, window_days=None)
        counts = torch.bincount(torch.from_numpy(view.histories.item), minlength=23)
        for history in ([], [(3, [0])], [(3, [21])]):  # none, an unknown item, an item without training events
            rows = model.retrieve(make_batch([history]), 20).rows[0]
            rows = rows[rows != 21]
            sold = counts[rows].tolist()
            assert sold == sorted(sold, reverse=True)
            assert sold[0] == counts[1:].max()

    def test_scores_are_those_of_the_list(self, cls, make_view, make_batch, random_users):
        from shortlist.data.jagged import Jagged

        model = prepared(cls, make_view(random_users, 22))
        batch = make_batch(random_users)
        found = model.retrieve(batch, 5)
        again = model.score(batch.with_candidates(Jagged.from_rows(found.rows.tolist())))["score"]
        torch.testing.assert_close(again.view(-1, 5), found.scores)

    def test_an_empty_log_still_gives_a_list(self, cls, make_view, make_batch):
        model = prepared(cls, make_view([[], []], 4))
        found = model.retrieve(make_batch([[], [(3, [2])]]), 4)
        assert sorted(found.rows[0].tolist()) == [1, 2, 3, 4]

    def test_cost_is_of_the_request(self, cls, make_view, random_users):
        from shortlist.models.base import RequestShape

        cost = prepared(cls, make_view(random_users, 22)).cost(RequestShape(num_history=10, num_items=22))
        assert cost.bytes > 0
        assert cost.flops(22) >= 0
