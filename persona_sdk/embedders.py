"""Embedders: texts to unit vectors, for retrieval and for user profiles.

An index belongs to one embedder, by its fingerprint. `SentenceEmbedder` runs sentence-transformers models;
anything with the three members of `Embedder` will do.
"""

import hashlib
import json
import threading
from inspect import getattr_static
from pathlib import Path
from typing import Any, Protocol, _ProtocolMeta, runtime_checkable

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from persona_sdk import hub, weights
from persona_sdk.devices import pick_device
from persona_sdk.errors import InvalidInputError, ModelError
from persona_sdk.fingerprints import recorded
from persona_sdk.tensors import digest


class _LooksOnly(_ProtocolMeta):
    """Lets isinstance() look for names without evaluating properties, as Python 3.12 does by itself.

    On 3.11 it would load the model, or raise what loading raises.
    """

    def __instancecheck__(self, instance: object) -> bool:
        return all(hasattr_static(instance, name) for name in ("encode", "dimension", "fingerprint"))


def hasattr_static(instance: object, name: str) -> bool:
    """Whether there is such an attribute; properties are not evaluated."""
    missing = object()
    return getattr_static(instance, name, missing) is not missing


@runtime_checkable
class Embedder(Protocol, metaclass=_LooksOnly):
    """Turns texts into unit vectors."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of whatever decides what a text's vector is; an index belongs to one."""
        ...

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        ...

    def encode(self, texts: list[str]) -> Float[Tensor, "n d"]:
        """One unit vector per text, float32 on the CPU; ``[0, d]`` for no texts."""
        ...


class SentenceEmbedder:
    """An `Embedder` over a sentence-transformers model, loaded when it is first used.

    Thread-safe: fast tokenizers and the model are shared, so encoding takes turns.

    Args:
        name: ``"minilm"``, a path or a hub id, resolved at first use.
        device: a torch device, or ``"auto"``.
        batch_size: texts that are encoded together.
    """

    def __init__(self, name: str = "minilm", *, device: str = "cpu", batch_size: int = 32) -> None:
        self.name = name
        self._device = device
        self._batch_size = batch_size
        self._lock = threading.RLock()
        self._model: Any = None
        self._fingerprint = ""
        self._dimension = 0

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over weights, pooling and length limit; needs the files, not the loaded model."""
        with self._lock:
            if not self._fingerprint:
                folder = weights.resolve(self.name)
                self._fingerprint = recorded(folder, "embedder", lambda: _embedder_fingerprint(folder))
            return self._fingerprint

    @property
    def dimension(self) -> int:
        """Length of a vector; loads the model."""
        self._loaded()
        return self._dimension

    def encode(self, texts: list[str]) -> Float[Tensor, "n d"]:
        """One unit vector per text, float32 on the CPU; ``[0, d]`` for no texts."""
        model = self._loaded()
        if not texts:
            return torch.zeros(0, self._dimension)
        with self._lock:
            vectors = model.encode(
                texts,
                batch_size=self._batch_size,
                normalize_embeddings=True,
                convert_to_tensor=True,
                show_progress_bar=False,
            )
        return torch.as_tensor(vectors).float().cpu()

    def _loaded(self) -> Any:
        with self._lock:
            if self._model is None:
                folder = weights.resolve(self.name)
                model = _load_sentence_transformer(folder, pick_device(self._device))
                # Measured, because the method that tells it has another name in every major version.
                self._dimension = int(model.encode([""], show_progress_bar=False).shape[1])
                self._model = model
            return self._model


def load_embedder(embedder: "str | Path | Embedder" = "minilm", *, device: str = "cpu") -> Embedder:
    """Return an embedder by alias, path or hub id; an object that already is one is returned as it is.

    Raises:
        InvalidInputError: `embedder` is neither a name nor an `Embedder`.
    """
    if isinstance(embedder, str | Path):
        return SentenceEmbedder(str(embedder), device=device)
    if isinstance(embedder, Embedder):
        return embedder
    raise InvalidInputError(
        f"{type(embedder).__name__} is no embedder.",
        hint="Give an alias, a path, a hub id, or an object with encode(), dimension and fingerprint.",
    )


def _embedder_fingerprint(folder: Path) -> str:
    from safetensors.torch import load_file

    sha = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        sha.update(f"{file.relative_to(folder).as_posix()}\0{digest(load_file(file))}\0".encode())
    settings = {"config.json", "modules.json", "sentence_bert_config.json", "vocab.txt"}
    settings |= {"config_sentence_transformers.json", "tokenizer.json", "tokenizer_config.json"}
    for file in sorted(file for file in folder.rglob("*") if file.name in settings):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        sha.update(f"{file.relative_to(folder).as_posix()}\0{content}\0".encode())
    return sha.hexdigest()


def _load_sentence_transformer(folder: Path, device: torch.device) -> Any:
    _refuse_code(folder)
    from sentence_transformers import SentenceTransformer

    try:
        with hub.quiet():
            return SentenceTransformer(
                str(folder),
                device=str(device),
                local_files_only=True,
                model_kwargs={"use_safetensors": True},
            ).eval()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"{folder} does not hold a sentence-transformers model: {str(error).splitlines()[0]}",
            hint="Expected a folder with modules.json, config.json and *.safetensors.",
        ) from error


def _refuse_code(folder: Path) -> None:
    """Raise `ModelError` where a folder names foreign classes or holds weights only as pickles."""
    modules = folder / "modules.json"
    types = [str(m.get("type")) for m in json.loads(modules.read_text())] if modules.is_file() else []
    foreign = [t for t in types if not t.startswith("sentence_transformers.")]
    pickles = [f for f in folder.rglob("*.bin") if not any(f.parent.glob("*.safetensors"))]
    if foreign or pickles:
        raise ModelError(
            f"{folder} would run code when loaded: {', '.join([*foreign, *(p.name for p in pickles)])}.",
            hint="Only sentence-transformers' own modules with safetensors weights are loaded.",
        )
