"""The host tier: flat blocks in memory, the least recently used goes first, within a budget of bytes.

Adapters that stand in a device slot too go before all others: losing their block costs nothing now.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from persona_sdk.engine.low_rank.blocks import BlockLayout
from persona_sdk.engine.low_rank.slots import Key


@dataclass(eq=False)
class Block:
    """The factors of one adapter in host memory.

    Args:
        ahead: fetched before anybody asked for it.
    """

    layout: BlockLayout
    data: Float[Tensor, " size"]
    ahead: bool = False

    @property
    def bytes(self) -> int:
        """Bytes it takes."""
        return self.data.numel() * self.data.element_size()

    def erase(self) -> None:
        """Overwrite it with zeros, after copies that are still queued."""
        if torch.cuda.is_available() and self.data.is_pinned():
            torch.cuda.synchronize()
        self.data.zero_()


class HostTier:
    """Blocks by key. Not thread-safe: its owner holds a lock."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.bytes = 0
        self.ahead_bytes = 0
        self._blocks: OrderedDict[Key, Block] = OrderedDict()

    def __contains__(self, key: Key) -> bool:
        return key in self._blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def get(self, key: Key) -> Block | None:
        """The block of an adapter somebody asks for."""
        block = self._blocks.get(key)
        if block is not None:
            self._used(block)
            self._blocks.move_to_end(key)
        return block

    def put(self, key: Key, block: Block) -> list[tuple[Key, Block]]:
        """Keep a block. Returned is what had to go for it; itself, if it is above the budget."""
        old = self._blocks.pop(key, None)
        if old is not None:
            self._gone(old)
        if block.bytes > self.budget:
            return [(key, block)]
        out = []
        while self.bytes + block.bytes > self.budget:
            oldest, other = self._blocks.popitem(last=False)
            self._gone(other)
            out.append((oldest, other))
        self._blocks[key] = block
        self.bytes += block.bytes
        self.ahead_bytes += block.bytes if block.ahead else 0
        return out

    def expendable(self, key: Key) -> None:
        """First to go: the adapter stands in a slot."""
        if key in self._blocks:
            self._blocks.move_to_end(key, last=False)

    def forget(self, key: Key) -> None:
        """Erase a block."""
        block = self._blocks.pop(key, None)
        if block is not None:
            self._gone(block)
            block.erase()

    def keys(self) -> tuple[Key, ...]:
        """All that is here, oldest first."""
        return tuple(self._blocks)

    def _used(self, block: Block) -> None:
        if block.ahead:
            block.ahead = False
            self.ahead_bytes -= block.bytes

    def _gone(self, block: Block) -> None:
        self._used(block)
        self.bytes -= block.bytes
