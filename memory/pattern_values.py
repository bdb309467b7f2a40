"""What can be a value: a pattern finds words in a place, these functions say whether they fit there."""

import re

from persona_sdk.memory.vocabulary import NO_VALUE, NOT_A_CALL, NOT_A_PLACE, is_nationality, is_occupation


def any_value(value: str, clause: str) -> bool:
    """Whether this can be a value at all."""
    words = value.lower().split()
    return 0 < len(words) <= 8 and words[0] not in NO_VALUE


def a_name(value: str, clause: str) -> bool:
    """Whether a value can be a proper name: with a capital, unless the writer uses none at all."""
    if not any_value(value, clause) or len(value.split()) > 5 or any(c.isdigit() for c in value):
        return False
    first = re.sub(r"(?i)\A(?:the|de|la|el|los|st\.?)\s+", "", value)[:1]
    return not first.islower() or clause == clause.lower()


def a_place(value: str, clause: str) -> bool:
    """Whether a value can be the name of a place."""
    return a_name(value, clause) and value.lower().split()[0] not in NOT_A_PLACE


def a_call(value: str, clause: str) -> bool:
    """Whether somebody can want to be called so; "call me later" is about telephones."""
    return a_name(value, clause) and value.lower() not in NOT_A_CALL


def a_job(value: str, clause: str) -> bool:
    """Whether a value is an occupation; "I'm a fan" is about something else."""
    return is_occupation(value)


def a_thing_liked(value: str, clause: str) -> bool:
    """Whether a value is something to like in general, not the occasion of a remark."""
    return any_value(value, clause) and not re.match(
        r"(?i)(?:your|his|their|to (?:know|see|ask|say|hear|think|add|have|get)|the (?:idea|way|fact|sound"
        r"|look)"
        r"|this|all of|everything|when|being|talking (?:to|with) you)\b",
        value,
    )


def an_age(value: str, clause: str) -> bool:
    """Whether a number can be somebody's age."""
    return 1 <= int(value) <= 120


def a_nationality(value: str, clause: str) -> bool:
    """Whether a value is a nationality; "I am tired" is none."""
    return is_nationality(value)


def an_employer(value: str, clause: str) -> bool:
    """Whether a value can be who somebody works for: a name, in a clause that names a job before it."""
    job = re.search(r"(?i)\b(?:an?|the) (.+?) (?:at|for|with) ", clause)
    return a_name(value, clause) and job is not None and is_occupation(job.group(1))
