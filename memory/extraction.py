"""From turns of a conversation to candidate statements about the user.

Statements are drawn from what the user says. What the assistant says counts only where the user's next turn
assents to it: "So you live in Lyon?" - "Yes." Then both turns are its sources.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from persona_sdk.memory import grammar
from persona_sdk.memory.clauses import Clause, asserted, sentences
from persona_sdk.memory.statement import Statement, Turn
from persona_sdk.memory.vocabulary import RELATIONS

MAX_CHARS = 20_000  # of one turn that rules look at; the turn itself is stored whole

_ASSENT = re.compile(
    r"\W*(?:yes|yep|yeah|yup|exactly|correct|right|true|indeed|absolutely|that's right|that is right"
    r"|that's correct"
    r"|that is correct|you're right|you got it|sure is|i do|i am|i did|i have|of course|precisely)"
    r"(?:[\s,]+(?:yes|exactly|correct|right|that's right|that's correct|indeed|i do|i am|thanks|you're"
    r" right))*\W*",
    re.IGNORECASE,
)
_TAG = re.compile(
    r",?\s*(?:right|correct|is that right|is that correct|don't you|aren't you|isn't it)\s*\?\s*\Z",
    re.IGNORECASE,
)
_ASKED = (
    (re.compile(r"\A(?:do|did) you\b", re.IGNORECASE), "I"),
    (re.compile(r"\Aare you\b", re.IGNORECASE), "I am"),
    (re.compile(r"\Ahave you\b", re.IGNORECASE), "I have"),
)
_FIRST_PERSON = {
    "you are": "I am",
    "you're": "I'm",
    "you've": "I've",
    "yourself": "myself",
    "your": "my",
    "you": "I",
}
_SECOND = re.compile(rf"\b(?:{'|'.join(sorted(_FIRST_PERSON, key=len, reverse=True))})\b", re.IGNORECASE)
_BEFORE = re.compile(r"\A(?:so|then|ok|okay|ah|got it|i see|if i remember correctly|i remember that|you"
    r" said|you mentioned"
                     r"|you told me|that)[\s,:.!]+", re.IGNORECASE)  # fmt: skip
_ABOUT_ME = re.compile(
    rf"\A(?:i|i'm|i've|we|we're|we've|(?:my|our)(?! (?:\w+ )?(?:{'|'.join(sorted(RELATIONS))}|friend"
    rf"|colleague)s?\b))\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Extraction:
    """What was found. ``problem``: why an extractor fell back on another one, "" if it did not."""

    statements: tuple[Statement, ...] = ()
    problem: str = ""


@runtime_checkable
class Extractor(Protocol):
    """Draws candidate statements from an excerpt of one conversation."""

    def extract(self, turns: Sequence[Turn]) -> Extraction:
        """Statements on the turns marked ``new``; the others are context."""
        ...


class RuleExtractor:
    """The grammar, and first-person sentences it does not know as they stand. English only.

    Args:
        general: also give first-person sentences that no pattern matches, for the salience gate to judge.
    """

    def __init__(self, *, general: bool = True) -> None:
        self._general = general

    def extract(self, turns: Sequence[Turn]) -> Extraction:
        """See `Extractor.extract`. The same turns give the same statements."""
        return Extraction(tuple(self._statements(turns)))

    def _statements(self, turns: Sequence[Turn]) -> Iterator[Statement]:
        for place, turn in enumerate(turns):
            if turn.role != "user" or not turn.new:
                continue
            for clause in asserted(turn.text[:MAX_CHARS], turn.echoes):
                known = list(grammar.statements(clause, turn.at, place))
                yield from known
                if not known and self._general and (found := as_said(clause, place)):
                    yield found
            before = turns[place - 1] if place else None
            if (
                before
                and before.role == "assistant"
                and before.session == turn.session
                and assents(turn.text)
            ):
                for found in _assented(before):
                    yield replace(found, turns=(place - 1, place))


def as_said(clause: Clause, turn: int) -> Statement | None:
    """A first-person clause in its own words, None if it is about something else or too short to tell."""
    if not _ABOUT_ME.match(clause.text) or len(clause.text.split()) < 4:
        return None
    strength = 0.8 if clause.explicit else 0.2
    quoted = clause.text[0].upper() + clause.text[1:]
    return Statement(f'The user said: "{quoted}"', clause.evidence, (turn,), strength=strength)


def assents(text: str) -> bool:
    """Whether a turn begins with a plain yes."""
    spans = sentences(text)
    return bool(spans) and _ASSENT.fullmatch(text[slice(*spans[0])]) is not None


def _assented(turn: Turn) -> Iterator[Statement]:
    """What a yes to this turn says: only of its last sentence, which is what a yes answers."""
    spans = sentences(turn.text[:MAX_CHARS])
    if not spans:
        return
    evidence = turn.text[slice(*spans[-1])].strip()
    said = _BEFORE.sub("", _BEFORE.sub("", _TAG.sub("", evidence).rstrip("?!. ")))
    for question, answer in _ASKED:
        said = question.sub(answer, said)
    said = _SECOND.sub(lambda found: _FIRST_PERSON[found.group().lower()], said)
    for clause in asserted(f"{said}."):
        for found in grammar.statements(clause, turn.at):
            yield replace(found, evidence=evidence)
