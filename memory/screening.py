"""Text that reads like an instruction to the model. It is kept as data, marked, and nothing is drawn from it.

A list cannot catch every attack; it is one layer. The others: memory is quoted as data in prompts, trust
never rises by retrieval, and statements come from the user's own turns only. `Screen.hook` takes a
classifier of the application's.
"""

import re
import unicodedata
from collections.abc import Callable
from functools import cached_property
from typing import Self

from pydantic import model_validator

from persona_sdk.config import FrozenConfig

QUARANTINED = "quarantined"  # the tag

_OBJECT = r"(?:instructions?|prompts?|rules|directions|guidelines|directives|messages|context|training)"
DENIED = (
    rf"\b(?:ignore|disregard|forget|override|bypass|skip)\b.{{0,40}}\b(?:previous|prior|above|earlier"
    rf"|preceding|all|any"
    rf"|your|the|these|those)\b.{{0,20}}\b{_OBJECT}\b",
    r"(?m)^\W{0,4}(?:system|assistant|developer|tool|function)\W{0,3}:",
    r"<\|[^|<>\n]{1,40}\|>|\[/?INST\]|<</?SYS>>|</?(?:system|assistant|instructions?)>|#{2,}\s*(?:system"
    r"|instructions?)\b",
    r"\b(?:you are now|from now on,? you are|act as an? (?:unrestricted|uncensored|evil)|do anything now"
    r"|jailbreak"
    r"|developer mode)\b",
    rf"\b(?:new|updated|real|hidden|secret) (?:system )?{_OBJECT}\s*:",
    r"\b(?:reveal|print|show|repeat|output|leak)\b.{0,30}\b(?:system prompt|hidden prompt|initial prompt"
    r"|your (?:instructions|prompt))\b",
    r"\b(?:do not|don't|never) (?:tell|inform|warn|mention (?:this|it) to) the user\b",
)


def plain(text: str) -> str:
    """A text as patterns see it: compatible characters are one, and none are hidden."""
    seen = unicodedata.normalize("NFKC", text)
    return "".join(c for c in seen if unicodedata.category(c) != "Cf")  # zero-width characters hide words


class Screen(FrozenConfig):
    """The deny-list: regular expressions, matched without regard to case."""

    denied: tuple[str, ...] = DENIED
    hook: Callable[[str], bool] | None = None

    @model_validator(mode="after")
    def _compiles(self) -> Self:
        for pattern in self.denied:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r:.60} is no regular expression: {error}") from error
        return self

    @cached_property
    def _regex(self) -> list[re.Pattern[str]]:
        return [re.compile(pattern, re.IGNORECASE) for pattern in self.denied]

    def suspicious(self, text: str) -> bool:
        """Whether a text looks like an instruction to the model."""
        seen = plain(text)
        if any(pattern.search(seen) for pattern in self._regex):
            return True
        return bool(self.hook and self.hook(text))
