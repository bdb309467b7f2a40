"""Passages into a budget of tokens, each with where it comes from.

Best first, as they were ranked: one that does not fit is left out, and shorter ones after it may still go
in. Nothing is cut in the middle, because half a statement can say the opposite of the whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from persona_sdk.errors import InvalidInputError
from persona_sdk.memory.passage import Passage


@dataclass(frozen=True)
class Packed:
    """What fits, best first, the tokens it takes, and the ids of what was left out."""

    passages: tuple[Passage, ...]
    tokens: int
    left_out: tuple[str, ...]


def pack(
    passages: Sequence[Passage], budget: int, count: Callable[[str], int], *, overhead: int = 0
) -> Packed:
    """Choose the passages that fit into `budget` tokens.

    Args:
        passages: best first.
        budget: tokens for all of them.
        count: how many tokens a line of `render` takes.
        overhead: tokens that a passage takes beyond its line.

    Raises:
        InvalidInputError: the budget is negative.
    """
    if budget < 0:
        raise InvalidInputError(f"The budget is {budget}.", hint="Expected 0 or more tokens.")
    kept: list[Passage] = []
    left_out, used = [], 0
    for passage in passages:
        cost = count(render(passage)) + overhead
        if used + cost <= budget:
            kept.append(passage)
            used += cost
        else:
            left_out.append(passage.id)
    return Packed(tuple(kept), used, tuple(left_out))


def render(passage: Passage) -> str:
    """A passage as one line of quoted data: source, owner, day and id, then its text in one line."""
    day = f"{passage.created_at:%Y-%m-%d}"
    owner = f" of {passage.owner}" if passage.owner else ""
    return f"[{passage.source}{owner}, {day}, {passage.id}] {' '.join(passage.text.split())}"
