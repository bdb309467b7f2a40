"""What a forward pass is to the engine: packed tokens in, logits out, low-rank branches at named sites."""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from persona_sdk.engine.forward.batch import PackedBatch
from persona_sdk.engine.forward.pool import LayerShape, TokenPool
from persona_sdk.engine.low_rank.sites import Site


@runtime_checkable
class Branches(Protocol):
    """The low-rank branches of a pass: adds every row's own to the output of a site, in place."""

    def add(self, site: Site, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens width"]) -> None:
        """``y += B (gate * (A x))`` for every row's patches at this site."""
        ...


@runtime_checkable
class Forward(Protocol):
    """One base model's forward pass.

    ``sites`` is where branches attach, ``layers`` what a token keeps, ``cache_dtype`` in which precision;
    ``capturable`` says that a decode pass on a device reads nothing back: it can be a CUDA graph.
    """

    capturable: bool
    sites: tuple[Site, ...]
    layers: tuple[LayerShape, ...]
    cache_dtype: torch.dtype

    def spread(self, lengths: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens per row as the sites see them: as packed, or padded to one length."""
        ...

    def __call__(
        self, batch: PackedBatch, pool: TokenPool, branches: Branches | None, *, every: bool = False
    ) -> Float[Tensor, "outputs vocab"]:
        """Float32 logits after the last token of every wanted row, or after every token. Writes the new
        tokens' keys and values into the pool.
        """
        ...

    def close(self) -> None:
        """Leave the base model as it was found."""
        ...


def embedded(embed: nn.Module, batch: PackedBatch) -> Float[Tensor, "tokens d_model"]:
    """Token embeddings, with the rows' own vectors in their places."""
    x: Tensor = embed(batch.tokens)
    for start, vectors in batch.vectors:
        x[start : start + len(vectors)] = vectors.to(x)
    return x
