"""Memory blocks in any order: which tokens of a prompt keep what was computed without their neighbours.

    prompt      | lead | head | block a | gap | block b | ... | question |
    kept               each block computed by itself: behind lead and head, or behind nothing
    place       k' = R(start - made_at) k,  v' = v              (`rotation`)
    compute     lead, head, the picked tokens of the blocks, what is in between, and the question

What a block was computed without, the blocks now before it, stays missing in the tokens that are not
picked. So this is an approximation: exact only where every block token is picked, and in a first block that
stands where it was made. Pure data and functions; `assembly` puts it into rows.

| symbol  | field                 | shape                                                              |
|---------|-----------------------|--------------------------------------------------------------------|
| start   | `BlockReuse.starts`   | [blocks], positions in the row                                     |
| d       | `BlockReuse.deltas`   | [blocks], start minus the position the block was made at           |
|         | `BlockReuse.computed` | [tokens], ascending positions                                      |
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from persona_sdk.config import FrozenConfig
from persona_sdk.engine.prefix.rotation import pick_recomputed
from persona_sdk.errors import InvalidInputError


class ReuseOptions(FrozenConfig):
    """How blocks are reused.

    ``first`` picks the first tokens of every block, ``deviation`` those whose keys in the second layer
    differ most from what a full pass gives there, ``both`` half of each.
    """

    fraction: float = Field(0.15, ge=0, le=1, description="of every block's tokens, computed again")
    pick: Literal["first", "deviation", "both"] = "first"
    behind_head: bool = Field(True, description="blocks are made behind the head, not at the beginning")


@dataclass(frozen=True)
class BlockPrompt:
    """A prompt and which of its tokens are blocks: ``(start, stop)`` of each, ascending.

    The head is what stands before the first block, the question what stands after the last one. What stands
    between two blocks belongs to none and is always computed.

    Raises:
        InvalidInputError: spans that are empty, overlap, or leave no question.
    """

    tokens: tuple[int, ...]
    blocks: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        check_spans(self.blocks, len(self.tokens))

    @classmethod
    def of(cls, head: Sequence[int], blocks: Sequence[Sequence[int]], question: Sequence[int]) -> Self:
        """From pieces that stand one after another."""
        borders = pairwise(accumulate(map(len, blocks), initial=len(head)))
        return cls((*head, *(token for block in blocks for token in block), *question), tuple(borders))

    @property
    def head(self) -> tuple[int, ...]:
        """What stands before the first block."""
        return self.tokens[: self.blocks[0][0]] if self.blocks else self.tokens


@dataclass(frozen=True)
class BlockReuse:
    """What goes where and what is computed: pure data. Make it with `plan_reuse`.

    Args:
        prompt: the prompt in pieces.
        lead: positions of a soft prefix before it.
        made_at: position at which every block was made.
        blocks: spans of the blocks to be put into the row, in positions of the row.
        computed: positions to compute once they are there.
        approximate: tokens whose keys and values lack the blocks now before them.
    """

    prompt: BlockPrompt
    lead: int
    made_at: int
    blocks: tuple[tuple[int, int], ...]
    computed: tuple[int, ...]
    approximate: int

    @property
    def starts(self) -> tuple[int, ...]:
        """First position of every block."""
        return tuple(start for start, _ in self.blocks)

    @property
    def deltas(self) -> tuple[int, ...]:
        """How far each block's keys are turned."""
        return tuple(start - self.made_at for start in self.starts)

    @property
    def exact(self) -> int:
        """How many of the prompt's first tokens get what a full prefill gives them."""
        if not self.approximate:
            return len(self.prompt.tokens)
        return next(start for start in self.starts if start != self.made_at) - self.lead


def check_spans(spans: Sequence[tuple[int, int]], length: int) -> None:
    """Raise `InvalidInputError` unless these can be the blocks of a prompt of `length` tokens."""
    last = 0
    for start, stop in spans:
        if not last <= start < stop:
            raise InvalidInputError(
                f"Block ({start}, {stop}) behind token {last}.",
                hint="Expected ascending spans (start, stop) of at least one token each.",
            )
        last = stop
    if last >= length:
        raise InvalidInputError(
            f"Blocks up to token {last} of {length}.", hint="At least one token must follow the last block."
        )


def plan_reuse(
    prompt: BlockPrompt,
    options: ReuseOptions,
    *,
    lead: int = 0,
    done: int = 0,
    deviation: Float[Tensor, " tokens"] | None = None,
) -> BlockReuse:
    """Places and picked tokens.

    Args:
        prompt: the pieces.
        options: which tokens are computed again.
        lead: positions of a soft prefix before the head.
        done: positions that are there already, exactly. A block that begins before that is no longer one:
            what is left of it is computed.
        deviation: of every block token; what `options.pick` other than ``first`` needs.

    Raises:
        InvalidInputError: deviations are missing, or not one a token.
    """
    if (options.pick == "first") != (deviation is None):
        raise InvalidInputError(f"Picking by {options.pick!r}.", hint="Deviations go with the other picks.")
    spans = [(lead + start, lead + stop) for start, stop in prompt.blocks]
    first = lead + len(prompt.head)
    made_at = first if options.behind_head else 0
    # What comes first is never picked: a first block that stands where it was made, or else the head.
    before = [first] if first != made_at else []
    if deviation is not None:
        deviation = torch.cat([deviation.new_zeros(sum(before)), deviation])
    share = {"first": 1.0, "both": 0.5, "deviation": 0.0}[options.pick]
    lengths = [*before, *(stop - start for start, stop in spans)]
    picked = pick_recomputed(lengths, options.fraction, deviation=deviation, leading=share)
    kept = torch.zeros(lead + len(prompt.tokens), dtype=torch.bool)
    approximate, offset = 0, sum(before)
    for start, stop in spans:
        again = picked[offset : offset + stop - start]
        offset += stop - start
        if start >= done:
            kept[start:stop] = ~again
            approximate += int((~again).sum()) if start != made_at else 0
    computed = (~kept).nonzero()[:, 0].tolist()
    return BlockReuse(
        prompt,
        lead,
        made_at,
        tuple(span for span in spans if span[0] >= done),
        tuple(place for place in computed if place >= done),
        approximate,
    )
