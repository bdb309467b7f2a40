"""Personas in one string: the names under which another server offers them.

name        ids of         what it is
alice                      alice and all her groups, as `Persona.chat` composes them
alice+cooks                alice and, of her groups, only cooks
cooks                      the group alone
alice@weight=0.5           every attachment at half its strength
alice@cooks/tone=0.5       one attachment at half its strength
alice@concise=0.7,detailed=0.3         a preference, for adapter families that have one
alice#1c9a44c2b07e1d35     only while this is her version: a name that never changes its meaning

name = id *("+" id) ["@" setting *("," setting)] ["#" 16 hex digits];   "+" and "@" inside an id: %2B, %40
"""

import re
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import unquote

from persona_sdk.adapter_composition import Adjustment
from persona_sdk.config import validate_id
from persona_sdk.errors import InvalidInputError
from persona_sdk.library import split_name

VERSION_DIGITS = 16
_MAX_NAME = 1024

_NUMBER = re.compile(r"-?[0-9]{1,6}(\.[0-9]{1,9})?", re.ASCII)
_VERSION = re.compile(rf"[0-9a-f]{{{VERSION_DIGITS}}}")
_PREFERENCE = re.compile(r"[A-Za-z_][A-Za-z0-9_\-]{0,63}", re.ASCII)


class NotANameError(InvalidInputError):
    """The string follows another grammar: it may be meant for somebody else."""


@dataclass(frozen=True, kw_only=True)
class PersonaName:
    """A parsed name; the grammar is in the module's docstring.

    ``groups=None`` takes all groups of the persona, ``version=None`` the newest version.
    """

    persona: str
    groups: tuple[str, ...] | None = None
    adjust: Adjustment = field(default_factory=Adjustment)
    version: str | None = None

    @classmethod
    def parse(cls, name: str) -> Self:
        """Parse a name.

        Raises:
            NotANameError: it is none.
            InvalidInputError: it is one, with a strength that is out of range.
        """
        if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME:
            raise _refused(name)
        rest, mark, version = name.partition("#")
        ids, at, settings = rest.partition("@")
        if mark and not _VERSION.fullmatch(version):
            raise _refused(name)
        try:
            persona, *groups = (validate_id(_unquoted(text)) for text in ids.split("+"))
            if len({persona, *groups}) != 1 + len(groups):
                raise _refused(name)
            numbers = _numbers(settings) if at else {}
            weight = numbers.pop("weight", 1.0)
            weights = {"/".join(split_name(_unquoted(key))): numbers[key] for key in numbers if "/" in key}
            preference = {key: value for key, value in numbers.items() if "/" not in key}
            if not all(map(_PREFERENCE.fullmatch, preference)):
                raise _refused(name)
        except ValueError as error:  # our own InvalidInputError too
            raise _refused(name) from error
        adjust = Adjustment(weight=weight, weights=weights, preference=preference)
        return cls(persona=persona, groups=tuple(groups) or None, adjust=adjust, version=version or None)


def _unquoted(text: str) -> str:
    return unquote(text, errors="strict")


def _numbers(settings: str) -> dict[str, float]:
    """``"a=1,b=0.5"`` as a mapping, sorted, so that the order of settings makes no version of its own."""
    numbers: dict[str, float] = {}
    for setting in settings.split(","):
        key, _, value = setting.partition("=")
        if not _NUMBER.fullmatch(value) or key in numbers:
            raise ValueError(f"{setting!r} sets nothing, or sets it again")
        numbers[key] = float(value)
    return dict(sorted(numbers.items()))


def _refused(name: object) -> NotANameError:
    return NotANameError(
        f"{name!r:.80} names no persona.",
        hint="Expected user[+group...][@setting=number,...][#version], with %2B and %40 for + and @ in ids.",
    )
