"""The span of time that a question speaks of, by a small grammar of English dates.

    "in 2023", "since 2020", "before May 2021"      years and months, open or closed
    "on 8 May 2023", "May 8th", "2023-05-08"        days; a missing year is the last one that has begun
    "last May", "next week", "this year"            relative to the reference
    "two weeks ago", "yesterday", "last Friday"
    "between 2019 and 2021", "from May to July"     spans

`parse` is pure: what "today" is, is an argument. The result is half open, ``[start, end)``, in the time zone
of the reference. May and March are months only where a number or a preposition says so: "may I" is no date.
"""

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

MONTHS = (
    *("january", "february", "march", "april", "may", "june"),
    *("july", "august", "september", "october", "november", "december"),
)
_DAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: n for n, word in enumerate(_DIGITS)}
_NUMBERS |= {"a": 1, "an": 1, "a couple of": 2, "a few": 3}
_SEASONS = {"spring": 3, "summer": 6, "autumn": 9, "fall": 9, "winter": 12}

_MONTH = "(?P<month>" + "|".join(f"{name[:3]}(?:{name[3:]})?" for name in MONTHS) + r"|sept)\b\.?"
_YEAR = r"(?P<year>(?:19|20)\d\d)\b"
_DAY = r"(?P<day>3[01]|[12]\d|0?[1-9])(?:st|nd|rd|th)?"
_UNIT = r"(?P<unit>day|week|weekend|month|year)s?\b"
_COUNT = r"(?P<count>\d{1,3}|" + "|".join(sorted(_NUMBERS, key=len, reverse=True)) + ")"
_WHICH = r"(?P<which>last|this|next|past|previous|coming)"
_SEASON = "(?P<season>" + "|".join(_SEASONS) + r")\b"

_PREPOSITIONS = [
    "in",
    "of",
    "by",
    "to",
    "and",
    "the",
    "from",
    "since",
    "until",
    "till",
    "before",
    "after",
    "during",
    "between",
    "early",
    "late",
    "year",
]
# A bare name or number is a month or year only after one of these: "may I", "2000 books".
_AFTER_PREPOSITION = "(?:" + "|".join(rf"(?<=\b{word} )" for word in _PREPOSITIONS) + ")"

_FORMS = tuple(
    re.compile(rf"\b{form}", re.IGNORECASE)
    for form in (
        r"(?P<year>(?:19|20)\d\d)-(?P<number>0[1-9]|1[0-2])(?:-(?P<day>0[1-9]|[12]\d|3[01]))?\b",
        rf"{_DAY} (?:of )?{_MONTH}(?:,? {_YEAR})?",
        rf"{_MONTH} {_DAY}\b(?!\d)(?:,? {_YEAR})?",
        rf"{_MONTH},? (?:of )?{_YEAR}",
        rf"{_SEASON},? (?:of )?{_YEAR}",
        rf"{_COUNT} {_UNIT} (?P<ago>ago|earlier|before now)\b",
        rf"{_WHICH} {_UNIT}",
        rf"{_WHICH} {_MONTH}",
        rf"{_WHICH} {_SEASON}",
        rf"{_WHICH} (?P<weekday>{'|'.join(_DAYS)})\b",
        r"(?P<near>day before yesterday|yesterday|today|tonight|tomorrow)\b",
        rf"{_AFTER_PREPOSITION}{_YEAR}",
        rf"{_AFTER_PREPOSITION}{_MONTH}",
    )
)
_WORTH_A_LOOK = re.compile(
    r"\b\d{1,4}(?:st|nd|rd|th)?\b|\b(?:ago|last|this|next|past|previous|coming|yesterday|today|tonight|tomorrow|"
    + "|".join(MONTHS)
    + r")\b",
    re.IGNORECASE,
)
_OPENS: dict[str, Callable[["Interval"], "Interval"]] = {
    "since": lambda span: Interval(span.start, None),
    "after": lambda span: Interval(span.end, None),
    "before": lambda span: Interval(None, span.start),
    "until": lambda span: Interval(None, span.end),
    "till": lambda span: Interval(None, span.end),
    "by": lambda span: Interval(None, span.end),
}
_BEFORE_IT = re.compile(r"\b(since|after|before|until|till|by)(?: the)?(?: (?:early|late))? $", re.IGNORECASE)
_JOINS = re.compile(r" ?(?:and|to|until|till|-|–) (?:the )?", re.IGNORECASE)


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


def parse(text: str, reference: datetime) -> Interval | None:
    """The span a text speaks of, seen from `reference`; None where it names no date.

    Of several dates that are not joined to one span, the first counts.
    """
    if not _WORTH_A_LOOK.search(text):
        return None
    found = _first(text, 0, reference)
    if found is None:
        return None
    match, span = found
    opening = _BEFORE_IT.search(text[: match.start()])
    if opening and opening[1].lower() in _OPENS:
        return _OPENS[opening[1].lower()](span)
    if join := _JOINS.match(text, match.end()):
        second = _first(text, join.end(), reference)
        if second is not None and second[0].start() == join.end():
            with contextlib.suppress(ValueError):  # 29 February of another year
                return _joined(match, span, *second)
    return span


def _joined(one: re.Match[str], first: Interval, two: re.Match[str], second: Interval) -> Interval:
    """From the first to the end of the second; the one that names no year takes the other's."""
    start, end = first.start, second.end
    if start is None or end is None:
        return first
    if not one.groupdict().get("year") and two.groupdict().get("year"):
        start = start.replace(year=end.year)
        return Interval(start if start < end else start.replace(year=end.year - 1), end)
    if not two.groupdict().get("year"):
        end = end.replace(year=start.year)
        return Interval(start, end if start < end else end.replace(year=start.year + 1))
    return Interval(start, end) if start < end else first


def _first(text: str, position: int, reference: datetime) -> tuple[re.Match[str], Interval] | None:
    """The leftmost date from `position` on, the longest of those that begin there, and its span."""
    for match in sorted(_matches(text, position), key=lambda m: (m.start(), -m.end())):
        if (span := _span(match, reference)) is not None:
            return match, span
    return None


def _matches(text: str, position: int) -> list[re.Match[str]]:
    return [match for form in _FORMS if (match := form.search(text, position))]


def _span(match: re.Match[str], reference: datetime) -> Interval | None:
    """What one form means; None for a day that does not exist."""
    said = {name: value.lower() for name, value in match.groupdict().items() if value}
    today = reference.replace(hour=0, minute=0, second=0, microsecond=0)
    try:
        if "near" in said:
            shift = {"day before yesterday": -2, "yesterday": -1, "tomorrow": 1}.get(said["near"], 0)
            return _days(today + timedelta(days=shift), 1)
        if "ago" in said:
            return _ago(said["count"], said["unit"], today)
        if "which" in said:
            return _relative(said, today)
        return _absolute(said, today)
    except (ValueError, OverflowError):
        return None


def _absolute(said: dict[str, str], today: datetime) -> Interval:
    month = int(said["number"]) if "number" in said else _month_number(said)
    if month is None:
        return _year(today, int(said["year"]))
    year = int(said["year"]) if "year" in said else today.year
    start = today.replace(year=year, month=month, day=1)
    if "season" in said:
        return Interval(start, _month_on(start, 3))
    if "day" in said:
        start = start.replace(day=int(said["day"]))
    if "year" not in said and start > today:  # "in May" asked in March is the May that was
        start = start.replace(year=year - 1)
    return _days(start, 1) if "day" in said else Interval(start, _month_on(start, 1))


def _ago(count: str, unit: str, today: datetime) -> Interval:
    """A moment back, as wide as its unit is vague: "two weeks ago" is the week around that day."""
    number = _NUMBERS[count] if count in _NUMBERS else int(count)
    if unit == "day":
        return _days(today - timedelta(days=number), 1)
    if unit in ("week", "weekend"):
        return _days(today - timedelta(days=7 * number + 3), 7)
    if unit == "month":
        start = _month_on(today.replace(day=1), -number)
        return Interval(start, _month_on(start, 1))
    return _year(today, today.year - number)


def _relative(said: dict[str, str], today: datetime) -> Interval:
    shift = {"this": 0, "next": 1, "coming": 1}.get(said["which"], -1)
    if "unit" in said:
        return _unit(said["unit"], shift, today)
    if "weekday" in said:
        days = (_DAYS.index(said["weekday"]) - today.weekday()) % 7
        days = {0: days, 1: days or 7}.get(shift, days - 7)
        return _days(today + timedelta(days=days), 1)
    month = _month_number(said) or 1
    start = today.replace(month=month, day=1)
    width = 3 if "season" in said else 1
    if shift < 0 and _month_on(start, width) > today:
        start = start.replace(year=start.year - 1)
    if shift > 0 and start <= today:
        start = start.replace(year=start.year + 1)
    return Interval(start, _month_on(start, width))


def _unit(unit: str, shift: int, today: datetime) -> Interval:
    monday = today - timedelta(days=today.weekday())
    if unit == "day":
        return _days(today + timedelta(days=shift), 1)
    if unit == "week":
        return _days(monday + timedelta(days=7 * shift), 7)
    if unit == "weekend":
        return _days(monday + timedelta(days=7 * shift + 5), 2)
    if unit == "month":
        start = _month_on(today.replace(day=1), shift)
        return Interval(start, _month_on(start, 1))
    return _year(today, today.year + shift)


def _month_number(said: dict[str, str]) -> int | None:
    if "season" in said:
        return _SEASONS[said["season"]]
    name = said.get("month")
    return None if name is None else 1 + [m[:3] for m in MONTHS].index(name[:3])


def _month_on(start: datetime, months: int) -> datetime:
    years, month = divmod(start.month - 1 + months, 12)
    return start.replace(year=start.year + years, month=month + 1)


def _days(start: datetime, number: int) -> Interval:
    return Interval(start, start + timedelta(days=number))


def _year(today: datetime, year: int) -> Interval:
    start = today.replace(year=year, month=1, day=1)
    return Interval(start, start.replace(year=year + 1))
