"""Keys and values of all rows, token by token, in one pool per layer.

    keys[layer]   [capacity, kv_heads, head_dim]        a row owns a list of token slots, in order of position
    slot 0        zeros; pads tables of different lengths, so that a gather never reads a stale number
    slot 1        scratch: where places of a fixed batch that no row takes write, and what they alone read

A row reserves every slot it may need when it is admitted and gives all of them back at once, so a running
row never lacks room and there is nothing to compact. The pool starts small and doubles up to its budget.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from persona_sdk.errors import BudgetError, DeviceMemoryError
from persona_sdk.tensors import TensorBundle

KEYS, VALUES = "keys", "values"
SCRATCH = 1
_RESERVED = 2  # slots no row can own
_FIRST_CAPACITY = 1024


@dataclass(frozen=True)
class LayerShape:
    """What one token keeps in one layer."""

    kv_heads: int
    key_dim: int
    value_dim: int


class TokenPool:
    """Token slots and their keys and values.

    Args:
        layers: shape of every layer.
        budget_bytes: what keys and values may take together.
    """

    def __init__(
        self, layers: Sequence[LayerShape], *, device: torch.device, dtype: torch.dtype, budget_bytes: int
    ) -> None:
        self.layers, self.dtype = tuple(layers), dtype
        numbers = sum(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in self.layers)
        self.bytes_per_token = numbers * torch.empty((), dtype=dtype).element_size()
        self.most_tokens = max(budget_bytes // self.bytes_per_token, _RESERVED)
        first = min(_FIRST_CAPACITY, self.most_tokens)
        self.keys = [
            torch.zeros(first, layer.kv_heads, layer.key_dim, device=device, dtype=dtype)
            for layer in self.layers
        ]
        self.values = [
            torch.zeros(first, layer.kv_heads, layer.value_dim, device=device, dtype=dtype)
            for layer in self.layers
        ]
        self._capacity = first
        self._free: NDArray[np.int64] = np.arange(_RESERVED, first)

    @property
    def capacity(self) -> int:
        """Token slots that exist, those no row can own included."""
        return self._capacity

    @property
    def used(self) -> int:
        """Token slots that rows hold."""
        return self.capacity - _RESERVED - len(self._free)

    @property
    def addresses(self) -> tuple[tuple[int, int], ...]:
        """Where every layer's keys and values stand and how many slots they have; changes when they grow."""
        return tuple((layer.data_ptr(), len(layer)) for layer in (*self.keys, *self.values))

    def take(self, count: int) -> NDArray[np.int64] | None:
        """Reserve `count` slots; None while other rows hold too many.

        Raises:
            BudgetError: more than the whole budget.
            DeviceMemoryError: the device cannot hold a larger pool.
        """
        most = self.most_tokens - _RESERVED
        if count > most:
            raise BudgetError(
                f"The request needs room for {count} tokens; {most} fit the budget.",
                hint="Shorten the prompt, ask for fewer new tokens, or raise EngineOptions.kv_bytes.",
            )
        if count > len(self._free):
            if self.used + count > most:
                return None
            self._grow(self.used + count + _RESERVED)
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def give(self, slots: NDArray[np.int64]) -> None:
        """Return slots. What they held is never read again: tables only name slots that were written."""
        self._free = np.concatenate([slots, self._free])

    def export(self, slots: NDArray[np.int64]) -> TensorBundle:
        """Copy of the keys and values in some slots: two tensors ``[layers, tokens, kv_heads, dim]``."""
        index = torch.from_numpy(slots).to(self.keys[0].device)
        return {
            KEYS: torch.stack([layer.index_select(0, index) for layer in self.keys]),
            VALUES: torch.stack([layer.index_select(0, index) for layer in self.values]),
        }

    def load(self, slots: NDArray[np.int64], bundle: TensorBundle) -> None:
        """Write a bundle made by `export` into other slots."""
        index = torch.from_numpy(slots).to(self.keys[0].device)
        for pools, kept in ((self.keys, bundle[KEYS]), (self.values, bundle[VALUES])):
            for layer, pool in enumerate(pools):
                pool.index_copy_(0, index, kept[layer, : len(slots)].to(pool))

    def write(
        self,
        layer: int,
        slots: Int[Tensor, " tokens"],
        keys: Float[Tensor, "tokens kv_heads key_dim"],
        values: Float[Tensor, "tokens kv_heads value_dim"],
    ) -> None:
        """Put new tokens into their slots."""
        self.keys[layer].index_copy_(0, slots, keys.to(self.keys[layer].dtype))
        self.values[layer].index_copy_(0, slots, values.to(self.values[layer].dtype))

    def _grow(self, needed: int) -> None:
        old = self.capacity
        for size in (min(max(2 * old, needed), self.most_tokens), needed):  # less, if the device is full
            try:
                # One layer at a time: the peak is one layer above the total, not twice the total.
                for pools in (self.keys, self.values):
                    for layer, pool in enumerate(pools):
                        if pool.shape[0] < size:
                            pools[layer] = torch.cat(
                                [pool, pool.new_zeros(size - pool.shape[0], *pool.shape[1:])]
                            )
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
                continue
            # Only now: after a failure some layers are larger than others, which later growth makes up for.
            self._capacity = size
            self._free = np.concatenate([self._free, np.arange(old, size)])
            return
        raise DeviceMemoryError(
            f"The device has no memory for keys and values of {needed} tokens.",
            hint="Ask again when other rows are done, or lower EngineOptions.kv_bytes.",
        )


def _out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed; torch says so in words of its own on every system."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error) for words in ("not enough memory", "can't allocate memory"))
