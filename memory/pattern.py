"""One wording of an attribute as a pattern, and the parts that patterns are written with."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from persona_sdk.memory.pattern_values import any_value

Accepts: TypeAlias = Callable[[str, str], bool]  # value, clause

WHO = r"(?:i|we)"
AM = rf"{WHO}(?:'m| am|'re| are)"
HAVE = rf"{WHO}(?:'ve| have)"
V = r"(?P<v>.+?)"


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


def pattern(
    attribute: str, regex: str, third: str, accepts: Accepts = any_value, **options: object
) -> Pattern:
    """A pattern of a whole clause; `options` are the other fields."""
    compiled = re.compile(rf"\A(?:{regex})\Z", re.IGNORECASE)
    return Pattern(attribute, compiled, third, accepts, **options)  # type: ignore[arg-type]
