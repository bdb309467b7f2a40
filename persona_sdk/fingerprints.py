"""Fingerprints of folders, remembered so that gigabytes are hashed once and not at every load."""

import hashlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

from persona_sdk import files

logger = logging.getLogger("persona_sdk.fingerprints")


def recorded(folder: Path, kind: str, compute: Callable[[], str]) -> str:
    """Fingerprint of a folder, computed once per state of its files.

    The state is size, modification and change time of every file that matters, symlinks followed. The
    change time cannot be set by a program, so edits in place are noticed even if they restore the other two.
    """
    state = _state(folder)
    key = hashlib.sha256(json.dumps([2, kind, str(folder.resolve()), state]).encode()).hexdigest()
    record = files.cache_dir() / "fingerprints" / f"{key}.json"
    try:
        known = json.loads(record.read_text())["fingerprint"]
        if isinstance(known, str) and len(known) == 64 and set(known) <= set("0123456789abcdef"):
            return known
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet, or damaged: it is written anew
    fingerprint = compute()
    # File times tick coarsely: a file written a moment ago might change once more within the same tick.
    settled = all(time.time_ns() - max(modified, changed) > 2e9 for _, _, modified, changed in state)
    if settled and _state(folder) == state:
        try:
            record.parent.mkdir(parents=True, exist_ok=True)
            content = {"fingerprint": fingerprint, "kind": kind, "folder": str(folder)}
            files.write_atomically(record, json.dumps(content).encode())
        except OSError as error:  # a read-only cache costs a hash per load, nothing else
            logger.debug("The fingerprint of %s could not be recorded: %s", folder, error)
    return fingerprint


def _state(folder: Path) -> list[tuple[str, int, int, int]]:
    files = sorted(f for pattern in ("*.safetensors", "*.json", "vocab.txt") for f in folder.rglob(pattern))
    stats = [(f.relative_to(folder).as_posix(), f.stat()) for f in files]
    return [(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats]
