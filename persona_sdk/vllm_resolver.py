"""Personas as LoRA names of a vLLM server: a `LoRAResolver` that writes the folder when a name is asked for.

Names are those of `persona_sdk.persona_names`: ``alice``, ``alice+cooks``, ``alice+cooks@weight=0.5``.

Installed beside vLLM, this package registers itself (entry point ``vllm.general_plugins``) when the
environment names a store. Nothing else of vLLM is touched, and this module imports without it.

    PERSONA_STORE           folder of the store
    PERSONA_MODEL           the base model, where vLLM's own name for it is no folder and no hub id
    PERSONA_EXPORTS         folder for what is written; default: exports/ in the cache
    PERSONA_EXPORT_PARTIAL  1: leave out what a PEFT folder cannot hold (logged) instead of refusing the name

vLLM asks once per name and keeps the answer until the name is unloaded (``/v1/unload_lora_adapter``). A path
is never reused for other content: it ends in the version, and vLLM's prefix cache has the path in its key.
"""

import asyncio
import hashlib
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from persona_sdk import files, weights
from persona_sdk.adapter_composition import compose_adapters
from persona_sdk.errors import IncompatibleAdapterError, ModelError, NotFoundError
from persona_sdk.fingerprints import recorded
from persona_sdk.library import AdapterLibrary
from persona_sdk.materialize import Materialized, sources_of, version_of, write_once
from persona_sdk.memory import MemoryStore
from persona_sdk.models import LanguageModel
from persona_sdk.persona_names import VERSION_DIGITS, NotANameError, PersonaName

_ABANDONED = 3600.0  # seconds after which a folder that was being written is nobody's
_OURS = re.compile(r"[0-9a-f]{64}|\.\.?[0-9a-f]{32}\.new.*")

logger = logging.getLogger("persona_sdk.vllm_resolver")


class PersonaResolver:
    """Resolves names against one store. Any thread, any number of processes.

    Args:
        store: folder of the store; it must be there.
        exports: folder for what is written.
        model: the base model of the server; None takes vLLM's own name for it.
        partial: see ``PERSONA_EXPORT_PARTIAL``.
    """

    def __init__(
        self, store: str | Path, exports: str | Path, *, model: str | None = None, partial: bool = False
    ) -> None:
        self._folder, self._exports = Path(store), Path(exports)
        self._model, self._partial = model, partial
        self._pruned = False
        self._bases: dict[str, LanguageModel] = {}
        self._lock = threading.Lock()

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "PersonaResolver | None":
        """The resolver that the environment describes; None where it names no store."""
        store = environment.get("PERSONA_STORE")
        if not store:
            return None
        # One folder a store: each deletes what its own store no longer holds.
        name = hashlib.sha256(str(Path(store).expanduser().resolve()).encode()).hexdigest()[:16]
        return cls(
            Path(store).expanduser(),
            Path(environment.get("PERSONA_EXPORTS") or files.cache_dir() / "exports" / name).expanduser(),
            model=environment.get("PERSONA_MODEL") or None,
            partial=environment.get("PERSONA_EXPORT_PARTIAL", "") == "1",
        )

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """What vLLM calls: a `LoRARequest`, or None where the name is not ours.

        Raises:
            CompositionError: the persona is known, but what it uses cannot be served as a LoRA. vLLM answers
                such a ValueError with status 400 and its text, where None would read "does not exist".
            StoreError: the store cannot be read.
        """
        try:
            found = await asyncio.to_thread(self.resolve, base_model_name, lora_name)
        except (NotFoundError, IncompatibleAdapterError, ModelError, NotANameError) as error:
            logger.warning("%.200r is not served: %s", lora_name, error)
            return None
        request: Any = import_module("vllm.lora.request").LoRARequest
        return request(lora_name, lora_id(lora_name, found.version), str(found.path))

    def resolve(self, base_model_name: str, name: str) -> Materialized:
        """The folder for a name, written if need be.

        Raises:
            InvalidInputError: no name, or a setting that no adapter takes.
            NotFoundError: no such persona, group or version.
            IncompatibleAdapterError: adapters of another base model.
            CompositionError: what the persona uses cannot be served as a LoRA.
        """
        parsed = PersonaName.parse(name)
        base = self._base(base_model_name)
        # Opened for every name, of which vLLM asks each once: an open store would keep weights in memory that
        # another process forgets, and keep that process from scrubbing its database.
        with self._open() as store:
            if not self._pruned:
                self._prune(store)
                self._pruned = True
            composition = compose_adapters(
                base.fingerprint,
                store,
                AdapterLibrary(base, store),
                parsed.persona,
                groups=parsed.groups,
                adjust=parsed.adjust,
            )
            current = version_of(composition, base_name=base_model_name)[:VERSION_DIGITS]
            if parsed.version not in (None, current):
                raise NotFoundError(f"{name!r} names an old version.", hint=f"The current one is #{current}.")
            found = write_once(
                composition, base, self._exports, base_name=base_model_name, partial=self._partial
            )
        for what in (*found.left_out, *found.skipped):
            logger.warning("%r is served without %s", name, what)
        return found

    def prune(self) -> list[Path]:
        """Delete folders made from an adapter that was forgotten since, and what crashes left behind.

        Runs before the first name is resolved. A server that loaded such a folder has it in memory until its
        name is unloaded.
        """
        with self._open() as store:
            return self._prune(store)

    def _open(self) -> MemoryStore:
        if not (self._folder / "personas.db").is_file():
            raise NotFoundError(f"{self._folder} holds no store.", hint="Set PERSONA_STORE to its folder.")
        return MemoryStore.open(self._folder)

    def _prune(self, store: MemoryStore) -> list[Path]:
        gone = []
        for folder in self._exports.iterdir() if self._exports.is_dir() else ():
            if not _OURS.fullmatch(
                folder.name
            ):  # the folder may have been set to one with other things in it
                continue
            try:
                if folder.name.startswith("."):
                    dead = time.time() - folder.stat().st_mtime > _ABANDONED
                else:
                    dead = not all(map(store.vault.holds, sources_of(folder)))
            except Exception as error:  # another process deletes it, or it is damaged: then it is of no use
                logger.warning("%s cannot be read and goes: %s", folder, error)
                dead = True
            if dead:
                shutil.rmtree(folder, ignore_errors=True)
                gone.append(folder)
        return gone

    def _base(self, served: str) -> LanguageModel:
        """The base model that vLLM serves, without its weights.

        Raises:
            IncompatibleAdapterError: vLLM serves another model than the one that was configured.
        """
        with self._lock:
            base = self._skeleton(self._model or served)
            if (
                self._model
                and Path(served).is_dir()
                and self._skeleton(served).fingerprint != base.fingerprint
            ):
                raise IncompatibleAdapterError(
                    f"vLLM serves {served}, PERSONA_MODEL is {self._model}; their weights differ.",
                    hint="Leave PERSONA_MODEL unset, or serve that model.",
                )
            return base

    def _skeleton(self, name: str) -> LanguageModel:
        if name not in self._bases:
            self._bases[name] = skeleton(name)
        return self._bases[name]


def skeleton(name: str) -> LanguageModel:
    """A base model with its fingerprint and its modules, whose weights take no memory.

    The weights are read once per machine, for the fingerprint, which is then on record.

    Raises:
        ModelError: the name leads nowhere, or to no causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = weights.resolve(name)

    def compute() -> str:
        return LanguageModel.from_pretrained(str(folder), device="cpu", dtype="float32").fingerprint

    fingerprint = recorded(folder, "language model", compute)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config)
    return LanguageModel.from_module(name, module, None, fingerprint=fingerprint)


def lora_id(name: str, version: str) -> int:
    """The positive 63-bit id of a name and its content: equal in every process, unlike Python's `hash`."""
    digest = hashlib.sha256(f"{name}\0{version}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1 or 1


def register() -> None:
    """Entry point of ``vllm.general_plugins``; vLLM calls it in each of its processes."""
    resolver = PersonaResolver.from_environment()
    if resolver is None:
        logger.info("PERSONA_STORE is not set: no personas are resolved.")
        return
    vllm: Any = import_module("vllm.lora.resolver")
    vllm.LoRAResolver.register(PersonaResolver)  # a virtual subclass: this module must import without vLLM
    vllm.LoRAResolverRegistry.register_resolver("persona_sdk", resolver)
