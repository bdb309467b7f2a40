"""Attach the low-rank branch to the linears of a model, once, without changing its module tree.

A forward hook sits on every linear. It does nothing unless rows are bound around the call, so the same
model object still is the base model for everybody else, and names, shapes and state dict stay as they
were (wrapper modules would rename them, and with them the fingerprint).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from persona_sdk.engine.rows import LowRankRows, add_low_rank


class LowRankHooks:
    """Hooks on every linear, and the rows they apply while `bound`.

    Not re-entrant: callers hold the model's lock around `bound`.
    """

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        self._rows: LowRankRows | None = None
        self._handles = [
            module.register_forward_hook(self._hook_for(path)) for path, module in linears.items()
        ]

    @contextmanager
    def bound(self, rows: LowRankRows | None) -> Iterator[None]:
        """Apply `rows` to every forward pass inside the block."""
        self._rows = rows
        try:
            yield
        finally:
            self._rows = None

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook_for(self, path: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            rows = self._rows
            factors = rows.modules.get(path) if rows is not None else None
            if rows is None or factors is None:
                return None
            return add_low_rank(inputs[0], output, factors, rows.gate)

        return hook
