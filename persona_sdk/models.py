"""Base models and embedders: the frozen things everything else is bound to.

`LanguageModel` pairs a causal LM of transformers with its tokenizer and its *fingerprint*, the SHA-256
over architecture, tensor names, shapes and weights. Adapters carry the fingerprint of their base and are
refused by any other. `Embedder` turns texts into unit vectors and has a fingerprint of its own.

Where weights come from is the business of `persona_sdk.weights`.
"""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from persona_sdk import weights
from persona_sdk.errors import ModelError
from persona_sdk.tensors import digest


@dataclass(frozen=True)
class LanguageModel:
    """A frozen causal language model and its tokenizer.

    ``lock`` is held by whoever runs the module (an engine step, a training run), because both work on
    the one set of weights in memory.
    """

    name: str
    module: Any
    tokenizer: Any
    fingerprint: str
    lock: Any = field(default_factory=threading.RLock, repr=False, compare=False)

    @classmethod
    def from_pretrained(cls, name: str, *, device: str = "auto", dtype: str = "auto") -> "LanguageModel":
        """Load by alias, local path or hub id.

        Args:
            name: see `persona_sdk.weights` for the order of places that are searched.
            device: ``"auto"`` takes CUDA when there is one.
            dtype: a torch dtype's name, or ``"auto"`` for float32 on CPU and bfloat16 on CUDA.

        Raises:
            UnknownModelError: the name leads nowhere.
            DownloadError: weights could not be fetched or failed their hash.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = weights.resolve(name)
        where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        precision = ("bfloat16" if where.startswith("cuda") else "float32") if dtype == "auto" else dtype
        try:
            module = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{folder} does not hold a causal language model: {error}",
                hint="Expected a transformers folder with config.json, *.safetensors and tokenizer files.",
            ) from error
        mark = _cached_fingerprint(folder, module)
        module = module.to(device=where, dtype=getattr(torch, precision))
        return cls.from_module(name, module, tokenizer, fingerprint=mark)

    @classmethod
    def from_module(
        cls, name: str, module: Any, tokenizer: Any, *, fingerprint: str | None = None
    ) -> "LanguageModel":
        """Wrap a model that is already in memory, freezing it in place."""
        module.eval().requires_grad_(False)
        return cls(name, module, tokenizer, fingerprint or fingerprint_of(module))

    @property
    def device(self) -> torch.device:
        """The torch device of the weights."""
        device: torch.device = next(self.module.parameters()).device
        return device

    @property
    def d_model(self) -> int:
        """Width of the token embeddings."""
        return int(self.module.get_input_embeddings().weight.shape[1])

    @property
    def context_length(self) -> int:
        """Tokens the model was made for, prompt and reply together."""
        return int(getattr(self.module.config, "max_position_embeddings", 2048))

    def linears(self) -> dict[str, nn.Module]:
        """The modules a low-rank patch may name: every linear map but the output head, by module path."""
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
    rows, columns = module.weight.shape  # type: ignore[misc,union-attr]
    return (int(rows), int(columns)) if isinstance(module, Conv1D) else (int(columns), int(rows))


def fingerprint_of(module: nn.Module) -> str:
    """SHA-256 (hex) over architecture and weights, in the precision the weights are stored in."""
    config: Any = module.config
    header = json.dumps([config.model_type, sorted(config.architectures or [])])
    return hashlib.sha256(f"{header}\0{digest(dict(module.named_parameters()))}".encode()).hexdigest()


def _cached_fingerprint(folder: Path, module: nn.Module) -> str:
    """Fingerprint of a folder's model, hashed once per state of its weight files."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    state = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    key = hashlib.sha256(json.dumps([str(folder.resolve()), state]).encode()).hexdigest()
    record = weights.cache_dir() / "fingerprints" / f"{key}.json"
    if record.exists():
        return str(json.loads(record.read_text())["fingerprint"])
    mark = fingerprint_of(module)
    record.parent.mkdir(parents=True, exist_ok=True)
    weights.write_atomically(record, json.dumps({"fingerprint": mark, "folder": str(folder)}).encode())
    return mark


@runtime_checkable
class Embedder(Protocol):
    """Turns texts into unit vectors."""

    fingerprint: str
    dimension: int

    def encode(self, texts: list[str]) -> Float[Tensor, "n d"]:
        """One unit vector per text, float32 on the CPU."""
        ...


class SentenceEmbedder:
    """An `Embedder` over a sentence-transformers model, loaded when it is first used."""

    def __init__(self, name: str = "minilm", *, device: str = "cpu") -> None:
        from sentence_transformers import SentenceTransformer

        folder = weights.resolve(name)
        self._model = SentenceTransformer(str(folder), device=device, local_files_only=True)
        self.dimension = int(self._model.get_embedding_dimension() or 0)
        self.fingerprint = digest({k: v for k, v in self._model.state_dict().items()})

    def encode(self, texts: list[str]) -> Float[Tensor, "n d"]:
        """One unit vector per text, float32 on the CPU."""
        vectors = self._model.encode(
            texts, normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False
        )
        return torch.as_tensor(vectors).float().cpu()
