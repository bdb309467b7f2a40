"""The wordings of first-person English that the grammar knows, one pattern each.

A pattern matches a whole clause in plain form. The group ``v`` is the value, or a list of values, and ``k``
the member of a family of attributes, as in favourite.<k>. The first pattern that gives a value wins.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from persona_sdk.memory.vocabulary import (
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

Accepts: TypeAlias = Callable[[str, str], bool]  # value, clause


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
        r"(?i)(?:your|his|their|to (?:know|see|ask|say|hear|think|add|have|get)|the (?:idea|way|fact|sound"
        r"|look)"
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
_FAMILY = (
    r"(?:kids?|child|children|sons?|daughters?|brothers?|sisters?|siblings?|twins|grandchildren|nieces?"
    r"|nephews?)"
)
_UNIT = r"(?:metric|imperial|celsius|fahrenheit|kilomet(?:er|re)s|miles)"


def _national(value: str, clause: str) -> bool:
    return is_nationality(value)


def _with_a_job(value: str, clause: str) -> bool:
    job = re.search(r"(?i)\b(?:an?|the) (.+?) (?:at|for|with) ", clause)
    return a_name(value, clause) and job is not None and is_occupation(job.group(1))


PATTERNS: tuple[Pattern, ...] = (
    _p(
        "lives_in",
        rf"(?:{_AM} (?:living|based)|{_I} (?:live|reside)|{_HAVE} (?:lived|been living)) in {_V}",
        "lives in",
        a_place,
        strength=0.9,
    ),
    _p(
        "lives_in",
        rf"(?:{_HAVE}|{_AM}|{_I}) (?:moved|moving|relocated|relocating)(?: back| over)?"
        rf"(?: from .+?)? to {_V}(?: from .+)?",
        "lives in",
        a_place,
        strength=0.9,
    ),
    _p("comes_from", rf"(?:{_AM}(?: originally)?|{_I} come) from {_V}", "comes from", a_place),
    _p(
        "comes_from",
        rf"{_I} (?:grew up|(?:was|were) (?:born and raised|born|raised)) in {_V}",
        "comes from",
        a_place,
    ),
    _p(
        "birthday",
        rf"my birthday (?:is|falls)(?: on)? {_DATE}{_V}",
        "'s birthday is",
        timed=False,
        strength=0.9,
    ),
    _p("birthday", rf"{_I} was born (?:on|in) {_DATE}{_V}", "was born on", timed=False, strength=0.9),
    _p("name", rf"my (?:full |real |first )?name(?: is|'s) {_V}", "'s name is", a_name, strength=0.95),
    _p(
        "preferred_name",
        r"(?:please |you can )*call me (?P<v>[\w'-]+)(?: instead)?",
        "wants to be called",
        a_call,
        strength=0.9,
    ),
    _p(
        "preferred_name",
        rf"(?:(?:everyone|people|my friends|friends) calls? me|{_I} go by|my nickname is)"
        rf" {_V}",
        "wants to be called",
        a_call,
        strength=0.9,
    ),
    _p("pronouns", r"my pronouns are (?P<v>\w+(?:/\w+){1,2})", "'s pronouns are"),
    _p(
        "age",
        rf"(?:{_AM}|{_I}(?: have)? turned|my age is) (?P<v>\d{{1,3}})(?:[ -]years?[ -]old| yo| years"
        rf" of age)?",
        "is aged",
        an_age,
        strength=0.85,
    ),
    _p("marital_status", rf"(?:{_AM}|{_I} got) (?:happily )?(?P<v>{MARITAL})(?: to .+)?", "is"),
    _p("nationality", rf"{_AM} (?P<v>\w+(?: \w+)?)(?: citizen| national)?", "is", _national),
    _p("diet", rf"(?:{_AM}|{_I} (?:became|went|turned))(?: an?)? (?P<v>{DIETS})", "is", strength=0.9),
    _p("diet", rf"{_I} (?:follow an?|eat)? (?P<v>{DIETS})(?: diet)?", "is", strength=0.9),
    _p(
        "allergic_to",
        rf"(?:{_AM} (?:\w+ly )?allergic to|{_I} have an? (?:\w+ )?allergy to) {_V}",
        "is allergic to",
        many=True,
        strength=0.95,
    ),
    _p("allergic_to", rf"{_I} have an? (?P<v>\w+) allergy", "is allergic to", strength=0.95),
    _p(
        "has_condition",
        rf"{_I} (?:have|suffer from|(?:was|have been) diagnosed with) (?P<v>{CONDITIONS})",
        "has",
        strength=0.9,
    ),
    _p("has_condition", rf"{_AM} (?P<v>{STATES})", "is", strength=0.9),
    _p(
        "employer",
        rf"(?:{_I} work|{_HAVE} worked|{_AM} working|{_HAVE} been working) (?:at|for) {_V}",
        "works for",
        a_name,
    ),
    _p("employer", rf"(?:{_AM}|{_I} work as) (?:an?|the) .+? (?:at|for|with) {_V}", "works for", _with_a_job),
    _p(
        "employer",
        rf"(?:{_HAVE}|{_I}) (?:started at|started working (?:at|for)|joined) {_V}",
        "works for",
        a_name,
    ),
    _p(
        "job",
        rf"(?:{_AM}(?: working as)?|{_I} work(?: (?:full|part)[- ]time)? as|{_I} became|{_HAVE} become"
        rf"|{_I} (?:got an? (?:new )?job|started(?: working)?) as|my (?:job|occupation|profession) is(?:"
        rf" being)?"
        rf"|{_HAVE} been(?: working as)?) (?:an?|the) {_V}(?: (?:at|for|in|with|from|by|and|here) .+)?",
        "is",
        a_job,
    ),
    _p("job", rf"my (?:job|occupation|profession) is {_V}", "is", a_job),
    _p(
        "relation",
        rf"my (?:\w+ )?(?P<k>{_KIN})(?:'s name(?: is|'s)| is called| is named|'s called) {_V}",
        "'s {k} is called",
        a_name,
        strength=0.9,
    ),
    _p(
        "relation", rf"my (?:\w+ )?(?P<k>{_KIN}),? (?-i:(?P<v>[A-Z][\w'-]+)),? .+", "'s {k} is called", a_name
    ),
    _p(
        "has_pet",
        rf"{_I} (?:have|own|adopted|got)(?: got)? (?:an?|one) (?:[\w-]+ )?(?P<k>{_PET}) (?:named"
        rf"|called) {_V}",
        "has a {k} called",
        a_name,
    ),
    _p(
        "has_pet",
        rf"my (?P<k>{_PET})(?:'s name is| is called| is named|'s called) {_V}",
        "has a {k} called",
        a_name,
    ),
    _p(
        "has_pet",
        rf"{_I} (?:have|own|adopted|got)(?: got)? (?P<v>(?:\w+ ){{1,3}}?{_PET}"
        rf"(?:(?:,| and|, and) (?:\w+ ){{1,3}}?{_PET})*)",
        "has",
        many=True,
    ),
    _p("family", rf"{_I} have(?: got)? (?P<v>{_SOME}(?: \w+)? {_FAMILY})", "has"),
    _p("native_language", r"my (?:native|first) (?:language|tongue) is (?P<v>\w+)", "'s native language is"),
    _p("native_language", rf"{_AM} an? native (?P<v>\w+) speaker", "'s native language is"),
    _p(
        "speaks",
        rf"(?:{_I} speak(?: fluent| some| a little)?|{_AM} fluent in) {_V}(?: fluently)?",
        "speaks",
        a_name,
        many=True,
    ),
    _p("learns", rf"(?:{_AM}|{_HAVE} been) (?:learning|studying) {_V}", "is learning", a_name),
    _p(
        "units",
        rf"{_I} (?:prefer|use|like|want|think in)(?: to use| using)?(?: the)? (?P<v>{_UNIT})"
        r"(?: units?| system| measurements?)?(?: (?:to|over|instead of|rather than) .+)?",
        "prefers",
        strength=0.9,
    ),
    _p(
        "timezone",
        rf"(?:my time ?zone is|{_AM} in the) (?P<v>[\w/+:-]+?)(?: time ?zone)?",
        "'s time zone is",
        a_name,
    ),
    _p(
        "email",
        r"my e-?mail(?: address)? is (?P<v>[^\s@]{1,64}@[^\s@]{1,255})",
        "'s email address is",
        strength=0.9,
    ),
    _p(
        "phone",
        r"my (?:phone|mobile|cell)(?: number)? is (?P<v>\+?[\d ()-]{5,20})",
        "'s phone number is",
        strength=0.9,
    ),
    _p(
        "favourite",
        rf"my (?:all[- ]time )?favou?rite (?P<k>\w+(?: \w+)?) (?:is|are|has always been) {_V}",
        "'s favourite {k} is",
    ),
    *(
        _p("likes", rf"{_I} {verb} {_V}{tail}", third, a_thing_liked, many=True)
        for verb, third, tail in _LIKES
    ),
    _p(
        "likes",
        rf"{_AM} (?:an? )?(?:big |huge |great )?(?:fan of|into|fond of|keen on|crazy about"
        rf"|passionate about"
        rf"|obsessed with) {_V}",
        "likes",
        a_thing_liked,
        many=True,
    ),
    _p(
        "likes",
        rf"my (?:hobbies|interests|hobby|passions?)(?: are| is| include) {_V}",
        "likes",
        a_thing_liked,
        many=True,
    ),
    _p(
        "likes",
        rf"{_I} (?:hate|dislike|detest|despise|loathe|can't stand|cannot stand|can't bear) {_V}",
        "dislikes",
        a_thing_liked,
        many=True,
        flips=True,
    ),
    _p("consumes", rf"{_I} eat {_V}", "eats", many=True, denied=True),
    _p("consumes", rf"{_I} drink {_V}", "drinks", many=True, denied=True),
    _p("plays", rf"{_I} play(?: the)? (?P<v>\w+(?: \w+)?)", "plays"),
    _p(
        "studies",
        rf"(?:{_I} study|{_AM} studying|{_AM} majoring in|{_I} major in) {_V}(?: (?:at|in)"
        rf" [A-Z].*)?",
        "studies",
    ),
    _p("owns", rf"{_I} drive an? {_V}", "drives a", a_name),
)
