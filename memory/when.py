"""Times in a statement, relative to when it was said: "in May 2024", "since 2019", "last year".

    phrase                       valid from          valid to
    in / since / on <point>      its first moment    -
    until <point>                -                   its first moment
    from <point> to <point>      its first moment    its first moment
    for <n> years, <n> days ago  that much before    -

Points are days, months, years, seasons and days counted from today. A month without a year is the last one,
or the next one where the clause speaks of the future. What no rule knows stays in the text.
"""

import re
from dataclasses import dataclass
from datetime import datetime, timedelta

MONTHS = [
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
]
_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?"
    r"|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)"
)
_YEAR = r"(?:19|20)\d\d"
_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_COUNT = rf"(?:\d{{1,3}}|an?|{'|'.join(_NUMBERS)}|a couple of|a few)"
_UNIT = r"(?:day|week|month|year)s?"
_SEASONS = {"winter": 1, "spring": 4, "summer": 7, "autumn": 10, "fall": 10}
_POINT = (
    rf"(?:{_YEAR}-\d\d-\d\d|{_MONTH}\.?,? (?:of )?{_YEAR}|\d{{1,2}}(?:st|nd|rd|th)?(?: of)? {_MONTH},?"
    rf" {_YEAR}"
    rf"|{_MONTH}\.? \d{{1,2}}(?:st|nd|rd|th)?,? {_YEAR}|(?:early |late |mid[- ])?{_YEAR}|{_MONTH}"
    r"|(?:last|this|next) (?:year|month|week|winter|spring|summer|autumn|fall)|yesterday|today|tomorrow"
    rf"|{_COUNT} {_UNIT} ago)"
)
_PHRASE = re.compile(
    rf"[\s,]*\b(?:(?:from|between) (?P<first>{_POINT}) (?:to|until|till|and) (?P<last>{_POINT})"
    rf"|(?:until|till|up to) (?P<until>{_POINT})"
    rf"|(?:since|in|on|as of|from|starting|back in|at the (?:start|beginning|end) of|during)"
    rf" (?P<since>{_POINT})"
    rf"|(?P<bare>(?:last|this|next) (?:year|month|week|winter|spring|summer|autumn|fall)|yesterday|today"
    rf"|tomorrow"
    rf"|{_COUNT} {_UNIT} ago)"
    rf"|for (?:about |over |almost |nearly |the (?:last|past) )?(?P<span>{_COUNT} {_UNIT}))(?![\w-])",
    re.IGNORECASE,
)
_FUTURE = re.compile(r"\b(?:moving|relocating|starting|going to|will|next|tomorrow)\b", re.IGNORECASE)


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
    start_text = part["first"] or part["since"] or part["bare"]
    start = _point(start_text, said, later) if start_text else None
    if part["span"]:
        amount, unit = part["span"].rsplit(" ", 1)
        back = _before(said.replace(hour=0, minute=0, second=0, microsecond=0), _count(amount), unit)
        start = (back, "year" if unit.startswith("year") else "day") if back else None
    end_text = part["last"] or part["until"]
    end = _point(end_text, said, later) if end_text else None
    if (start is None and end is None) or (start and end and start[0] > end[0]):
        return text, When()
    words = [f"since {_say(*start)}" if start and not end else f"from {_say(*start)}" if start else ""]
    words += [f"until {_say(*end)}" if end else ""]
    rest = f"{text[: found.start()]} {text[found.end() :]}".strip(" ,")
    return " ".join(rest.split()), When(
        start and start[0], end and end[0], " ".join(filter(None, words)), bool(part["span"])
    )


_Precise = tuple[datetime, str]


def _point(text: str, said: datetime, later: bool) -> _Precise | None:
    """The first moment of a point in time, and how precise it is."""
    text = text.lower().strip()
    midnight = said.replace(hour=0, minute=0, second=0, microsecond=0)
    days = {"yesterday": -1, "today": 0, "tomorrow": 1}
    try:
        if text in days:
            return midnight + timedelta(days=days[text]), "day"
        if text.endswith(" ago"):
            amount, unit = text.removesuffix(" ago").rsplit(" ", 1)
            moment = _before(midnight, _count(amount), unit)
            return (moment, "month" if unit.startswith(("year", "month")) else "day") if moment else None
        if text.split()[0] in ("last", "this", "next"):
            which, unit = text.split()
            return _relative(which, unit, midnight)
        if re.fullmatch(r"\d{4}-\d\d-\d\d", text):
            date = datetime.fromisoformat(text)
            return date.replace(tzinfo=said.tzinfo), "day"
        year = re.search(_YEAR, text)
        name = re.search(rf"\b{_MONTH}\b", text)
        day = re.search(r"\b(\d{1,2})(?:st|nd|rd|th)?\b", text)
        month = 1 + next(i for i, m in enumerate(MONTHS) if m.startswith(name.group()[:3])) if name else 1
        if year is None:
            gone = midnight.replace(month=month, day=1)
            shift = (1 if gone < midnight else 0) if later else (0 if gone <= midnight else -1)
            return gone.replace(year=gone.year + shift), "month"
        moment = midnight.replace(year=int(year.group()), month=month, day=int(day.group(1)) if day else 1)
        return moment, "day" if day else "month" if name else "year"
    except (ValueError, OverflowError):  # 31 June, the year 0
        return None


def _relative(which: str, unit: str, midnight: datetime) -> _Precise | None:
    step = {"last": -1, "this": 0, "next": 1}[which]
    if unit == "week":
        return midnight - timedelta(days=midnight.weekday() - 7 * step), "day"
    if unit == "month":
        months = midnight.year * 12 + midnight.month - 1 + step
        return midnight.replace(year=months // 12, month=months % 12 + 1, day=1), "month"
    if unit == "year":
        return midnight.replace(year=midnight.year + step, month=1, day=1), "year"
    season = midnight.replace(month=_SEASONS[unit], day=1)
    if step < 0 and season <= midnight:
        return season, "month"
    return season.replace(year=season.year + step), "month"


def _count(text: str) -> int:
    text = text.lower().strip()
    if text.isdigit():
        return int(text)
    return {"a couple of": 2, "a few": 3}.get(text, _NUMBERS.index(text) + 1 if text in _NUMBERS else 1)


def _before(moment: datetime, amount: int, unit: str) -> datetime | None:
    unit = unit.lower().rstrip("s")
    try:
        if unit in ("day", "week"):
            return moment - timedelta(days=amount * (7 if unit == "week" else 1))
        months = moment.year * 12 + moment.month - 1 - amount * (12 if unit == "year" else 1)
        return moment.replace(year=months // 12, month=months % 12 + 1, day=min(moment.day, 28))
    except (ValueError, OverflowError):
        return None


def _say(moment: datetime, precision: str) -> str:
    month = MONTHS[moment.month - 1].capitalize()
    if precision == "day":
        return f"{moment.day} {month} {moment.year}"
    return f"{month} {moment.year}" if precision == "month" else str(moment.year)
