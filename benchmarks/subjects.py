"""The two base models of the composition benchmark.

| name    | what                                                                    | weights   | overhead |
|---------|-------------------------------------------------------------------------|-----------|----------|
| smollm2 | SmolLM2-135M, 30 narrow layers: adapters weigh most against the base    | 538 MB    | worst    |
| wide    | random llama with layers as wide as a 1B model's, and only four of them | 789 MB    | typical  |

Both are float32 and larger than any L3 cache, so that a step streams its weights from memory. Timing
does not depend on the values of weights; random ones of the exact shapes stand in where SmolLM2's cannot
be had, and the result says so.
"""

import random
from collections.abc import Callable, Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from persona_sdk.errors import ModelError
from persona_sdk.models import LanguageModel
from persona_sdk.weights import ALIASES

SMOLLM2: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
)
_TEXT = (
    "the quick brown fox jumps over the lazy dog while nurses speak calmly and plainly about dinner , music "
    "and the long way home after work in a small town by the sea where people know each other"
)
WIDE: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 8192,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
)


def smollm2() -> tuple[LanguageModel, str]:
    """SmolLM2-135M with its own weights if they can be had, and where they came from."""
    try:
        model = LanguageModel.from_pretrained("smollm2-135m", device="cpu", dtype="float32")
    except ModelError as error:
        return random_llama("smollm2-shapes", SMOLLM2), f"random, exact shapes ({type(error).__name__})"
    source = ALIASES["smollm2-135m"]
    return model, f"{source.model}, {source.package} {source.version}"


def wide() -> tuple[LanguageModel, str]:
    """The wide random llama."""
    return random_llama("wide", WIDE), "random"


def random_llama(name: str, shapes: Mapping[str, Any]) -> LanguageModel:
    """A llama of these shapes with a tied head, in float32 on the CPU. It has no tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **shapes))
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=None)
    return LanguageModel.from_module(name, module.float(), tokenizer)


def prompts(model: LanguageModel, *, rows: int, width: int, seed: int) -> Int[Tensor, "rows width"]:
    """Token ids of one prompt a row: a user's message for a model with a tokenizer, else random ids.

    A trained model needs text: on short strings of random tokens SmolLM2 is so ill-conditioned that its own
    float32 logits miss its float64 ones by 4e-5, and adapters multiply that.
    """
    if not callable(model.tokenizer):
        draw = torch.Generator().manual_seed(seed)
        return torch.randint(int(model.module.config.vocab_size), (rows, width), generator=draw)
    choice, words = random.Random(seed), _TEXT.split()
    texts = (" ".join(choice.choices(words, k=width)) for _ in range(rows))
    return torch.tensor([model.tokenizer(f"<|im_start|>user\n{text}")["input_ids"][:width] for text in texts])


SUBJECTS: Mapping[str, Callable[[], tuple[LanguageModel, str]]] = MappingProxyType(
    {"smollm2": smollm2, "wide": wide}
)
