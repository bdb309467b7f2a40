"""Small, deterministic stand-ins for tests: random models with a real tokenizer, and a hash embedder.

They behave like the real things (chat template, end token, unit vectors) and take milliseconds, so that
applications can test their own use of this SDK without weights.
"""

import copy
import hashlib
from functools import cache
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from persona_sdk.models import LanguageModel

VOCABULARY = 384

_CORPUS = (
    "The quick brown fox jumps over the lazy dog. Alice likes short answers and metric units. "
    "Bob keeps two dogs and walks them every morning. Nurses speak calmly and plainly. "
    "How warm is eighty degrees Fahrenheit? About twenty-seven degrees Celsius. "
    "What do you know about me? I remember what you told me. system user assistant"
)

_CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([_CORPUS], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token="<|im_start|>"
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def tiny_language_model(
    *,
    seed: int = 0,
    hidden: int = 32,
    layers: int = 2,
    context_length: int = 512,
    architecture: Literal["llama", "gpt2", "qwen2", "gemma"] = "llama",
) -> LanguageModel:
    """A random causal model with a byte-level BPE tokenizer of 384 tokens and a chat template.

    The architectures differ where adapters and caches notice: llama has grouped-query attention, gpt2
    transposed `Conv1D` layers with bias and learned positions, qwen2 a bias on q, k and v, gemma heads wider
    than ``hidden / heads`` and scaled embeddings. All tie the head to the embeddings.

    Models of different `seed` have different fingerprints.
    """
    import transformers

    shape: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
    }
    shape |= {"num_attention_heads": 4, "max_position_embeddings": context_length}
    shape |= {"vocab_size": VOCABULARY, "tie_word_embeddings": True}
    shape |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if architecture == "gpt2":
        shape["n_inner"] = shape.pop("intermediate_size")
        config, model_type = transformers.GPT2Config(**shape), transformers.GPT2LMHeadModel
    else:
        shape["num_key_value_heads"] = 2
        if architecture == "gemma":
            shape["head_dim"] = hidden // 2
        config_type, model_type = {
            "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
            "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
            "gemma": (transformers.GemmaConfig, transformers.GemmaForCausalLM),
        }[architecture]
        config = config_type(**shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = model_type(config)
        with torch.no_grad():  # default initialisation is so small that every greedy reply is the same
            for parameter in module.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=1 / parameter.shape[1] ** 0.5)
    return LanguageModel.from_module(f"tiny-{architecture}-{seed}", module, copy.deepcopy(_tokenizer()))


class HashEmbedder:
    """An embedder without a model: signed hashed words, so texts that share words are near."""

    def __init__(self, dimension: int = 64) -> None:
        self.dimension = dimension
        self.fingerprint = hashlib.sha256(f"hash-embedder-{dimension}".encode()).hexdigest()

    def encode(self, texts: list[str]) -> Float[Tensor, "n d"]:
        """One unit vector per text, float32 on the CPU; ``[0, d]`` for no texts."""
        vectors = torch.zeros(len(texts), self.dimension)
        for row, text in enumerate(texts):
            for word in text.lower().split():
                code = hashlib.sha256(word.strip(".,;:!?\"'").encode()).digest()
                place = int.from_bytes(code[:4], "big") % self.dimension
                vectors[row, place] += 1.0 if code[4] % 2 else -1.0
            if not vectors[row].any():  # no words, or words that cancel out
                vectors[row, 0] = 1.0
        return torch.nn.functional.normalize(vectors, dim=1)
