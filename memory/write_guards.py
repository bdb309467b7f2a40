"""Checks of what is about to be remembered: against memory poisoning, floods and forbidden content.

A `WriteGuard` sees each draft before it is committed through a `BoundStore`, with who writes it, where to,
and what it was derived from. It raises to refuse, or returns the draft, perhaps changed. `cap_trust` always
runs, first and again last: nobody can claim more trust than the table allows, and what is derived from a
cube is trusted no more than that cube.

    who writes                  most trust it can claim
    the system                  system
    a user or a group, own      confirmed
    anybody else, by a grant    import
"""

import json
import re
import threading
import time
import unicodedata
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from persona_sdk.errors import InvalidInputError, RateLimitError
from persona_sdk.memory.cube import TRUST_ORDER, CubeDraft, MemCube, Trust
from persona_sdk.memory.governance import Principal
from persona_sdk.memory.screening import QUARANTINED, plain


@dataclass(frozen=True)
class Write:
    """A draft on its way in."""

    principal: Principal
    owner: str
    draft: CubeDraft
    sources: tuple[MemCube, ...] = ()


@runtime_checkable
class WriteGuard(Protocol):
    """A check of writes."""

    def __call__(self, write: Write) -> CubeDraft:
        """The draft to commit in place of ``write.draft``; or raise a `PersonaError`."""
        ...


def cap_trust(write: Write) -> CubeDraft:
    """The draft, trusted no more than its writer and its sources are."""
    caps: list[Trust] = [_most(write), *(source.header.trust for source in write.sources)]
    return _at_most(write.draft, max(caps, key=TRUST_ORDER.index))


def _most(write: Write) -> Trust:
    if write.principal.kind == "system":
        return "system"
    own = write.principal.kind in ("user", "group") and write.principal.id == write.owner
    return "confirmed" if own else "import"


def _at_most(draft: CubeDraft, trust: Trust) -> CubeDraft:
    if TRUST_ORDER.index(draft.header.trust) >= TRUST_ORDER.index(trust):
        return draft
    return replace(draft, header=draft.header.model_copy(update={"trust": trust}))


class RateLimit:
    """At most `most` drafts of each principal in any `seconds`."""

    def __init__(self, most: int, seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        if most < 1 or seconds <= 0:
            raise InvalidInputError(
                f"{most} writes in {seconds} s is no limit.", hint="Give positive numbers."
            )
        self._most, self._seconds, self._clock = most, seconds, clock
        self._past: defaultdict[str, deque[float]] = defaultdict(deque)
        self._lock = threading.Lock()

    def __call__(self, write: Write) -> CubeDraft:
        """Refuse what comes too fast.

        Raises:
            RateLimitError: the principal has written its share.
        """
        with self._lock:
            now, past = self._clock(), self._past[write.principal.name]
            while past and past[0] <= now - self._seconds:
                past.popleft()
            if len(past) >= self._most:
                raise RateLimitError(
                    f"{len(past)} writes in {self._seconds:g} s are all that is allowed.",
                    hint="Nothing was committed. Retry later.",
                )
            past.append(now)
        return write.draft


class DenyList:
    """Refuses drafts in whose words a pattern is found, with or without the hidden characters among them.

    Case and compatible characters do not matter.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        try:
            self._patterns = [re.compile(pattern, re.IGNORECASE) for pattern in patterns]
        except re.error as error:
            raise InvalidInputError(f"A pattern cannot be used: {error}.", hint="Correct it.") from error

    def matches(self, draft: CubeDraft) -> bool:
        """Whether one of the patterns is found."""
        words = _words(draft)
        seen = {plain(words), unicodedata.normalize("NFKC", words)}  # a pattern may be about what is hidden
        return any(pattern.search(text) for pattern in self._patterns for text in seen)

    def __call__(self, write: Write) -> CubeDraft:
        """Refuse what matches.

        Raises:
            InvalidInputError: it does; the message does not quote it.
        """
        if self.matches(write.draft):
            raise InvalidInputError(
                "The memory holds something that is not allowed.", hint="Nothing was committed."
            )
        return write.draft


class Quarantine(DenyList):
    """Lets through what matches, but as untrusted as the web, and with the tag of `screening`."""

    def __call__(self, write: Write) -> CubeDraft:
        """Mark what matches."""
        if not self.matches(write.draft):
            return write.draft
        draft = _at_most(write.draft, "web")
        tags = tuple(dict.fromkeys((*draft.header.tags, QUARANTINED)))
        return replace(draft, header=draft.header.model_copy(update={"tags": tags}))


def _words(draft: CubeDraft) -> str:
    header = draft.header
    attributes = json.dumps(header.attributes, ensure_ascii=False)
    return "\n".join((draft.text or "", header.title, *header.tags, header.origin.reference, attributes))
