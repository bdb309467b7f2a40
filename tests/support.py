"""What the tests of the facade share."""

from persona_sdk import LoRA

from .engine.support import random_factors

FAST = {"max_new_tokens": 8}


def lora(model, seed: int, rank: int = 4) -> LoRA:
    return LoRA.from_tensors(model.base.fingerprint, random_factors(model.base, seed, rank))


def patches(reply) -> list[str]:
    return [part.origin for part in reply.plan.low_rank]
