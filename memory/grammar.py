"""From a clause of first-person English to what it says about the user.

A clause is put in plain form first, and its time phrase becomes the validity, so one pattern per wording is
enough. What no pattern of `persona_sdk.memory.patterns` matches says nothing here.

    I no longer like coffee        likes      coffee   ended
    I don't live in Paris          lives_in   Paris    negative
    I moved to Lyon in May 2024    lives_in   Lyon     positive, valid from 2024-05-01
"""

import re
from collections.abc import Iterator
from datetime import datetime

from persona_sdk.memory import when
from persona_sdk.memory.clauses import Clause
from persona_sdk.memory.pattern import Pattern
from persona_sdk.memory.pattern_values import a_place
from persona_sdk.memory.patterns import PATTERNS
from persona_sdk.memory.plain_form import Plain, plain, wording
from persona_sdk.memory.statement import FAMILIES, Polarity, Statement, attribute_of
from persona_sdk.memory.vocabulary import is_nationality

MAX_VALUE = 80  # characters; longer ones are sentences, not values

_CUT = re.compile(
    r"\s+(?:because|since|when|while|after|before|until|if|which|who|where|as|even|except|especially|to"
    r" be)\b.*",
    re.IGNORECASE | re.DOTALL,
)
_PLACE_ENDS = re.compile(r"\s+(?:with|near|for|at|and|by|on|in)\s.*", re.IGNORECASE | re.DOTALL)
_TRAILING = re.compile(
    r"[\s,]+(?:now|too|as well|a lot|very much|so much|these days|currently|anyway|right now|again|though"
    r"|at the moment"
    r"|by the way|btw|already|actually|please|thanks|for now|in general|myself|most|lol|haha|you know|from"
    r" now on|either"
    r"|at all|by heart|from home|full[- ]time|part[- ]time)\s*\Z",
    re.IGNORECASE,
)
_GREETED = re.compile(r"\A(?:[Ii]'m|[Ii] am|[Tt]his is) (?P<v>[A-Z][\w'-]+(?: [A-Z][\w'-]+)?)(?: here)?\Z")
_PAIRS = frozenset(
    ("fish and chips", "rock and roll", "mac and cheese", "bed and breakfast", "drum and bass")
)
_OPPOSITE: dict[Polarity, Polarity | None] = {"positive": "negative", "negative": None, "ended": "ended"}
_LIST = re.compile(r"\s*,\s*(?:and |or )?|\s+(?:and|or|nor|&)\s+", re.IGNORECASE)


def statements(clause: Clause, said: datetime, turn: int = 0) -> Iterator[Statement]:
    """What a clause says about its writer, by the first pattern that matches; a job may bring an employer."""
    text, time = when.cut(clause.text, said)
    form, full = plain(text), plain(clause.text)
    introduced = _GREETED.match(clause.text) if clause.greeted else None
    if introduced and not is_nationality(introduced["v"]):
        form = Plain(f"my name is {introduced['v']}", "positive")
    timed, whole = _trimmed(form.text), _trimmed(full.text)
    found: list[Statement] = []
    for pattern in PATTERNS:
        if found and (pattern.attribute != "job" or found[0].attribute != "employer"):
            continue
        if match := pattern.regex.match(timed if pattern.timed else whole):
            known, then = (form, time) if pattern.timed else (full, when.When())
            found += _of(pattern, match, known, then, clause, turn)
    yield from found


def _of(
    pattern: Pattern, found: re.Match[str], form: Plain, time: when.When, clause: Clause, turn: int
) -> Iterator[Statement]:
    """The statements of one match: one per listed value."""
    member = (found.groupdict().get("k") or "").lower().replace(" ", "_")
    attribute = f"{pattern.attribute}.{member}" if pattern.attribute in FAMILIES else pattern.attribute
    kind = attribute_of(attribute)
    polarity = _OPPOSITE[form.polarity] if pattern.flips else form.polarity
    if kind is None or polarity is None or (pattern.denied and form.polarity == "positive"):
        return
    start, phrase = time.start, time.phrase
    if form.past and time.end is not None:
        polarity = "positive"  # it was so, in a time that is known
    elif form.past:
        # The time is one when it was so, not its end.
        start, phrase = None, "" if time.span else phrase.replace("since ", "in ")
    for value in _values(pattern, found["v"], clause.text):
        shown = f"{'an' if value[0].lower() in 'aeiou' else 'a'} {value}" if attribute == "job" else value
        shown = f"{value} units" if value.lower() in ("metric", "imperial") else shown
        told = "ended" if form.past else form.polarity if pattern.flips else polarity
        text = wording(
            pattern.third.replace("{k}", member.replace("_", " ")), shown, told, past=form.past, phrase=phrase
        )
        yield Statement(
            text=text,
            evidence=clause.evidence,
            turns=(turn,),
            semantic_type=kind.semantic_type,
            attribute=attribute,
            value=value,
            polarity=polarity,
            valid_from=start,
            valid_to=time.end,
            strength=min(1.0, pattern.strength + (0.1 if clause.explicit else 0.0)),
        )


def _values(pattern: Pattern, found: str, clause: str) -> list[str]:
    whole = _CUT.sub("", found)
    whole = _PLACE_ENDS.sub("", whole) if pattern.accepts is a_place else whole
    parts = _LIST.split(whole) if pattern.many else [whole]
    if max(len(part.split()) for part in parts) > 3 or whole.lower() in _PAIRS:
        parts = [whole]  # "walking my dog and watching the sea" is no list of names
    values = [
        re.sub(
            r"(?i)\A(?:a (?:little|bit of)|an?|my|some|any|the(?-i:(?! [A-Z])))\s+(?=\w)", "", _trimmed(part)
        )
        for part in parts
    ]
    return [v for v in values if v and len(v) <= MAX_VALUE and pattern.accepts(v, clause)]


def _trimmed(text: str) -> str:
    while (shorter := _TRAILING.sub("", text).strip(" ,.")) != text:
        text = shorter
    return text
