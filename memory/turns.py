"""Turns of conversations as cubes: what is stored of a message, and where it stands in its session."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, NamedTuple, TypeAlias

from pydantic import Field, ValidationError

from persona_sdk.config import FrozenConfig
from persona_sdk.errors import InvalidInputError
from persona_sdk.memory.cube import CubeDraft, MemCube, Trust, UtcTime, clean_text
from persona_sdk.memory.statement import Turn

TURN = "turn"  # the semantic type
TRUST: dict[str, Trust] = {"user": "user", "assistant": "assistant", "tool": "tool"}
ORIGIN = {"user": "turn", "assistant": "reply", "tool": "tool"}
MAX_TEXT = 1_000_000

# What a model thought aloud: between tags, to the end if it was cut off, or from the beginning if the opening
# tag was a part of the prompt.
_TAG = "(think|thinking|reasoning)>"
_REASONING = tuple(
    re.compile(pattern, re.DOTALL | re.IGNORECASE | re.MULTILINE)
    for pattern in (rf"<{_TAG}.*?</\1>\s*", rf"\A\s*<{_TAG}.*\Z", rf"\A.*?^</{_TAG}\s*")
)


class Message(FrozenConfig):
    """One message as chat APIs give it; ``at`` is when it was said, None for now."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str = Field(max_length=MAX_TEXT)
    at: UtcTime | None = None


Messages: TypeAlias = str | Sequence[Message | dict[str, Any]]


class Place(NamedTuple):
    """Where a stored turn stands; ``digest`` is what it is compared by."""

    session: str
    number: int
    digest: str


@dataclass
class Session:
    """Which messages of a session are stored: cube id and hash of role and text, by number."""

    found: dict[int, tuple[str, str]] = field(default_factory=dict)

    @property
    def next(self) -> int:
        """The number of the message that would follow."""
        return max(self.found, default=-1) + 1


def parse(messages: Messages) -> list[Message]:
    """Check what a caller passed; a string is one user message. Replies lose the reasoning before them.

    Raises:
        InvalidInputError: a role is unknown, or a content is no text.
    """
    given = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    parsed = []
    for place, message in enumerate(given):
        try:
            found = message if isinstance(message, Message) else Message.model_validate(message)
        except ValidationError as error:
            fault = error.errors()[0]
            raise InvalidInputError(
                f"Message {place} cannot be stored: {'.'.join(map(str, fault['loc']))}: {fault['msg']}.",
                hint='Expected {"role": "user" | "assistant" | "tool", "content": "..."}; nothing is stored.',
            ) from error
        clean_text(found.content, f"content of message {place}")
        parsed.append(without_reasoning(found))
    return parsed


def without_reasoning(message: Message) -> Message:
    """A reply without what its model thought aloud: nobody's statement, and no memory."""
    if message.role != "assistant" or "<" not in message.content:
        return message
    kept = message.content
    for pattern in _REASONING:
        kept = pattern.sub("", kept)
    return message if kept == message.content else message.model_copy(update={"content": kept.rstrip()})


def digest(role: str, text: str) -> str:
    """What two messages are compared by."""
    return hashlib.sha256(f"{role}\0{text}".encode()).hexdigest()


def draft(
    message: Message,
    *,
    session: str,
    number: int,
    at: datetime,
    tags: Sequence[str] = (),
    echoes: Sequence[tuple[int, int]] = (),
) -> CubeDraft:
    """A message as a cube, verbatim."""
    return CubeDraft.of(
        message.content,
        semantic_type=TURN,
        trust=TRUST[message.role],
        tags=tuple(tags),
        origin={"kind": ORIGIN[message.role], "session": session, "reference": str(number)},
        attributes={"role": message.role, "number": number, "echoes": [list(span) for span in echoes]},
        created_at=message.at or at,
    )  # fmt: skip


def place_of(cube: MemCube) -> Place | None:
    """Where a turn stands, None for what is none."""
    number = cube.header.attributes.get("number")
    if cube.header.semantic_type != TURN or not isinstance(number, int):
        return None
    return Place(cube.header.origin.session, number, digest(role_of(cube), cube.text or ""))


def session_of(places: Mapping[str, Place], session: str) -> Session:
    """What is stored of one session; `places` are those of all turns, by cube id."""
    return Session({p.number: (name, p.digest) for name, p in places.items() if p.session == session})


def role_of(cube: MemCube) -> str:
    """Who said a turn."""
    return str(cube.header.attributes.get("role", "tool"))


def as_turn(cube: MemCube, *, new: bool) -> Turn:
    """A stored turn as an extractor sees it."""
    spans = cube.header.attributes.get("echoes")
    pairs = spans if isinstance(spans, list) else []
    echoes = tuple((int(str(p[0])), int(str(p[1]))) for p in pairs if isinstance(p, list) and len(p) == 2)
    role = role_of(cube)
    return Turn(
        role=role if role in ("user", "assistant") else "tool",  # type: ignore[arg-type]
        text=cube.text or "",
        at=cube.header.created_at,
        session=cube.header.origin.session,
        new=new,
        echoes=echoes,
    )
