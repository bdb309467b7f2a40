"""What was said, and what it says about the user: a turn, and a statement drawn from it.

A statement may fill a slot, the name under which its rivals are found:

    attribute   values at one time   slot                     example
    lives_in    one                  lives_in                 The user lives in Lyon.
    likes       many                 likes.<value>            The user likes coffee.
    none        -                    none                     The user said: "I am training for a marathon."

So "no longer likes coffee" and "likes coffee" are rivals for ``likes.coffee``, while "likes tea" is none.
"""

import hashlib
import re
import unicodedata
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, TypeAlias

from persona_sdk.memory.cube import Sensitivity

Role: TypeAlias = Literal["user", "assistant", "tool"]
Polarity: TypeAlias = Literal["positive", "negative", "ended"]

MAX_SLUG = 48


@dataclass(frozen=True)
class Attribute:
    """What is fixed about an attribute. ``single``: a person has one value of it at a time."""

    single: bool = False
    semantic_type: str = "fact"
    sensitivity: Sensitivity = "normal"


_PERSONAL = Attribute(single=True, sensitivity="personal")
_SPECIAL = Attribute(sensitivity="special")
_PREFERENCE = Attribute(semantic_type="preference")

ATTRIBUTES: dict[str, Attribute] = {
    **dict.fromkeys(("name", "lives_in", "comes_from", "age", "birthday", "email", "phone"), _PERSONAL),
    **dict.fromkeys(("job", "employer", "marital_status", "nationality"), _PERSONAL),
    **dict.fromkeys(("native_language", "timezone"), Attribute(single=True)),
    **dict.fromkeys(("preferred_name", "units", "diet"), Attribute(single=True, semantic_type="preference")),
    "pronouns": Attribute(single=True, semantic_type="preference", sensitivity="personal"),
    **dict.fromkeys(("allergic_to", "has_condition"), _SPECIAL),
    **dict.fromkeys(("likes", "consumes"), _PREFERENCE),
    **dict.fromkeys(("speaks", "learns", "plays", "studies", "owns"), Attribute()),
    **dict.fromkeys(("has_pet", "family"), Attribute(sensitivity="personal")),
}

# Families of attributes, each member with one value: relation.wife, favourite.colour.
FAMILIES = {
    "relation": _PERSONAL,
    "favourite": Attribute(single=True, semantic_type="preference"),
}


@dataclass(frozen=True)
class Turn:
    """One message of a conversation, as an extractor sees it.

    ``new`` marks the turns that statements are wanted from; the others are context. ``echoes`` are spans of
    the text that repeat the system prompt, so they are not the user's own words.
    """

    role: Role
    text: str
    at: datetime
    session: str = ""
    new: bool = True
    echoes: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Statement:
    """A candidate for memory. ``evidence`` occurs verbatim in the turn it was drawn from.

    ``turns`` are the positions of the turns it stands on, first the one with the evidence; ``strength`` in
    [0, 1] is how sure its extractor is that this is a lasting statement about the user.
    """

    text: str
    evidence: str
    turns: tuple[int, ...] = (0,)
    semantic_type: str = "fact"
    attribute: str | None = None
    value: str | None = None
    polarity: Polarity = "positive"
    valid_from: datetime | None = None
    valid_to: datetime | None = None
    strength: float = 0.5

    @property
    def slot(self) -> str | None:
        """The slot it fills, None for a statement of no known attribute."""
        return slot_of(self.attribute, self.value)


def attribute_of(name: str | None) -> Attribute | None:
    """What is fixed about an attribute, None if there is no such one."""
    if name is None:
        return None
    family, dot, member = name.partition(".")
    if dot:
        return FAMILIES.get(family) if re.fullmatch(r"[a-z][a-z0-9_]{0,31}", member) else None
    return ATTRIBUTES.get(name)


def slot_of(attribute: str | None, value: str | None) -> str | None:
    """The slot of a value of an attribute; None without either, or for an unknown attribute."""
    known = attribute_of(attribute)
    if known is None or attribute is None or not value:
        return None
    return attribute if known.single else f"{attribute}.{slug(value)}"


def slug(value: str) -> str:
    """A value as a part of a slot: plain words, without articles and the plural s.

    What has no Latin letters or digits, or is too long, is named by its hash.
    """
    plain = unicodedata.normalize("NFKD", value.casefold())
    words = re.findall(r"[a-z0-9]+", "".join(c for c in plain if not unicodedata.combining(c)))
    kept = [w for w in words if w not in ("a", "an", "the", "to", "my", "some", "all")] or words
    name = "_".join(map(singular, kept))
    letters = "".join(c for c in plain if c.isalnum())
    if not name or len(name) > MAX_SLUG or (letters and not letters.isascii() and len(words) == 0):
        return f"x{hashlib.sha256(plain.encode()).hexdigest()[:16]}"
    return name


def singular(word: str) -> str:
    """A word without a plural s, as far as its letters tell; "bus" and "boss" stay."""
    return word[:-1] if len(word) > 3 and word.endswith("s") and word[-2] not in "isu" else word
