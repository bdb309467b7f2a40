"""Checkpoints of a training run: folders of safetensors and JSON, whole or skipped, bound to their run.

    FOLDER/checkpoint-STEP/
        weights.safetensors     what training changes; never the frozen base
        best.safetensors        the same after the best evaluation, if there was one
        optimizer.safetensors   moments of AdamW, by parameter
        random.safetensors      random state of every process (`persona_sdk.adapters.random_state`)
        optimizer.json, scheduler.json, evaluation.json, trainer_state.json
        run.json                which run it belongs to, and the SHA-256 of every other file

A checkpoint is written beside its place, synced and renamed, so a killed process leaves the previous one.
What does not match its hashes is skipped. A folder that holds another run's checkpoints is refused, not
overwritten.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor

from persona_sdk import files, tensors
from persona_sdk.adapters import folders
from persona_sdk.config import FrozenConfig
from persona_sdk.errors import AdapterError, InvalidInputError

logger = logging.getLogger("persona_sdk.adapters.training")

RUN_FILE = "run.json"
_NAME = re.compile(r"checkpoint-([0-9]+)")
_SUFFIXES = {".safetensors", ".json"}


class Checkpoints(FrozenConfig):
    """Where and how often to write checkpoints; a run whose checkpoint is found there goes on from it."""

    folder: Path = Field(description="of this run alone; with several machines, one that all of them see")
    every: int = Field(ge=1, description="optimizer steps; there is one after the last step too")
    keep: int = Field(1, ge=1, description="newest checkpoints that stay")


@dataclass(frozen=True)
class Checkpoint:
    """One whole checkpoint on disk."""

    path: Path

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.path.name.rpartition("-")[2])

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one file, in memory of their own."""
        from safetensors.torch import load

        content = load((self.path / f"{name}.safetensors").read_bytes())
        return {key: tensor.clone() for key, tensor in content.items()}

    def data(self, name: str) -> Any:
        """The content of one JSON file."""
        return json.loads((self.path / f"{name}.json").read_text("utf-8"))


def describe_run(
    options: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    base: str,
    learned: Mapping[str, Tensor],
    **more: Any,
) -> dict[str, Any]:
    """What makes a run this one and no other, as JSON.

    Args:
        options: how to train.
        rows: encoded rows; tensors in them count by content.
        base: fingerprint of the base model.
        learned: tensors that training changes; their names, shapes and types count, not their content.
        more: whatever else decides the result, as JSON.
    """
    shapes = {name: [str(tensor.dtype), *tensor.shape] for name, tensor in sorted(learned.items())}
    run = {"options": dict(options), "rows": _hash(list(rows)), "base": base, "parameters": _hash(shapes)}
    described: dict[str, Any] = json.loads(json.dumps({**run, **more}))
    return described


def find(folder: Path, run: Mapping[str, Any]) -> Checkpoint | None:
    """The newest whole checkpoint of this run; damaged ones are skipped with a warning.

    Raises:
        InvalidInputError: the folder is a file, or holds a checkpoint of another run or of other software.
    """
    if folder.exists() and not folder.is_dir():
        raise InvalidInputError(f"{folder} is a file.", hint="Name a folder to keep checkpoints in.")
    for path in reversed(_listed(folder)):
        strangers = sorted(file.name for file in path.iterdir() if file.suffix not in _SUFFIXES)
        if strangers:
            raise InvalidInputError(
                f"{path} is no checkpoint of this SDK: it holds {strangers[0]}.", hint="Choose a new folder."
            )
        manifest = _manifest(path)
        if manifest is not None and manifest["run"] != run:
            raise _another_run(path, manifest["run"], run)
        if manifest is not None and _is_whole(path, manifest["files"]):
            return Checkpoint(path)
        logger.warning("Checkpoint %s is damaged; it is skipped.", path)
    return None


def write(
    options: Checkpoints,
    step: int,
    run: Mapping[str, Any],
    bundles: Mapping[str, Mapping[str, Tensor]],
    data: Mapping[str, Any],
) -> None:
    """Write the checkpoint of a step, then remove those that are too many.

    Args:
        options: where, and how many to keep.
        step: optimizer steps done.
        run: made by `describe_run`.
        bundles: name -> tensors; each becomes a safetensors file.
        data: name -> JSON; each becomes a JSON file.

    Raises:
        AdapterError: the disk refused; earlier checkpoints are untouched.
    """
    folder, target = options.folder, options.folder / f"checkpoint-{step}"
    fresh = folder / f".{target.name}.new"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".checkpoint-*.new"):
            shutil.rmtree(leftover)
        fresh.mkdir()
        for name, content in bundles.items():
            folders.write_tensors(fresh / f"{name}.safetensors", content, {})
        for name, value in data.items():
            (fresh / f"{name}.json").write_text(json.dumps(value), "utf-8")
        hashes = {path.name: _file_hash(path) for path in sorted(fresh.iterdir())}
        (fresh / RUN_FILE).write_text(json.dumps({"run": run, "files": hashes}, indent=1), "utf-8")
        for path in [*fresh.iterdir(), fresh]:
            files.sync(path)
        if target.exists():  # a damaged one: a whole one would have been gone on from
            shutil.rmtree(target)
        os.rename(fresh, target)
        files.sync(folder)
        # later ones can only be damaged; counting them would remove what is whole
        done = [path for path in _listed(folder) if Checkpoint(path).step <= step]
        for path in done[: -options.keep]:
            shutil.rmtree(path)
    except OSError as error:
        raise AdapterError(
            f"Could not write {target}: {error}.",
            hint="Earlier checkpoints are untouched; check space and permissions and start the run again.",
        ) from error


def _listed(folder: Path) -> list[Path]:
    """Checkpoint folders in the order of their steps."""
    found = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: Checkpoint(path).step)


def _manifest(path: Path) -> dict[str, Any] | None:
    try:
        read = json.loads((path / RUN_FILE).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    parts = (read.get("run"), read.get("files")) if isinstance(read, dict) else ()
    return read if parts and all(isinstance(part, dict) for part in parts) else None


def _is_whole(path: Path, hashes: Mapping[str, str]) -> bool:
    present = {file.name for file in path.iterdir()} - {RUN_FILE}
    return present == set(hashes) and all(_file_hash(path / name) == hashes[name] for name in present)


def _another_run(path: Path, found: Mapping[str, Any], run: Mapping[str, Any]) -> InvalidInputError:
    differing = []
    for part in sorted({*found, *run}):
        theirs, ours = found.get(part), run.get(part)
        if isinstance(theirs, dict) and isinstance(ours, dict):
            differing += [
                f"{key} {theirs.get(key)!r:.40} (now {ours.get(key)!r:.40})"
                for key in sorted({*theirs, *ours})
                if theirs.get(key) != ours.get(key)
            ]
        elif theirs != ours:
            differing.append(part)
    return InvalidInputError(
        f"{path} belongs to another run; it differs in {', '.join(differing)}.",
        hint="Use the data and options of that run to continue it, or another folder for this one.",
    )


def _hash(value: Any) -> str:
    def plain(inner: Any) -> Any:
        if isinstance(inner, Tensor):
            return tensors.digest({"": inner})
        if is_dataclass(inner) and not isinstance(inner, type):
            return asdict(inner)
        raise TypeError(f"A row holds a {type(inner).__name__}; expected tensors, dataclasses and JSON.")

    return hashlib.sha256(json.dumps(value, sort_keys=True, default=plain).encode()).hexdigest()


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
