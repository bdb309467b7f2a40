"""Near-duplicates: whether two statements say the same, by their angle and by the words they share.

    cosine c, overlap o = |A ∩ B| / min(|A|, |B|) of the content words A, B

    same text                                     repeated   nothing is stored, the old one was used
    c >= 0.92 and o >= 0.8, same negation,        merged     the more specific text goes on
      names and numbers, same attribute
    c >= 0.80                                     linked     both are kept, the new one names the old one
    otherwise                                     distinct

The cosine alone would merge "is allergic to nuts" with "is not allergic to nuts".
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self, TypeAlias

from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from persona_sdk.config import FrozenConfig
from persona_sdk.memory.statement import singular

Relation: TypeAlias = Literal["repeated", "merged", "linked", "distinct"]

_WORD = re.compile(r"\w+(?:'\w+)?")
_NAMED = re.compile(r"(?<!^)(?<![.!?] )\b[A-Z]\w+|\b\w*\d\w*")
_STOPWORDS = frozenset(
    _WORD.findall(
        """
        a an the and or of to in on at for with from by is are was were be been am i me my we our you
        your he she it they user user's said says that this also just very really so do does did has
        have had
        """
    )
)
_NEGATIONS = frozenset(
    _WORD.findall("not no never nor longer don't doesn't isn't didn't can't cannot without")
)


class DuplicateConfig(FrozenConfig):
    """Where two statements begin to be linked, and to be one."""

    link: float = Field(0.80, ge=-1, le=1)
    merge: float = Field(0.92, ge=-1, le=1)
    overlap: float = Field(0.8, ge=0, le=1)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.link > self.merge:
            raise ValueError("link is above merge")
        return self


@dataclass(frozen=True)
class Match:
    """How a statement relates to the nearest one that is held; ``place`` is that one's, None for none."""

    relation: Relation
    place: int | None = None
    cosine: float = 0.0


def content_words(text: str) -> list[str]:
    """The words that carry what a statement says, without plural s; negations are kept apart."""
    words = _WORD.findall(text.casefold())
    kept = [word for word in words if word not in _STOPWORDS and word not in _NEGATIONS]
    return [singular(word) for word in kept]


def overlap(a: str, b: str) -> float:
    """The share of the shorter statement's content words that the other one has."""
    first, second = set(content_words(a)), set(content_words(b))
    return len(first & second) / max(min(len(first), len(second)), 1)


def more_specific(a: str, b: str) -> bool:
    """Whether `a` says more than `b`."""
    return len(set(content_words(a))) > len(set(content_words(b)))


def relate(cosine: float, a: str, b: str, config: DuplicateConfig) -> Relation:
    """How two statements relate, given the cosine of their vectors."""
    if _normal(a) == _normal(b):
        return "repeated"
    if cosine >= config.merge and overlap(a, b) >= config.overlap and _agree(a, b):
        return "merged"
    return "linked" if cosine >= config.link else "distinct"


def nearest(
    text: str,
    vector: Float[Tensor, "d"],
    others: Sequence[str],
    matrix: Float[Tensor, "n d"],
    config: DuplicateConfig,
) -> Match:
    """How a statement relates to the others: the strongest relation, of equals the largest cosine."""
    if not others:
        return Match("distinct")
    cosines = (matrix @ vector).tolist()
    ranks: dict[Relation, int] = {"repeated": 3, "merged": 2, "linked": 1, "distinct": 0}
    found = [
        Match(relate(cosine, text, other, config), place, cosine)
        for place, (other, cosine) in enumerate(zip(others, cosines, strict=True))
    ]
    best = max(found, key=lambda match: (ranks[match.relation], match.cosine))
    return best if best.relation != "distinct" else Match("distinct")


def _normal(text: str) -> str:
    return " ".join(_WORD.findall(text.casefold()))


def _agree(a: str, b: str) -> bool:
    """Whether neither negates the other and they give no different names or numbers."""
    first, second = (set(_WORD.findall(text.casefold())) for text in (a, b))
    named, other = (set(_NAMED.findall(text)) for text in (a, b))
    differ = bool(named - other) and bool(other - named)
    return not differ and bool(first & _NEGATIONS) == bool(second & _NEGATIONS)
