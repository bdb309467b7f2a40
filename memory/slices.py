"""One owner's searchable slice, in memory only: vectors, words and times of the texts that are live.

    column                     field                    shape
    cube ids, oldest first     ids                      n
    unit vectors               vectors                  [n, d]
    words                      counts, `postings`       see `persona_sdk.memory.lexical`
    neighbours in the session  before, after            [n], -1: none
    times, seconds since 1970  created, valid_from, valid_to, expires    [n], infinite where open
    half-life of its own       half_life                [n] days, NaN: by type
    type and trust, as codes   types, trust             [n]
    sensitivity is "special"   special                  [n]

Each owner has slices of its own, so a search cannot reach anybody else's rows. Nothing is ever written to a
file: building one is a copy, while a file would be one more thing to trust, to leak and to erase. A slice is
immutable and carries the stamp its owner had when it was read; when that has changed, also by another
process, its successor keeps the rows that are still there and reads only the new ones. All slices of an
owner are dropped when something of it is forgotten.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int

from persona_sdk.errors import StoreError
from persona_sdk.memory.calendar_spans import MONTHS
from persona_sdk.memory.cube import TRUST_ORDER
from persona_sdk.memory.lexical import Counts, Postings

APPROXIMATE_ABOVE = 20_000  # rows; below, comparing all takes less than 3 ms

_OF_A_ROW = (
    "created",
    "valid_from",
    "valid_to",
    "expires",
    "half_life",
    "types",
    "trust",
    "special",
    "sessions",
)
_ORDER = {name: code for code, name in enumerate(TRUST_ORDER)}


@dataclass(frozen=True, eq=False)
class Slice:
    """What can be searched of one owner. ``type_names`` are what the codes in ``types`` stand for."""

    owner: str
    stamp: str
    ids: tuple[str, ...]
    vectors: Float32[np.ndarray, "n d"]
    counts: Counts
    sessions: Int[np.ndarray, " n"]
    created: Float64[np.ndarray, " n"]
    valid_from: Float64[np.ndarray, " n"]
    valid_to: Float64[np.ndarray, " n"]
    expires: Float64[np.ndarray, " n"]
    half_life: Float64[np.ndarray, " n"]
    types: Int[np.ndarray, " n"]
    trust: Int[np.ndarray, " n"]
    special: Bool[np.ndarray, " n"]
    type_names: tuple[str, ...]
    derived: dict[str, Any] = field(default_factory=dict)  # indexes over the columns, built when first used

    @classmethod
    def of(cls, owner: str, stamp: str, rows: Sequence[Any], names: tuple[str, ...] = ()) -> Self:
        """The slice of rows with the columns of `_COLUMNS`; type names beyond `names` are appended.

        Raises:
            StoreError: a row is damaged. It is not left out: what is not found is taken for not there.
        """
        try:
            return cls._of(owner, stamp, rows, names)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StoreError(
                f"A row of the store is damaged ({type(error).__name__}).", hint="Restore it from a copy."
            ) from None  # what parsers say quotes the row

    @classmethod
    def _of(cls, owner: str, stamp: str, rows: Sequence[Any], names: tuple[str, ...]) -> Self:
        headers = [json.loads(row.header) for row in rows]
        made = [datetime.fromisoformat(header["created_at"]) for header in headers]
        known = {name: code for code, name in enumerate(names)}
        types = [known.setdefault(header["semantic_type"], len(known)) for header in headers]
        texts = [
            # A memory is found by the words of the day it was made, too.
            f"{header['title']}\n{row.text}\n{_day(moment.astimezone(UTC))}"
            for row, header, moment in zip(rows, headers, made, strict=True)
        ]
        lives = [header["half_life_days"] for header in headers]
        return cls(
            owner=owner,
            stamp=stamp,
            ids=tuple(row.id for row in rows),
            vectors=_matrix([row.data for row in rows]),
            counts=Counts.of(texts),
            # Only whether two sessions are the same is asked, so their hashes do; 0 is no session.
            sessions=_column([_session(header["origin"]) for header in headers], np.int64),
            created=_column([moment.timestamp() for moment in made], np.float64),
            valid_from=_times([row.valid_from for row in rows], -np.inf),
            valid_to=_times([row.valid_to for row in rows], np.inf),
            expires=_times([row.expires_at for row in rows], np.inf),
            half_life=_column([np.nan if life is None else life for life in lives], np.float64),
            types=_column(types, np.int32),
            trust=_column([_ORDER[header["trust"]] for header in headers], np.int8),
            special=_column([header["sensitivity"] == "special" for header in headers], np.bool_),
            type_names=tuple(known),
        )

    @cached_property
    def before(self) -> Int[np.ndarray, " n"]:
        """The row of the turn before, in the same session; -1 for the first and for what has no session."""
        order = np.argsort(self.sessions, kind="stable").astype(np.int32)
        found = np.full(len(self.ids), -1, np.int32)
        same = self.sessions[order[1:]] == self.sessions[order[:-1]]
        found[order[1:]] = np.where(same & (self.sessions[order[1:]] != 0), order[:-1], -1)
        return found

    @cached_property
    def after(self) -> Int[np.ndarray, " n"]:
        """The row of the turn after; inverse of `before`."""
        found = np.full(len(self.ids), -1, np.int32)
        rows = np.flatnonzero(self.before >= 0)
        found[self.before[rows]] = rows
        return found

    @cached_property
    def timeless(self) -> bool:
        """Whether every statement holds for ever and none expires, so that nothing need be compared."""
        ends = min(self.valid_to.min(initial=np.inf), self.expires.min(initial=np.inf))
        return bool(np.isinf(ends) and np.isinf(self.valid_from).all())

    @cached_property
    def tiers(self) -> tuple[int, ...]:
        """The codes of trust that occur."""
        return tuple(np.unique(self.trust).tolist())

    @cached_property
    def own_half_lives(self) -> bool:
        """Whether any memory brings a half-life of its own."""
        return not bool(np.isnan(self.half_life).all())

    def postings(self, context: float) -> Postings:
        """The lexical index; `context` is the weight of the neighbours' words."""
        kept: tuple[float, Postings] | None = self.derived.get("postings")
        if kept is None or kept[0] != context:  # one at a time: whoever varies the weight is tuning it
            kept = context, Postings.of(self.counts, self.before, self.after, context=context)
            self.derived["postings"] = kept
        return kept[1]

    @cached_property
    def bytes(self) -> int:
        """An upper bound of its bytes: with context, postings hold each count three times."""
        names = sum(len(name) + 57 for name in self.ids)
        arrays = (self.vectors, self.created, self.types, self.trust)
        file = self.vectors.nbytes if len(self.ids) > APPROXIMATE_ABOVE else 0
        return names + sum(a.nbytes for a in arrays) + 6 * self.created.nbytes + 4 * self.counts.bytes + file

    def followed_by(self, stamp: str, stay: Sequence[int], new: "Slice") -> "Slice":
        """Another slice: the rows `stay` of this one, then those of `new`."""
        rows = np.asarray(stay, np.int64)
        renumbered = np.full(len(self.ids), -1, np.int32)
        renumbered[rows] = np.arange(len(rows), dtype=np.int32)
        shifted = replace(new.counts, rows=new.counts.rows + np.int32(len(rows)))
        # What was built over the first rows holds as long as they are the first.
        derived = {"inverted file": self.derived.get("inverted file")} if len(rows) == len(self.ids) else {}
        columns: dict[str, Any] = {
            name: np.concatenate([getattr(self, name)[rows], getattr(new, name)]) for name in _OF_A_ROW
        }
        return replace(
            self,
            stamp=stamp,
            ids=(*(self.ids[row] for row in rows), *new.ids),
            vectors=np.concatenate([self.vectors[rows], new.vectors]) if new.ids else self.vectors[rows],
            counts=self.counts.kept(renumbered).plus(shifted),
            type_names=new.type_names,
            derived=derived,
            **columns,
        )


def _session(origin: dict[str, Any]) -> int:
    """The session a row is part of. What was derived from a turn stands beside it, not after it."""
    return hash(origin["session"]) if origin["session"] and origin["kind"] != "derived" else 0


def _day(moment: datetime) -> str:
    return f"{moment.day} {MONTHS[moment.month - 1]} {moment.year}"


def _matrix(data: Sequence[bytes]) -> Float32[np.ndarray, "n d"]:
    if not data:
        return np.zeros((0, 0), np.float32)
    if len({len(one) for one in data}) > 1:
        raise ValueError("vectors of one encoder have different lengths")
    return np.frombuffer(b"".join(data), "<f4").astype(np.float32, copy=False).reshape(len(data), -1)


def _column(values: Sequence[Any], dtype: Any) -> Any:
    return np.asarray(values, dtype)


def _times(values: Sequence[str | None], missing: float) -> Float64[np.ndarray, " n"]:
    seconds = [missing if value is None else datetime.fromisoformat(value).timestamp() for value in values]
    return np.asarray(seconds, np.float64)
