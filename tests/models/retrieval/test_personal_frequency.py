import pytest

from shortlist.errors import ConfigError
from shortlist.models.retrieval.personal_frequency import PersonalFrequency, PersonalFrequencyConfig

LOG = [[(90, [5])], [(91, [5])], [(92, [4])], [(1, [1, 2, 3])]]
USER = [(10, [1, 2]), (20, [1, 1, 3]), (90, [2])]


def scores(make_view, make_batch, user, now_day=100, has_clock=True, **settings) -> list[float]:
    view = make_view(LOG, 6, has_clock=has_clock)
    model = PersonalFrequency(PersonalFrequencyConfig(**settings), view.space)
    model.prepare(view)
    return model.score_all(make_batch([user], now_day))[0].tolist()[1:]


def test_counts_groups_then_decays_by_days_and_groups(make_view, make_batch):
    plain = {"half_life_days": None, "half_life_groups": None, "popularity_power": 0.0}
    assert scores(make_view, make_batch, USER, **plain)[:3] == pytest.approx([2, 2, 1], rel=1e-3)
    days = scores(make_view, make_batch, USER, **{**plain, "half_life_days": 30.0})
    expected = [2 ** (-90 / 30) + 2 ** (-80 / 30), 2 ** (-90 / 30) + 2 ** (-10 / 30), 2 ** (-80 / 30)]
    assert days[:3] == pytest.approx(expected, rel=1e-3)
    groups = scores(make_view, make_batch, USER, **{**plain, "half_life_groups": 1.0})
    assert groups[:3] == pytest.approx([1 / 4 + 1 / 2, 1 / 4 + 1, 1 / 2], rel=1e-3)


def test_without_a_clock_days_are_ignored(make_view, make_batch):
    settings = {"half_life_days": 1.0, "half_life_groups": None, "popularity_power": 0.0}
    assert scores(make_view, make_batch, USER, has_clock=False, **settings)[:3] == pytest.approx([2, 2, 1], rel=1e-3)


def test_own_items_come_before_popular_ones(make_view, make_batch):
    view = make_view(LOG, 6)
    model = PersonalFrequency(PersonalFrequencyConfig(), view.space)
    model.prepare(view)
    found = model.retrieve(make_batch([USER, [(1, [6])], []]), 5)
    assert found.rows[0].tolist() == [2, 1, 3, 5, 4]
    assert found.rows[1].tolist()[:3] == [6, 5, 4], "an old choice of an item nobody buys is still the user's own"
    assert found.rows[2].tolist()[:2] == [5, 4]


def test_popularity_decides_between_equal_choices(make_view, make_batch):
    user = [(50, [1, 4, 5])]
    plain = scores(make_view, make_batch, user, popularity_power=0.0)
    assert plain[0] == pytest.approx(plain[4], rel=1e-3)
    weighed = scores(make_view, make_batch, user, popularity_power=0.5)
    # Events of the last 14 days + 1, over the largest: item 1 has 0, item 4 has 1, item 5 has 2.
    assert weighed[0] / weighed[4] == pytest.approx((1 / 3) ** 0.5, rel=1e-3)
    assert weighed[3] / weighed[4] == pytest.approx((2 / 3) ** 0.5, rel=1e-3)


def test_very_old_choices_stay_above_popularity(make_view, make_batch):
    score = scores(make_view, make_batch, [(0, [1])], now_day=100_000, half_life_days=1.0)
    assert score[0] > 0 >= max(score[1:])


def test_wrong_settings_are_refused():
    for wrong in ({"half_life_days": -1.0}, {"half_life_groups": 0.0}, {"popularity_power": -1.0}):
        with pytest.raises(ConfigError, match="personal-frequency"):
            PersonalFrequencyConfig(**wrong)
