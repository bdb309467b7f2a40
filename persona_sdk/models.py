"""Base models and embedders: the frozen things everything else is bound to.

`LanguageModel` pairs a causal LM of transformers with its tokenizer and its *fingerprint*, the SHA-256
over architecture and weights. Adapters carry the fingerprint of their base and are refused by any other.
It is a property of the stored weights: device, requested precision, file names and times do not enter.

Where weights come from is the business of `persona_sdk.weights`; embedders are in `persona_sdk.embedders`.
"""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.pytorch_utils import Conv1D

from persona_sdk import hub, weights
from persona_sdk.devices import pick_device, pick_dtype
from persona_sdk.embedders import Embedder, SentenceEmbedder, load_embedder
from persona_sdk.errors import ModelError
from persona_sdk.fingerprints import recorded
from persona_sdk.tensors import digest

__all__ = [
    "Embedder",
    "LanguageModel",
    "SentenceEmbedder",
    "fingerprint_of",
    "linear_shape",
    "load_embedder",
]


# What changes the function of a model but none of its tensors' shapes.
_FUNCTIONAL = (
    "activation_function",
    "attention_multiplier",
    "attn_logit_softcapping",
    "embedding_multiplier",
    "final_logit_softcapping",
    "head_dim",
    "hidden_act",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "logits_scaling",
    "num_attention_heads",
    "num_experts_per_tok",
    "num_key_value_heads",
    "partial_rotary_factor",
    "query_pre_attn_scalar",
    "residual_multiplier",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
)


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A frozen causal language model and its tokenizer.

    ``lock`` is held by whoever runs the module (an engine step, a training run), because both work on
    the one set of weights in memory.
    """

    name: str
    module: Any
    tokenizer: Any
    fingerprint: str
    lock: Any = field(default_factory=threading.RLock, repr=False)

    @classmethod
    def from_pretrained(cls, name: str, *, device: str = "auto", dtype: str = "auto") -> "LanguageModel":
        """Load by alias, local path or hub id. Only safetensors are read; no code of the model is run.

        Args:
            name: see `persona_sdk.weights` for what is searched.
            device: ``"auto"`` takes CUDA when there is one.
            dtype: a torch dtype's name; ``"auto"`` for float32 on CPU, where a row of any batch equals the
                row alone, and bfloat16 on CUDA; ``"fastest"`` for whichever of the two is faster on this
                CPU, measured once and kept in the cache folder, and bfloat16 on CUDA. Products in bfloat16
                round differently by batch size, so near ties between tokens may fall otherwise.

        Raises:
            InvalidInputError: no such device or dtype here.
            UnknownModelError: the name leads nowhere.
            ModelError: what is there is no causal language model, or some of its weights are missing.
            DownloadError: weights could not be fetched or failed their hash.
        """
        where = pick_device(device)
        precision = pick_dtype(dtype, where)
        folder = weights.resolve(name)
        module: Any = None

        def widened() -> str:
            nonlocal module
            module = _load_module(folder, torch.float32)  # lossless, whatever they are stored in
            return fingerprint_of(module)

        fingerprint = recorded(folder, "language model", widened)
        if module is None or precision is not torch.float32:
            # Loaded anew rather than cast: .to(bfloat16) would round the float32 buffers of the rotary
            # embedding too, which from_pretrained keeps.
            module = _load_module(folder, precision)
        return cls.from_module(name, module.to(where), _load_tokenizer(folder), fingerprint=fingerprint)

    @classmethod
    def from_module(
        cls, name: str, module: Any, tokenizer: Any, *, fingerprint: str | None = None
    ) -> "LanguageModel":
        """Wrap a model that is already in memory, freezing it in place."""
        module.eval().requires_grad_(False)
        model = cls(name, module, tokenizer, fingerprint or fingerprint_of(module))
        model.linears()  # now, while nobody can be training on it
        return model

    @property
    def device(self) -> torch.device:
        """The torch device of the weights."""
        device: torch.device = next(self.module.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of the weights in memory."""
        dtype: torch.dtype = next(self.module.parameters()).dtype
        return dtype

    @property
    def precision(self) -> str:
        """The name of `dtype`: ``"float32"``, ``"bfloat16"``, ..."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def d_model(self) -> int:
        """Width of the token embeddings."""
        return int(self.module.get_input_embeddings().weight.shape[1])

    @property
    def context_length(self) -> int:
        """Tokens the model was made for, prompt and reply together."""
        return int(getattr(self.module.config.get_text_config(), "max_position_embeddings", 2048))

    def linears(self) -> dict[str, nn.Module]:
        """The modules a low-rank patch may name: every linear map but the output head, by module path."""
        return dict(self._linears)

    @cached_property
    def _linears(self) -> dict[str, nn.Module]:
        with self.lock:  # a training run has layers of its own in the module tree meanwhile
            head = self.module.get_output_embeddings()
            return {
                path: module
                for path, module in self.module.named_modules()
                if isinstance(module, nn.Linear | Conv1D) and module is not head
            }

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """``(d_in, d_out)`` of every module of `linears`."""
        return {path: linear_shape(module) for path, module in self.linears().items()}


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """``(d_in, d_out)`` of a linear map; GPT-2's ``Conv1D`` stores its weight the other way round."""
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (int(rows), int(columns)) if isinstance(module, Conv1D) else (int(columns), int(rows))


def fingerprint_of(module: nn.Module) -> str:
    """SHA-256 (hex) over architecture and weights, the latter widened to float32.

    Besides the shapes, the architecture is what changes the function but no shape (`_FUNCTIONAL`). Named
    one by one, because the defaults in a whole config change with the version of transformers.
    """
    config: Any = module.config
    text = config.get_text_config()
    functional = {key: getattr(text, key) for key in _FUNCTIONAL if getattr(text, key, None) is not None}
    header = json.dumps(["fingerprint-2", config.model_type, functional], sort_keys=True)
    sha = hashlib.sha256(header.encode())
    for name, parameter in sorted(module.named_parameters()):
        sha.update(digest({name: parameter.detach().float()}).encode())
    return sha.hexdigest()


def _load_module(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        with hub.quiet():
            module, found = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"{folder} does not hold a causal language model: {str(error).splitlines()[0]}",
            hint="Expected a transformers folder with config.json and *.safetensors. If it is in our cache, "
            "delete it and it will be fetched again.",
        ) from error
    if absent := sorted(found["missing_keys"]) or sorted(map(str, found["mismatched_keys"])):
        raise ModelError(
            f"{folder} lacks {len(absent)} of the weights of {type(module).__name__}, {absent[0]} for one.",
            hint="transformers would fill them with random numbers. Is it a causal language model?",
        )
    return module


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{folder} does not hold a tokenizer: {str(error).splitlines()[0]}",
            hint="Expected tokenizer.json and tokenizer_config.json beside the weights.",
        ) from error
