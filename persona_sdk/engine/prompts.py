"""Left-padded layout of a batch of prompts, with each row's soft prefix in front of its tokens.

    row 0:   pad pad | soft soft | tok tok tok
    row 1:   pad pad   pad  pad  | tok tok tok         positions count from each row's first real entry
    row 2:   soft soft soft soft | tok tok tok

Left padding keeps every row's last token in the last column, so one forward pass gives all next tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from persona_sdk.errors import IncompatibleAdapterError
from persona_sdk.plan import SoftPrefix
from persona_sdk.tensors import PREFIX, Digest, TensorBundle


@dataclass(frozen=True)
class PromptBatch:
    """Inputs of the first forward pass. Exactly one of `tokens` and `embeddings` is set."""

    mask: Int[Tensor, "rows width"]
    positions: Int[Tensor, "rows width"]
    tokens: Int[Tensor, "rows width"] | None
    embeddings: Float[Tensor, "rows width d_model"] | None

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments for a transformers causal LM."""
        given = {"input_ids": self.tokens} if self.embeddings is None else {"inputs_embeds": self.embeddings}
        return {**given, "attention_mask": self.mask, "position_ids": self.positions}


def positions_of(mask: Int[Tensor, "rows width"]) -> Int[Tensor, "rows width"]:
    """Position of every entry, counted from the first real one of its row; padding gets 0."""
    return (mask.cumsum(dim=1) - 1).clamp_(min=0)


def soft_vectors(
    prefixes: Sequence[SoftPrefix], tensors: Mapping[Digest, TensorBundle], d_model: int
) -> list[Float[Tensor, "_ d_model"]]:
    """The vectors of a row's soft prefixes, in order.

    Raises:
        IncompatibleAdapterError: vectors do not have the width of this model's embeddings.
    """
    found = []
    for prefix in prefixes:
        vectors = tensors[prefix.vectors].get(PREFIX)
        if vectors is None or tuple(vectors.shape) != (prefix.length, d_model):
            shape = None if vectors is None else tuple(vectors.shape)
            raise IncompatibleAdapterError(
                f"Soft prefix {prefix.origin!r} holds vectors of shape {shape}.",
                hint=f"Expected a tensor {PREFIX!r} of shape {(prefix.length, d_model)} for this base model.",
            )
        found.append(vectors)
    return found


def lay_out(
    prompts: Sequence[Sequence[int]],
    soft: Sequence[Sequence[Float[Tensor, "_ d_model"]]],
    *,
    embed: nn.Module,
    pad: int,
    device: torch.device,
) -> PromptBatch:
    """Build the first forward pass for prompts of different lengths.

    Token ids are passed as such unless some row has a soft prefix, so that a plan without one takes the
    very path of the base model.
    """
    soft_lengths = [sum(vectors.shape[0] for vectors in row) for row in soft]
    lengths = [len(prompt) + extra for prompt, extra in zip(prompts, soft_lengths, strict=True)]
    width = max(lengths)
    tokens = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        tokens[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - length :] = 1
    tokens, mask = tokens.to(device), mask.to(device)
    if not any(soft_lengths):
        return PromptBatch(mask, positions_of(mask), tokens, None)
    embeddings = embed(tokens)
    for row, vectors in enumerate(soft):
        if vectors:
            start = width - lengths[row]
            embeddings[row, start : start + soft_lengths[row]] = torch.cat(list(vectors)).to(embeddings)
    return PromptBatch(mask, positions_of(mask), None, embeddings)
