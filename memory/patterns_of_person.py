"""Wordings of who somebody is: places, names, age, health and work."""

from persona_sdk.memory.pattern import AM, HAVE, WHO, Pattern, V, pattern
from persona_sdk.memory.pattern_values import (
    a_call,
    a_job,
    a_name,
    a_nationality,
    a_place,
    an_age,
    an_employer,
)
from persona_sdk.memory.vocabulary import CONDITIONS, DIETS, MARITAL, STATES

_DATE = r"(?=.*(?:\d|january|february|march|april|may|june|july|august|september|october|november|december))"

OF_PERSON: tuple[Pattern, ...] = (
    pattern(
        "lives_in",
        rf"(?:{AM} (?:living|based)|{WHO} (?:live|reside)|{HAVE} (?:lived|been living)) in {V}",
        "lives in",
        a_place,
        strength=0.9,
    ),
    pattern(
        "lives_in",
        rf"(?:{HAVE}|{AM}|{WHO}) (?:moved|moving|relocated|relocating)(?: back| over)?"
        rf"(?: from .+?)? to {V}(?: from .+)?",
        "lives in",
        a_place,
        strength=0.9,
    ),
    pattern("comes_from", rf"(?:{AM}(?: originally)?|{WHO} come) from {V}", "comes from", a_place),
    pattern(
        "comes_from",
        rf"{WHO} (?:grew up|(?:was|were) (?:born and raised|born|raised)) in {V}",
        "comes from",
        a_place,
    ),
    pattern(
        "birthday",
        rf"my birthday (?:is|falls)(?: on)? {_DATE}{V}",
        "'s birthday is",
        timed=False,
        strength=0.9,
    ),
    pattern("birthday", rf"{WHO} was born (?:on|in) {_DATE}{V}", "was born on", timed=False, strength=0.9),
    pattern("name", rf"my (?:full |real |first )?name(?: is|'s) {V}", "'s name is", a_name, strength=0.95),
    pattern(
        "preferred_name",
        r"(?:please |you can )*call me (?P<v>[\w'-]+)(?: instead)?",
        "wants to be called",
        a_call,
        strength=0.9,
    ),
    pattern(
        "preferred_name",
        rf"(?:(?:everyone|people|my friends|friends) calls? me|{WHO} go by|my nickname is)"
        rf" {V}",
        "wants to be called",
        a_call,
        strength=0.9,
    ),
    pattern("pronouns", r"my pronouns are (?P<v>\w+(?:/\w+){1,2})", "'s pronouns are"),
    pattern(
        "age",
        rf"(?:{AM}|{WHO}(?: have)? turned|my age is) (?P<v>\d{{1,3}})(?:[ -]years?[ -]old| yo| years"
        rf" of age)?",
        "is aged",
        an_age,
        strength=0.85,
    ),
    pattern("marital_status", rf"(?:{AM}|{WHO} got) (?:happily )?(?P<v>{MARITAL})(?: to .+)?", "is"),
    pattern("nationality", rf"{AM} (?P<v>\w+(?: \w+)?)(?: citizen| national)?", "is", a_nationality),
    pattern("diet", rf"(?:{AM}|{WHO} (?:became|went|turned))(?: an?)? (?P<v>{DIETS})", "is", strength=0.9),
    pattern("diet", rf"{WHO} (?:follow an?|eat)? (?P<v>{DIETS})(?: diet)?", "is", strength=0.9),
    pattern(
        "allergic_to",
        rf"(?:{AM} (?:\w+ly )?allergic to|{WHO} have an? (?:\w+ )?allergy to) {V}",
        "is allergic to",
        many=True,
        strength=0.95,
    ),
    pattern("allergic_to", rf"{WHO} have an? (?P<v>\w+) allergy", "is allergic to", strength=0.95),
    pattern(
        "has_condition",
        rf"{WHO} (?:have|suffer from|(?:was|have been) diagnosed with) (?P<v>{CONDITIONS})",
        "has",
        strength=0.9,
    ),
    pattern("has_condition", rf"{AM} (?P<v>{STATES})", "is", strength=0.9),
    pattern(
        "employer",
        rf"(?:{WHO} work|{HAVE} worked|{AM} working|{HAVE} been working) (?:at|for) {V}",
        "works for",
        a_name,
    ),
    pattern(
        "employer", rf"(?:{AM}|{WHO} work as) (?:an?|the) .+? (?:at|for|with) {V}", "works for", an_employer
    ),
    pattern(
        "employer",
        rf"(?:{HAVE}|{WHO}) (?:started at|started working (?:at|for)|joined) {V}",
        "works for",
        a_name,
    ),
    pattern(
        "job",
        rf"(?:{AM}(?: working as)?|{WHO} work(?: (?:full|part)[- ]time)? as|{WHO} became|{HAVE} become"
        rf"|{WHO} (?:got an? (?:new )?job|started(?: working)?) as|my (?:job|occupation|profession) is(?:"
        rf" being)?"
        rf"|{HAVE} been(?: working as)?) (?:an?|the) {V}(?: (?:at|for|in|with|from|by|and|here) .+)?",
        "is",
        a_job,
    ),
    pattern("job", rf"my (?:job|occupation|profession) is {V}", "is", a_job),
)
