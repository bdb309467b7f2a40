"""Patterns of first-person English: from a clause to what it says about the user.

A clause is put in plain form first, and its time phrase becomes the validity, so one pattern per wording is
enough. Every pattern matches a whole clause from its beginning; what no pattern matches says nothing here.

    I no longer like coffee        likes      coffee   ended
    I don't live in Paris          lives_in   Paris    negative
    I moved to Lyon in May 2024    lives_in   Lyon     positive, valid from 2024-05-01
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import TypeAlias

from persona_sdk.memory import when
from persona_sdk.memory.clauses import Clause
from persona_sdk.memory.lexicon import (
    CONDITIONS,
    DIETS,
    MARITAL,
    NO_VALUE,
    NOT_A_CALL,
    NOT_A_PLACE,
    RELATIONS,
    STATES,
    is_nationality,
    is_occupation,
)
from persona_sdk.memory.plain_form import Plain, plain, wording
from persona_sdk.memory.statement import FAMILIES, Polarity, Statement, attribute_of

Accepts: TypeAlias = Callable[[str, str], bool]  # value, clause

MAX_VALUE = 80  # characters; longer ones are sentences, not values


@dataclass(frozen=True)
class Pattern:
    """One wording of an attribute. The groups ``v`` and ``k`` are its value and the member of its family.

    ``third`` is its verb phrase in the third person. ``many`` values may be listed. ``flips``: the verb says
    the opposite of the attribute, as hate. ``timed``: a time phrase is no part of the value. ``denied``:
    only the negation says something lasting, as "I don't eat meat".
    """

    attribute: str
    regex: re.Pattern[str]
    third: str
    accepts: Accepts
    many: bool = False
    flips: bool = False
    timed: bool = True
    denied: bool = False
    strength: float = 0.8


def any_value(value: str, clause: str) -> bool:
    """Whether this can be a value at all."""
    words = value.lower().split()
    return 0 < len(words) <= 8 and words[0] not in NO_VALUE


def a_name(value: str, clause: str) -> bool:
    """Whether a value can be a proper name: with a capital, unless the writer uses none at all."""
    if not any_value(value, clause) or len(value.split()) > 5 or any(c.isdigit() for c in value):
        return False
    first = re.sub(r"(?i)\A(?:the|de|la|el|los|st\.?)\s+", "", value)[:1]
    return not first.islower() or clause == clause.lower()


def a_place(value: str, clause: str) -> bool:
    """Whether a value can be the name of a place."""
    return a_name(value, clause) and value.lower().split()[0] not in NOT_A_PLACE


def a_call(value: str, clause: str) -> bool:
    """Whether somebody can want to be called so; "call me later" is about telephones."""
    return a_name(value, clause) and value.lower() not in NOT_A_CALL


def a_job(value: str, clause: str) -> bool:
    """Whether a value is an occupation; "I'm a fan" is about something else."""
    return is_occupation(value)


def a_thing_liked(value: str, clause: str) -> bool:
    """Whether a value is something to like in general, not the occasion of a remark."""
    return any_value(value, clause) and not re.match(
        r"(?i)(?:your|his|their|to (?:know|see|ask|say|hear|think|add|have|get)|the (?:idea|way|fact|sound|look)"
        r"|this|all of|everything|when|being|talking (?:to|with) you)\b",
        value,
    )


def an_age(value: str, clause: str) -> bool:
    """Whether a number can be somebody's age."""
    return 1 <= int(value) <= 120


def _p(attribute: str, regex: str, third: str, accepts: Accepts = any_value, **options: object) -> Pattern:
    compiled = re.compile(rf"\A(?:{regex})\Z", re.IGNORECASE)
    return Pattern(attribute, compiled, third, accepts, **options)  # type: ignore[arg-type]


_I = r"(?:i|we)"
_AM = rf"{_I}(?:'m| am|'re| are)"
_HAVE = rf"{_I}(?:'ve| have)"
_V = r"(?P<v>.+?)"
_KIN = "|".join(sorted(RELATIONS, key=len, reverse=True))
_PET = r"(?:dog|cat|puppy|kitten|rabbit|hamster|parrot|horse|goldfish|turtle|guinea pig|bird|snake|ferret)s?"
_DATE = r"(?=.*(?:\d|january|february|march|april|may|june|july|august|september|october|november|december))"
_LIKES = [(verb, f"{verb}s", "") for verb in ("like", "love", "enjoy", "adore")]
_LIKES += [("prefer", "prefers", r"(?: (?:over|to|rather than|instead of) .+)?")]
_SOME = r"(?:an?|one|two|three|four|five|six|\d)"
_FAMILY = r"(?:kids?|child|children|sons?|daughters?|brothers?|sisters?|siblings?|twins|grandchildren|nieces?|nephews?)"
_UNIT = r"(?:metric|imperial|celsius|fahrenheit|kilomet(?:er|re)s|miles)"


def _national(value: str, clause: str) -> bool:
    return is_nationality(value)


def _with_a_job(value: str, clause: str) -> bool:
    job = re.search(r"(?i)\b(?:an?|the) (.+?) (?:at|for|with) ", clause)
    return a_name(value, clause) and job is not None and is_occupation(job.group(1))


# fmt: off
PATTERNS: tuple[Pattern, ...] = (
    _p("lives_in", rf"(?:{_AM} (?:living|based)|{_I} (?:live|reside)|{_HAVE} (?:lived|been living)) in {_V}",
       "lives in", a_place, strength=0.9),
    _p("lives_in", rf"(?:{_HAVE}|{_AM}|{_I}) (?:moved|moving|relocated|relocating)(?: back| over)?"
       rf"(?: from .+?)? to {_V}(?: from .+)?", "lives in", a_place, strength=0.9),
    _p("comes_from", rf"(?:{_AM}(?: originally)?|{_I} come) from {_V}", "comes from", a_place),
    _p("comes_from", rf"{_I} (?:grew up|(?:was|were) (?:born and raised|born|raised)) in {_V}", "comes from", a_place),
    _p("birthday", rf"my birthday (?:is|falls)(?: on)? {_DATE}{_V}", "'s birthday is", timed=False, strength=0.9),
    _p("birthday", rf"{_I} was born (?:on|in) {_DATE}{_V}", "was born on", timed=False, strength=0.9),
    _p("name", rf"my (?:full |real |first )?name(?: is|'s) {_V}", "'s name is", a_name, strength=0.95),
    _p("preferred_name", r"(?:please |you can )*call me (?P<v>[\w'-]+)(?: instead)?", "wants to be called", a_call,
       strength=0.9),
    _p("preferred_name", rf"(?:(?:everyone|people|my friends|friends) calls? me|{_I} go by|my nickname is) {_V}",
       "wants to be called", a_call, strength=0.9),
    _p("pronouns", r"my pronouns are (?P<v>\w+(?:/\w+){1,2})", "'s pronouns are"),
    _p("age", rf"(?:{_AM}|{_I}(?: have)? turned|my age is) (?P<v>\d{{1,3}})(?:[ -]years?[ -]old| yo| years of age)?",
       "is aged", an_age, strength=0.85),
    _p("marital_status", rf"(?:{_AM}|{_I} got) (?:happily )?(?P<v>{MARITAL})(?: to .+)?", "is"),
    _p("nationality", rf"{_AM} (?P<v>\w+(?: \w+)?)(?: citizen| national)?", "is", _national),
    _p("diet", rf"(?:{_AM}|{_I} (?:became|went|turned))(?: an?)? (?P<v>{DIETS})", "is", strength=0.9),
    _p("diet", rf"{_I} (?:follow an?|eat)? (?P<v>{DIETS})(?: diet)?", "is", strength=0.9),
    _p("allergic_to", rf"(?:{_AM} (?:\w+ly )?allergic to|{_I} have an? (?:\w+ )?allergy to) {_V}",
       "is allergic to", many=True, strength=0.95),
    _p("allergic_to", rf"{_I} have an? (?P<v>\w+) allergy", "is allergic to", strength=0.95),
    _p("has_condition", rf"{_I} (?:have|suffer from|(?:was|have been) diagnosed with) (?P<v>{CONDITIONS})", "has",
       strength=0.9),
    _p("has_condition", rf"{_AM} (?P<v>{STATES})", "is", strength=0.9),
    _p("employer", rf"(?:{_I} work|{_HAVE} worked|{_AM} working|{_HAVE} been working) (?:at|for) {_V}", "works for", a_name),
    _p("employer", rf"(?:{_AM}|{_I} work as) (?:an?|the) .+? (?:at|for|with) {_V}", "works for", _with_a_job),
    _p("employer", rf"(?:{_HAVE}|{_I}) (?:started at|started working (?:at|for)|joined) {_V}", "works for", a_name),
    _p("job", rf"(?:{_AM}(?: working as)?|{_I} work(?: (?:full|part)[- ]time)? as|{_I} became|{_HAVE} become"
       rf"|{_I} (?:got an? (?:new )?job|started(?: working)?) as|my (?:job|occupation|profession) is(?: being)?"
       rf"|{_HAVE} been(?: working as)?) (?:an?|the) {_V}(?: (?:at|for|in|with|from|by|and|here) .+)?", "is", a_job),
    _p("job", rf"my (?:job|occupation|profession) is {_V}", "is", a_job),
    _p("relation", rf"my (?:\w+ )?(?P<k>{_KIN})(?:'s name(?: is|'s)| is called| is named|'s called) {_V}",
       "'s {k} is called", a_name, strength=0.9),
    _p("relation", rf"my (?:\w+ )?(?P<k>{_KIN}),? (?-i:(?P<v>[A-Z][\w'-]+)),? .+", "'s {k} is called", a_name),
    _p("has_pet", rf"{_I} (?:have|own|adopted|got)(?: got)? (?:an?|one) (?:[\w-]+ )?(?P<k>{_PET}) (?:named|called) {_V}",
       "has a {k} called", a_name),
    _p("has_pet", rf"my (?P<k>{_PET})(?:'s name is| is called| is named|'s called) {_V}", "has a {k} called", a_name),
    _p("has_pet", rf"{_I} (?:have|own|adopted|got)(?: got)? (?P<v>(?:\w+ ){{1,3}}?{_PET}"
       rf"(?:(?:,| and|, and) (?:\w+ ){{1,3}}?{_PET})*)", "has", many=True),
    _p("family", rf"{_I} have(?: got)? (?P<v>{_SOME}(?: \w+)? {_FAMILY})", "has"),
    _p("native_language", r"my (?:native|first) (?:language|tongue) is (?P<v>\w+)", "'s native language is"),
    _p("native_language", rf"{_AM} an? native (?P<v>\w+) speaker", "'s native language is"),
    _p("speaks", rf"(?:{_I} speak(?: fluent| some| a little)?|{_AM} fluent in) {_V}(?: fluently)?", "speaks", a_name,
       many=True),
    _p("learns", rf"(?:{_AM}|{_HAVE} been) (?:learning|studying) {_V}", "is learning", a_name),
    _p("units", rf"{_I} (?:prefer|use|like|want|think in)(?: to use| using)?(?: the)? (?P<v>{_UNIT})"
       r"(?: units?| system| measurements?)?(?: (?:to|over|instead of|rather than) .+)?", "prefers",
       strength=0.9),
    _p("timezone", rf"(?:my time ?zone is|{_AM} in the) (?P<v>[\w/+:-]+?)(?: time ?zone)?", "'s time zone is", a_name),
    _p("email", r"my e-?mail(?: address)? is (?P<v>[^\s@]{1,64}@[^\s@]{1,255})", "'s email address is", strength=0.9),
    _p("phone", r"my (?:phone|mobile|cell)(?: number)? is (?P<v>\+?[\d ()-]{5,20})", "'s phone number is", strength=0.9),
    _p("favourite", rf"my (?:all[- ]time )?favou?rite (?P<k>\w+(?: \w+)?) (?:is|are|has always been) {_V}",
       "'s favourite {k} is"),
    *(_p("likes", rf"{_I} {verb} {_V}{tail}", third, a_thing_liked, many=True) for verb, third, tail in _LIKES),
    _p("likes", rf"{_AM} (?:an? )?(?:big |huge |great )?(?:fan of|into|fond of|keen on|crazy about|passionate about"
       rf"|obsessed with) {_V}", "likes", a_thing_liked, many=True),
    _p("likes", rf"my (?:hobbies|interests|hobby|passions?)(?: are| is| include) {_V}", "likes", a_thing_liked, many=True),
    _p("likes", rf"{_I} (?:hate|dislike|detest|despise|loathe|can't stand|cannot stand|can't bear) {_V}", "dislikes",
       a_thing_liked, many=True, flips=True),
    _p("consumes", rf"{_I} eat {_V}", "eats", many=True, denied=True),
    _p("consumes", rf"{_I} drink {_V}", "drinks", many=True, denied=True),
    _p("plays", rf"{_I} play(?: the)? (?P<v>\w+(?: \w+)?)", "plays"),
    _p("studies", rf"(?:{_I} study|{_AM} studying|{_AM} majoring in|{_I} major in) {_V}(?: (?:at|in) [A-Z].*)?",
       "studies"),
    _p("owns", rf"{_I} drive an? {_V}", "drives a", a_name),
)
# fmt: on

_CUT = re.compile(
    r"\s+(?:because|since|when|while|after|before|until|if|which|who|where|as|even|except|especially|to be)\b.*",
    re.IGNORECASE | re.DOTALL,
)
_PLACE_ENDS = re.compile(r"\s+(?:with|near|for|at|and|by|on|in)\s.*", re.IGNORECASE | re.DOTALL)
_TRAILING = re.compile(
    r"[\s,]+(?:now|too|as well|a lot|very much|so much|these days|currently|anyway|right now|again|though|at the moment"
    r"|by the way|btw|already|actually|please|thanks|for now|in general|myself|most|lol|haha|you know|from now on|either"
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
    """What a clause says about its writer, by the first pattern that matches; an employer may stand with a job."""
    text, time = when.cut(clause.text, said)
    form, full = plain(text), plain(clause.text)
    introduced = _GREETED.match(clause.text) if clause.greeted else None
    if introduced and not is_nationality(introduced["v"]):
        form = Plain(f"my name is {introduced['v']}", "positive")
    found: list[Statement] = []
    for pattern in PATTERNS:
        if found and (pattern.attribute != "job" or found[0].attribute != "employer"):
            continue
        known = form if pattern.timed else full
        if match := pattern.regex.match(_trimmed(known.text)):
            then = time if pattern.timed else when.When()
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
        re.sub(r"(?i)\A(?:a (?:little|bit of)|an?|my|some|any|the(?-i:(?! [A-Z])))\s+(?=\w)", "", _trimmed(part)) for part in parts
    ]
    return [v for v in values if v and len(v) <= MAX_VALUE and pattern.accepts(v, clause)]


def _trimmed(text: str) -> str:
    while (shorter := _TRAILING.sub("", text).strip(" ,.")) != text:
        text = shorter
    return text
