"""Times in a statement, relative to when it was said: "in May 2024", "since 2019", "last year".

    phrase                       valid from          valid to
    in / since / on <point>      its first moment    -
    until <point>                -                   its first moment
    from <point> to <point>      its first moment    its first moment
    for <n> years, <n> days ago  that much before    -

Points are the dates of `persona_sdk.memory.calendar_spans`, so that a question finds the span that a
statement meant. A month without a year is the last one, or the next one where the clause speaks of the
future. What no rule knows stays in the text.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TypeAlias

from persona_sdk.memory.calendar_spans import (
    ABSOLUTE,
    AMOUNT,
    BARE,
    MONTHS,
    RELATIVE,
    back,
    midnight,
    span_of,
)


def _any_of(forms: Iterable[str]) -> str:
    """One pattern without named groups, so that it can stand in another one several times."""
    return "(?:the )?(?:" + "|".join(re.sub(r"\(\?P<\w+>", "(?:", form) for form in forms) + ")"


_VAGUE = r"(?:early |late |mid[- ])?"
_POINT = f"{_VAGUE}{_any_of((*ABSOLUTE, *RELATIVE, *BARE))}"
_PHRASE = re.compile(
    rf"[\s,]*\b(?:(?:from|between) (?P<first>{_POINT}) (?:to|until|till|and) (?P<last>{_POINT})"
    rf"|(?:until|till|up to) (?P<until>{_POINT})"
    rf"|(?:since|in|on|as of|from|starting|back in|at the (?:start|beginning|end) of|during)"
    rf" (?P<since>{_POINT})"
    rf"|(?P<bare>{_any_of(RELATIVE)})"
    rf"|for (?:about |over |almost |nearly |the (?:last|past) )?(?P<span>{_any_of([AMOUNT])}))(?![\w-])",
    re.IGNORECASE,
)
_FORMS = [re.compile(form, re.IGNORECASE) for form in (*ABSOLUTE, *RELATIVE, *BARE)]
_LEADING = re.compile(rf"\A{_VAGUE}(?:the )?", re.IGNORECASE)
_FUTURE = re.compile(r"\b(?:moving|relocating|starting|going to|will|next|tomorrow)\b", re.IGNORECASE)

_Precise: TypeAlias = tuple[datetime, str]  # a moment, and whether its day, month or year was said


@dataclass(frozen=True)
class When:
    """The validity a phrase gives. ``phrase`` says it for any later reader; ``span``: it gave a length."""

    start: datetime | None = None
    end: datetime | None = None
    phrase: str = ""
    span: bool = False


def cut(text: str, said: datetime) -> tuple[str, When]:
    """Take the first time phrase out of a clause: what is left, and what it means."""
    found = _PHRASE.search(text)
    if found is None:
        return text, When()
    later = bool(_FUTURE.search(text))
    part = found.groupdict()
    first = part["first"] or part["since"] or part["bare"]
    start = _length(part["span"], said) if part["span"] else _point(first, said, later) if first else None
    last = part["last"] or part["until"]
    end = _point(last, said, later) if last else None
    if (start is None and end is None) or (start and end and start[0] > end[0]):
        return text, When()
    words = [f"since {_say(*start)}" if start and not end else f"from {_say(*start)}" if start else ""]
    words += [f"until {_say(*end)}" if end else ""]
    rest = f"{text[: found.start()]} {text[found.end() :]}".strip(" ,")
    return " ".join(rest.split()), When(
        start and start[0], end and end[0], " ".join(filter(None, words)), bool(part["span"])
    )


def _point(text: str, said: datetime, later: bool) -> _Precise | None:
    """The first moment of a point in time, and how precise it is."""
    text = _LEADING.sub("", text.strip())
    match = next((found for form in _FORMS if (found := form.fullmatch(text))), None)
    span = None if match is None else span_of(match, said, ahead=later)
    if match is None or span is None or span.start is None or span.end is None:
        return None
    if match.groupdict().get("ago"):
        return _length(text.rpartition(" ")[0], said, rough="month")
    wide = span.end - span.start
    precision = "day" if wide <= timedelta(days=7) else "month" if wide <= timedelta(days=92) else "year"
    return span.start, precision


def _length(text: str, said: datetime, rough: str = "year") -> _Precise | None:
    """The day that lies so far back: "five years". `rough` is how precisely years are said."""
    count, _, unit = text.removeprefix("the ").rpartition(" ")
    precision = {"year": rough, "month": rough if rough == "month" else "day"}
    try:
        return back(midnight(said), count, unit), precision.get(unit.lower().removesuffix("s"), "day")
    except (ValueError, OverflowError):  # before the year 1
        return None


def _say(moment: datetime, precision: str) -> str:
    month = MONTHS[moment.month - 1].capitalize()
    if precision == "day":
        return f"{moment.day} {month} {moment.year}"
    return f"{month} {moment.year}" if precision == "month" else str(moment.year)
