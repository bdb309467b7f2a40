"""Single passes over a fixed set of rows, for measuring: what the loop does in a step, without its worker.

with engine.bench(requests) as steps:
steps.prefill()      every row's whole prompt, in chunks
steps.decode()       one token of every row; rows keep their length, so it can be repeated
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from persona_sdk.engine.forward.batch import RowTokens
from persona_sdk.engine.forward.general import GeneralForward
from persona_sdk.engine.loop import Loop, grouped
from persona_sdk.engine.row import Row
from persona_sdk.engine.sampling import choose
from persona_sdk.engine.schedule import Prefilling, chunks


@dataclass(frozen=True)
class FixedSteps:
    """Rows that are all there, and the passes over them. Sampling is included, ending rows is not."""

    loop: Loop
    rows: tuple[Row, ...]

    def prefill(self) -> tuple[int, ...]:
        """Compute every prompt from its beginning, in chunks as the loop does; every row's first token."""
        for row in self.rows:
            row.past = 0
            row.tokens.clear()
        by_number = {row.number: row for row in self.rows}
        while waiting := [Prefilling(row.number, row.remaining) for row in self.rows if row.remaining]:
            plan = chunks(waiting, self.loop.options.prefill_tokens)
            parts = grouped([(by_number[number], count) for number, count in plan])
            ready = [row for row, count in parts if row.remaining == count]
            tokens = self._pass(parts, ready)
            for row, count in parts:
                row.past += count
            for row, token in zip(ready, tokens, strict=True):
                row.tokens[:] = [token]
        return tuple(row.tokens[0] for row in self.rows)

    def decode(self) -> tuple[int, ...]:
        """Compute the next token of every row, and forget it."""
        return self._choose(self.rows, [row.step() for row in self.rows], self.rows)

    def bound(self, module: Any) -> Callable[..., Any]:
        """The model's own module with these rows' branches on its linears, for the general pass alone."""
        forward, numbers = self.loop.forward, [row.number for row in self.rows]
        assert isinstance(forward, GeneralForward)

        def call(input_ids: Tensor, **inputs: Any) -> Any:
            lengths = [input_ids.shape[1]] * len(numbers)
            branches = self.loop.table.patches.batch(numbers, lengths, input_ids.device)
            with forward.applying(branches):
                return module(input_ids=input_ids, **inputs)

        return call

    def _pass(self, parts: Sequence[tuple[Row, int]], ready: Sequence[Row]) -> tuple[int, ...]:
        return self._choose([row for row, _ in parts], [row.chunk(count) for row, count in parts], ready)

    @torch.inference_mode()
    def _choose(self, rows: Sequence[Row], new: Sequence[RowTokens], ready: Sequence[Row]) -> tuple[int, ...]:
        wanted = [rows.index(row) for row in ready]
        logits = self.loop.forward_pass([row.number for row in rows], new, wanted=wanted)
        return choose(logits, [row.sampler for row in ready]).ids if ready else ()
