"""Entries of a prompt: what stands in front of its tokens, and how many there are.

prompt:  | KV prefix (given) | soft prefix (vectors) | tokens |   then the reply
"""

from jaxtyping import Float
from torch import Tensor

from persona_sdk.engine.request import Request
from persona_sdk.errors import IncompatibleAdapterError
from persona_sdk.plan import KVPrefix, SoftPrefix
from persona_sdk.tensors import PREFIX


def given_entries(request: Request) -> int:
    """Entries of a prompt in front of its tokens: KV prefix and soft prefixes."""
    plan = request.plan
    return sum(part.length for kind in (KVPrefix, SoftPrefix) for part in plan.of(kind))


def entries(request: Request) -> int:
    """Entries of a whole prompt."""
    return given_entries(request) + len(request.prompt)


def soft_vectors(request: Request, d_model: int) -> list[Float[Tensor, "_ d_model"]]:
    """The vectors of a request's soft prefixes, in order.

    Raises:
        IncompatibleAdapterError: vectors do not have the width of this model's embeddings.
    """
    found = []
    for prefix in request.plan.of(SoftPrefix):
        vectors = request.tensors[prefix.vectors].get(PREFIX)
        if vectors is None or tuple(vectors.shape) != (prefix.length, d_model):
            shape = None if vectors is None else tuple(vectors.shape)
            raise IncompatibleAdapterError(
                f"Soft prefix {prefix.origin!r} holds vectors of shape {shape}.",
                hint=f"Expected a tensor {PREFIX!r} of shape {(prefix.length, d_model)} for this base model.",
            )
        found.append(vectors)
    return found
