"""One forward pass over the new tokens of several rows, packed one after another without padding.

tokens     | row 0: t t t t | row 2: t | row 5: t t |          lengths = (4, 1, 2)
slots      where each new token's keys and values go in the pool
tables     for every row, the slots of all its tokens so far, the new ones included
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from persona_sdk.engine.uploads import upload
from persona_sdk.errors import EngineError


@dataclass(frozen=True)
class RowTokens:
    """New tokens of one row.

    Args:
        tokens: their ids; entries under `vectors` are ignored.
        positions: ascending; normally the next ones, but any may be computed anew.
        table: slots of the row's positions from 0 to the last one that any new token may see.
        vectors: embeddings to use instead of the ids' own, from the first new token on.
    """

    tokens: Sequence[int]
    positions: Sequence[int]
    table: NDArray[np.int64]
    vectors: Float[Tensor, "_ d_model"] | None = None

    def part(self, start: int, stop: int) -> "RowTokens":
        """Some of them, to be computed when those before are."""
        places = self.positions[start:stop]
        vectors = None if self.vectors is None else self.vectors[start:stop]
        return RowTokens(self.tokens[start:stop], places, self.table[: places[-1] + 1], vectors)


@dataclass(frozen=True)
class PackedBatch:
    """All new tokens of one forward pass.

    Args:
        tokens: ids, packed.
        positions: of every token in its row.
        slots: where every token's keys and values go.
        lengths: new tokens of each row.
        tables: slots of each row's positions; 0 where a row is shorter.
        seen: positions each row has after this pass.
        wanted: rows, by number in the pass, whose next token is wanted: logits are computed for these alone.
        vectors: (first packed token, embeddings) of every row that brings its own.
    """

    tokens: Int[Tensor, " tokens"]
    positions: Int[Tensor, " tokens"]
    slots: Int[Tensor, " tokens"]
    lengths: tuple[int, ...]
    tables: Int[Tensor, "rows width"]
    seen: tuple[int, ...]
    wanted: tuple[int, ...]
    vectors: tuple[tuple[int, Float[Tensor, "_ d_model"]], ...] = ()

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First packed token of every row."""
        return tuple(int(start) for start in np.cumsum((0, *self.lengths[:-1])))

    @property
    def is_decode(self) -> bool:
        """Whether every row has exactly one new token."""
        return len(self.tokens) == len(self.lengths)

    @cached_property
    def last(self) -> Int[Tensor, " wanted"]:
        """Packed index of the last token of every wanted row."""
        ends = (np.cumsum(self.lengths) - 1)[list(self.wanted)]
        return upload(torch.from_numpy(ends), self.tokens.device)

    @cached_property
    def fresh(self) -> tuple[bool, ...]:
        """For every row, whether its new tokens are all it has."""
        return tuple(length == seen for length, seen in zip(self.lengths, self.seen, strict=True))


def packed_size(tokens: int, rows: int, width: int) -> int:
    """Numbers that a pass needs on the device."""
    return 3 * tokens + rows * width


def packed_views(flat: Any, tokens: int, rows: int, width: int) -> tuple[Any, Any, Any, Any]:
    """Tokens, positions, slots and tables in one flat array or tensor."""
    stops = [tokens, 2 * tokens, 3 * tokens]
    table = flat[stops[2] :].reshape(rows, width)
    return flat[: stops[0]], flat[stops[0] : stops[1]], flat[stops[1] : stops[2]], table


def pack(rows: Sequence[RowTokens], device: torch.device, wanted: Sequence[int] | None = None) -> PackedBatch:
    """Pack the new tokens of several rows; `wanted` as in `PackedBatch`, all rows if None."""
    lengths = tuple(len(row.tokens) for row in rows)
    if not rows or min(lengths) < 1:
        raise EngineError("A forward pass needs at least one token of every row.")
    seen = tuple(len(row.table) for row in rows)
    shape = sum(lengths), len(rows), max(seen)
    host = np.zeros(packed_size(*shape), dtype=np.int64)
    tokens, positions, slots, tables = packed_views(host, *shape)
    starts = np.cumsum((0, *lengths[:-1]))
    for index, (row, start, length) in enumerate(zip(rows, starts, lengths, strict=True)):
        new = slice(start, start + length)
        tokens[new], positions[new] = row.tokens, row.positions
        slots[new] = row.table[positions[new]]
        tables[index, : seen[index]] = row.table
    # One copy: each would be a call of the driver.
    tokens, positions, slots, tables = packed_views(upload(torch.from_numpy(host), device), *shape)
    return PackedBatch(
        tokens=tokens,
        positions=positions,
        slots=slots,
        lengths=lengths,
        tables=tables,
        seen=seen,
        wanted=tuple(range(len(rows))) if wanted is None else tuple(wanted),
        vectors=tuple(
            (int(start), row.vectors)
            for start, row in zip(starts, rows, strict=True)
            if row.vectors is not None and len(row.vectors)
        ),
    )
