"""What is worth a memory of its own: a score in [0, 1], and the repeated words of the system prompt.

    score = strength of the extractor
            + durable   words of what lasts: since, always, grew up, daughter
            + having    have, has, had
            + concrete  a name, a number or a date
            - transient words of the moment: want, think, today, going to
            - hedged    words of doubt: I think, probably

The first four count only for statements of no known attribute: a pattern of the grammar has said already
that its statement lasts. Greetings, questions and requests make no clause, so no statement, at all.
"""

import re
from collections.abc import Iterable

from pydantic import Field

from persona_sdk.config import FrozenConfig
from persona_sdk.memory.clauses import sentences
from persona_sdk.memory.statement import Statement

_DURABLE = re.compile(
    r"\b(?:own|started|began|became|work|works|study|studied|grew|always|never|usually|often|every|since"
    r"|years|teach"
    r"|graduated|retired|volunteer|training|train|manage|run|build|collect|practi[cs]e|keep|suffer|struggle"
    r"|married"
    r"|born|raised|adopted|bought|joined|founded|wrote|diagnosed|built|travel|commute|sing|paint|write|lost"
    r"|won"
    r"|husband|wife|partner|son|daughter|kids|children|mother|father|mom|dad|parents|brother|sister)\b",
    re.IGNORECASE,
)
_HAVING = re.compile(r"\b(?:have|has|had)\b|\w've\b", re.IGNORECASE)
_CONCRETE = re.compile(
    r"\d|(?<=\w )(?!I\b|I')[A-Z]\w+|\b(?:one|two|three|four|five|six|ten|twice|daily|weekly)\b"
)
_TRANSIENT = re.compile(
    r"\b(?:think|thought|guess|want|wanted|wanna|need|know|mean|meant|hope|see|saw|agree|understand|wonder"
    r"|wondering"
    r"|ask|asking|asked|looking|look|try|trying|tried|will|going|gonna|feel|feeling|sorry|glad|happy"
    r"|excited|question"
    r"|meeting|appointment|flight|deadline|exam|call|error|issue|problem|problems|bug|today|tonight"
    r"|tomorrow|yesterday|moment|minute|minutes|no idea|not sure|heard"
    r"|read|hear|appreciate|bit|little|got to|have to|'ll|idea|time|fun|great|interesting|been meaning"
    r"|forgot|just"
    r"|never (?:tried|heard|seen|thought))\b",
    re.IGNORECASE,
)
_HEDGED = re.compile(
    r"\b(?:i (?:think|guess|suppose|believe)|probably|possibly|not sure|kind of|sort of)\b", re.IGNORECASE
)
_WORD = re.compile(r"\w+(?:'\w+)?")


class SalienceConfig(FrozenConfig):
    """Weights of the score. A statement below `threshold` is not stored; the turn it came from always is."""

    threshold: float = Field(0.5, ge=0, le=1)
    durable: float = Field(0.3, ge=0, le=1)
    having: float = Field(0.15, ge=0, le=1)
    concrete: float = Field(0.15, ge=0, le=1)
    transient: float = Field(0.35, ge=0, le=1)
    hedged: float = Field(0.4, ge=0, le=1)
    max_words: int = Field(
        40, ge=1, description="longer statements of no known attribute are left in their turn"
    )


def score(statement: Statement, config: SalienceConfig) -> float:
    """How much a statement is worth remembering by itself."""
    total, said = statement.strength, statement.evidence
    if statement.attribute is None:
        total += config.durable * bool(_DURABLE.search(said))
        total += config.having * bool(_HAVING.search(said))
        total += config.concrete * bool(_CONCRETE.search(said))
        total -= config.transient * bool(_TRANSIENT.search(said))
        total -= float(len(_WORD.findall(said)) > config.max_words)
    total -= config.hedged * bool(_HEDGED.search(said))
    return min(max(total, 0.0), 1.0)


def salient(statement: Statement, config: SalienceConfig) -> bool:
    """Whether a statement passes the gate."""
    return score(statement, config) >= config.threshold


def echoes(text: str, prompts: Iterable[str], *, size: int = 4, share: float = 0.6) -> list[tuple[int, int]]:
    """The sentences of a text that repeat a prompt: `share` of their runs of `size` words occur there."""
    known: set[tuple[str, ...]] = set()
    for prompt in prompts:
        words = _words(prompt)
        known |= {run for n in range(3, size + 1) for run in _runs(words, n)}
    found = []
    for start, end in sentences(text) if known else ():
        words = _words(text[start:end])
        runs = list(_runs(words, size if len(words) >= size else 3))
        if runs and sum(run in known for run in runs) >= share * len(runs):
            found.append((start, end))
    return found


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def _runs(words: list[str], size: int) -> Iterable[tuple[str, ...]]:
    return (tuple(words[i : i + size]) for i in range(len(words) - size + 1))
