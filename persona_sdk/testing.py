"""Small, deterministic stand-ins for tests: a random llama with a real tokenizer, and a hash embedder.

They behave like the real things (chat template, end token, unit vectors) and take milliseconds, so that
applications can test their own use of this SDK without weights.
"""

import hashlib
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from persona_sdk.models import LanguageModel

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
def _tokenizer() -> object:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=384,
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
    *, seed: int = 0, hidden: int = 32, layers: int = 2, context_length: int = 512
) -> LanguageModel:
    """A random llama (grouped-query attention, tied head) with a byte-level BPE tokenizer of 384 tokens.

    Models of different `seed` have different fingerprints.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=384,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context_length,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = LlamaForCausalLM(config)
        with torch.no_grad():  # default initialisation is so small that every greedy reply is the same
            for parameter in module.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=0.5 / parameter.shape[1] ** 0.5 * 2)
    return LanguageModel.from_module(f"tiny-{seed}", module, _tokenizer())


class HashEmbedder:
    """An embedder without a model: hashed words, so texts that share words are near."""

    def __init__(self, dimension: int = 64) -> None:
        self.dimension = dimension
        self.fingerprint = hashlib.sha256(f"hash-embedder-{dimension}".encode()).hexdigest()

    def encode(self, texts: list[str]) -> Float[Tensor, "n d"]:
        """One unit vector per text, float32 on the CPU."""
        vectors = torch.zeros(len(texts), self.dimension)
        for row, text in enumerate(texts):
            for word in text.lower().split():
                code = hashlib.sha256(word.strip(".,;:!?\"'").encode()).digest()
                vectors[row, code[0] % self.dimension] += 1.0 if code[1] % 2 else -1.0
            if not vectors[row].any():
                vectors[row, 0] = 1.0
        return torch.nn.functional.normalize(vectors, dim=1)
