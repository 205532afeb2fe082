"""Times in every common form, against Python's own datetime."""

from datetime import date, datetime, timedelta, timezone

import polars as pl
import pytest

from shortlist.data.times import looks_like_time, parse_times
from shortlist.errors import DataError

MOMENT = datetime(2021, 5, 31, 18, 4, 5)
EPOCH = int(MOMENT.replace(tzinfo=timezone.utc).timestamp())  # noqa: UP017


@pytest.mark.parametrize(
    ("value", "unit"),
    [
        (EPOCH, "s"),
        (EPOCH * 1000, "ms"),
        (EPOCH * 1_000_000, "us"),
        (EPOCH * 1_000_000_000, "ns"),
        (float(EPOCH), "s"),
        (str(EPOCH), "s"),
        (f"{EPOCH}.0", "s"),
        (MOMENT, "datetime"),
        (MOMENT.replace(tzinfo=timezone(timedelta(hours=0))), "datetime"),
        ("2021-05-31 18:04:05", "iso"),
        ("2021-05-31T18:04:05Z", "iso"),
        ("2021-05-31T20:04:05+02:00", "iso"),
        ("2021-05-31T20:04:05.000+0200", "iso"),
        ("2021-05-31 18:04:05 UTC", "iso"),
        ("2021/05/31 18:04:05", "iso"),
        ("31.05.2021 18:04:05", "iso"),
        ("31/05/2021 18:04:05", "iso"),
        ("5/31/2021 18:04:05", "iso"),
        ("Mon, 31 May 2021 18:04:05 +0000", "iso"),
        ("Mon May 31 18:04:05 +0000 2021", "iso"),
    ],
)
def test_moment_is_recognised(value: object, unit: str) -> None:
    parsed = parse_times(pl.Series("t", [value, None, value]))
    assert parsed.unit == unit
    assert parsed.at.dtype == pl.Datetime("ms")
    assert parsed.at.to_list() == [MOMENT, None, MOMENT]
    assert parsed.reason.to_list() == [None, "missing time", None]


@pytest.mark.parametrize(
    "value",
    [date(2021, 5, 31), "2021-05-31", "2021/05/31", "31.05.2021", "31-05-2021", "05 31, 2021", 20210531, "20210531"],
)
def test_day_is_recognised(value: object) -> None:
    parsed = parse_times(pl.Series("t", [value]))
    assert parsed.unit == "date"
    assert parsed.at.to_list() == [datetime(2021, 5, 31)]


def test_mixed_formats_are_read_together() -> None:
    texts = ["2021-05-31T18:04:05Z", "2021-05-31 18:04", "2021-05-31", "soon"]
    parsed = parse_times(pl.Series("t", texts))
    assert parsed.at.to_list() == [MOMENT, datetime(2021, 5, 31, 18, 4), datetime(2021, 5, 31), None]
    assert parsed.reason.to_list() == [None, None, None, "unparsable time"]


@pytest.mark.parametrize("wrong", [0, 5, -1, EPOCH * 1000, 2**62])
def test_a_time_far_from_the_others_is_absurd(wrong: int) -> None:
    parsed = parse_times(pl.Series("t", [EPOCH, EPOCH, wrong]))
    assert parsed.reason.to_list() == [None, None, "absurd time"]
    assert parsed.at[2] is None


def test_dates_before_1970_and_after_2100_are_absurd() -> None:
    parsed = parse_times(pl.Series("t", ["2021-05-31", "1066-10-14", "2999-01-01"]))
    assert parsed.reason.to_list() == [None, "absurd time", "absurd time"]


def test_exact_keeps_what_milliseconds_lose() -> None:
    parsed = parse_times(pl.Series("t", [EPOCH * 10**6, EPOCH * 10**6 + 1]))
    assert parsed.at.n_unique() == 1
    assert parsed.exact.n_unique() == 2


def test_counter_orders_and_is_no_clock() -> None:
    parsed = parse_times(pl.Series("t", [3, 0, 1]))
    assert parsed.unit == "order"
    assert parsed.at.arg_sort().to_list() == [1, 2, 0]
    assert not looks_like_time(pl.Series("t", [3, 0, 1]))


def test_day_and_month_are_not_guessed() -> None:
    with pytest.raises(DataError, match=r"day first or month first.*--timestamp"):
        parse_times(pl.Series("t", ["03/04/2021", "05/06/2021"]))


@pytest.mark.parametrize("values", [["soon", "later"], [[1], [2]], [True, False]])
def test_what_is_no_time_is_refused(values: list[object]) -> None:
    column = pl.Series("when", values)
    assert not looks_like_time(column)
    with pytest.raises(DataError, match="'when'"):
        parse_times(column)
