"""A batch that is run one step at a time: the one form in which all contenders are compared.

    start ──► prefill ──► decode ──► decode ... ──► stop
                 └── again ──► prefill ...

Every step includes what a server does in it: building its inputs, the forward pass, the head at the last
position of each row, and the greedy choice of the next token.
"""

from typing import Protocol


class Rows(Protocol):
    """A fixed batch of rows of equal length, greedy, that never ends by itself."""

    def start(self) -> None:
        """Make the batch ready; nothing is computed."""
        ...

    def prefill(self) -> list[int]:
        """Compute all prompts and give the first token of each row."""
        ...

    def decode(self) -> list[int]:
        """Give the next token of each row."""
        ...

    def again(self) -> None:
        """Make ready for another `prefill` of the same prompts. Never timed."""
        ...

    def stop(self) -> None:
        """Drop the batch and all it holds."""
        ...


def reply(rows: Rows, tokens: int) -> list[tuple[int, ...]]:
    """The first `tokens` tokens of every row, from a fresh start."""
    rows.start()
    try:
        steps = [rows.prefill(), *(rows.decode() for _ in range(tokens - 1))]
    finally:
        rows.stop()
    return list(zip(*steps, strict=True))


def agreement(one: list[tuple[int, ...]], other: list[tuple[int, ...]]) -> float:
    """Share of rows whose tokens are all equal."""
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)
