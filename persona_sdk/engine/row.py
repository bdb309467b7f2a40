"""One running row: where it is in its prompt, where its keys and values are, what it has said.

entries of a prompt:   | KV prefix (given) | soft prefix (vectors) | tokens |   then the reply
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from persona_sdk.engine.entries import entries, given_entries
from persona_sdk.engine.forward.batch import RowTokens
from persona_sdk.engine.generation import Generation
from persona_sdk.engine.low_rank.arena import Slot
from persona_sdk.engine.prefix.assembly import Assembly
from persona_sdk.engine.request import Request, Steer
from persona_sdk.engine.sampling import RowSampler
from persona_sdk.tensors import TensorBundle


@dataclass(eq=False)
class Row:
    """A row of the table.

    Args:
        number: its place in the table.
        table: the pool's slots it holds, by position.
        slots: the adapter slots it holds, in the plan's order of patches.
        mark: where forgetting stood when the row was admitted.
        past: entries whose keys and values are in the pool, from the first one on.
        cached: how many of the prompt's tokens came from a kept prefix.
        assembly: how a prompt with reused blocks is computed; None computes what is behind `past`.
    """

    generation: Generation
    number: int
    table: NDArray[np.int64]
    slots: tuple[Slot, ...]
    sampler: RowSampler
    vectors: Float[Tensor, "_ d_model"] | None
    mark: int
    past: int = 0
    cached: int = 0
    assembly: Assembly | None = None
    tokens: list[int] = field(default_factory=list)
    steers: list[Steer] = field(default_factory=list)
    exported: TensorBundle | None = None

    @property
    def request(self) -> Request:
        """What was asked."""
        return self.generation.request

    @property
    def remaining(self) -> int:
        """Entries of the prompt that are still to be computed."""
        if self.assembly is not None:
            return self.assembly.remaining
        return max(entries(self.request) - self.past, 0)

    @property
    def exact(self) -> int:
        """How many of the prompt's first tokens get what a full prefill gives them."""
        return len(self.request.prompt) if self.assembly is None else self.assembly.reuse.exact

    @property
    def reused(self) -> int:
        """How many of the prompt's tokens have keys and values that lack the blocks before them."""
        return 0 if self.assembly is None else self.assembly.reuse.approximate

    def pieces(self, count: int) -> list[RowTokens]:
        """What of the prompt the next pass computes, at most `count` tokens."""
        return [self.chunk(count)] if self.assembly is None else self.assembly.next(count)

    def advance(self, count: int) -> None:
        """That many tokens of the next piece, or of the reply, are computed."""
        if self.assembly is None or not self.assembly.remaining:
            self.past += count
            return
        self.assembly.advance(count)
        if not self.assembly.remaining:
            self.past = entries(self.request)

    def chunk(self, count: int) -> RowTokens:
        """The next `count` entries of a prompt without reused blocks."""
        given, stop = given_entries(self.request), self.past + count
        ids = [0] * max(min(stop, given) - self.past, 0)
        ids += self.request.prompt[max(self.past - given, 0) : max(stop - given, 0)]
        vectors = None
        if self.vectors is not None and self.past < len(self.vectors):
            vectors = self.vectors[self.past : stop]
        return self._tokens(ids, vectors)

    def step(self) -> RowTokens:
        """The token that was chosen last."""
        return self._tokens(self.tokens[-1:])

    def _tokens(self, ids: Sequence[int], vectors: Tensor | None = None) -> RowTokens:
        stop = self.past + len(ids)
        return RowTokens(ids, range(self.past, stop), self.table[:stop], vectors)


def joined(vectors: Sequence[Float[Tensor, "_ d_model"]]) -> Float[Tensor, "_ d_model"] | None:
    """All vectors of a row, one after another; None if it has none."""
    return torch.cat(list(vectors)) if vectors else None
