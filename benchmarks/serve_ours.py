"""Our engine as a step-by-step batch, by its own `Engine.bench`."""

from collections.abc import Sequence
from contextlib import ExitStack

from persona_sdk.engine import Engine, Request
from persona_sdk.engine.steps import FixedSteps


class OurRows:
    """A fixed batch in an engine: admission at the start, then passes over all rows with sampling."""

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self._engine, self._requests = engine, list(requests)
        self._stack = ExitStack()
        self._steps: FixedSteps | None = None

    def start(self) -> None:
        """Admit the rows: their adapters go to slots, their keys and values get room."""
        self._steps = self._stack.enter_context(self._engine.bench(self._requests))

    def prefill(self) -> list[int]:
        """One pass over all prompts, from their beginning."""
        assert self._steps is not None
        return list(self._steps.prefill())

    def decode(self) -> list[int]:
        """One token of every row; the rows grow by it, as everybody's do."""
        assert self._steps is not None
        tokens = self._steps.decode()
        for row, token in zip(self._steps.rows, tokens, strict=True):
            row.past += 1
            row.tokens[:] = [token]
        return list(tokens)

    def again(self) -> None:
        """Nothing: a prefill begins with the first token."""

    def stop(self) -> None:
        """Free the rows."""
        self._stack.close()
        self._steps = None
