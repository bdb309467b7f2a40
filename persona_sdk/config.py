"""Configuration as data: frozen, closed to unknown keys, with the field's standard names.

Decoding options carry transformers' names and meanings, so what a user knows from ``model.generate``
holds here. Greedy decoding is the default.
"""

import re
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from persona_sdk.errors import InvalidInputError

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+\-]{0,127}")


class FrozenConfig(BaseModel):
    """Base of every configuration: immutable, hashable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def parse(cls, options: dict[str, Any]) -> Self:
        """Build from keyword options; a bad one raises `InvalidInputError` that names it."""
        try:
            return cls(**options)
        except ValidationError as error:
            faults = "; ".join(
                f"{'.'.join(map(str, fault['loc'])) or cls.__name__}: {fault['msg']}"
                for fault in error.errors()
            )
            raise InvalidInputError(
                f"Bad options for {cls.__name__}: {faults}.",
                hint=f"Known options: {', '.join(sorted(cls.model_fields))}.",
            ) from error

    @classmethod
    def from_options(cls, given: Any = None) -> Self:
        """Options that may be given as an instance, a mapping, or None for the defaults; see `parse`."""
        return given if isinstance(given, cls) else cls.parse(dict(given or {}))


ConfigT = TypeVar("ConfigT", bound=FrozenConfig)


class GenerationOptions(FrozenConfig):
    """How tokens are chosen. Names and meanings are those of ``transformers.GenerationConfig``."""

    max_new_tokens: int = Field(128, ge=1)
    do_sample: bool = False
    temperature: float = Field(1.0, gt=0)
    top_k: int = Field(50, ge=0, description="0 keeps the whole vocabulary")
    top_p: float = Field(1.0, gt=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    stop_strings: tuple[str, ...] = ()
    ignore_eos: bool = Field(False, description="keep going after the end token; for measurements")

    @model_validator(mode="after")
    def _stop_strings_say_something(self) -> Self:
        if any(not stop for stop in self.stop_strings):
            raise ValueError("stop_strings must not hold an empty string")
        return self


def validate_id(value: str, what: str = "persona id") -> str:
    """Return `value` if it can name a persona, else raise `InvalidInputError`.

    Ids are opaque: letters, digits and ``. _ @ + -``, starting with a letter or digit, at most 128
    characters. They never become file names.
    """
    if not isinstance(value, str) or not _ID.fullmatch(value):
        shown = repr(value) if len(repr(value)) <= 60 else f"{value!r:.57}..."
        raise InvalidInputError(
            f"{shown} cannot be a {what}.",
            hint="Use 1 to 128 letters, digits or . _ @ + - and start with a letter or a digit.",
        )
    return value
