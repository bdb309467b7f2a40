"""The wordings of first-person English that the grammar knows, one pattern each.

A pattern matches a whole clause in plain form. The group ``v`` is the value, or a list of values, and ``k``
the member of a family of attributes, as in favourite.<k>. The first pattern that gives a value wins, so the
order matters: what somebody is comes before what somebody has and likes.
"""

from persona_sdk.memory.pattern import Pattern
from persona_sdk.memory.patterns_of_life import OF_LIFE
from persona_sdk.memory.patterns_of_person import OF_PERSON

PATTERNS: tuple[Pattern, ...] = (*OF_PERSON, *OF_LIFE)
