"""What makes two prefixes the same: one key for the composition, one hash a block of tokens.

    root = H(composition, block)                  composition = H(base, (factors, gate)..., soft prefixes...)
    h_i  = H(h_{i-1}, tokens of block i)          h_0 = root, H = SHA-256

| symbol | field                  | shape                                          |
|--------|------------------------|------------------------------------------------|
| h_i    | `chain`                | one for every whole block, 64 hex digits       |

A low-rank patch on any module changes the keys and values of every later layer, so the composition is part
of each hash: a new adapter version or another gate starts another chain. Hashes only find; whoever finds
compares the tokens.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from persona_sdk import plan as plans
from persona_sdk.plan import CompositionPlan, KVPrefix, SoftPrefix
from persona_sdk.tensors import Digest

BLOCK = 16


def composition_key(plan: CompositionPlan) -> Digest:
    """What decides the keys and values of a prompt's tokens besides the tokens; see `persona_sdk.plan`."""
    return plans.composition_key(plan.base, plan.parts)


def lead_length(plan: CompositionPlan) -> int:
    """How many positions stand in front of the prompt's first token."""
    return sum(part.length for part in (*plan.of(SoftPrefix), *plan.of(KVPrefix)))


def chain(key: Digest, tokens: Sequence[int], block: int = BLOCK) -> list[Digest]:
    """The hash of every block boundary: item i stands for the first ``(i + 1) * block`` tokens."""
    link = root(key, block)
    data = np.asarray(tokens, dtype="<i8")  # one byte order: hashes are compared across machines
    found = []
    for end in range(block, len(tokens) + 1, block):
        link = hashlib.sha256(bytes.fromhex(link) + data[end - block : end].tobytes()).hexdigest()
        found.append(link)
    return found


def root(key: Digest, block: int = BLOCK) -> Digest:
    """Where a composition's chain begins: what stands for its soft prefix alone."""
    return hashlib.sha256(f"prefix {block} {key}".encode()).hexdigest()
