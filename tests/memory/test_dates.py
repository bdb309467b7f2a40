"""Dates in questions, seen from a Wednesday in October 2023."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from persona_sdk.memory.calendar_spans import Interval
from persona_sdk.memory.dates import parse

NOW = datetime(2023, 10, 18, 15, 30, tzinfo=UTC)


def days(start: str | None, end: str | None) -> Interval:
    return Interval(
        *(None if day is None else datetime.fromisoformat(day).replace(tzinfo=UTC) for day in (start, end))
    )


@pytest.mark.parametrize(
    ("text", "start", "end"),
    [
        ("What did she do in 2021?", "2021-01-01", "2022-01-01"),
        ("when I lived in Oslo in 2019", "2019-01-01", "2020-01-01"),
        ("on 8 May 2023", "2023-05-08", "2023-05-09"),
        ("on May 8th", "2023-05-08", "2023-05-09"),
        ("August 15, 2022?", "2022-08-15", "2022-08-16"),
        ("the 3rd of December", "2022-12-03", "2022-12-04"),
        ("on 2023-02-03", "2023-02-03", "2023-02-04"),
        ("during 2023-02", "2023-02-01", "2023-03-01"),
        ("last May", "2023-05-01", "2023-06-01"),
        ("last November", "2022-11-01", "2022-12-01"),
        ("next May", "2024-05-01", "2024-06-01"),
        ("in March", "2023-03-01", "2023-04-01"),
        ("in December", "2022-12-01", "2023-01-01"),
        ("since 2020", "2020-01-01", None),
        ("before May 2021", None, "2021-05-01"),
        ("after June 3, 2023", "2023-06-04", None),
        ("until 2018", None, "2019-01-01"),
        ("between 2019 and 2021", "2019-01-01", "2022-01-01"),
        ("from May to July 2023", "2023-05-01", "2023-08-01"),
        ("from November to February 2023", "2022-11-01", "2023-03-01"),
        ("from December 2022 to March", "2022-12-01", "2023-04-01"),
        ("yesterday", "2023-10-17", "2023-10-18"),
        ("the day before yesterday", "2023-10-16", "2023-10-17"),
        ("3 days ago", "2023-10-15", "2023-10-16"),
        ("two weeks ago", "2023-10-01", "2023-10-08"),
        ("a few months ago", "2023-07-01", "2023-08-01"),
        ("two years ago", "2021-01-01", "2022-01-01"),
        ("last Friday", "2023-10-13", "2023-10-14"),
        ("last Wednesday", "2023-10-11", "2023-10-12"),
        ("next Wednesday", "2023-10-25", "2023-10-26"),
        ("this Friday", "2023-10-20", "2023-10-21"),
        ("last week", "2023-10-09", "2023-10-16"),
        ("this weekend", "2023-10-21", "2023-10-23"),
        ("next month", "2023-11-01", "2023-12-01"),
        ("last year", "2022-01-01", "2023-01-01"),
        ("the summer of 2022", "2022-06-01", "2022-09-01"),
        ("last summer", "2023-06-01", "2023-09-01"),
        ("next winter", "2023-12-01", "2024-03-01"),
        ("29 February 2024", "2024-02-29", "2024-03-01"),
    ],
)
def test_dates_are_understood(text: str, start: str | None, end: str | None) -> None:
    assert parse(text, NOW) == days(start, end)


@pytest.mark.parametrize(
    ("text", "start"),
    [("last winter", 2024), ("this winter", 2025), ("next winter", 2026), ("last summer", 2025)],
)
def test_a_winter_that_began_last_year_is_this_winter(text: str, start: int) -> None:
    span = parse(text, datetime(2026, 1, 15, tzinfo=UTC))
    assert span is not None
    assert span.start is not None
    assert (span.start.year, span.start.month) == (start, 12 if "winter" in text else 6)


@pytest.mark.parametrize(
    "text",
    [
        "may I ask you something",
        "They march on",
        "I own 2000 books",
        "room 2023a",
        "call 5551234",
        "29 February",
        "the 45th try",
        "2023-02-30",
        "99999 years ago",
        "What do I like?",
        "",
    ],
)
def test_what_is_no_date_is_none(text: str) -> None:
    assert parse(text, NOW) is None


@given(
    st.lists(
        st.sampled_from(
            (
                *("29 February", "2024", "May", "to", "and", "from", "before", "last", "next", "two", "ago"),
                *("9999", "1900", "31", "since", "in", "year", "Friday", "winter", "0", "of", ",", "weeks"),
            )
        ),
        max_size=7,
    ).map(" ".join),
    st.datetimes(min_value=datetime(1, 1, 1), max_value=datetime(9999, 12, 31)),
)
@example("from 29 February 2024 to May 2023", NOW)
@example("from May 2023 to 29 February", NOW)
def test_whatever_is_said_the_span_is_in_order(text: str, moment: datetime) -> None:
    span = parse(text, moment.replace(tzinfo=UTC))
    if span is not None:
        assert (span.start, span.end) != (None, None)
        assert span.start is None or span.end is None or span.start < span.end


@given(st.datetimes(min_value=datetime(1950, 1, 1), max_value=datetime(2090, 1, 1)))
def test_a_day_written_out_is_found_whenever_it_is_read(day: datetime) -> None:
    start = day.replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=UTC)
    for text in (f"{day:%Y-%m-%d}", f"{day.day} {day:%B} {day.year}", f"{day:%b} {day.day}, {day.year}"):
        assert parse(f"on {text}?", NOW) == Interval(start, start + timedelta(days=1))


def test_overlaps_is_half_open() -> None:
    year = days("2020-01-01", "2021-01-01")
    assert year.overlaps(days("2020-12-31", None))
    assert not year.overlaps(days("2021-01-01", None))
    assert not days(None, "2020-01-01").overlaps(year)
    assert Interval().overlaps(year)
