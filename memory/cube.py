"""The unit of memory. A `MemCube` is a header plus one payload: text, or tensors named by their digest.

    kind         payload
    plaintext    text
    activation   tensors: KV caches, user embeddings, soft prompts
    parametric   tensors: adapter weights, one-step updates

A caller hands a `CubeDraft` to the store; the store answers with an id. Cubes never change: what does change,
their state of life, use and grants, is kept beside them. Text and attributes are data only: nothing in this
package interprets them.

``sources`` is provenance: the cubes this one was computed from, each with the hash its content had. It is
what makes forgetting reach everything derived from a cube, whoever owns it. ``parents`` are the earlier
versions of the same statement, which are forgotten with it.

Two times are kept apart. A cube is *recorded* from the revision that adds it to the one that retires it, and
its statement is *valid* in the world from ``valid_from`` to before ``valid_to``.
"""

import hashlib
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import (
    Annotated,
    Any,
    Literal,
    Protocol,
    Self,
    TypeAlias,
    get_args,
    runtime_checkable,
)

import numpy as np
import torch
from jaxtyping import Float, Float32
from pydantic import AfterValidator, AwareDatetime, Field, JsonValue, field_validator, model_validator
from torch import Tensor

from persona_sdk.config import FrozenConfig
from persona_sdk.errors import InvalidInputError, StoreError
from persona_sdk.tensors import Digest, TensorBundle

Kind: TypeAlias = Literal["plaintext", "activation", "parametric"]
PersonaKind: TypeAlias = Literal["user", "group"]
Trust: TypeAlias = Literal["system", "confirmed", "user", "assistant", "tool", "import", "web"]
State: TypeAlias = Literal["generated", "activated", "merged", "archived", "frozen"]
Sensitivity: TypeAlias = Literal["normal", "personal", "special"]
KINDS: tuple[str, ...] = get_args(Kind)
TRUST_ORDER: tuple[str, ...] = get_args(Trust)  # most trusted first
SENSITIVITY_ORDER: tuple[str, ...] = get_args(Sensitivity)  # most sensitive last


def utc_now() -> datetime:
    """The present, in UTC."""
    return datetime.now(UTC)


def clean_text(value: str, what: str) -> str:
    """Return `value` if it can be stored as UTF-8, else raise `InvalidInputError` without quoting it."""
    try:
        value.encode()
    except (UnicodeEncodeError, AttributeError) as error:
        raise InvalidInputError(
            f"The {what} is not valid text.", hint="Expected a str without lone surrogates."
        ) from error
    return value


def aware(moment: datetime) -> datetime:
    """Return `moment` if it has a time zone, else raise `InvalidInputError`."""
    if moment.tzinfo is None:
        raise InvalidInputError("The time has no time zone.", hint="Give one, as datetime.now(UTC).")
    return moment


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def hashed(value: str) -> str:
    """SHA-256 of a text, as hexadecimal digits."""
    return hashlib.sha256(value.encode()).hexdigest()


def _in_utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except OverflowError as error:
        raise ValueError(f"{moment} has no place in UTC") from error


UtcTime: TypeAlias = Annotated[AwareDatetime, AfterValidator(_in_utc)]


class Source(FrozenConfig):
    """A cube that another one was computed from, and the hash of its content then (`MemCube.sha256`)."""

    owner: str
    cube_id: str
    sha256: str

    @classmethod
    def of(cls, cube: "MemCube") -> "Source":
        """A stored cube as the provenance of another one."""
        return cls(owner=cube.owner, cube_id=cube.id, sha256=cube.sha256)


class Origin(FrozenConfig):
    """Where a cube came from: the kind of thing, its name there, and the model that wrote it, if one did."""

    kind: Literal["application", "turn", "reply", "tool", "file", "web", "import", "derived"] = "application"
    reference: str = Field("", max_length=256, description="message id, file name, address, method, ...")
    session: str = Field("", max_length=256, description="the conversation it belongs to")
    model: str = Field("", max_length=256, description="fingerprint of the model that wrote it")


class CubeHeader(FrozenConfig):
    """What is known about a cube besides its payload. ``attributes`` belong to whoever wrote the cube."""

    title: str = ""
    semantic_type: str = Field(
        "fact", pattern=r"^[a-z][a-z0-9_]{0,63}\z", description="fact, preference, event, ..."
    )
    tags: tuple[str, ...] = ()
    trust: Trust = "user"
    origin: Origin = Field(default_factory=Origin)
    sources: tuple[Source, ...] = ()
    parents: tuple[str, ...] = Field((), description="ids of earlier versions, of the same owner")
    slot: str | None = Field(
        None,
        pattern=r"^[a-z][a-z0-9_.]{0,127}\z",
        description="the attribute it states, as lives_in; one current value per slot",
    )
    valid_from: UtcTime | None = Field(None, description="since when it is so; None: for ever")
    valid_to: UtcTime | None = Field(None, description="until before when; None: still")
    sensitivity: Sensitivity = "normal"
    priority: int = Field(0, ge=-100, le=100)
    licence: str = Field("", max_length=256)
    half_life_days: float | None = Field(None, gt=0, description="of its weight in recall; None: by type")
    attributes: dict[str, JsonValue] = Field(default_factory=dict)
    created_at: UtcTime = Field(default_factory=utc_now)
    expires_at: UtcTime | None = None

    @field_validator("attributes")
    @classmethod
    def _standard_json(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not value:
            return {}
        # A private copy, so that the caller's dictionary can change without changing the cube.
        copy: dict[str, Any] = json.loads(json.dumps(value, allow_nan=False, ensure_ascii=False).encode())
        return copy

    @model_validator(mode="after")
    def _begins_before_it_ends(self) -> Self:
        if self.valid_from and self.valid_to and self.valid_from > self.valid_to:
            raise ValueError("valid_from is after valid_to")
        return self

    @classmethod
    def stored(cls, data: str) -> Self:
        """The header in a row.

        Raises:
            StoreError: the row is damaged.
        """
        try:
            return cls.model_validate_json(data)
        except ValueError:
            raise StoreError(
                "The header of a cube is damaged.", hint="Restore the store from a copy."
            ) from None  # what pydantic says quotes it

    @property
    def pinned(self) -> bool:
        """Whether its owner has it in every prompt: ``attributes["pinned"]`` is true, and nothing like it."""
        return self.attributes.get("pinned") is True

    def expired(self, now: datetime) -> bool:
        """Whether the cube's time has passed."""
        return self.expires_at is not None and self.expires_at <= now

    def valid(self, moment: datetime) -> bool:
        """Whether the statement holds at a time in the world."""
        return (self.valid_from is None or self.valid_from <= moment) and (
            self.valid_to is None or moment < self.valid_to
        )


@dataclass(frozen=True)
class MemCube:
    """One stored memory. ``revision`` is the one that first added it; ``blob`` names its tensors.

    ``text`` is None for every kind but plaintext. ``state`` is that of `persona_sdk.memory.lifecycle` when
    it was read.
    """

    id: str
    owner: str
    kind: Kind
    text: str | None
    blob: Digest | None
    header: CubeHeader
    revision: int
    state: State = "generated"

    @property
    def sha256(self) -> str:
        """Hash of the content: the tensors' digest, else that of text and attributes."""
        if self.blob is not None:
            return self.blob
        return hashed(f"{self.text or ''}\0{canonical(self.header.attributes)}")


@dataclass(frozen=True, kw_only=True, eq=False)
class CubeDraft:
    """A cube to be: what `MemoryStore.commit` adds.

    ``vector`` is the text's embedding, float32 ``[d]``; ``encoder`` is the fingerprint of what made it.
    """

    kind: Kind = "plaintext"
    text: str | None = None
    header: CubeHeader = field(default_factory=CubeHeader)
    payload: TensorBundle | None = None
    vector: Tensor | None = None
    encoder: str | None = None

    @classmethod
    def of(
        cls,
        text: str | None = None,
        *,
        kind: Kind = "plaintext",
        payload: TensorBundle | None = None,
        vector: Tensor | None = None,
        encoder: str | None = None,
        **header: Any,
    ) -> Self:
        """A draft with its header fields as keywords, checked.

        Raises:
            InvalidInputError: a field is unknown or wrong, or the parts do not fit the kind.
        """
        parsed = CubeHeader.parse(header)
        return cls(
            kind=kind, text=text, header=parsed, payload=payload, vector=vector, encoder=encoder
        ).checked()

    def checked(self) -> Self:
        """Return the draft if it can be committed.

        Raises:
            InvalidInputError: the parts do not fit the kind, or the vector is unusable.
        """
        if self.kind not in KINDS:
            raise InvalidInputError(
                f"{self.kind!r} is no kind of cube.", hint=f"Known kinds: {', '.join(KINDS)}."
            )
        text = clean_text(self.text or "", "text of a cube")
        if self.kind == "plaintext" and (not text.strip() or self.payload is not None):
            found = "no text" if not text.strip() else "tensors"
            raise InvalidInputError(
                f"A plaintext cube was given {found}.", hint="Expected text and no payload."
            )
        if self.kind != "plaintext" and (
            self.text is not None or not (self.payload or self.header.attributes)
        ):
            found = "nothing" if self.text is None else "text"
            raise InvalidInputError(
                f"A cube of kind {self.kind!r} was given {found}.",
                hint="Expected a payload of tensors, or attributes, and no text.",
            )
        if self.payload is not None and not self.payload:
            raise InvalidInputError("The payload holds no tensor.", hint="Leave it out.")
        if (self.vector is None) != (self.encoder is None):
            raise InvalidInputError(
                "A vector and its encoder's fingerprint come together.", hint="Give both or neither."
            )
        if self.vector is not None and self.encoder is not None:
            check_vector(self.vector, self.encoder)
        return self


def check_vector(vector: Tensor, encoder: str) -> Float32[Tensor, "d"]:
    """Return `vector` as it is stored.

    Raises:
        InvalidInputError: it is not a finite 1-D float32 vector, or `encoder` is no fingerprint.
    """
    if not encoder or len(encoder) > 256 or not encoder.isprintable() or not encoder.isascii():
        raise InvalidInputError(
            "The encoder's fingerprint cannot be used.", hint="Expected 1 to 256 printable ASCII characters."
        )
    if vector.ndim != 1 or vector.numel() == 0 or vector.dtype != torch.float32:
        raise InvalidInputError(
            f"The vector has shape {tuple(vector.shape)} and dtype {vector.dtype}.",
            hint="Expected [d], float32.",
        )
    plain = vector.detach().cpu().contiguous()
    if not np.isfinite(plain.numpy()).all():  # numpy's way takes a tenth of torch's for one vector
        raise InvalidInputError("The vector holds NaN or infinity.", hint="Expected finite numbers.")
    return plain


@runtime_checkable
class TextEncoder(Protocol):
    """What retrieval needs of an embedder. `persona_sdk.models.Embedder` is one."""

    @property
    def fingerprint(self) -> str:
        """Names the model; an index belongs to one."""
        ...

    def encode(self, texts: list[str]) -> Float[Tensor, "n d"]:
        """One unit vector per text, float32 on the CPU."""
        ...
