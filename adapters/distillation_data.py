"""What can be asked about a text, by templates: questions to learn from, and others to be examined with.

    text                  "My favourite fruit is papaya."
    question              "What is my favourite fruit?"
    answer                "Your favourite fruit is papaya."
    stem, value           "Your favourite fruit is", "papaya"

The questions of `TRAINING` and of `HELD_OUT` differ, so that what is examined is not what was drilled. Texts
are data: nothing here obeys one, and what cannot be taken apart is asked about as a whole.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

TRAINING = ("{question}", "Do you remember? {question}", "Please tell me: {question}")
HELD_OUT = ("I forgot something about myself. {question}", "Here is a question about me. {question}")

# Prompts that have nothing to do with anybody's memory. Those of `persona_sdk.adapters.gate` are others.
ANCHORS = (
    "What is the capital of Japan?",
    "Write one sentence about rain.",
    "How many days are in a week?",
    "Name a primary colour.",
    "What do bees make?",
    "Explain what a bridge is for.",
    "Translate 'good morning' into Spanish.",
    "What is 7 plus 5?",
    "Give me a tip for sleeping better.",
    "Who wrote Hamlet?",
    "What is ice made of?",
    "Suggest a name for a small shop.",
)

# (question, beginning of the answer, words) -> what somebody who does not know might say
Rivals: TypeAlias = Callable[[str, str, int], Sequence[str]]

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
        "collect drink drive eat enjoy hate have know like love need own play prefer read speak study teach "
        "want watch wear",
    )
)
_ATTRIBUTE = re.compile(r"(?:my|our) (?P<what>.+?) (?P<be>is|are|was|were) (?P<value>.+)", re.IGNORECASE)
_BEING = re.compile(r"(?:i am|i'm) (?P<value>.+)", re.IGNORECASE)
_PLACE = re.compile(r"i (?P<verb>live|work) (?P<value>(?:in|at|on|near|for|with) .+)", re.IGNORECASE)
_DOING = re.compile(r"i (?P<verb>\w+) (?P<value>.+)", re.IGNORECASE)
_OTHERS = {  # wrong values where other texts offer none
    "is": ("blue", "a teacher", "seven", "in Berlin", "pizza"),
    "are": ("a pilot", "very tall", "new here", "a twin"),
    "do": ("an old piano", "green tea", "long walks", "two cats", "chess"),
    "at": ("in a small village", "at a bank", "near the sea", "in Toronto"),
    "": ("and nothing else", "every other week", "with great care", "for many years"),
}


@dataclass(frozen=True)
class Statement:
    """A text taken apart. ``form`` is the kind of sentence, for values that could stand in its place."""

    question: str
    stem: str
    value: str
    form: str

    @property
    def answer(self) -> str:
        """The text, said to the user."""
        return f"{self.stem} {self.value}.".strip()


@dataclass(frozen=True)
class Probe:
    """A question, the beginning of its answer, and possible ends, of which one is right."""

    question: str
    lead: str
    options: tuple[str, ...]
    right: int


def statement_of(text: str) -> Statement:
    """What can be asked about a text, and the answer."""
    words = " ".join(text.split()).rstrip(".!?; ")
    if found := _ATTRIBUTE.fullmatch(words):
        what, be = to_second_person(found["what"]), found["be"].lower()
        value = to_second_person(found["value"])
        return Statement(f"What {be} my {found['what']}?", f"Your {what} {be}", value, "is")
    if found := _BEING.fullmatch(words):
        return Statement("Who am I?", "You are", to_second_person(found["value"]), "are")
    if found := _PLACE.fullmatch(words):
        verb = found["verb"].lower()
        return Statement(f"Where do I {verb}?", f"You {verb}", to_second_person(found["value"]), "at")
    if (found := _DOING.fullmatch(words)) and found["verb"].lower() in _VERBS:
        verb = found["verb"].lower()
        return Statement(f"What do I {verb}?", f"You {verb}", to_second_person(found["value"]), "do")
    said = to_second_person(words).split()
    half = max(len(said) // 2, 1)
    about = " ".join(words.split()[:half])
    question = f"What do you know about this: {about}?"
    return Statement(question, _capital(" ".join(said[:half])), " ".join(said[half:]), "")


def to_second_person(text: str) -> str:
    """The words of somebody about themselves, said to them."""

    def turned(found: re.Match[str]) -> str:
        return _PERSON.get(found[0].lower(), found[0])

    return re.sub(r"[A-Za-z]+(?:'[A-Za-z]+)?", turned, text)


def training_pairs(text: str) -> list[tuple[str, str]]:
    """Questions about a text with their answer."""
    said = statement_of(text)
    return [(template.format(question=said.question), said.answer) for template in TRAINING]


def paraphrases(text: str) -> list[str]:
    """The text as it stands, and said to the user."""
    return list(dict.fromkeys([" ".join(text.split()), statement_of(text).answer]))


def probes_of(texts: Sequence[str], *, rivals: Rivals | None = None, options: int = 4) -> list[Probe]:
    """Questions about texts that are not among those of `training_pairs`, each with wrong values as well.

    Wrong values are what `rivals` offers, then those of other texts of the same form, then some from a list.
    The same texts give the same probes.
    """
    statements = [statement_of(text) for text in texts]
    found = []
    for index, said in enumerate(statements):
        if not said.value:
            continue
        offered = () if rivals is None else rivals(said.question, said.stem, len(said.value.split()))
        others = [s.value for s in (*statements[index + 1 :], *statements[:index]) if s.form == said.form]
        right_ones = {said.value.casefold()}
        wrong = [
            value
            for value in dict.fromkeys([*offered[: options - 2], *others, *_OTHERS[said.form]])
            if value.casefold() not in right_ones
        ][: options - 1]
        right = index % (len(wrong) + 1)
        ends = (*wrong[:right], said.value, *wrong[right:])
        found += [Probe(each.format(question=said.question), said.stem, ends, right) for each in HELD_OUT]
    return found


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
