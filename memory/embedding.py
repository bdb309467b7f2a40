"""Vectors of drafts: every text that is to be found by its meaning gets one before it is committed."""

from collections.abc import Sequence
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from persona_sdk.memory.cube import CubeDraft, TextEncoder


def embedded(
    drafts: Sequence[CubeDraft],
    embedder: TextEncoder,
    known: dict[str, Float[Tensor, "d"]] | None = None,
) -> list[CubeDraft]:
    """The drafts with the vectors of their texts, each text encoded once.

    Args:
        drafts: what is to be committed.
        embedder: makes the vectors.
        known: its vectors by text, which are not made again; what is made is added.
    """
    vectors = {} if known is None else known
    missing = [t for t in dict.fromkeys(draft.text or "" for draft in drafts) if t not in vectors]
    if missing:
        vectors |= dict(zip(missing, embedder.encode(missing), strict=True))
    encoder = embedder.fingerprint
    return [replace(draft, vector=vectors[draft.text or ""], encoder=encoder) for draft in drafts]
