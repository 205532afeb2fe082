"""Time columns in any common form become UTC milliseconds.

Numbers are told apart by magnitude (1.5e9 are seconds, 1.5e12 milliseconds ...), text by trying formats on a sample.
Times without a zone are taken as UTC. A column of small numbers (0, 1, 2 ...) is a counter: it orders events and is no clock.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import polars as pl

from shortlist.errors import DataError

MS = pl.Datetime("ms")

# One unit covers [1e8, 1e10) of itself since 1970: 1973 to 2286 in seconds. The units are a factor 1000 apart, so they never meet.
_UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_FIRST_CLOCK = 10**8
_LATEST_MS = 4_102_444_800_000  # 2100-01-01

_DAYS = ("%Y-%m-%d", "%Y/%m/%d")
_CLOCKS = ("%H:%M:%S%.f%#z", "%H:%M:%S%.f", "%H:%M:%S%.f UTC", "%H:%M%#z", "%H:%M")
_ISO = tuple(f"{day}{gap}{clock}" for day in _DAYS for gap in ("T", " ") for clock in _CLOCKS)
_OTHER = (
    "%d.%m.%Y %H:%M:%S%.f", "%d.%m.%Y %H:%M", "%a, %d %b %Y %H:%M:%S %z", "%a %b %d %H:%M:%S %z %Y",
    "%d %b %Y %H:%M:%S", "%d %b %Y %H:%M", "%d/%b/%Y:%H:%M:%S %z",
)  # fmt: skip
_DATES = (*_DAYS, "%d.%m.%Y", "%d %b %Y", "%b %d, %Y", "%m %d, %Y")
_EITHER_DAY = ("{}{s}{}{s}%Y %H:%M:%S%.f", "{}{s}{}{s}%Y %H:%M", "{}{s}{}{s}%Y")
"""Layouts in which day and month may stand either way round; the whole column decides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedTimes:
    """One time column, recognised."""

    at: pl.Series
    """Datetime("ms"), UTC; null where the source is missing, unparsable or absurd."""
    exact: pl.Series
    """The same at the source's full precision (any dtype): equal here means equal in the source."""
    reason: pl.Series
    """String: why `at` is null ("missing time", "unparsable time", "absurd time"); null where it is fine."""
    unit: str
    """"s", "ms", "us", "ns", "iso", "date", "datetime", or "order" for a counter that is no clock."""


class _UndecidedDates(DataError):
    """Day and month cannot be told apart."""


def parse_times(column: pl.Series, flag: str = "--timestamp") -> ParsedTimes:
    """Recognise the unit or format of a time column and convert it.

    Raises DataError where no unit or format fits, or where day and month cannot be told apart.
    """
    dtype = column.dtype
    if dtype == pl.String:
        exact, unit = _from_text(column, flag)
    elif dtype.is_integer() or dtype.is_float() or dtype.is_decimal():
        exact, unit = _from_numbers(column.cast(pl.Float64) if dtype.is_decimal() else column)
    elif dtype == pl.Date:
        exact, unit = column.cast(pl.Datetime("us")), "date"
    elif isinstance(dtype, pl.Datetime):
        exact, unit = _without_zone(column), "datetime"
    else:
        raise DataError(
            f"column {column.name!r} of type {dtype} cannot be read as a time; name another with `{flag} COLUMN`."
        )
    at = exact if isinstance(exact.dtype, pl.Datetime) else _number_to_ms(exact, unit)
    at = at.cast(MS)
    return _judged(column, at, exact, unit)


def looks_like_time(column: pl.Series) -> bool:
    """True where at least half of a sample reads as clock times or dates (counters do not count)."""
    column = column.drop_nulls()
    if len(column) == 0:
        return False
    try:
        parsed = parse_times(column)
    except _UndecidedDates:
        return True
    except DataError:
        return False
    return parsed.unit != "order" and parsed.at.null_count() <= 0.5 * len(column)


def _judged(source: pl.Series, at: pl.Series, exact: pl.Series, unit: str) -> ParsedTimes:
    since_1970 = at.to_physical()
    earliest = 1000 * _FIRST_CLOCK if unit in _UNITS else 0  # a clock that says 1970 was never set
    absurd = (since_1970 < earliest) | (since_1970 > _LATEST_MS)
    marks = pl.DataFrame({"missing": source.is_null(), "unparsable": exact.is_null() | at.is_null(), "absurd": absurd})
    reason = marks.select(
        pl.when("missing").then(pl.lit("missing time"))
        .when("unparsable").then(pl.lit("unparsable time"))
        .when("absurd").then(pl.lit("absurd time"))
    ).to_series()  # fmt: skip
    at = pl.select(pl.when(reason.is_null()).then(at)).to_series().cast(MS)
    return ParsedTimes(at=at, exact=exact, reason=reason, unit=unit)


def _from_numbers(column: pl.Series) -> tuple[pl.Series, str]:
    if column.dtype.is_float():
        column = column.fill_nan(None)
    middle = column.median()
    if not isinstance(middle, int | float):
        return column, "order"
    for unit, scale in _UNITS.items():
        if _FIRST_CLOCK * scale <= middle < 100 * _FIRST_CLOCK * scale:
            return column, unit
    whole = column.cast(pl.Int64, strict=False)
    if 1900_01_01 <= middle <= 2100_12_31:
        days = whole.cast(pl.String).str.to_datetime("%Y%m%d", strict=False, time_unit="us")
        if days.null_count() - column.null_count() <= 0.01 * len(column):
            return days, "date"
    return column, "order"


def _number_to_ms(numbers: pl.Series, unit: str) -> pl.Series:
    scale = {"order": 1}.get(unit) or _UNITS[unit]
    if numbers.dtype.is_float():
        at = (numbers * (1000 / scale)).round().cast(pl.Int64, strict=False)
    elif scale <= 1000:
        # a number too large for milliseconds in 64 bits is absurd in any unit: leave it out of range rather than overflow
        at = numbers.cast(pl.Int64, strict=False).clip(-(2**52), 2**52) * (1000 // scale)
    else:
        at = numbers.cast(pl.Int64, strict=False) // (scale // 1000)
    return at.cast(MS)


def _from_text(column: pl.Series, flag: str) -> tuple[pl.Series, str]:
    text = column.str.strip_chars().replace("", None)
    sample = text.drop_nulls().head(500)
    if len(sample) == 0:
        return column, "order"
    if (sample.cast(pl.Float64, strict=False).null_count()) < 0.5 * len(sample):
        numbers = text.cast(pl.Int64, strict=False)
        if numbers.null_count() > text.null_count():
            numbers = text.cast(pl.Float64, strict=False)
        return _from_numbers(numbers)
    formats, unit = _formats_for(sample, text, flag)
    parsed = _strptime(text, formats[0])
    for other in formats[1:]:
        parsed = parsed.fill_null(_strptime(text.set(parsed.is_not_null(), None), other))
    return parsed, unit


def _formats_for(sample: pl.Series, text: pl.Series, flag: str) -> tuple[list[str], str]:
    """Formats that together read the sample, best first. Raises DataError when none reads half of it."""
    chosen: list[str] = []
    left = sample
    while len(left) > 0:
        fits = [(len(left) - _strptime(left, form).null_count(), form) for form in (*_ISO, *_OTHER, *_DATES)]
        count, best = max(fits, key=lambda fit: fit[0])
        if count == 0:
            break
        chosen.append(best)
        left = left.filter(_strptime(left, best).is_null())
    if len(left) > 0.5 * len(sample):
        either = _either_day(left, text, flag)
        if either is None:
            raise DataError(
                f"column {text.name!r} does not read as a time: no known format fits values such as {left[0]!r}. "
                f"Write ISO 8601 (2024-05-31T18:00:00) or epoch seconds, or name another column with `{flag} COLUMN`."
            )
        chosen = [either, *chosen]
    return chosen, "date" if all("%H" not in form for form in chosen) else "iso"


def _either_day(sample: pl.Series, text: pl.Series, flag: str) -> str | None:
    """The day-first or month-first format that reads the column, or None. Raises DataError when both read all of it."""
    found = re.fullmatch(r"\d{1,2}([/-])\d{1,2}[/-]\d{4}.*", sample[0])
    if found is None:
        return None
    for layout in _EITHER_DAY:
        day_first = layout.format("%d", "%m", s=found[1])
        month_first = layout.format("%m", "%d", s=found[1])
        if min(_strptime(sample, form).null_count() for form in (day_first, month_first)) > 0.5 * len(sample):
            continue
        failures = _strptime(text, day_first).null_count(), _strptime(text, month_first).null_count()
        if failures[0] == failures[1]:
            raise _UndecidedDates(
                f"column {text.name!r}: dates such as {sample[0]!r} can be read day first or month first, and no value decides. "
                f"Write them as 2024-05-31, or name another column with `{flag} COLUMN`."
            )
        return day_first if failures[0] < failures[1] else month_first
    return None


def _strptime(text: pl.Series, form: str) -> pl.Series:
    return _without_zone(text.str.strptime(pl.Datetime("us"), form, strict=False))


def _without_zone(times: pl.Series) -> pl.Series:
    """UTC without a zone; times that never had one are left as they are."""
    if isinstance(times.dtype, pl.Datetime) and times.dtype.time_zone:
        return times.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
    return times
