"""transformers as it is called by hand: eager modules with a `DynamicCache`, with and without peft.

| class     | one step                                                                  | forward passes |
|-----------|---------------------------------------------------------------------------|----------------|
| Eager     | the module on all rows; with peft's ``adapter_names``, its mixed batch     | 1              |
| Switching | for every adapter: ``set_adapter``, then the module on the rows that use it | U              |

peft's hooks for a mixed batch are set once at the start, as its ``generate`` does.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from benchmarks.contenders import Contender, Peft

Vectors = Float[Tensor, "rows length d_model"]


class Eager:
    """All rows in one call.

    Args:
        contender: whose forward pass.
        adapters: the adapter of each row.
        tokens: the prompts.
        vectors: soft vectors in front of them.
        embeddings: the model's token embeddings; needed where there are vectors.
    """

    def __init__(
        self,
        contender: Contender,
        adapters: Sequence[int],
        tokens: Int[Tensor, "rows width"],
        vectors: Vectors | None = None,
        embeddings: Any = None,
    ) -> None:
        self._contender, self._adapters = contender, adapters
        self._tokens, self._vectors, self._embeddings = tokens, vectors, embeddings
        self._stack = ExitStack()
        self._forward: Any = None
        self._batch: _Batch | None = None

    def start(self) -> None:
        """Set the rows' adapters."""
        self._forward = self._stack.enter_context(self._contender.assigned(self._adapters))
        self._batch = _Batch(self._tokens, self._vectors, self._embeddings)

    def prefill(self) -> list[int]:
        """The prompts in one call."""
        assert self._batch is not None
        return self._batch.prefill(self._forward).tolist()

    def decode(self) -> list[int]:
        """One call on the last tokens."""
        assert self._batch is not None
        return self._batch.decode(self._forward).tolist()

    def again(self) -> None:
        """Drop the cache."""
        self._batch = _Batch(self._tokens, self._vectors, self._embeddings)

    def stop(self) -> None:
        """Take the adapters off and drop the cache."""
        self._stack.close()
        self._forward = self._batch = None


class Switching:
    """Rows grouped by adapter, one call a group."""

    def __init__(
        self,
        peft: Peft,
        adapters: Sequence[int],
        tokens: Int[Tensor, "rows width"],
        vectors: Vectors | None = None,
        embeddings: Any = None,
    ) -> None:
        self._peft = peft
        self._tokens, self._vectors, self._embeddings = tokens, vectors, embeddings
        self._members: dict[int, list[int]] = {}
        for row, adapter in enumerate(adapters):
            self._members.setdefault(adapter, []).append(row)
        self._batches: dict[int, _Batch] = {}

    def start(self) -> None:
        """A cache for every group."""
        for adapter, rows in self._members.items():
            vectors = None if self._vectors is None else self._vectors[rows]
            self._batches[adapter] = _Batch(self._tokens[rows], vectors, self._embeddings)

    def prefill(self) -> list[int]:
        """The prompts, group by group."""
        return self._each("prefill")

    def decode(self) -> list[int]:
        """The last tokens, group by group."""
        return self._each("decode")

    def again(self) -> None:
        """New caches."""
        self.start()

    def stop(self) -> None:
        """Drop the caches."""
        self._batches.clear()

    def _each(self, step: str) -> list[int]:
        chosen = torch.empty(len(self._tokens), dtype=torch.long)
        for adapter, rows in self._members.items():
            self._peft._peft.set_adapter(f"a{adapter}", inference_mode=True)
            chosen[rows] = getattr(self._batches[adapter], step)(self._peft._module)
        return chosen.tolist()


class _Batch:
    """Prompts, then a growing cache."""

    def __init__(self, tokens: Tensor, vectors: Tensor | None, embeddings: Any) -> None:
        self._tokens, self._vectors, self._embeddings = tokens, vectors, embeddings
        self._cache: Any = None
        self._last = tokens[:, -1:]

    def prefill(self, forward: Any) -> Int[Tensor, " rows"]:
        if self._vectors is None:
            return self._run(forward, input_ids=self._tokens)
        embedded = torch.cat([self._vectors, self._embeddings(self._tokens)], dim=1)
        return self._run(forward, inputs_embeds=embedded)

    def decode(self, forward: Any) -> Int[Tensor, " rows"]:
        return self._run(forward, input_ids=self._last, past_key_values=self._cache)

    def _run(self, forward: Any, **inputs: Any) -> Int[Tensor, " rows"]:
        output = forward(**inputs, use_cache=True, logits_to_keep=1)
        chosen: Tensor = output.logits[:, -1].argmax(-1)
        self._cache, self._last = output.past_key_values, chosen[:, None]
        return chosen
