"""Settling new statements against what the store holds: the reading half of a commit. Nothing is written."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from persona_sdk.memory import slots
from persona_sdk.memory.cube import TextEncoder
from persona_sdk.memory.duplicates import DuplicateConfig
from persona_sdk.memory.embedding import embedded
from persona_sdk.memory.enrichment import Change, Ledger
from persona_sdk.memory.slots import Held
from persona_sdk.memory.store import MemoryStore


def settled(
    store: MemoryStore,
    embedder: TextEncoder,
    config: DuplicateConfig,
    owner: str,
    held: Sequence[Held],
) -> Change:
    """What statements do to those that are stored: to the rivals of their slots, and to what is near them."""
    if not held:
        return Change()
    fresh = embedder.encode([one.text for one in held])
    ids, matrix = store.vectors(owner, embedder.fingerprint)
    near: list[str] = []
    if ids:
        close = (matrix @ fresh.T).amax(dim=1) >= min(config.link, 0.999)
        near = [name for name, reached in zip(ids, close.tolist(), strict=True) if reached]
    names = sorted({one.header.slot for one in held if one.header.slot})
    with store.reading() as connection:
        stored = {cube.id: cube for cube in slots.stated(connection, owner, names)}
    stored |= store.lookup(owner, near)
    row = {name: place for place, name in enumerate(ids)}
    vectors: dict[str, Float[Tensor, "d"]] = {
        cube.text: matrix[row[name]] for name, cube in stored.items() if cube.text and name in row
    }
    vectors |= {one.text: vector for one, vector in zip(held, fresh, strict=True)}
    ledger = Ledger(list(stored.values()), vectors, config)
    for one in held:
        ledger.take(one)
    change = ledger.change()
    change.add = embedded(change.add, embedder, vectors)
    return change
