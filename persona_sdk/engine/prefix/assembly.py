"""One row's prompt with blocks on its way through the passes: missing blocks, then all the rest.

    first    | lead | head |                      table: lead head
             | block a |                          table: lead head a         each sees the head and itself
             | block c |                          table: lead head c
    turn     keys of a and c to their places, when their last token is computed
    then     | picked | gaps | question |         table: lead head a b c ... question

Missing blocks are computed in the row's own slots, so they need no room of their own, and in pieces beside
all other rows, so they stall nobody. If none is missing, there is one piece: everything that is computed.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from persona_sdk.engine.forward.batch import RowTokens
from persona_sdk.engine.prefix.reuse import BlockReuse


class Assembly:
    """What of a prompt is still to be computed, in order.

    Args:
        reuse: what goes where.
        missing: the spans of `reuse.blocks` that are not in their slots yet.
        table: the row's slots, from position 0.
        vectors: the row's soft prefix.
        made: called with a missing block's span and the slots of all positions it was made with, its own
            last, when all of it is computed.
    """

    def __init__(
        self,
        reuse: BlockReuse,
        missing: Sequence[tuple[int, int]],
        table: NDArray[np.int64],
        vectors: Float[Tensor, "_ d_model"] | None,
        made: Callable[[tuple[int, int], NDArray[np.int64]], None],
    ) -> None:
        self.reuse = reuse
        self._table, self._vectors, self._made = table, vectors, made
        self._ids = (*(0,) * reuse.lead, *reuse.prompt.tokens)
        front = [place for place in reuse.computed if missing and place < reuse.made_at]
        blocks = [self._block(span) for span in missing]
        self._pieces = [*([self._own(front)] if front else []), *blocks]
        self._missing = dict(enumerate(missing, start=len(self._pieces) - len(blocks)))
        self._turned = len(self._pieces)  # from this piece on, every block stands in its place
        self._pieces.append(self._own(reuse.computed[len(front) :]))
        self._piece = self._offset = 0
        self.remaining = sum(len(piece.tokens) for piece in self._pieces)

    @property
    def assembled(self) -> bool:
        """Whether every block stands in its place."""
        return self._piece >= self._turned

    def next(self, count: int) -> list[RowTokens]:
        """At most `count` of the tokens to compute next: pieces for one pass, in this order. Never none."""
        found, piece, offset = [], self._piece, self._offset
        last = len(self._pieces) if self.assembled else self._turned
        while count > 0 and piece < last:
            stop = min(offset + count, len(self._pieces[piece].tokens))
            found.append(self._pieces[piece].part(offset, stop))
            count -= stop - offset
            piece, offset = piece + 1, 0
        return found

    def advance(self, count: int) -> None:
        """That many tokens of the next piece are computed."""
        self.remaining -= count
        self._offset += count
        if self._offset == len(self._pieces[self._piece].tokens):
            if self._piece in self._missing:
                self._made(self._missing[self._piece], self._pieces[self._piece].table)
            self._piece, self._offset = self._piece + 1, 0

    def _own(self, places: Sequence[int]) -> RowTokens:
        """Positions of the row, which see all that is before them."""
        vectors = self._vectors if places[0] == 0 else None
        return RowTokens(
            [self._ids[place] for place in places], places, self._table[: places[-1] + 1], vectors
        )

    def _block(self, span: tuple[int, int]) -> RowTokens:
        """A block where it is made."""
        start, stop = span
        made_at = self.reuse.made_at
        table = np.concatenate([self._table[:made_at], self._table[start:stop]])
        return RowTokens(self._ids[start:stop], range(made_at, made_at + stop - start), table)
