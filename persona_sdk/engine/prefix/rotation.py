"""Reuse of keys at another place: the mathematics. Pure functions.

A key is kept after its rotary embedding. Rotations of a plane add up, so a key made at position p belongs
at position p + d after one more turn by d:

    R(p + d) k = R(d) R(p) k,     R(d) (a, b) = (a cos(d w) - b sin(d w),  b cos(d w) + a sin(d w))

with (a, b) the two halves of a head, as in Llama. Values carry no position. What the turn cannot mend is
that a block computed by itself has not attended to the blocks now before it; `pick_recomputed` chooses
the tokens that are computed again for that.

| symbol | parameter        | shape                                                                 |
|--------|------------------|-----------------------------------------------------------------------|
| w      | `inverse_frequency` | [rotary / 2]                                                       |
| d      | `deltas`         | [tokens], new position minus the one the key was made at              |
| k      | `keys`           | [layers, tokens, kv_heads, head_dim]; only the first `rotary` dims turn |

Exact for frequencies that do not depend on the length (default, linear, Llama 3, YaRN); a scaled attention
(YaRN's factor on cos and sin) is in the kept key already and must not be in the turn.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from persona_sdk.engine.forward.attention import rotate
from persona_sdk.errors import InvalidInputError


def delta_cos_sin(
    inverse_frequency: Float[Tensor, " half"], deltas: Int[Tensor, " tokens"]
) -> tuple[Float[Tensor, "tokens rotary"], Float[Tensor, "tokens rotary"]]:
    """Cosine and sine of the turn of every token, both halves side by side, in float32."""
    # In float64: the product of a far position and a frequency loses digits that cos would need.
    angles = deltas.double()[:, None] * inverse_frequency.double()[None, :]
    both = torch.cat([angles, angles], dim=1)
    return both.cos().float(), both.sin().float()


def rotate_keys(
    keys: Float[Tensor, "layers tokens kv_heads head_dim"],
    cos: Float[Tensor, "tokens rotary"],
    sin: Float[Tensor, "tokens rotary"],
) -> Float[Tensor, "layers tokens kv_heads head_dim"]:
    """Keys turned from the positions they were made at to new ones; see `delta_cos_sin`."""
    return rotate(keys.to(cos.dtype), cos, sin).to(keys.dtype)


def key_deviation(
    kept: Float[Tensor, "layers tokens kv_heads head_dim"],
    fresh: Float[Tensor, "layers tokens kv_heads head_dim"],
) -> Float[Tensor, " tokens"]:
    """Root mean square between each token's kept and freshly computed keys, over some first layers."""
    return (kept.float() - fresh.float()).square().mean(dim=(0, 2, 3)).sqrt()


def pick_recomputed(
    lengths: Sequence[int],
    fraction: float,
    *,
    deviation: Float[Tensor, " tokens"] | None = None,
    leading: float = 0.5,
) -> Bool[Tensor, " tokens"]:
    """Which tokens of blocks that stand one after another are computed again.

    The first block has nothing before it, so it is kept whole. Of every other block the first
    ``ceil(fraction * length)`` tokens are taken: they are the ones that, computed alone, took the place of
    the beginning. With `deviation`, the share `leading` of them (rounded up) is taken so and the rest where
    it is largest.

    Args:
        lengths: tokens of each block, in order.
        fraction: in [0, 1]; 0 takes none, 1 all.
        deviation: of every token of all blocks, see `key_deviation`.
        leading: share of the picked tokens that are the first ones. Without `deviation` all are.

    Raises:
        InvalidInputError: the fraction is outside [0, 1], or the deviations are not one a token.
    """
    total = sum(lengths)
    if not 0 <= fraction <= 1:
        raise InvalidInputError(f"The fraction is {fraction}.", hint="Expected a number in [0, 1].")
    if deviation is not None and len(deviation) != total:
        raise InvalidInputError(
            f"There are {len(deviation)} deviations for {total} tokens.", hint="One each."
        )
    picked = torch.zeros(total, dtype=torch.bool)
    start = lengths[0] if lengths else 0
    for length in lengths[1:]:
        count = math.ceil(round(fraction * length, 6))  # 0.07 * 100 is a little more than 7
        first = count if deviation is None else math.ceil(leading * count)
        picked[start : start + first] = True
        if deviation is not None and count > first:
            rest = deviation[start + first : start + length]
            order = rest.argsort(descending=True, stable=True)
            picked[start + first + order[: count - first]] = True
        start += length
    return picked
