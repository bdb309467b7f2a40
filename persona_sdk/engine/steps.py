"""Single passes over a fixed set of rows, for measuring: what the loop does in a step, without its worker.

steps = engine.bench(requests)
steps.prefill()          every row's whole prompt in one pass
steps.decode()           one token of every row; rows keep their length, so it can be repeated
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from persona_sdk.engine.forward.batch import RowTokens
from persona_sdk.engine.forward.general import GeneralForward
from persona_sdk.engine.row import Row
from persona_sdk.engine.sampling import choose

if TYPE_CHECKING:
    from persona_sdk.engine.loop import Loop


@dataclass(frozen=True)
class FixedSteps:
    """Rows that are all there, and the passes over them. Sampling is included, ending rows is not."""

    loop: "Loop"
    rows: tuple[Row, ...]

    def prefill(self) -> tuple[int, ...]:
        """Compute every prompt from its beginning; the first token of every row."""
        for row in self.rows:
            row.past = 0
        parts = [row.chunk(row.remaining) for row in self.rows]
        first = self._pass(parts)
        for row, part, token in zip(self.rows, parts, first, strict=True):
            row.past = len(part.tokens)
            row.tokens[:] = [token]
        return first

    def decode(self) -> tuple[int, ...]:
        """Compute the next token of every row, and forget it."""
        return self._pass([row.step() for row in self.rows])

    def bound(self, module: Any) -> Callable[..., Any]:
        """The model's own module with these rows' branches on its linears, for the general pass alone."""
        forward, numbers = self.loop.forward, [row.number for row in self.rows]
        assert isinstance(forward, GeneralForward)

        def call(input_ids: Tensor, **inputs: Any) -> Any:
            lengths = [input_ids.shape[1]] * len(numbers)
            branches = self.loop.patches.batch(numbers, lengths, input_ids.device)
            with forward.applying(branches):
                return module(input_ids=input_ids, **inputs)

        return call

    @torch.inference_mode()
    def _pass(self, parts: list[RowTokens]) -> tuple[int, ...]:
        logits = self.loop.forward_pass([row.number for row in self.rows], parts)
        return choose(logits, [row.sampler for row in self.rows]).ids
