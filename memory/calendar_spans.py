"""English dates and the span of time that each means: one calendar for questions and for statements.

    form                                    span, half open, in the time zone of the reference
    "8 May 2023", "May 8th", "2023-05-08"   a day; without a year the last one that has begun
    "May 2023", "in May", "in 2023"         a month, a year
    "summer of 2022", "last winter"         three months, from June and from December
    "last May", "next week", "this year"    relative to the reference; "last" is over, also of a season
    "two weeks ago"                         as wide as its unit is vague, around `back`

`dates` reads the span a question speaks of, `when` the validity of a statement. A year or a month alone is a
date only after a preposition, which is for the caller to see: "may I" and "2000 books" are none.
"""

import re
from dataclasses import dataclass
from datetime import datetime, timedelta

MONTHS = (
    *("january", "february", "march", "april", "may", "june"),
    *("july", "august", "september", "october", "november", "december"),
)
_DAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six"),
    *("seven", "eight", "nine", "ten", "eleven", "twelve"),
)
_NUMBERS = {word: n for n, word in enumerate(_WORDS)} | {"a": 1, "an": 1, "a couple of": 2, "a few": 3}
_SEASONS = {"spring": 3, "summer": 6, "autumn": 9, "fall": 9, "winter": 12}

_MONTH = "(?P<month>" + "|".join(f"{name[:3]}(?:{name[3:]})?" for name in MONTHS) + r"|sept)\b\.?"
_YEAR = r"(?P<year>(?:19|20)\d\d)\b"
_DAY = r"(?P<day>3[01]|[12]\d|0?[1-9])(?:st|nd|rd|th)?"
_UNIT = r"(?P<unit>day|week|weekend|month|year)s?\b"
_COUNT = r"(?P<count>\d{1,3}|" + "|".join(sorted(_NUMBERS, key=len, reverse=True)) + ")"
_WHICH = r"(?P<which>last|this|next|past|previous|coming)"
_SEASON = "(?P<season>" + "|".join(_SEASONS) + r")\b"

AMOUNT = f"{_COUNT} {_UNIT}"
ABSOLUTE = (
    r"(?P<year>(?:19|20)\d\d)-(?P<number>0[1-9]|1[0-2])(?:-(?P<day>0[1-9]|[12]\d|3[01]))?\b",
    rf"{_DAY} (?:of )?{_MONTH}(?:,? {_YEAR})?",
    rf"{_MONTH} {_DAY}\b(?!\d)(?:,? {_YEAR})?",
    rf"{_MONTH},? (?:of )?{_YEAR}",
    rf"{_SEASON},? (?:of )?{_YEAR}",
)
RELATIVE = (
    rf"{AMOUNT} (?P<ago>ago)\b",
    rf"{_WHICH} {_UNIT}",
    rf"{_WHICH} {_MONTH}",
    rf"{_WHICH} {_SEASON}",
    rf"{_WHICH} (?P<weekday>{'|'.join(_DAYS)})\b",
    r"(?P<near>day before yesterday|yesterday|today|tonight|tomorrow)\b",
)
BARE = (_YEAR, _MONTH)  # dates only after a preposition


@dataclass(frozen=True)
class Interval:
    """A half-open span of time; None is open for ever on that side."""

    start: datetime | None = None
    end: datetime | None = None

    def overlaps(self, other: "Interval") -> bool:
        """Whether some moment lies in both."""
        return _before(self.start, other.end) and _before(other.start, self.end)


def _before(start: datetime | None, end: datetime | None) -> bool:
    return start is None or end is None or start < end


def span_of(match: re.Match[str], reference: datetime, *, ahead: bool = False) -> Interval | None:
    """What a match of one of the forms means; None for a day that does not exist.

    Args:
        match: of one form.
        reference: when it is said.
        ahead: a date without a year is the next one that is not over, instead of the last that has begun.
    """
    said = {name: value.lower() for name, value in match.groupdict().items() if value}
    today = midnight(reference)
    try:
        if "near" in said:
            shift = {"day before yesterday": -2, "yesterday": -1, "tomorrow": 1}.get(said["near"], 0)
            return _days(today + timedelta(days=shift), 1)
        if "ago" in said:
            return _around(back(today, said["count"], said["unit"]), said["unit"])
        return _relative(said, today) if "which" in said else _absolute(said, today, ahead)
    except (ValueError, OverflowError):
        return None


def midnight(moment: datetime) -> datetime:
    """The beginning of its day."""
    return moment.replace(hour=0, minute=0, second=0, microsecond=0)


def back(today: datetime, count: str, unit: str) -> datetime:
    """The day that lies so many days, weeks, months or years before `today`.

    Raises:
        ValueError, OverflowError: it lies before the year 1.
    """
    number = _NUMBERS[count.lower()] if count.lower() in _NUMBERS else int(count)
    unit = unit.lower().removesuffix("s")
    if unit in ("day", "week", "weekend"):
        return today - timedelta(days=number * (1 if unit == "day" else 7))
    first = _month_on(today.replace(day=1), -number * (12 if unit == "year" else 1))
    return first.replace(day=min(today.day, 28))


def _around(day: datetime, unit: str) -> Interval:
    """The span around a day that somebody means who counts in units: the week around it, its month."""
    if unit == "day":
        return _days(day, 1)
    if unit in ("week", "weekend"):
        return _days(day - timedelta(days=3), 7)
    return _year(day, day.year) if unit == "year" else _months(day.replace(day=1), 1)


def _absolute(said: dict[str, str], today: datetime, ahead: bool) -> Interval:
    month = int(said["number"]) if "number" in said else _month_number(said)
    if month is None:
        return _year(today, int(said["year"]))
    start = today.replace(year=int(said.get("year", today.year)), month=month, day=1)
    if "season" in said:
        return _months(start, 3)
    width = 0 if "day" in said else 1
    start = start.replace(day=int(said.get("day", 1)))
    end = _month_on(start, 1) if width else start + timedelta(days=1)
    if "year" not in said and ahead and end <= today:
        start = start.replace(year=start.year + 1)
    if "year" not in said and not ahead and start > today:  # "in May" asked in March is the May that was
        start = start.replace(year=start.year - 1)
    return _months(start, 1) if width else _days(start, 1)


def _relative(said: dict[str, str], today: datetime) -> Interval:
    shift = {"this": 0, "next": 1, "coming": 1}.get(said["which"], -1)
    if "unit" in said:
        return _unit(said["unit"], shift, today)
    if "weekday" in said:
        days = (_DAYS.index(said["weekday"]) - today.weekday()) % 7
        days = {0: days, 1: days or 7}.get(shift, days - 7)
        return _days(today + timedelta(days=days), 1)
    width = 3 if "season" in said else 1
    start = today.replace(month=_month_number(said) or 1, day=1)
    before = start.replace(year=start.year - 1)
    running = start > today and _month_on(before, width) > today  # winter, in January
    if running or (shift < 0 and _month_on(start, width) > today):
        start = before
    if running and shift < 0:
        start = start.replace(year=start.year - 1)
    if shift > 0 and start <= today:
        start = start.replace(year=start.year + 1)
    return _months(start, width)


def _unit(unit: str, shift: int, today: datetime) -> Interval:
    monday = today - timedelta(days=today.weekday())
    if unit == "day":
        return _days(today + timedelta(days=shift), 1)
    if unit == "week":
        return _days(monday + timedelta(days=7 * shift), 7)
    if unit == "weekend":
        return _days(monday + timedelta(days=7 * shift + 5), 2)
    if unit == "month":
        return _months(_month_on(today.replace(day=1), shift), 1)
    return _year(today, today.year + shift)


def _month_number(said: dict[str, str]) -> int | None:
    if "season" in said:
        return _SEASONS[said["season"]]
    name = said.get("month")
    return None if name is None else 1 + [m[:3] for m in MONTHS].index(name[:3])


def _month_on(start: datetime, months: int) -> datetime:
    years, month = divmod(start.month - 1 + months, 12)
    return start.replace(year=start.year + years, month=month + 1)


def _months(start: datetime, number: int) -> Interval:
    return Interval(start, _month_on(start, number))


def _days(start: datetime, number: int) -> Interval:
    return Interval(start, start + timedelta(days=number))


def _year(today: datetime, year: int) -> Interval:
    start = today.replace(year=year, month=1, day=1)
    return Interval(start, start.replace(year=year + 1))
