"""A text about somebody, taken apart: what can be asked about it, and what the answer is.

    text                  "The user lives in Lyon since May 2024."     as the memory's writer stores it
    in the first person   "I live in Lyon since May 2024"              as somebody writes it themselves
    stem, value, tail     "I live in", "Lyon", "since May 2024"
    question              "Where do I live?"
    answer                "You live in Lyon since May 2024."

What a `Fact` gives as its value is looked for in the sentence; without one, the wording tells where the value
begins. Texts are data: nothing here obeys one, and what cannot be taken apart is asked about as a whole.
"""

import re
from dataclasses import dataclass

from persona_sdk.adapters.questions import AM, ASKED, HAVE_CALLED, OWN, PLACED, form_of, question_of

_PERSON = {
    "i": "you",
    "me": "you",
    "my": "your",
    "mine": "yours",
    "myself": "yourself",
    "am": "are",
    "i'm": "you are",
    "i've": "you have",
    "we": "you",
    "our": "your",
    "us": "you",
}
_VERBS = frozenset(
    re.findall(
        r"\w+",
        "come collect dislike drink drive eat enjoy hate have know like live love need own play prefer read "
        "speak study teach use want watch wear work",
    )
)
_ADVERB = r"(?:often|always|never|usually|sometimes|also|still|currently|regularly|really|mostly)"
_POINT = r"(?:(?:\d{1,2} )?[A-Z][a-z]+ )?\d{4}"
_TAIL = re.compile(rf"(?P<body>.+?) (?P<tail>(?:since|in|from|until) {_POINT}(?: (?:to|until) {_POINT})?)")
_QUOTED = re.compile(r"the user said: [\"“](?P<words>.+?)[\"”]?", re.IGNORECASE)
_THIRD = re.compile(r"the user(?P<own>'s)? (?P<rest>.+)", re.IGNORECASE)
_STATES = r"(?: (?:allergic to|aged|learning|fond of|afraid of|interested in|born (?:on|in)|from))?"
_NEVER = r"(?:do not |don't |no longer |used to )?"
_DO = rf"i (?:{_ADVERB} )?{_NEVER}(?P<verb>\w+)(?: (?:{PLACED}|for|with|as|to be called))?"
_WORDINGS = tuple(
    re.compile(rf"(?P<stem>{stem}) (?P<value>.+)", re.IGNORECASE)
    for stem in (OWN, HAVE_CALLED, rf"{AM}{_STATES}", _DO)
)

_SINGLE = frozenset(("is", "name", "place", "work", "job", "date", "number"))


@dataclass(frozen=True)
class Fact:
    """A text to know. ``attribute`` and ``value`` are those of a statement, if its writer named them."""

    text: str
    attribute: str | None = None
    value: str | None = None

    @classmethod
    def of(cls, given: "str | Fact") -> "Fact":
        """A text that says no more than itself, or the fact that was given."""
        return cls(given) if isinstance(given, str) else given


@dataclass(frozen=True)
class Statement:
    """A text taken apart. ``form`` is the kind of value, for others that could stand in its place."""

    question: str
    stem: str
    value: str
    form: str
    tail: str = ""

    @property
    def answer(self) -> str:
        """The text, said to the user."""
        return f"{' '.join(filter(None, (self.stem, self.value, self.tail)))}."

    @property
    def single(self) -> bool:
        """Whether the question has one answer: one place is lived in, and much liked, or not so."""
        return self.form in _SINGLE and " not " not in self.question


def statement_of(given: str | Fact) -> Statement:
    """What can be asked about a text, and the answer."""
    fact = Fact.of(given)
    words = " ".join(fact.text.split()).rstrip(".!?; ")
    if quoted := _QUOTED.fullmatch(words):
        words = quoted["words"].rstrip(".!?; ") or words
    third = _THIRD.fullmatch(words)
    if third:
        words = f"My {third['rest']}" if third["own"] else f"I {_first_person(third['rest'])}"
    found = _at_value(words, fact.value) or _by_wording(words, told=bool(third))
    if found is None:
        return _as_a_whole(words, told=bool(third))
    stem, value, tail = found
    question = question_of(stem)
    if fact.attribute in ASKED and stem.casefold() in ("i am", "i have", "i speak", "i prefer"):
        question = ASKED[fact.attribute]
    said = _to_the_user(stem, told=bool(third)).replace("you was", "you were")
    value, tail = (_named(end) if third else to_second_person(end) for end in (value, tail))
    return Statement(question, _capital(said), value, form_of(question, stem), tail)


def to_second_person(text: str) -> str:
    """The words of somebody about themselves, said to them."""

    def turned(found: re.Match[str]) -> str:
        return _PERSON.get(found[0].lower(), found[0])

    return re.sub(r"[A-Za-z]+(?:'[A-Za-z]+)?", turned, text)


def _first_person(rest: str) -> str:
    """What follows "The user", after "I"."""
    words = rest.split()
    at = 0
    while at < len(words) - 1 and re.fullmatch(rf"{_ADVERB}|no|longer", words[at], re.IGNORECASE):
        at += 1
    words[at] = _base(words[at])
    return " ".join(words)


def _base(verb: str) -> str:
    known = {"is": "am", "was": "was", "has": "have", "does": "do", "goes": "go"}
    if verb.lower() in known:
        return known[verb.lower()]
    if verb.endswith("ies") and len(verb) > 4:
        return f"{verb[:-3]}y"
    if re.search(r"(?:ch|sh|ss|x|zz)es\Z", verb):
        return verb[:-2]
    return verb[:-1] if re.search(r"[^su]s\Z", verb) else verb


def _to_the_user(text: str, *, told: bool) -> str:
    """First person to second. Of what somebody else told, only the subject: "I Love Lucy" is a title."""
    if not told:
        return to_second_person(text)
    text = _named(text)
    for first, second in (("I am", "you are"), ("I was", "you were"), ("I", "you"), ("My", "your")):
        if re.match(rf"{first}(?: |\Z)", text):
            return f"{second}{text[len(first) :]}"
    return text


def _named(text: str) -> str:
    text = re.sub(r"\bthe user's\b", "your", text, flags=re.IGNORECASE)
    return re.sub(r"\bthe user\b", "you", text, flags=re.IGNORECASE)


def _at_value(words: str, value: str | None) -> tuple[str, str, str] | None:
    """Stem, value and tail, where the value stands last in the sentence."""
    if not value or not re.match(r"(?:i|my|i'm|our|we)\b", words, re.IGNORECASE):
        return None
    places = [*re.finditer(rf"(?<!\w){re.escape(' '.join(value.split()))}(?!\w)", words, re.IGNORECASE)]
    if not places or not (stem := words[: places[-1].start()].strip()):
        return None
    value, tail = places[-1].group(), words[places[-1].end() :].strip(" ,")
    if article := re.fullmatch(r"(.*\b(?:am|was|be|not|longer)) (an?)", stem):
        stem, value = article[1], f"{article[2]} {value}"
    return stem, value, tail


def _by_wording(words: str, *, told: bool) -> tuple[str, str, str] | None:
    """The same, where nobody says what the value is. ``told``: what follows "I" is a verb for certain."""
    cut = _TAIL.fullmatch(words)
    body, tail = (cut["body"], cut["tail"]) if cut else (words, "")
    for wording in _WORDINGS:
        if found := wording.fullmatch(body):
            verb = found.groupdict().get("verb")
            if verb is None or told or verb.lower() in _VERBS:
                return found["stem"], found["value"], tail
    return None


def _as_a_whole(words: str, *, told: bool) -> Statement:
    """The first half asks for the second."""
    said = _to_the_user(words, told=told).split()
    if told and len(said) == 2:  # "You meditate"
        return Statement("What do I do?", "You", said[1], "")
    half = max(len(said) // 2, 1)
    about = " ".join(words.split()[:half])
    question = f"What do you know about this: {about}?"
    return Statement(question, _capital(" ".join(said[:half])), " ".join(said[half:]), "")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
