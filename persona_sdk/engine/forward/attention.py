"""Attention of packed rows over the token pool, with grouped query heads and rotary positions.

    softmax(q k^T * scale) v        every token sees its own row's positions up to its own

| symbol | argument | shape                                                                  |
|--------|----------|------------------------------------------------------------------------|
| q      | query    | [tokens, heads, head_dim]                                              |
| k, v   | pool     | [capacity, kv_heads, head_dim] per layer, read through `batch.tables`  |

`attend` is the reference and serves prefill and every device. `decode_attention` is the same for one new
token per row on CPUs, compiled: it rotates, writes the new key and value, and reads each row's own length,
where a padded batch would gather, mask and read the longest.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, no_type_check

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from persona_sdk.engine.compiled import compiled
from persona_sdk.engine.forward.batch import PackedBatch
from persona_sdk.engine.forward.pool import TokenPool
from persona_sdk.engine.stored import rounded, widened


def rotate(
    x: Float[Tensor, "*layers tokens heads head_dim"],
    cos: Float[Tensor, "tokens rotary_dim"],
    sin: Float[Tensor, "tokens rotary_dim"],
) -> Float[Tensor, "*layers tokens heads head_dim"]:
    """Rotary position embedding in the half-split convention; dimensions past `rotary_dim` pass through."""
    width = cos.shape[1]
    turned, rest = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, dim=-1)
    swapped = torch.cat([-second, first], dim=-1)
    out = turned * cos[:, None] + swapped * sin[:, None]
    return torch.cat([out, rest], dim=-1) if rest.shape[-1] else out


def attend(
    query: Float[Tensor, "tokens heads key_dim"],
    key: Float[Tensor, "tokens kv_heads key_dim"],
    value: Float[Tensor, "tokens kv_heads value_dim"],
    batch: PackedBatch,
    pool: TokenPool,
    layer: int,
    scale: float,
) -> Float[Tensor, "tokens heads value_dim"]:
    """Write the new keys and values, then attend. One kernel call for a decode pass, else one per row."""
    pool.write(layer, batch.slots, key, value)
    if batch.is_decode:
        keys, values = gathered(batch, pool, layer, query.dtype)
        columns = torch.arange(batch.tables.shape[1], device=query.device)
        visible = columns <= batch.positions[:, None]
        out = F.scaled_dot_product_attention(
            query[:, :, None], keys, values, attn_mask=visible[:, None, None], scale=scale, enable_gqa=True
        )
        return out[:, :, 0]
    pieces = []
    for row, (start, length) in enumerate(zip(batch.starts, batch.lengths, strict=True)):
        stop, mask = start + length, None
        if batch.fresh[row]:
            keys, values = key[start:stop], value[start:stop]
        else:
            table = batch.tables[row, : batch.seen[row]]
            keys = pool.keys[layer].index_select(0, table).to(query.dtype)
            values = pool.values[layer].index_select(0, table).to(query.dtype)
            columns = torch.arange(batch.seen[row], device=query.device)
            mask = columns <= batch.positions[start:stop, None]
        out = F.scaled_dot_product_attention(
            query[None, start:stop].transpose(1, 2),
            keys[None].transpose(1, 2),
            values[None].transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=True,
        )
        pieces.append(out[0].transpose(0, 1))
    return torch.cat(pieces)


def gathered(
    batch: PackedBatch, pool: TokenPool, layer: int, dtype: torch.dtype
) -> tuple[Float[Tensor, "rows kv_heads width key_dim"], Float[Tensor, "rows kv_heads width value_dim"]]:
    """Keys and values of all rows, padded with the zero slot to one width."""
    return (
        pool.keys[layer][batch.tables].to(dtype).transpose(1, 2),
        pool.values[layer][batch.tables].to(dtype).transpose(1, 2),
    )


@lru_cache
def decode_attention(head_dim: int, rotary_dim: int, repeat: int) -> Callable[..., None] | None:
    """The compiled decode step for one head geometry; None where numba cannot be imported.

    Call with numpy arrays: ``qkv [rows, (heads + 2 kv_heads) head_dim]``, ``cos, sin [rows, rotary_dim]``,
    the layer's pools, ``tables [rows, width]``, ``seen [rows]``, the scale, ``kv_heads`` and
    ``out [rows, heads head_dim]``. `qkv`, pools and `out` are float32 or the bits of bfloat16 (stored.py),
    each by itself; sums are float32. Constants of the closure let the compiler unroll over `head_dim`.
    """
    half, zero, lowest = rotary_dim // 2, np.float32(0), np.float32(-np.inf)

    @no_type_check  # see compiled.py
    def step(
        qkv: Any,
        cos: Any,
        sin: Any,
        keys: Any,
        values: Any,
        tables: Any,
        seen: Any,
        scale: Any,
        kv_heads: Any,
        out: Any,
    ) -> None:
        query = np.empty((kv_heads, repeat, head_dim), np.float32)
        total = np.empty((kv_heads, repeat, head_dim), np.float32)
        scores = np.empty((kv_heads, repeat, tables.shape[1]), np.float32)
        for row in range(qkv.shape[0]):
            length = seen[row]
            new = tables[row, length - 1]
            for head in range(kv_heads):
                first = (kv_heads * repeat + head) * head_dim
                key, value = keys[new, head], values[new, head]
                for d in range(half):
                    a, b = widened(qkv[row, first + d]), widened(qkv[row, first + half + d])
                    key[d] = rounded(a * cos[row, d] - b * sin[row, d], key)
                    key[half + d] = rounded(b * cos[row, half + d] + a * sin[row, half + d], key)
                for d in range(rotary_dim, head_dim):
                    key[d] = rounded(widened(qkv[row, first + d]), key)
                first += kv_heads * head_dim
                for d in range(head_dim):
                    value[d] = rounded(widened(qkv[row, first + d]), value)
                for r in range(repeat):
                    first = (head * repeat + r) * head_dim
                    turned = query[head, r]
                    for d in range(half):
                        a, b = widened(qkv[row, first + d]), widened(qkv[row, first + half + d])
                        turned[d] = (a * cos[row, d] - b * sin[row, d]) * scale
                        turned[half + d] = (b * cos[row, half + d] + a * sin[row, half + d]) * scale
                    for d in range(rotary_dim, head_dim):
                        turned[d] = widened(qkv[row, first + d]) * scale
            # Tokens outside, heads inside: a token's heads lie side by side in memory.
            for t in range(length):
                token = keys[tables[row, t]]
                for head in range(kv_heads):
                    key = token[head]
                    for r in range(repeat):
                        dot, turned = zero, query[head, r]
                        for d in range(head_dim):
                            dot += turned[d] * widened(key[d])
                        scores[head, r, t] = dot
            for head in range(kv_heads):
                for r in range(repeat):
                    line = scores[head, r]
                    highest, norm = lowest, zero
                    for t in range(length):
                        highest = max(highest, line[t])
                    for t in range(length):
                        weight = math.exp(line[t] - highest)
                        line[t] = weight
                        norm += weight
                    for t in range(length):
                        line[t] /= norm
            total[:] = zero
            fours = length - length % 4
            for t in range(0, fours, 4):  # four tokens a time: `into` is read and written once for all
                one, two = values[tables[row, t]], values[tables[row, t + 1]]
                three, four = values[tables[row, t + 2]], values[tables[row, t + 3]]
                for head in range(kv_heads):
                    for r in range(repeat):
                        share, into = scores[head, r, t : t + 4], total[head, r]
                        for d in range(head_dim):
                            into[d] += (
                                share[0] * widened(one[head, d])
                                + share[1] * widened(two[head, d])
                                + share[2] * widened(three[head, d])
                                + share[3] * widened(four[head, d])
                            )
            for t in range(fours, length):
                token = values[tables[row, t]]
                for head in range(kv_heads):
                    for r in range(repeat):
                        weight, into = scores[head, r, t], total[head, r]
                        for d in range(head_dim):
                            into[d] += weight * widened(token[head, d])
            for head in range(kv_heads):
                for r in range(repeat):
                    first = (head * repeat + r) * head_dim
                    for d in range(head_dim):
                        out[row, first + d] = rounded(total[head, r, d], out)

    return compiled(step)
