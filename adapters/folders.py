"""Adapter folders on disk: whole or absent, and nothing in them can execute.

Every family writes through `replace_folder` and reads through `read_tensors` and `read_json`, so that a
full disk, a killed process or a damaged file is the same typed error everywhere. The header (the string
map that safetensors keeps beside the tensors) holds what the tensors mean to this SDK; other tools ignore
it. It travels in one file with the tensors, so the two cannot get out of step:

    persona_family            name of the adapter family
    persona_base_fingerprint  base model the adapter is bound to
    persona_config            the family's configuration, as JSON
    persona_digest            content digest of the tensors, checked on reading
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from persona_sdk import files
from persona_sdk.config import ConfigT, FrozenConfig
from persona_sdk.errors import AdapterError, IncompatibleAdapterError, InvalidInputError, NotFoundError
from persona_sdk.tensors import TensorBundle, digest, freeze

TENSOR_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
CARD_FILE = "README.md"
ADAPTER_FILES = frozenset({TENSOR_FILE, CONFIG_FILE, CARD_FILE})

FAMILY, BASE, CONFIG, DIGEST = (
    f"persona_{field}" for field in ("family", "base_fingerprint", "config", "digest")
)


@contextmanager
def replace_folder(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder to fill; when the block ends well it takes the place of `folder`.

    An adapter folder that is already there is replaced. When the block or the disk fails, what was there
    stays as it was and nothing else is left behind.

    Raises:
        InvalidInputError: `folder` is a file, or holds anything that is not part of an adapter.
        AdapterError: the disk refused.
    """
    target = Path(folder).expanduser().resolve()
    _require_replaceable(target)
    suffix = uuid4().hex[:12]
    fresh = target.with_name(f".{target.name}.{suffix}.new")
    retired = target.with_name(f".{target.name}.{suffix}.old")
    try:
        fresh.mkdir(parents=True)
        yield fresh
        for path in [*fresh.iterdir(), fresh]:
            files.sync(path)
        if target.exists():
            os.rename(target, retired)
        try:
            os.rename(fresh, target)
        except OSError:
            if retired.exists():
                os.rename(retired, target)
            raise
        files.sync(target.parent)
    except OSError as error:
        raise AdapterError(
            f"Could not write {target}: {error}.", hint="Nothing was changed; check space and permissions."
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write a safetensors file in the layout that peft and vLLM read."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)}
    try:
        save_file(plain, path, metadata={"format": "pt", **header})
    except SafetensorError as error:  # its way of saying OSError
        raise OSError(str(error)) from error


def read_tensors(path: Path) -> tuple[TensorBundle, dict[str, str]]:
    """All tensors of a safetensors file, in memory of their own, and its header.

    Raises:
        IncompatibleAdapterError: damaged, or a tensor that holds NaN, infinity or no floats.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:  # clone: the file is mapped and may be replaced
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            header = dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, UnicodeError) as error:
        raise IncompatibleAdapterError(
            f"{path.name} is damaged: {error}.", hint="Copy the adapter again from where it came."
        ) from error
    require_finite(tensors)
    return freeze(tensors), header


def write_adapter(
    folder: str | Path, tensors: TensorBundle, *, family: str, base: str, config: FrozenConfig, card: str
) -> Path:
    """Write the folder of a family with a format of its own: one safetensors file and a card."""
    own = {FAMILY: family, BASE: base, CONFIG: config.model_dump_json(), DIGEST: digest(tensors)}
    with replace_folder(folder) as fresh:
        write_tensors(fresh / TENSOR_FILE, tensors, own)
        (fresh / CARD_FILE).write_text(card, "utf-8")
    return Path(folder)


def read_adapter(
    folder: str | Path, family: str, config_type: type[ConfigT]
) -> tuple[TensorBundle, str, ConfigT]:
    """Tensors, base fingerprint and configuration of a folder that `write_adapter` wrote.

    Raises:
        NotFoundError: there is no such folder.
        IncompatibleAdapterError: damaged, or of another family.
    """
    path = existing_folder(folder)
    tensors, header = read_tensors(path / TENSOR_FILE)
    if header.get(FAMILY) != family or not header.keys() >= {BASE, CONFIG, DIGEST}:
        raise IncompatibleAdapterError(
            f"{path.name} holds an adapter of family {header.get(FAMILY, 'unknown')!r}, not {family!r}.",
            hint="Load it with persona_sdk.registry.family(name).from_pretrained.",
        )
    check_digest(tensors, header, path.name)
    try:
        config = config_type.model_validate_json(header[CONFIG])
    except ValueError as error:
        raise IncompatibleAdapterError(
            f"The configuration in {path.name} is damaged: {error}.",
            hint="Copy the adapter again from where it came.",
        ) from error
    return tensors, header[BASE], config


def require_finite(bundle: TensorBundle) -> None:
    """Raise `IncompatibleAdapterError` unless every tensor holds finite floats."""
    for name, tensor in bundle.items():
        if not tensor.is_floating_point():
            raise IncompatibleAdapterError(
                f"Tensor {name!r} has dtype {str(tensor.dtype).removeprefix('torch.')}.",
                hint="Expected floating point weights; dequantize the adapter before saving it.",
            )
        if not bool(torch.isfinite(tensor.float()).all()):
            raise IncompatibleAdapterError(
                f"Tensor {name!r} holds NaN or infinity.", hint="The adapter diverged; train it again."
            )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises `IncompatibleAdapterError` on anything else."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise IncompatibleAdapterError(
            f"{path.name} is damaged: {error}.", hint="Copy the adapter again from where it came."
        ) from error
    if not isinstance(data, dict):
        raise IncompatibleAdapterError(
            f"{path.name} holds a {type(data).__name__}.", hint="Expected a JSON object."
        )
    return data


def existing_folder(folder: str | Path) -> Path:
    """`folder` as a path; raises `NotFoundError` when there is no such folder."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise NotFoundError(
            f"There is no adapter folder {str(folder)!r}.",
            hint=f"Expected a folder with {CONFIG_FILE} and {TENSOR_FILE}.",
        )
    return path


def check_digest(tensors: TensorBundle, header: Mapping[str, str], name: str) -> None:
    """Raise `IncompatibleAdapterError` when the header promises other content than the tensors have."""
    promised = header.get(DIGEST)
    if promised is not None and promised != digest(tensors):
        raise IncompatibleAdapterError(
            f"The weights in {name} are not those that were saved: their digest differs from the header's.",
            hint="Copy the adapter again from where it came.",
        )


def _require_replaceable(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise InvalidInputError(f"{target} is a file.", hint="Name a folder to save the adapter in.")
    present = {path.name for path in target.iterdir()}
    strangers = sorted(present - ADAPTER_FILES)
    if strangers or (present and TENSOR_FILE not in present):
        shown = strangers or sorted(present)
        raise InvalidInputError(
            f"{target} is not an adapter folder: it holds {', '.join(shown[:3])}.",
            hint="Choose a new or empty folder, or an adapter folder to replace.",
        )
