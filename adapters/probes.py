"""Questions to examine with: each with the right end of its answer and wrong ones.

The questions are not those of `persona_sdk.adapters.distillation_data.TRAINING`, so that what is examined is
not what was drilled. A wrong end is nothing that is true of the persona: neither of the texts that were
learned nor of what else is known. Its own values are wrong ends only where a question has one answer: who is
asked for the dog's name must not give the sister's.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from persona_sdk.adapters.statements import Fact, Statement, statement_of

HELD_OUT = ("I forgot something about myself. {question}", "Here is a question about me. {question}")

# (question, beginning of the answer, words) -> what somebody who does not know might say
Rivals: TypeAlias = Callable[[str, str, int], Sequence[str]]

_OTHERS = {  # wrong values where nothing better is offered
    "is": ("blue", "a teacher", "seven", "in Berlin", "pizza"),
    "name": ("Max", "Anna", "Charlie", "Maria", "Tom"),
    "place": ("Berlin", "a small village", "Toronto", "Cairo", "the country"),
    "work": ("a bank", "a school", "the city", "a hotel", "a museum"),
    "job": ("a pilot", "a waiter", "a lawyer", "a farmer", "a tailor"),
    "date": ("3 March", "24 August", "11 November", "30 June", "9 May"),
    "number": ("23", "35", "47", "52", "61"),
    "are": ("a pilot", "very tall", "new here", "a twin", "left-handed"),
    "do": ("an old piano", "green tea", "long walks", "two cats", "chess"),
    "": ("and nothing else", "every other week", "with great care", "for many years"),
}


@dataclass(frozen=True)
class Probe:
    """A question, the beginning of its answer, and possible ends, of which one is right."""

    question: str
    lead: str
    options: tuple[str, ...]
    right: int


def probes_of(
    texts: Sequence[str | Fact],
    *,
    known: Sequence[str | Fact] = (),
    rivals: Rivals | None = None,
    options: int = 4,
) -> list[Probe]:
    """Questions about texts that are not among those of `training_pairs`, each with wrong values as well.

    Wrong values are what `rivals` offers, then, of a question with one answer, those of other texts, then
    some from a list. The same arguments give the same probes.

    Args:
        texts: what to ask about.
        known: what else is true of the persona.
        rivals: what somebody who does not know might say.
        options: ends of a probe, at most.
    """
    statements = [statement_of(text) for text in texts]
    true = [one.value for one in (*statements, *map(statement_of, known)) if one.value]
    found = []
    for index, said in enumerate(statements):
        if not said.value:
            continue
        offered = () if rivals is None else rivals(said.question, said.stem, len(said.value.split()))
        likely = [value for value in dict.fromkeys(offered) if not _among(value, true)]
        wrong = [*likely[: options - 2], *_own(said, (*statements[index + 1 :], *statements[:index]))]
        wrong += [value for value in _OTHERS[said.form] if not _among(value, true)]
        wrong = list({value.casefold(): value for value in reversed(wrong)}.values())[::-1][: options - 1]
        right = index % (len(wrong) + 1)
        ends = (*wrong[:right], said.value, *wrong[right:])
        found += [Probe(each.format(question=said.question), said.stem, ends, right) for each in HELD_OUT]
    return found


def _own(said: Statement, others: Iterable[Statement]) -> list[str]:
    """Values of the persona itself that are wrong here: of the same kind, and true of something else."""
    others = list(others)
    right = [said.value, *(one.value for one in others if one.question == said.question)]
    return [
        one.value
        for one in others
        if said.single and one.form == said.form and one.value and not _among(one.value, right)
    ]


def _among(value: str, true: Iterable[str]) -> bool:
    """Whether a value says what one of these says, or more or less of it: "Lyon" and "Lyon, France"."""
    mine = _bare(value)
    return any(f" {mine} " in f" {one} " or f" {one} " in f" {mine} " for one in map(_bare, true))


def _bare(value: str) -> str:
    words = re.findall(r"\w+", value.casefold())
    return (
        " ".join(word for word in words if word not in ("a", "an", "the", "my", "your")) or value.casefold()
    )
