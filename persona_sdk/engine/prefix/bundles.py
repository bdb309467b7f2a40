"""Keys and values as bundles: what a row's prefix looks like outside the engine's pool.

| symbol | field            | shape                                                             |
|--------|------------------|-------------------------------------------------------------------|
| K      | `KEYS`           | [layers, tokens, kv_heads, key_dim], after the rotary embedding   |
| V      | `VALUES`         | [layers, tokens, kv_heads, value_dim]                             |

Soft vectors come first along the token axis, at positions 0, 1, ...; the prompt's tokens follow. All layers
have one shape; a model whose layers differ keeps no prefixes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from persona_sdk.engine.forward.pool import LayerShape
from persona_sdk.errors import InvalidInputError
from persona_sdk.tensors import TensorBundle

KEYS, VALUES = "keys", "values"


@dataclass(frozen=True)
class KVShape:
    """What one model keeps of one token."""

    layers: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, layers: Sequence[LayerShape], dtype: torch.dtype) -> "KVShape | None":
        """The shape of a pool; None if its layers differ."""
        if len(set(layers)) != 1:
            return None
        return cls(len(layers), layers[0].kv_heads, layers[0].key_dim, layers[0].value_dim, dtype)


def shape_of(bundle: TensorBundle, length: int) -> KVShape:
    """The shape of a bundle of `length` tokens.

    Raises:
        InvalidInputError: it is no bundle of keys and values, or holds another number of tokens.
    """
    keys, values = bundle.get(KEYS), bundle.get(VALUES)
    if keys is None or values is None:
        raise InvalidInputError(f"A KV bundle holds {sorted(bundle)}.", hint="Expected keys and values.")
    fits = keys.ndim == values.ndim == 4 and keys.shape[:3] == values.shape[:3] and keys.shape[1] == length
    if not fits or keys.dtype != values.dtype:
        raise InvalidInputError(
            f"Keys {tuple(keys.shape)} {keys.dtype} and values {tuple(values.shape)} {values.dtype} are not "
            f"those of {length} tokens.",
            hint=f"Expected two tensors [layers, {length}, kv_heads, dim] of one dtype.",
        )
    return KVShape(keys.shape[0], keys.shape[2], keys.shape[3], values.shape[3], keys.dtype)


def part(bundle: TensorBundle, start: int, stop: int) -> TensorBundle:
    """Views of the positions from `start` to before `stop`."""
    return {name: bundle[name][:, start:stop] for name in (KEYS, VALUES)}


def joined(parts: Sequence[TensorBundle]) -> TensorBundle:
    """Parts that stand one after another as one bundle; copied only if there are several."""
    if len(parts) == 1:
        return parts[0]
    return {name: torch.cat([bundle[name] for bundle in parts], dim=1) for name in (KEYS, VALUES)}


def last(parts: Sequence[TensorBundle], count: int) -> TensorBundle:
    """The last `count` positions of parts that stand one after another; copied as in `joined`."""
    found: list[TensorBundle] = []
    for bundle in reversed(parts):
        size = bundle[KEYS].shape[1]
        if count > 0:
            found.insert(0, part(bundle, max(size - count, 0), size))
        count -= size
    return joined(found)


def in_host(bundle: TensorBundle) -> TensorBundle:
    """The bundle in host memory of its own: copied unless it is exactly that already."""
    return {
        name: kept
        if (kept := bundle[name].detach()).device.type == "cpu"
        and kept.is_contiguous()
        and kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()
        else torch.empty(kept.shape, dtype=kept.dtype).copy_(kept)
        for name in (KEYS, VALUES)
    }


def erase(bundle: TensorBundle) -> None:
    """Overwrite every number with zero."""
    with torch.inference_mode():  # the only mode in which tensors made in it may be written to
        for tensor in bundle.values():
            tensor.zero_()
