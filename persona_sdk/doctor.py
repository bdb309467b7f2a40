"""Is this machine ready? Versions, device, cache, disk and store, as data for ``persona doctor``.

Looking changes nothing, except that opening a store migrates it, as any use of it would.
"""

import os
import platform
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from persona_sdk import files, weights
from persona_sdk.errors import PersonaError

PACKAGE = "persona-sdk"
NAMED = ("torch", "transformers", "peft", "faiss-cpu", "sentence-transformers")
CONVERSION_BYTES = 1_200_000_000
SPARE_BYTES = 200_000_000


@dataclass(frozen=True)
class Check:
    """One finding. `hint` says what to do when it is not `ok`."""

    name: str
    ok: bool
    detail: str
    hint: str = ""


def checks(store: str | Path | None = None) -> list[Check]:
    """Everything worth knowing about this machine, and about a store if one is named. Never raises."""
    found = [_python(), *_packages(), _device(), _cache(), *_models(), _disk()]
    return [*found, _store(Path(store))] if store is not None else found


def _python() -> Check:
    wanted = "" if _about() is None else str(metadata.metadata(PACKAGE)["Requires-Python"])
    version = platform.python_version()
    ok = SpecifierSet(wanted).contains(version, prereleases=True)
    return Check(
        "python", ok, f"{version} on {platform.system()} {platform.machine()}", f"Use Python {wanted}."
    )


def _about() -> list[Requirement] | None:
    """What the installed package requires, extras left out; None if it is not installed."""
    try:
        named = [Requirement(line) for line in metadata.requires(PACKAGE) or []]
    except metadata.PackageNotFoundError:
        return None
    return [r for r in named if r.marker is None or r.marker.evaluate({"extra": ""})]


def _packages() -> list[Check]:
    requirements = _about()
    if requirements is None:
        return [Check("packages", False, f"{PACKAGE} is not installed", "Run: pip install -e .")]
    every = [_package(requirement) for requirement in requirements]
    rows = [check for check in every if check.name in NAMED or not check.ok]
    rest = len(every) - len(rows)
    return [*rows, Check("other packages", True, f"{rest} in their ranges")] if rest else rows


def _package(requirement: Requirement) -> Check:
    hint = f'Run: pip install "{requirement.name}{requirement.specifier}"'
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Check(requirement.name, False, "not installed", hint)
    ok = requirement.specifier.contains(version, prereleases=True)
    detail = version if ok else f"{version}, needs {requirement.specifier}"
    return Check(requirement.name, ok, detail, hint)


def _device() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of torch is missing
        return Check("device", False, f"torch cannot be imported: {error}", "Install torch again.")
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9
        precision = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16, use dtype='float32'"
        return Check("device", True, f"{torch.cuda.get_device_name(0)}, {memory:.0f} GB, {precision}")
    from persona_sdk.precision import already_measured

    times = already_measured()
    fastest = "" if times is None else f", bfloat16 {times.speed_up:.1f} times as fast"
    return Check("device", True, f"CPU, {torch.get_num_threads()} threads, float32{fastest}")


def _cache() -> Check:
    folder = files.cache_dir()
    hint = "Set PERSONA_CACHE to a folder that can be written."
    existing = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Check("cache", False, f"{existing} cannot be written", hint)
    return Check("cache", True, f"{folder}, {weights.size_on_disk(folder) / 1e6:.0f} MB")


def _models() -> list[Check]:
    return [
        Check(
            row.alias,
            True,
            f"cached, {row.bytes / 1e6:.0f} MB"
            if row.cached
            else f"{row.bytes / 1e6:.0f} MB to fetch at first use",
        )
        for row in weights.known()
    ]


def _disk() -> Check:
    folder = files.cache_dir().absolute()
    existing = next(parent for parent in [folder, *folder.parents] if parent.is_dir())
    free = shutil.disk_usage(existing).free
    needed = SPARE_BYTES if all(row.cached for row in weights.known()) else CONVERSION_BYTES
    return Check(
        "disk",
        free >= needed,
        f"{free / 1e9:.1f} GB free",
        f"Free {needed / 1e9:.1f} GB, or set PERSONA_CACHE.",
    )


def _store(folder: Path) -> Check:
    if not folder.is_dir():
        return Check(
            "store", False, f"{folder} is no folder", "Check the path; a store is made when it is first used."
        )
    from persona_sdk.memory import MemoryStore

    try:
        with MemoryStore.open(folder) as store:
            return Check("store", True, f"{folder}, {len(list(store.personas()))} personas")
    except PersonaError as error:
        return Check("store", False, error.message, error.hint)
