"""The span of time that a question speaks of, by a small grammar of English dates.

    "in 2023", "on 8 May 2023", "last week"         one date of `persona_sdk.memory.calendar_spans`
    "since 2020", "before May 2021"                 open on one side
    "between 2019 and 2021", "from May to July"     from the first to the end of the second

`parse` is pure: what "today" is, is an argument. The result is half open, ``[start, end)``, in the time zone
of the reference. May and March are months only where a number or a preposition says so: "may I" is no date.
"""

import contextlib
import re
from collections.abc import Callable
from datetime import datetime

from persona_sdk.memory.calendar_spans import ABSOLUTE, AMOUNT, BARE, MONTHS, RELATIVE, Interval, span_of

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
_AFTER_PREPOSITION = "(?:" + "|".join(rf"(?<=\b{word} )" for word in _PREPOSITIONS) + ")"
_FORMS = tuple(
    re.compile(rf"\b{form}", re.IGNORECASE)
    for form in (
        *ABSOLUTE,
        *RELATIVE,
        rf"{AMOUNT} (?P<ago>earlier|before now)\b",
        *(f"{_AFTER_PREPOSITION}{form}" for form in BARE),
    )
)
_WORTH_A_LOOK = re.compile(
    r"\b\d{1,4}(?:st|nd|rd|th)?\b|\b(?:ago|last|this|next|past|previous|coming|yesterday|today|tonight|tomorrow|"
    + "|".join(MONTHS)
    + r")\b",
    re.IGNORECASE,
)
_OPENS: dict[str, Callable[[Interval], Interval]] = {
    "since": lambda span: Interval(span.start, None),
    "after": lambda span: Interval(span.end, None),
    "before": lambda span: Interval(None, span.start),
    "until": lambda span: Interval(None, span.end),
    "till": lambda span: Interval(None, span.end),
    "by": lambda span: Interval(None, span.end),
}
_BEFORE_IT = re.compile(rf"\b({'|'.join(_OPENS)})(?: the)?(?: (?:early|late))? $", re.IGNORECASE)
_JOINS = re.compile(r" ?(?:and|to|until|till|-|–) (?:the )?", re.IGNORECASE)


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
    if opening := _BEFORE_IT.search(text[: match.start()]):
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
        if (span := span_of(match, reference)) is not None:
            return match, span
    return None


def _matches(text: str, position: int) -> list[re.Match[str]]:
    return [match for form in _FORMS if (match := form.search(text, position))]
