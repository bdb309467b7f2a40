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
        past: entries whose keys and values are in the pool.
        cached: how many of the prompt's tokens came from a kept prefix.
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
        return max(entries(self.request) - self.past, 0)

    def chunk(self, count: int) -> RowTokens:
        """The next `count` entries of the prompt."""
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
