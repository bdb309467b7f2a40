"""What was measured on this machine, kept in the cache folder until something it depends on changes.

One file per measurement and machine. A file that is damaged, or of another machine, is measured anew; where
nothing can be written, the measurement serves this process.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from persona_sdk.files import write_atomically

logger = logging.getLogger("persona_sdk")

Found = TypeVar("Found")
_NO_MEASUREMENT = (OSError, ValueError, TypeError, KeyError, AttributeError)


def machine_key(device: torch.device, **versions: int) -> dict[str, str]:
    """What a measurement holds for: the machine, and versions of what was measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model()
    return {
        "device": f"{device.type} {name}",
        "cpus": str(os.cpu_count()),
        "torch": torch.__version__,
        "numba": _version("numba"),
        "threads": str(torch.get_num_threads()),
        **{what: str(version) for what, version in versions.items()},
    }


def kept(folder: Path, key: Mapping[str, str], read: Callable[[Any], Found]) -> Found | None:
    """What a folder keeps for a key; None if there is nothing that `read` accepts.

    Args:
        folder: where `measured_once` wrote.
        key: of `machine_key`.
        read: from the file's JSON object; raises ValueError, TypeError, KeyError or AttributeError on
            anything that is not a measurement.
    """
    file = _file(folder, key)
    try:
        data = json.loads(file.read_text())
        if data["machine"] == dict(key):
            return read(data)
    except _NO_MEASUREMENT:
        logger.debug("%s holds no measurement of this machine.", file)
    return None


def measured_once(
    folder: Path,
    key: Mapping[str, str],
    *,
    read: Callable[[Any], Found],
    write: Callable[[Found], Mapping[str, Any] | None],
    measure: Callable[[], Found],
) -> Found:
    """What is kept, or what `measure` finds now, kept from here on as `write` makes it JSON.

    None from `write` keeps nothing: the machine was too busy for a measurement that is worth it.
    """
    found = kept(folder, key, read)
    if found is not None:
        return found
    started = time.perf_counter()
    found = measure()
    logger.info("%s measured in %.1f s.", folder.name, time.perf_counter() - started)
    written = write(found)
    if written is None:
        logger.info("%s was not measured in full and is not kept.", folder.name)
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        data = {"machine": dict(key), **written}
        write_atomically(_file(folder, key), json.dumps(data, indent=1).encode())
    except OSError as error:
        logger.info("The measurement is not kept: %s.", error)
    return found


def _file(folder: Path, key: Mapping[str, str]) -> Path:
    mark = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return folder / f"{mark[:16]}.json"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    fields = dict.fromkeys(line for line in lines if line.startswith(("model", "cpu family", "CPU part")))
    return "; ".join(" ".join(line.split()) for line in fields) or platform.processor() or platform.machine()
