import pytest

from shortlist.errors import ConfigError
from shortlist.models.retrieval.popularity import Popularity, PopularityConfig

# Item 1 was the hit of old, item 2 sells now, item 3 sold once of late, item 4 once long ago.
USERS = [[(1, [1]), (2, [1]), (3, [1, 4]), (95, [2, 3])], [(50, [1]), (97, [2])], [(99, [2, 2])]]


def order(make_view, make_batch, has_clock: bool = True, **settings) -> list[int]:
    view = make_view(USERS, 5, has_clock=has_clock)
    model = Popularity(PopularityConfig(**settings), view.space)
    model.prepare(view)
    return model.retrieve(make_batch([[]]), 4).rows[0].tolist()


def test_window_first_then_all_times(make_view, make_batch):
    assert order(make_view, make_batch, window_days=10.0) == [2, 3, 1, 4]


def test_all_times_counts_events_or_users(make_view, make_batch):
    view = make_view(USERS, 5)
    scores = {}
    for per_user in (False, True):
        model = Popularity(PopularityConfig(window_days=None, per_user=per_user), view.space)
        model.prepare(view)
        scores[per_user] = model.score_all(make_batch([[]]))[0].round().tolist()[1:5]
    assert scores == {False: [4, 4, 1, 1], True: [2, 3, 1, 1]}


def test_half_life_halves(make_view, make_batch):
    view = make_view(USERS, 5)
    model = Popularity(PopularityConfig(window_days=None, half_life_days=10.0), view.space)
    model.prepare(view)
    score = model.score_all(make_batch([[]]))[0]
    assert score[3].item() == pytest.approx(2 ** (-5 / 10), rel=1e-3)
    assert score[2].item() == pytest.approx(2 ** (-5 / 10) + 2 ** (-3 / 10) + 2 * 2 ** (-1 / 10), rel=1e-3)


def test_without_a_clock_all_times_count(make_view, make_batch):
    assert set(order(make_view, make_batch, has_clock=False, window_days=1e-3)[:2]) == {1, 2}


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match="window_days"):
        PopularityConfig(window_days=0.0)
