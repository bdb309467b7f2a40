"""Wordings of how somebody lives: family, pets, languages, ways to be reached, tastes and habits."""

from persona_sdk.memory.pattern import AM, HAVE, WHO, Pattern, V, pattern
from persona_sdk.memory.pattern_values import a_name, a_thing_liked
from persona_sdk.memory.vocabulary import RELATIONS

_KIN = "|".join(sorted(RELATIONS, key=len, reverse=True))
_PET = r"(?:dog|cat|puppy|kitten|rabbit|hamster|parrot|horse|goldfish|turtle|guinea pig|bird|snake|ferret)s?"
_LIKES = [(verb, f"{verb}s", "") for verb in ("like", "love", "enjoy", "adore")]
_LIKES += [("prefer", "prefers", r"(?: (?:over|to|rather than|instead of) .+)?")]
_SOME = r"(?:an?|one|two|three|four|five|six|\d)"
_FAMILY = (
    r"(?:kids?|child|children|sons?|daughters?|brothers?|sisters?|siblings?|twins|grandchildren|nieces?"
    r"|nephews?)"
)
_UNIT = r"(?:metric|imperial|celsius|fahrenheit|kilomet(?:er|re)s|miles)"

OF_LIFE: tuple[Pattern, ...] = (
    pattern(
        "relation",
        rf"my (?:\w+ )?(?P<k>{_KIN})(?:'s name(?: is|'s)| is called| is named|'s called) {V}",
        "'s {k} is called",
        a_name,
        strength=0.9,
    ),
    pattern(
        "relation", rf"my (?:\w+ )?(?P<k>{_KIN}),? (?-i:(?P<v>[A-Z][\w'-]+)),? .+", "'s {k} is called", a_name
    ),
    pattern(
        "has_pet",
        rf"{WHO} (?:have|own|adopted|got)(?: got)? (?:an?|one) (?:[\w-]+ )?(?P<k>{_PET}) (?:named"
        rf"|called) {V}",
        "has a {k} called",
        a_name,
    ),
    pattern(
        "has_pet",
        rf"my (?P<k>{_PET})(?:'s name is| is called| is named|'s called) {V}",
        "has a {k} called",
        a_name,
    ),
    pattern(
        "has_pet",
        rf"{WHO} (?:have|own|adopted|got)(?: got)? (?P<v>(?:\w+ ){{1,3}}?{_PET}"
        rf"(?:(?:,| and|, and) (?:\w+ ){{1,3}}?{_PET})*)",
        "has",
        many=True,
    ),
    pattern("family", rf"{WHO} have(?: got)? (?P<v>{_SOME}(?: \w+)? {_FAMILY})", "has"),
    pattern(
        "native_language", r"my (?:native|first) (?:language|tongue) is (?P<v>\w+)", "'s native language is"
    ),
    pattern("native_language", rf"{AM} an? native (?P<v>\w+) speaker", "'s native language is"),
    pattern(
        "speaks",
        rf"(?:{WHO} speak(?: fluent| some| a little)?|{AM} fluent in) {V}(?: fluently)?",
        "speaks",
        a_name,
        many=True,
    ),
    pattern("learns", rf"(?:{AM}|{HAVE} been) (?:learning|studying) {V}", "is learning", a_name),
    pattern(
        "units",
        rf"{WHO} (?:prefer|use|like|want|think in)(?: to use| using)?(?: the)? (?P<v>{_UNIT})"
        r"(?: units?| system| measurements?)?(?: (?:to|over|instead of|rather than) .+)?",
        "prefers",
        strength=0.9,
    ),
    pattern(
        "timezone",
        rf"(?:my time ?zone is|{AM} in the) (?P<v>[\w/+:-]+?)(?: time ?zone)?",
        "'s time zone is",
        a_name,
    ),
    pattern(
        "email",
        r"my e-?mail(?: address)? is (?P<v>[^\s@]{1,64}@[^\s@]{1,255})",
        "'s email address is",
        strength=0.9,
    ),
    pattern(
        "phone",
        r"my (?:phone|mobile|cell)(?: number)? is (?P<v>\+?[\d ()-]{5,20})",
        "'s phone number is",
        strength=0.9,
    ),
    pattern(
        "favourite",
        rf"my (?:all[- ]time )?favou?rite (?P<k>\w+(?: \w+)?) (?:is|are|has always been) {V}",
        "'s favourite {k} is",
    ),
    *(
        pattern("likes", rf"{WHO} {verb} {V}{tail}", third, a_thing_liked, many=True)
        for verb, third, tail in _LIKES
    ),
    pattern(
        "likes",
        rf"{AM} (?:an? )?(?:big |huge |great )?(?:fan of|into|fond of|keen on|crazy about"
        rf"|passionate about"
        rf"|obsessed with) {V}",
        "likes",
        a_thing_liked,
        many=True,
    ),
    pattern(
        "likes",
        rf"my (?:hobbies|interests|hobby|passions?)(?: are| is| include) {V}",
        "likes",
        a_thing_liked,
        many=True,
    ),
    pattern(
        "likes",
        rf"{WHO} (?:hate|dislike|detest|despise|loathe|can't stand|cannot stand|can't bear) {V}",
        "dislikes",
        a_thing_liked,
        many=True,
        flips=True,
    ),
    pattern("consumes", rf"{WHO} eat {V}", "eats", many=True, denied=True),
    pattern("consumes", rf"{WHO} drink {V}", "drinks", many=True, denied=True),
    pattern("plays", rf"{WHO} play(?: the)? (?P<v>\w+(?: \w+)?)", "plays"),
    pattern(
        "studies",
        rf"(?:{WHO} study|{AM} studying|{AM} majoring in|{WHO} major in) {V}(?: (?:at|in)"
        rf" [A-Z].*)?",
        "studies",
    ),
    pattern("owns", rf"{WHO} drive an? {V}", "drives a", a_name),
)
