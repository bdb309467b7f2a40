"""Data of preference dimensions from one file: JSON Lines, plain or gzip, a row a line.

    SFT    {"dimension": "concise", "prompt": ..., "completion": ...}
    DPO    {"dimension": "concise", "prompt": ..., "chosen": ..., "rejected": ...}
           {"prompt": ..., "response_0": ..., "response_1": ..., "better": {"concise": 0, "detailed": 1}}

Other keys are passed over: data sets carry ids and sources, and no key above may be absent. Both forms of DPO
may stand in one file. A pair may be labelled for more dimensions than are asked for; a row with
``"dimension"`` must be about one of them. Blank lines do not count.

A row that cannot be used is named by file and line, and then nothing is read.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from persona_sdk.adapters.preference_data import by_label
from persona_sdk.errors import InvalidInputError, NotFoundError

_Text: TypeAlias = Annotated[str, Field(pattern=r"\S")]
_Winner: TypeAlias = Annotated[int, Field(strict=True, ge=0, le=1)]  # strict: true is no winner

_FORMS = {
    "sft": 'Expected {"dimension": ..., "prompt": ..., "completion": ...}.',
    "dpo": 'Expected {"dimension": ..., "prompt": ..., "chosen": ..., "rejected": ...} or '
    '{"prompt": ..., "response_0": ..., "response_1": ..., "better": {dimension: 0 or 1}}.',
}


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    prompt: _Text

    def parts(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Dimension and row, as `persona_sdk.adapters.preference_data` wants them."""
        content = self.model_dump()
        yield content.pop("dimension"), content


class _Reply(_Row):
    dimension: _Text
    completion: _Text


class _Pair(_Row):
    dimension: _Text
    chosen: _Text
    rejected: _Text


class _Labelled(_Row):
    response_0: _Text
    response_1: _Text
    better: dict[str, _Winner]

    def parts(self) -> Iterator[tuple[str, dict[str, str]]]:
        return by_label(self.model_dump())


@dataclass(frozen=True)
class PreferenceFile:
    """What a file held.

    Args:
        sha256: of the file's bytes, as they lie on disk.
        rows: lines that hold a row.
        data: rows by dimension, to train on or to evaluate.
    """

    sha256: str
    rows: int
    data: dict[str, list[dict[str, str]]] = field(repr=False)


def read(path: Path, dimensions: Sequence[str] | None, objective: Literal["sft", "dpo"]) -> PreferenceFile:
    """Read the rows of some dimensions; None for all that the file names, in the order it does.

    Raises:
        NotFoundError: there is no such file.
        InvalidInputError: it cannot be read, a row cannot be used, or a dimension has no row.
    """
    content = _bytes(path)
    data: dict[str, list[dict[str, str]]] = {name: [] for name in dimensions or ()}
    rows = 0
    # not splitlines(), which also splits inside of texts, at U+2028
    for number, line in enumerate(_unpacked(path, content).split(b"\n"), start=1):
        if not line.strip():
            continue
        rows += 1
        row = _parsed(f"{path}, line {number}", line, objective)
        for name, part in row.parts():
            if dimensions is None or name in data:
                data.setdefault(name, []).append(part)
            elif not isinstance(row, _Labelled):
                raise InvalidInputError(
                    f"{path}, line {number}: {name!r} is no dimension.",
                    hint=f"Dimensions: {', '.join(dimensions)}.",
                )
    if not rows:
        raise InvalidInputError(f"{path} has no rows.", hint=_FORMS[objective])
    if absent := [name for name, found in data.items() if not found]:
        raise InvalidInputError(f"{path} has no row for {', '.join(absent)}.", hint=_FORMS[objective])
    return PreferenceFile(hashlib.sha256(content).hexdigest(), rows, data)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise NotFoundError(
            f"There is no file {str(path)!r}.", hint="Expected a file of JSON Lines."
        ) from error
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be read: {error}.", hint="Name a file that can.") from error


def _unpacked(path: Path, content: bytes) -> bytes:
    if path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidInputError(
            f"{path} is damaged: {error}.", hint="Copy the file again from where it came."
        ) from error


def _parsed(where: str, line: bytes, objective: str) -> _Reply | _Pair | _Labelled:
    try:
        given: Any = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{where} is no JSON: {error}.", hint=_FORMS[objective]) from error
    if not isinstance(given, dict):
        raise InvalidInputError(f"{where} is a {type(given).__name__}.", hint=_FORMS[objective])
    pair = _Pair if "dimension" in given else _Labelled
    form: type[_Reply | _Pair | _Labelled] = _Reply if objective == "sft" else pair
    try:
        return form.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InvalidInputError(f"{where}: {place}: {first['msg']}.", hint=_FORMS[objective]) from error
